"""Folders of runs and results: whose they are, one writer at a time, a disk's refusals."""

import atexit
import contextlib
import errno
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from pretrain.files import LOCK
from pretrain.names import first_of

# What a lock answers where the file system has none.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


def holds_nothing(folder: Path, ours: tuple[str, ...] = ()) -> bool:
    """Whether nobody's work is in a folder, or there is no such folder.

    What a killed process left aside, a lock and what file managers put there are nothing.

    Args:
        folder: may be missing; a file in its place is something.
        ours: names that may be there as well.

    Raises:
        ValueError: it may not be read.
    """
    free = {LOCK, ".DS_Store", "Thumbs.db", "desktop.ini", *ours}
    try:
        return all(p.name in free or p.name.startswith("tmp-") for p in folder.iterdir())
    except FileNotFoundError:
        return not folder.is_symlink()  # a link to nothing is somebody's
    except NotADirectoryError:  # it is a file, or lies below one, which is for `claim` to say
        return not os.path.lexists(folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise ValueError where `path` cannot be written.

    Raises:
        ValueError: instead of an OSError or SafetensorError, which after `open` does not know the
            file's name.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}. What was written "
            "before is intact: mend that or give another --out, and start the same command again"
        ) from error


def try_folder(folder: Path) -> None:
    """Find out whether a folder can be made and written to, before the work; leaves nothing.

    Raises:
        ValueError: it cannot.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder):
                pass
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # not made, or another process has begun to use it
                path.rmdir()


def refuse_others(folder: Path, ours: tuple[str, ...] = ()) -> None:
    """Raise ValueError where a folder has files that are not `ours`, see `holds_nothing`."""
    if holds_nothing(folder, ours):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give another one with --out")
    others = sorted(p.name for p in folder.iterdir() if p.name not in (LOCK, *ours))
    raise ValueError(
        f"{folder} holds something else ({first_of(others, 3)}): give another folder with --out"
    )


def _remove_unused(folder: Path, process: int) -> None:
    """Remove a folder that a process claimed for results that never came, after a refusal."""
    with contextlib.suppress(OSError):
        if os.getpid() == process and [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def claim(folder: Path, ours: tuple[str, ...] | None = None) -> FileLock:
    """Make a folder, unless it is there, and keep other processes from writing to it.

    Args:
        folder: where to.
        ours: what will be written, so that nobody else's files are; None: the caller has looked.

    Returns:
        the lock, to be released when all is written; it ends with the process too, however that
        ends. The same process may claim a folder again.

    Raises:
        ValueError: the folder cannot be made or written to, holds something else, or another
            process has it.
    """
    try_folder(folder)
    if ours is not None:
        refuse_others(folder, ours)
    with writing(folder):
        if not folder.exists():
            atexit.register(_remove_unused, folder, os.getpid())
        folder.mkdir(parents=True, exist_ok=True)
    # A singleton: a caller that catches an error and calls again is not locked out by what it
    # caught.
    lock, problem = FileLock(folder / LOCK, is_singleton=True), ""
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            lock.acquire(timeout=0)
        problem = "; ".join(str(w.message) for w in told)
    except Timeout as error:
        raise ValueError(
            f"{folder} is in use: another process writes to it at this moment. Wait until it has "
            "ended, or give another --out"
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            with writing(folder):
                raise
        problem = str(error)
    if problem:
        print(
            f"warning: {folder} lies on a file system without locks ({problem}): see to it that "
            "nothing else writes there",
            file=sys.stderr,
            flush=True,
        )
    return lock


def remove(path: Path) -> None:
    """Remove a file, a link (never what it points to) or a whole folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
