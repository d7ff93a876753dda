"""What all formats of annotations become: rows, each of one label of one video or of a part of it.

A file may be anybody's. Sizes, entries and depth are bounded, XML with a DTD is refused, and a name
is never a path: it is looked for among the videos beside the file (`Media`).
"""

import csv
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

from pretrain.data.lists import MAX_TIME, VIDEOS
from pretrain.files import RepeatedKeyError, decimal, parse_json

MAX_BYTES = 2**28  # of a file of annotations
MAX_ROWS = 2**22
MAX_ELEMENTS = 2**23  # of XML
MAX_DEPTH = 64  # of XML; ELAN and CVAT have six
MAX_FRAME = 2**31
MAX_MEDIA = 2**21  # files beside it that are looked through
LEVELS = 3  # of folders below it
LONGEST = 1000  # characters of a label


@dataclass(frozen=True)
class Row:
    """A label of a video or of a part of it.

    Attributes:
        path: the video, relative to the folder of the file; where `absent`, the name that is given.
        label: its class; None: the video is named only.
        start: seconds from the first frame, or frames, from 0; None: it is of the whole video.
        end: likewise, behind the last frame.
        in_frames: whether they are frames.
        fps: frames a second as the file says; 0: it does not.
        split: as the file says.
        subject: who is seen.
        caption: a sentence about it.
        boxes: of one subject: frame, left, top, right, bottom, in pixels.
        track: whose label it is: the identity in the boxes of the file.
        extra: further columns.
        line: where it stands; 1 where a file has no lines.
        absent: why there is no such video; "": there is.
    """

    path: str
    label: str | None = None
    start: float | None = None
    end: float | None = None
    in_frames: bool = False
    fps: float = 0.0
    split: str | None = None
    subject: str | None = None
    caption: str | None = None
    boxes: tuple[tuple[float, ...], ...] = ()
    track: str | None = None
    extra: dict[str, str] = field(default_factory=dict)
    line: int = 1
    absent: str = ""

    def owner(self, file: str) -> dict[str, str]:
        """The columns that say whose label it is, of the people in the boxes of a file."""
        return {} if self.track is None else {"boxes": file, "track_id": self.track}


class Entries:
    """The rows of one file while it is read, its mistakes, and what of it has no effect.

    Args:
        path: the file, for messages.
        text: its text; places of entries are looked for in it.
    """

    def __init__(self, path: Path, text: str = ""):
        self.path, self.rows = path, list[Row]()
        self.media = Media(path.parent)
        self.unused: Counter[str] = Counter()
        self.notes: list[str] = []
        self.mistakes: list[tuple[int, str]] = []
        self._text, self._at, self._line = text, 0, 1

    def line_of(self, word: str) -> int:
        """The line where a word stands next, of words that come in order."""
        if (found := self._text.find(word, self._at)) >= 0:
            self._line += self._text.count("\n", self._at, found)
            self._at = found
        return self._line

    def add(self, row: Row) -> None:
        """Take a row.

        Raises:
            ValueError: there are too many, or it cannot be true.
        """
        if len(self.rows) >= MAX_ROWS:
            raise ValueError(f"{self.path} has over {MAX_ROWS:,} entries: split it")
        if row.label is not None and row.start is not None and ";" in row.label:
            raise ValueError(
                f"label {row.label[:60]!r} holds a semicolon, which separates segments: rename it"
            )
        self.rows.append(row)

    def wrong(self, line: int, what: str) -> None:
        """Note a mistake; all are told at once."""
        self.mistakes.append((line, what))

    def unused_keys(self, keys, known: frozenset[str], where: str = "") -> None:
        """Count the keys, columns or attributes that have no effect."""
        for key in keys:
            if isinstance(key, str) and key not in known and len(self.unused) < 1000:
                self.unused[where + key] += 1


def number(value: object, what: str) -> float:
    """A finite number of a file, of text or of JSON.

    Raises:
        ValueError: it is none.
    """
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        found = decimal(value)
        if not math.isfinite(found):
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"{what} is {str(value)[:40]!r}, it has to be a number") from None
    return found


def seconds(start: object, end: object, point: float = 0.0) -> tuple[float, float]:
    """Start and end of a part of a video.

    Args:
        start: seconds.
        end: likewise.
        point: how long something lasts that ends where it starts; 0: it is a mistake.

    Raises:
        ValueError: they cannot be true.
    """
    first, last = number(start, "start"), number(end, "end")
    if point and first == last:
        last = first + point
    if not 0 <= first < MAX_TIME or not last < MAX_TIME:
        raise ValueError(
            f"{first:g} to {last:g} s lies outside any video: times are seconds from its start"
        )
    if last <= first:
        raise ValueError(f"{first:g} to {last:g} s ends before it has begun: exchange or remove it")
    return first, last


def frames(first: object, end: object, unit: str = "frame") -> tuple[float, float]:
    """First frame and the one behind the last, from 0.

    Raises:
        ValueError: they cannot be true.
    """
    a, b = number(first, unit), number(end, unit)
    if a != int(a) or b != int(b) or not 0 <= a < b <= MAX_FRAME:
        raise ValueError(f"{unit}s {a:g} to {b:g} cannot be true: they count up, in whole numbers")
    return a, b


def word(value: object, what: str) -> str:
    """A text of a file, such as a label, with single spaces.

    Raises:
        ValueError: it is no text, is empty, or too long.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{what} is {str(value)[:40]!r}, it has to be a text")
    text = " ".join(str(value).split())
    if not text or len(text) > LONGEST:
        raise ValueError(f"{what} is " + ("empty" if not text else f"over {LONGEST} characters"))
    return text


class Media:
    """The videos in a folder and up to three levels below it, found by name, once.

    Args:
        folder: of the file that names them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._found: dict[str, list[str]] | None = None

    def find(self, *names: str) -> str | None:
        """The video, relative to the folder, of the first of these names that one has.

        A name is a relative path, a file's name, or either without its ending; a file that lies
        exactly there comes before its namesakes elsewhere. Of an absolute path, an address, or a
        path that leaves the folder, the last part counts.

        Raises:
            ValueError: two videos fit, or there are too many files.
        """
        if self._found is None:
            self._found = self._walk()
        keys = [(name, key) for name in names for key in _keys(name)]
        for _, key in keys:
            fits = self._found.get(key, [])
            exact = [fit for fit in fits if key == os.path.splitext(fit)[0]]
            if key in fits or len(exact) == 1:
                return key if key in fits else exact[0]
        for name, key in keys:
            fits = self._found.get(key, [])
            if len(fits) > 1:
                raise ValueError(f"{name[:80]!r} may be {fits[0]} or {fits[1]}: remove or move one")
            if fits:
                return fits[0]
        return None

    def only(self) -> str | None:
        """The only video there is; None: there are none, or more."""
        self.find()
        every = {video for fits in (self._found or {}).values() for video in fits}
        return every.pop() if len(every) == 1 else None

    def _walk(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        count = 0
        for where, folders, files in os.walk(self.folder):
            part = os.path.relpath(where, self.folder)
            inside = [] if part == "." else part.split(os.sep)
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            if len(inside) >= LEVELS:
                folders.clear()
            count += len(files)
            if count > MAX_MEDIA:
                raise ValueError(f"{self.folder} has over {MAX_MEDIA:,} files: give a list")
            for file in sorted(files):
                stem, ending = os.path.splitext(file)
                if ending.lower() not in VIDEOS or file.startswith("."):
                    continue
                path = "/".join([*inside, file])
                keys = {path, "/".join([*inside, stem]), file, stem}
                for key in keys:
                    found.setdefault(key, []).append(path)
        return found


def _keys(name: str) -> list[str]:
    """By what a video of this name is looked for."""
    plain = name.replace("\\", "/").removeprefix("./")
    parts = plain.split("/")
    inside = not plain.startswith("/") and ".." not in parts and not re.match(r"[A-Za-z]+:", plain)
    last = parts[-1]
    keys = [plain, last] if inside else [last]
    stem, ending = os.path.splitext(last)
    if ending.lower() in VIDEOS:  # it may have been encoded anew
        keys += [plain[: -len(ending)], stem] if inside else [stem]
    return list(dict.fromkeys(key for key in keys if key))


def address(text: str) -> str:
    """The path in an address of a file or of a web server; a path stays as it is.

    Label Studio's `/data/local-files/?d=clips/a.mp4` names it behind the question mark.
    """
    if re.match(r"[A-Za-z]:[\\/]", text):
        return text
    try:
        parts = urlsplit(text)
        given = parse_qs(parts.query).get("d")
    except ValueError:
        return text
    if given and parts.path.endswith("/"):
        return given[0]
    if parts.scheme and len(parts.scheme) > 1:
        return unquote(parts.path)
    return text


def parse_xml(path: Path | str, text: str) -> ElementTree.Element:
    """The root of an XML document without a DTD, of bounded depth and size.

    Args:
        path: the file, for messages.
        text: what is in it.

    Raises:
        ValueError: it is something else.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError(f"{path}: XML with a DTD is refused, no annotation tool writes one")
    parser: Any = ElementTree.XMLPullParser(("start", "end"))
    depth = count = 0
    root: ElementTree.Element | None = None
    try:
        for at in range(0, len(text), 2**16):
            parser.feed(text[at : at + 2**16])
            for kind, element in parser.read_events():
                if kind == "end":
                    depth -= 1
                    continue
                root = element if root is None else root
                depth, count = depth + 1, count + 1
                if depth > MAX_DEPTH or count > MAX_ELEMENTS:
                    what = "nested too deeply" if depth > MAX_DEPTH else "too long"
                    raise ValueError(f"{path}: its XML is {what}")
        parser.close()
    except ElementTree.ParseError as error:
        line = error.position[0]
        raise ValueError(f"{path}:{line}: it is no XML: {error}; export it again") from error
    assert root is not None  # or it would not have been parsed
    return root


def parse_whole(text: str) -> object:
    """A text that is one JSON value; None: it is not, which a list tells by line.

    Raises:
        ValueError: an object has a key twice.
    """
    try:
        return parse_json(text, lax=True)
    except RepeatedKeyError:
        raise
    except ValueError:
        return None


def table_rows(text: str, separator: str, entries: Entries) -> Iterator[tuple[int, list[str]]]:
    """The values of each line of a table that is not empty."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line = 1
    try:
        for values in reader:
            if any(values):
                yield line, [value.strip() for value in values]
            line = reader.line_num + 1
    except csv.Error as error:
        entries.wrong(line, f"broken quotes: {error}")


def header_of(text: str, lines: int = 1) -> Iterator[tuple[int, str, list[str]]]:
    """Each of the first lines as (line, separator, names), split at tabs, commas or semicolons."""
    start = 0
    for line in range(1, lines + 1):
        if start >= len(text):
            return
        end = text.find("\n", start)
        content = text[start : end if end >= 0 else len(text)][:10_000]
        start = end + 1 if end >= 0 else len(text)
        separator = max("\t,;", key=content.count)
        try:
            names = next(csv.reader([content], delimiter=separator), [])
        except csv.Error:
            continue
        yield line, separator, [name.strip() for name in names]
