"""Weights files, and nothing that their bytes can do: the only module that opens them.

A file of weights may come from anybody. What it claims is compared with what it is, before anything of it is
read: it is a regular file, its header is small and well formed, its tensors fill it exactly. Then a file takes
as much memory as it has bytes, and every refusal is a `ValueError` that names the file and the reason.
"""

import argparse
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

# What a weight, a buffer or a moment of an optimizer is, under safetensors' names.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# A tensor takes about 100 bytes of the header, so this is 40,000 of them, ten times those of the largest models
# here; parsed, it takes 100 MB at worst. (safetensors' own limit is 100 MB, which parsed are gigabytes.)
MAX_HEADER = 4 * 2**20
MAX_DIMENSIONS = 16


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Raises:
        ValueError: it is not there or may not be read; or it is a folder, a device or a pipe, which could
            answer without an end or never.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for its other end.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is not a regular file, so it is not read")
    return open(handle, "rb")


def sha256(path: Path) -> str:
    """Hash of a regular file's bytes, hexadecimal.

    Raises:
        ValueError: as `open_regular`.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_misfit(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], origin: str) -> None:
    """Compare names, shapes and kinds of numbers; meta tensors will do.

    Raises:
        ValueError: a tensor of `own` is missing in `theirs` or has another shape, whole numbers stand for
            floating ones or the reverse, or something is left over.
    """
    problems = [f"missing {k}" for k in own if k not in theirs]
    problems += [f"unexpected {k!r:.100}" for k in theirs if k not in own]
    for name, a in own.items():
        if (b := theirs.get(name)) is None:
            continue
        if a.shape != b.shape:
            problems.append(f"{name} is {tuple(b.shape)}, the model has {tuple(a.shape)}")
        elif a.is_floating_point() != b.is_floating_point():
            problems.append(f"{name} holds {b.dtype}, the model {a.dtype}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{origin} does not fit the model: {'; '.join(problems[:5])}{more}")


def read_safetensors(path: Path, expected: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own.

    Nothing is mapped: a file that shrinks while it is mapped ends the process without a word.

    Args:
        path: of a regular file.
        expected: names, shapes and kinds that it must have, such as a model's `state_dict()`, on the meta
            device if one likes; compared before the first tensor is read. None: whatever it holds.

    Raises:
        ValueError: it cannot be read, is damaged, is not such a file or does not hold what is expected.
    """
    with open_regular(path) as file:
        try:
            offsets, found = _read_header(file)
        except ValueError as error:
            raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
        if expected is not None:
            refuse_misfit(expected, found, str(path))
        # More than the machine has might be granted, and end the process when it is filled.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        size = os.fstat(file.fileno()).st_size
        if size > memory:
            raise ValueError(f"{path} takes {size:,} bytes of memory, this machine has {memory:,}")
        tensors = {}
        for name in offsets:  # as they lie in the file
            like = found[name]
            try:
                data = torch.empty(like.numel() * like.element_size(), dtype=torch.uint8)
            except RuntimeError as error:
                raise ValueError(f"{path} does not fit into memory: {error}") from error
            _fill(file, data, path)
            if like.dtype == torch.bool and (data > 1).any():
                raise ValueError(f"{path}: {name!r:.100} holds truth values other than 0 and 1")
            tensors[name] = data.view(like.dtype).reshape(like.shape)
    return tensors


def _fill(file: BinaryIO, data: Tensor, path: Path) -> None:
    view = memoryview(data.numpy())
    try:
        read = file.readinto(view)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if read != len(view):
        raise ValueError(f"{path} became shorter while it was read")


def _read_header(file: BinaryIO) -> tuple[list[str], dict[str, Tensor]]:
    """Check a whole safetensors file but for its numbers, and stop before them.

    Returns:
        the names in the order of their data; and a meta tensor of each, in the order of the header.
    """
    size = os.fstat(file.fileno()).st_size
    if size < 10:
        raise ValueError(f"{size} bytes are too few")
    length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_HEADER, size - 8):
        raise ValueError(
            f"its header claims {length:,} bytes; the file has {size:,}, and {MAX_HEADER:,} are the limit"
        )
    raw = file.read(length)
    if len(raw) != length or not raw.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"its header is no JSON: {error}") from error
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise ValueError("its __metadata__ holds something else than strings")
    ends, found = {}, {}
    for name, entry in header.items():
        try:
            name.encode()  # half a surrogate pair could never be printed
            ends[name], found[name] = _check_entry(entry)
        except ValueError as error:
            raise ValueError(f"tensor {name!r:.100}: {error}") from error
    at = 0
    order = sorted(ends, key=ends.__getitem__)
    for name in order:
        begin, end = ends[name]
        if begin != at:
            raise ValueError(f"tensor {name!r:.100} begins at {begin}, the one before ends at {at}")
        at = end
    if at != size - 8 - length:
        raise ValueError(f"its tensors take {at:,} bytes and {size - 8 - length:,} are there")
    return order, found


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, of which no key stands twice: two readers could each take another one."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands in it twice")
    return made


def _check_entry(entry: object) -> tuple[tuple[int, int], Tensor]:
    """Where a tensor's data begin and end, and a meta tensor like it."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("it is not described by dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r:.20} is none of {', '.join(DTYPES)}")
    for key in ("shape", "data_offsets"):
        # type() and not isinstance: true and false are no lengths
        if not isinstance(entry[key], list) or any(type(n) is not int or n < 0 for n in entry[key]):
            raise ValueError(f"its {key} is no list of whole numbers")
    shape = entry["shape"]
    # An empty tensor has no data that would bound its other lengths.
    if len(shape) > MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) > 2**48:
        raise ValueError("its shape is out of all proportion")
    like = torch.empty(shape, dtype=DTYPES[entry["dtype"]], device="meta")
    if len(entry["data_offsets"]) != 2:
        raise ValueError("its data_offsets are not two numbers")
    begin, end = entry["data_offsets"]
    if end - begin != like.numel() * like.element_size():
        raise ValueError(f"{entry['dtype']} of shape {shape} does not take {end - begin} bytes")
    return (begin, end), like


def load_torch_file(path: Path) -> dict:
    """Read somebody else's .pth: tensors only, nothing in it is executed.

    Official VideoMAE files hold their command line as an argparse.Namespace; exactly that class is
    admitted besides tensors and plain containers.

    Raises:
        ValueError: the file is not such a file, or holds anything else.
    """
    try:
        with open_regular(path) as file, torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a bad file; all mean the same here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a file of plain tensors: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    return content
