"""Networks of .tflite files in torch: the kinds of operators that BlazePose has, no others.

Such a file is a FlatBuffer with the layout of TensorFlow Lite's schema.fbs; the numbers of fields
below are those of that schema. Nothing in it is executed: whatever would be read lies in the file
or is refused, and so are sizes beyond limits and operators of other kinds.
"""

import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = {
    0: "ADD", 2: "CONCATENATION", 3: "CONV_2D", 4: "DEPTHWISE_CONV_2D", 5: "DEPTH_TO_SPACE",
    6: "DEQUANTIZE", 14: "LOGISTIC", 17: "MAX_POOL_2D", 22: "RESHAPE", 23: "RESIZE_BILINEAR",
    34: "PAD", 124: "DENSIFY",
}  # fmt: skip
DTYPES: dict[int, type] = {0: np.float32, 1: np.float16, 2: np.int32}
WIDTHS: dict[int, type] = {1: np.int32, 2: np.uint16, 3: np.uint8}  # of indices in sparse tensors
MOST_PARTS = 4096  # tensors, and operators
MOST_VALUES = 2**26  # of a tensor, and of all constants together


class Table:
    """A table of a FlatBuffer: fields by number, each of which may be missing.

    Args:
        data: the whole file.
        at: where the table begins.

    Raises:
        ValueError: it lies outside of the file.
    """

    def __init__(self, data: bytes, at: int):
        self.data, self.at = data, at
        self.fields = at - self._read("<i", at)
        self.size = self._read("<H", self.fields)

    def _read(self, kind: str, at: int) -> int:
        if not 0 <= at <= len(self.data) - struct.calcsize(kind):
            raise ValueError("a part lies outside of the file")
        return struct.unpack_from(kind, self.data, at)[0]

    def _place(self, field: int) -> int:
        """Where a field's content is; 0: the field is missing."""
        entry = 4 + 2 * field
        offset = self._read("<H", self.fields + entry) if entry + 2 <= self.size else 0
        return self.at + offset if offset else 0

    def number(self, field: int, kind: str = "<i", default: int = 0) -> int:
        """A whole number."""
        place = self._place(field)
        return self._read(kind, place) if place else default

    def has(self, field: int) -> bool:
        """Whether a field is there."""
        return bool(self._place(field))

    def _pointed(self, place: int) -> int:
        return place + self._read("<I", place)

    def table(self, field: int) -> "Table":
        """A table.

        Raises:
            ValueError: it is missing.
        """
        if not (place := self._place(field)):
            raise ValueError(f"field {field} of a table is missing")
        return Table(self.data, self._pointed(place))

    def vector(self, field: int, dtype: type = np.int32) -> np.ndarray:
        """Numbers; none where the field is missing."""
        if not (place := self._place(field)):
            return np.zeros(0, dtype)
        start = self._pointed(place)
        count, start = self._read("<I", start), start + 4
        if count > (len(self.data) - start) // np.dtype(dtype).itemsize:
            raise ValueError("a list of numbers lies outside of the file")
        return np.frombuffer(self.data, dtype, count, start)

    def tables(self, field: int) -> list["Table"]:
        """Tables.

        Raises:
            ValueError: there are more than `MOST_PARTS`.
        """
        offsets = self.vector(field, np.uint32)
        if len(offsets) > MOST_PARTS:
            raise ValueError(f"{len(offsets)} parts are over {MOST_PARTS}")
        if not len(offsets):
            return []
        start = self._pointed(self._place(field)) + 4
        return [Table(self.data, start + 4 * i + int(o)) for i, o in enumerate(offsets)]


def _densify(values: np.ndarray, shape: tuple[int, ...], sparsity: Table) -> np.ndarray:
    """The whole of a tensor of which a file has the blocks that are not zero.

    Levels are gone through from the outside; a level is all its indices, or some of them.
    """
    order, blocks = (sparsity.vector(field).tolist() for field in (0, 1))
    levels = sparsity.tables(2)
    dims = len(shape)
    if sorted(order) != list(range(dims + len(blocks))) or len(levels) != len(order):
        raise ValueError("a sparse tensor has levels that make no sense")
    if not {*blocks} <= {*range(dims)}:
        raise ValueError("a sparse tensor has blocks of no dimension")
    parents = np.zeros(1, np.int64)
    indices: list[np.ndarray] = []
    sizes = [1] * len(order)
    for place, level in enumerate(levels):
        if level.number(0, "<b") == 0:  # dense
            sizes[place] = size = level.number(1)
            if not 0 < size <= MOST_VALUES // max(1, len(parents)):
                raise ValueError("a sparse tensor is too large")
            index = np.tile(np.arange(size), len(parents))
            repeats = np.full(len(parents), size)
            parents = np.repeat(parents * size, size) + index
        else:
            segments, chosen = (
                level.table(field + 1).vector(0, WIDTHS[level.number(field, "<B")]).astype(int)
                for field in (2, 4)
            )
            if len(segments) < parents.max(initial=-1) + 2:
                raise ValueError("a sparse tensor has too few segments")
            starts, ends = segments[parents], segments[parents + 1]
            repeats = ends - starts
            total = int(repeats.sum())
            if (repeats < 0).any() or not 0 <= total <= len(values) or (ends > len(chosen)).any():
                raise ValueError("a sparse tensor has segments that make no sense")
            within = np.arange(total) - np.repeat(np.cumsum(repeats) - repeats, repeats)
            parents = np.repeat(starts, repeats) + within
            index = chosen[parents]
        indices = [np.repeat(one, repeats) for one in indices] + [index]
    block_of = {dim: sizes[order.index(dims + i)] for i, dim in enumerate(blocks)}
    places = [np.zeros(len(parents), np.int64) for _ in shape]
    for dim, index in zip(order, indices, strict=True):
        if dim < dims:
            places[dim] += index * block_of.get(dim, 1)
        else:
            places[blocks[dim - dims]] += index
    if parents.max(initial=0) >= len(values) or any(
        index.max(initial=0) >= size for index, size in zip(places, shape, strict=True)
    ):
        raise ValueError("a sparse tensor has values outside of it")
    whole = np.zeros(shape, values.dtype)
    whole[tuple(places)] = values[parents]
    return whole


class Graph:
    """The network of a .tflite file.

    Args:
        data: the file.
        outputs: which of its outputs are wanted; what leads to no other one is left out.
        device: where it computes.

    Raises:
        ValueError: the file is damaged, or has what this does not know.
    """

    def __init__(self, data: bytes, outputs: Sequence[int], device: torch.device):
        self.device = device
        self.weights: dict[int, Tensor] = {}
        try:
            self._load(data, outputs)
            self._run(torch.zeros(self.shapes[self.start]))  # a try
        except (ValueError, LookupError, ArithmeticError, RuntimeError, TypeError) as error:
            raise ValueError(f"no network that can be run: {str(error)[:200]}") from error
        self.weights = {i: weight.to(device) for i, weight in self.weights.items()}

    def _load(self, data: bytes, outputs: Sequence[int]) -> None:
        if data[4:8] != b"TFL3":
            raise ValueError("the file is no .tflite file")
        model = Table(data, int.from_bytes(data[:4], "little"))
        codes, graph = model.tables(1), model.tables(2)[0]
        tensors = graph.tables(0)
        self.shapes = [tuple(map(int, tensor.vector(0))) for tensor in tensors]
        constants = _constants(tensors, self.shapes, model.tables(4))
        steps: list[tuple[str, Table | None, list[int], int]] = []
        for operator in graph.tables(3):
            code = codes[operator.number(0, "<I")]
            number = max(code.number(0, "<b"), code.number(3))
            if number not in KINDS:
                raise ValueError(f"an operator of kind {number} is not known here")
            ins, outs = ([int(i) for i in operator.vector(field)] for field in (1, 2))
            if KINDS[number] not in ("DEQUANTIZE", "DENSIFY"):
                options = operator.table(4) if operator.has(4) else None
                steps.append((KINDS[number], options, ins, outs[0]))
            elif ins[0] in constants:  # half-precision weights
                constants[outs[0]] = constants[ins[0]].astype(np.float32)
            else:
                raise ValueError(f"{KINDS[number]} of something else than weights")
        self.wanted = [int(graph.vector(2)[i]) for i in outputs]
        (self.start,) = (int(i) for i in graph.vector(1))
        needed, self.steps = {*self.wanted}, steps[:0]
        for step in reversed(steps):
            if step[3] in needed:
                needed.update(step[2])
                self.steps.insert(0, step)
        self.numbers = {i: v.tolist() for i, v in constants.items() if v.dtype == np.int32}
        self.weights |= {
            i: torch.from_numpy(values.copy())
            for i, values in constants.items()
            if i in needed and values.dtype == np.float32
        }
        deep = {ins[1] for kind, _, ins, _ in self.steps if kind == "DEPTHWISE_CONV_2D"}
        for i, weight in self.weights.items():
            if weight.ndim == 4:
                order = (3, 0, 1, 2) if i in deep else (0, 3, 1, 2)
                self.weights[i] = weight.permute(order).contiguous()

    @torch.inference_mode()
    def __call__(self, picture: np.ndarray) -> list[np.ndarray]:
        """The wanted outputs for one picture, float32 (H, W, C)."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # 10 bits are too few
            found = self._run(torch.from_numpy(picture[None]).to(self.device))
        return [values.cpu().numpy() for values in found]

    def _run(self, picture: Tensor) -> list[Tensor]:
        """Pictures are (B, C, H, W) in between, and (B, H, W, C) in the file."""
        values: dict[int, Tensor] = {**self.weights, self.start: picture.permute(0, 3, 1, 2)}
        for kind, options, ins, out in self.steps:
            parts = [values[i] for i in ins if i not in self.numbers]
            numbers: list = next((self.numbers[i] for i in ins if i in self.numbers), [])
            made = values[out] = _apply(kind, options, parts, numbers, self.shapes[out])
            shape = made.permute(0, 2, 3, 1).shape if made.ndim == 4 else made.shape
            if tuple(shape) != self.shapes[out]:
                raise ValueError(f"{kind} gives {tuple(shape)}, the file says {self.shapes[out]}")
        return [values[i] for i in self.wanted]


def _constants(
    tensors: list[Table], shapes: list[tuple[int, ...]], buffers: list[Table]
) -> dict[int, np.ndarray]:
    """The tensors whose numbers are in the file."""
    found, total = {}, 0.0
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        size = float(np.prod(shape, dtype=float))
        if min(shape, default=1) < 1 or size > MOST_VALUES:
            raise ValueError(f"a tensor of shape {shape}")
        raw = buffers[tensor.number(2, "<I")].vector(0, np.uint8)
        if not len(raw):
            continue
        kind, total = tensor.number(1, "<b"), total + size
        if kind not in DTYPES or total > MOST_VALUES:
            raise ValueError(f"weights of kind {kind}, {total:.0f} so far")
        values: np.ndarray = raw.view(DTYPES[kind])
        sparse = tensor.has(6)
        found[i] = _densify(values, shape, tensor.table(6)) if sparse else values.reshape(shape)
    return found


def _apply(
    kind: str, options: Table | None, parts: list[Tensor], numbers: list, shape: tuple[int, ...]
) -> Tensor:
    """The result of one operator.

    Args:
        kind: of `KINDS`.
        options: its parameters.
        parts: its inputs, pictures as (B, C, H, W).
        numbers: its input of whole numbers.
        shape: that the result has in the file.
    """
    x = parts[0]
    if kind == "LOGISTIC":
        return x.sigmoid()
    if kind == "PAD":
        (top, bottom), (left, right), (front, back) = numbers[1:]
        if min(map(min, numbers)) < 0 or sum(map(sum, numbers)) > sum(shape):
            raise ValueError(f"PAD by {numbers}, the file says {shape}")
        return F.pad(x, (left, right, top, bottom, front, back))
    if kind == "RESHAPE":
        x = (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).reshape(shape)
        return x.permute(0, 3, 1, 2) if x.ndim == 4 else x
    if options is None:
        raise ValueError(f"{kind} has no parameters")
    if kind == "ADD":
        return _activated(x + parts[1], options.number(0, "<b"))
    if kind == "CONCATENATION":
        axis = options.number(0)
        return torch.cat(parts, (0, 2, 3, 1)[axis] if x.ndim == 4 else axis)
    if kind == "DEPTH_TO_SPACE":
        side, (batch, channels, height, width) = options.number(0), x.shape
        x = x.view(batch, side, side, channels // side**2, height, width)
        return x.permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, height * side, width * side)
    if kind == "RESIZE_BILINEAR":
        if options.number(2, "<b") or not options.number(3, "<b"):
            raise ValueError("RESIZE_BILINEAR not from the centres of pixels")
        if numbers != [*shape[1:3]]:
            raise ValueError(f"RESIZE_BILINEAR to {numbers}, the file says {shape}")
        return F.interpolate(x, numbers, mode="bilinear", align_corners=False)
    same, across, down = options.number(0, "<b") == 0, options.number(1), options.number(2)
    if kind == "MAX_POOL_2D":
        if same:
            raise ValueError("MAX_POOL_2D over the edge")
        return F.max_pool2d(x, (options.number(4), options.number(3)), (down, across))
    weight, bias = parts[1:]
    single = kind == "CONV_2D"
    if any(options.number(field, default=1) != 1 for field in ((4, 5) if single else (3, 5, 6))):
        raise ValueError(f"{kind} with gaps or of several channels each")
    if same:
        edges: list[int] = []
        for size, span, step in zip(x.shape[2:], weight.shape[2:], (down, across), strict=True):
            more = max((-(-size // step) - 1) * step + span - size, 0)
            edges = [more // 2, more - more // 2, *edges]  # the last dimension first
        x = F.pad(x, edges)
    x = F.conv2d(x, weight, bias, (down, across), groups=1 if single else x.shape[1])
    return _activated(x, options.number(3 if single else 4, "<b"))


def _activated(x: Tensor, kind: int) -> Tensor:
    if kind not in (0, 1, 3):
        raise ValueError(f"an activation of kind {kind} is not known here")
    return x if kind == 0 else x.relu() if kind == 1 else x.clamp(0, 6)
