"""Labelled parts of long videos as files of their own, for recipes that take one label a video."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from downstream.look.labels import Labels, Mark, csv_text
from downstream.look.moments import Moments
from downstream.segments import frame_at
from pretrain.data.decode import DecodeError
from pretrain.data.lists import MAX_LIST, recording_of
from pretrain.data.shards import Pack
from pretrain.data.synthetic import write_frames
from pretrain.files import read_limited, reading, replacing
from pretrain.folders import writing
from pretrain.log import write_whole
from pretrain.names import counted, file_name, for_csv, for_screen

COLUMNS = ("path", "label", "recording", "start", "end", "split", "subject")
BLOCK = 64  # frames decoded at once
LEFT = 0.1  # seconds of a part that its file lacks, from which on this is told
CLIPS = "clips"  # the folder of the files; the list of all is clips.csv beside it


def write_clips(pack: Pack, moments: Moments, labels: Labels) -> str:
    """Write clips/ and clips.csv beside the csv of the labels, and say what they are.

    A label of a part of a video becomes a file with the pack's frames of that part; the columns
    recording, start and end say of which video, or of which recording where the user's list names
    it, and from when to when, so no split divides them. Videos that have one label for
    the whole, or none, are named as they are. A part that has several labels is left out. A file
    that is there already is not written again.

    Raises:
        ValueError: there is nothing to write, a clip cannot be decoded, the disk does not take it,
            or clips.csv was made by something else.
    """
    folder = labels.path.parent
    listed = folder / "clips.csv"
    head = csv_text([COLUMNS])
    if os.path.lexists(listed):
        with reading(listed):
            if not read_limited(listed, MAX_LIST).startswith(head.encode()):
                raise ValueError(f"{listed} was made by something else: move it away")
    rows: list[list[object]] = []
    several = short = cut = 0
    for video, (row, marks) in enumerate(zip(labels.rows, list(labels.marks), strict=True)):
        if row.refused:
            continue
        about = [for_csv(row.columns.get(name, "")) for name in ("split", "subject")]
        named, at = recording_of(row.columns)
        recording = for_csv(named or moments.videos[video])
        for part, names in _parts(marks).items():
            if len(names) > 1:
                several += 1
                continue
            label, path = (for_csv(names[0]) if names else ""), row.path
            times = (f"{at:.3f}", "") if at else ("", "")
            if part:
                samples = np.unique(moments.sample[moments.video == video])
                records = [pack.record(int(sample)) for sample in samples]
                made, start, end = _cut(pack, records, part, folder / CLIPS)
                short += part[1] - end > LEFT or start - part[0] > LEFT
                path, times = f"{CLIPS}/{made.name}", (f"{at + start:.3f}", f"{at + end:.3f}")
                cut += 1
            rows.append([path, label, recording, *times, *about])
    if not rows:
        raise ValueError("there is nothing that a list could name")
    write_whole(listed, (head + csv_text(rows)).encode())
    told = f"{listed}: {counted(len(rows), 'clip')}, {cut} of them cut out of longer videos"
    left = f"; {counted(several, 'part')} with several labels left out" if several else ""
    left += f"; {counted(short, 'part')} shown in part only, as start and end say" if short else ""
    return for_screen(told + left)


def _parts(marks: Sequence[Mark]) -> dict[tuple[float, float] | None, list[str]]:
    """The labels of each part of a video; None: of the whole, where no part has a label."""
    parts: dict[tuple[float, float] | None, list[str]] = {}
    for mark in marks:
        times = None if mark.start is None or mark.end is None else (mark.start, mark.end)
        parts.setdefault(times, []).append(mark.label)
    return parts or {None: []}


def _shown(records: list[dict], part: tuple[float, float]) -> list[tuple[dict, int, int]]:
    """The clips, with first and last frame, that show a part of a video, one behind the other.

    They end before one of another size or rate, which the same file could not hold.
    """
    shown: list[tuple[dict, int, int]] = []
    begin, end = part
    for record in sorted(records, key=lambda record: record["start"]):
        # Frames shown already are of somebody else, cut out of the same picture.
        first, stop = (frame_at(t - record["start"], record["fps"]) for t in (begin, end))
        first, stop = max(first, 0), min(stop, record["frames"])
        if first >= stop:
            continue
        if shown and any(shown[0][0][n] != record[n] for n in ("width", "height", "fps")):
            break
        shown.append((record, first, stop))
        begin = record["start"] + stop / record["fps"]
    if not shown:
        raise ValueError(f"{records[0]['source']} has no frames from {part[0]} to {part[1]} s")
    return shown


def _cut(
    pack: Pack, records: list[dict], part: tuple[float, float], folder: Path
) -> tuple[Path, float, float]:
    """The file with the frames of a part of a video, and from when to when they are shown."""
    shown = _shown(records, part)
    seconds = [r["start"] + n / r["fps"] for r, n in (shown[0][:2], shown[-1][::2])]
    start, end = max(part[0], seconds[0]), min(part[1], seconds[1])
    what = [(record["sha256"], first, stop) for record, first, stop in shown]
    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    path = folder / f"{file_name(Path(records[0]['source']).stem)[:60]}-{digest}.mp4"
    if not path.exists():
        rate = Fraction(shown[0][0]["fps"]).limit_denominator(1001)
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as aside:
                write_frames(aside, _frames(pack, shown), rate)
    return path, start, end


def _frames(pack: Pack, shown: list[tuple[dict, int, int]]) -> Iterator[np.ndarray]:
    """The frames of clips (H, W, 3), decoded a few at a time."""
    for record, first, stop in shown:
        for begin in range(first, stop, BLOCK):
            numbers = np.arange(begin, min(begin + BLOCK, stop))
            try:
                yield from pack.frames(record, numbers).numpy()
            except DecodeError as error:
                raise ValueError(f"{record['source']} cannot be decoded: {error}") from error
