"""Labels of moments, kept in a csv that every recipe's --data reads.

The csv has a row for every label of every video, and one for a video without any: path, start and
end (seconds in the file; empty: the label is of the whole video), times ("file" beside a start and
an end), label, split, subject, caption, and what else the user's own list says. That list is never
written to.
"""

import csv
import hashlib
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from downstream.look.moments import Moments
from downstream.segments import parse_segments
from pretrain.data.annotations import read_rows
from pretrain.data.fields import NOTHING
from pretrain.data.lists import (
    MAX_LIST,
    OF_FILE,
    TIMES,
    Problems,
    boxes_column,
    times_of_recording,
)
from pretrain.data.sources import Source
from pretrain.files import decimal, read_limited, reading
from pretrain.log import write_whole
from pretrain.names import FORMULA, JOINERS, for_csv, for_screen, from_csv
from pretrain.prompts import same_words

COLUMNS = ("path", "start", "end", "label", "split", "subject", "caption", TIMES)
RENAMED = {"start": "start_time", "end": "end_time"}  # of the recording a file was cut out of
LONGEST = 100  # characters of a label
MOST_UNDONE = 1000  # steps that can be taken back


@dataclass(frozen=True)
class Mark:
    """A label of a part of a video.

    Attributes:
        label: its name.
        start: seconds.
        end: likewise; both None: the whole video.
    """

    label: str
    start: float | None = None
    end: float | None = None

    def of(self, start: float, end: float) -> bool:
        """Whether it is a label of this part: half of the shorter of the two is in both."""
        if self.start is None or self.end is None:
            return True
        shared = min(end, self.end) - max(start, self.start)
        return shared >= 0.5 * min(end - start, self.end - self.start) - 1e-6

    def without(self, start: float, end: float, seconds: float) -> tuple["Mark", ...]:
        """What is left of it before and behind a part of a video of so many seconds.

        What is shorter than half of the part is left out: it is of no moment beside it.
        """
        if self.start is None or self.end is None:
            return Mark(self.label, 0.0, seconds).without(start, end, seconds)
        least = 0.5 * (end - start)
        sides = ((self.start, start), (end, self.end))
        return tuple(Mark(self.label, round(a, 3), round(b, 3)) for a, b in sides if b - a >= least)


@dataclass(frozen=True)
class Row:
    """What the csv says of a video beside its labels.

    Attributes:
        path: as it stands in the csv, relative to it.
        seconds: the length of the video.
        columns: split, subject and further columns.
        captions: sentences about it.
        refused: why it cannot be in a csv; "": it can.
    """

    path: str
    seconds: float
    columns: Mapping[str, str] = field(default_factory=dict)
    captions: Sequence[str] = ()
    refused: str = ""


class ChangedError(ValueError):
    """The csv does not hold the labels: something else has written it, or the disk is full."""


def check_label(text: str) -> str:
    """A label as it is kept.

    Raises:
        ValueError: it is empty or too long, or would not come back from a list as it is.
    """
    label = unicodedata.normalize("NFC", " ".join(text.split()))
    if not label or label in NOTHING:
        raise ValueError("a label needs a name" + f", {label!r} means nothing" * bool(label))
    if len(label) > LONGEST:
        raise ValueError(f"a label has at most {LONGEST} characters")
    if not all(c.isprintable() or c in JOINERS for c in label):
        raise ValueError("a label has no control characters")
    if ";" in label:
        raise ValueError("a label has no semicolon, which separates segments in lists")
    if FORMULA.match(label):
        raise ValueError("a label does not begin with = + - or @: spreadsheets take it for a sum")
    return label


def row_of(source: Source | None, name: str, seconds: float, folder: Path) -> Row:
    """The row of a video.

    Args:
        source: as it was listed; None: it is not known where it lies.
        name: what the user called it.
        seconds: its length.
        folder: of the csv.
    """
    if source is None:
        return Row(
            name, seconds, refused="it is not known where this video lies: give the folder or the "
            "list that the pack was made of",
        )  # fmt: skip
    if source.member:
        return Row(name, seconds, refused="it lies in a tar, and a list names files: unpack it")
    try:
        path = os.path.relpath(source.path, folder)
    except ValueError:  # another disk of Windows
        path = os.path.abspath(source.path)
    path = f"./{path}" if FORMULA.match(path) else path
    refused = ""
    if not path.isprintable() or path != path.strip():
        refused = "its name holds control characters, or spaces at an end: rename the file"
    boxes = boxes_column(source.extra)
    extra = {
        name: value
        for name, value in source.extra.items()
        # Paths of boxes are relative to the other list.
        if name != boxes and name != "segments" and re.fullmatch(r"\w[\w .-]*", name)
        and name.lower() not in COLUMNS
    }  # fmt: skip
    if times_of_recording(source.extra):  # the columns start and end are of the labels here
        plain = {name.lower(): value for name, value in source.extra.items()}
        extra |= {new: plain[old] for old, new in RENAMED.items() if old in plain}
    columns = {"split": source.split or "", "subject": source.subject or "", **extra}
    return Row(path, seconds, columns, source.captions, refused)


def marks_of(record: dict) -> tuple[Mark, ...]:
    """The labels that a clip's index entry has already: its segments, or that of the video."""
    try:
        segments = parse_segments_apart(record["extra"].get("segments", ""))
    except ValueError:
        segments = []  # the column means something else here
    marks = [Mark(label, start, end) for start, end, label in segments]
    if record["label"] is not None and record["label"] not in {mark.label for mark in marks}:
        marks.append(Mark(record["label"]))
    return tuple(marks)


def parse_segments_apart(text: str) -> list[tuple[float, float, str]]:
    """`parse_segments`, of segments that may overlap."""
    return [s for part in text.split(";") for s in parse_segments(part, "")]


class Labels:
    """The labels of videos, and the csv that holds them.

    Args:
        path: of the csv; one that is there is read.
        rows: of the videos, in their order.
        given: of each video the labels that the data have; those of the csv replace them.

    Raises:
        ValueError: the csv that is there cannot be read, or is not such a csv.
    """

    def __init__(self, path: Path, rows: Sequence[Row], given: Sequence[tuple[Mark, ...]]):
        self.path, self.rows, self._given = path, rows, list(given)
        more = dict.fromkeys(name for row in rows for name in row.columns)
        self._columns = [*COLUMNS, *(name for name in more if name not in COLUMNS)]
        # Where labels are while the csv is somebody else's, and a hash of what is there.
        self._kept: tuple[Path, bytes] | None = None
        self.unsaved = False  # labels that no file holds
        self.reload()

    def reload(self) -> None:
        """Take the labels from the csv as it is now; steps before cannot be undone any more.

        Labels that were given here stay in the file that `save` named, and in no later one.

        Raises:
            ChangedError: labels given here are in no file, and cannot be written.
            ValueError: the csv cannot be read, or is not such a csv.
        """
        if self.unsaved:
            try:
                self.save()
            except ChangedError:
                if self.unsaved:
                    raise
        marks, self.left_out = list(self._given), 0
        if (seen := _content(self.path)) is not None:
            marks = self._parse(seen)
        self.marks: list[tuple[Mark, ...]] = marks
        self._undo: list[tuple[int, tuple[Mark, ...]]] = []
        self._lines = [self._line(video) for video in range(len(self.rows))]
        self._seen = seen and _digest(seen)
        self._kept = None
        # What a person, or a spreadsheet, has changed is kept as it was before it is written over.
        self._edited = seen if seen is not None and seen != self._text() else None

    def of(self, video: int, start: float, end: float) -> list[str]:
        """The labels of a part of a video."""
        return list(dict.fromkeys(m.label for m in self.marks[video] if m.of(start, end)))

    def counts(self) -> Counter[str]:
        """How many parts of videos have each label."""
        return Counter(mark.label for marks in self.marks for mark in marks)

    def spelled(self, label: str) -> str:
        """A label that is there already and differs in spelling only, or else this one."""
        known = {same_words(name): name for name in self.counts()}
        return known.get(same_words(label), label)

    def toggle(self, video: int, start: float, end: float, whole: bool, label: str) -> bool:
        """Give a part of a video a label, or take it away; the csv is written.

        A label of more than this part stays that of the rest.

        Args:
            video: its number.
            start: of the part, seconds.
            end: likewise.
            whole: the part is the whole video.
            label: its name.

        Returns:
            whether it has the label now.

        Raises:
            ChangedError: the label is given or taken, and `save` could not write it to the csv.
            ValueError: the video cannot be in a csv, or one of its labels cannot be of a part.
        """
        if self.rows[video].refused:
            raise ValueError(self.rows[video].refused)
        before, seconds = self.marks[video], self.rows[video].seconds
        given = not any(m.label == label and m.of(start, end) for m in before)
        rest: list[Mark] = []
        for mark in before:
            taken = mark.label == label and mark.of(start, end)
            rest += mark.without(start, end, seconds) if taken else (mark,)
        new = Mark(label) if whole else Mark(label, round(start, 3), round(end, 3))
        marks = (*rest, new) if given else tuple(rest)
        several = len({mark.label for mark in marks}) > 1  # which get times then
        for mark in marks:
            if ";" in mark.label and (several or mark.start is not None):
                raise ValueError(
                    f"label {mark.label[:60]!r} holds a semicolon, which separates segments: "
                    "rename it in the data"
                )
        self._undo = [*self._undo[1 - MOST_UNDONE :], (video, before)]
        self._set(video, marks)
        return given

    def undo(self) -> int | None:
        """Take the last step back; returns the number of its video, None: there is no step.

        Raises:
            ChangedError: as of `toggle`.
        """
        if not self._undo:
            return None
        video, before = self._undo.pop()
        self._set(video, before)
        return video

    def _set(self, video: int, marks: tuple[Mark, ...]) -> None:
        self.marks[video] = marks
        self._lines[video] = self._line(video)
        self.save()

    def save(self) -> None:
        """Write the csv: whole or not at all, and never over what something else has written.

        Raises:
            ChangedError: the csv was changed meanwhile, and the labels are in the file that is
                named; or they cannot be written at all, and the next call tries again.
        """
        self.unsaved = True
        try:
            kept = self._save()
        except ValueError as error:
            raise ChangedError(
                f"{error}. The labels given here are in no file: the next one writes them all"
            ) from error
        self.unsaved = False
        if kept:
            raise ChangedError(
                f"{self.path.name} was changed by another program, and is left as it is. All "
                f"labels given here are in {kept.name} beside it"
            )

    def _save(self) -> Path | None:
        """Write the csv, or where something else has changed it a file beside it, returned."""
        text, now = self._text(), _content(self.path)
        if now is not None and _digest(now) != self._seen:
            kept, before = self._kept or (_free(self.path, "kept"), b"")
            there = _content(kept)
            if there and _digest(there) != before:  # somebody has changed that one as well
                kept = _free(self.path, "kept")
            write_whole(kept, text)
            self._kept = kept, _digest(text)
            return kept
        if self._edited is not None:
            write_whole(_free(self.path, "before"), self._edited)
            self._edited = None
        write_whole(self.path, text)
        self._seen = _digest(text)
        return None

    def _text(self) -> bytes:
        return "".join([csv_text([self._columns]), *self._lines]).encode()

    def _line(self, video: int) -> str:
        """The rows of a video as csv."""
        row, marks = self.rows[video], self.marks[video]
        if row.refused:
            return ""
        several = len({mark.label for mark in marks}) > 1
        lines = []
        for i in range(max(len(marks), len(row.captions), 1)):
            cells = {"path": row.path, **{name: for_csv(v) for name, v in row.columns.items()}}
            if i < len(marks):
                start, end = marks[i].start, marks[i].end
                if start is None and several:  # of a video without times there is one label
                    start, end = 0.0, row.seconds
                times = {} if start is None or end is None else {"start": start, "end": end}
                cells |= {"label": for_csv(marks[i].label)}
                cells |= {name: f"{value:.3f}" for name, value in times.items()}
                cells |= {TIMES: OF_FILE} if times else {}
            if i < len(row.captions):
                cells["caption"] = for_csv(row.captions[i])
            lines.append([cells.get(name, "") for name in self._columns])
        return csv_text(lines)

    def _parse(self, data: bytes) -> list[tuple[Mark, ...]]:
        """The labels of the csv by video; rows of other files are counted in `left_out`."""
        problems, folder = Problems(self.path), self.path.parent
        number = {os.path.normpath(folder / row.path): i for i, row in enumerate(self.rows)}
        marks: list[list[Mark]] = [[] for _ in self.rows]
        read, seen = 0, set()
        not_ours = ValueError(
            f"{self.path} has no columns path, start, end and label: something else has made it; "
            "give another --out"
        )
        with reading(self.path):
            for line, row in read_rows(self.path, problems):
                read += 1
                if not {"path", "start", "end", "label"} <= row.keys():
                    raise not_ours
                video = number.get(os.path.normpath(folder / row["path"]))
                if video is None:
                    self.left_out += 1
                    continue
                seen.add(video)
                if (label := row["label"]) not in NOTHING:
                    try:
                        times = [decimal(row[name]) for name in ("start", "end") if row[name]]
                        if times and not (len(times) == 2 and 0 <= times[0] < times[1] < 2**53):
                            raise ValueError
                        if times and ";" in label:
                            problems.add(line, f"label {label[:60]!r} holds a semicolon, which "
                                         "separates segments: rename it")  # fmt: skip
                        marks[video].append(Mark(label, *times))
                    except ValueError:
                        problems.add(line, f"start {row['start']!r} and end {row['end']!r} are no "
                                     "two seconds, the second later")  # fmt: skip
        problems.stop(read)
        if not read and b"path,start,end,label" not in data:
            raise not_ours
        if self.left_out and not seen:
            raise ValueError(
                f"{self.path} holds labels of other videos: none of its {self.left_out} rows is of "
                "these; give another --out"
            )
        return [
            tuple(dict.fromkeys(found)) if video in seen else self._given[video]
            for video, found in enumerate(marks)
        ]


def csv_text(rows: Sequence[Sequence[object]]) -> str:
    """Rows as they stand in a csv."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _content(path: Path) -> bytes | None:
    """The bytes of a csv; None: there is none."""
    with reading(path):
        return read_limited(path, MAX_LIST) if os.path.lexists(path) else None


def _free(path: Path, word: str) -> Path:
    """A name beside a file that nothing has yet."""
    number = 1
    while os.path.lexists(found := path.with_name(f"{path.stem}-{word}-{number}{path.suffix}")):
        number += 1
    return found


def read_places(path: Path, moments: Moments, labels: Labels) -> list[int]:
    """The moments that a csv names by path, start and end, in its order.

    Args:
        path: the csv, such as next.csv of recipes/fit.py; path (or source) is relative to it or to
            the csv of the labels, or what the data call the video.
        moments: of the data.
        labels: of the same videos.

    Raises:
        ValueError: it cannot be read, has not these columns, or names nothing of the data.
    """
    with reading(path):
        data = read_limited(path, MAX_LIST)
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no csv in UTF-8: {error}") from error
    folder = labels.path.parent
    number = {name: i for i, name in enumerate(moments.videos)}
    number |= {
        os.path.abspath(folder / row.path): i
        for i, row in enumerate(labels.rows)
        if not row.refused
    }
    found: dict[int, None] = {}
    for line, row in enumerate(rows, 2):
        try:
            start, end = decimal(row["start"]), decimal(row["end"])
            name = os.fspath(row["path" if "path" in row else "source"])  # None of a short line
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}:{line}: columns path, start and end (seconds) say which moment"
            ) from error
        names = [os.path.abspath(place / name) for place in (path.parent, folder)]
        video = next((number[n] for n in (*names, name, from_csv(name)) if n in number), None)
        if video is None:
            continue
        inside = np.flatnonzero(moments.video == video)
        shared = np.minimum(moments.end[inside], end) - np.maximum(moments.start[inside], start)
        if shared.max() > 0:
            found[int(inside[shared.argmax()])] = None
    if not found:
        raise ValueError(f"{path} names no moment of the data")
    return list(found)


def told(labels: Labels) -> str:
    """What a person has to know of a csv that was there; "": nothing."""
    if not labels.left_out:
        return ""
    return for_screen(
        f"{labels.path} names {labels.left_out} rows of files that are not in the data: they are "
        "left out when it is written, and a copy of it is kept"
    )
