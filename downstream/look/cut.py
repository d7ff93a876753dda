"""Labelled parts of long videos as files of their own, for recipes that take one label a video."""

import hashlib
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from downstream.look.labels import Labels, Mark, csv_text
from downstream.look.moments import Moments
from pretrain.data.decode import DecodeError
from pretrain.data.lists import MAX_LIST
from pretrain.data.shards import Pack
from pretrain.data.synthetic import encode_video
from pretrain.files import read_limited, reading, replacing
from pretrain.folders import writing
from pretrain.log import write_whole
from pretrain.names import counted, file_name, for_csv, for_screen

COLUMNS = ("path", "label", "recording", "start", "end", "split", "subject")
MOST_FRAMES = 3000  # of a file
CLIPS = "clips"  # the folder of the files; the list of all is clips.csv beside it


def write_clips(pack: Pack, moments: Moments, labels: Labels) -> str:
    """Write clips/ and clips.csv beside the csv of the labels, and say what they are.

    A label of a part of a video becomes a file with the pack's frames of that part; the column
    recording says which video it is of, so no split divides them. Videos that have one label for
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
    several = cut = 0
    for video, (row, marks) in enumerate(zip(labels.rows, list(labels.marks), strict=True)):
        if row.refused:
            continue
        about = [for_csv(row.columns.get(name, "")) for name in ("split", "subject")]
        recording = for_csv(moments.videos[video])
        for part, names in _parts(marks).items():
            if len(names) > 1:
                several += 1
                continue
            label, path, times = (for_csv(names[0]) if names else ""), row.path, ("", "")
            if part:
                samples = np.unique(moments.sample[moments.video == video])
                records = [pack.record(int(sample)) for sample in samples]
                path = f"{CLIPS}/{_cut(pack, records, part, folder / CLIPS).name}"
                times = f"{part[0]:.3f}", f"{part[1]:.3f}"
                cut += 1
            rows.append([path, label, recording, *times, *about])
    if not rows:
        raise ValueError("there is nothing that a list could name")
    write_whole(listed, (head + csv_text(rows)).encode())
    told = f"{listed}: {counted(len(rows), 'clip')}, {cut} of them cut out of longer videos"
    left = f"; {counted(several, 'part')} with several labels left out" if several else ""
    return for_screen(told + left)


def _parts(marks: Sequence[Mark]) -> dict[tuple[float, float] | None, list[str]]:
    """The labels of each part of a video; None: of the whole, where no part has a label."""
    parts: dict[tuple[float, float] | None, list[str]] = {}
    for mark in marks:
        times = None if mark.start is None or mark.end is None else (mark.start, mark.end)
        parts.setdefault(times, []).append(mark.label)
    return parts or {None: []}


def _cut(pack: Pack, records: list[dict], part: tuple[float, float], folder: Path) -> Path:
    """The file with the frames of a part of a video."""
    shown: list[tuple[dict, np.ndarray]] = []
    end = -1.0
    for record in sorted(records, key=lambda record: record["start"]):
        seconds = record["start"] + np.arange(record["frames"]) / record["fps"]
        inside = np.flatnonzero((seconds >= part[0] - 1e-3) & (seconds < part[1] - 1e-3))
        inside = inside[seconds[inside] > end]  # somebody else, cut out of the same picture
        same = not shown or all(shown[0][0][n] == record[n] for n in ("width", "height", "fps"))
        if len(inside) and same:
            shown.append((record, inside))
            end = float(seconds[inside[-1]])
    if not shown:
        raise ValueError(f"{records[0]['source']} has no frames from {part[0]} to {part[1]} s")
    what = [(record["sha256"], int(f[0]), len(f)) for record, f in shown]
    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    path = folder / f"{file_name(Path(records[0]['source']).stem)[:60]}-{digest}.mp4"
    if path.exists():
        return path
    try:
        frames = [pack.frames(r, f[:MOST_FRAMES]).numpy() for r, f in shown]
    except DecodeError as error:
        raise ValueError(f"{records[0]['source']} cannot be decoded: {error}") from error
    rate = Fraction(shown[0][0]["fps"]).limit_denominator(1001)
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            aside.write_bytes(encode_video(np.concatenate(frames)[:MOST_FRAMES], rate))
    return path
