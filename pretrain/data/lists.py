"""List files: rows of named values, from a table or from JSON.

Nothing is looked up here but whether a first line names a file. What the values mean for a video is
for `sources.py`. A list with mistakes is reported whole, with line numbers.
"""

import csv
import functools
import io
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from pretrain.files import (
    LAX_JSON,
    RepeatedKeyError,
    decimal,
    not_regular,
    open_regular,
    parse_json,
)
from pretrain.names import unescaped, unmarked

# fmt: off
VIDEOS = frozenset((".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg",
                    ".vob", ".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".ogv", ".gif",
                    ".h264", ".264"))
IMAGES = frozenset((".jpg", ".jpeg", ".png", ".webp"))
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
# Column names (and keys of JSON) for each role; any other is kept in `extra`. Capitals, spaces, -
# and _ make no difference. The second table is for lists in which no name of the first has the
# role.
ROLES = {
    "path": ("path", "video", "video_path", "image", "image_path", "file", "filename", "filepath",
             "video_file", "image_file", "video_filename", "image_filename"),
    "label": ("label", "class", "class_name", "label_name", "category", "action"),
    "caption": ("caption", "captions", "text", "sentence", "sentences"),
    "split": ("split", "set", "subset"),
    "subject": ("subject", "subject_id", "person", "person_id", "actor", "actor_id"),
    "flow": ("flow", "flow_path", "optical_flow"),
    "pose": ("pose", "pose_path", "poses", "joints", "joints_path"),
    "flow_method": ("flow_method",),
    "flow_bound": ("flow_bound",),
    "skeleton": ("skeleton", "skeleton_name"),
}
# Endings of the files of further streams, which folders of such may be, too; a column of that name
# that holds other words is an ordinary one.
BESIDE = {
    "flow": (".npz", ".npy", ".flo"),
    "pose": (".npy", ".npz", ".json", ".jsonl", ".skeleton", ".txt"),
}
# Endings of files that may say what videos show; a .txt is as often a note.
LISTS = {".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xml", ".eaf", ".parquet"}
# Columns with boxes around people, which `--follow boxes` reads; of several the first as here.
BOXES = ("boxes", "boxes_path", "box", "bbox", "bboxes", "tracks", "tracks_path")
# Whose a label is, by the identity in the boxes, of which so many characters count.
TRACK, MAX_ID = ("track_id",), 80
# A part of the column `segments`: start, end and label. \d would take the digits of other scripts.
_TIME = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
SEGMENT = re.compile(rf"\s*{_TIME}\s*-\s*{_TIME}\s+(\S.*)")
# Columns that say which recording a file was cut out of, and from when to when, in seconds.
RECORDING = ("recording", "recording_id", "source_file", "source_video", "original", "youtube_id",
             "video_id")
START = ("start", "start_time", "time_start", "start_seconds")
TIMES, OF_FILE = "times", "file"  # a column, and its word for start and end in the file itself
ELSE = {
    "path": ("name", "video_name", "image_name", "clip", "clip_name", "clip_path", "video_id",
             "image_id", "clip_id", "youtube_id", "id"),
    "caption": ("title",),
}
# fmt: on
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
_TEXTS = ("label", "caption", "split", "subject")
MAX_TIME = 2.0**40  # seconds of a recording; a clock of the day, or since 1970, is one, too
MAX_LIST = 2**30  # bytes; at 100 bytes a line that is ten million
SAMPLE = 1000  # lines by which the columns of a list without header are inferred
SEPARATORS = ("\t", ";", ",", "|", " ")
_HEADER_HELP = "write a first line that names the columns, e.g. path,label,caption,split,subject"


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower())


def _names(table: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {_plain(name): role for role, names in table.items() for name in names}


_ROLE_OF, _ELSE_OF = _names(ROLES), _names(ELSE)


@functools.lru_cache(64)  # lines of one list have the same columns
def _column(names: tuple[str, ...], known: tuple[str, ...]) -> str | None:
    plain = {_plain(name): name for name in names}
    return next((plain[_plain(name)] for name in known if _plain(name) in plain), None)


def boxes_column(names: Iterable[str]) -> str | None:
    """The column, of those of a list, that holds boxes; None: none does."""
    return _column(tuple(names), BOXES)


def track_column(names: Iterable[str]) -> str | None:
    """The column that says whose a label is, of the people in the boxes; None: none does."""
    return _column(tuple(names), TRACK)


def recording_of(extra: Mapping[str, str]) -> tuple[str, float]:
    """Which recording a file was cut out of, by further columns of its list, and at which second.

    "" where they do not say it; 0 where they say no time, or something that is none.
    """
    if not extra:
        return "", 0.0
    named, start = (_column(tuple(extra), known) for known in (RECORDING, START))
    try:
        when = decimal(extra[start]) if start else 0.0
    except ValueError:
        when = 0.0
    return extra[named] if named else "", when if 0 <= when < MAX_TIME else 0.0


def times_of_recording(extra: Mapping[str, str]) -> bool:
    """Whether start and end in a row of a list are times in the recording its file was cut out of.

    So they are beside a column that names the recording, unless the column times says "file".
    """
    said = _column(tuple(extra), (TIMES,))
    return bool(recording_of(extra)[0]) and not (said and extra[said].strip() == OF_FILE)


def split_of(word: str) -> str:
    """train, val or test for the words that mean these; any other word as it is."""
    return SPLIT_OF.get(word.lower(), word)


@functools.lru_cache(maxsize=10_000)
def roles_of(names: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Which of these columns or keys plays which role, and the roles that more than one claims.

    Of several the first as `ROLES` and `ELSE` have them is taken; all columns of captions are.
    """
    roles: dict[str, str] = {}
    twice: list[str] = []
    plain = {name: _plain(name) for name in names}
    for table, role_of in ((ROLES, _ROLE_OF), (ELSE, _ELSE_OF)):
        taken = set(roles.values())
        claims: dict[str, list[str]] = {}
        for name in names:
            role = role_of.get(plain[name])
            if role and role not in taken:
                claims.setdefault(role, []).append(name)
        for role, claimants in claims.items():
            if role == "caption":
                roles |= dict.fromkeys(claimants, role)
                continue
            order = [_plain(name) for name in table[role]]
            first = min(claimants, key=lambda name: order.index(plain[name]))
            roles[first] = role
            if len(claimants) > 1 and table is ROLES:
                twice.append(role)
    return roles, tuple(twice)


def irregular(path: str | Path) -> str | None:
    """Why a path cannot be opened as a file; None if it is a regular one."""
    try:
        mode = os.stat(path).st_mode
        return None if stat.S_ISREG(mode) else not_regular(mode)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"


class Problems:
    """Collects everything wrong with a list, to tell it at once."""

    def __init__(self, path: Path):
        self.path = path
        self.found: list[tuple[int, str, str]] = []
        self.notes: list[str] = []  # what a reader says of the file: its format, what has no effect

    def add(self, line: int, what: str, kind: str = "") -> None:
        """Note what is wrong with a line; a kind that all lines have is told once."""
        self.found.append((line, what, kind))

    def stop(self, rows: int) -> None:
        """Raise ValueError if there were any, in so many rows that could be read."""
        if not self.found:
            return
        kinds = Counter(kind for _, _, kind in self.found)
        rows += kinds["unread"]
        lines, told = [], set()
        for line, what, kind in sorted(self.found, key=lambda problem: problem[0]):
            if kind and kinds[kind] == rows > 3:
                if kind in told:
                    continue
                told.add(kind)
                what += f"; and so in all {rows} lines"
            lines.append(f"{self.path}:{line}: {what}")
        error = ValueError(
            f"{len(lines)} problem{'s' * (len(lines) > 1)} in {self.path}, nothing was done:"
        )
        for note in lines[:50]:
            error.add_note(note)
        if len(lines) > 50:
            error.add_note(f"... and {len(lines) - 50} more")
        raise error


def list_rows(path: Path, text: str, problems: Problems) -> Iterator[tuple[int, dict]]:
    """The rows of a list as (line, {column: value}); empty lines are none.

    Args:
        path: the list.
        text: what is in it, see `read_text`.
        problems: collects its mistakes.

    Raises:
        ValueError: it is no list, or the meaning of its columns cannot be inferred.
    """
    start = text.lstrip()
    if not start:
        raise ValueError(f"{path} is empty: write a path a line, or {_HEADER_HELP}")
    if re.match(r'\[\s*(["{]|\]\s*$)', start) or (start[0] == "[" and path.suffix == ".json"):
        return _array_rows(text, problems)
    if start[0] == "{" or path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        return _json_rows(text, problems)
    return _table_rows(path, text, problems)


def read_text(path: Path) -> str:
    """A list's text, its lines ended by newlines."""
    with open_regular(path) as file:
        data = file.read(4096)
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        if wide or b"\0" not in data:
            data += file.read(MAX_LIST)
    if len(data) > MAX_LIST:
        raise ValueError(f"{path} is a list of over {MAX_LIST >> 20} MiB; split it")
    if b"\0" in data and not wide:
        raise ValueError(f"{path} is not a list in UTF-8 text (nor a video by its name)")
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}:{line}: not {'UTF-16' if wide else 'UTF-8'} text; save the list as UTF-8 (in "
            "a spreadsheet: CSV UTF-8)"
        ) from error
    if "\0" in text:
        raise ValueError(f"{path} is not a list: there are NUL characters in its text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


# ---- JSON --------------------------------------------------------------------------------------


def _json_rows(text: str, problems: Problems) -> Iterator[tuple[int, dict]]:
    """One object a line, or a single one over several lines."""
    lines = text.split("\n")
    first = next(line for line in lines if line.strip())
    try:
        parse_json(first, lax=True)
    except ValueError:
        try:
            yield from _objects(1, parse_json(text, lax=True), problems)
        except RepeatedKeyError as error:
            problems.add(1, str(error))
            return
        except ValueError:
            pass  # then every line is told for itself
        else:
            return
    for line, content in enumerate(lines, 1):
        if not content.strip():
            continue
        try:
            value = parse_json(content, lax=True)
        except ValueError as error:
            problems.add(line, f"not JSON: {error}", "unread")
            continue
        yield from _objects(line, value, problems)


_BETWEEN = re.compile(r"\s*(,?)\s*")


def _between(text: str, at: int) -> re.Match[str]:
    found = _BETWEEN.match(text, at)
    assert found is not None  # it matches nothing, too
    return found


def _array_rows(text: str, problems: Problems) -> Iterator[tuple[int, dict]]:
    """The objects of one JSON array, or paths that are the strings of one."""
    line = 1
    at = text.index("[") + 1
    at = _between(text, at).start(1)
    line += text.count("\n", 0, at)
    while not text.startswith("]", at):
        try:
            value, end = LAX_JSON.raw_decode(text, at)
            between = _between(text, end)
            if not between[1] and not text.startswith("]", between.end()):
                raise ValueError("a comma or the closing ] is missing")
        except (ValueError, RecursionError) as error:
            problems.add(line, f"not JSON: {getattr(error, 'msg', error)}", "unread")
            return
        yield from _objects(line, {"path": value} if isinstance(value, str) else value, problems)
        line += text.count("\n", at, between.end())
        at = between.end()
    if text[at + 1 :].strip():
        problems.add(line, "not JSON: text behind the closing ]")


def _objects(line: int, row: object, problems: Problems) -> Iterator[tuple[int, dict]]:
    if isinstance(row, dict) and ("document" in row or {"images", "texts"} <= row.keys()):
        try:
            yield from ((line, visual) for visual in _document_rows(row, line))
        except ValueError as error:
            problems.add(line, str(error))
    elif isinstance(row, dict):
        yield line, {name: value for name, value in row.items() if value is not None}
    else:
        problems.add(line, 'not a JSON object like {"path": "a.mp4", "label": "walk"}', "unread")


def _document_rows(row: dict, line: int) -> list[dict]:
    """The rows of the visuals of an interleaved document, each captioned by its neighbours.

    A document is {"document": [{"text": "..."}, {"image": "a.jpg"}, {"video": "b.mp4"}, ...]}, or
    two lists `images` and `texts` of one length with nulls, as OBELICS has them (Laurencon et al.
    2023, https://arxiv.org/abs/2306.16527). A visual is paired with the nearest paragraph before it
    and the nearest after it; training draws one of the two, each as often as the other (Flamingo,
    Alayrac et al. 2022, https://arxiv.org/abs/2204.14198). Further keys of the document go to each
    of its visuals.

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
    unknown = sorted({k for k, _ in pairs if k != "text" and _ROLE_OF.get(_plain(k)) != "path"})
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


# ---- tables ------------------------------------------------------------------------------------


def _table_rows(path: Path, text: str, problems: Problems) -> Iterator[tuple[int, dict]]:
    """Rows of a csv, tsv or space-separated list; cells may be such as `names.for_csv` makes."""
    first = next(line for line in text.split("\n") if line.strip())
    if re.fullmatch(
        r'"?sep=.?"?', first.strip(), re.IGNORECASE
    ):  # for Excel; an empty line is none
        text = text.replace(first, "", 1)
        first = next((line for line in text.split("\n") if line.strip()), "")
    columns, separator = _header(first, path.parent)
    if columns:
        _check_columns(path, columns)
        rows = _split(text, separator, columns, problems)
        next(rows, None)
    else:
        columns, rows = _sniff(path, text, problems)
    width, roles = len(columns), roles_of(tuple(columns))[0]
    texts = [name for name, role in roles.items() if role in _TEXTS]
    for line, values in rows:
        if len(values) > width and not any(values[width:]):
            values = values[:width]  # a spreadsheet's empty columns
        if len(values) != width:
            problems.add(
                line,
                f"{len(values)} columns, not the {width} of {', '.join(columns)}"
                " (a value that holds the separator has to be in double quotes)",
                "unread",
            )
        else:
            row = dict(zip(columns, values, strict=True))
            row |= {name: unmarked(row[name]) for name in columns if roles.get(name) != "path"}
            yield line, row | {name: unescaped(row[name]) for name in texts}


def _header(first: str, folder: Path) -> tuple[list[str], str]:
    """The columns that a first line names, and what separates them; no columns if it is a row."""
    for separator in SEPARATORS:
        try:
            names = next(csv.reader([first.strip("\n ")], delimiter=separator, strict=True))
        except csv.Error:
            continue
        names = [name.strip() for name in names if separator != " " or name]
        while len(names) > 1 and not names[-1]:
            names.pop()
        # pandas writes its index without a name. Kept, it is told with the other columns of no use.
        names = ["index" if not name and not i else name for i, name in enumerate(names)]
        roles = set(roles_of(tuple(names))[0].values())
        media = any(PurePosixPath(name).suffix.lower() in VIDEOS | IMAGES for name in names)
        if not roles or media or not irregular(folder / names[0]):
            continue
        if roles & {"path", "pose"} or (len(names) > 1 and len(roles) > 1):
            return names, separator
    return [], ""


def _check_columns(path: Path, columns: list[str]) -> None:
    roles, twice = roles_of(tuple(columns))
    what = f"two columns for {', '.join(twice)}" if twice else ""
    again = [name for name, count in Counter(columns).items() if count > 1]
    if again:
        what = f"two columns called {again[0]}"
    if "" in columns:
        what = "a column without name"
    if not {"path", "pose"} & {*roles.values()}:
        what = f"no column names the files, among {', '.join(columns)}"
    if what:
        raise ValueError(f"{path}:1: {what}; {_HEADER_HELP}")


def _split(
    text: str, separator: str | None, columns: list[str] | None, problems: Problems
) -> Iterator[tuple[int, list[str]]]:
    """The values of each line that is not empty."""
    if separator in (",", ";", "|"):
        yield from _quoted(text, separator, problems)
        return
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if separator == "\t" and '"' in text and len({line.count("\t") for _, line in lines}) > 1:
        # Quoted values with tabs or line ends, as pandas writes them, or sentences with a " and a
        # mistake.
        broken = Problems(problems.path)
        rows = list(_quoted(text, separator, broken))
        if not broken.found and len({len(values) for _, values in rows}) == 1:
            yield from rows
            return
    for line, content in lines:
        if separator == "\t":
            yield line, [_unquoted(value) for value in content.split("\t")]
        elif separator == " ":
            yield line, _split_spaces(content.strip(), problems.path.parent, columns)
        else:
            yield line, [_unquoted(content)]


def _quoted(text: str, separator: str, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Rows of RFC 4180: quoted values may hold separators, line ends, and quotes written twice."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True
    )
    line = 1
    try:
        for values in reader:
            values = [value.strip() for value in values]
            if any(values):
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        problems.add(line, f"broken quotes: {error}")


def _unquoted(value: str) -> str:
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] == '"':
        return value[1:-1].replace('""', '"')
    return value


def _split_spaces(content: str, folder: Path, columns: list[str] | None) -> list[str]:
    """Fields of a line between spaces; without quotes, the path is what names a file."""
    if '"' in content:
        return [_unquoted(value) for value in re.findall(r'"(?:[^"]|"")*"|\S+', content)]
    if columns:
        path_first = roles_of(tuple(columns))[0].get(columns[0]) == "path"
        return content.rsplit(None, len(columns) - 1) if path_first else content.split()
    for fields in (0, 1, 2):
        values = content.rsplit(None, fields)
        if not irregular(folder / values[0]):
            return values
    return content.split()


def _sniff(path: Path, text: str, problems: Problems) -> tuple[list[str], Iterator]:
    """What the columns of a list without header must be, and its rows.

    The separator is the one with which most of the first lines start with a file that exists.
    """
    lines = text.split("\n", SAMPLE)[:SAMPLE]
    usual = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower(), " ")
    best: str | None = usual
    found = 0
    for candidate in (usual, *SEPARATORS, None):
        rows = _split("\n".join(lines[:50]), candidate, None, Problems(path))
        score = sum(bool(v and v[0]) and not irregular(path.parent / v[0]) for _, v in rows)
        if score > found:
            best, found = candidate, score
    sample = [values for _, values in _split("\n".join(lines), best, None, Problems(path))]
    widths = Counter(map(len, sample))
    width = widths.most_common(1)[0][0] if widths else 1
    second = [values[1] for values in sample if len(values) == width > 1]
    number = all(re.fullmatch(r"-?\d+", value) for value in second)
    sentences = sum(" " in value for value in second) > len(second) / 2
    splits = all(value.lower() in SPLIT_OF for value in second)
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
    return columns, _split(text, best, columns, problems)
