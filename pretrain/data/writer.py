"""Writes a pack: lays its clips out in shards, and replaces its index last.

Shards carry their hash in their name and are never overwritten; those that stay as they are are not
written again. The lines about clips wait on the disk for their turn: in memory a clip takes 44
bytes, and as many for its columns.
"""

import errno
import filecmp
import hashlib
import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pretrain.data.index import (
    COLUMNS,
    FORMAT,
    SHARD_NAME,
    SIGNATURES,
    finish_commit,
    json_line,
    last_member,
    member_header,
    members,
    place_rows,
    text_digest,
)
from pretrain.files import sync, write_synced

if TYPE_CHECKING:  # packing imports it when it writes, so that its workers need not
    import numpy as np


def has_shard(folder: Path, shard: dict) -> bool:
    """Whether a shard that an index names is there, with the size it says."""
    path = folder / shard["name"]
    return path.is_file() and path.stat().st_size == shard["bytes"]


class Rows:
    """Lines of clips.jsonl that wait to be written, in a file.

    Attributes:
        classes: labels that occur.
        splits: how many clips each has.

    Args:
        path: of the file, which `close` removes.
    """

    def __init__(self, path: Path):
        self._path, self._end = path, 0
        path.unlink(missing_ok=True)  # of a killed process, or a link that leads elsewhere
        self._file = open(path, "x+b")  # noqa: SIM115 - `close` does
        self.classes: set[str] = set()
        self.splits: Counter[str] = Counter()
        # Of each row: the beginning and the next part of its key's hash, where it lies, how many
        # bytes its members and all of it take in a shard, whose it is, and of what source.
        self._columns = {name: array(code) for name, code in zip(
            ("first", "second", "start", "size", "room", "of", "source"), "QQqqqIQ", strict=True
        )}  # fmt: skip

    def __len__(self) -> int:
        return len(self._columns["of"])

    def add(self, row: dict, of: int = 0) -> None:
        """Add the line of a clip; `of` is given back with it."""
        line = json_line(row).encode()
        sizes = [place["bytes"] for _, place in members(row)]
        room = sum(512 + size + -size % 512 for size in sizes) + len(last_member(row))
        values = (
            *_hash_of(row["key"]), self._end, sum(512 + size for size in sizes), room, of,
            _hash_of(row["source"])[0],
        )  # fmt: skip
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)
        if row["label"] is not None:
            self.classes.add(row["label"])
        if row["split"] is not None:
            self.splits[row["split"]] += 1
        self._file.write(line)
        self._end += len(line)

    def column(self, name: str) -> "np.ndarray":
        """What was noted of all rows, in the order in which they came."""
        import numpy as np

        column = self._columns[name]
        return np.frombuffer(column, f"={column.typecode}")

    def order(self) -> "np.ndarray":
        """The order in a pack: by the hashes of the keys, a shuffle that is always the same."""
        import numpy as np

        return np.lexsort((self.column("second"), self.column("first")))

    def twice(self) -> tuple[int, int] | None:
        """The numbers of two rows of the same key, if there are any."""
        order = self.order()
        first, second = (self.column(name)[order] for name in ("first", "second"))
        same = (first[1:] == first[:-1]) & (second[1:] == second[:-1])
        if not same.any():
            return None
        at = int(same.argmax())
        return int(order[at]), int(order[at + 1])

    def finder(self) -> Callable[[str], bool]:
        """What says of a key whether a row has it."""
        import numpy as np

        order = self.order()
        first, second = (self.column(name)[order] for name in ("first", "second"))

        def has(key: str) -> bool:
            wanted = _hash_of(key)
            low, high = (
                int(np.searchsorted(first, np.uint64(wanted[0]), s)) for s in ("left", "right")
            )
            return wanted[1] in second[low:high]

        return has

    def of(self, number: int) -> int:
        """What was given with a row."""
        return self._columns["of"][number]

    def get(self, number: int) -> dict:
        """The row that came at a number."""
        self._file.seek(self._columns["start"][number])
        return json.loads(self._file.readline())

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)


@dataclass
class Writer:
    """Writes clips into a folder.

    Attributes:
        out: the folder of the pack, with a folder .pack.
        settings: what decides how a clip was made of its file.
        methods: of estimated streams, by stream.
        shard_bytes: about how large a shard is.
        find: file and offset of a member of a clip, by its line as it was added to `Rows`, what was
            given with it, and the member's ending.
        signature: of a clip, by its line and what was given with it; nothing where there is none.
        part: of a part of a pack, what its index says of that.
        index: of the pack that is there.
        lines: of each of its shards, what `line_digests` gives.
    """

    out: Path
    settings: dict
    methods: dict[str, str]
    shard_bytes: int
    find: Callable[[dict, int, str], tuple[Path, int] | None]
    signature: Callable[[dict, int], bytes]
    part: dict | None = None
    index: dict | None = None
    lines: dict[int, str] = field(default_factory=dict)

    def write(self, rows: Rows, refused: list[dict], num_refused: int) -> dict:
        """Write the shards that are new, and replace the index.

        Args:
            rows: lines of clips.jsonl, as `clip_row` makes them; their places are filled in.
            refused: lines of the ledger.
            num_refused: how many files were refused.

        Returns:
            The index.

        Raises:
            ValueError: bytes of a clip have changed on the disk.
            OSError: the folder cannot be written to, or has no room.
        """
        from pretrain.data.columns import columns_file, make_columns
        from pretrain.data.signatures import write_signatures

        parts = self._parts(rows)
        kept = self._kept(rows, parts)
        self._check_room(rows, parts, kept)
        new = self.out / ".pack" / "new"
        if new.is_symlink():
            new.unlink()
        new.mkdir(exist_ok=True)
        (new / SIGNATURES).unlink(missing_ok=True)
        placed = (each for part in parts for each in part)
        signed = (self.signature(rows.get(each), rows.of(each)) for each in placed)
        signatures = write_signatures(new / SIGNATURES, signed, len(rows))
        laid = _Laid(rows.classes)
        with open(new / "clips.jsonl", "wb") as clips:
            columns = make_columns(self._lay_out(rows, parts, kept, clips, laid), laid.classes)
            clips.flush()
            os.fsync(clips.fileno())
        index = self._index(rows, laid, num_refused)
        content = columns_file(columns, index["clips_sha256"])
        digest = hashlib.sha256(content).hexdigest()
        index["columns"] = {"name": COLUMNS, "sha256": digest, "bytes": len(content)}
        index["signatures"] = {"name": SIGNATURES} | signatures
        if self.index and self.index["clips_sha256"] == index["clips_sha256"]:
            near = self.index.get("near_duplicates")  # of the same clips: they still hold
            index |= {"near_duplicates": near} if near else {}
        files = {
            COLUMNS: content,
            "refused.jsonl": "".join(map(json_line, refused)).encode(),
            "index.json": (json.dumps(index, indent=1) + "\n").encode(),
        }
        there = {name: self.out / name for name in files}
        if all(p.is_file() and p.read_bytes() == files[name] for name, p in there.items()) and all(
            _same(new / name, self.out / name) for name in ("clips.jsonl", SIGNATURES)
        ):
            shutil.rmtree(new)
        else:
            for name, data in files.items():  # index.json last: it says that all are there
                sync(self.out)
                write_synced(new / name, data)
            finish_commit(self.out)
        named = {shard["name"] for shard in laid.shards}
        for path in self.out.glob("shard-*.tar"):
            if SHARD_NAME.fullmatch(path.name) and path.name not in named:
                path.unlink()
        return index

    def _parts(self, rows: Rows) -> list["np.ndarray"]:
        """Numbers of the rows of each shard."""
        import numpy as np

        order = rows.order()
        if not len(order):
            return []
        sizes = rows.column("size")[order]
        total = int(sizes.sum())
        count = min(len(order), max(1, round(total / self.shard_bytes)))
        middle = np.cumsum(sizes) - sizes + sizes / 2
        shards = np.minimum(count - 1, (middle * count / total).astype(np.int64))
        return np.split(order, np.flatnonzero(np.diff(shards)) + 1)

    def _kept(self, rows: Rows, parts: list["np.ndarray"]) -> dict[int, dict]:
        """The shards that are there already, by number."""
        old = self.index["shards"] if self.index else []
        kept = {}
        for shard, (about, part) in enumerate(zip(old, parts, strict=False)):
            if about["num_clips"] == len(part) and has_shard(self.out, about):
                placed = [rows.get(number) for number in part]
                place_rows(shard, placed)
                lines = ((json_line(row).encode()[:-1], row) for row in placed)
                if line_digests(lines) == {shard: self.lines.get(shard)}:
                    kept[shard] = about
        return kept

    def _check_room(self, rows: Rows, parts: list["np.ndarray"], kept: dict[int, dict]) -> None:
        """Refuse to begin what the disk has no room for."""
        room = rows.column("room")
        sizes = (int(room[part].sum()) + 1024 for i, part in enumerate(parts) if i not in kept)
        needed, free = sum(sizes), shutil.disk_usage(self.out).free
        if needed > free:
            raise OSError(
                errno.ENOSPC, f"{needed} bytes are needed, {free} are free", str(self.out)
            )

    def _lay_out(
        self, rows: Rows, parts: list["np.ndarray"], kept: dict[int, dict], clips: BinaryIO,
        laid: "_Laid",
    ) -> Iterator[tuple[bytes, dict]]:  # fmt: skip
        """Write each shard that is not there already, and the lines of all; yield these."""
        for number, part in enumerate(parts):
            placed = [rows.get(each) for each in part]
            found = None
            if number not in kept:
                found = [
                    [self.find(row, rows.of(each), ending) for ending, _ in members(row)]
                    for row, each in zip(placed, part, strict=True)
                ]
            size = place_rows(number, placed)
            laid.shards.append(
                self._write_shard(number, placed, found, size) if found else kept[number]
            )
            for row in placed:
                line = json_line(row).encode()
                clips.write(line)
                laid.digest.update(line)
                laid.size += len(line)
                _sum_up(laid.streams, row)
                yield line[:-1], row

    def _write_shard(
        self, number: int, rows: list[dict], found: list[list[tuple[Path, int] | None]], size: int
    ) -> dict:
        aside = self.out / ".pack" / "shard.tar"
        digest = hashlib.sha256()
        try:
            aside.unlink(missing_ok=True)  # likewise
            with open(aside, "xb") as file:
                for row, places in zip(rows, found, strict=True):
                    parts = []
                    for (ending, place), where in zip(members(row), places, strict=True):
                        header = member_header(f"{row['key']}.{ending}", place["bytes"])
                        padding = bytes(-place["bytes"] % 512)
                        assert where is not None, row
                        parts += [header, _read(where, place), padding]
                    for data in (*parts, last_member(row)):
                        file.write(data)
                        digest.update(data)
                file.write(bytes(1024))
                digest.update(bytes(1024))
                file.flush()
                os.fsync(file.fileno())
                assert file.tell() == size
        except OSError as error:
            aside.unlink(missing_ok=True)
            free = shutil.disk_usage(self.out).free
            what = f"a shard of {size} bytes cannot be written ({free} free): {error.strerror}"
            raise OSError(error.errno, what, str(aside)) from error
        name = f"shard-{number:05d}-{digest.hexdigest()[:8]}.tar"
        os.replace(aside, self.out / name)
        return {"name": name, "sha256": digest.hexdigest(), "bytes": size, "num_clips": len(rows)}

    def _index(self, rows: Rows, laid: "_Laid", refused: int) -> dict:
        import numpy as np

        digest = laid.digest.hexdigest()
        hashes = [shard["sha256"] for shard in laid.shards]
        return {
            "format": FORMAT,
            **(self.part or {}),
            "num_sources": len(np.unique(rows.column("source"))) + refused,
            "num_clips": len(rows),
            "num_refused": refused,
            "settings": self.settings | {"shard_bytes": self.shard_bytes} | self.methods,
            "classes": laid.classes,
            "splits": dict(sorted(rows.splits.items())),
            "shards": laid.shards,
            **({"streams": laid.streams} if laid.streams else {}),
            "clips_sha256": digest,
            "clips_bytes": laid.size,
            "fingerprint": text_digest(json.dumps([FORMAT, self.settings, hashes, digest])),
        }


def _hash_of(text: str) -> tuple[int, int]:
    digest = text_digest(text)
    return int(digest[:16], 16), int(digest[16:32], 16)


class _Laid:
    """What is known of the clips that have been laid out."""

    def __init__(self, classes: set[str]):
        self.classes, self.digest, self.size = sorted(classes), hashlib.sha256(), 0
        self.shards: list[dict] = []
        self.streams: dict[str, dict] = {}


def line_digests(lines: Iterable[tuple[bytes, dict]]) -> dict[int, str]:
    """A hash of the lines of each shard, by its number; they are as `checked_lines` gives them."""
    digests: dict[int, hashlib._Hash] = {}
    for line, row in lines:
        digests.setdefault(row["shard"], hashlib.sha256()).update(line + b"\n")
    return {shard: digest.hexdigest() for shard, digest in digests.items()}


def _read(where: tuple[Path, int], place: dict) -> bytes:
    """The bytes of a member of a clip.

    Raises:
        ValueError: they have changed.
    """
    path, offset = where
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(place["bytes"])
    if hashlib.sha256(data).hexdigest() != place["sha256"]:
        path.unlink()  # so that the next run makes anew what was in it
        raise ValueError(f"{path} has changed on the disk and was deleted: pack again")
    return data


def _same(path: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(path, other, shallow=False)


def _sum_up(summed: dict[str, dict], row: dict) -> None:
    """Count the further streams of a clip among what the index says of all of them."""
    for stream, entry in row.get("streams", {}).items():
        about = summed.setdefault(stream, {"num_clips": 0, "methods": {}})
        about["num_clips"] += 1
        if "main" in row:
            about["alone"] = about.get("alone", 0) + 1
        about["methods"][entry["method"]] = about["methods"].get(entry["method"], 0) + 1
        if stream == "pose" and entry["skeleton"] not in about.setdefault("skeletons", {}):
            from pretrain.data.poses import SKELETONS  # numpy, which only poses need

            known = SKELETONS[entry["skeleton"]]
            about["skeletons"][entry["skeleton"]] = {
                "joints": known.joints,
                "bones": known.bones,
                "pairs": known.pairs,
            }
