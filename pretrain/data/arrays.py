"""Arrays of .npy and .npz files that may be anybody's: no pickle, no surprise in size."""

import io
import math
import zipfile
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from pretrain.data.guard import Refused

MAX_BYTES = 2**30  # of one array
MAX_MEMBERS = 100  # of an .npz
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_arrays(file: BinaryIO, wanted: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The arrays of numbers of an .npz, by name, or the one of an .npy under the name "".

    What a header claims is compared with the bytes there are before room is made for it, and a
    member of an archive is unpacked no further than that.

    Args:
        file: the payload, seekable.
        wanted: names of the arrays to read from an .npz that has one of them; (): all.

    Raises:
        Refused: it is neither, an array is no numbers or too large, or the file is damaged.
    """
    head = file.read(4)
    file.seek(0)
    try:
        if head == b"PK\x03\x04":
            return _read_archive(file, wanted)
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        return {"": _read_array(file, size)}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError) as error:
        # RuntimeError: an encrypted member; NotImplementedError: a compression of its own.
        raise Refused(f"is a damaged archive of arrays: {error}") from error
    except (
        ValueError,
        SyntaxError,
        TypeError,
        OverflowError,
        RecursionError,
        LookupError,
    ) as error:
        raise Refused(f"is no array: {str(error)[:200]}") from error


def _read_archive(file: BinaryIO, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
    import zlib

    found: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(file) as archive:
        inside = archive.infolist()
        if len(inside) > MAX_MEMBERS:
            raise Refused(f"is an archive of {len(inside)} arrays, over {MAX_MEMBERS}")
        names = {info.filename.removesuffix(".npy") for info in inside}
        for info in inside:
            name = info.filename.removesuffix(".npy")
            if names & {*wanted} and name not in wanted:
                continue
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise Refused("is compressed in a way that numpy does not use")
            try:
                with archive.open(info) as member:  # gives no more bytes than `file_size`
                    found[name] = _read_array(member, info.file_size)
            except zlib.error as error:
                raise Refused(f"is a damaged archive of arrays: {error}") from error
    return found


def _read_array(file, size: int) -> np.ndarray:
    version = npy.read_magic(file)
    if version not in _HEADERS:
        raise Refused(f"is an array of an unknown version {version}")
    shape, by_columns, dtype = _HEADERS[version](file, max_header_size=10_000)
    if dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise Refused(f"holds {dtype}, it has to hold plain numbers")
    count = math.prod(shape) * dtype.itemsize
    if not all(0 <= side < 2**40 for side in shape) or count > min(size, MAX_BYTES):
        raise Refused(
            f"claims an array of shape {shape}, more than the {min(size, MAX_BYTES)} bytes there "
            "may be"
        )
    data = file.read(count)
    if len(data) < count:
        raise Refused(f"is cut short: {len(data)} bytes of an array of {count}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C")
