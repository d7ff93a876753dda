"""Writes a pack: lays its clips out in shards, and replaces its index last.

Shards carry their hash in their name and are never overwritten; those that stay as they are are not
written again.
"""

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.data.index import (
    COLUMNS,
    FORMAT,
    SHARD_NAME,
    finish_commit,
    json_line,
    last_member,
    member_header,
    members,
    place_rows,
    text_digest,
)
from pretrain.files import sync, write_synced


def has_shard(folder: Path, shard: dict) -> bool:
    """Whether a shard that an index names is there, with the size it says."""
    path = folder / shard["name"]
    return path.is_file() and path.stat().st_size == shard["bytes"]


@dataclass
class Writer:
    """Writes clips into a folder.

    Attributes:
        out: the folder of the pack, with a folder .pack.
        settings: what decides how a clip was made of its file.
        methods: of estimated streams, by stream.
        shard_bytes: about how large a shard is.
        find: file and offset of a member of a clip, by its line and its ending.
        part: of a part of a pack, what its index says of that.
        index: of the pack that is there.
        lines: of the pack that is there.
    """

    out: Path
    settings: dict
    methods: dict[str, str]
    shard_bytes: int
    find: Callable[[dict, str], tuple[Path, int] | None]
    part: dict | None = None
    index: dict | None = None
    lines: set[str] = field(default_factory=set)

    def write(self, rows: list[dict], refused: list[dict], num_refused: int) -> dict:
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
        from pretrain.data.columns import columns_file, make_columns  # numpy, which others need not

        rows.sort(key=lambda row: text_digest(row["key"]))  # a shuffle that is always the same
        shards = self._shards(rows)
        lines = [json_line(row).encode() for row in rows]
        clips = b"".join(lines)
        index = self._index(rows, shards, clips, num_refused)
        about = ((line[:-1], row) for line, row in zip(lines, rows, strict=True))
        columns = columns_file(make_columns(about, index["classes"]), index["clips_sha256"])
        digest = hashlib.sha256(columns).hexdigest()
        index["columns"] = {"name": COLUMNS, "sha256": digest, "bytes": len(columns)}
        files = {
            "clips.jsonl": clips,
            COLUMNS: columns,
            "refused.jsonl": "".join(map(json_line, refused)).encode(),
            "index.json": (json.dumps(index, indent=1) + "\n").encode(),
        }
        there = {name: self.out / name for name in files}
        if not all(p.is_file() and p.read_bytes() == files[name] for name, p in there.items()):
            new = self.out / ".pack" / "new"
            new.mkdir(exist_ok=True)
            for name, content in files.items():  # index.json last: it says that all are there
                sync(self.out)
                write_synced(new / name, content)
            finish_commit(self.out)
        named = {shard["name"] for shard in shards}
        for path in self.out.glob("shard-*.tar"):
            if SHARD_NAME.fullmatch(path.name) and path.name not in named:
                path.unlink()
        return index

    def _shards(self, rows: list[dict]) -> list[dict]:
        """Give every row its place, and write each shard that is not there already."""
        sizes = [sum(512 + place["bytes"] for _, place in members(row)) for row in rows]
        total = sum(sizes)
        count = min(len(rows), max(1, round(total / self.shard_bytes)))
        parts: list[list[dict]] = [[] for _ in range(count)]
        before = 0
        for row, size in zip(rows, sizes, strict=True):
            shard = min(count - 1, int((before + size / 2) * count / total))
            before += size
            parts[shard].append(row)
        parts = [part for part in parts if part]
        places = [place_rows(shard, part) for shard, part in enumerate(parts)]
        old = self.index["shards"] if self.index else []
        kept = {
            shard: old[shard]
            for shard, part in enumerate(parts)
            if shard < len(old)
            and has_shard(self.out, old[shard])
            and old[shard]["num_clips"] == len(part)
            and self.lines.issuperset(map(json_line, part))
        }
        needed = sum(size for shard, size in enumerate(places) if shard not in kept)
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise OSError(
                errno.ENOSPC, f"{needed} bytes are needed, {free} are free", str(self.out)
            )
        return [
            kept.get(i) or self._write_shard(i, part, places[i]) for i, part in enumerate(parts)
        ]

    def _write_shard(self, number: int, rows: list[dict], size: int) -> dict:
        aside = self.out / ".pack" / "shard.tar"
        digest = hashlib.sha256()
        try:
            with open(aside, "wb") as file:
                for row in rows:
                    parts = []
                    for ending, place in members(row):
                        header = member_header(f"{row['key']}.{ending}", place["bytes"])
                        padding = bytes(-place["bytes"] % 512)
                        parts += [header, self._read(row, ending, place), padding]
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

    def _read(self, row: dict, ending: str, place: dict) -> bytes:
        found = self.find(row, ending)
        assert found is not None, row
        path, offset = found
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(place["bytes"])
        if hashlib.sha256(data).hexdigest() != place["sha256"]:
            path.unlink()  # so that the next run makes anew what was in it
            raise ValueError(f"{path} has changed on the disk and was deleted: pack again")
        return data

    def _index(self, rows: list[dict], shards: list[dict], clips: bytes, refused: int) -> dict:
        digest = hashlib.sha256(clips).hexdigest()
        hashes = [shard["sha256"] for shard in shards]
        splits = Counter(row["split"] for row in rows if row["split"] is not None)
        return {
            "format": FORMAT,
            **(self.part or {}),
            "num_sources": len({row["source"] for row in rows}) + refused,
            "num_clips": len(rows),
            "num_refused": refused,
            "settings": self.settings | {"shard_bytes": self.shard_bytes} | self.methods,
            "classes": sorted({row["label"] for row in rows if row["label"] is not None}),
            "splits": dict(sorted(splits.items())),
            "shards": shards,
            **({"streams": streams} if (streams := _summed(rows)) else {}),
            "clips_sha256": digest,
            "clips_bytes": len(clips),
            "fingerprint": text_digest(json.dumps([FORMAT, self.settings, hashes, digest])),
        }


def _summed(rows: list[dict]) -> dict[str, dict]:
    """What the index says of the further streams of all clips."""
    summed: dict[str, dict] = {}
    for row in rows:
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
    return summed
