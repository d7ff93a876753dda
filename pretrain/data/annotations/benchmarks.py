"""Annotations of public benchmarks: Kinetics, Something-Something, ActivityNet, AVA.

Kinetics (Kay et al. 2017, https://arxiv.org/abs/1705.06950), Something-Something (Goyal et al.
2017, https://arxiv.org/abs/1706.04261), ActivityNet (Heilbron et al. 2015), AVA (Gu et al. 2018,
https://arxiv.org/abs/1705.08421).
"""

import os
import re
from dataclasses import replace
from pathlib import Path

from pretrain.data.annotations.rows import (
    Entries,
    Row,
    header_of,
    number,
    parse_whole,
    seconds,
    table_rows,
    word,
)
from pretrain.data.lists import roles_of, split_of
from pretrain.files import read_limited

_KINETICS = frozenset(("label", "youtube_id", "time_start", "time_end", "split"))


def is_kinetics(text: str) -> bool:
    """Whether the first line has Kinetics' columns, and none that names files."""
    for _, _, names in header_of(text):
        plain = {name.lower() for name in names}
        others = tuple(plain - _KINETICS)
        return {"youtube_id", "time_start", "time_end"} <= plain and (
            "path" not in roles_of(others)[0].values()
        )
    return False


def read_kinetics(path: Path, text: str, entries: Entries) -> None:
    """Files called ID_000010_000020 are cut out already; in one called ID a row is a segment."""
    ((_, separator, names),) = header_of(text)
    names = [name.lower() for name in names]
    entries.unused_keys(names, _KINETICS)
    rows = table_rows(text, separator, entries)
    next(rows, None)  # the names; none where their quotes are broken
    for line, values in rows:
        try:
            if len(values) != len(names):
                raise ValueError(f"{len(values)} columns, not {len(names)}")
            row = dict(zip(names, values, strict=True))
            name = word(row["youtube_id"], "youtube_id")
            start, end = seconds(row["time_start"], row["time_end"])
            label = word(row["label"], "label") if row.get("label") else None
            cut = f"{name}_{int(start):06d}_{int(end):06d}"
            plain = Row(cut, label, split=row.get("split") or None, line=line)
            if found := entries.media.find(cut):
                about = {"youtube_id": name, "time_start": f"{start:g}"}
                entries.add(replace(plain, path=found, extra=about))
            else:
                found = entries.media.find(name)
                why = "" if found else f"neither {cut} nor {name}"
                plain = replace(plain, path=found or cut, absent=why)
                entries.add(replace(plain, start=start, end=end))
        except ValueError as error:
            entries.wrong(line, str(error))


_ACTIVITYNET = frozenset(("subset", "annotations"))


def is_activitynet(text: str) -> bool:
    """Whether there may be an object `database` or `results` of videos."""
    return text.lstrip()[:1] == "{" and ('"database"' in text or '"results"' in text)


def read_activitynet(path: Path, text: str, entries: Entries) -> bool:
    """`database` has videos with `annotations`; `results` those of a detector, likewise."""
    content = parse_whole(text)
    key = "database" if isinstance(content, dict) and "database" in content else "results"
    videos = content.get(key) if isinstance(content, dict) else None
    kind = dict if key == "database" else list
    if not isinstance(videos, dict) or not all(isinstance(v, kind) for v in videos.values()):
        return False
    assert isinstance(content, dict)
    entries.unused_keys(content, frozenset((key,)))
    for name, video in videos.items():
        line = entries.line_of(f'"{name}"')
        try:
            if isinstance(video, list):
                video = {"annotations": video}
            entries.unused_keys(video, _ACTIVITYNET)
            found = entries.media.find(f"v_{name}", name) if name else None
            why = "" if found else f"neither v_{name} nor {name}"
            split = word(video["subset"], "subset") if video.get("subset") else None
            plain = Row(found or name, split=split, line=line, absent=why)
            parts = video.get("annotations") or []
            if not isinstance(parts, list):
                raise ValueError("annotations has to be a list")
            if not parts:
                entries.add(plain)
            for part in parts:
                match part:
                    case {"segment": [first, last]}:
                        start, end = seconds(first, last)
                    case _:
                        raise ValueError('an annotation has no "segment": [start, end]')
                label, caption = part.get("label"), part.get("sentence")
                if label is None and caption is None:
                    raise ValueError("an annotation has no label")
                label = None if label is None else word(label, "label")
                caption = None if caption is None else word(caption, "sentence")
                entries.unused_keys(part, frozenset(("segment", "label", "sentence")))
                entries.add(replace(plain, label=label, start=start, end=end, caption=caption))
        except ValueError as error:
            entries.wrong(line, f"{name[:80]}: {error}")
    return True


_SOMETHING = frozenset(("id", "label", "template"))


def is_something(text: str) -> bool:
    """Whether there may be a list of objects with a template."""
    head = text.lstrip()[:20_000]
    return head[:1] == "[" and '"id"' in head and '"template"' in head


def read_something(path: Path, text: str, entries: Entries) -> bool:
    """The template is the class, the label a caption; of a list of training that of validation too.

    The split is that of the file's name.
    """
    if not _something(path, text, entries):
        return False
    for mine, other in (("train", "validation"), ("train", "val"), ("training", "validation")):
        second = path.with_name(path.name.replace(mine, other))
        if mine in path.name and second.is_file():
            beside = Entries(second, data := read_limited(second, 2**28).decode("utf-8-sig"))
            beside.media, beside.rows = entries.media, entries.rows
            beside.unused, beside.mistakes = entries.unused, entries.mistakes
            if not _something(second, data, beside):
                raise ValueError(f"{second} is no list of Something-Something")
            entries.notes.append(f"{second.name} beside it is read, too")
            break
    return True


def _something(path: Path, text: str, entries: Entries) -> bool:
    videos = parse_whole(text)
    if not isinstance(videos, list) or not any(
        isinstance(v, dict) and {"id", "template"} <= v.keys() for v in videos
    ):
        return False
    words = re.split(r"[^a-z]+", path.stem.lower())
    split = next((split_of(w) for w in words if split_of(w) in ("train", "val", "test")), None)
    for video in videos:
        if not isinstance(video, dict) or "id" not in video:
            entries.wrong(1, 'an entry is no object with "id"')
            continue
        line = entries.line_of(f'"{video["id"]}"')
        try:
            name = word(video["id"], "id")
            template, caption = video.get("template"), video.get("label")
            label = None
            if template is not None:  # "Putting [something] on [something]"
                label = word(template, "template").replace("[", "").replace("]", "")
            entries.unused_keys(video, _SOMETHING)
            found = entries.media.find(name)
            why = "" if found else f"no {name}.webm"
            caption = None if caption is None else word(caption, "label")
            entries.add(
                Row(found or name, label, split=split, caption=caption, line=line, absent=why)
            )
        except ValueError as error:
            entries.wrong(line, f"{str(video['id'])[:80]}: {error}")
    return True


AVA_REACH = 0.5  # seconds before and behind the second of a label or a box
_AVA = re.compile(r"[\w.-]+,\d+(\.\d+)?(,(0|1|0?\.\d+|[01]\.\d+)){4},\d+(,\d+)?\s*(\n|$)")


def is_ava(text: str) -> bool:
    """Whether the first line is one of AVA's, which have no names."""
    return bool(_AVA.match(text.lstrip()))


def read_ava(path: Path, text: str, entries: Entries) -> None:
    """A label of a person at a second becomes a segment of that second, half before, half behind.

    Neighbouring ones of one person and action are one segment. `boxes.parse_boxes` reads the boxes.
    """
    names = _actions(path, entries)
    last: dict[tuple[str, str, str], int] = {}
    for line, values in table_rows(text, ",", entries):
        try:
            if len(values) not in (7, 8):
                raise ValueError(f"{len(values)} columns, not 7 or 8")
            video, when, *box, action = values[:7]
            person = values[7] if len(values) == 8 else ""
            middle = number(when, "timestamp")
            start, end = seconds(max(0.0, middle - AVA_REACH), middle + AVA_REACH)
            sides = [number(side, "a box") for side in box]
            if not (0 <= sides[0] < sides[2] <= 1 and 0 <= sides[1] < sides[3] <= 1):
                raise ValueError("a box has to be x1,y1,x2,y2 between 0 and 1")
            found = entries.media.find(video)
            name = found or word(video, "video")
            label = names.get(action, f"action {word(action, 'action_id')}")
            key = (name, person, label)
            before = entries.rows[last[key]] if person and key in last else None
            if before and before.end is not None and abs(start - before.end) < 1e-6:
                entries.rows[last[key]] = replace(before, end=end)
                continue
            last[key] = len(entries.rows)
            why = "" if found else f"no {video}"
            subject = f"{video} {person}" if person else None  # ids hold within one video
            entries.add(Row(name, label, start, end, subject=subject, line=line, absent=why,
                            track=person or None))  # fmt: skip
        except ValueError as error:
            entries.wrong(line, str(error))
    if nobody := sum(row.track is None for row in entries.rows):
        entries.unused["boxes of nobody: rows without a person"] += nobody


def _actions(path: Path, entries: Entries) -> dict[str, str]:
    """The names of actions by number, of a .pbtxt or csv beside the file that has them."""
    found: dict[str, str] = {}
    for file in sorted(os.listdir(path.parent or ".")):
        if not re.search(r"action.*\.(pbtxt|csv)$", file) or file == path.name:
            continue
        try:
            text = read_limited(path.parent / file, 2**20).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError):
            continue
        item = r'(?:item|label)\s*\{\s*(?:name:\s*"([^"]*)"\s*)?(?:label_)?id:\s*(\d+)'
        pairs = [(i, name) for name, i in re.findall(item, text) if name]
        pairs += re.findall(r'id:\s*(\d+)\s*name:\s*"([^"]*)"', text)
        pairs += re.findall(r"(?m)^(\d+),([^,\n]+)", text) if file.endswith(".csv") else []
        if pairs:
            found = {number: word(name, "name of an action") for number, name in pairs}
            entries.notes.append(f"names of actions from {file}")
            break
    else:
        entries.notes.append(
            "no names of actions beside it: put ava_action_list_v2.2.pbtxt there for them"
        )
    return found
