"""Networks of .tflite files in torch: files made here, by LiteRT's answers and by numpy's."""

import numpy as np
import pytest
import torch

from pretrain.data.tflite import DTYPES, KINDS, Graph

RNG = np.random.default_rng(0)
PICTURE = RNG.normal(size=(6, 8, 4)).astype(np.float32)


# ---- writing such a file


def put(data: bytearray, value) -> int:
    """Append a table (field -> number or part), tables, numbers or text; return the place."""
    data += bytes(-len(data) % 4)
    if isinstance(value, bytes):
        place = len(data)
        data += np.uint32(len(value)).tobytes() + value + b"\0"
        return place
    if isinstance(value, np.ndarray):
        place = len(data)
        data += np.uint32(value.size).tobytes() + value.tobytes()
        return place
    if isinstance(value, list):
        place, parts = len(data), dict(enumerate(value))
        data += np.uint32(len(value)).tobytes()
        at = {i: len(data) + 4 * i for i in parts}
        data += bytes(4 * len(parts))
    else:
        fields = max(value, default=-1) + 1
        head = [4 + 2 * fields, 4 + 4 * fields]
        offsets = [4 + 4 * i if i in value else 0 for i in range(fields)]
        start, place = len(data), len(data) + sum(head[:1]) + -(4 + 2 * fields) % 4
        data += np.array(head + offsets, np.uint16).tobytes()
        data += bytes(place - len(data)) + np.int32(place - start).tobytes()
        at = {i: place + 4 + 4 * i for i in range(fields)}
        data += bytes(4 * fields)
        parts = value
    for i, part in parts.items():
        if isinstance(part, int):
            data[at[i] : at[i] + 4] = np.int32(part).tobytes()
        else:
            data[at[i] : at[i] + 4] = np.uint32(put(data, part) - at[i]).tobytes()
    return place


def tflite(tensors: list, operators: list[tuple], outputs: list[int]) -> bytes:
    """A file whose first tensor is its input.

    Args:
        tensors: shape, or values, or values with a table of sparsity and the shape, of each.
        operators: name, inputs, output, and fields of the options of each.
        outputs: numbers of tensors.
    """
    names = sorted({name for name, *_ in operators})
    numbers = {name: number for number, name in KINDS.items()}
    buffers, described = [{}], []
    for tensor in tensors:
        values, sparsity, shape = (
            tensor
            if isinstance(tensor, tuple) and len(tensor) == 3 and isinstance(tensor[0], np.ndarray)
            else (tensor, None, getattr(tensor, "shape", tensor))
        )
        kind, place = 0, 0
        if isinstance(values, np.ndarray):
            kind = next(k for k, dtype in DTYPES.items() if dtype == values.dtype)
            place = len(buffers)
            buffers.append({0: np.frombuffer(values.tobytes(), np.uint8)})
        about = {0: np.array(shape, np.int32), 1: kind, 2: place, 3: b"t"}
        described.append(about | ({6: sparsity} if sparsity else {}))
    steps = [
        {0: names.index(name), 1: np.array(ins, np.int32), 2: np.array([out], np.int32)}
        | ({3: OPTIONS[name], 4: fields} if fields else {})
        for name, ins, out, fields in operators
    ]
    graph = {0: described, 1: np.zeros(1, np.int32), 2: np.array(outputs, np.int32), 3: steps}
    codes = [{0: min(numbers[n], 127), 2: 1, 3: numbers[n]} for n in names]
    data = bytearray(8)
    data[4:8] = b"TFL3"
    place = put(data, {0: 3, 1: codes, 2: [graph], 3: b"t", 4: buffers})
    data[:4] = np.uint32(place).tobytes()
    return bytes(data)


OPTIONS = {  # the kind of each table of options, in the schema
    "CONV_2D": 1, "DEPTHWISE_CONV_2D": 2, "MAX_POOL_2D": 5, "CONCATENATION": 10, "ADD": 11,
    "RESHAPE": 17, "RESIZE_BILINEAR": 15, "DEPTH_TO_SPACE": 94,
}  # fmt: skip


def normal(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


def conv(padding, stride, activation, side=3):
    height, width = (-(-n // stride) if padding == 0 else (n - side) // stride + 1 for n in (6, 8))
    tensors = [(1, 6, 8, 4), normal(5, side, side, 4), normal(5), (1, height, width, 5)]
    options = {0: padding, 1: stride, 2: stride, 3: activation}
    return tensors, [("CONV_2D", (0, 1, 2), 3, options)]


def single(name, out, options, *more):
    return [(1, 6, 8, 4), *more, out], [(name, range(1 + len(more)), 1 + len(more), options)]


FILES = {
    "same": conv(0, 1, 0),
    "same, stride 2, relu6": conv(0, 2, 3),
    "same, even": conv(0, 2, 0, 2),
    "valid, relu": conv(1, 2, 1),
    "depthwise": single(
        "DEPTHWISE_CONV_2D", (1, 3, 4, 4), {0: 0, 1: 2, 2: 2, 3: 1, 4: 3}, normal(1, 3, 3, 4),
        normal(4),
    ),
    "add": single("ADD", (1, 6, 8, 4), {0: 1}, normal(1, 6, 8, 4)),
    "concatenation": single("CONCATENATION", (1, 6, 8, 7), {0: 3}, normal(1, 6, 8, 3)),
    "depth to space": single("DEPTH_TO_SPACE", (1, 12, 16, 1), {0: 2}),
    "logistic": single("LOGISTIC", (1, 6, 8, 4), {}),
    "max pool": single("MAX_POOL_2D", (1, 3, 4, 4), {0: 1, 1: 2, 2: 2, 3: 2, 4: 2}),
    "reshape": single("RESHAPE", (1, 24, 8), {0: np.array([1, 24, 8], np.int32)}),
    "resize": single(
        "RESIZE_BILINEAR", (1, 9, 16, 4), {2: 0, 3: 1}, np.array([9, 16], np.int32)
    ),
    "pad": single(
        "PAD", (1, 9, 9, 6), {}, np.array([[0, 0], [1, 2], [0, 1], [2, 0]], np.int32)
    ),
    "half precision": (
        [(1, 6, 8, 4), normal(5, 1, 1, 4, dtype=np.float16), normal(5), (5, 1, 1, 4), (1, 6, 8, 5)],
        [("DEQUANTIZE", (1,), 3, {}), ("CONV_2D", (0, 3, 2), 4, {1: 1, 2: 1})],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_answers_are_litert_s(name):
    runtime = pytest.importorskip("ai_edge_litert.interpreter")
    tensors, operators = FILES[name]
    data = tflite(tensors, operators, [len(tensors) - 1])
    theirs = runtime.Interpreter(model_content=data, num_threads=1)
    theirs.allocate_tensors()
    theirs.set_tensor(theirs.get_input_details()[0]["index"], PICTURE[None])
    theirs.invoke()
    expected = theirs.get_tensor(theirs.get_output_details()[0]["index"])
    (found,) = Graph(data, (0,), torch.device("cpu"))(PICTURE)
    np.testing.assert_allclose(found.transpose(0, 2, 3, 1) if found.ndim == 4 else found, expected,
                               atol=2e-5)  # fmt: skip


def test_a_convolution_by_numpy():
    tensors, operators = FILES["half precision"]
    (found,) = Graph(tflite(tensors, operators, [4]), (0,), torch.device("cpu"))(PICTURE)
    weights = tensors[1].astype(np.float32)[:, 0, 0]
    np.testing.assert_allclose(found[0].transpose(1, 2, 0), PICTURE @ weights.T + tensors[2],
                               atol=1e-5)  # fmt: skip


def sparse_weights() -> tuple[np.ndarray, np.ndarray, dict]:
    """Weights (8, 1, 1, 4) in blocks of 4 x 1: those that are not zero, and where they are."""
    blocks = [(0, 1), (0, 3), (1, 0)]  # of output channels, and input channel
    whole = np.zeros((8, 1, 1, 4), np.float32)
    values = normal(3, 4)
    for (o, i), block in zip(blocks, values, strict=True):
        whole[4 * o : 4 * o + 4, 0, 0, i] = block
    vector = lambda *numbers: {0: np.array(numbers, np.uint8)}
    levels = [
        {0: 0, 1: 2}, {0: 0, 1: 1}, {0: 0, 1: 1},
        {0: 1, 2: 3, 3: vector(0, 2, 3), 4: 3, 5: vector(1, 3, 0)}, {0: 0, 1: 4},
    ]  # fmt: skip
    about = {0: np.arange(5, dtype=np.int32), 1: np.zeros(1, np.int32), 2: levels}
    return whole, values.ravel(), about


def test_sparse_weights_are_whole_again():
    whole, values, about = sparse_weights()
    tensors = [(1, 6, 8, 4), (values, about, (8, 1, 1, 4)), normal(8), (8, 1, 1, 4), (1, 6, 8, 8)]
    operators = [("DENSIFY", (1,), 3, {}), ("CONV_2D", (0, 3, 2), 4, {1: 1, 2: 1})]
    (found,) = Graph(tflite(tensors, operators, [4]), (0,), torch.device("cpu"))(PICTURE)
    np.testing.assert_allclose(found[0].transpose(1, 2, 0),
                               PICTURE @ whole[:, 0, 0].T + tensors[2], atol=1e-5)  # fmt: skip


def test_what_leads_to_no_wanted_output_is_not_run():
    tensors = [(1, 6, 8, 4), (1, 6, 8, 4), (1, 3, 3, 3)]
    operators = [("LOGISTIC", (0,), 1, {}), ("LOGISTIC", (0,), 2, {})]  # the second cannot be
    data = tflite(tensors, operators, [1, 2])
    assert Graph(data, (0,), torch.device("cpu"))(PICTURE)[0].shape == (1, 4, 6, 8)
    with pytest.raises(ValueError, match="the file says"):
        Graph(data, (1,), torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (("LOGISTIC", (0,), 9, {}), "index"),
        (("ADD", (0, 7), 1, {0: 0}), "7"),
        (("PAD", (0, 2), 1, {}), "PAD"),
        (("RESIZE_BILINEAR", (0, 3), 1, {3: 1}), "RESIZE"),
        (("MAX_POOL_2D", (0,), 1, {0: 0, 1: 1, 2: 1, 3: 9, 4: 9}), "edge"),
        (("DEQUANTIZE", (0,), 1, {}), "weights"),
    ],
)
def test_operators_that_make_no_sense_are_refused(name, words):
    tensors = [(1, 6, 8, 4), (1, 6, 8, 4), np.full((4, 2), 2**30, np.int32),
               np.array([2**30, 2**30], np.int32)]  # fmt: skip
    with pytest.raises(ValueError, match="no network"):
        Graph(tflite(tensors, [name], [1]), (0,), torch.device("cpu"))


def test_damaged_files_are_refused_in_words(monkeypatch):
    _, values, about = sparse_weights()
    tensors = [(1, 6, 8, 4), (values, about, (8, 1, 1, 4)), normal(8), (8, 1, 1, 4), (1, 6, 8, 8)]
    operators = [("DENSIFY", (1,), 3, {}), ("CONV_2D", (0, 3, 2), 4, {1: 1, 2: 1})]
    good = tflite(tensors, operators, [4])
    monkeypatch.setitem(KINDS, 200, "SOMETHING")
    other = tflite([(1, 6, 8, 4), (1, 6, 8, 4)], [("SOMETHING", (0,), 1, {})], [1])
    monkeypatch.delitem(KINDS, 200)
    with pytest.raises(ValueError, match="kind 200"):
        Graph(other, (0,), torch.device("cpu"))
    refused = 0
    for trial in range(150):
        data = bytearray(good[: RNG.integers(len(good))] if trial % 5 == 0 else good)
        for _ in range(trial % 3 + 1):
            if data:
                data[RNG.integers(len(data))] = RNG.choice([0, 1, 127, 128, 255])
        try:
            Graph(bytes(data), (0,), torch.device("cpu"))
        except ValueError as error:
            refused += 1
            assert "no network that can be run" in str(error)
    assert refused > 40
