"""Parts of tensors, in memory and in files, where a model is spread over several processes.

FSDP2 gives a process rows of each tensor (torch's DTensor), DeepSpeed's ZeRO a stretch of its
numbers that begins and ends anywhere. Both are one range of the flattened tensor, and so are the
entries of the files that each process writes: one dimension, and in the file's metadata

    "parts": {"blocks.0.fc1.weight": [1024, 64, 32], ...}    # its start, and the whole's shape

so that any range of any tensor is read by any number of processes, whoever wrote it.
torch.distributed.checkpoint writes its index as a pickle. Its safetensors files have none, but know
DTensors only, and a tensor's shape is there the sum of the parts that are found: a missing last one
does not show.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from pretrain.files import open_regular, parse_json, reading
from pretrain.weights import (
    MAX_DIMENSIONS,
    CheckpointError,
    read_header,
    read_into,
    refuse_misfit,
    write_tensors,
)


@dataclass(frozen=True)
class Part:
    """What a process holds of a tensor: a range of its numbers, row by row.

    Attributes:
        values: the numbers themselves, no copy, in any shape.
        start: where the first of them lies in the flattened whole.
        shape: of the whole.
        shared: whether other processes hold others; else each has all.
    """

    values: Tensor
    start: int
    shape: torch.Size
    shared: bool = True


def whole(value: Tensor) -> Tensor:
    """All of a tensor, on every process; where it is sharded all have to call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part_of(value: Tensor) -> Part:
    """What this process holds of a tensor."""
    value = value.detach()
    if not isinstance(value, DTensor):
        return Part(value, 0, value.shape, shared=False)
    assert value.placements == (Shard(0),)
    mesh = value.device_mesh
    rows = math.ceil(len(value) / mesh.size())
    first = min(rows * mesh.get_local_rank(), len(value))
    return Part(value.to_local(), first * math.prod(value.shape[1:]), value.shape)


def to_write(
    parts: dict[str, Part], alike: set[str], place: int, processes: int
) -> dict[str, Part]:
    """What one of several processes writes: together they write each number once.

    Args:
        parts: what it holds.
        alike: names of what all hold to the same bits; they write equal parts of it. Of what else
            each has all, the first process writes its own.
        place: the number of this process, from 0.
        processes: how many there are.
    """
    mine = {}
    for name, part in parts.items():
        if not part.shared:
            flat = part.values.reshape(-1)
            first, end = (len(flat) * n // processes for n in (place, place + 1))
            if name not in alike:
                first, end = 0, 0 if place else len(flat)
                flat = flat.clone()  # under ZeRO one count of steps stands for all parameters
            part = Part(flat[first:end], first, part.shape)
        if part.values.numel() or place == 0:  # of what has no numbers the first writes the shape
            mine[name] = part
    return mine


def write_parts(path: Path, parts: dict[str, Part]) -> str:
    """Write a file of parts, wait until it is on the disk, and return its hash."""
    tensors = {name: part.values.reshape(-1).contiguous() for name, part in parts.items()}
    places = {name: [part.start, *part.shape] for name, part in parts.items()}
    return write_tensors(path, tensors, {"parts": json.dumps(places)})


class Parts:
    """The tensors of files that `write_parts` wrote, or of one file of whole tensors.

    Args:
        paths: the files. Only their headers are read, and checked.

    Attributes:
        tensors: a meta tensor of each, by name.

    Raises:
        CheckpointError: a file cannot be read or is damaged; or its parts are not those of whole
            tensors, each number once.
    """

    def __init__(self, paths: Iterable[Path]):
        self.tensors: dict[str, Tensor] = {}
        # Of each name where its parts begin and end, and in which file, where.
        self._found: dict[str, list[tuple[int, int, Path, int]]] = {}
        path = None
        try:
            for path in paths:
                self._enter(path)
            for name, like in self.tensors.items():
                self._check(name, like.numel())
        except ValueError as error:
            where = "" if path is None or str(path) in str(error) else f"{path}: "
            raise CheckpointError(f"{where}{error}") from error

    def _enter(self, path: Path) -> None:
        """Take in the header of a file."""
        with reading(path), open_regular(path) as file:
            offsets, found, about = read_header(file)
        places = parse_json(about["parts"]) if "parts" in about else {}
        if not isinstance(places, dict) or not places.keys() <= found.keys():
            raise ValueError("its parts are not those of its tensors")
        for name, like in found.items():
            start, shape = 0, like.shape
            if name in places:
                start, shape = _check_place(name, places[name], like)
            own = torch.empty(shape, dtype=like.dtype, device="meta")
            other = self.tensors.setdefault(name, own)
            if (own.shape, own.dtype) != (other.shape, other.dtype):
                raise ValueError(f"{name!r:.100} is of two shapes or kinds")
            piece = (start, start + like.numel(), path, offsets[name])
            self._found.setdefault(name, []).append(piece)

    def _check(self, name: str, numel: int) -> None:
        """Refuse parts that leave something out, or have it twice."""
        self._found[name].sort()
        at = 0
        for start, end, _, _ in self._found[name]:
            if start != at:
                raise ValueError(f"a part of {name!r:.100} is missing, or there twice, from {at:,}")
            at = end
        if at != numel:
            raise ValueError(f"a part of {name!r:.100} is missing, from {at:,} of {numel:,}")

    def read(self, name: str, start: int, count: int) -> Tensor:
        """A range of a tensor's numbers, in memory of their own; nothing is memory-mapped.

        Args:
            name: of the tensor.
            start: of the range in the flattened tensor.
            count: how many numbers.

        Raises:
            CheckpointError: a file cannot be read, or holds truth values other than 0 and 1.
        """
        dtype = self.tensors[name].dtype
        data = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        for begin, end, path, offset in self._found[name]:
            first, last = max(begin, start), min(end, start + count)
            if first >= last:
                continue
            try:
                with reading(path), open_regular(path) as file:
                    file.seek(offset + (first - begin) * dtype.itemsize)
                    lies = slice((first - start) * dtype.itemsize, (last - start) * dtype.itemsize)
                    read_into(file, data[lies], path)
            except ValueError as error:
                raise CheckpointError(str(error)) from error
        if dtype == torch.bool and (data > 1).any():
            raise CheckpointError(f"{name!r:.100} holds truth values other than 0 and 1")
        return data.view(dtype)

    def fill(self, name: str, part: Part) -> None:
        """Put into `part`, in place, what it is to hold of a tensor."""
        found = self.read(name, part.start, part.values.numel())
        part.values.copy_(found.reshape(part.values.shape))

    def refuse_misfit(self, weights: dict[str, Part], origin: str) -> None:
        """Compare names, shapes and kinds with those of a model that is spread, or is not.

        Raises:
            CheckpointError: they differ.
        """
        own = {
            name: torch.empty(part.shape, dtype=part.values.dtype, device="meta")
            for name, part in weights.items()
        }
        try:
            refuse_misfit(own, self.tensors, origin)
        except ValueError as error:
            raise CheckpointError(str(error)) from error


def _check_place(name: str, place: object, like: Tensor) -> tuple[int, torch.Size]:
    """The start of a part and the shape of the whole, as a file says them of `like`."""
    if (
        not isinstance(place, list)
        or not 1 <= len(place) <= MAX_DIMENSIONS + 1
        or any(type(n) is not int or n < 0 for n in place)
        or math.prod(max(n, 1) for n in place[1:]) > 2**48
    ):
        raise ValueError(f"the place of {name!r:.100} is no start and a shape")
    start, *shape = place
    if like.ndim != 1 or start + len(like) > math.prod(shape):
        raise ValueError(f"{name!r:.100} is no part of a tensor of shape {tuple(shape)}")
    return start, torch.Size(shape)
