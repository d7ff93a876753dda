"""VideoFolder of Hugging Face's datasets: metadata.csv, .jsonl or .parquet beside the videos.

The column `file_name` names a video below the folder of the file; the others are those of a list.
https://huggingface.co/docs/datasets/video_load
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from pretrain.data.annotations.rows import MAX_BYTES, MAX_ROWS
from pretrain.data.lists import Problems, irregular
from pretrain.files import open_regular

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
MAX_UNPACKED = 2**30  # bytes of a parquet file's values


def metadata_files(folder: Path) -> list[Path]:
    """Such files in a folder or, for instance for each split, right below it."""
    places = [folder]
    with os.scandir(folder) as entries:
        places += sorted(Path(e.path) for e in entries if e.is_dir() and e.name[0] != ".")
    files = [place / name for place in places for name in NAMES]
    return [file for file in files if not irregular(file) and _names_files(file)]


def _names_files(file: Path) -> bool:
    if file.suffix == ".parquet":
        return True
    with open_regular(file) as opened:
        first = opened.readline(10_000).decode("utf-8-sig", errors="replace")
    return bool(re.search(r"(?<![a-z])file_name\b", first))


def is_metadata(path: Path) -> bool:
    """Whether a list has such a file's name."""
    return path.name in NAMES


def metadata_rows(
    path: Path, rows: Iterator[tuple[int, dict]], problems: Problems
) -> Iterator[tuple[int, dict]]:
    """Rows of such a file as those of a list; names that leave its folder are refused."""
    count, named = 0, False
    for line, row in rows:
        name = row.get("file_name")
        named |= "file_name" in row
        parts = str(name).replace("\\", "/").split("/")
        if "file_name" in row and (parts[0] == "" or ":" in parts[0] or ".." in parts):
            what = f"file_name {str(name)[:80]!r} leaves the folder: name files below it"
            problems.add(line, what, "unread")
            continue
        count += 1
        yield line, row
    if named:
        problems.notes.append(f"{path.name} is VideoFolder metadata, entries: {count}")


def parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a parquet file, numbered from 1; values that are bytes are left out.

    Raises:
        ValueError: pyarrow is not installed, or the file is damaged or too large.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(
            f"{path}: parquet wants pyarrow: pip install 'muybridge[parquet]', or save it as csv"
        ) from error
    line = 0
    with open_regular(path) as opened:
        if os.fstat(opened.fileno()).st_size > MAX_BYTES:
            raise ValueError(f"{path} is over {MAX_BYTES >> 20} MiB: split it")
        try:
            file = ParquetFile(opened)
            about = file.metadata
            sizes = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            if about.num_rows > MAX_ROWS or sizes > MAX_UNPACKED:
                raise ValueError("too large: split it")
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    line += 1
                    known = {k: v for k, v in row.items() if v is not None and not _raw(v)}
                    yield line, {k: _plain(v) for k, v in known.items()}
        except (ArrowException, ValueError, OSError) as error:
            raise ValueError(f"{path} cannot be read as parquet: {str(error)[:200]}") from error


def _raw(value: object) -> bool:
    return isinstance(value, bytes) or (isinstance(value, dict) and "bytes" in value)


def _plain(value: object) -> object:
    """A value as JSON may have it: times, decimals and other kinds of parquet become texts."""
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value if value is None or isinstance(value, str | int | float) else str(value)
