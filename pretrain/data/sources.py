"""Lists what a user calls a data set: a folder, a list file, images, or tars of videos.

Nothing is decoded here.
"""

import contextlib
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pretrain.data.annotations import line_of, read_rows
from pretrain.data.annotations.videofolder import metadata_files
from pretrain.data.fields import NOTHING, fields_of, take_times, text_of
from pretrain.data.lists import (
    BESIDE,
    IMAGES,
    LISTS,
    MAX_ID,
    RECORDING,
    SPLIT_OF,
    TRACK,
    VIDEOS,
    Problems,
    boxes_column,
    irregular,
    recording_of,
    roles_of,
    split_of,
    track_column,
)
from pretrain.data.tar import Member, list_members
from pretrain.files import LOCK, open_regular, parse_json, reading
from pretrain.names import first_of

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")

SEGMENTS = "segments"  # the column of a label for every frame
BUILT_IN = "synthetic"
NUM_CLIPS = 900  # of the synthetic dataset: 50 of each action


def synthetic_clips(source: str) -> int | None:
    """How many clips of the synthetic dataset `source` asks for; None if it names something else.

    Raises:
        ValueError: "synthetic:" is not followed by a positive number.
    """
    name, _, number = source.partition(":")
    if name != BUILT_IN:
        return None
    if source == BUILT_IN:
        return NUM_CLIPS
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"--data {source!r}: write synthetic:3600 for 3,600 clips")
    return int(number)


@dataclass(frozen=True)
class Beside:
    """A file with another stream of a video.

    Attributes:
        path: the file that holds it, or a folder of a file a frame.
        member: offset and size in bytes inside `path`, if that is a tar.
        name: by whose ending one knows what it is.
        about: what it holds, where the user says so: of flow the method, of poses the skeleton.
        bound: of flow in pictures, see `pretrain/data/flow_files.py`; 0: not said.
    """

    path: Path
    member: tuple[int, int] | None
    name: str
    about: str = ""
    bound: float = 0.0

    @property
    def is_array(self) -> bool:
        """Whether it is a file of arrays."""
        return self.name.lower().endswith((".npz", ".npy"))


@dataclass(frozen=True)
class Source:
    """One video or image, as yet unchecked.

    Attributes:
        name: as the user wrote it, relative to the folder or list; unique.
        path: the file that holds it.
        member: offset and size in bytes inside `path`, if that is a tar.
        kind: "video" or "image", by the file's name; "pose": a recording of joints, without a
            video.
        label: class name.
        captions: sentences about it.
        split: "train", "val", "test" or whatever the list says.
        subject: who is seen.
        extra: further columns.
        beside: its further streams that came with it, by name: "flow", "pose".
        whose: by an identity in the boxes, this person's segments, each with its label; "" has
            those of nobody in particular. Empty where no label says whose it is.
    """

    name: str
    path: Path
    member: tuple[int, int] | None = None
    kind: str = "video"
    label: str | None = None
    captions: tuple[str, ...] = ()
    split: str | None = None
    subject: str | None = None
    extra: dict[str, str] = field(default_factory=dict)
    beside: dict[str, Beside] = field(default_factory=dict)
    whose: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)

    def of(self, person: str) -> "Source":
        """The video as one of this person alone, where labels say whose they are.

        Its name has the person behind a #, and its recording is the video, so that no split divides
        those who are seen in it.
        """
        if not self.whose:
            return self
        mine = dict.fromkeys([*self.whose.get("", ()), *self.whose.get(person, ())])
        labels = {label for _, label in mine}
        extra = {name: text for name, text in self.extra.items() if name != SEGMENTS}
        extra[track_column(extra) or TRACK[0]] = person
        if parts := "; ".join(part for part, _ in mine if part):
            extra[SEGMENTS] = parts
        if not recording_of(extra)[0]:
            extra[RECORDING[0]] = self.name
        label = labels.pop() if len(labels) == 1 else None
        return replace(self, name=f"{self.name}#{person}", label=label, extra=extra, whose={})


@dataclass
class Listing:
    """The sources, those refused already as (name, reason), and files of no kind we know.

    `lists` are not read, and may be lists of the sources; `notes` say what format annotations have,
    and what in them has no effect.
    """

    sources: list[Source] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def unread(self) -> str:
        """A sentence on lists that are not read; "": there are none."""
        if not self.lists:
            return ""
        return (
            f"not read: {first_of(self.lists, 3)}. What a list says of the videos is read if it is "
            "given instead of its folder"
        )


def list_sources(source: str | Path) -> Listing:
    """Find the videos and images of a folder, a list file, a tar, or a single file.

    Args:
        source: what the user gave.

    Returns:
        The sources in order of their names (folder, tar) or of the list.

    Raises:
        ValueError: there is nothing usable, or a list has mistakes (all are named).
    """
    path = Path(source)
    why = irregular(path)
    if why and not os.path.exists(path):
        if _ADDRESS.match(str(source)) and len(str(source).split(":", 1)[0]) > 1:
            raise ValueError(
                f"{source} is an address: only local files are read, download it first"
            )
        raise ValueError(f"{path} does not exist; give a folder, a list file, a tar or a video")
    if os.path.isdir(path):
        listing = _from_metadata(path) or _from_folder(path)
    elif why:
        raise ValueError(f"{path}: {why}; give a folder, a list file, a tar or a video")
    elif path.suffix.lower() in VIDEOS | IMAGES:
        listing = Listing([Source(path.name, path, kind=_kind(path.name))])
    elif path.suffix.lower() == ".tar":
        listing = Listing()
        with reading(path):
            _add_tar(listing, path, path.name, None)
    elif path.name.lower().endswith((".tar.gz", ".tgz", ".zip", ".tar.xz", ".tar.bz2", ".gz")):
        raise ValueError(
            f"{path} is compressed: unpack it first, a plain .tar can be read as it is"
        )
    else:
        with reading(path):
            listing = _from_list(path)
    if not listing.sources and not listing.refused:
        kinds = " ".join(sorted(VIDEOS | IMAGES | {".tar"}))
        raise ValueError(f"{path} holds no video or image (looked for {kinds})")
    return listing


def boxes_of(listing: Listing, source: str | Path) -> list[dict]:
    """Of each source its boxes: "text", those that stand in the list, or "file", path and member.

    Args:
        listing: of this source.
        source: what the user gave: paths of boxes are relative to it, if it is a list.

    Raises:
        ValueError: none has any, or files are missing (all are named, by line).
    """
    found: list[dict] = []
    problems, folder = Problems(Path(source)), Path(source).parent
    for each in listing.sources:
        column = boxes_column(each.extra)
        text = each.extra[column].strip() if column is not None else ""
        if not text or text in NOTHING:
            found.append({})
            continue
        if not re.search(r"[A-Za-z_]", text):
            found.append({"text": text})
            continue
        file = os.path.normpath(folder / text.replace("\\", "/"))
        if each.member or os.path.isdir(source) or irregular(file):
            line = line_of(Path(source), {column or "": text}) or 0
            what = f"no such file of boxes: {text:.200} (paths are relative to the list)"
            if each.member or os.path.isdir(source):
                what = f"boxes {text[:80]!r} are no numbers: files of them are for a list to name"
            problems.add(line, what, "missing boxes")
        found.append({"file": {"path": file, "member": None}})
    problems.stop(len(found))
    if not any(found):
        raise ValueError(
            f"--follow boxes: {source} has no boxes: give a list with a column boxes, of files "
            "(MOT, csv, COCO) or of x y w h"
        )
    return found


def _kind(name: str) -> str:
    return "image" if os.path.splitext(name)[1].lower() in IMAGES else "video"


# ---- folders and tars --------------------------------------------------------------------------


def _from_folder(folder: Path) -> Listing:
    listing = Listing()
    files = _walk(folder, listing.refused)
    files.sort()
    media = [
        parts for parts in files if Path(parts[-1]).suffix.lower() in VIDEOS | IMAGES | {".tar"}
    ]
    chosen = set(media)
    for name in ("/".join(parts) for parts in files if parts not in chosen):
        # Further down it is of a video.
        is_list = "/" not in name and os.path.splitext(name)[1].lower() in LISTS
        (listing.lists if is_list else listing.skipped).append(name)
    # The first level is splits only if nothing else stands beside them: "test" may be a class.
    first = {parts[0].lower() for parts in media if len(parts) > 1}
    splits = bool(first) and first <= set(SPLIT_OF)
    for parts in media:
        split = split_of(parts[0]) if splits and len(parts) > 1 else None
        classes = parts[1 if split else 0 : -1]
        name, path = "/".join(parts), folder.joinpath(*parts)
        if why := irregular(path):
            listing.refused.append((name, why))
        elif path.suffix.lower() == ".tar":
            try:
                _add_tar(listing, path, name, split)
            except OSError as error:
                listing.refused.append((name, f"cannot be read: {error.strerror or error}"))
        else:
            label = classes[0] if classes else None
            listing.sources.append(Source(name, path, kind=_kind(name), label=label, split=split))
    return listing


def _from_metadata(folder: Path) -> Listing | None:
    """A folder with metadata of Hugging Face's VideoFolder, in it or in its folders of splits."""
    try:
        files = metadata_files(folder)
    except OSError:
        return None  # it cannot be listed, which is told later
    if not files:
        return None
    listing = Listing()
    for file in files:
        with reading(file):
            part = _from_list(file)
        inside = "" if file.parent == folder else file.parent.name
        split = split_of(inside) if inside.lower() in SPLIT_OF else None
        for source in part.sources:
            name = os.path.normpath(os.path.join(inside, source.name)).replace(os.sep, "/")
            listing.sources.append(replace(source, name=name, split=source.split or split))
        listing.notes += part.notes
    named = {os.path.abspath(source.path) for source in listing.sources}
    found = _walk(folder, listing.refused)
    listing.skipped = [
        "/".join(parts)
        for parts in sorted(found)
        if Path(parts[-1]).suffix.lower() in VIDEOS | IMAGES | {".tar"}
        and os.path.abspath(folder.joinpath(*parts)) not in named
    ]
    return listing


def _walk(folder: Path, refused: list[tuple[str, str]]) -> list[tuple[str, ...]]:
    """The parts of the names of all files below a folder; what cannot be entered is refused.

    Links are followed, after all real folders, so that files have the class of the folder they lie
    in. Folders that are reached once more are entered only the first time: the same clips in two
    classes would be a mistake. Folders of results, with pictures of ours, are not entered.
    """
    files: list[tuple[str, ...]] = []
    seen: dict[tuple[int, int], str] = {}
    real: list[tuple[str, ...]] = [()]
    links: list[tuple[str, ...]] = []
    while real or links:
        parts = real.pop() if real else links.pop(0)
        name, path = "/".join(parts), folder.joinpath(*parts)
        try:
            status = os.stat(path)
            identity = status.st_dev, status.st_ino
            if identity in seen:
                again = seen[identity] or "the whole folder"
                refused.append((name, f"is a link to {again}, of which each file is taken once"))
                continue
            seen[identity] = name
            with os.scandir(path) as entries:
                inside = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            if not parts:
                raise ValueError(f"{folder} cannot be listed: {error.strerror}") from error
            refused.append((name, f"cannot be listed: {error.strerror}"))
            continue
        names = {entry.name for entry in inside}
        if parts and (LOCK in names or {"index.json", "clips.jsonl"} <= names):
            what = f"of results (it has {LOCK})" if LOCK in names else "that was packed"
            refused.append((name, f"is a folder {what}, which is no data beside these"))
            continue
        for entry in inside:
            if entry.name.startswith("."):
                continue
            here = (*parts, entry.name)
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else real).append(here)
                    continue
                entry.stat()
            except OSError as error:
                what = "a link that leads nowhere" if entry.is_symlink() else "cannot be read"
                refused.append(("/".join(here), f"{what}: {error.strerror}"))
                continue
            files.append(here)
        links.sort()
    return files


def _add_tar(listing: Listing, path: Path, name: str, split: str | None) -> None:
    """Group the members of a WebDataset tar by key: a payload, and .json, .txt, .cls beside it.

    Beside it may be its flow and its poses, too: `7.flow.npz` and `7.pose.json` beside `7.mp4`,
    `7.left.flow.npz` beside `7.left.mp4`.

    A key ends at the first dot of a name, as webdataset has it: `7.left.mp4`, `7.right.mp4` and
    `7.cls` are one sample, and `7.left.txt` is about one of the two. Where a tar shows that its
    names are cut at the last dot (there is `clip.001.txt` beside `clip.001.mp4`), `clip.txt` is
    about `clip.mp4` alone if there is one.
    """
    members, problems = list_members(path)
    listing.refused += [(f"{name}/{member}" if member else name, why) for member, why in problems]
    groups: dict[str, list[tuple[str, str, Member]]] = {}
    for member in members:
        folder, _, base = member.name.rpartition("/")
        key, _, rest = base.partition(".")
        stem, _, suffix = rest.rpartition(".")  # "left" and "mp4" of "7.left.mp4"
        if not base.startswith("."):
            parts = groups.setdefault(f"{folder}/{key}", [])
            parts.append((stem, suffix.lower(), member))
    texts_of = {
        key: {(stem, suffix): m for stem, suffix, m in reversed(parts) if suffix in _TEXTS}
        for key, parts in groups.items()
    }
    media_of = {key: _media(parts) for key, parts in groups.items()}
    beside_of = {
        key: {
            whose: m
            for stem, suffix, m in reversed(parts)
            if (whose := _beside(stem, suffix)) is not None
        }
        for key, parts in groups.items()
    }
    last_dot = any(
        stem and (stem, suffix) in texts_of[key]
        for key, media in media_of.items()
        for stem, _ in media
        for suffix in _TEXTS
    )
    with open_regular(path) as file:
        for key, parts in groups.items():
            media, texts, used = media_of[key], texts_of[key], set()
            stems = {stem for stem, _ in media}
            for stem, payload in media:
                mine: dict[str, Member] = {}
                level = stem
                while True:
                    if level == stem or not (last_dot and level in stems):
                        for suffix in _TEXTS:
                            if (level, suffix) in texts:
                                mine.setdefault(suffix, texts[level, suffix])
                    if not level:
                        break
                    level = level.rpartition(".")[0]
                prefix = f"{stem}." if stem else ""
                beside = {
                    stream: beside_of[key][prefix + stream]
                    for stream in BESIDE
                    if prefix + stream in beside_of[key]
                }
                used |= {payload, *mine.values(), *beside.values()}
                full = f"{name}/{payload.name}"
                source = Source(
                    full,
                    path,
                    payload[1:],
                    _kind(payload.name),
                    split=split,
                    beside={s: Beside(path, m[1:], m.name) for s, m in beside.items()},
                )
                try:
                    source, without_use = _with_texts(source, file, mine)
                    listing.sources.append(source)
                    used -= without_use
                except ValueError as error:
                    listing.refused.append((full, str(error)))
            listing.skipped += [f"{name}/{m.name}" for _, _, m in parts if m not in used]


# What is beside a payload by its ending: a caption, named values, or the name or number of the
# class.
_TEXTS = {
    **dict.fromkeys(("txt", "text", "caption"), "txt"),
    **dict.fromkeys(("json", "jsn"), "json"),
    **dict.fromkeys(("cls", "class", "label"), "cls"),
}


def _beside(stem: str, suffix: str) -> str | None:
    """Which stream of a video a member is, "left.pose" of `left.pose.json`; None: of none.

    The `.flow` of a pack's own shard is one, too, which is read nowhere: it is refused by name.
    """
    if suffix == "flow":
        return f"{stem}.flow" if stem else "flow"
    return stem if "." + suffix in BESIDE.get(stem.rpartition(".")[2], ()) else None


def _media(parts: list[tuple[str, str, Member]]) -> list[tuple[str, Member]]:
    """The payloads of a sample by stem: its videos, or its images if there are none."""
    for kinds in (VIDEOS, IMAGES):
        media = [(stem, member) for stem, suffix, member in parts if "." + suffix in kinds]
        if media:
            return media
    return []


def _with_texts(source: Source, file, texts: dict[str, Member]) -> tuple[Source, set[Member]]:
    """A source with what its texts say of it, and those of them that say nothing we can use."""
    captions: list[str] = []
    label, roles, without_use = None, {}, set()
    for suffix, member in texts.items():
        if member.size > 2**20:
            raise ValueError(f"its .{suffix} is longer than 1 MiB")
        file.seek(member.offset)
        try:
            text = file.read(member.size).decode("utf-8-sig")
            kind = _TEXTS[suffix]
            if kind == "txt" and text.strip():
                captions.append(text.strip())
            elif kind == "cls":
                label = label or text_of("label", text)
            elif kind == "json":
                fields = parse_json(text, lax=True)
                if not isinstance(fields, dict):
                    without_use.add(member)
                    continue
                names = roles_of(tuple(fields))[0]
                # The payload is the file, whatever is said; a title is a caption where there is no
                # other.
                others = {
                    n for n in names if names[n] == "path" or (captions and n.lower() == "title")
                }
                names = {n: names[n] for n in names if n not in others}
                roles = fields_of(fields, names, source.beside)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its .{suffix} cannot be read: {error}") from error
    captions += roles.pop("captions", ())
    # A .cls beside a .json holds the number of the class that the .json names.
    roles["label"] = roles.get("label") or label
    roles["split"] = roles.get("split") or source.split
    roles.pop("beside", None)  # members are, not files that a member names
    about = roles.pop("about", {})
    roles.pop("bounds", None)
    roles["beside"] = {n: replace(b, about=about.get(n, "")) for n, b in source.beside.items()}
    return replace(source, captions=tuple(dict.fromkeys(captions)), **roles), without_use


# ---- lists -------------------------------------------------------------------------------------


def _has_pictures(folder: str) -> bool:
    """Whether this is a folder with pictures in it; one that cannot be read is refused later."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return any(os.path.splitext(entry.name)[1].lower() in IMAGES for entry in entries)
    return False


def _from_list(path: Path) -> Listing:
    """The sources of a list, in the order of their first lines; rows of one file are merged."""
    problems, folder = Problems(path), os.fspath(path.parent)
    found: dict[str, list[tuple[int, str, dict]]] = {}  # path -> line, name and fields of its rows
    rows = 0
    for line, row in read_rows(path, problems):
        rows += 1
        try:
            roles, twice = roles_of(tuple(row))
            if twice:
                raise ValueError(f"two values for {', '.join(twice)}")
            key = next((key for key, role in roles.items() if role == "path"), None)
            name = text_of(key, row[key]) if key is not None else None
            fields = fields_of(row, roles, folder=folder)
            times = take_times(row, fields, key or "")
            fields["timed"], part = times is not None, fields["extra"].get(SEGMENTS, "")
            if times is not None:
                timed = f"{_time(times[0])}-{_time(times[1])} {fields['label']}"
                part = fields["extra"][SEGMENTS] = f"{part}; {timed}" if part else timed
            person = _person(fields["extra"])
            fields["timed"] |= bool(person)
            fields["whose"] = person, (part, fields["label"])
            alone = name is None and "pose" in fields["beside"]
            if alone:
                name = fields["beside"]["pose"]
            if name is None:
                among = f", only {', '.join(row)}"[:200] if key is None and row else ""
                problems.add(line, f"no path in this line{among}", "pathless")
                continue
            file = os.path.normpath(os.path.join(folder, name))
            if file not in found and irregular(file) and "\\" in name:  # as Windows writes it
                file = os.path.normpath(os.path.join(folder, name.replace("\\", "/")))
            if file not in found and irregular(file) and not (alone and os.path.isdir(file)):
                what = _missing(name, Path(file), rows == 1, len(problems.found) < 50)
                problems.add(line, what, "missing")
                continue
            for stream, other in fields["beside"].items():
                where = os.path.normpath(os.path.join(folder, other))
                if irregular(where) and not os.path.isdir(where):
                    what = f"no such file of {stream}: {other} (paths are relative to the list)"
                    problems.add(line, what, f"missing {stream}")
                elif stream == "flow" and not fields["bounds"] and _has_pictures(where):
                    what = f"{other} is flow in pictures, whose bound stands in no file: add a "
                    what += "column flow_bound, of TSN's and denseflow's tools 20"
                    problems.add(line, what, "bound of flow")
            found.setdefault(file, []).append((line, name, fields))
        except (ValueError, RecursionError) as error:
            what = "too deeply nested" if isinstance(error, RecursionError) else str(error)
            problems.add(line, what)
    sources = [_merged(Path(file), about, problems) for file, about in found.items()]
    problems.stop(rows)
    return Listing(sources, notes=problems.notes)


def _person(extra: dict[str, str]) -> str:
    """Whose the label of a row is, as `boxes` calls people; "": nobody's in particular."""
    track = track_column(extra)
    if track is None or boxes_column(extra) is None:
        return ""
    return re.sub(r"^([0-9]+)\.0+$", r"\1", extra[track].strip())[:MAX_ID]  # as pandas has it


def _time(seconds: float) -> str:
    """Seconds with three decimals, or six where they need them."""
    return f"{seconds:.6f}".removesuffix("000")


def _missing(name: str, file: Path, first: bool, look: bool) -> str:
    if _ADDRESS.match(name) and name.index(":") > 1:
        return f"{name} is an address: only local files are read, download it first"
    if os.path.isdir(file):
        return f"{name} is a folder; a list names video or image files"
    if os.path.exists(file):
        return f"{name} is {irregular(file)}"
    hint = "; if this line is a header, one column has to be called path" if first else ""
    ends = sorted(VIDEOS | IMAGES) if look else ()
    if whole := next((end for end in ends if not irregular(f"{file}{end}")), None):
        hint = f"; there is {name}{whole}: write names with their ending"
    return f"no such file: {name} (paths are relative to the list){hint}"


def _merged(file: Path, rows: list[tuple[int, str, dict]], problems: Problems) -> Source:
    """One source of all rows of its file: captions and segments are collected, the rest agrees.

    Where rows with a start and an end say different things, the video has no label but segments.
    """
    line, name, fields = rows[0]
    folder = problems.path.parent
    whose: dict[str, list[tuple[str, str | None]]] = {}
    for _, _, row in rows:
        person, part = row.pop("whose")
        if any(part):
            whose.setdefault(person, []).append(part)
    whose = {} if whose.keys() <= {""} else whose
    timed = [row for _, _, row in rows if row.pop("timed")]
    if len({row["label"] for _, _, row in rows} - {None}) > 1:
        for row in timed:
            row["label"] = None
    if len(rows) > 1:
        given: dict[str, tuple[str, int]] = {}
        extra: dict[str, dict[str, None]] = {}
        for line, _, row in rows:
            for role in ("label", "split", "subject"):
                if row[role] is None:
                    continue
                value, where = given.setdefault(role, (row[role], line))
                if value != row[role]:
                    what = f"another {role} ({row[role]!r}, not {value!r})"
                    problems.add(line, f"{what} than line {where} gives for {name}")
            for column, value in row["extra"].items():
                extra.setdefault(column, {})[value] = None
        beside: dict[str, dict[str, tuple[Any, int]]] = {"beside": {}, "about": {}, "bounds": {}}
        for line, _, row in rows:
            for kind, known in beside.items():
                for stream, value in row[kind].items():
                    first, where = known.setdefault(stream, (value, line))
                    if first != value:
                        what = f"another {stream} ({value!r}, not {first!r})"
                        problems.add(line, f"{what} than line {where} gives for {name}")
        fields = {role: given.get(role, (None, 0))[0] for role in ("label", "split", "subject")}
        fields |= {kind: {s: v for s, (v, _) in known.items()} for kind, known in beside.items()}
        fields["captions"] = [caption for _, _, row in rows for caption in row["captions"]]
        fields["extra"] = {column: "; ".join(values) for column, values in extra.items()}
    captions = tuple(dict.fromkeys(fields.pop("captions")))
    about, bounds = fields.pop("about"), fields.pop("bounds")
    paths = {s: Path(os.path.normpath(folder / other)) for s, other in fields["beside"].items()}
    fields["beside"] = {
        stream: Beside(paths[stream], None, other, about.get(stream, ""), bounds.get(stream, 0.0))
        for stream, other in fields["beside"].items()
    }
    pose = fields["beside"].get("pose")
    kind = "pose" if pose and pose.path == file else _kind(name)
    return Source(name, file, kind=kind, captions=captions, whose=whose, **fields)
