"""The list of a pack's near-duplicates, near_duplicates.csv, and which of them a person struck out.

A line is a pair: numbers of both clips (lines of clips.jsonl, from 0), kind, score (above 0; true
copies mostly have over 3), seconds they share, and of each its source, the start of the clip in it
and where in it the shared part begins. Whoever finds a pair that is none copies its line to a file
not_duplicates.csv beside it, with or without the line of headings. There it stays however often the
pack is made anew: pairs are told by the names and starts of their clips.
"""

import csv
import hashlib
import io
import os
from pathlib import Path

import numpy as np

from pretrain.data.index import NEAR
from pretrain.files import decimal, open_regular, read_limited, reading, replacing, write_synced
from pretrain.names import counted, first_of, for_csv

MOST = 64  # pairs that are listed of a clip; a chain of pairs leads to further ones
MAX_STRUCK = 2**26  # bytes of not_duplicates.csv
STRUCK = "not_duplicates.csv"
COLUMNS = (
    "clip", "other_clip", "kind", "score", "seconds", "source", "start", "from", "other_source",
    "other_start", "other_from",
)  # fmt: skip


def near_lines(rows: list[dict]) -> bytes:
    """The list as it is written, of one object a pair by `COLUMNS`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: for_csv(value) for name, value in row.items()} for row in rows)
    return text.getvalue().encode()


def read_pairs(folder: Path, about: dict, num_clips: int) -> np.ndarray:
    """The near-duplicates of a pack that nobody struck out, numbers of clips (K, 2).

    Args:
        folder: of the pack.
        about: what the index says of the list.
        num_clips: how many clips the pack has.

    Raises:
        ValueError: it is not the file that the index describes, or cannot be true.
    """
    struck = read_struck(folder)
    pairs = [pair for key, pair in _listed(folder, about, num_clips) if key not in struck]
    return np.array(pairs, np.int64).reshape(-1, 2)


def unmatched(folder: Path, about: dict, num_clips: int) -> str:
    """A sentence on lines that a person struck out and that are not in the list, if there are any.

    Args:
        folder: of the pack.
        about: what the index says of the list.
        num_clips: how many clips the pack has.

    Raises:
        ValueError: as of `read_pairs` and `read_struck`.
    """
    struck = read_struck(folder)
    known = {key for key, _ in _listed(folder, about, num_clips)} if struck else set()
    names = [
        f"line {line} ({' and '.join(row[COLUMNS.index(c)] for c in ('source', 'other_source'))})"
        for key, (line, row) in struck.items()
        if key not in known
    ]
    if not names:
        return ""
    return (
        f"{STRUCK} names {counted(len(names), 'pair')} that {NEAR} does not, by source and start: "
        f"{first_of(names, 3)}. Copy lines as they are; remove those of clips that are gone"
    )


def _listed(
    folder: Path, about: dict, num_clips: int
) -> list[tuple[frozenset[tuple[str, float]], tuple[int, int]]]:
    """The pairs of the list, each with what tells it."""
    path = folder / NEAR
    wrong = f"{path} is not the file its index describes: pack again"
    with reading(path), open_regular(path) as file:
        data = file.read(about["bytes"] + 1)
    if len(data) != about["bytes"] or hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise ValueError(wrong)
    pairs, number = [], 0
    try:
        for number, row in enumerate(csv.reader(io.StringIO(data.decode(errors="replace"))), 1):
            if number == 1 and tuple(row) == COLUMNS:
                continue
            a, b = (_whole(cell) for cell in [*row, "", ""][:2])
            if number == 1 or not 0 <= a < b < num_clips:
                raise ValueError
            pairs.append((pair_key(row), (a, b)))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}:{number}: no pair of clips: pack again") from error
    return pairs


def _whole(cell: str) -> int:
    return int(cell) if cell.isascii() and cell.isdigit() and len(cell) < 16 else -1


def pair_key(row: list[str]) -> frozenset[tuple[str, float]]:
    """What tells a pair, of the cells of its line; a spreadsheet writes 0.0 as 0.

    Raises:
        ValueError: it has other cells, or a start is no number.
    """
    cells = dict(zip(COLUMNS, row, strict=True))
    first, other = decimal(cells["start"]), decimal(cells["other_start"])
    return frozenset({(cells["source"], first), (cells["other_source"], other)})


def read_struck(folder: Path) -> dict[frozenset[tuple[str, float]], tuple[int, list[str]]]:
    """The pairs that a person struck out, as `pair_key` tells them: of each its line and cells.

    Raises:
        ValueError: a line is none of the list.
    """
    path = folder / STRUCK
    if not os.path.lexists(path):  # a link to nothing is a mistake
        return {}
    with reading(path):
        data = read_limited(path, MAX_STRUCK)
    struck: dict[frozenset[tuple[str, float]], tuple[int, list[str]]] = {}
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8: save it as CSV UTF-8 ({error})") from error
    try:
        for row in reader:
            if row and tuple(row) != COLUMNS:
                struck.setdefault(pair_key(row), (reader.line_num, row))
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{path}:{reader.line_num}: not a line of {NEAR}: copy whole lines, all "
            f"{len(COLUMNS)} columns"
        ) from error
    return struck


def add_struck(parts: list[Path], folder: Path) -> None:
    """Add the pairs that a person struck out in parts of a pack to those of the whole.

    Args:
        parts: folders.
        folder: of the whole; what it has stays as it is.

    Raises:
        ValueError: a line is none of the list.
    """
    known = read_struck(folder)
    rows = {k: row for part in parts for k, (_, row) in read_struck(part).items() if k not in known}
    if not rows:
        return
    path = folder / STRUCK
    before = read_limited(path, MAX_STRUCK) if path.exists() else b""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([*([] if before else [COLUMNS]), *rows.values()])
    if before and not before.endswith(b"\n"):
        before += b"\n"
    with replacing(path) as aside:
        write_synced(aside, before + text.getvalue().encode())
