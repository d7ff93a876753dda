"""Columns of clips.jsonl: what clips are chosen by, mapped instead of parsed.

They lie in clips.safetensors of the pack and say of every clip, in the order of the lines:

    end                   where its line ends: the place of its line feed in clips.jsonl
    crc                   of its line, without the line feed
    shard, frames, width, height, captions (how many)
    label, split, kind    places in the classes of the index and in two tables; -1: none

`tables` (bytes of JSON) holds the names of the splits, and the kinds: which streams a clip has, and
how they were made. A line is read where it is needed, alone, and compared with the columns. So a
pack opens without a Python object a clip, and all processes of a machine share one copy.

The file is made of clips.jsonl and carries its hash. Where it is missing or damaged, or belongs to
other lines, it is made anew: in memory, and for large packs in the cache.
"""

import hashlib
import json
import mmap
import os
import sys
import weakref
import zlib
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from filelock import FileLock
from safetensors.numpy import save

from pretrain.data.guard import MAX_PIXELS
from pretrain.data.index import COLUMNS, MAX_LINE, LineCheck, check_digest, checked_lines
from pretrain.files import (
    cache_folder,
    keep_newest,
    open_regular,
    parse_json,
    reading,
    replacing,
    write_synced,
)
from pretrain.names import for_screen

FORMAT = "muybridge-columns-1"
# By the codes of `array`, which are 8 and 4 bytes wide wherever Python and PyTorch run.
_TYPES = {
    "end": "q", "crc": "I", "shard": "I", "frames": "I", "width": "I", "height": "I",
    "captions": "I", "label": "i", "split": "i", "kind": "i",
}  # fmt: skip
_NAMES = {"q": "I64", "I": "U32", "i": "I32", "B": "U8"}  # of safetensors
_COMPARED = ("shard", "frames", "width", "height", "captions", "label", "split", "kind")
MAX_HEADER = 2**14  # bytes; ours takes 900
MAX_TABLES = 2**26  # bytes
# clips.jsonl up to this size, bytes, is compared with its hash when a pack is opened; of a larger
# one the size is, and each line when it is read.
WHOLE = 2**28
KEPT = 2**24  # bytes of a clips.jsonl whose columns are kept in the cache, if it has none beside it
MOST_KEPT = 32  # files of columns in the cache; those longest unused go
_STEP = 2**20  # clips that are checked at once


def made_of(row: dict) -> str:
    """The kind of a clip: which streams it has and how they were made, as text."""
    about: dict[str, object] = {"main": row["main"]} if "main" in row else {}
    for name, entry in row.get("streams", {}).items():
        fields = ("skeleton", "joints", "columns") if name == "pose" else ("method",)
        about[name] = [entry[field] for field in fields]
    return json.dumps(about)


class _Coder:
    """Numbers for the values of a clip: codes of its label, split and kind among them."""

    def __init__(self, classes: list[str], splits: Iterable[str] = (), kinds: Iterable[str] = ()):
        self.classes, self.splits, self.kinds = (
            {name: i for i, name in enumerate(names)} for names in (classes, splits, kinds)
        )

    def codes(self, row: dict, grow: bool) -> tuple[int, ...]:
        """The values of `_COMPARED`; a split or kind not met before gets a number, or else -2."""
        split, kind = row["split"], made_of(row)
        if grow:
            self.kinds.setdefault(kind, len(self.kinds))
            if split is not None:
                self.splits.setdefault(split, len(self.splits))
        return (
            row["shard"],
            row["frames"],
            row["width"],
            row["height"],
            len(row["captions"]),
            -1 if row["label"] is None else self.classes[row["label"]],
            -1 if split is None else self.splits.get(split, -2),
            self.kinds.get(kind, -2),
        )


Arrays = dict[str, np.ndarray]


def make_columns(lines: Iterable[tuple[bytes, dict]], classes: list[str]) -> Arrays:
    """The columns of lines of clips.jsonl, each without its line feed and with what it says."""
    columns = {name: array(code) for name, code in _TYPES.items()}
    coder, at = _Coder(classes), 0
    for line, row in lines:
        at += len(line)
        columns["end"].append(at)
        at += 1
        columns["crc"].append(zlib.crc32(line))
        for name, value in zip(_COMPARED, coder.codes(row, grow=True), strict=True):
            columns[name].append(value)
    tables = json.dumps({"splits": list(coder.splits), "kinds": list(coder.kinds)}).encode()
    made = {name: np.frombuffer(c, f"={c.typecode}") for name, c in columns.items()}
    return made | {"tables": np.frombuffer(tables, np.uint8)}


def columns_file(columns: Arrays, clips_sha256: str) -> bytes:
    """The file of columns: safetensors, whose metadata name their lines and their own hash."""
    about = {"format": FORMAT, "clips_sha256": clips_sha256, "sha256": _digest(columns)}
    return save(columns, {"about": json.dumps(about)})  # of several, it would shuffle the order


def _digest(columns: Arrays) -> str:
    digest = hashlib.sha256()
    for name in (*_TYPES, "tables"):
        digest.update(columns[name].data)
    return digest.hexdigest()


def _read_columns(path: Path, index: dict) -> Arrays | None:
    """The columns in a file, mapped; None if there is none, or it belongs to other lines.

    Raises:
        ValueError: it is damaged, or cannot be true.
    """
    if not os.path.lexists(path):
        return None
    with reading(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError("its header is too long")
        header = parse_json(file.read(length))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    match header:
        case {"__metadata__": {"about": str(text)}}:
            about = parse_json(text)
        case _:
            raise ValueError("its header is none of ours")
    match about:
        case {"format": str(form), "clips_sha256": str(lines), "sha256": str(digest)}:
            if form != FORMAT or lines != index["clips_sha256"]:
                return None
        case _:
            raise ValueError("its header is none of ours")
    assert isinstance(header, dict)  # it was matched
    columns: Arrays = {}
    for name, code in (*_TYPES.items(), ("tables", "B")):
        entry, width = header.get(name), np.dtype(f"={code}").itemsize
        match entry:
            case {"dtype": dtype, "shape": [int(count)], "data_offsets": [int(start), int(stop)]}:
                fits = 0 <= start <= stop <= size - 8 - length and stop - start == count * width
                many = count == index["num_clips"] if code != "B" else count <= MAX_TABLES
                if dtype == _NAMES[code] and fits and many:
                    data = memoryview(mapped)[8 + length + start : 8 + length + stop]
                    columns[name] = np.frombuffer(data, f"={code}") if count else np.empty(0, code)
                    continue
        raise ValueError(f"it has no usable {name!r}")
    if _digest(columns) != digest:
        raise ValueError("it has changed on the disk")
    splits, kinds = _tables(columns)
    most = {
        "shard": len(index["shards"]),
        "label": len(index["classes"]),
        "split": len(splits),
        "kind": len(kinds),
    }
    for start in range(0, index["num_clips"], _STEP):
        part = {name: columns[name][start : start + _STEP] for name in _TYPES}
        lengths = np.diff(part["end"], prepend=columns["end"][start - 1] if start else -1)
        pixels = part["width"].astype(np.uint64) * part["height"]
        fine = (lengths > 1).all() and (lengths <= MAX_LINE + 1).all()
        fine = fine and (pixels > 0).all() and (pixels <= MAX_PIXELS).all()
        if not fine or not (part["frames"] > 0).all():
            raise ValueError("a line of it cannot be true")
        for name, bound in most.items():
            least = -1 if name in ("label", "split") else 0
            if not ((part[name] >= least) & (part[name] < bound)).all():
                raise ValueError(f"a {name} of it cannot be true")
    return columns


def _tables(columns: Arrays) -> tuple[list[str], list[str]]:
    """The names of the splits, and the kinds.

    Raises:
        ValueError: they are damaged.
    """
    match parse_json(columns["tables"].tobytes()):
        case {"splits": [*splits], "kinds": [*kinds]}:
            if all(type(name) is str for name in (*splits, *kinds)):
                return splits, kinds
    raise ValueError("its tables are damaged")


def _find_columns(folder: Path, index: dict) -> Arrays:
    """The columns of a pack: those beside its lines, those in the cache, or else made now.

    Raises:
        ValueError: the lines are not those the index describes, or one cannot be true.
    """
    if (found := _try(folder / COLUMNS, index)) is not None:
        return found
    lines = lambda: make_columns(checked_lines(folder, index), index["classes"])
    size = os.stat(folder / "clips.jsonl").st_size if (folder / "clips.jsonl").is_file() else 0
    if size < KEPT:
        return lines()
    path = cache_folder() / "columns" / f"{index['clips_sha256'][:32]}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # one process of a run makes them
            if (found := _try(path, index)) is not None:
                os.utime(path)
                return found
            columns = lines()
            with replacing(path) as aside:
                write_synced(aside, columns_file(columns, index["clips_sha256"]))
            keep_newest(path.parent, ".safetensors", MOST_KEPT)
    except (OSError, NotImplementedError):  # the latter: a disk that knows no locks
        return lines()
    return _try(path, index) or columns


def _try(path: Path, index: dict) -> Arrays | None:
    try:
        return _read_columns(path, index)
    except ValueError as error:
        told = f"warning: {for_screen(str(path))}: {error}; the columns of clips are made anew"
        print(told, file=sys.stderr, flush=True)
        return None


class Clips:
    """The lines about the clips of a pack, and columns of them.

    Attributes:
        columns: by name, (len(self),) each.
        splits: names, to which the column `split` points.

    Args:
        folder: the pack.
        index: its index, as `load_index` gives it.

    Raises:
        ValueError: clips.jsonl is not the file that the index describes, or a line cannot be true.
    """

    def __init__(self, folder: Path, index: dict):
        self._path, self._check = folder / "clips.jsonl", LineCheck(folder / "clips.jsonl", index)
        self.columns = _find_columns(folder, index)
        self.splits, kinds = _tables(self.columns)
        self._coder = _Coder(index["classes"], self.splits, kinds)
        end = self.columns["end"]
        size = int(end[-1]) + 1 if len(end) else 0
        with reading(self._path), open_regular(self._path) as file:
            there = os.fstat(file.fileno()).st_size
            if size != there or size <= WHOLE:
                check_digest(file, self._path, index)
            self._handle = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._handle)
        if size != there:  # the columns are not those of these lines
            raise ValueError(f"{self._path} has {there} bytes, its columns say {size}: pack again")

    def __len__(self) -> int:
        return len(self.columns["end"])

    def row(self, sample: int) -> dict:
        """What the line of one clip says.

        Raises:
            ValueError: it cannot be true, or is not the line that the columns are about.
        """
        end = self.columns["end"]
        start, stop = int(end[sample - 1]) + 1 if sample else 0, int(end[sample])
        with reading(self._path):
            line = os.pread(self._handle, stop - start, start)
        number = sample % len(end) + 1
        if zlib.crc32(line) != self.columns["crc"][sample]:
            raise ValueError(f"{self._path}:{number} has changed on the disk: pack again")
        row = self._check(line, number)
        for name, value in zip(_COMPARED, self._coder.codes(row, grow=False), strict=True):
            if value != self.columns[name][sample]:
                raise ValueError(
                    f"{self._path}:{number} has another {name} than {COLUMNS} says: delete that "
                    "file, and it is made anew"
                )
        return row
