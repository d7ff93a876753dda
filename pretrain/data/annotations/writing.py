"""Writes rows of annotations as ActivityNet json, CVAT xml, Label Studio json, or our csv."""

import csv
import io
import json
import os
import re
from collections import Counter
from xml.etree import ElementTree

import numpy as np

from pretrain.data.annotations.rows import Row
from pretrain.data.lists import OF_FILE, TIMES, times_of_recording
from pretrain.names import for_csv, for_screen

COLUMNS = ("path", "start", "end", "label", "split", "subject", "caption")
SUBSETS = {"train": "training", "val": "validation", "test": "testing"}
_NO_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
Times = dict[str, tuple[np.ndarray, tuple[int, int]]]


def by_video(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each video, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.path, []).append(row)
    return found


def _drop(rows: list[Row], lost: Counter[str], *names: str) -> None:
    """Count what a format cannot hold: attributes of rows, and all further columns."""
    for row in rows:
        for name in names:
            lost[name] += bool(getattr(row, name))
        for name in row.extra:
            lost[f"column {name}"] += 1


def _drop_boxes(rows: list[Row], lost: Counter[str]) -> None:
    """Count the labels that were of somebody in a box."""
    lost["boxes"] += sum(bool(row.boxes or row.track) for row in rows)


def write_csv(rows: list[Row], lost: Counter[str]) -> str:
    """A list that `--data` reads: a row for every label, with all further columns.

    Times in a recording are further columns; beside them the row's own are marked as of the file.

    Raises:
        ValueError: a video has a name that would be read as another one.
    """
    lines = []
    for row in rows:
        cells = {n.lower() if n.lower() in ("start", "end") else n: v for n, v in row.extra.items()}
        if row.start is not None and row.end is not None:
            cells = {f"{n}_time" if n in ("start", "end") else n: v for n, v in cells.items()}
            cells |= {"start": f"{row.start:.6f}", "end": f"{row.end:.6f}"}
            cells |= {TIMES: OF_FILE} if times_of_recording(cells) else {}
        path = f"./{row.path}" if row.path[:1] in "=+-@" else row.path
        if for_csv(path) != path:
            raise ValueError(
                f"a list cannot hold the name {for_screen(path)!r}: rename the file, so that it "
                "has no control characters and no escapes"
            )
        own = {"path": path, "label": row.label, "split": row.split, "subject": row.subject}
        lines.append({**cells, **own, "caption": row.caption})
    columns = dict.fromkeys([*COLUMNS, *(name for line in lines for name in line)])
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(map(for_csv, columns))
    for line in lines:
        values = [line.get(name) for name in columns]
        writer.writerow(["" if v is None else for_csv(v) for v in values])
    return out.getvalue()


def write_activitynet(rows: list[Row], lost: Counter[str]) -> str:
    """`database` of videos, named as their files without the ending."""
    _drop(rows, lost, "subject")
    _drop_boxes(rows, lost)
    database: dict[str, dict] = {}
    for path, mine in by_video(rows).items():
        name = os.path.splitext(path)[0]
        if name in database:
            raise ValueError(f"two videos are called {name!r} without their endings: rename one")
        entry: dict = {"subset": SUBSETS.get(mine[0].split or "", mine[0].split or "")}
        entry["annotations"] = parts = []
        for row in mine:
            if row.start is None:
                lost["label of a whole video"] += row.label is not None
                lost["caption"] += row.caption is not None
                continue
            part = {"segment": [row.start, row.end], "label": row.label, "sentence": row.caption}
            parts.append({key: value for key, value in part.items() if value is not None})
        database[name] = entry
    return json.dumps({"version": "1.3", "database": database}, indent=1, ensure_ascii=False) + "\n"


def write_studio(rows: list[Row], lost: Counter[str], rates: dict[str, float]) -> str:
    """Tasks with ranges of timeline labels, which count frames from 1, and choices."""
    _drop(rows, lost, "subject", "caption", "split")
    _drop_boxes(rows, lost)
    tasks = []
    for path, mine in by_video(rows).items():
        results = []
        for row in mine:
            about: dict = {"to_name": "video"}
            if row.label is None:
                continue
            if row.start is None or row.end is None:
                about |= {"from_name": "class", "type": "choices"}
                about["value"] = {"choices": [row.label]}
            else:
                first = round(row.start * rates[path])
                last = max(first + 1, round(row.end * rates[path]))
                about |= {"from_name": "segments", "type": "timelinelabels"}
                ranges = [{"start": first + 1, "end": last}]
                about["value"] = {"ranges": ranges, "timelinelabels": [row.label]}
            results.append(about)
        data = {"video": path} | ({"fps": rates[path]} if path in rates else {})
        tasks.append({"data": data, "annotations": [{"result": results}]})
    return json.dumps(tasks, indent=1, ensure_ascii=False) + "\n"


def write_cvat(rows: list[Row], lost: Counter[str], times: Times) -> str:
    """Tracks of one video; where a segment has no boxes, a box around the whole picture.

    Raises:
        ValueError: the rows are of several videos, or hold what XML cannot.
    """
    _drop(rows, lost, "subject", "caption", "split")
    _drop_boxes([row for row in rows if not row.boxes], lost)  # of AVA, fractions of the picture
    videos = list(by_video(rows))
    if len(videos) > 1:
        raise ValueError(f"CVAT xml is of one video, not of {len(videos)}: convert each for itself")
    for text in (videos[0], *(row.label or "" for row in rows)):
        if _NO_XML.search(text):
            raise ValueError(f"XML cannot hold the control character in {for_screen(text)!r}")
    when, (width, height) = times[videos[0]]
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    task = ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task")
    ElementTree.SubElement(task, "size").text = str(len(when) - 1)
    ElementTree.SubElement(task, "mode").text = "interpolation"
    labels = ElementTree.SubElement(task, "labels")
    for name in sorted({row.label for row in rows if row.label}):
        ElementTree.SubElement(ElementTree.SubElement(labels, "label"), "name").text = name
    size = ElementTree.SubElement(task, "original_size")
    ElementTree.SubElement(size, "width").text = str(width)
    ElementTree.SubElement(size, "height").text = str(height)
    ElementTree.SubElement(task, "source").text = videos[0]
    for number, row in enumerate(rows):
        if row.start is None or row.end is None or row.label is None:
            lost["label of a whole video"] += row.label is not None
            continue
        first, last = (int(np.argmin(np.abs(when - t))) for t in (row.start, row.end))
        first = min(first, len(when) - 2)
        last = max(first + 1, last)
        track = ElementTree.SubElement(root, "track", id=str(number), label=row.label)
        boxes = list(row.boxes) or [(first, 0.0, 0.0, float(width), float(height))]
        if boxes[-1][0] < last - 1:
            boxes.append((last - 1, *boxes[-1][1:]))
        ends = [(last, *boxes[-1][1:])] if last < len(when) - 1 else []
        for i, box in enumerate([*boxes, *ends]):
            sides = dict(
                zip(("xtl", "ytl", "xbr", "ybr"), (f"{v:.2f}" for v in box[1:]), strict=True)
            )
            hidden = str(int(i >= len(boxes)))
            about = {"frame": f"{box[0]:.0f}", "outside": hidden, "occluded": "0", "keyframe": "1"}
            ElementTree.SubElement(track, "box", about | sides)
    ElementTree.indent(root)
    return ElementTree.tostring(root, "unicode", xml_declaration=True) + "\n"
