"""Arrays of .npy and .npz files that may be anybody's: no pickle, no surprise in size."""

import io
import math
import re
import zipfile
import zlib
from typing import IO, BinaryIO

import numpy as np

from pretrain.data.guard import Refused

MAX_BYTES = 2**30  # of one array
MAX_MEMBERS = 100  # of an .npz
MAX_HEADER = 10_000  # bytes
# The header of a .npy file, as NumPy writes it of numbers. NumPy itself reads any expression there.
_HEADER = re.compile(
    rb"\{'descr': '([<>|](?:f[248]|[iu][1248]))', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,9}, ?)*(?:\d{1,9})?)\), ?\}\s*"
)


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
        return {"": read_numbers(file, size)}
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
                    found[name] = read_numbers(member, info.file_size)
            except zlib.error as error:
                raise Refused(f"is a damaged archive of arrays: {error}") from error
    return found


def read_numbers(file: IO[bytes], size: int) -> np.ndarray:
    """The array of a .npy file, which may be anybody's: of numbers, and as large as it says.

    Args:
        file: at its start.
        size: bytes of it.

    Raises:
        ValueError: it is damaged, cut off, too large, or of something else than numbers.
    """
    head = file.read(12)
    start = 12 if head[6:7] > b"\1" else 10  # the first version has two bytes for a length
    length = int.from_bytes(head[8:start], "little")
    header = head[start:] + file.read(max(0, min(length, MAX_HEADER) - (12 - start)))
    found = _HEADER.fullmatch(header)
    if not head.startswith(b"\x93NUMPY") or not found:
        raise ValueError("a .npy with a damaged header, or of something else than numbers")
    dtype, columns_first = np.dtype(found[1].decode()), found[2] == b"True"
    shape = tuple(int(n) for n in found[3].split(b",") if n.strip())
    claimed, there = math.prod(shape) * dtype.itemsize, size - start - length
    if claimed != there:
        raise ValueError(f"a .npy of {claimed} bytes, of which {there} are there")
    if claimed > MAX_BYTES:
        raise ValueError(f"a .npy of {claimed} bytes, over {MAX_BYTES}")
    data = file.read(claimed)
    if len(data) < claimed:
        raise ValueError(f"a .npy of {claimed} bytes, of which {len(data)} are there")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if columns_first else "C")
