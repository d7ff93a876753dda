"""Packs far away: shards come whole into a local cache of bounded size, ahead of need.

An address is s3://BUCKET/PACK, gs://BUCKET/PACK, https://HOST/PACK or hf://datasets/OWNER/NAME/PACK.
The cache is `remote/` in the cache folder: a folder for each pack, named after the hash of its
index, with the index, the clips' lines, and of the shards those that are or were wanted. All
processes of a machine share it. --cache-gib says what it may hold; the files longest unused go
first. A shard is written aside, compared with the index's size and SHA-256, and renamed: whatever
stands under its name is whole. Who brings it holds a lock, and the others wait.

The order in which a training sees the clips (`pretrain.data.sampling.window_order`) wants only a
few shards at any time, its window; `ReadAhead` brings those of the next ones meanwhile.
"""

import contextlib
import errno
import hashlib
import io
import os
import queue
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from pretrain.data.index import MAX_INDEX, MAX_LINES, load_index, refuse_part
from pretrain.data.pool import START_SECONDS, Worker
from pretrain.environment import count_of
from pretrain.files import cache_folder, open_regular
from pretrain.names import counted, file_name, for_screen

FETCH = (sys.executable, "-P", "-m", "pretrain.data.fetch")
CACHE_GIB = 16.0  # unless --cache-gib says otherwise
MOST_GIB = 2**30  # an EiB
WINDOW_BYTES = 2**32  # of the shards that are wanted at one time, about
MOST_LANES = 64
STALL = 30.0  # seconds without progress before an attempt is given up
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between the attempts for one file
SAY_SECONDS = 30.0  # between two words of who waits
MOST_AHEAD = 100_000  # batches for which the thread may read ahead
AT_ONCE = 4  # files that the processes of a machine bring at the same time
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_COUNT = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}", re.ASCII)
MOST_TARS = 10_000  # of one pattern
SCHEMES = ("s3", "gs", "https", "http", "hf")
_ASIDE = ".tmp-"  # begins the name of what is still coming; no shard or tar begins with a dot


class Unreachable(ValueError):
    """What is wanted of a pack far away cannot be had; the message says what, and why."""


def is_address(source: str) -> bool:
    """Whether data are named by an address; a file or folder of that name comes first.

    Raises:
        ValueError: it is an address from which nothing is read, or one with a password in it.
    """
    if not _ADDRESS.match(source) or os.path.lexists(source):
        return False
    scheme, _, rest = source.partition(":")
    if scheme == "synthetic" or (not rest.startswith("//") and scheme != "pipe"):
        return False
    if scheme not in SCHEMES:
        raise ValueError(
            f"{scheme}: is no address from which data are read; there are "
            f"{', '.join(f'{s}://' for s in SCHEMES)}"
        )
    try:
        parts = urlsplit(source)
    except ValueError as error:
        raise ValueError(f"{scheme}://... is no address: {error}") from error
    if "@" in parts.netloc or parts.query or parts.fragment:
        # It would stand in results, in the list of processes and on screens. Not repeated here.
        raise ValueError(
            f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}: the address holds a "
            "password, a signature or another query, which results would repeat: leave it out, and "
            "give credentials as the store's own tools take them (pretrain/data/README.md)"
        )
    pieces = parts.path.split("/")
    if not parts.netloc or ".." in pieces or not source.isprintable() or set(source) & set(" \\?#"):
        raise ValueError(f"{source!r} is no address of data: write {scheme}://PLACE/FOLDER")
    if scheme == "hf" and (parts.netloc != "datasets" or len(list(filter(None, pieces))) < 2):
        raise ValueError(f"{source!r}: write hf://datasets/OWNER/NAME, or .../NAME@REVISION/FOLDER")
    return True


@dataclass(frozen=True)
class Remote:
    """A pack far away.

    Attributes:
        address: where it lies, without credentials.
        folder: where its index lies here, and such of its shards as are there.
        limit: bytes that the cache may hold.
        lanes: sub-lists of an epoch, each of which wants one shard at a time.
    """

    address: str
    folder: Path
    limit: int
    lanes: int

    def open(self, shard: dict) -> io.BufferedReader:
        """Open a shard, and bring it first if it is not there.

        Args:
            shard: its entry in the index.

        Raises:
            Unreachable: it cannot be had.
        """
        path = self.folder / shard["name"]
        for _ in range(10):  # others make room here, too
            try:
                file = open_regular(path)
            except FileNotFoundError:
                self.bring(shard)
                continue
            except OSError as error:
                raise Unreachable(f"{path} cannot be read: {error.strerror or error}") from error
            if os.fstat(file.fileno()).st_size == shard["bytes"]:
                _use(path)
                return file
            file.close()  # damaged by something else
            path.unlink(missing_ok=True)
        raise Unreachable(
            f"{path} is removed as soon as it is there: several runs share a cache of "
            f"{self.limit / 2**30:g} GiB; give them more --cache-gib, or a MUYBRIDGE_CACHE each"
        )

    def bring(self, shard: dict) -> None:
        """Have a shard in the cache.

        Args:
            shard: its entry in the index.

        Raises:
            Unreachable: it cannot be had.
        """
        path = self.folder / shard["name"]
        address = f"{self.address}/{shard['name']}"
        _bring(address, path, self.limit, shard["bytes"], shard["sha256"])

    def touch(self, shard: dict) -> None:
        """Keep a shard, if it is there, longer than what is not wanted any more."""
        _use(self.folder / shard["name"])


def _cache_bytes(gib: float | None) -> int:
    """What --cache-gib lets the cache hold, bytes; None: `CACHE_GIB`.

    Raises:
        ValueError: it is no size that a cache can have.
    """
    if gib is None:
        return int(CACHE_GIB * 2**30)
    if not 2**-30 <= gib <= MOST_GIB:  # not a number is neither
        raise ValueError(
            f"--cache-gib {gib:g}: give GiB, from a byte (1e-9) to {MOST_GIB}; the disk bounds it, "
            "too"
        )
    return int(gib * 2**30)


def open_remote(address: str, gib: float | None, say: bool) -> Remote:
    """Bring the index of a pack far away.

    Args:
        address: for which `is_address` holds.
        gib: what the cache may hold; None: `CACHE_GIB`.
        say: print where the cache is.

    Raises:
        ValueError: there is no such pack, or the cache cannot hold what is wanted of it at one
            time.
    """
    address, limit = address.rstrip("/"), _cache_bytes(gib)
    if address.endswith((".tar", ".mp4", ".csv")):
        raise ValueError(
            f"{address} is no pack: tars far away are packed first, with muybridge pack "
            f"--data {address} --out FOLDER"
        )
    cache = cache_folder() / "remote"
    with writing_cache(cache):
        cache.mkdir(parents=True, exist_ok=True)
    with _aside(cache) as aside:
        try:
            _bring(f"{address}/index.json", aside / "index.json", limit, most=MAX_INDEX)
            index = load_index(aside)
            refuse_part(index, address)
        except Unreachable as error:
            error.add_note(
                "a pack is a folder that muybridge pack made; videos and tars far away are packed "
                "first"
            )
            raise
        except ValueError as error:
            raise ValueError(str(error).replace(str(aside), address)) from error
        data = (aside / "index.json").read_bytes()
        name = file_name(address.rpartition("/")[2])[:40]
        folder = cache / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}"
        with writing_cache(folder):
            folder.mkdir(exist_ok=True)
            os.replace(aside / "index.json", folder / "index.json")
    clips = folder / "clips.jsonl"
    digest = index["clips_sha256"]
    if not clips.is_file() or _digest(clips) != digest:
        clips.unlink(missing_ok=True)
        _bring(f"{address}/clips.jsonl", clips, limit, most=MAX_LINES, sha256=digest)
    used = [folder / "index.json", clips]
    for about in filter(None, map(index.get, ("columns", "near_duplicates"))):
        used.append(folder / about["name"])
        _bring(f"{address}/{about['name']}", used[-1], limit, about["bytes"], about["sha256"])
    for path in used:
        _use(path)
    sizes = [shard["bytes"] for shard in index["shards"]]
    largest = max(sizes, default=1)
    lanes = max(1, min(MOST_LANES, WINDOW_BYTES // max(largest, 1), len(sizes)))
    wanted = min(sum(sizes), (lanes + 1) * largest)
    if wanted > limit:
        raise ValueError(
            f"{address} has shards of up to {largest / 2**30:.3g} GiB, of which {lanes} are wanted "
            f"at a time and one more comes: --cache-gib {limit / 2**30:g} is too little, give "
            f"{wanted / 2**30 * 1.01:.3g} or pack smaller shards"
        )
    if say:
        print(
            for_screen(
                f"{address}: {counted(index['num_clips'], 'clip')} in "
                f"{counted(len(sizes), 'shard')}, {sum(sizes) / 2**30:.3g} GiB; "
                f"up to {limit / 2**30:g} GiB are kept in {cache}"
            ),
            flush=True,
        )
    return Remote(address, folder, limit, lanes)


@contextlib.contextmanager
def _aside(cache: Path) -> Iterator[Path]:
    """A folder in the cache for a while; those that killed processes left are removed.

    Raises:
        Unreachable: the cache cannot be written.
    """
    mine = cache / f"tmp-{uuid.uuid4().hex}"
    lock = FileLock(_lock_of(mine / "all"))
    with writing_cache(cache), FileLock(cache / "room.lock"):
        for left in cache.glob("tmp-*"):
            with contextlib.suppress(OSError):  # another user's, or no folder
                if not left.is_symlink() and _is_left(left / "all"):
                    shutil.rmtree(left, ignore_errors=True)
        mine.mkdir()
        lock.acquire()
    try:
        yield mine
    finally:
        lock.release()
        shutil.rmtree(mine, ignore_errors=True)


def bring_tars(pattern: str, gib: float | None) -> Path:
    """Bring tars of raw videos.

    Args:
        pattern: the address of one, or of several: {000..010} in it stands for numbers.
        gib: what the cache may hold; None: `CACHE_GIB`.

    Returns:
        The folder in which they are. Those that are there and have not changed stay.

    Raises:
        ValueError: one cannot be had, or is no tar; or they are more than the cache may hold.
    """
    addresses, limit = _expand(pattern), _cache_bytes(gib)
    names = [address.rpartition("/")[2] for address in addresses]
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]{0,95}\.tar", name, re.ASCII):
            raise ValueError(f"{name!r} far away: only plain tars are read, NAME.tar")
    if len(set(names)) < len(names):
        raise ValueError(f"{pattern}: several tars of one name")
    about = [_try_often({"address": address, "about": True}) for address in addresses]
    if (total := sum(max(0, found["bytes"]) for found in about)) > limit:
        raise ValueError(
            f"{pattern}: {counted(len(names), 'tar')} of {total / 2**30:.3g} GiB, more than the "
            f"cache may hold: give --cache-gib {total / 2**30 * 1.01:.3g}, or pack parts of them"
        )
    known = hashlib.sha256(pattern.encode()).hexdigest()[:16]
    folder = cache_folder() / "remote" / f"{file_name(names[0])[:40]}-{known}"

    def have(address: str, name: str, found: dict) -> None:
        # A packer knows files by their dates.
        _bring(address, folder / name, limit, found["bytes"], date=int(found["state"], 16))

    _say(f"{pattern}: {counted(len(names), 'tar')}, {total / 2**30:.3g} GiB, into {folder}")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(have, addresses, names, about):
            pass
    return folder


def _expand(pattern: str) -> list[str]:
    """The addresses for which a pattern stands: {000..010} counts.

    Raises:
        ValueError: a brace counts nothing, or too much.
    """
    found = _COUNT.search(pattern)
    if not found:
        if set(pattern) & set("{}*"):
            raise ValueError(f"{pattern}: write {{000..010}} for several tars")
        return [pattern]
    first, last = found.groups()
    if not 0 <= int(last) - int(first) < MOST_TARS:
        raise ValueError(f"{pattern}: {found[0]} counts nothing, or more than {MOST_TARS}")
    numbers = (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    parts = (_expand(pattern[: found.start()] + n + pattern[found.end() :]) for n in numbers)
    expanded = [address for some in parts for address in some]
    if len(expanded) > MOST_TARS:
        raise ValueError(f"{pattern}: more than {MOST_TARS} tars")
    return expanded


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def writing_cache(cache: Path) -> Iterator[None]:
    """Raise Unreachable where the cache cannot be written, with the remedy."""
    try:
        yield
    except (OSError, NotImplementedError) as error:  # the latter: a disk that knows no locks
        where = getattr(error, "filename", None) or cache
        raise Unreachable(
            f"cannot write to the cache {cache}: {where}: "
            f"{getattr(error, 'strerror', None) or error}; "
            "set MUYBRIDGE_CACHE to a folder that can be written to and has room"
        ) from error


# ---- one file


def _bring(
    address: str,
    path: Path,
    limit: int,
    size: int = -1,
    sha256: str = "",
    most: int = 0,
    date: int | None = None,
) -> None:
    """Have a file in the cache, whoever brings it.

    Args:
        address: where it comes from.
        path: where it will lie.
        limit: bytes that the cache may hold.
        size: bytes that it has to have, -1: not known.
        sha256: of its bytes; "": not known.
        most: bytes that it may have, where `size` is not known.
        date: what it is dated; a file of another date is another version, and comes anew.

    Raises:
        Unreachable: it cannot be had.
    """
    most = min(limit, most or (size if size >= 0 else limit))
    if size > limit:
        raise Unreachable(f"{address} has {size} bytes, more than the cache of {limit} may hold")
    with writing_cache(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if path.is_file() and date in (None, path.stat().st_mtime):  # another one brought it
                _use(path)
                return
            reserved = max(size, 0)
            _make_room(path.parents[1], reserved, limit)
            aside = path.with_name(f"{_ASIDE}{uuid.uuid4().hex}-{reserved}-{path.name}")
            try:
                job = {"address": address, "to": str(aside), "limit": most, "sized": size >= 0}
                _try_often(job, partial(_difference, size, sha256))
                if date is not None:
                    os.utime(aside, (time.time(), date))
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)


def _difference(size: int, sha256: str, found: dict) -> str:
    """What a file that came has else than it has to; -1 and "" are not known."""
    if size >= 0 and found["bytes"] != size:
        return f"{found['bytes']} bytes came, not {size}"
    if sha256 and found["sha256"] != sha256:
        return "other bytes came than the index describes (SHA-256)"
    return ""


def _use(path: Path) -> None:
    """Note that a file is used now, as far as its owner and the disk allow it; its date stays."""
    with contextlib.suppress(OSError):
        os.utime(path, (time.time(), path.stat().st_mtime))


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of a file, and say so now and then while another process holds it."""
    lock = FileLock(_lock_of(path))
    while True:
        try:
            lock.acquire(timeout=SAY_SECONDS)
            break
        except Timeout:
            _say(f"waiting for another process that brings {path.name}")
    try:
        yield
    finally:
        lock.release()


def _lock_of(path: Path) -> Path:
    """A hidden file, which stays: two who wait for one that is removed would both have it."""
    return path.with_name(f".{path.name}.lock")


def _make_room(cache: Path, size: int, limit: int) -> None:
    """Delete what was not used for the longest time, until a file of a size has room.

    Raises:
        OSError: the disk has no room for it.
    """
    with FileLock(cache / "room.lock"):
        files = []
        newest: dict[Path, float] = {}
        total = size
        inside: list[Path] = []
        for each in cache.iterdir():
            # Not a folder, or another process has just renamed or removed it.
            with contextlib.suppress(NotADirectoryError, FileNotFoundError):
                inside += each.iterdir()
        for path in inside:
            with contextlib.suppress(OSError):  # another process has just renamed it
                status = path.stat()
                if path.name.startswith(_ASIDE):
                    _, _, reserved, name = path.name.split("-", 3)
                    if _is_left(path.with_name(name)):
                        path.unlink()
                        continue
                    total += max(status.st_size, int(reserved))
                elif path.suffix != ".lock":
                    files.append((status.st_atime, status.st_size, path))
                    total += status.st_size
                    folder = path.parent
                    newest[folder] = max(newest.get(folder, 0), status.st_atime)
        # An index is in use as long as any shard of it.
        last = lambda file: newest[file[2].parent] if file[2].suffix != ".tar" else file[0]
        for _, freed, path in sorted(files, key=last):
            if total <= limit:
                break
            with contextlib.suppress(OSError):  # Windows keeps what is open
                path.unlink()
                total -= freed
        free = shutil.disk_usage(cache).free
        if size > free:
            raise OSError(errno.ENOSPC, f"{size} bytes are needed, {free} are free", str(cache))


def _is_left(path: Path) -> bool:
    """Whether nobody brings a file: what was begun was left by a process that was killed."""
    lock = FileLock(_lock_of(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    return True


def _try_often(job: dict, wrong: Callable[[dict], str] = lambda found: "") -> dict:
    """What a helper finds, in one of several attempts.

    Args:
        job: for `pretrain.data.fetch`.
        wrong: of what was found, what is wrong with it; "": nothing.

    Raises:
        Unreachable: in none of them.
        OSError: the disk does not take it.
    """
    for attempt in range(len(WAITS) + 1):
        answer = _attempt(job)
        if "ok" in answer:
            why = wrong(answer["ok"])
            if not why:
                return answer["ok"]
        else:
            why = answer["failed"]
            if answer.get("errno") in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(answer["errno"], why, job["to"])
            if answer.get("final"):
                raise Unreachable(f"{job['address']}: {why}")
        if attempt < len(WAITS):
            _say(f"{job['address']}: {why}; trying again in {WAITS[attempt]:g} s")
            time.sleep(WAITS[attempt])
    raise Unreachable(f"{job['address']}: {why}, in the last of {len(WAITS) + 1} attempts")


def _say(what: str) -> None:
    print(for_screen(f"note: {what}"), file=sys.stderr, flush=True)


# Each thread of each process has a helper of its own. Of what a fork copies nothing is used.
_own = threading.local()


def _attempt(job: dict) -> dict:
    """One attempt of this thread's helper, which is killed where nothing comes any more."""
    mine = getattr(_own, "process", None) == os.getpid()
    if not mine or _own.helper.process.poll() is not None:  # it ends after a time without a job
        _own.messages = queue.SimpleQueue()
        _own.helper, _own.process = Worker(FETCH, _own.messages), os.getpid()
    helper, messages = _own.helper, _own.messages
    helper.give(0, job)
    came, said = 0, time.monotonic()
    while True:
        try:
            _, message = messages.get(timeout=STALL if helper.ready else START_SECONDS)
        except queue.Empty:
            _end_helper()
            return {"failed": f"stalled: {came} bytes had come, then almost none in {STALL:g} s"}
        if message is None:
            _end_helper()
            return {"failed": "the process that brings files ended"}
        helper.ready = True
        if "ok" in message or "failed" in message:
            return message
        came = message.get("beat", came)
        if time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            _say(f"{job['address']}: {came / 2**20:.1f} MiB have come")


def _end_helper() -> None:
    """End the helper of this thread, if it has one."""
    if getattr(_own, "process", None) == os.getpid():
        _own.helper.stop()
    _own.process = None


# ---- ahead of need


class ReadAhead:
    """Brings what the batches of a training will want, in threads, while it trains.

    As many shards are brought as this process may have in the cache. What goes wrong here is told
    and left to whoever wants the shard: it is tried again there, and the error raised.

    Args:
        needs: of each batch in turn, the shards that it wants.

    Attributes:
        given: how many batches have been used.
    """

    def __init__(self, needs: Iterable[list[tuple[Remote, dict]]]):
        self.given = 0
        self._needs, self._ended = needs, threading.Event()
        self._jobs: queue.Queue[tuple[Remote, dict]] = queue.Queue()
        self._beside = count_of("LOCAL_WORLD_SIZE")
        for work in (self._look, *[self._work] * max(1, AT_ONCE // self._beside)):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        """Begin nothing more."""
        self._ended.set()

    def _look(self) -> None:
        wanted: dict[tuple[Path, str], tuple[int, Remote, dict]] = {}
        for number, shards in enumerate(self._needs):
            for remote, shard in shards:
                key = (remote.folder, shard["name"])
                while key not in wanted and not self._ended.is_set():
                    for old in [k for k, (last, _, _) in wanted.items() if last < self.given]:
                        del wanted[old]
                    total = shard["bytes"] + sum(s["bytes"] for _, _, s in wanted.values())
                    if not wanted or total <= remote.limit / self._beside:
                        for _, other, kept in wanted.values():
                            other.touch(kept)
                        self._jobs.put((remote, shard))
                        break
                    self._ended.wait(0.1)
                wanted[key] = (number, remote, shard)
            while number - self.given > MOST_AHEAD and not self._ended.is_set():
                self._ended.wait(0.5)
            if self._ended.is_set():
                return

    def _work(self) -> None:
        while not self._ended.is_set():
            try:
                remote, shard = self._jobs.get(timeout=0.5)
            except queue.Empty:
                continue
            try:
                remote.bring(shard)
            except ValueError as error:  # unreachable, or no helper starts
                _say(str(error))
        _end_helper()
