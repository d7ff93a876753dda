"""Makes one pack of parts that several machines packed: the pack that one alone would have made.

Near-duplicates are looked for among the clips of all parts; what a person struck out in one of them
stays so.

Each part is a pack of its own, of the sources whose names' hashes fall to it. What the parts know
of their sources comes along, so that later only what has changed is packed again.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.index import (
    MAX_LINES,
    checked_lines,
    finish_commit,
    load_index,
    members,
    packed_words,
    part_words,
)
from pretrain.data.near_list import add_struck
from pretrain.data.pack import check_folders, locked, look_for_near, store_settings
from pretrain.data.writer import Rows, Writer, has_shard, line_digests
from pretrain.files import is_folder, parse_json, read_limited, reading, replacing
from pretrain.names import counted, first_of, for_screen


@dataclass(frozen=True)
class _Part:
    """A packed part: its folder and index, and which one it is."""

    folder: Path
    index: dict

    @property
    def number(self) -> int:
        return self.index["part"][0]

    @property
    def count(self) -> int:
        return self.index["part"][1]


def merge(source: str | Path, out: str | Path, *, progress: bool = True, near: bool = True) -> dict:
    """Make one pack of all parts in a folder, which stay as they are.

    Running it again does only what has changed; after an interruption it begins anew.

    Args:
        source: a folder with a folder for each part, made by `pack(..., part=(I, N))`.
        out: the pack's folder, new or what an earlier merge of these parts made.
        progress: whether to print a summary on standard error.
        near: look for near-duplicates among the clips of all parts.

    Returns:
        The index.

    Raises:
        ValueError: a part is missing, unfinished, twice there, damaged or of other settings; a clip
            is in two; or `out` cannot be written to, or holds another pack.
    """
    source, out = Path(source), Path(out)
    check_folders(source, out)
    parts = _find_parts(source)
    try:
        (out / ".pack" / "clips").mkdir(parents=True, exist_ok=True)
        with locked(out, progress):
            finish_commit(out)
            _write(parts, out)
            add_struck([part.folder for part in parts], out)
            index = load_index(out)
            found = look_for_near(out, index, progress) if near else ""
    except (OSError, NotImplementedError) as error:  # the latter: a disk that knows no locks
        what = getattr(error, "strerror", None) or error
        where = getattr(error, "filename", None) or out
        raise ValueError(
            f"cannot write the pack {out}: {where}: {what}; --out has to be a folder that can be "
            "written to and has room. The parts are intact"
        ) from error
    if progress:
        print(f"{counted(len(parts), 'part')}: {packed_words(index)}{found}", file=sys.stderr)
    return index


def _find_parts(source: Path) -> list[_Part]:
    """All parts, in order.

    Raises:
        ValueError: they are not one set of finished parts of the same settings.
    """
    if not is_folder(source):
        raise ValueError(f"{source} is no folder: give one that holds a folder for each part")
    with reading(source):
        folders = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise ValueError(f"{source} holds no parts: make them with --part I/N, a folder for each")
    unfinished = [
        path.name
        for path in folders
        if (path / ".pack").is_dir() and not os.path.lexists(path / "index.json")
    ]
    if unfinished:
        raise ValueError(
            f"{source}: unfinished: {first_of(unfinished, 20)}; run the same --part command again"
        )
    found: dict[int, _Part] = {}
    for path in folders:
        part = _Part(path, load_index(path))
        if "part" not in part.index:
            raise ValueError(f"{path} is a whole pack, not a part that --part I/N made")
        first = next(iter(found.values()), part)
        if part.count != first.count:
            words = [part_words(each.index["part"]) for each in (first, part)]
            raise ValueError(
                f"{first.folder} is {words[0]} and {path} is {words[1]}: pack all with the same N"
            )
        if other := found.get(part.number):
            raise ValueError(
                f"{other.folder} and {path} are both {part_words(part.index['part'])}: remove one"
            )
        _refuse_other_settings(first, part)
        if part.index.get("part_of") != first.index.get("part_of"):
            raise ValueError(
                f"{first.folder} and {path} are parts of other --data: of other files or lists, "
                "or of what was changed in between; run the --part commands of all again"
            )
        found[part.number] = part
    missing = [f"{i}/{first.count}" for i in range(1, first.count + 1) if i not in found]
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} of {first.count} parts are missing: "
            f"{first_of(missing, 20)}; pack them with --part"
        )
    for part in found.values():
        for shard in part.index["shards"]:
            if not has_shard(part.folder, shard):
                raise ValueError(
                    f"{part.folder / shard['name']} is missing or has another size than its index "
                    "says: run the command of that part again"
                )
    return [found[number] for number in sorted(found)]


def _refuse_other_settings(first: _Part, part: _Part) -> None:
    ours, theirs = first.index["settings"], part.index["settings"]
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{first.folder} was packed with {name} = {ours.get(name)!r:.80}, {part.folder} "
                f"with {theirs.get(name)!r:.80}: pack all parts with the same settings"
            )


def _write(parts: list[_Part], out: Path) -> None:
    with contextlib.closing(Rows(out / ".pack" / "rows.jsonl")) as rows:
        _write_rows(parts, out, rows)


def _write_rows(parts: list[_Part], out: Path, rows: Rows) -> None:
    from pretrain.data.signatures import open_signatures

    refused: list[dict] = []
    signatures = [open_signatures(part.folder, part.index) for part in parts]
    places: list[dict[str, int]] = [{} for _ in parts]  # of each clip of a part, by its key
    for number, part in enumerate(parts):
        for place, (_, row) in enumerate(checked_lines(part.folder, part.index)):
            rows.add(row, number)
            places[number][row["key"]] = place
        refused += _ledger(part)
    _refuse_twice(parts, rows)
    earlier = load_index(out) if os.path.lexists(out / "index.json") else None
    if earlier and "part" in earlier:
        raise ValueError(f"{out} is {part_words(earlier['part'])}: give another --out")
    lines = line_digests(_known(rows, out, earlier)) if earlier else {}
    about = dict(parts[0].index["settings"])
    methods = {stream: about.pop(stream) for stream in ("flow", "pose") if stream in about}
    shard_bytes = about.pop("shard_bytes", None)
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise ValueError(f"{parts[0].folder} has no usable shard_bytes: pack it again")
    if not len(rows):
        raise ValueError(f"all {len(refused)} files of all parts were refused")
    store_settings(out, about | methods)
    for name in ("journal.jsonl", "streams.jsonl"):
        _join([part.folder / ".pack" / name for part in parts], out / ".pack" / name)

    def find(row: dict, number: int, ending: str) -> tuple[Path, int]:
        part = parts[number]
        path = part.folder / part.index["shards"][row["shard"]]["name"]
        return path, dict(members(row))[ending]["offset"]

    def signature(row: dict, number: int) -> bytes:
        own = signatures[number]
        return own.get(places[number][row["key"]]) if own else b""

    writer = Writer(out, about, methods, shard_bytes, find, signature, index=earlier, lines=lines)
    refused.sort(key=lambda line: line["source"])
    writer.write(rows, refused, sum(part.index["num_refused"] for part in parts))


def _refuse_twice(parts: list[_Part], rows: Rows) -> None:
    """Refuse clips that are in two parts, or twice in one."""
    if number := rows.twice():
        (_, other), (part, row) = ((parts[rows.of(n)], rows.get(n)) for n in number)
        raise ValueError(
            f"{part.folder}: clip {row['key']} of {for_screen(row['source'])} is in "
            f"another part, too, of {for_screen(other['source'])}: pack all of the same --data"
        )


def _known(rows: Rows, out: Path, earlier: dict) -> Iterator[tuple[bytes, dict]]:
    """The lines of the pack that is there, each of a clip that some part has."""
    has = rows.finder()
    for line, row in checked_lines(out, earlier):
        if not has(row["key"]):
            raise ValueError(
                f"{out} is a pack already, of {for_screen(row['source'])}, which no part has: give "
                "another --out"
            )
        yield line, row


def _ledger(part: _Part) -> Iterator[dict]:
    """The lines of a part's refused.jsonl."""
    path = part.folder / "refused.jsonl"
    with reading(path):
        lines = read_limited(path, MAX_LINES).split(b"\n")
    for number, line in enumerate(filter(None, lines), 1):
        try:
            found = parse_json(line)
        except ValueError:
            found = None
        texts = (found.get("source"), found.get("reason")) if isinstance(found, dict) else ()
        if not isinstance(found, dict) or not all(type(text) is str for text in texts):
            raise ValueError(f"{path}:{number} is damaged: run the command of that part again")
        yield found


def _join(paths: list[Path], to: Path) -> None:
    """One journal of several; where lines are damaged, whoever packs next says so."""
    with replacing(to) as aside, open(aside, "wb") as file:
        for path in paths:
            if not path.is_file():
                continue
            with open(path, "rb") as part:
                shutil.copyfileobj(part, file)
        os.fsync(file.fileno())
