"""Convert annotations: from any that --data reads to ActivityNet, CVAT, Label Studio or our csv.

    python recipes/convert_labels.py --data clips.csv --to activitynet --out labels.json

In a csv the paths are relative to it, wherever it is written. In the other formats names of videos
stay relative to the source's folder, so write the result there. Frames of Label
Studio and CVAT are those of the videos, which have to lie beside the source; for Label Studio --fps
does. What a format cannot hold is counted and named. No existing file is overwritten.
"""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pretrain.threads  # noqa: F401 (before torch)

from downstream.segments import parse_segments
from pretrain.data.annotations import as_rows
from pretrain.data.annotations.clock import frame_times
from pretrain.data.annotations.rows import Row
from pretrain.data.annotations.writing import (
    write_activitynet,
    write_csv,
    write_cvat,
    write_studio,
)
from pretrain.data.lists import Problems, boxes_column, roles_of
from pretrain.files import is_there, reading, replacing, write_synced
from pretrain.folders import try_folder, writing
from pretrain.log import print_table
from recipes.options.convert_labels import Config, command


def read(path: Path) -> tuple[str, list[Row], list[str]]:
    """The format of a file, its rows in seconds, and what is to be said of it."""
    problems = Problems(path)
    with reading(path):
        form, rows = as_rows(path, problems)
    problems.stop(len(rows))
    plain = []
    for row in rows:
        segments = row.extra.pop("segments", "")
        parts = [s for p in segments.split(";") for s in parse_segments(p, f"{path}:{row.line}")]
        plain += [replace(row, label=label, start=a, end=b) for a, b, label in parts]
        if not parts or row.label not in {None, *(label for *_, label in parts)}:
            plain.append(row)
    return form, plain, problems.notes


def moved(row: Row, folder: Path, to: Path) -> Row:
    """The row of a list in `folder` for one in the folder `to`: the same files from there."""
    anew = lambda name: os.path.relpath(os.path.join(folder, name), to)
    roles = roles_of(tuple(row.extra))[0]
    files = [name for name, role in roles.items() if role in ("flow", "pose")]
    beside = {
        name: anew(value)
        for name, value in row.extra.items()
        if name in (*files, boxes_column(row.extra)) and value and os.path.lexists(folder / value)
    }
    return replace(row, path=anew(row.path), extra=row.extra | beside)


def main(config: Config) -> dict:
    """Convert; returns what is printed."""
    source, out = Path(config.data), Path(config.out)
    if is_there(out):
        raise ValueError(f"--out {out} exists already: name another, nothing is overwritten")
    if config.fps is not None and config.fps > 1000:
        raise ValueError(f"--fps {config.fps:g}: give frames a second, up to 1000")
    if config.fps is not None and config.to != "labelstudio":
        raise ValueError(f"--fps is for --to labelstudio: leave it out of --to {config.to}")
    if source.is_dir():
        raise ValueError(f"--data {source} is a folder: name the file of annotations in it")
    try_folder(out.parent)
    form, rows, notes = read(source)
    absent = [row for row in rows if row.absent]
    if config.only_present:
        rows = [row for row in rows if not row.absent]
    if not rows:
        raise ValueError(f"{source}: none of its {len(absent)} entries has its video beside it")
    if any(row.in_frames for row in rows):
        raise ValueError(f"{source} counts frames of videos that are absent: put them beside it")
    lost: Counter[str] = Counter()
    beside, to = source.parent.resolve(), out.parent.resolve()
    if config.to == "csv":
        rows = [replace(row, extra=row.extra | row.owner(source.name)) for row in rows]
    if beside != to and config.to == "csv":
        rows = [moved(row, beside, to) for row in rows]
    elif beside != to:
        notes.append(f"its names are those of files in {source.parent}: move it there")
    if config.to == "csv":
        text = write_csv(rows, lost)
    elif config.to == "activitynet":
        text = write_activitynet(rows, lost)
    else:
        wanted = {row.path: row.absent for row in rows if row.start is not None or not config.fps}
        known = config.to == "labelstudio" and config.fps
        if not known and (missing := [name for name, why in wanted.items() if why]):
            raise ValueError(
                f"frames of {missing[0]!r}, which is absent, are not known: put it beside {source}"
                + ", or give --fps" * (config.to == "labelstudio")
            )
        folder = os.path.abspath(source.parent)
        times = {}
        if not known:
            files = {os.path.join(folder, name): name for name in wanted}
            times = {files[path]: found for path, found in frame_times(files).items()}
        rates = {n: config.fps or round((len(t) - 1) / t[-1], 6) for n, (t, _) in times.items()}
        rates |= {row.path: config.fps for row in rows} if config.fps else {}
        text = (
            write_cvat(rows, lost, times)
            if config.to == "cvat"
            else write_studio(rows, lost, rates)
        )
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start : error.end])
        raise ValueError(
            f"{source}: a text holds {half}, which is no character: remove it"
        ) from error
    with writing(out), replacing(out) as aside:
        write_synced(aside, data)
    examples = sorted({row.absent for row in absent})
    told = {
        "read": form,
        "videos": len({row.path for row in rows}),
        "entries": len(rows),
        "absent videos": ", such as ".join([str(len(examples)), *examples[:1]]),
        "cannot hold": ", ".join(f"{name} ({n})" for name, n in lost.items() if n) or "nothing",
        "notes": "; ".join(notes) or "none",
    }
    print_table(f"{source} -> {out} ({config.to})", told)
    return told


if __name__ == "__main__":
    command(main)
