"""Packs videos and images, from wherever they are, into checked clips that training reads.

Files are met once: a file whose name, size and date are as before is not decoded again, its bytes
come out of the shards there are. Shards carry their hash in their name and are never overwritten;
the index is replaced last, so there is no moment at which it names something that is not there.
Packing needs the room of the pack twice while it works.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from filelock import FileLock, Timeout

from pretrain.data.index import (
    FORMAT,
    MAX_LINES,
    RULES,
    SHARD_NAME,
    TIMING,
    around_clip,
    clip_row,
    finish_commit,
    is_journal_line,
    json_line,
    load_index,
    member_header,
    place_rows,
    read_lines,
    text_digest,
)
from pretrain.data.pool import INGEST, run_jobs, usable_cores
from pretrain.data.progress import Bar, slow_files
from pretrain.data.sources import Listing, Source, list_sources
from pretrain.files import parse_json, read_limited, replacing, sync, write_synced
from pretrain.names import for_screen

# Further columns that a recipe reads, and those that are made of the place in a document.
READ_EXTRA = {"segments", "class_text", "document", "place"}


def pack(
    source: str | Path,
    out: str | Path,
    *,
    short_side: int = 256,
    clip_seconds: float = 10.0,
    shard_bytes: int = 2**28,
    workers: int | None = None,
    timeout: float = 60.0,
    file_timeout: float = 1800.0,
    progress: bool = True,
    anew: bool = False,
) -> dict:
    """Decodes every source fully, and writes what is good as clips in shards.

    Running it again does only what has changed; after an interruption it goes on. Several processes
    may call it at once on the same folder: one works, the others wait and find nothing to do.

    Args:
        source: A folder, a list file, a tar, or a video; see `pretrain/data/sources.py`.
        out: The pack's folder, new or an earlier pack of the same source and settings.
        short_side: Larger frames are scaled down to it, pixels; smaller ones stay as they are.
        clip_seconds: Longer videos are cut into equal parts of at most 1.05 times this; of a series of pictures that
            are over half a second apart, 25 count as a second.
        shard_bytes: About how large a shard is.
        workers: Processes that decode; None for one a core.
        timeout: Seconds without progress before a decoder is killed and its file refused.
        file_timeout: Seconds that a file may take in all, and as many again for every 64 MiB of it.
        progress: Whether to show progress and a summary on standard error.
        anew: Whether an earlier pack of other settings, or of other files altogether, may be replaced.

    Returns:
        The index, the content of index.json.

    Raises:
        ValueError: The source, the folder or a setting cannot be used, every file was refused, or
            the folder cannot be written to; the message says what to do. An earlier pack stays as it was.
    """
    for name, value, least in (
        ("short_side", short_side, 8),
        ("clip_seconds", clip_seconds, 0.1),
        ("shard_bytes", shard_bytes, 1),
        ("workers", workers or usable_cores(), 1),
        ("timeout", timeout, 0.1),
        ("file_timeout", file_timeout, 0.1),
    ):
        if not value >= least:
            raise ValueError(f"{name} is {value}, it has to be at least {least}")
    for name, given in (("source", source), ("out", out)):
        if not os.fspath(given):  # an empty variable of a shell is not the folder one stands in
            raise ValueError(f"{name} is empty: give a path, or . for this folder")
    out = Path(out)
    settings = RULES | {"short_side": int(short_side), "clip_seconds": float(clip_seconds)}
    listing = list_sources(source)
    started = time.monotonic()
    try:
        _check_folders(Path(source), out)
        (out / ".pack" / "clips").mkdir(parents=True, exist_ok=True)
        with _locked(out, progress):
            finish_commit(out)
            packer = _Packer(out, listing, settings, shard_bytes, progress)
            packer.check_same(source, anew)
            packer.ingest(workers or usable_cores(), timeout, file_timeout)
            index = packer.write()
    except (OSError, NotImplementedError) as error:  # the latter: a disk that knows no locks
        what = getattr(error, "strerror", None) or error
        where = getattr(error, "filename", None) or out
        raise ValueError(
            f"cannot write the pack {out}: {where}: {what}; --out has to be a folder that can be "
            "written to and has room. An earlier pack is intact, and the same command goes on from here"
        ) from error
    if progress:
        print(packer.summary(index, time.monotonic() - started), file=sys.stderr)
    return index


# ---- the folder --------------------------------------------------------------------------------


def _check_folders(source: Path, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder to pack into")
    if out.is_dir() and not (out / ".pack").is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} holds something else than a pack; give a new or empty folder")
    if source.is_dir():
        if out.resolve().is_relative_to(source.resolve()):
            raise ValueError(
                f"{out} lies inside the source {source}; pack into a folder outside it"
            )
        if (source / "index.json").is_file() and (source / "clips.jsonl").is_file():
            raise ValueError(f"{source} is a pack already; give it as --data")


@contextlib.contextmanager
def _locked(out: Path, progress: bool):
    lock = FileLock(out / ".pack" / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            print(f"waiting for another process that packs into {out}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# ---- packing -----------------------------------------------------------------------------------


class _Packer:
    """One call of `pack` on a locked folder: what is known of each source, and what it became."""

    def __init__(
        self, out: Path, listing: Listing, settings: dict, shard_bytes: int, progress: bool
    ):
        self.out, self.work, self.listing = out, out / ".pack", listing
        self.settings, self.shard_bytes, self.progress = settings, shard_bytes, progress
        self.journal = self.work / "journal.jsonl"
        self.known: dict[str, dict] = {}  # identity of a source -> what became of it
        self.stale = 0  # journal lines that say nothing of the present sources
        self._read_journal()
        self.index = load_index(out) if os.path.lexists(out / "index.json") else None
        self.packed: dict[str, dict] = {}  # key -> line of the present pack, its bytes at hand
        self.lines: list[str] = []
        if self.index:
            self._read_packed(self.index)
        self.ids = [self._identity(s) for s in listing.sources]
        self.copied = self.encoded = 0

    def _read_journal(self) -> None:
        if not os.path.lexists(self.journal):
            return
        try:
            lines = read_limited(self.journal, MAX_LINES).split(b"\n")
        except OSError as error:
            raise ValueError(
                f"{self.journal} cannot be read: {error.strerror}; delete it and pack again"
            ) from error
        damaged = 0
        for line in filter(None, lines):
            try:
                record = parse_json(line)
            except ValueError:  # cut off by a kill
                record = None
            if not is_journal_line(record):
                damaged += 1
                continue
            self.stale += record["id"] in self.known
            self.known[record["id"]] = record
        self.stale += damaged
        if damaged:
            self._say(
                f"{self.journal}: {damaged} damaged lines are left out, their files decoded anew"
            )

    def _say(self, what: str) -> None:
        if self.progress:
            print(for_screen(what), file=sys.stderr)

    def _read_packed(self, index: dict) -> None:
        try:
            data = read_lines(self.out, index)
        except ValueError as error:  # not the file the index describes: every clip is made anew
            self._say(f"{error}: that is done now")
            return
        self.lines = data.decode().splitlines(keepends=True)
        there = [self._has_shard(shard) for shard in index["shards"]]
        for row in map(json.loads, self.lines):
            if there[row["shard"]]:
                self.packed[row["key"]] = row

    def _has_shard(self, shard: dict) -> bool:
        path = self.out / shard["name"]
        return path.is_file() and path.stat().st_size == shard["bytes"]

    def _identity(self, source: Source) -> str:
        try:
            status = source.path.stat()
            state = [status.st_size, status.st_mtime_ns]
        except OSError:
            state = []
        return text_digest(
            json.dumps([source.name, source.kind, *state, source.member, self.settings])
        )

    def check_same(self, source: str | Path, anew: bool) -> None:
        """Refuses to turn a pack into one of other settings or of something else altogether, unless it may be."""
        stored = self.work / "settings.json"
        old = self.index and self.index["settings"]
        try:
            if old is None and os.path.lexists(stored):
                found = parse_json(read_limited(stored, 2**20))
                if not isinstance(found, dict):
                    raise ValueError("not an object")
                old = found
        except (OSError, ValueError) as error:  # the identity of each source holds them too
            self._say(f"{stored} cannot be read ({error}) and is written anew")
            stored.unlink()
        if anew and old and {name: old.get(name) for name in self.settings} != self.settings:
            stored.unlink(missing_ok=True)
            old = None
        for name, value in self.settings.items():
            if old and old.get(name) != value:
                raise ValueError(
                    f"{self.out} was packed with {name} = {old.get(name)}, not {value}: "
                    "give another --out, or the same setting"
                )
        names = {record["name"] for record in self.known.values()}
        if not anew and names and names.isdisjoint(s.name for s in self.listing.sources):
            raise ValueError(
                f"{self.out} is a pack of other files (such as {min(names)}), none of which is in "
                f"{source}: give another --out, or delete that folder"
            )
        if not stored.is_file():
            with replacing(stored) as aside:
                write_synced(aside, json.dumps(self.settings).encode())

    def _limit(self, source: Source, file_timeout: float) -> float:
        """Seconds that a source may take in all: the larger it is, the more."""
        try:
            size = source.member[1] if source.member else source.path.stat().st_size
        except OSError:
            size = 0  # it is refused when it is opened
        return file_timeout * (1 + size / 2**26)

    def _usable(self, record: dict | None, source: Source, limit: float) -> bool:
        if record is None or record.get("retry"):
            return False
        copied = [clip.get("copied") for clip in record.get("clips", ())]
        if (
            record.get("timing") != TIMING
            and source.kind == "video"
            and not (copied and all(copied))
        ):
            return False
        if record.get("seconds", math.inf) < limit:
            return False  # it has more time now
        return all(self._bytes_of(clip) for clip in record.get("clips", ()))

    def _bytes_of(self, clip: dict) -> tuple[Path, int] | None:
        """Where the bytes of a clip lie: in a shard of the present pack, or still on their own."""
        row = self.packed.get(clip["key"])
        if self.index and row and row["sha256"] == clip["sha256"]:
            return self.out / self.index["shards"][row["shard"]]["name"], row["offset"]
        path = self.work / "clips" / f"{clip['key']}.mp4"
        if path.is_file() and path.stat().st_size == clip["bytes"]:
            return path, 0
        return None

    def ingest(
        self,
        workers: int,
        timeout: float,
        file_timeout: float,
        command: tuple[str, ...] = INGEST,
    ) -> None:
        """Decodes every source of which the present state is not known yet, and notes the result."""
        limits = [self._limit(source, file_timeout) for source in self.listing.sources]
        known = [self.known.get(id) for id in self.ids]
        about = list(zip(known, self.listing.sources, limits, strict=True))
        todo = [i for i, each in enumerate(about) if not self._usable(*each)]
        jobs = []
        for number in todo:
            source = self.listing.sources[number]
            jobs.append(
                {
                    "path": os.fspath(source.path),
                    "member": source.member,
                    "kind": source.kind,
                    "out": os.fspath(self.work / "clips" / text_digest(source.name)[:16]),
                    "short_side": self.settings["short_side"],
                    "clip_seconds": self.settings["clip_seconds"],
                }
            )
        names = [self.listing.sources[number].name for number in todo]
        clips, refused, slow = 0, 0, ""

        def words() -> str:
            return f"{clips} clips, {refused} refused" + f", at work: {slow}" * bool(slow)

        def at_work(seconds: dict[int, float]) -> None:
            nonlocal slow
            slow = slow_files({names[job]: s for job, s in seconds.items()})
            bar.say(about=words())

        answers = run_jobs(
            jobs,
            workers,
            timeout,
            command,
            [limits[number] for number in todo],
            at_work,
        )
        with (
            contextlib.closing(answers),  # an interruption stops the workers before the lock goes
            open(self.journal, "a", encoding="utf-8") as journal,
            Bar(len(todo), "packing", "file", self.progress) as bar,
        ):
            if journal.tell() and self.journal.read_bytes()[-1:] != b"\n":
                journal.write("\n")  # the last line was cut off by a kill
            for job, answer in answers:
                if "disk" in answer:
                    free = shutil.disk_usage(self.out).free
                    what = f"{answer['disk']} ({free} bytes free, at work on {names[job]})"
                    raise OSError(errno.EIO, what, str(self.out))
                if "retry" in answer or "seconds" in answer:  # a killed worker tidies nothing up
                    left = Path(jobs[job]["out"])
                    for path in left.parent.glob(f"{left.name}-*.mp4"):
                        path.unlink()
                record = {"id": self.ids[todo[job]], "name": names[job], "timing": TIMING} | answer
                for clip in record.get("clips", ()):
                    clip["key"] = clip.pop("file").removesuffix(".mp4")
                    self.copied += clip["copied"]
                    self.encoded += not clip["copied"]
                journal.write(json_line(record))
                journal.flush()
                self.known[record["id"]] = record
                clips += len(record.get("clips", ()))
                refused += "refused" in record
                bar.update(about=words())

    # ---- writing

    def write(self) -> dict:
        """Lays the clips out in shards, writes those that are new, and replaces the index."""
        refused = [{"source": name, "reason": reason} for name, reason in self.listing.refused]
        rows = []
        for source, id in zip(self.listing.sources, self.ids, strict=True):
            record = self.known[id]
            if "refused" in record:
                refused.append({"source": source.name, "reason": record["refused"]})
                continue
            for number, clip in enumerate(record["clips"]):
                rows.append(clip_row(source, number, clip))
        ledger = "".join(map(json_line, sorted(refused, key=lambda r: r["source"])))
        if not rows:
            path = self.work / "refused.jsonl" if self.index else self.out / "refused.jsonl"
            write_synced(path, ledger.encode())
            error = ValueError(f"all {len(refused)} files were refused:")
            for line in (*_commonest(refused), f"all in {path}"):
                error.add_note(line)
            raise error
        rows.sort(key=lambda row: text_digest(row["key"]))  # a shuffle that is always the same
        shards = self._shards(rows)
        clips = "".join(map(json_line, rows))
        index = self._index(rows, shards, clips, len(refused))
        data = (json.dumps(index, indent=1) + "\n").encode()
        files = {
            "clips.jsonl": clips.encode(),
            "refused.jsonl": ledger.encode(),
            "index.json": data,
        }
        there = {name: self.out / name for name in files}
        if not all(p.is_file() and p.read_bytes() == files[name] for name, p in there.items()):
            new = self.work / "new"
            new.mkdir(exist_ok=True)
            for name, content in files.items():  # index.json last: it says that all are there
                sync(self.out)
                write_synced(new / name, content)
            finish_commit(self.out)
        self._tidy(index)
        return index

    def _shards(self, rows: list[dict]) -> list[dict]:
        """Gives every row its place, and writes each shard that is not there already."""
        sizes = [len(around_clip(row)[0]) + row["bytes"] for row in rows]
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
        lines = set(self.lines)
        kept = {
            shard: old[shard]
            for shard, part in enumerate(parts)
            if shard < len(old)
            and self._has_shard(old[shard])
            and old[shard]["num_clips"] == len(part)
            and lines.issuperset(map(json_line, part))
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
        aside = self.work / "shard.tar"
        digest = hashlib.sha256()
        try:
            with open(aside, "wb") as file:
                for row in rows:
                    for data in (member_header(f"{row['key']}.mp4", row["bytes"]), self._read(row)):
                        file.write(data)
                        digest.update(data)
                    rest = around_clip(row)[1]
                    file.write(rest)
                    digest.update(rest)
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

    def _read(self, row: dict) -> bytes:
        found = self._bytes_of(row)
        assert found is not None, row
        path, offset = found
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(row["bytes"])
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            path.unlink()  # so that the next run makes anew what was in it
            raise ValueError(f"{path} has changed on the disk and was deleted: pack again")
        return data

    def _index(self, rows: list[dict], shards: list[dict], clips: str, refused: int) -> dict:
        digest = hashlib.sha256(clips.encode()).hexdigest()
        hashes = [shard["sha256"] for shard in shards]
        settings = self.settings | {"shard_bytes": self.shard_bytes}
        splits = Counter(row["split"] for row in rows if row["split"] is not None)
        return {
            "format": FORMAT,
            "num_sources": len({row["source"] for row in rows}) + refused,
            "num_clips": len(rows),
            "num_refused": refused,
            "settings": settings,
            "classes": sorted({row["label"] for row in rows if row["label"] is not None}),
            "splits": dict(sorted(splits.items())),
            "shards": shards,
            "clips_sha256": digest,
            "fingerprint": text_digest(json.dumps([FORMAT, self.settings, hashes, digest])),
        }

    def _tidy(self, index: dict) -> None:
        """Deletes shards no longer named, clips that are in shards now, and old journal lines."""
        named = {shard["name"] for shard in index["shards"]}
        for path in self.out.glob("shard-*.tar"):
            if SHARD_NAME.fullmatch(path.name) and path.name not in named:
                path.unlink()
        for path in (self.work / "clips").iterdir():
            path.unlink()
        (self.work / "refused.jsonl").unlink(missing_ok=True)
        current = {id: self.known[id] for id in self.ids}
        if self.stale or len(current) < len(self.known):
            with replacing(self.journal) as aside:
                write_synced(aside, "".join(map(json_line, current.values())).encode())

    def summary(self, index: dict, seconds: float) -> str:
        """A few lines for people."""
        size = sum(shard["bytes"] for shard in index["shards"])
        done = self.copied + self.encoded
        lines = [
            f"{index['num_sources']} sources, {index['num_clips']} clips, "
            f"{index['num_refused']} refused, {len(index['shards'])} shards, {size / 1e6:.1f} MB",
            f"{done} clips made in {seconds:.1f} s: {self.encoded} encoded, {self.copied} copied as "
            f"they were; {index['num_clips'] - done} were there already"
            if done
            else f"nothing new to decode ({seconds:.1f} s)",
        ]
        clips = [clip for id in self.ids for clip in self.known[id].get("clips", ())]
        repeated = sum(clip.get("repeated", 0) for clip in clips) / sum(c["frames"] for c in clips)
        if repeated > 0.5:
            lines.append(
                f"warning: {repeated:.0%} of all frames repeat the one before, because videos rest or their frames "
                "come unevenly; what is trained on them sees mostly stills"
            )
        if index["num_refused"]:
            with open(self.out / "refused.jsonl", encoding="utf-8") as file:
                lines += ["refused, most often because:", *_commonest(map(json.loads, file))]
            lines.append(f"each refused file and its reason: {self.out / 'refused.jsonl'}")
        if skipped := self.listing.skipped:
            names = ", ".join(ascii(name)[1:-1] for name in skipped[:3]) + ", ..." * (
                len(skipped) > 3
            )
            lines.append(f"{len(skipped)} files were skipped, no use for what they are: {names}")
        columns = {name for source in self.listing.sources for name in source.extra} - READ_EXTRA
        if columns:
            kept = sorted(map(for_screen, columns))
            kept = kept[:10] + [f"{len(kept) - 10} more"] * (len(kept) > 10)
            lines.append(f"kept, but read by no recipe: {', '.join(kept)}")
        return "\n".join(lines)


def _commonest(refused) -> list[str]:
    """The five commonest reasons, numbers in them taken as equal, each with its count."""
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for entry in refused:
        kind = re.sub(r"\d+", "N", entry["reason"])
        reasons[kind] += 1
        examples.setdefault(kind, entry["reason"])
    return [f"  {count} x {examples[kind]}" for kind, count in reasons.most_common(5)]
