"""Weights files: the only module that reads and writes them, and never executes what is in them.

A file of weights may come from anybody. Before its tensors are read, it is checked: a regular file,
with a small and well-formed header and tensors that fill it exactly. Reading then takes as much
memory as the file has bytes. Every refusal is a `ValueError` that names the file and the reason.
"""

import argparse
import hashlib
import io
import json
import math
import os
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain.files import (
    open_regular,
    read_json,
    reading,
    share,
    sync,
    without_repeats,
)
from pretrain.inert import Call, Name, Stored, read_inert
from pretrain.names import first_line, first_of

# What a weight, a buffer or a moment of an optimizer is, under safetensors' names.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# A tensor takes about 100 bytes of the header, so this admits 40,000 tensors, ten times those of
# the largest models here; parsed, they take 100 MB. safetensors' own limit, 100 MB, would take
# gigabytes.
MAX_HEADER = 4 * 2**20
MAX_DIMENSIONS = 16


def sha256(path: Path) -> str:
    """Hash of a regular file's bytes, hexadecimal.

    Raises:
        ValueError: it cannot be read, or is not a regular file.
    """
    with reading(path), open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message says which, why and the remedy."""


class MisfitError(ValueError):
    """Weights are of another model; the message says in what."""


def refuse_misfit(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], origin: str) -> None:
    """Compare names, shapes and kinds of numbers; meta tensors will do.

    Raises:
        ValueError: a tensor of `own` is missing in `theirs` or has another shape, whole numbers
            stand for floating ones or the reverse, or something is left over.
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
        raise MisfitError(f"{origin} does not fit the model: {first_of(problems, 5, '; ')}")


def read_safetensors(path: Path, expected: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own.

    Nothing is memory-mapped: a file that shrinks while it is mapped would kill the process.

    Args:
        path: of a regular file.
        expected: names, shapes and kinds that it must have, such as a model's `state_dict()`, on
            the meta device if one likes; compared before the first tensor is read. None: whatever
            it holds.

    Raises:
        ValueError: it cannot be read, is damaged, is not such a file or does not hold what is
            expected.
    """
    with reading(path), open_regular(path) as file:
        try:
            offsets, found, _ = read_header(file)
        except ValueError as error:
            raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
        if expected is not None:
            refuse_misfit(expected, found, str(path))
        # Linux may grant more memory than there is, and kill the process when it is filled.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        size = os.fstat(file.fileno()).st_size
        if size > memory:
            raise ValueError(f"{path} takes {size:,} bytes of memory, this machine has {memory:,}")
        tensors = {}
        for name in offsets:
            like = found[name]
            try:
                data = torch.empty(like.numel() * like.element_size(), dtype=torch.uint8)
            except RuntimeError as error:
                raise ValueError(f"{path} does not fit into memory: {error}") from error
            read_into(file, data, path)
            if like.dtype == torch.bool and (data > 1).any():
                raise ValueError(f"{path}: {name!r:.100} holds truth values other than 0 and 1")
            tensors[name] = data.view(like.dtype).reshape(like.shape)
    return tensors


def read_into(file: io.BufferedReader, data: Tensor, path: Path) -> None:
    """Fill a tensor of bytes from where a file stands.

    Raises:
        ValueError: the file ends before.
    """
    view = data.numpy().data
    read = file.readinto(view)
    if read != len(view):
        raise ValueError(f"{path} became shorter while it was read")


def read_header(
    file: BinaryIO,
) -> tuple[dict[str, int], dict[str, Tensor], dict[str, str]]:
    """Check a whole safetensors file but for its numbers, and stop before them.

    Returns:
        where in the file the data of each name begin, in their order; a meta tensor of each, in the
        order of the header; and the metadata.

    Raises:
        ValueError: the file is damaged or none of that kind.
    """
    size = os.fstat(file.fileno()).st_size
    if size < 10:
        raise ValueError(f"{size} bytes are too few")
    length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_HEADER, size - 8):
        raise ValueError(
            f"its header claims {length:,} bytes; the file has {size:,}, and {MAX_HEADER:,} are "
            "the limit"
        )
    raw = file.read(length)
    if len(raw) != length or not raw.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    try:
        header = json.loads(raw.decode(), object_pairs_hook=without_repeats)
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
    return {name: 8 + length + ends[name][0] for name in order}, found, about


def _check_entry(entry: object) -> tuple[tuple[int, int], Tensor]:
    """The offsets of a tensor's data, and a meta tensor like it."""
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


# ------------------------------------------------------------------------------- folders of weights

# What a manifest lists: of a checkpoint, or of an export.
WHOLE = (
    {"model.safetensors", "optimizer.safetensors", "state.json"},
    {"model.safetensors", "config.json"},
)
MOST_WRITERS = 4096  # processes that may have written one checkpoint


def file_of(kind: str, place: int, processes: int) -> str:
    """The file of one of several processes: `model-00001-of-00002.safetensors` of place 0."""
    return f"{kind}-{place + 1:05d}-of-{processes:05d}.safetensors"


def _is_whole(names: Set[str]) -> bool:
    """Whether these are all files of a checkpoint or of an export."""
    count = (len(names) - 1) // 2
    if names in WHOLE or not 0 < count <= MOST_WRITERS:
        return names in WHOLE
    kinds = ("model", "optimizer")
    return names == {"state.json"} | {file_of(k, i, count) for k in kinds for i in range(count)}


@contextmanager
def filling(folder: Path, needed: int) -> Iterator[None]:
    """Raise CheckpointError where a folder of weights cannot be written.

    Args:
        folder: it need not be there yet.
        needed: bytes that it will take.
    """
    try:
        free = shutil.disk_usage(folder.parent).free
        if free < needed * 1.01 + 2**20:
            raise OSError(f"{needed:,} bytes are needed and {free:,} are free")
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {folder.parent}: {error}. What was saved before is intact: make room "
            "there and start the same command again"
        ) from error


def write_tensors(
    path: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None
) -> str:
    """Write a safetensors file, wait until it is on the disk, and return its hash.

    Args:
        path: of the file.
        tensors: on the CPU, contiguous.
        about: its metadata, if it has any.
    """
    save_file(tensors, path, *([about] if about else []))
    share(path)
    sync(path)
    return sha256(path)


def seal_folder(folder: Path, texts: dict[str, dict], digests: dict[str, str]) -> None:
    """Write the JSON files of a folder of weights and its manifest; all is on the disk then.

    Args:
        folder: that has its safetensors files.
        texts: content of the JSON files, by name without suffix.
        digests: hashes of the safetensors files, by name.
    """
    for name, content in texts.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content, indent=1))
        sync(path)
        digests = digests | {path.name: sha256(path)}
    # The manifest comes last: a folder without a matching one is not a checkpoint.
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(dict(sorted(digests.items())), indent=1))
    sync(manifest)
    sync(folder)


def write_folder(
    folder: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, dict]
) -> None:
    """Write safetensors and JSON files and their manifest into a new folder, each synced.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with filling(folder, size_of(t for group in tensors.values() for t in group.values())):
            folder.mkdir()
            names = {f"{kind}.safetensors": group for kind, group in tensors.items()}
            digests = {name: write_tensors(folder / name, group) for name, group in names.items()}
            seal_folder(folder, texts, digests)
    except CheckpointError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def verify_folder(folder: Path) -> list[str]:
    """Check that every file of a checkpoint or an export is there with its recorded hash.

    Returns:
        their names.

    Raises:
        CheckpointError: one is not.
    """
    try:
        manifest = read_json(folder / "manifest.json")
        if not _is_whole(manifest.keys()):
            raise ValueError(
                f"its manifest lists {', '.join(map(ascii, manifest))[:200] or 'nothing'}"
            )
        bad = [n for n, digest in manifest.items() if sha256(folder / n) != digest]
    except ValueError as error:
        raise CheckpointError(f"{folder} is incomplete: {error}") from error
    if bad:
        raise CheckpointError(
            f"{folder} is corrupt: {', '.join(bad)[:200]} does not match its recorded hash"
        )
    return sorted(manifest)


# -------------------------------------------------------------------------- dicts of weights


def load_strict(model: nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Load weights with nothing missing, nothing left over and every shape equal."""
    own = model.state_dict()
    try:
        refuse_misfit(own, weights, origin)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    model.load_state_dict(weights)


def weights_hash(model: nn.Module) -> str:
    """Hash of all weights and buffers, independent of device and file format."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


# What training programs put a dict of weights under, and around their names.
_UNDER = ("state_dict", "model_state_dict", "model_state", "model", "module")
_WRAPPER = re.compile(r"^((_orig_mod|module|backbone)\.)+")
_OUTERMOST = {"model", "net", "network", "encoder"}  # taken off only where every name begins so


def unwrap(content: Mapping[str, object]) -> dict[str, object]:
    """A dict of weights as their model calls them.

    Taken off are the dicts around it (`{"state_dict": ...}`) and what wrappers put before names
    (`module.`, `backbone.`).

    Args:
        content: as a file of weights holds it.

    Raises:
        ValueError: a weight is there twice, with and without a wrapper's name.
    """
    while under := [inner for k in _UNDER if isinstance(inner := content.get(k), dict)]:
        content = under[0]
    names = {name: _WRAPPER.sub("", name) for name in content if isinstance(name, str)}
    while len(first := {name.partition(".")[0] for name in names.values()}) == 1:
        if not first <= _OUTERMOST or not all("." in name for name in names.values()):
            break
        names = {name: short.partition(".")[2] for name, short in names.items()}
    if len(set(names.values())) < len(names):
        twice = next(n for n, count in Counter(names.values()).items() if count > 1)
        raise ValueError(f"{twice!r:.100} is there twice, with and without a wrapper's prefix")
    return {names.get(name, name): value for name, value in content.items()}


# ------------------------------------------------------------------------------- torch's files

_STORAGES = {
    "torch.DoubleStorage": 8, "torch.FloatStorage": 4, "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2, "torch.LongStorage": 8, "torch.IntStorage": 4,
    "torch.ShortStorage": 2, "torch.CharStorage": 1, "torch.ByteStorage": 1,
    "torch.BoolStorage": 1,
}  # fmt: skip
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_OPTIONS, _ORDERED = "argparse.Namespace", "collections.OrderedDict"
# A training state may hold these besides.
_PLAIN = {_ORDERED, "collections.Counter", "torch.Size", "torch.device"}
_ADMITTED = {*_STORAGES, _TENSOR, _PARAMETER, _OPTIONS, *_PLAIN}
# Bytes of a file that are not numbers; a ViT-g with its optimizer has 1 MB.
_MAX_PICKLE = 64 * 2**20


def load_torch_file(path: Path) -> dict:
    """Read a third-party .pth: plain dense tensors, nothing in it is executed.

    torch.load admits more than weights need: sparse tensors, tensors that repeat one number a
    billion times, storages longer than the file. So its pickle is checked first
    (`pretrain/inert.py`), and torch reads it only if every tensor is a part of numbers that are in
    the file. Official VideoMAE files hold their command line as an argparse.Namespace; it is
    admitted.

    Raises:
        ValueError: the file is not such a file, or holds anything else.
    """
    with reading(path), open_regular(path) as file:
        try:
            _check_torch(file)
            file.seek(0)
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(file, map_location="cpu", weights_only=True)
            _refuse_endless(content)
        except Exception as error:  # zipfile and torch raise many kinds; all mean the same here
            reason = first_line(error)
            if " names " in f" {reason}":
                remedy = "whoever made it can save model.state_dict() alone, or safetensors"
                reason = f"{reason:.500}; {remedy}"
            raise ValueError(f"{path} is not a file of plain tensors: {reason:.600}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    # An OrderedDict may carry attributes, and those could stand for its methods.
    return {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}


def _refuse_endless(content: object) -> None:
    """Refuse dicts and lists that are nested deeper than those of any weights, or in themselves.

    Raises:
        ValueError: they are.
    """
    level = {id(content): content} if isinstance(content, dict | list | tuple) else {}
    for _ in range(64):
        inner = [
            x
            for node in level.values()
            for x in (node.values() if isinstance(node, dict) else node)
        ]
        level = {id(x): x for x in inner if isinstance(x, dict | list | tuple)}
        if not level:
            return
    raise ValueError("its dicts are nested without end")


def _check_torch(file: BinaryIO) -> None:
    """Refuse a torch file whose tensors are not plain, dense and within the file.

    Raises:
        ValueError: the file is not so.
    """
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise ValueError("it is empty")
    if file.read(4) == b"PK\3\4":
        with zipfile.ZipFile(file) as archive:
            lengths = _check_zip(archive, size)
            names = [n for n in lengths if n == "data.pkl" or n.endswith("/data.pkl")]
            if len(names) != 1 or lengths[names[0]] > _MAX_PICKLE:
                raise ValueError("it holds no data.pkl of a sensible length")
            name = names[0]
            tree = read_inert(io.BytesIO(archive.read(name)), _ADMITTED)
            folder = name.removesuffix("data.pkl")
            _check_tensors(tree, size, lambda key: lengths.get(f"{folder}data/{key}", -1))
        return
    # Before torch 1.6: magic number, version, system, content, the storages' keys, the numbers.
    file.seek(0)
    head = io.BytesIO(file.read(_MAX_PICKLE))
    parts = [read_inert(head, _ADMITTED) for _ in range(5)]
    keys = parts[4]
    if (
        parts[0] != torch.serialization.MAGIC_NUMBER
        or type(keys) is not list
        or any(type(k) is not str for k in keys)
    ):
        raise ValueError("it is no file of torch")
    used = _check_tensors(parts[3], size, lambda key: None)
    if {*used} != {*keys} or sum(used.values()) + 8 * len(keys) > size - head.tell():
        raise ValueError("its storages are not those that its tensors name")


def _check_zip(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """The length of each member; nothing may be compressed, nothing may be there twice."""
    lengths = {m.filename: m.file_size for m in archive.infolist()}
    if len(lengths) != len(archive.infolist()):
        raise ValueError("two members have one name")
    if any(m.compress_type or m.compress_size != m.file_size for m in archive.infolist()):
        raise ValueError("it is compressed, which torch's files never are")
    if sum(lengths.values()) > size:
        raise ValueError("its members are longer than the file")
    return lengths


def _check_tensors(tree: object, size: int, length: Callable[[str], int | None]) -> dict[str, int]:
    """Check every call in the pickle of a torch file.

    Args:
        tree: as `read_inert` gave it.
        size: of the file, bytes.
        length: bytes of the storage of a key; None: not known before the storages are read.

    Returns:
        the bytes of each storage that is used.
    """
    used: dict[str, int] = {}
    total, seen, open_ = 0, set(), [tree]
    while open_:
        node = open_.pop()
        if isinstance(node, dict | list | tuple | Call):
            # Tensors are counted as often as they are named, containers are visited once.
            if id(node) in seen and not _is_tensor(node):
                continue
            seen.add(id(node))
        if type(node) is dict:
            named = [k for k, v in node.items() if _is_tensor(v)]
            if any(type(k) is not str for k in named):
                raise ValueError("a tensor has a number for its key instead of a name")
            open_.extend(node.values())
        elif type(node) is list or type(node) is tuple:
            open_.extend(node)
        elif type(node) is Call:
            if _is_tensor(node):
                total += _check_tensor(node, used, length)
            elif node.function == _OPTIONS:
                if node.arguments or node.items or type(node.state) is not dict:
                    raise ValueError("its options are not plain names and values")
                open_.append(node.state)
            elif not _is_plain(node):
                raise ValueError(f"it makes a {node.function} in a way that weights do not need")
            else:
                open_ += [node.arguments, node.items]
        elif type(node) is Stored:
            raise ValueError("it holds numbers that are no tensor")
    # Two names may share a storage, as tied weights do; a thousand would take a thousand times the
    # memory of the file.
    if max(total / 2, sum(used.values())) > size:
        raise ValueError(f"its tensors take {total:,} bytes and the file has {size:,}")
    return used


def _is_tensor(node: object) -> bool:
    return type(node) is Call and node.function in (_TENSOR, _PARAMETER)


def _is_plain(node: Call) -> bool:
    """Whether a call is one that torch's own writer makes, with arguments that do no harm."""
    if node.state is not None and (
        node.function != _ORDERED or type(node.state) is not dict or {*node.state} != {"_metadata"}
    ):
        return False
    kinds = [type(a) for a in node.arguments]
    if node.function == "torch.Size":
        return kinds == [tuple] and all(type(n) is int for n in node.arguments[0])
    allowed = {
        _ORDERED: ([],),
        "collections.Counter": ([dict],),
        "torch.device": ([str], [str, int]),
    }
    return kinds in allowed.get(node.function, ())


def _check_tensor(node: Call, used: dict[str, int], length: Callable[[str], int | None]) -> int:
    """Check the arguments of one tensor, enter its storage in `used`, and return its bytes."""
    if node.state is not None or node.items:
        raise ValueError("it changes a tensor that is complete")
    if node.function == _PARAMETER:
        inner, grad, hooks = _arguments(node, 3)
        if type(inner) is not Call or inner.function != _TENSOR or type(grad) is not bool:
            raise ValueError("a parameter is not made of a tensor")
        _check_hooks(hooks)
        return _check_tensor(inner, used, length)
    stored, offset, shape, stride, grad, hooks = _arguments(node, 6)
    _check_hooks(hooks)
    about = stored.key if type(stored) is Stored else None
    if type(about) is not tuple or len(about) not in (5, 6) or about[0] != "storage":
        raise ValueError("a tensor is not made of a storage")
    kind, key, place, count = about[1:5]
    if type(kind) is not Name or kind.path not in _STORAGES:
        raise ValueError("a storage is of no known kind")
    if type(key) is not str or type(place) is not str or about[5:] not in ((), (None,)):
        raise ValueError("a storage is described in no known way")
    lengths = (count, offset, *shape, *stride) if type(shape) is type(stride) is tuple else (None,)
    if any(type(n) is not int or not 0 <= n < 2**48 for n in lengths) or type(grad) is not bool:
        raise ValueError("a tensor's shape is out of all proportion")
    itemsize, numbers = _STORAGES[kind.path], math.prod(shape)
    if used.setdefault(key, count * itemsize) != count * itemsize:
        raise ValueError(f"storage {key!r:.50} has two lengths")
    if length(key) not in (None, count * itemsize):
        raise ValueError(f"storage {key!r:.50} is not as long in the file as in its description")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if len(shape) > MAX_DIMENSIONS or (numbers and not last < count) or numbers > count:
        raise ValueError(
            f"a tensor of shape {shape!r:.80} is not dense: its storage has {count:,} numbers"
        )
    if not numbers and math.prod(max(n, 1) for n in shape) > 2**48:
        raise ValueError("a tensor's shape is out of all proportion")
    return numbers * itemsize


def _arguments(node: Call, count: int) -> tuple:
    if len(node.arguments) != count:
        raise ValueError(f"it gives {node.function} {len(node.arguments)} arguments")
    return node.arguments


def _check_hooks(hooks: object) -> None:
    """What would be called in a backward pass must be empty."""
    if type(hooks) is not Call or hooks.function != _ORDERED:
        raise ValueError("a tensor brings hooks along")
    if hooks.arguments or hooks.items or hooks.state is not None:
        raise ValueError("a tensor brings hooks along")
