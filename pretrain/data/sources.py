"""Lists what a user calls a data set: a folder, a list file, images, or tars of videos.

Nothing is decoded here. A list with mistakes is reported whole, with line numbers.
"""

import contextlib
import csv
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from pretrain.data.guard import open_regular
from pretrain.data.tar import list_members

# fmt: off
VIDEOS = frozenset((".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob", ".ts",
                    ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".ogv", ".gif"))
IMAGES = frozenset((".jpg", ".jpeg", ".png", ".webp"))
# fmt: on
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
# Column names (and keys of a tar's .json) for each role; any other is kept in `extra`.
ROLES = {
    "path": ("path", "video", "video_path", "image", "image_path", "file", "filename", "filepath"),
    "label": ("label", "class", "class_name", "category", "action"),
    "caption": ("caption", "captions", "text", "sentence"),
    "split": ("split", "set", "subset"),
    "subject": ("subject", "subject_id", "person", "actor"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_LINE_END = re.compile(r"\r\n|\n|\r")
MAX_LIST = 2**30  # bytes; at 100 bytes a line that is ten million
_HEADER_HELP = "write a first line that names the columns, e.g. path,label,caption,split,subject"


@dataclass(frozen=True)
class Source:
    """One video or image, as yet unchecked.

    Attributes:
        name: As the user wrote it, relative to the folder or list; unique.
        path: The file that holds it.
        member: Offset and size in bytes inside `path`, if that is a tar.
        kind: "video" or "image", by the file's name.
        label: Class name.
        captions: Sentences about it.
        split: "train", "val", "test" or whatever the list says.
        subject: Who is seen.
        extra: Further columns.
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


@dataclass
class Listing:
    """The sources, those refused already as (name, reason), and files of no kind we know."""

    sources: list[Source] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def list_sources(source: str | Path) -> Listing:
    """Finds the videos and images of a folder, a list file, a tar, or a single file.

    Args:
        source: What the user gave.

    Returns:
        The sources in order of their names (folder, tar) or of the list.

    Raises:
        ValueError: There is nothing usable, or a list has mistakes (all are named).
    """
    path = Path(source)
    why = _irregular(path)
    if why and not os.path.exists(path):
        if _ADDRESS.match(str(source)) and len(str(source).split(":", 1)[0]) > 1:
            raise ValueError(
                f"{source} is an address: only local files are read, download it first"
            )
        raise ValueError(f"{path} does not exist; give a folder, a list file, a tar or a video")
    if os.path.isdir(path):
        listing = _from_folder(path)
    elif why:
        raise ValueError(f"{path}: {why}; give a folder, a list file, a tar or a video")
    elif path.suffix.lower() in VIDEOS | IMAGES:
        listing = Listing([Source(path.name, path, kind=_kind(path.name))])
    elif path.suffix.lower() == ".tar":
        listing = Listing()
        with _readable(path):
            _add_tar(listing, path, path.name, None)
    elif path.name.lower().endswith((".tar.gz", ".tgz", ".zip", ".tar.xz", ".tar.bz2", ".gz")):
        raise ValueError(
            f"{path} is compressed: unpack it first, a plain .tar can be read as it is"
        )
    else:
        with _readable(path):
            listing = Listing(_from_list(path))
    if not listing.sources and not listing.refused:
        kinds = " ".join(sorted(VIDEOS | IMAGES | {".tar"}))
        raise ValueError(f"{path} holds no video or image (looked for {kinds})")
    return listing


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says in words that the file a user named cannot be read."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _kind(name: str) -> str:
    return "image" if PurePosixPath(name).suffix.lower() in IMAGES else "video"


# ---- folders and tars --------------------------------------------------------------------------


def _from_folder(folder: Path) -> Listing:
    listing = Listing()
    files = _walk(folder, listing.refused)
    files.sort()
    media = [
        parts for parts in files if Path(parts[-1]).suffix.lower() in VIDEOS | IMAGES | {".tar"}
    ]
    chosen = set(media)
    listing.skipped = ["/".join(parts) for parts in files if parts not in chosen]
    # The first level is splits only if nothing else stands beside them: "test" may be a class.
    first = {parts[0].lower() for parts in media if len(parts) > 1}
    splits = bool(first) and first <= set(SPLITS)
    for parts in media:
        split = SPLITS[parts[0].lower()] if splits and len(parts) > 1 else None
        classes = parts[1 if split else 0 : -1]
        name, path = "/".join(parts), folder.joinpath(*parts)
        if why := _irregular(path):
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


def _walk(folder: Path, refused: list[tuple[str, str]]) -> list[tuple[str, ...]]:
    """The parts of the names of all files below a folder; what cannot be entered is refused.

    Links are followed, after all real folders, so that files have the class of the folder they lie
    in. Folders that are reached once more are entered only the first time: the same clips in two
    classes would be a mistake.
    """
    files: list[tuple[str, ...]] = []
    seen: dict[tuple[int, int], str] = {}
    real, links = [()], []
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


def _irregular(path: Path) -> str | None:
    """Why a path cannot be opened as a file; None if it is a regular one."""
    try:
        return None if stat.S_ISREG(os.stat(path).st_mode) else "not a regular file"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _add_tar(listing: Listing, path: Path, name: str, split: str | None) -> None:
    """Groups the members of a WebDataset tar by key: a payload, and .json, .txt, .cls beside it."""
    members, problems = list_members(path)
    listing.refused += [(f"{name}/{member}" if member else name, why) for member, why in problems]
    samples: dict[str, dict] = {}
    for member in members:
        folder, _, base = member.name.rpartition("/")
        key, _, suffix = base.partition(".")
        if base.startswith("."):
            continue
        samples.setdefault(f"{folder}/{key}", {})[suffix.lower()] = member
    with open_regular(path) as file:
        for parts in samples.values():
            payloads = [m for s, m in parts.items() if "." + s.rpartition(".")[2] in VIDEOS]
            payloads = payloads or [
                m for s, m in parts.items() if "." + s.rpartition(".")[2] in IMAGES
            ]
            texts = {s: m for s, m in parts.items() if s in ("json", "txt", "cls")}
            unknown = [m for s, m in parts.items() if m not in payloads and s not in texts]
            if not payloads:
                unknown += texts.values()
            listing.skipped += [f"{name}/{member.name}" for member in unknown]
            for payload in payloads:
                full = f"{name}/{payload.name}"
                source = Source(full, path, payload[1:], _kind(payload.name), split=split)
                try:
                    listing.sources.append(_with_texts(source, file, texts))
                except ValueError as error:
                    listing.refused.append((full, str(error)))


def _with_texts(source: Source, file, texts: dict) -> Source:
    for suffix, member in texts.items():
        if member.size > 2**20:
            raise ValueError(f"its .{suffix} is longer than 1 MiB")
        file.seek(member.offset)
        try:
            text = file.read(member.size).decode("utf-8-sig")
            fields = json.loads(text) if suffix == "json" else None
            roles = _roles(fields) if isinstance(fields, dict) else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its .{suffix} cannot be read: {error}") from error
        if suffix == "txt" and text.strip():
            source = replace(source, captions=(*source.captions, text.strip()))
        elif suffix == "cls" and text.strip():
            source = replace(source, label=text.strip())
        elif roles:
            captions = tuple(dict.fromkeys((*source.captions, *roles.pop("captions"))))
            roles["label"] = source.label if roles["label"] is None else roles["label"]
            roles["split"] = source.split if roles["split"] is None else roles["split"]
            source = replace(source, captions=captions, **roles)
    return source


# ---- lists -------------------------------------------------------------------------------------


def _roles(row: dict) -> dict:
    """Sorts the named values of one row into the fields of a source; everything becomes text."""
    found = {"label": None, "captions": (), "split": None, "subject": None, "extra": {}}
    for name, value in row.items():
        role = ROLE_OF.get(name.lower())
        if value is None or value == "":
            continue
        if role == "caption":
            values = value if isinstance(value, list) else [value]
            found["captions"] += tuple(str(v).strip() for v in values if str(v).strip())
        elif role in ("label", "split", "subject"):
            found[role] = str(value)
        elif role != "path":
            found["extra"][name] = value if isinstance(value, str) else json.dumps(value)
    return found


class _Problems:
    """Collects everything wrong with a list, to tell it at once."""

    def __init__(self, path: Path):
        self.path, self.lines = path, []

    def add(self, line: int, what: str) -> None:
        self.lines.append(f"{self.path}:{line}: {what}")

    def stop(self) -> None:
        """Raises ValueError if there were any."""
        if self.lines:
            more = f"\n... and {len(self.lines) - 50} more" if len(self.lines) > 50 else ""
            count = f"{len(self.lines)} problem{'s' * (len(self.lines) > 1)}"
            raise ValueError(
                f"{count} in {self.path}, nothing was done:\n" + "\n".join(self.lines[:50]) + more
            )


def _from_list(path: Path) -> list[Source]:
    with open_regular(path) as file:
        data = file.read(4096)
        if b"\0" not in data:
            data += file.read(MAX_LIST)
    if len(data) > MAX_LIST:
        raise ValueError(f"{path} is a list of over {MAX_LIST >> 20} MiB; split it")
    if b"\0" in data or data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is not a list in UTF-8 text (nor a video by its name)")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text; save the list as UTF-8") from error
    if not text.strip():
        raise ValueError(f"{path} is empty: write a path a line, or {_HEADER_HELP}")
    problems = _Problems(path)
    jsonl = path.suffix.lower() == ".jsonl" or text.lstrip().startswith("{")
    rows = list(_json_rows(text, problems) if jsonl else _table_rows(path, text, problems))
    sources: dict[str, Source] = {}
    lines: dict[str, int] = {}
    for line, row in rows:
        name = next((v for k, v in row.items() if ROLE_OF.get(k.lower()) == "path"), None)
        if not isinstance(name, str) or not name.strip():
            problems.add(line, "no path in this line")
            continue
        file = Path(os.path.normpath(path.parent / name))
        if _irregular(file):
            problems.add(line, _missing(name, file, first=line == rows[0][0]))
            continue
        try:
            new = Source(name, file, kind=_kind(name), **_roles(row))
        except RecursionError:
            problems.add(line, "too deeply nested")
            continue
        key = str(file)
        if key not in sources:
            sources[key], lines[key] = new, line
            continue
        try:
            sources[key] = _merged(sources[key], new)
        except ValueError as error:
            problems.add(line, f"{error} than line {lines[key]} gives for {name}")
    problems.stop()
    return list(sources.values())


def _missing(name: str, file: Path, first: bool) -> str:
    if _ADDRESS.match(name) and name.index(":") > 1:
        return f"{name} is an address: only local files are read, download it first"
    if os.path.isdir(file):
        return f"{name} is a folder; a list names video or image files"
    if os.path.exists(file):
        return f"{name} is not a regular file"
    hint = f"; if this line is a header, {_HEADER_HELP}" if first else ""
    return f"no such file: {name} (paths are relative to the list){hint}"


def _merged(old: Source, new: Source) -> Source:
    """Two rows of one file: their captions are collected, the rest has to agree."""
    for role in ("label", "split", "subject"):
        a, b = getattr(old, role), getattr(new, role)
        if a is not None and b is not None and a != b:
            raise ValueError(f"another {role} ({b!r}, not {a!r})")
    extra = dict(old.extra)
    for name, value in new.extra.items():
        if value not in extra.get(name, "").split("; "):
            extra[name] = f"{extra[name]}; {value}" if name in extra else value
    return replace(
        old,
        captions=tuple(dict.fromkeys(old.captions + new.captions)),
        extra=extra,
        **{
            role: getattr(old, role) or getattr(new, role) for role in ("label", "split", "subject")
        },
    )


def _json_rows(text: str, problems: _Problems) -> Iterator[tuple[int, dict]]:
    for line, content in enumerate(_LINE_END.split(text), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            problems.add(line, f"not JSON: {error}")
            continue
        if isinstance(row, dict) and ("document" in row or {"images", "texts"} <= row.keys()):
            try:
                yield from ((line, visual) for visual in _document_rows(row, line))
            except ValueError as error:
                problems.add(line, str(error))
        elif isinstance(row, dict):
            yield line, row
        else:
            problems.add(line, 'not a JSON object like {"path": "a.mp4", "label": "walk"}')


def _document_rows(row: dict, line: int) -> list[dict]:
    """The rows of the images and videos of an interleaved document, each captioned by its neighbours.

    A document is {"document": [{"text": "..."}, {"image": "a.jpg"}, {"video": "b.mp4"}, ...]}, or two lists
    `images` and `texts` of one length with nulls, as OBELICS has them (Laurencon et al. 2023,
    https://arxiv.org/abs/2306.16527). A visual is paired with the nearest paragraph before it and the nearest
    after it; training draws one of the two, each as often as the other (Flamingo, Alayrac et al. 2022,
    https://arxiv.org/abs/2204.14198). Further keys of the document go to each of its visuals.

    Raises:
        ValueError: the parts are not such, or there is no visual or no text among them.
    """
    if "document" in row:
        parts = row["document"]
    else:
        images, texts = row["images"], row["texts"]
        if not (isinstance(images, list) and isinstance(texts, list) and len(images) == len(texts)):
            raise ValueError("images and texts have to be two lists of one length")
        parts = []
        for image, text in zip(images, texts, strict=True):
            parts += [{"text": text}] * (text is not None) + [{"image": image}] * (
                image is not None
            )
    if not isinstance(parts, list) or not all(
        isinstance(p, dict) and len(p) == 1 and isinstance(next(iter(p.values())), str)
        for p in parts
    ):
        raise ValueError(
            'a document is a list of {"text": "..."}, {"image": "..."} and {"video": "..."}'
        )
    pairs = [next(iter(part.items())) for part in parts]
    unknown = sorted({k for k, _ in pairs if k != "text" and ROLE_OF.get(k.lower()) != "path"})
    if unknown:
        raise ValueError(
            f"a document has no part of the kind {unknown[0]!r}, only text, image and video"
        )
    texts_at = [i for i, (kind, value) in enumerate(pairs) if kind == "text" and value.strip()]
    visuals_at = [i for i, (kind, _) in enumerate(pairs) if kind != "text"]
    if not texts_at or not visuals_at:
        raise ValueError(f"a document without {'text' if visuals_at else 'an image or a video'}")
    shared = {k: v for k, v in row.items() if k not in ("document", "images", "texts")}
    rows = []
    for place, i in enumerate(visuals_at):
        before = [pairs[t][1].strip() for t in texts_at if t < i][-1:]
        after = [pairs[t][1].strip() for t in texts_at if t > i][:1]
        captions = list(dict.fromkeys(before + after))
        about = {"document": str(row.get("id", line)), "place": str(place)}
        rows.append({**shared, "path": pairs[i][1], "captions": captions, **about})
    return rows


def _table_rows(path: Path, text: str, problems: _Problems) -> Iterator[tuple[int, dict]]:
    """Rows of a csv, tsv or space-separated list as (line, {column: value})."""
    first = next(line for line in _LINE_END.split(text) if line.strip())
    columns, delimiter = None, None
    for candidate in ("\t", ",", " "):
        names = [
            name.strip().strip('"')
            for name in re.split(candidate + "+" * (candidate == " "), first.strip())
        ]
        is_header = "path" in {ROLE_OF.get(name.lower()) for name in names}
        if is_header and _irregular(path.parent / first.strip()):
            columns, delimiter = names, candidate
            break
    if columns:
        lowered = [name.lower() for name in columns]
        roles = [ROLE_OF.get(name, name) for name in lowered]
        twice = {role for role in roles if roles.count(role) > 1}
        if twice or "" in lowered:
            what = (
                f"two columns for {', '.join(sorted(twice))}" if twice else "a column without name"
            )
            problems.add(1, f"{what}; {_HEADER_HELP}")
            problems.stop()
        rows = list(_split(text, delimiter, path.parent, lowered, problems))[1:]
    else:
        rows, columns = _sniff(path, text, problems)
    for line, values in rows:
        if len(values) != len(columns):
            problems.add(
                line,
                f"{len(values)} columns, not the {len(columns)} of {', '.join(columns)}"
                " (a value that holds the separator has to be in double quotes)",
            )
        else:
            yield line, dict(zip(columns, values, strict=True))


def _split(
    text: str, delimiter: str | None, folder: Path, columns: list[str] | None, problems: _Problems
) -> Iterator[tuple[int, list[str]]]:
    if delimiter == ",":
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
        line = 1
        try:
            for values in reader:
                if any(value.strip() for value in values):
                    yield line, [value.strip() for value in values]
                line = reader.line_num + 1
        except csv.Error as error:
            problems.add(line, f"broken quotes: {error}")
        return
    for line, content in enumerate(_LINE_END.split(text), 1):
        if not content.strip():
            continue
        if delimiter == "\t":
            yield line, [_unquoted(value) for value in content.split("\t")]
        elif delimiter == " ":
            yield line, _split_spaces(content.strip(), folder, columns)
        else:
            yield line, [_unquoted(content)]


def _unquoted(value: str) -> str:
    value = value.strip()
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value


def _split_spaces(content: str, folder: Path, columns: list[str] | None) -> list[str]:
    """Fields of a line between spaces; without quotes, the path is what names a file."""
    quoted = re.findall(r'"[^"]*"|\S+', content)
    if '"' in content:
        return [_unquoted(value) for value in quoted]
    if columns:
        path_first = ROLE_OF.get(columns[0]) == "path"
        return content.rsplit(None, len(columns) - 1) if path_first else quoted
    for fields in (0, 1, 2):
        values = content.rsplit(None, fields)
        if not _irregular(folder / values[0]):
            return values
    return quoted


def _sniff(path: Path, text: str, problems: _Problems) -> tuple[list, list[str]]:
    """The rows of a list without header, and what its columns must be.

    The separator is the one with which most of the first lines start with a file that exists.
    """
    sample = "\n".join(_LINE_END.split(text)[:50])
    usual = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower(), " ")
    best, found = usual, 0
    for candidate in (usual, "\t", ",", " ", None):
        rows = _split(sample, candidate, path.parent, None, _Problems(path))
        score = sum(bool(v and v[0]) and not _irregular(path.parent / v[0]) for _, v in rows)
        if score > found:
            best, found = candidate, score
    rows = list(_split(text, best, path.parent, None, _Problems(path)))
    counts = [len(values) for _, values in rows]
    width = max(set(counts), key=counts.count) if counts else 1
    second = [values[1] for _, values in rows if len(values) == width > 1]
    number = all(re.fullmatch(r"-?\d+", value) for value in second)
    sentences = sum(" " in value for value in second) > len(second) / 2
    splits = all(value.lower() in SPLITS for value in second)
    if width == 1:
        columns = ["path"]
    elif width == 2 and not sentences and not splits:
        columns = ["path", "label"]
    elif width == 3 and number:  # the "path start label" of older code bases
        columns = ["path", "start", "label"]
    else:
        raise ValueError(
            f"{path}: cannot tell what its {width} columns mean without a header; {_HEADER_HELP}"
        )
    # Now that their number is known, a line of spaces is cut right even if its file is missing.
    return list(_split(text, best, path.parent, columns, problems)), columns
