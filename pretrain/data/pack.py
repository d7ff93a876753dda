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
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from filelock import FileLock, Timeout

from pretrain.data import methods
from pretrain.data.index import (
    ENDINGS,
    MAX_LINES,
    RULES,
    TIMING,
    checked_lines,
    clip_row,
    finish_commit,
    is_journal_line,
    is_stream_line,
    json_line,
    load_index,
    packed_words,
    part_words,
    text_digest,
    wrong_stream,
)
from pretrain.data.lists import RECORDING, SEGMENT, START, boxes_column, track_column
from pretrain.data.pool import ACQUIRE, INGEST, run_jobs, usable_cores
from pretrain.data.progress import Bar, slow_files
from pretrain.data.sources import Beside, Listing, Source, boxes_of, list_sources
from pretrain.data.writer import Rows, Writer, has_shard, line_digests
from pretrain.files import parse_json, read_limited, replacing, write_synced
from pretrain.flags import flag
from pretrain.names import counted, first_of, for_screen

if TYPE_CHECKING:  # numpy, which only packing itself needs
    from pretrain.data.signatures import Signatures

# Further columns that a recipe reads, and those that are made of the place in a document.
READ_EXTRA = {"segments", "class_text", "document", "place", *RECORDING, *START}


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
    summary: bool = True,
    anew: bool = False,
    flow: str = "",
    pose: str = "",
    follow: str = "",
    part: tuple[int, int] | None = None,
    near: bool = True,
) -> dict:
    """Decode every source fully, and write what is good as clips in shards.

    Running it again does only what has changed; after an interruption it goes on. Of several
    processes that call it at once on a folder one works, and the others find nothing to do.

    Args:
        source: a folder, a list file, a tar, or a video; see `pretrain/data/sources.py`.
        out: the pack's folder, new or an earlier pack of the same source and settings.
        short_side: larger frames are scaled down to it, pixels; smaller ones stay as they are.
        clip_seconds: longer videos are cut into equal parts of at most 1.05 times this; of pictures
            over half a second apart 25 count as a second.
        shard_bytes: about how large a shard is.
        workers: processes that decode; None for one a core.
        timeout: seconds without progress before a decoder is killed and its file refused.
        file_timeout: seconds that a file may take in all, and as many again for every 64 MiB of it.
        progress: whether to show progress on standard error.
        summary: whether to say there, with `progress`, what was done and where it is.
        anew: whether an earlier pack of other settings, or of other files, may be replaced.
        flow: method that estimates the optical flow of every clip, of `METHODS["flow"]`; "": that
            of the earlier pack, or else what comes with the data.
        pose: likewise the joints of people, of `METHODS["pose"]`.
        follow: cut everybody who acts out of wide footage, found by `methods.FOLLOW`: what moves,
            boxes that the list has, or poses (given, or estimated by `pose`). Several people give
            several clips; where nobody is found, the ledger says why the whole picture is kept.
        part: (I, N): pack only those sources whose names' hashes fall to part I of N, from 1.
            `pretrain.data.merge.merge` makes one pack of the parts.
        near: look for near-duplicates at the end; of a part, `merge` does.

    Returns:
        The index, the content of index.json.

    Raises:
        ValueError: the source, the folder or a setting cannot be used, or every file was refused;
            the message says what to do. An earlier pack stays as it was.
    """
    asked = {"flow": flow, "pose": pose}
    workers = workers or usable_cores()
    _check(source, out, asked | {"follow": follow}, part, {
        "short_side": (short_side, 8),
        "clip_seconds": (clip_seconds, 0.1),
        "shard_bytes": (shard_bytes, 1),
        "workers": (workers, 1),
        "timeout": (timeout, 0.1),
        "file_timeout": (file_timeout, 0.1),
    })  # fmt: skip
    out = Path(out)
    settings = RULES | {"short_side": int(short_side), "clip_seconds": float(clip_seconds)}
    settings |= {"follow": follow} if follow else {}
    everything = list_sources(source)
    if progress:
        for note in filter(None, [*everything.notes, everything.unread]):
            print(for_screen(note, 300), file=sys.stderr)
    boxes = boxes_of(everything, source) if follow == "boxes" else []
    boxed = {each.name: found for each, found in zip(everything.sources, boxes, strict=bool(boxes))}
    listing, of = _share(everything, part)
    started, found = time.monotonic(), ""
    try:
        check_folders(Path(source), out)
        (out / ".pack" / "clips").mkdir(parents=True, exist_ok=True)
        with locked(out, progress):
            finish_commit(out)
            packer = _Packer(out, listing, settings, shard_bytes, progress, part, of)
            packer.check_same(source, anew)
            packer.choose_methods(asked)
            packer.identify(boxed)
            packer.ingest(workers, timeout, file_timeout)
            packer.add_streams(workers, timeout, file_timeout)
            packer.write()
            index = load_index(out)
            if near and not part:
                found = look_for_near(out, index, progress)
    except (OSError, NotImplementedError) as error:  # the latter: a disk that knows no locks
        what = getattr(error, "strerror", None) or error
        where = getattr(error, "filename", None) or out
        raise ValueError(
            f"cannot write the pack {out}: {where}: {what}; --out has to be a folder that can be "
            "written to and has room. An earlier pack is intact; the same command goes on from here"
        ) from error
    if progress and summary:
        print(packer.summary(index, time.monotonic() - started) + found, file=sys.stderr)
    return index


def _check(
    source: str | Path, out: str | Path, asked: dict[str, str], part: tuple[int, int] | None,
    numbers: dict[str, tuple[float, float]],
) -> None:  # fmt: skip
    """Refuse what cannot be meant; `numbers` are each given with the least that it may be."""
    for name, (value, least) in numbers.items():
        if not value >= least:
            raise ValueError(f"{name} is {value}, it has to be at least {least}")
    if part and not 1 <= part[0] <= part[1]:
        raise ValueError(f"there is no part {part[0]} of {part[1]}: they count from 1")
    for name, given in (("source", source), ("out", out)):
        if not os.fspath(given):  # an empty variable of a shell is not the folder one stands in
            raise ValueError(f"{name} is empty: give a path, or . for this folder")
    for kind, method in asked.items():
        known = methods.FOLLOW if kind == "follow" else methods.METHODS[kind]
        if method and method not in known:
            raise ValueError(f"{kind} {method!r:.80} is no method: give one of {', '.join(known)}")
        if method and kind != "follow" and not os.path.lexists(Path(out) / "index.json"):
            methods.check_method(method)  # of an earlier pack all streams may be there already


def look_for_near(out: Path, index: dict, progress: bool) -> str:
    """Look for the near-duplicates of a pack unless they are listed; a line on what was found.

    Args:
        out: the pack.
        index: of it, to which is added what was found.
        progress: show it.
    """
    if "near_duplicates" in index:
        return ""
    from pretrain.data.near import add_near  # what it needs, packing can do without

    return f"\n{for_screen(add_near(out, index, progress))}"


# ---- the folder --------------------------------------------------------------------------------


def _share(listing: Listing, part: tuple[int, int] | None) -> tuple[Listing, str]:
    """What falls to one of several parts, by the hash of its name, and a hash of all there is."""
    if not part:
        return listing, ""
    number, count = part
    mine = lambda name: int(text_digest(name)[:15], 16) % count == number - 1
    sources = [source for source in listing.sources if mine(source.name)]
    refused = [line for line in listing.refused if mine(line[0])]
    return Listing(sources, refused, listing.skipped, listing.lists), _digest_of(listing)


def _digest_of(listing: Listing) -> str:
    """What tells whether parts are of the same sources: of what is said of all of them."""
    said = hashlib.sha256()
    for s in listing.sources:
        about = [s.name, s.kind, s.label, s.captions, s.split, s.subject, s.extra, sorted(s.beside)]
        said.update(json_line(about).encode())
    for name in sorted(name for name, _ in listing.refused):
        said.update(json_line([name]).encode())
    return said.hexdigest()


def check_folders(source: Path, out: Path) -> None:
    """Refuse to pack into a folder of something else, or from a pack, or from around `out`.

    Raises:
        ValueError: naming it.
    """
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
            raise ValueError(
                f"{source} is a pack already; recipes that train or evaluate take it as --data"
            )


@contextlib.contextmanager
def locked(out: Path, progress: bool) -> Iterator[None]:
    """Hold the lock of a pack's folder; whoever comes second waits."""
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
        self,
        out: Path,
        listing: Listing,
        settings: dict,
        shard_bytes: int,
        progress: bool,
        part: tuple[int, int] | None,
        of: str,
    ):
        self.out, self.work, self.listing = out, out / ".pack", listing
        self.settings, self.shard_bytes, self.progress = settings, shard_bytes, progress
        self.part, self.of = part, of
        self.journal = self.work / "journal.jsonl"
        self.known: dict[str, bytes] = {}  # identity of a source -> its line of the journal
        self.stale = 0  # journal lines that say nothing of the present sources
        self._read_journal()
        self.made: dict[tuple[str, str], bytes] = {}  # clip and stream -> its line of the journal
        self.streams = self.work / "streams.jsonl"
        self._read_streams()
        self.methods: dict[str, str] = {}  # those asked for, by stream
        self.index = load_index(out) if os.path.lexists(out / "index.json") else None
        # Key -> where the line of a clip whose bytes are at hand begins in clips.jsonl, and its
        # number there.
        self.packed: dict[str, tuple[int, int]] = {}
        self.lines: dict[int, str] = {}  # shard -> what tells whether its lines are the same
        if self.index:
            self._read_packed(self.index)
        self.signatures: Signatures | None = None  # of the present pack
        self.ids: list[str] = []  # of each source, see `identify`
        self.followed: list[dict] = []  # of each source, what tells where in it to cut
        self.whole: list[dict] = []  # lines of the ledger on pictures that were kept whole
        self.copied = self.encoded = self.added = 0
        self.lacking: list[dict] = []  # lines of the ledger on streams that were refused

    def _read_journal(self) -> None:
        for record in self._noted(self.journal, is_journal_line):
            self.stale += record["id"] in self.known
            self.known[record["id"]] = _packed_line(record)

    def _read_streams(self) -> None:
        for record in self._noted(self.streams, is_stream_line):
            self.made[record["key"], record["stream"]] = _packed_line(record)

    def _record(self, id: str) -> dict | None:
        """What became of a source, if it is known."""
        return json.loads(self.known[id]) if id in self.known else None

    def _clips(self, id: str) -> list[dict]:
        """The clips of a source that is known; none, if it was refused."""
        return json.loads(self.known[id]).get("clips", [])

    def _noted(self, path: Path, good: Callable[[object], bool]) -> Iterator[dict]:
        """What a journal of an earlier call has noted."""
        if not os.path.lexists(path):
            return
        try:
            lines = read_limited(path, MAX_LINES).split(b"\n")
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read: {error.strerror}; delete it and pack again"
            ) from error
        damaged = 0
        for line in filter(None, lines):
            try:
                record = parse_json(line)
            except ValueError:  # cut off by a kill
                record = None
            if isinstance(record, dict) and good(record):
                yield record
            else:
                damaged += 1
        self.stale += damaged
        if damaged:
            self._say(
                f"{path}: left out, their files decoded anew: {counted(damaged, 'damaged line')}"
            )

    def _say(self, what: str) -> None:
        if self.progress:
            print(for_screen(what), file=sys.stderr)

    def _read_packed(self, index: dict) -> None:
        there = [has_shard(self.out, shard) for shard in index["shards"]]
        packed: dict[str, tuple[int, int]] = {}

        def lines() -> Iterator[tuple[bytes, dict]]:
            at = 0
            for number, (line, row) in enumerate(checked_lines(self.out, index)):
                if there[row["shard"]]:
                    packed[row["key"]] = at, number
                at += len(line) + 1
                yield line, row

        try:
            self.lines = line_digests(lines())
        except ValueError as error:  # not the file the index describes: every clip is made anew
            self._say(f"{error}: that is done now")
            return
        self.packed = packed

    def _row(self, key: str) -> dict | None:
        """The line of a clip in the present pack, if its bytes are at hand."""
        if key not in self.packed:
            return None
        with open(self.out / "clips.jsonl", "rb") as file:
            file.seek(self.packed[key][0])
            return json.loads(file.readline())

    def identify(self, boxes: dict[str, dict]) -> None:
        """Say of each source which state of it is meant; `boxes`: of each, by its name.

        Raises:
            ValueError: there is nothing that tells where to cut.
        """
        method, estimate = self.settings.get("follow", ""), self.methods.get("pose", "")
        methods.check_follow(method, estimate)
        jobs = [
            _follow_job(source, method, estimate, boxes.get(source.name, {}))
            for source in self.listing.sources
        ]
        if method == "pose" and not any("estimate" in job or "file" in job for job in jobs):
            raise ValueError(
                "--follow pose: no poses come with the data: add --pose blazepose, or a column pose"
            )
        self.followed = jobs
        self.ids = list(map(self._identity, self.listing.sources, jobs))

    def _identity(self, source: Source, follow: dict) -> str:
        try:
            status = source.path.stat()
            state: list = [status.st_size, status.st_mtime_ns]
        except OSError:
            state = []
        more = _pose_job(source) if source.kind == "pose" else {}
        state += [_status(source.beside["pose"].path), more] if more else []
        if follow:
            files = [Path(follow[n]["path"]) for n in ("file", "camera") if n in follow]
            state += [methods.FOLLOW_VERSION, methods.VERSION, follow, list(map(_status, files))]
        return text_digest(
            json.dumps([source.name, source.kind, *state, source.member, self.settings])
        )

    def check_same(self, source: str | Path, anew: bool) -> None:
        """Refuse to turn a pack into one of other settings or sources, unless it may be."""
        stored = self.work / "settings.json"
        old = self.index and self.index["settings"] | {"part": self.index.get("part")}
        try:
            if old is None and os.path.lexists(stored):
                found = parse_json(read_limited(stored, 2**20))
                if not isinstance(found, dict):
                    raise ValueError("not an object")
                old = found
        except (OSError, ValueError) as error:  # the identity of each source holds them too
            self._say(f"{stored} cannot be read ({error}) and is written anew")
            stored.unlink()
        settings = {"follow": None} | self.settings  # one that is asked for, or none
        if anew and old and {name: old.get(name) for name in settings} != settings:
            stored.unlink(missing_ok=True)
            old = None
        for name, value in settings.items():
            if old and old.get(name) != value:
                was = f"with {flag(name)} {old[name]}" if old.get(name) else f"without {flag(name)}"
                raise ValueError(
                    f"{self.out} was packed {was}: pack it likewise, or give another --out"
                )
        if old and old.get("part") != (self.part and [*self.part]):
            raise ValueError(
                f"{self.out} holds {part_words(old.get('part'))}, not {part_words(self.part)}: "
                "give each part a folder of its own"
            )
        names = {json.loads(line)["name"] for line in self.known.values()}
        if not anew and names and names.isdisjoint(s.name for s in self.listing.sources):
            raise ValueError(
                f"{self.out} is a pack of other files (such as {min(names)}), none of which is in "
                f"{source}: give another --out, or delete that folder"
            )
        if not stored.is_file():
            store_settings(self.out, self.settings | self._part())

    def _part(self) -> dict:
        return {"part": self.part} if self.part else {}

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
        row = self._row(clip["key"])
        if self.index and row and row["sha256"] == clip["sha256"]:
            return self.out / self.index["shards"][row["shard"]]["name"], row["offset"]
        path = self.work / "clips" / f"{clip['key']}.{ENDINGS.get(clip.get('main', ''), 'mp4')}"
        if path.is_file() and path.stat().st_size == clip["bytes"]:
            return path, 0
        return None

    def ingest(self, workers: int, timeout: float, file_timeout: float) -> None:
        """Decode every source whose present state is not known yet, and note the result."""
        limits = [self._limit(source, file_timeout) for source in self.listing.sources]
        about = zip(map(self._record, self.ids), self.listing.sources, limits, strict=True)
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
                | (_pose_job(source) if source.kind == "pose" else {})
                | ({"follow": self.followed[number]} if self.followed[number] else {})
            )
        names = [self.listing.sources[number].name for number in todo]
        times = [limits[number] for number in todo]
        # What is left of the time is that of this step.
        title = "packing, step 1 of 2" if self.methods else "packing"
        answers = self._run(jobs, names, times, workers, timeout, INGEST, title, "file")
        with contextlib.closing(answers), _appending(self.journal) as journal:
            for job, answer in answers:
                if "retry" in answer or "seconds" in answer:  # a killed worker tidies nothing up
                    left = Path(jobs[job]["out"])
                    for path in left.parent.glob(f"{left.name}-*"):
                        path.unlink()
                record = {"id": self.ids[todo[job]], "name": names[job], "timing": TIMING} | answer
                for clip in record.get("clips", ()):
                    clip["key"] = clip.pop("file").partition(".")[0]
                    self.copied += clip["copied"]
                    self.encoded += not clip["copied"]
                journal.write(json_line(record))
                journal.flush()
                self.known[record["id"]] = _packed_line(record)

    def _run(
        self,
        jobs: list[dict],
        names: list[str],
        limits: list[float],
        workers: int,
        timeout: float,
        command: tuple[str, ...],
        title: str,
        unit: str,
    ) -> Generator[tuple[int, dict], None, None]:
        """Yield the answers of `run_jobs`, with progress; a full disk stops everything."""
        done, refused, slow = 0, 0, ""

        def words() -> str:
            return f"{counted(done, 'clip')}, {refused} refused" + f", at work: {slow}" * bool(slow)

        def at_work(seconds: dict[int, float]) -> None:
            nonlocal slow
            slow = slow_files({names[job]: s for job, s in seconds.items()})
            bar.say(about=words())

        answers = run_jobs(jobs, workers, timeout, command, limits, at_work)
        with (
            contextlib.closing(answers),  # an interruption stops the workers before the lock goes
            Bar(len(jobs), title, unit, self.progress) as bar,
        ):
            for job, answer in answers:
                if "disk" in answer:
                    free = shutil.disk_usage(self.out).free
                    what = f"{answer['disk']} ({free} bytes free, at work on {names[job]})"
                    raise OSError(errno.EIO, what, str(self.out))
                yield job, answer
                done += len(answer.get("clips", ())) + ("entry" in answer)
                refused += "refused" in answer
                bar.update(about=words())

    # ---- further streams

    def choose_methods(self, asked: dict[str, str]) -> None:
        """By which methods streams are estimated: those asked for now, or else before."""
        stored = self.work / "settings.json"
        before = parse_json(read_limited(stored, 2**20))
        assert isinstance(before, dict)  # `check_same` has seen to it
        for stream, method in asked.items():
            method = method or str(before.get(stream, ""))
            if method and method not in methods.METHODS[stream]:
                raise ValueError(f"{stored} has {stream} {method!r:.80}: delete it and pack again")
            if method:
                self.methods[stream] = method
        if self.methods != {stream: before[stream] for stream in asked if stream in before}:
            store_settings(self.out, self.settings | self.methods | self._part())

    def _wanted(self, source: Source) -> dict[str, tuple[str, dict]]:
        """The further streams of a source: by name, what decides what they will be, and a job."""
        wanted: dict[str, tuple[str, dict]] = {}
        if source.kind == "pose":  # has no frames, and was packed as it is
            return wanted
        for stream, beside in source.beside.items():
            jobs = {"file": _place(beside)}
            if stream == "pose":
                jobs = _pose_files(source)
            paths = [Path(job["path"]) for job in jobs.values()]
            states = [[*map(_status, paths)], *jobs.values(), beside.about]
            bound = [beside.bound] if beside.bound else []
            state = json.dumps([methods.VERSION, stream, *states, *bound])
            told = {"about": beside.about, "bound": beside.bound}
            wanted[stream] = (state, jobs | told)
        for stream, method in self.methods.items():
            state = json.dumps([methods.VERSION, method, methods.METHODS[stream][method]])
            wanted[stream] = (state, {"method": method})
        return wanted

    def add_streams(self, workers: int, timeout: float, file_timeout: float) -> None:
        """Make the further streams of every clip that are not there yet, and note the result."""
        jobs, notes, limits = [], [], []
        for source, id in zip(self.listing.sources, self.ids, strict=True):
            clips = self._clips(id)
            total, before = sum(clip["frames"] for clip in clips), 0
            for clip in clips:
                about = clip | {"before": before, "total": total}
                cut = clip.get("follow")
                if cut:
                    about |= {"before": cut["frame"], "total": cut["of"]}
                if min(clip["width"], clip["height"]) < self.settings["short_side"]:
                    about.setdefault("seen", (clip["width"], clip["height"]))  # never scaled
                before += clip["frames"]
                for stream, (state, more) in self._wanted(source).items():
                    made = text_digest(state + json.dumps(cut) if cut else state)
                    note = {
                        "key": clip["key"],
                        "stream": stream,
                        "made": made,
                        "of": clip["sha256"],
                    }
                    limit = file_timeout * (1 + clip["bytes"] / 2**26)
                    if stream == "flow" and clip["frames"] == 1:
                        none = note | {"refused": "of one frame there is none"}
                        self.made[clip["key"], stream] = _packed_line(none)
                    if self._is_made(note, clip, limit):
                        continue
                    found = self._bytes_of(clip)
                    assert found is not None, clip  # it was just made, or looked for
                    about |= {"path": os.fspath(found[0]), "offset": found[1]}
                    path = self.work / "clips" / f"{clip['key']}.{ENDINGS[stream]}"
                    jobs.append({"stream": stream, "clip": about, "out": os.fspath(path)} | more)
                    notes.append((source.name, note))
                    limits.append(limit)
        command: tuple[str, ...] = ACQUIRE
        for method in {job["method"] for job in jobs if "method" in job}:
            methods.check_method(method)
            if methods.needs_torch(method):
                command = (*ACQUIRE, "--unlimited")
        names = [name for name, _ in notes]
        answers = self._run(jobs, names, limits, workers, timeout, command, "adding streams", "job")
        with contextlib.closing(answers), _appending(self.streams) as journal:
            for job, answer in answers:
                record = notes[job][1] | answer
                journal.write(json_line(record))
                journal.flush()
                self.made[record["key"], record["stream"]] = _packed_line(record)
                self.added += "entry" in answer

    def _is_made(self, note: dict, clip: dict, limit: float) -> bool:
        """Whether what was noted of a stream of a clip still holds."""
        line = self.made.get((note["key"], note["stream"]))
        if line is None:
            return False
        record = json.loads(line)
        if any(record[n] != note[n] for n in ("made", "of")):
            return False
        if record.get("retry") or record.get("seconds", math.inf) < limit:
            return False
        entry = record.get("entry")
        if entry is None:
            return True
        good = not wrong_stream(note["stream"], entry, clip)
        return good and self._stream_bytes(note["key"], note["stream"], entry) is not None

    def _stream_bytes(self, key: str, stream: str, entry: dict) -> tuple[Path, int] | None:
        """Where the bytes of a stream of a clip lie, as `_bytes_of`."""
        row = self._row(key)
        packed = row.get("streams", {}).get(stream) if row else None
        if self.index and row and packed and packed["sha256"] == entry["sha256"]:
            return self.out / self.index["shards"][row["shard"]]["name"], packed["offset"]
        path = self.work / "clips" / f"{key}.{ENDINGS[stream]}"
        if path.is_file() and path.stat().st_size == entry["bytes"]:
            return path, 0
        return None

    def _streams_of(self, source: Source, clip: dict) -> tuple[dict[str, dict], list[dict]]:
        """The entries of a clip's further streams, and lines of the ledger on those refused."""
        entries, refused = {}, []
        for stream in self._wanted(source):
            record = json.loads(self.made[clip["key"], stream])
            if "entry" in record:
                entries[stream] = record["entry"]
            else:
                about = {"source": source.name, "reason": record["refused"], "stream": stream}
                refused.append(about)
        return entries, refused

    # ---- writing

    def write(self) -> None:
        """Lay the clips out in shards, write those that are new, and replace the index."""
        with contextlib.closing(Rows(self.work / "rows.jsonl")) as rows:
            refused = self._gather(rows)
            lines = sorted(refused + self.lacking + self.whole, key=lambda r: r["source"])
            if not len(rows) and not self.part:
                path = self.work / "refused.jsonl" if self.index else self.out / "refused.jsonl"
                write_synced(path, "".join(map(json_line, lines)).encode())
                error = ValueError(f"nothing is left, {counted(len(refused), 'file')} refused:")
                for line in (*_commonest(refused), f"all in {path}"):
                    error.add_note(line)
                raise error
            from pretrain.data.signatures import open_signatures

            self.signatures = open_signatures(self.out, self.index) if self.index else None
            writer = Writer(
                self.out,
                self.settings,
                self.methods,
                self.shard_bytes,
                self._find,
                self._signature,
                self.part and {"part": [*self.part], "part_of": self.of},
                self.index,
                self.lines,
            )
            writer.write(rows, lines, len(refused))
        self._tidy()

    def _gather(self, rows: Rows) -> list[dict]:
        """Add the line of every clip; returns lines of the ledger on the sources refused."""
        refused = [{"source": name, "reason": reason} for name, reason in self.listing.refused]
        for source, id in zip(self.listing.sources, self.ids, strict=True):
            record = json.loads(self.known[id])
            if "refused" in record:
                refused.append({"source": source.name, "reason": record["refused"]})
                continue
            for number, clip in enumerate(record["clips"]):
                entries, lacking = self._streams_of(source, clip)
                rows.add(clip_row(source, number, clip, entries))
                self.lacking += [line for line in lacking if line not in self.lacking[-2:]]
                why = clip.get("follow", {}).get("whole")
                if why is None and "follow" in self.settings and source.kind == "pose":
                    why = "poses without a video have no picture"
                kept = {"source": source.name, "reason": f"kept whole: {why}", "stream": "follow"}
                if why is not None and kept not in self.whole[-1:]:
                    self.whole.append(kept)
        return refused

    def _find(self, row: dict, _: int, ending: str) -> tuple[Path, int] | None:
        """Where the bytes of a member of a clip lie."""
        if ending == "mp4":
            return self._bytes_of(row)
        stream = next(name for name, end in ENDINGS.items() if end == ending)
        return self._stream_bytes(row["key"], stream, row["streams"][stream])

    def _signature(self, row: dict, _: int) -> bytes:
        """The signature of a clip; nothing where it was packed before there were any."""
        from pretrain.data.signatures import SUFFIX

        old = self._row(row["key"])
        if old and old["sha256"] == row["sha256"] and self.signatures:
            return self.signatures.get(self.packed[row["key"]][1])
        path = self.work / "clips" / f"{row['key']}{SUFFIX}"
        return path.read_bytes() if path.is_file() else b""

    def _tidy(self) -> None:
        """Delete clips that are in shards now, and old journal lines."""
        for path in (self.work / "clips").iterdir():
            path.unlink()
        (self.work / "refused.jsonl").unlink(missing_ok=True)
        keys = {clip["key"] for id in self.ids for clip in self._clips(id)} if self.made else set()
        if self.added or any(key not in keys for key, _ in self.made):
            with replacing(self.streams) as aside:
                lines = (self.made[each] for each in sorted(self.made) if each[0] in keys)
                write_synced(aside, b"".join(lines))
        if self.stale or len(set(self.ids)) < len(self.known):
            with replacing(self.journal) as aside:
                write_synced(aside, b"".join(map(self.known.__getitem__, dict.fromkeys(self.ids))))

    def summary(self, index: dict, seconds: float) -> str:
        """A few lines for people."""
        size = sum(shard["bytes"] for shard in index["shards"])
        done = self.copied + self.encoded
        lines = [
            f"{packed_words(index)}, {size / 1e6:.1f} MB",
            f"{counted(done, 'clip')} made in {seconds:.1f} s: {self.encoded} encoded, "
            f"{self.copied} copied as they were; {index['num_clips'] - done} were there already"
            if done
            else f"nothing new to decode ({seconds:.1f} s)",
        ]
        for stream, about in index.get("streams", {}).items():
            made = ", ".join(
                for_screen(name) for name in about.get("methods", about.get("skeletons"))
            )
            lines.append(f"{stream} ({made}) of {counted(about['num_clips'], 'clip')}")
        if self.lacking:
            lines.append(f"{counted(len(self.lacking), 'stream')} refused, most often because:")
            named = ({"reason": f"{x['stream']}: {x['reason']}"} for x in self.lacking)
            lines += _commonest(named)
            lines.append(f"each of them and its reason: {self.out / 'refused.jsonl'}")
        if "follow" in self.settings:
            lines += self._followed_words()
        frames = repeats = 0
        for clip in (clip for id in self.ids for clip in self._clips(id)):
            frames += clip["frames"]
            repeats += clip.get("repeated", 0)
        repeated = repeats / max(1, frames)
        if repeated > 0.5:
            lines.append(
                f"warning: {repeated:.0%} of all frames repeat the one before, because videos rest "
                "or their frames come unevenly; what is trained on them sees mostly stills"
            )
        if index["num_refused"]:
            with open(self.out / "refused.jsonl", encoding="utf-8") as file:
                files = [line for line in map(json.loads, file) if "stream" not in line]
            lines += ["refused, most often because:", *_commonest(files)]
            lines.append(f"each refused file and its reason: {self.out / 'refused.jsonl'}")
        if skipped := self.listing.skipped:
            names = first_of([ascii(name)[1:-1] for name in skipped], 3)
            lines.append(
                f"{counted(len(skipped), 'file')} skipped, no use for what they are: {names}"
            )
        columns = {name for source in self.listing.sources for name in source.extra} - READ_EXTRA
        if any(source.kind == "pose" for source in self.listing.sources):
            columns.discard("fps")
        boxes = {boxes_column(columns), track_column(columns)} - {None}
        columns -= boxes
        if boxes and self.settings.get("follow") != "boxes":
            names = " and ".join(sorted(map(for_screen, boxes)))
            lines.append(f"kept, but read by --follow boxes alone: {names}")
        if columns:
            lines.append(f"kept, but read by no recipe: {first_of(sorted(columns), 10)}")
        wrong, behind = self._mistaken_segments()
        if wrong:
            lines.append(
                f"warning: {counted(len(wrong), 'part')} of the column segments, such as "
                f"{for_screen(wrong[0], 180)}, are not of the form start-end label: recipes that "
                "label frames refuse them"
            )
        if behind:
            lines.append(
                f"warning: {counted(len(behind), 'segment')} behind the end of the video, such as "
                f"{for_screen(behind[0], 200)}: are its times of another file, or no seconds?"
            )
        return "\n".join(lines)

    def _mistaken_segments(self) -> tuple[list[str], list[str]]:
        """In words: parts of the column segments that are none, and those behind the last frame."""
        wrong, behind = [], []
        for source, id in zip(self.listing.sources, self.ids, strict=True):
            parts = [*filter(str.strip, source.extra.get("segments", "").split(";"))]
            if not parts:  # the lines of its clips need not be read
                continue
            end = max((c["start"] + c["frames"] / c["fps"] for c in self._clips(id)), default=None)
            for part in parts:
                name = f"{part.strip()[:80]!r} of {source.name}"
                match = SEGMENT.fullmatch(part.rstrip())
                if not match:
                    wrong.append(name)
                elif end is not None and float(match[1]) >= end:
                    behind.append(f"{name}, which has {end:.1f} s")
        return wrong, behind

    def _nowhere(self) -> list[str]:
        """People whose labels the data have, in videos in which boxes find others, but not them."""
        found = []
        for source, id in zip(self.listing.sources, self.ids, strict=True):
            if source.whose and self.settings["follow"] == "boxes":
                there = {clip.get("follow", {}).get("subject") for clip in self._clips(id)}
                lost = source.whose.keys() - there - {""} if there - {None} else ()
                found += [f"{person!r} of {source.name}" for person in sorted(lost)]
        return found

    def _followed_words(self) -> list[str]:
        """What is said of the clips that were cut out of wide footage."""
        clips = [clip.get("follow", {}) for id in self.ids for clip in self._clips(id)]
        cut = sum("size" in about for about in clips)
        moving = sum(len(about.get("way", ())) > 1 for about in clips)
        lines = [
            f"followed by {self.settings['follow']}: {counted(cut, 'clip')} around a subject, in "
            f"{moving} of them the box moves"
        ]
        if nowhere := self._nowhere():
            lines.append(
                f"warning: the labels of {counted(len(nowhere), 'person')} are on no clip, as no "
                f"boxes have them for half a second, such as {for_screen(nowhere[0], 200)}"
            )
        if self.whole:
            what = (
                f"whole pictures kept of {counted(len(self.whole), 'source')}, most often because:"
            )
            lines += [what, *_commonest(self.whole)]
            lines.append(f"each of them and its reason: {self.out / 'refused.jsonl'}")
        return lines


def _packed_line(record: dict) -> bytes:
    """A line of a journal, a quarter of the size of the object."""
    return json_line(record).encode()


def store_settings(out: Path, settings: dict) -> None:
    """Note what a pack was made with, in .pack/settings.json."""
    with replacing(out / ".pack" / "settings.json") as aside:
        write_synced(aside, json.dumps(settings).encode())


def parse_part(text: str) -> tuple[int, int]:
    """The number and the count of "I/N".

    Raises:
        ValueError: it is something else.
    """
    if not (found := re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)):
        raise ValueError(f"--part {text!r:.80}: write 3/16 for the third of sixteen parts")
    return int(found[1]), int(found[2])


def _pose_job(source: Source) -> dict:
    """What is said of a recording of poses without a video."""
    return {"skeleton": source.beside["pose"].about, "fps": source.extra.get("fps")}


def _follow_job(source: Source, method: str, estimate: str, boxes: dict) -> dict:
    """What tells where to cut a source, as `pretrain.data.follow.Follow` takes it; {}: nowhere."""
    if not method or source.kind == "pose":
        return {}
    if method != "pose":
        video = {"video": Path(source.name).stem} if "file" in boxes else {}
        return {"method": method} | boxes | video
    if estimate:
        return {"method": method, "estimate": estimate}
    files = _pose_files(source) if "pose" in source.beside else {}
    skeleton = {"skeleton": source.beside["pose"].about} if files else {}
    return {"method": method} | files | skeleton


def _pose_files(source: Source) -> dict[str, dict]:
    """Path and member of a source's file of poses, and of the one that may project them."""
    files = {"file": source.beside["pose"]}
    if (flow := source.beside.get("flow")) and flow.is_array:
        files["camera"] = flow
    return {name: _place(each) for name, each in files.items()}


def _place(beside: Beside) -> dict:
    return {"path": os.fspath(beside.path), "member": beside.member}


def _status(path: Path) -> list:
    """What tells whether a file has changed; of a folder, each of its files."""
    try:
        paths = sorted(path.iterdir()) if path.is_dir() else [path]
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    except OSError:
        return []  # it is refused when it is opened


@contextlib.contextmanager
def _appending(path: Path) -> Iterator[TextIO]:
    """A journal, opened for further lines."""
    with open(path, "a", encoding="utf-8") as journal:
        if journal.tell():
            with open(path, "rb") as before:
                before.seek(-1, os.SEEK_END)
                if before.read() != b"\n":
                    journal.write("\n")  # the last line was cut off by a kill
        yield journal


def _commonest(refused) -> list[str]:
    """The five commonest reasons, numbers in them taken as equal, each with its count."""
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for entry in refused:
        kind = re.sub(r"\d+", "N", entry["reason"])
        reasons[kind] += 1
        examples.setdefault(kind, entry["reason"])
    return [f"  {count} x {examples[kind]}" for kind, count in reasons.most_common(5)]
