"""Files from outside, read with care: regular files only, bounded JSON, everything synced.

Nothing here needs torch: decoding processes import it too.
"""

import contextlib
import errno
import io
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"  # in a folder of results, see `folders.claim`
MOST_NESTED = 100  # levels of a JSON file; ours have ten
MAX_JSON = 64 * 2**20  # bytes; the largest of ours are results with a score for every class
# What the system answers to a name that no file can have: too long, in a circle of links, with
# letters it lacks.
NO_NAME = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ}


def _mode(name: str | Path) -> int:
    """The file mode at a given path, by `stat`; 0: nothing there.

    Raises:
        ValueError: the system does not say.
    """
    try:
        return os.stat(name).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in it
        return 0
    except OSError as error:
        if error.errno in NO_NAME:
            return 0
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error


def is_folder(name: str | Path) -> bool:
    """Whether a name, which may be anything, is that of a folder.

    Raises:
        ValueError: the system does not say.
    """
    return stat.S_ISDIR(_mode(name))


def is_file(name: str | Path) -> bool:
    """Whether a name, which may be anything, is that of a regular file.

    Raises:
        ValueError: the system does not say.
    """
    return stat.S_ISREG(_mode(name))


def is_there(name: str | Path) -> bool:
    """Whether there is anything of a name, which may be anything.

    Raises:
        ValueError: the system does not say.
    """
    return bool(_mode(name))


_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def not_regular(mode: int) -> str:
    """What a thing is that is no regular file, by its `st_mode`."""
    return f"{_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file"


def no_file(name: str | Path) -> str:
    """Why a name, which may be anything, is not that of a regular file.

    Raises:
        ValueError: the system does not say.
    """
    return f"that is {not_regular(mode)}" if (mode := _mode(name)) else _none(name, "file")


def no_folder(name: str | Path) -> str:
    """Why a name, which may be anything, is not that of a folder.

    Raises:
        ValueError: the system does not say.
    """
    mode = _mode(name)
    what = _KINDS.get(stat.S_IFMT(mode), "something else")
    return f"that is {what}, not a folder" if mode else _none(name, "folder")


def _none(name: str | Path, wanted: str) -> str:
    link = "\0" not in os.fspath(name) and os.path.islink(name)
    return f"there is no such {wanted}" + ": that is a link that leads nowhere" * link


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise ValueError where `path` cannot be read.

    Raises:
        ValueError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a regular file, or a link to one, for reading: a pipe may block, a device never ends.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    wait_not = getattr(os, "O_NONBLOCK", 0)  # Windows has no pipes among its files
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | wait_not))  # noqa: SIM115
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise OSError(errno.EINVAL, not_regular(mode), os.fspath(path))
    return file


def read_limited(path: Path, limit: int) -> bytes:
    """The bytes of a regular file that is no longer than it may be.

    Raises:
        OSError: it cannot be read, is longer, or is not a regular file.
    """
    with open_regular(path) as file:
        # Python sets aside all that is asked for, so no more than there is and one byte, by which a
        # growing file shows.
        data = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"longer than {limit:,} bytes", os.fspath(path))
    return data


def has_plain_digits(text: str) -> bool:
    """Whether what Python takes for numbers in a text is what other programs take for such.

    Python also takes `1_0` and the digits of other scripts.
    """
    return "_" not in text and text.strip().isascii()


def decimal(value: str | float) -> float:
    """A number of a file, with plain digits.

    Args:
        value: text, or a number of JSON.

    Raises:
        ValueError: it is none; NaN and infinity are.
    """
    if isinstance(value, str) and not has_plain_digits(value):
        raise ValueError(f"{value[:40]!r} is no number")
    return float(value)


def parse_json(text: str | bytes, lax: bool = False) -> object:
    """JSON as the standard has it, or with NaN and Infinity as numbers, as Python writes them.

    Raises:
        ValueError: it is not, it is nested too deeply, has a number of thousands of digits or,
            where it is lax, a key twice.
    """
    return _parse(text, LAX_JSON if lax else _STANDARD)


def read_json(path: Path) -> dict:
    """A JSON object from a file, which may be anybody's; NaN and Infinity are numbers.

    Raises:
        ValueError: the file cannot be read, is no regular file, is larger than any of ours, or
            holds something else.
    """
    with reading(path):
        raw = read_limited(path, MAX_JSON)
    try:
        content = _parse(raw, LAX_JSON)
        _refuse_deep(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where an object has to be")
    return content


def _parse(text: str | bytes, parser: json.JSONDecoder) -> object:
    try:
        return parser.decode(text.decode() if isinstance(text, bytes) else text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse_deep(content: object) -> None:
    """Refuse what is parsed and yet nested too deeply to be walked through and written again."""
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > MOST_NESTED:
            raise ValueError("it is nested too deeply")
        inside = (
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        )
        level = [value for values in inside for value in values]


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number")


class RepeatedKeyError(ValueError):
    """An object of JSON has a key twice: of the two values one would be lost."""


def without_repeats(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, whose keys are unique: two readers could each take another one."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RepeatedKeyError(f"the key {twice[:80]!r} stands twice in an object: remove one")
    return made


# Made once: a pack may have a million lines.
_STANDARD = json.JSONDecoder(parse_constant=_no_number)
LAX_JSON = json.JSONDecoder(object_pairs_hook=without_repeats)


@contextlib.contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A name beside `path` to write to, renamed to it at the end: the file is whole or not there.

    Args:
        path: the file.
        shared: others may write it at this moment. Otherwise the name is the same each time, so
            that what a killed process left is written over.

    Raises:
        OSError: it cannot be renamed; an older file is untouched.
    """
    aside = path.with_name(f"tmp-{os.getpid()}-{path.name}" if shared else f"tmp-{path.name}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def keep_newest(folder: Path, ending: str, count: int) -> None:
    """Remove all files of a folder with an ending but those of the newest dates.

    What a killed process left half done has the ending, too, and grows old; what somebody is
    writing is the newest. Files that may be in use are dated anew by whoever uses them.

    Args:
        folder: of files that can be made again.
        ending: of their names.
        count: how many stay.
    """
    dates = []
    for path in folder.glob(f"*{ending}"):
        with contextlib.suppress(OSError):  # another process removed it
            dates.append((path.lstat().st_mtime, path))
    for _, path in sorted(dates)[: max(0, len(dates) - count)]:
        with contextlib.suppress(OSError):  # Windows keeps what is open
            path.unlink()


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # a folder cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def share(path: Path) -> None:
    """Let others read a file as they may read its neighbours; safetensors lets the owner alone."""
    beside = path.with_name(f"tmp-mode-{path.name}")
    beside.touch()
    path.chmod(stat.S_IMODE(beside.stat().st_mode))
    beside.unlink()


def cache_folder() -> Path:
    """Where derived data live: MUYBRIDGE_CACHE, or ~/.cache/muybridge."""
    return Path(os.environ.get("MUYBRIDGE_CACHE", "~/.cache/muybridge")).expanduser()
