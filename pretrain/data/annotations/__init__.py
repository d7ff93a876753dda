"""The rows of what `--data` takes: of a list, or of annotations of other programs (`rows.Row`).

Annotations are recognised by content.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from pretrain.data.annotations import benchmarks, tools
from pretrain.data.annotations.clock import frame_times
from pretrain.data.annotations.rows import MAX_BYTES, Entries, Row
from pretrain.data.annotations.videofolder import is_metadata, metadata_rows, parquet_rows
from pretrain.data.fields import fields_of, take_times, text_of
from pretrain.data.lists import ROLES, Problems, irregular, list_rows, read_text, roles_of
from pretrain.names import counted, first_of

_SAID = ("path", "label", "caption", "split", "subject")  # roles that a `Row` has itself
Reader = Callable[[Path, str, Entries], bool | None]
# By the name that is printed: what recognises a text, and what reads it (False: it is another).
FORMATS: dict[str, tuple[Callable[[str], bool], Reader]] = {
    "Kinetics csv": (benchmarks.is_kinetics, benchmarks.read_kinetics),
    "Something-Something json": (benchmarks.is_something, benchmarks.read_something),
    "ActivityNet json": (benchmarks.is_activitynet, benchmarks.read_activitynet),
    "ELAN document": (tools.is_elan, tools.read_elan),
    "BORIS export": (tools.is_boris, tools.read_boris),
    "Label Studio json": (tools.is_studio, tools.read_studio),
    "CVAT xml": (tools.is_cvat, tools.read_cvat),
    "AVA csv": (benchmarks.is_ava, benchmarks.read_ava),
}


@dataclass(frozen=True)
class Annotations:
    """What a file of annotations holds.

    Attributes:
        format: its name.
        rows: in the file's order.
        notes: what was done with it that is not obvious, and what in it has no effect.
    """

    format: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def read_rows(path: Path, problems: Problems) -> Iterator[tuple[int, dict]]:
    """The rows of a list, or of annotations as those of a list: (line, {column: value}).

    Raises:
        ValueError: it is none of these, or the meaning of its columns cannot be inferred.
    """
    if path.suffix.lower() == ".parquet":
        return metadata_rows(path, parquet_rows(path), problems)
    text = read_text(path)
    if (found := read_annotations(path, text, problems)) is not None:
        return as_list(found, path, problems)
    rows = list_rows(path, text, problems)
    return metadata_rows(path, rows, problems) if is_metadata(path) else rows


def as_rows(path: Path, problems: Problems) -> tuple[str, list[Row]]:
    """The format and the rows of what `read_rows` reads, in seconds where it can be told.

    Raises:
        ValueError: as `read_rows`.
    """
    if path.suffix.lower() != ".parquet":
        found = read_annotations(path, read_text(path), problems)
        if found is not None:
            if all(row.fps or not row.absent for row in found.rows):
                found = in_seconds(found, path.parent)
            problems.notes += found.notes
            return found.format, found.rows
    rows: list[Row] = []
    for line, row in read_rows(path, problems):
        try:
            rows += _listed(path.parent, line, row)
        except (ValueError, RecursionError) as error:
            what = "too deeply nested" if isinstance(error, RecursionError) else str(error)
            problems.add(line, what)
    return "a list", rows


def _listed(folder: Path, line: int, row: dict) -> Iterator[Row]:
    """The rows of a line of a list, read as `--data` reads it: one more for each further caption.

    Args:
        folder: of the list.
        line: where it stands.
        row: its values by column.

    Raises:
        ValueError: a value is not what its column is for.
    """
    roles, twice = roles_of(tuple(row))
    if twice:
        raise ValueError(f"two values for {', '.join(twice)}")
    key = next((name for name, role in roles.items() if role == "path"), "")
    name = text_of(key, row[key]) if key else None
    if name is None:
        raise ValueError("no path in this line")
    fields = fields_of(row, roles, folder=os.fspath(folder))
    start, end = take_times(row, fields, key) or (None, None)
    if irregular(folder / name) and "\\" in name:  # as Windows writes it
        name = name.replace("\\", "/")
    streams = {n: str(row[n]) for n, r in roles.items() if r not in _SAID and row[n] != ""}
    plain = Row(
        name,
        split=fields["split"],
        subject=fields["subject"],
        line=line,
        absent=name if irregular(folder / name) else "",
    )
    captions = fields["captions"] or (None,)
    yield replace(
        plain,
        label=fields["label"],
        start=start,
        end=end,
        caption=captions[0],
        extra=streams | fields["extra"],
    )
    yield from (replace(plain, caption=caption) for caption in captions[1:])


def line_of(path: Path, wanted: dict[str, str]) -> int | None:
    """The first line of a list with these values, for messages about it; None where there is none.

    Args:
        path: the list, or another file.
        wanted: role or column -> a value, or for a column a part of it.
    """
    try:
        for line, row in read_rows(path, Problems(path)):
            roles = roles_of(tuple(row))[0]
            found = {roles.get(name, name): str(value).strip() for name, value in row.items()}
            if all(
                found.get(name) == value if name in ROLES else value in found.get(name, "")
                for name, value in wanted.items()
            ):
                return line
    except (OSError, ValueError, RecursionError):
        pass  # a video, a tar, or a list that has changed since
    return None


def read_annotations(path: Path, text: str, problems: Problems) -> Annotations | None:
    """The annotations in a text; None: it is of none of `FORMATS`.

    Raises:
        ValueError: it has mistakes (all are named), or is too large.
    """
    for name, (recognise, read) in FORMATS.items():
        if not recognise(text):
            continue
        if len(text) > MAX_BYTES:
            raise ValueError(f"{path}: {name} of over {MAX_BYTES >> 20} MiB; split it")
        entries = Entries(path, text)
        try:
            is_other = read(path, text, entries) is False
        except RecursionError as error:
            raise ValueError(f"{path}: {name} that is nested too deeply") from error
        except ValueError as error:
            told = str(error)
            raise ValueError(told if str(path) in told else f"{path}: {told}") from error
        if is_other:
            continue
        for line, what in entries.mistakes:
            problems.add(line, what)
        if entries.mistakes:
            problems.stop(len(entries.rows) + len(entries.mistakes))
        if not entries.rows:
            raise ValueError(f"{path}: {name} without an entry")
        notes = entries.notes
        if entries.unused:
            common = [name for name, _ in entries.unused.most_common()]
            notes.append(f"without effect: {first_of(common, 12)}")
        return Annotations(name, entries.rows, notes)
    return None


def in_seconds(found: Annotations, folder: Path) -> Annotations:
    """Annotations whose frames are seconds: by the file's own rate, or else the video's timestamps.

    Raises:
        ValueError: a video that is needed for it cannot be read.
    """
    if not any(row.in_frames for row in found.rows):
        return found
    asked = [r for r in found.rows if r.in_frames and not r.fps and not r.absent]
    times = {
        name.removeprefix(f"{folder}{os.sep}"): when
        for name, (when, _) in frame_times(os.path.join(folder, r.path) for r in asked).items()
    }
    rows, cut = [], 0
    for row in found.rows:
        if row.in_frames and row.start is not None and row.end is not None:
            if row.fps:
                start, end = row.start / row.fps, row.end / row.fps
            elif row.path in times:
                when = times[row.path]
                if row.start >= len(when) - 1:
                    raise ValueError(
                        f"{row.path}: frame {row.start:g} of {row.label!r} lies behind its "
                        f"{len(when) - 1} frames: it is another video, or cut"
                    )
                cut += row.end > len(when)  # by a frame two decoders may differ
                start, end = (float(when[min(int(f), len(when) - 1)]) for f in (row.start, row.end))
            else:
                start, end = row.start / 25, row.end / 25  # it is absent, and refused by name
            row = replace(row, start=start, end=end, in_frames=False)
        rows.append(row)
    behind = f"{counted(cut, 'part')} cut where the video ends: it is another video, or shortened"
    return replace(found, rows=rows, notes=[*found.notes, *[behind] * bool(cut)])


def as_list(found: Annotations, path: Path, problems: Problems) -> Iterator[tuple[int, dict]]:
    """The rows of annotations as those of a list: (line, {column: value})."""
    subjects: dict[str, set[str]] = {}
    for row in found.rows:
        if row.subject is not None:
            subjects.setdefault(row.path, set()).add(row.subject)
    several = {name for name, who in subjects.items() if len(who) > 1}
    lacking, parts = False, 0
    found = in_seconds(found, path.parent)
    for row in found.rows:
        if row.absent:
            what = "; muybridge convert-labels --only-present writes a list without the absent"
            what *= not lacking
            lacking = True
            told = f"no such video: {row.absent[:200]} in this folder{what}"
            problems.add(row.line, told, "unread")
            continue
        columns = {"path": row.path, "label": row.label, "split": row.split}
        columns |= {"caption": row.caption, **row.extra}
        columns |= row.owner(path.name)  # a file that `boxes.parse_boxes` reads
        if row.subject is not None and row.path not in several:
            columns["subject"] = row.subject
        if row.start is not None and row.label is not None:
            columns |= {"start": f"{row.start:.6f}", "end": f"{row.end:.6f}"}
        parts += row.caption is not None and row.start is not None
        yield row.line, {name: value for name, value in columns.items() if value is not None}
    notes = list(found.notes)
    if several:
        notes.append(f"{counted(len(several), 'video')} of several subjects: these are left out")
    if parts:
        notes.append(f"{counted(parts, 'caption')} of parts: taken for the whole videos")
    about = f"{path.name} is {found.format}, entries: {len(found.rows)}"
    problems.notes += [about, *notes]
