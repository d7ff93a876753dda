"""Large arrays that all processes of a machine map, so that there is one copy of each.

A training of ten million clips has an order of 40 MB, in every process that decodes. The files lie
in a folder of the user's own among the temporary ones; whoever comes first makes one.
"""

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock

from pretrain.files import keep_newest, replacing

LEAST = 2**20  # values; a smaller array is made by every process for itself
MOST_KEPT = 64  # files, of all names; those longest unused go


def shared_array(
    name: str, number: int, size: int, make: Callable[[], np.ndarray], dtype: type = np.int64
) -> np.ndarray:
    """An array that depends on its name and number alone.

    Args:
        name: part of a file's name.
        number: of those of a name, two stay: this one and the one before.
        size: how many values it has.
        make: makes it, if nobody has yet.
        dtype: of its values.

    Returns:
        (size,), mapped and read-only if it is large and can be; `make()` otherwise.
    """
    if size < LEAST:
        return make()
    user = os.getuid() if hasattr(os, "getuid") else ""  # Windows: the folder is a user's own
    folder = Path(tempfile.gettempdir()) / f"muybridge-{user}"
    path = folder / f"{name}-{number}.npy"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()  # anybody may have put something there
        if not stat.S_ISDIR(about.st_mode):
            return make()
        if hasattr(os, "getuid") and (about.st_uid != user or about.st_mode & 0o77):
            return make()
        with FileLock(folder / f"{name}.lock"):
            if (found := _mapped(path, size, dtype)) is not None:
                os.utime(path)
                return found
            made: np.ndarray = make().astype(dtype, copy=False)
            with replacing(path) as aside, open(aside, "wb") as file:
                np.save(file, made, allow_pickle=False)
            for old in folder.glob(f"{name}-*.npy"):
                if old.name not in (path.name, f"{name}-{number - 1}.npy"):
                    old.unlink()  # who has mapped it keeps it
            keep_newest(folder, ".npy", MOST_KEPT)
            found = _mapped(path, size, dtype)
            return made if found is None else found
    except (OSError, NotImplementedError):  # no room, or no locks
        return make()


def _mapped(path: Path, size: int, dtype: type) -> np.ndarray | None:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # none, or one that is damaged
        return None
    return found if found.shape == (size,) and found.dtype == dtype else None
