"""Annotations of tools for people who watch: ELAN, BORIS, Label Studio, CVAT.

ELAN: https://www.mpi.nl/tools/elan/EAF_Annotation_Format_3.0_and_ELAN.pdf; BORIS:
https://www.boris.unito.it; Label Studio: https://labelstud.io/tags/timelinelabels; CVAT:
https://docs.cvat.ai/docs/dataset_management/formats/format-cvat.
"""

import re
from pathlib import Path

from pretrain.data.annotations.rows import (
    Entries,
    Row,
    address,
    frames,
    header_of,
    number,
    parse_whole,
    parse_xml,
    seconds,
    table_rows,
    word,
)

POINT = 0.04  # seconds that a point lasts where nothing says the frame rate
STUDIO_FPS = 24.0  # Label Studio's own where its tag names none


def root_name(text: str) -> str:
    """The name of an XML document's root; "" of another text."""
    if text.lstrip()[:1] != "<":
        return ""
    plain = re.sub(r"<\?.*?\?>|<!--.*?-->", "", text[:20_000], flags=re.DOTALL)
    found = re.search(r"<([A-Za-z_][\w.-]*)", plain)
    return found[1] if found else ""


def is_elan(text: str) -> bool:
    """Whether it is an ELAN document."""
    return root_name(text) == "ANNOTATION_DOCUMENT"


def read_elan(path: Path, text: str, entries: Entries) -> None:
    """Annotations with times become segments, of all tiers; a tier's participant is the subject."""
    root = parse_xml(path, text)
    header = root.find("HEADER")
    units = header.get("TIME_UNITS", "milliseconds") if header is not None else "milliseconds"
    if units != "milliseconds":
        raise ValueError(f"{path}: TIME_UNITS {units[:40]!r}, only milliseconds are read")
    media = list(root.iterfind("HEADER/MEDIA_DESCRIPTOR"))
    films = [m for m in media if not m.get("MIME_TYPE", "").startswith("audio")] or media
    names = [m.get(k, "") for m in films for k in ("RELATIVE_MEDIA_URL", "MEDIA_URL")]
    names = [address(name) for name in names if name] or [path.stem]
    origin = number(films[0].get("TIME_ORIGIN", "0"), "TIME_ORIGIN") / 1000 if films else 0.0
    found = entries.media.find(*names)
    if len(films) > 1:
        entries.notes.append(f"of {len(films)} media files {names[0][:80]} is taken")
    plain = Row(found or names[0], absent="" if found else names[0].rpartition("/")[2])
    slots = {s.get("TIME_SLOT_ID"): s.get("TIME_VALUE") for s in root.iterfind("TIME_ORDER/*")}
    taken = []
    for tier in root.iterfind("TIER"):
        name = tier.get("TIER_ID", "")
        parts = list(tier.iterfind("ANNOTATION/ALIGNABLE_ANNOTATION"))
        if parts:
            taken.append(name)
        elif len(tier):
            entries.unused[f"tier {name} (it has no times)"] += 1
        for part in parts:
            line = entries.line_of(f'"{part.get("ANNOTATION_ID")}"')
            try:
                value = part.findtext("ANNOTATION_VALUE") or ""
                first, last = (slots.get(part.get(f"TIME_SLOT_REF{i}")) for i in (1, 2))
                if not value.strip():
                    entries.unused["annotations without text"] += 1
                    continue
                if first is None or last is None:
                    entries.unused["annotations without times"] += 1
                    continue
                start, end = (number(v, "TIME_VALUE") / 1000 + origin for v in (first, last))
                start, end = seconds(start, end)
                who = tier.get("PARTICIPANT") or None
                label = word(value, "an annotation")
                row = Row(plain.path, label, start, end, subject=who, absent=plain.absent)
                entries.add(Row(**{**row.__dict__, "line": line}))
            except ValueError as error:
                entries.wrong(line, f"tier {name[:40]}: {error}")
    entries.notes.append(f"labels from the tiers {', '.join(taken)[:120]}")


def _boris_header(text: str) -> tuple[int, str, list[str]] | None:
    for line, separator, names in header_of(text, 60):
        plain = [name.lower() for name in names]
        aggregated = {"start (s)", "stop (s)"} <= {*plain}
        events = "time" in plain and bool({"status", "behavior type"} & {*plain})
        if "behavior" in plain and (aggregated or events):
            return line, separator, plain
    return None


def is_boris(text: str) -> bool:
    """Whether one of the first lines has BORIS' columns; older exports have others before it."""
    return "ehavior" in text[:20_000] and _boris_header(text) is not None


_BORIS_MEDIA = ("media file name", "media file path", "media file", "source")
_BORIS = frozenset(("behavior", "behavior type", "status", "time", "start (s)", "stop (s)",
                    "subject", "observation id", "fps", "fps (frame/s)", "time offset (s)",
                    *_BORIS_MEDIA))  # fmt: skip


def _clock(value: str) -> float:
    """Seconds, of a number or of hours, minutes and seconds."""
    parts = value.split(":")
    if len(parts) != 3:
        return number(value, "a time")
    units = zip(parts, (3600, 60, 1), strict=True)
    total = sum(abs(number(part, "a time")) * unit for part, unit in units)
    return -total if value.lstrip().startswith("-") else total


def _refuse_offset(text: str) -> None:
    if text not in ("", "NA") and number(text, "Time offset (s)"):
        raise ValueError("an observation with a time offset: set it to 0, export again")


def read_boris(path: Path, text: str, entries: Entries) -> None:
    """Aggregated events, or tabular ones whose START and STOP are paired; a point is one frame."""
    header = _boris_header(text)
    assert header is not None  # it was recognised
    first, separator, names = header
    entries.unused_keys(names, _BORIS)
    started: dict[tuple[str, ...], tuple[float, int]] = {}
    media: dict[str, str] = {}  # of each observation
    points = 0
    for line, values in table_rows(text, separator, entries):
        try:
            if line < first and values[0].lower() == "time offset (s)" and any(values[1:]):
                _refuse_offset(next(filter(None, values[1:])))
            if line <= first:
                continue
            if len(values) < len(names):
                raise ValueError(f"{len(values)} columns, not {len(names)}")
            row = dict(zip(names, values, strict=False))
            given = next((row[k] for k in _BORIS_MEDIA if row.get(k)), "")
            given = re.sub(r"^player #\d+:", "", given, flags=re.IGNORECASE).split(";")[0]
            _refuse_offset(row.get("time offset (s)", ""))
            observation = row.get("observation id", "")
            if media.setdefault(observation, given) != given:
                raise ValueError(
                    f"observation {observation[:40]!r} is of several media files, through all of "
                    "which its times count: observe each file for itself"
                )
            label, kind = word(row["behavior"], "Behavior"), ""
            for column in ("behavior type", "status"):
                kind = kind or row.get(column, "").upper()
            rate = row.get("fps (frame/s)") or row.get("fps") or "NA"
            point = POINT if rate in ("NA", "NONE") else 1 / _rate({"fps": rate})
            who = row.get("subject", "")
            key = (observation, given, who, label)
            if "start (s)" in row:
                begin, stop = _clock(row["start (s)"]), _clock(row["stop (s)"])
            elif kind.endswith("START"):
                if key in started:
                    raise ValueError(f"{label} starts twice without a stop")
                started[key] = _clock(row["time"]), line
                continue
            elif kind.endswith("STOP"):
                if key not in started:
                    raise ValueError(f"{label} stops and never started")
                begin, stop = started.pop(key)[0], _clock(row["time"])
            else:
                begin = stop = _clock(row["time"])
            points += begin == stop
            start, end = seconds(begin, stop, point)
            name = address(given) or row.get("observation id", "")
            found = entries.media.find(name)
            subject = None if who.lower() in ("", "no focal subject") else who
            why = "" if found else name or "(no media file is named)"
            entries.add(
                Row(found or name, label, start, end, subject=subject, line=line, absent=why)
            )
        except ValueError as error:
            entries.wrong(line, str(error))
    for (*_, label), (_, line) in started.items():
        entries.wrong(line, f"{label} starts and never stops: add its STOP")
    if points:
        entries.notes.append(f"events without duration: {points}, each is taken for one frame")


def is_studio(text: str) -> bool:
    """Whether there may be tasks of Label Studio."""
    return text.lstrip()[:1] in "[{" and (
        ('"annotations"' in text and '"result"' in text) or '"timelinelabels"' in text
    )


_RATES = ("fps", "framerate", "frame_rate", "frameRate")


def _rate(*places: object) -> float:
    """Frames a second that one of these objects of JSON says; 0: none does."""
    for place in places:
        for key in _RATES:
            if isinstance(place, dict) and place.get(key) is not None:
                rate = number(place[key], key)
                if not 0 < rate <= 1000:
                    raise ValueError(f"{key} is {rate:g}, it has to be over 0 and up to 1000")
                return rate
    return 0.0


def _studio_video(task: dict) -> str:
    data = task.get("data", task)
    if not isinstance(data, dict):
        raise ValueError(f"its data is {str(data)[:40]!r}, it has to be an object")
    given = data.get("video") or data.get("video_url") or data.get("url")
    if not isinstance(given, str):
        texts = [v for v in data.values() if isinstance(v, str)]
        given = next((t for t in texts if re.search(r"\.\w{2,4}$", t)), None)
    if given is None:
        raise ValueError("a task names no video in its data")
    return address(given)


# Of its export JSON-MIN: names of a task that are neither data of a user nor labels.
_MIN = frozenset(("video", "video_url", "url", "id", "annotator", "annotation_id", "created_at",
                  "updated_at", "lead_time", *_RATES))  # fmt: skip


def _whole_task(task: dict) -> dict:
    """A task of the export JSON-MIN as the whole one has it."""
    results, data = [], {}
    for name, value in task.items():
        if name == "choice" and isinstance(value, str):
            value = {"choices": [value]}
        labels = value if isinstance(value, list) else [value]
        if all(isinstance(v, dict) and {"timelinelabels", "choices"} & v.keys() for v in labels):
            results += [{"type": name, "value": v} for v in labels]
        else:
            data[name] = value
    return {"data": data, "annotations": [{"result": results}]}


def read_studio(path: Path, text: str, entries: Entries) -> bool:
    """Ranges of timeline labels count frames from 1, both ends are in; choices are of the video."""
    tasks = parse_whole(text)
    tasks = [tasks] if isinstance(tasks, dict) else tasks
    if not isinstance(tasks, list) or not tasks or not all(isinstance(t, dict) for t in tasks):
        return False
    small = [_whole_task(t) for t in tasks if not {"annotations", "data"} & t.keys()]
    if any(t["annotations"][0]["result"] for t in small):  # of the same labelling: all, or none
        tasks = [t for t in tasks if {"annotations", "data"} & t.keys()] + small
        for task in small:
            entries.unused_keys(task["data"], _MIN)
    if not any({"annotations", "data"} <= t.keys() for t in tasks):
        return False
    guessed = 0
    for order, task in enumerate(tasks, 1):
        line = 1
        try:
            name = _studio_video(task)
            line = entries.line_of(name)
            found = entries.media.find(name, re.sub(r"^[0-9a-f]{8}-", "", name.rpartition("/")[2]))
            why = "" if found else name.rpartition("/")[2]
            made = task.get("annotations")
            if not isinstance(made, list) or not all(isinstance(a, dict) for a in made):
                raise ValueError("annotations has to be a list of objects")
            made = [a for a in made if not a.get("was_cancelled")]
            if len(made) > 1:
                entries.unused["annotations of a task behind its first"] += len(made) - 1
            if task.get("predictions"):
                entries.unused["predictions"] += 1
            plain = Row(found or name, line=line, absent=why)
            results = made[0].get("result") if made else []
            if not isinstance(results, list):
                raise ValueError("result has to be a list")
            if not results:
                entries.add(plain)
            for result in results:
                value = result.get("value") if isinstance(result, dict) else None
                if not isinstance(value, dict):
                    raise ValueError("a result has no value")
                if isinstance(value.get("choices"), list):
                    for choice in value["choices"]:
                        entries.add(_like(plain, label=word(choice, "a choice")))
                    continue
                labels, ranges = value.get("timelinelabels"), value.get("ranges")
                if not isinstance(labels, list) or not isinstance(ranges, list):
                    entries.unused[f"results of type {str(result.get('type'))[:40]}"] += 1
                    continue
                rate = _rate(value, result, result.get("meta"), task.get("data"), task.get("meta"))
                guessed += not rate
                rate = rate or STUDIO_FPS
                for part in ranges:
                    if not isinstance(part, dict):
                        raise ValueError("a range is no object")
                    a, b = number(part.get("start"), "start"), part.get("end")
                    a, b = frames(a - 1, b)
                    for label in labels:
                        start, end = seconds(a / rate, b / rate)
                        label = word(label, "a label")
                        entries.add(_like(plain, label=label, start=start, end=end))
        except ValueError as error:
            entries.wrong(line, f"task {order}: {error}")
    if guessed:
        entries.notes.append(
            f"frames counted at {STUDIO_FPS:g} a second, Label Studio's own rate, where no task "
            f'says it: {guessed} times; add "fps" to a task\'s data where its tag has another'
        )
    return True


def _like(row: Row, **changes) -> Row:
    return Row(**{**row.__dict__, **changes})


def is_cvat(text: str) -> bool:
    """Whether it is a CVAT document."""
    return root_name(text) == "annotations"


def read_cvat(path: Path, text: str, entries: Entries) -> None:
    """Each stretch of frames in which a track is seen becomes a segment of its label.

    Frames count from 0. Where the file has no fps, the video's timestamps tell when they are.
    """
    root = parse_xml(path, text)
    meta = root.find("meta")
    tasks = list(root.iterfind("meta//task")) or list(root.iterfind("meta//job"))
    if len(tasks) > 1:
        raise ValueError(f"{path} is of {len(tasks)} tasks: export each for itself")
    if root.find("image") is not None:
        raise ValueError(f"{path} is CVAT for images: export CVAT for video 1.1")
    about = [*tasks, *([meta] if meta is not None else [])]  # their own, not those of labels
    said = {e.tag: (e.text or "").strip() for part in reversed(about) for e in part}
    names = [said[k] for k in ("source", "name") if said.get(k)]
    own = entries.media.find(*map(address, names))
    found = own or entries.media.find(path.stem) or entries.media.only()
    if names and found and not own:
        entries.notes.append(f"its video {names[0][:80]} is not here: {found} is taken for it")
    names.append(path.stem)
    rate = _rate({"fps": said["fps"]}) if said.get("fps") else 0.0
    plain = Row(found or names[0], in_frames=True, fps=rate, absent="" if found else names[0])
    for order, track in enumerate(root.iterfind("track")):
        line = entries.line_of(f'<track id="{track.get("id")}"')
        try:
            label = word(track.get("label", ""), "label of a track")
            shapes = sorted(
                ((number(s.get("frame"), "frame"), s) for s in track), key=lambda pair: pair[0]
            )
            for shape in track:
                entries.unused_keys((a.get("name", "") for a in shape), frozenset(), "attribute ")
                if shape.tag != "box":
                    entries.unused[f"{shape.tag} (only its time is read)"] += 1
            since: float | None = None
            spans, last = [], 0.0
            for frame, shape in shapes:
                hidden = shape.get("outside") == "1"
                if hidden and since is not None:
                    spans.append((since, frame))
                    since = None
                elif not hidden and since is None:
                    since = frame
                last = frame
            if since is not None:
                spans.append((since, last + 1))
            boxes = tuple(
                (f, *(number(s.get(k), k) for k in ("xtl", "ytl", "xbr", "ybr")))
                for f, s in shapes
                if s.tag == "box"
            )
            for a, b in spans:
                a, b = frames(a, b)
                inside = tuple(box for box in boxes if a <= box[0] < b)
                whose = str(track.get("id")) if inside else None
                entries.add(_like(plain, label=label, start=a, end=b, boxes=inside, track=whose,
                                  line=line))  # fmt: skip
        except ValueError as error:
            entries.wrong(line, f"track {order}: {error}")
