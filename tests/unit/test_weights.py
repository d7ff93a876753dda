"""Files of weights that are damaged, or made to do harm: each is refused with its reason."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pretrain.weights import read_safetensors, sha256

ROOT = Path(__file__).resolve().parents[2]


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
        with pytest.raises(ValueError, match="not a valid safetensors file"):
            read_safetensors(path)


@pytest.mark.parametrize("read", [read_safetensors, sha256])
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
    """The files are sparse: a terabyte that takes no room on the disk, and would take all memory."""
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


def in_little_memory(code: str, *arguments: object) -> str:
    """What a process says that may hold 300 MB more than it does after importing torch."""
    limit = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from pretrain.weights import read_safetensors, load_torch_file\n"
        "held = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + 300 * 2**20,) * 2)\n"
        "try:\n    " + code + "\n    print('read')\nexcept ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", limit, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


@needs_proc
def test_a_header_costs_little_and_a_lack_of_memory_is_said(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(b'{"a":[' + b"[]," * 1_300_000 + b"[]]}", b""))
    assert "not described" in in_little_memory("read_safetensors(Path(sys.argv[1]))", path)
    size = 2**29
    path.write_bytes(safetensors({"a": entry("U8", (size,), (0, size))}, b""))
    os.truncate(path, path.stat().st_size + size)
    assert "memory" in in_little_memory("read_safetensors(Path(sys.argv[1]))", path)
