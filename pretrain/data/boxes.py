"""Reads boxes around people over time, as trackers, detectors and annotators write them.

See `parse_boxes` for the layouts. A file may be anybody's: what cannot be true is refused by line.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.data.annotations.benchmarks import AVA_REACH, is_ava
from pretrain.data.annotations.rows import parse_xml
from pretrain.data.coco import Id, is_id, last_number, read_images
from pretrain.data.lists import MAX_ID
from pretrain.data.tracks import Tracks
from pretrain.files import decimal, parse_json

MAX_BYTES = 2**26  # of one file
MAX_ROWS = 2**20
MAX_FRAMES = 2**31
LARGEST = 1e6  # pixels; a larger number is a mistake
# What the columns of a table are called; capitals, spaces, - and _ make no difference.
_COLUMNS = {
    "frame": ("frame", "frameid", "framenumber", "frameindex"),
    "time": ("time", "timestamp", "seconds", "sec", "t"),
    "id": ("id", "track", "trackid", "person", "personid", "objectid", "subject"),
    "left": ("x", "left", "x1", "xmin", "bbleft"),
    "top": ("y", "top", "y1", "ymin", "bbtop"),
    "width": ("w", "width", "bbwidth"),
    "height": ("h", "height", "bbheight"),
    "right": ("x2", "xmax", "right"),
    "bottom": ("y2", "ymax", "bottom"),
}
_MOT = "frame,id,left,top,width,height"
_HELP = f"write a first line that names the columns, such as frame,id,x,y,w,h, or MOT's {_MOT},..."


@dataclass(frozen=True)
class Boxes:
    """Boxes around people of one video.

    Attributes:
        tracks: by the person's identity: when, (N,) ascending, and left, top, right and bottom,
            (N, 4).
        seconds: whether `when` is in seconds; otherwise it is numbers of frames, from 0.
        still: whether they are of the whole video, whenever.
        frame: width and height of the picture in the units of the boxes, (1, 1) where these are
            fractions of it; None: they are pixels of the video.
    """

    tracks: dict[str, tuple[np.ndarray, np.ndarray]]
    seconds: bool = False
    still: bool = False
    frame: tuple[float, float] | None = None


@dataclass
class _Row:
    """A box: the line it stands in, when it is, whose it is ("": not said), its four sides."""

    line: str
    when: float
    who: str
    box: tuple[float, ...]


def still_boxes(text: str) -> Boxes:
    """Boxes of whole videos that stand in a list itself: `x y w h`, or several with `;` between.

    Raises:
        ValueError: it is something else.
    """
    whole = re.sub(r"[\[\]()]", " ", re.sub(r"\]\s*,\s*\[", ";", text))
    rows = []
    for number, part in enumerate(filter(str.strip, whole.split(";")), 1):
        words = re.split(r"[\s,]+", part.strip(" ,\t"))
        if len(words) != 4:
            raise ValueError(f"{part.strip()[:60]!r} is no box: give x y w h, or a file of boxes")
        left, top, width, height = (_number(word, f"box {number}") for word in words)
        box = _checked((left, top, left + width, top + height), f"box {number}")
        rows.append(_Row(f"box {number}", 0.0, str(number), box))
    if not rows:
        raise ValueError("there is no box in it: give x y w h, or a file of boxes")
    return Boxes(_grouped(rows), still=True, frame=_fractions(rows))


def parse_boxes(data: bytes, video: str = "") -> Boxes:
    """Boxes from the bytes of one file, of one of these layouts, recognised by content.

    - MOT Challenge's text: rows `frame,id,left,top,width,height[,confidence,...]`; frames count
      from 1 (from 0 if there is a 0), the id -1 is none, rows of confidence 0 do not count.
    - A table with a first line that names its columns: `frame` (from 0) or `time` (seconds); `id`
      (`track`, `person`) if there is more than one; `x,y,w,h`, or `x1,y1,x2,y2` (`left`, `xmin`,
      ...). Further columns are not read.
    - CVAT for video's XML, of one video: the boxes of tracks where they are not outside.
    - COCO's JSON, of one video: `annotations` with `images`, whose order (`frame_id`, or else `id`)
      is the order of frames; or a list of results, whose `image_id` (or its last number) counts
      frames, from 0 if there is a 0, otherwise from 1. `bbox` is x, y, w, h; `track_id` tells
      people apart.
    - AVA's csv, of many videos, of which the rows of `video` count (its name, without the ending):
      a box holds half a second before and behind its second.

    Boxes are in pixels of the upright video, or, where all are between 0 and 1, in fractions of it.
    Where no identities are given, overlap from frame to frame tells them.

    Raises:
        ValueError: it is none of these, is too large, or a line of it cannot be true.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES:,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text: no file of boxes") from error
    if not text.strip():
        raise ValueError(f"it is empty: {_HELP}")
    frame, seconds = None, False
    if text.lstrip()[0] == "<":
        rows = _cvat(text)
    elif text.lstrip()[0] in "{[":
        rows, frame = _coco(text)
    elif is_ava(text):
        rows, seconds = _ava(text, video), True
    else:
        rows, seconds = _table(text)
    if not rows:
        raise ValueError("there is no box in it")
    return Boxes(_grouped(rows), seconds=seconds, frame=frame or _fractions(rows))


def _number(word: object, line: str) -> float:
    try:
        value = decimal(word)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{line}: {str(word)[:40]!r} where a number has to be") from None
    if not abs(value) <= LARGEST:  # false for NaN
        raise ValueError(f"{line}: {str(word)[:40]!r} is no place in a picture: leave out the line")
    return value


def _checked(box: tuple[float, ...], line: str) -> tuple[float, ...]:
    left, top, right, bottom = box
    if not (right > left and bottom > top):
        raise ValueError(
            f"{line}: a box of {right - left:g} x {bottom - top:g} pixels: leave out the line, or "
            "name the columns x1,y1,x2,y2 if these are corners"
        )
    return box


def _when(word: object, line: str, seconds: bool) -> float:
    value = _number(word, line) if seconds else _whole(word, line)
    if not 0 <= value < MAX_FRAMES:
        raise ValueError(f"{line}: {str(word)[:40]!r} is no number of a frame, or time")
    return value


def _whole(word: object, line: str) -> float:
    text = str(word).strip()
    if not re.fullmatch(r"[0-9]{1,12}(\.0*)?", text):
        raise ValueError(f"{line}: {text[:40]!r} is no number of a frame: name the column time, if "
                         "it is seconds")  # fmt: skip
    return float(text)


def _fractions(rows: list[_Row]) -> tuple[float, float] | None:
    sides = np.array([row.box for row in rows])
    return (1.0, 1.0) if sides.min() >= 0 and sides.max() <= 1 else None


def _grouped(rows: list[_Row]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The rows of each person, in the order of time."""
    rows = sorted(rows, key=lambda row: row.when)
    if any(not row.who for row in rows):  # where some have no identity, nobody's counts
        _link(rows)
    seen: dict[tuple[str, float], str] = {}
    whose: dict[str, list[_Row]] = {}
    for row in rows:
        if other := seen.get((row.who, row.when)):
            raise ValueError(
                f"{row.line}: another box of {row.who[:40]!r} at {row.when:g}, as {other} has: "
                "leave out one"
            )
        seen[row.who, row.when] = row.line
        whose.setdefault(row.who, []).append(row)
    return {
        who: (np.array([row.when for row in mine]), np.array([row.box for row in mine]))
        for who, mine in whose.items()
    }


def _link(rows: list[_Row]) -> None:
    """Give identities to rows, in the order of time, by overlap."""
    tracks, at = Tracks(), 0
    while at < len(rows):
        there = [row for row in rows[at : at + 1000] if row.when == rows[at].when]
        if len(there) > 64:
            raise ValueError(f"{there[0].line}: over 64 boxes of one frame and no identities")
        names = tracks.update(np.array([row.box for row in there]))
        for row, name in zip(there, names, strict=True):
            row.who = f"{name + 1}"
        at += len(there)


# ---- tables


def _table(text: str) -> tuple[list[_Row], bool]:
    lines = [(f"line {i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if len(lines) > MAX_ROWS:
        raise ValueError(f"more than {MAX_ROWS} lines")
    first = lines[0][1]
    separator = next((mark for mark in ",;\t" if mark in first), None)
    split = lambda line: line.split() if separator is None else _csv(line, separator)
    if not re.search(r"[A-Za-z]{3}|\b[xywht]\b", first, re.IGNORECASE) or first.lower() == "nan":
        return _mot((line, split(content)) for line, content in lines), False
    names = [re.sub(r"[\s_-]+", "", name).lower() for name in split(first)]
    at = {
        role: next(i for i, name in enumerate(names) if name in known)
        for role, known in _COLUMNS.items()
        if any(name in known for name in names)
    }
    ends = {"width", "height"} <= at.keys(), {"right", "bottom"} <= at.keys()
    if not {"left", "top"} <= at.keys() or not any(ends) or not at.keys() & {"frame", "time"}:
        raise ValueError(f"its columns are {first[:80]!r}: {_HELP}")
    seconds, corners = "frame" not in at, not ends[0]
    rows = []
    for line, content in lines[1:]:
        words = split(content)
        if len(words) < len(names):
            raise ValueError(f"{line} has {len(words)} values, the first line {len(names)}")
        sides = ("left", "top", *(("right", "bottom") if corners else ("width", "height")))
        box = tuple(_number(words[at[name]], line) for name in sides)
        if not corners:
            box = (*box[:2], box[0] + box[2], box[1] + box[3])
        when = _when(words[at["time" if seconds else "frame"]], line, seconds)
        who = words[at["id"]].strip()[:MAX_ID] if "id" in at else ""
        rows.append(_Row(line, when, "" if who == "-1" else who, _checked(box, line)))
    return rows, seconds


def _csv(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(line), delimiter=separator), [])
    except csv.Error as error:
        raise ValueError(f"{line[:40]!r} cannot be read as csv: {error}") from error


def _mot(lines: Iterable[tuple[str, list[str]]]) -> list[_Row]:
    rows, counted = [], False
    for line, words in lines:
        if len(words) < 6:
            raise ValueError(f"{line} has {len(words)} values, and MOT's rows are {_MOT}: {_HELP}")
        when = _when(words[0], line, seconds=False)
        counted = counted or when == 0
        left, top, width, height = (_number(word, line) for word in words[2:6])
        if len(words) > 6 and _number(words[6], line) == 0:
            continue  # of no account, as the challenge's own annotations have it
        who = f"{_number(words[1], line):g}"
        box = _checked((left, top, left + width, top + height), line)
        rows.append(_Row(line, when, "" if who == "-1" else who, box))
    for row in () if counted else rows:
        row.when -= 1
    return rows


def _ava(text: str, video: str) -> list[_Row]:
    """The boxes of one video; of a person at a second there is a row for each action."""
    seen: dict[tuple[str, float], _Row] = {}
    for i, line in enumerate(text.splitlines(), 1):
        if not line.startswith(f"{video},"):
            continue
        name, words = f"line {i}", _csv(line, ",")
        if len(words) != 8:
            raise ValueError(f"{name} has {len(words)} values, AVA's with a person have 8")
        when, who = _when(words[1], name, True), words[7].strip()[:MAX_ID]
        box = _checked(tuple(_number(word, name) for word in words[2:6]), name)
        for at in (max(0.0, when - AVA_REACH), when, when + AVA_REACH):
            seen.setdefault((who, at), _Row(name, at, who, box))
    return list(seen.values())


# ---- XML and JSON


def _cvat(text: str) -> list[_Row]:
    rows = []
    for track in parse_xml("CVAT's XML", text).iterfind("track"):
        who = str(track.get("id"))[:MAX_ID]
        for box in track.iterfind("box"):
            if box.get("outside") == "1":
                continue
            line = f"track {who}, frame {str(box.get('frame'))[:40]}"
            sides = tuple(_number(box.get(k), line) for k in ("xtl", "ytl", "xbr", "ybr"))
            rows.append(
                _Row(line, _when(box.get("frame"), line, False), who, _checked(sides, line))
            )
    return rows


def _coco(text: str) -> tuple[list[_Row], tuple[float, float] | None]:
    try:
        content: Any = parse_json(text, lax=True)
    except ValueError as error:
        raise ValueError(f"damaged JSON, or cut off: {error}") from error
    size, order = None, None
    annotations = content
    if isinstance(content, dict):
        annotations, images = content.get("annotations"), content.get("images")
        size, order = read_images(images) if images is not None else (None, None)
    if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
        raise ValueError("JSON of another layout than COCO's, which has a list of annotations")
    if len(annotations) > MAX_ROWS:
        raise ValueError(f"more than {MAX_ROWS} annotations")
    rows = list(_annotated(annotations, order))
    if order is None and rows and min(row.when for row in rows) > 0:
        for row in rows:
            row.when -= 1
    return rows, size


def _annotated(annotations: list[dict], order: dict[Id, int] | None) -> Iterator[_Row]:
    for number, about in enumerate(annotations, 1):
        line, name, box = f"annotation {number}", about.get("image_id"), about.get("bbox")
        if box is None:
            continue
        if not is_id(name) or (order is not None and name not in order):
            raise ValueError(f"{line} is of the image {str(name)[:40]!r}, which is none")
        if not isinstance(box, list) or len(box) != 4:
            raise ValueError(f"{line}: its bbox is not the four numbers x, y, w, h")
        left, top, width, height = (_number(side, line) for side in box)
        when = order[name] if order is not None else last_number(name)
        track = about.get("track_id")
        # Half of a surrogate pair, which JSON may hold, could be written nowhere.
        text = f"{track}".encode("utf-8", "backslashreplace").decode()[:MAX_ID]
        who = text if type(track) in (int, str) and track != -1 else ""
        sides = _checked((left, top, left + width, top + height), line)
        yield _Row(line, _when(when, line, seconds=False), who, sides)
