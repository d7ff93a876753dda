"""Damages the files of a case believably: lengths, checksums and syntax are put right again."""

import copy
import io
import json
import random
import re
import struct
import zipfile
from xml.sax.saxutils import escape

Files = dict[str, bytes]  # name inside the case's folder -> content

NUMBERS = (
    0,
    1,
    2,
    7,
    127,
    255,
    256,
    2**15,
    2**16 - 1,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63,
    2**64 - 1,
)
TEXTS = (
    "", " ", "a", "0", "-1", "1e999", "nan", "\u00b2", "\u0664", "9" * 5000, "x" * 5000, "a.mp4",
    "/dev/zero", "/etc/passwd", "../outside/secret", "../outside/secret.mp4", "../../x",
    "file:a.mp4", "pipe:cat a.mp4", "http://127.0.0.1/a.mp4", "hf-hub:owner/name", "local-dir:.",
    "{0..999999999}.mp4", "$(touch x)", "`id`", "=1+1", "\x1b[2J", "\0", "\u2028",
    "\ufeff", "null", '"', "'", ",", ";", "\t", "\r", "\n", "1-2 a; 1.5-3 b", "{}", "{}{}", "[",
    "a" + "\u0301" * 100,
)  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 1, 2, 3, 0.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63,
    2**64, 10**30, -(10**9), 1280000, *TEXTS, "\ud800", [], {}, [[]], [None], [0], [-1, 2**62],
    {"": ""}, {"a": 1}, list(range(2000)),
)  # fmt: skip
KEYS = (
    "",
    "a",
    "path",
    "size",
    "__class__",
    "../x",
    "trust_remote_code",
    "hf_model_name",
    "timm_model_name",
    "tokenizer_kwargs",
)
KEYS += (
    "hf_tokenizer_name", "custom_text", "builder", "arguments", "config", "model", "__metadata__",
    "segments",
)  # fmt: skip
PICKLE = (
    b"cos\nsystem\n", b"(S'touch x'\ntR", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n",
    b"c_codecs\nencode\n", b"b", b"R", b"\x81",
    b"\x8e" + b"\xff" * 7 + b"\x3f", b"(", b"t", b"}", b"]", b"s", b"u", b"e", b"a", b"0", b".",
    b"N", b"K\x01", b"G" + b"\xff" * 8,
    b"\x8a\xff", b"h\x00", b"j\xff\xff\xff\xff", b"I01\n", b"C\xff", b"X\xff\xff\xff\x7f",
    b"\x80\x05", b"Q", b"P1\n", b"\x93", b"cbuiltins\neval\n",
)  # fmt: skip


def mutated(files: Files, rng: random.Random) -> Files:
    """A case with one to four damages, each to one of its files."""
    files = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        name = rng.choice(sorted(files))
        data = files[name]
        ending = name.rpartition(".")[2]
        structured = rng.random() < 0.8
        if structured and ending in ("json", "jsonl"):
            data = _json_lines(data, rng) if ending == "jsonl" else _json(data, rng)
        elif structured and ending in ("csv", "tsv", "txt", "list"):
            data = _text(data, rng)
        elif structured and ending in ("xml", "eaf"):
            data = _xml(data, rng)
        elif structured and ending == "tar":
            data = _tar(data, rng)
        elif structured and ending == "safetensors":
            data = _safetensors(data, rng)
        elif structured and ending in ("pth", "pt"):
            data = _zip(data, rng)
        elif structured and ending == "ckpt":
            data = _pickle(data, rng)
        else:
            data = _bytes(data, rng)
        files[name] = data[: 2**20]
    return files


def _bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data or b"\0")
    at = rng.randrange(len(out))
    length = rng.choice((1, 2, 4, 16, 256, 4096))
    match rng.randrange(9):
        case 0:
            return bytes(out[:at])
        case 1:
            for _ in range(rng.choice((1, 10, 100))):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case 2:
            out[at : at + length] = bytes(min(length, len(out) - at))
        case 3:
            out[at:at] = rng.randbytes(length)
        case 4:
            del out[at : at + length]
        case 5:  # a number where a size, count or offset may be
            at = rng.randrange(min(len(out), 2048))
            width, order = rng.choice((1, 2, 4, 8)), rng.choice(("big", "little"))
            number = rng.choice(NUMBERS) % 256**width
            out[at : at + width] = number.to_bytes(width, order)
        case 6:
            start = rng.randrange(len(out))
            out[at:at] = out[start : start + length]
        case 7:
            out[at : at + 1] = rng.choice(TEXTS).encode()
        case 8:
            for _ in range(8):
                out[rng.randrange(min(1024, len(out)))] = rng.randrange(256)
    return bytes(out)


def _places(value: object) -> list[tuple[dict | list, object]]:
    """Every (container, key) inside a JSON value."""
    found, todo = [], [value]
    while todo:
        inner = todo.pop()
        keys = (
            inner
            if isinstance(inner, dict)
            else range(len(inner))
            if isinstance(inner, list)
            else ()
        )
        found += [(inner, key) for key in keys]
        todo += [inner[key] for key in keys]
    return found


def json_value(value: object, rng: random.Random) -> object:
    """A JSON value with one change somewhere inside."""
    value = copy.deepcopy(value)
    places = _places(value)
    if not places or rng.random() < 0.03:
        return copy.deepcopy(rng.choice(VALUES))
    inner, key = rng.choice(places)
    old = inner[key]
    match rng.randrange(7):
        case 0 | 1:
            inner[key] = copy.deepcopy(rng.choice(VALUES))
        case 2:
            del inner[key]
        case 3:
            if isinstance(inner, dict):
                inner[rng.choice(KEYS)] = copy.deepcopy(rng.choice((old, rng.choice(VALUES))))
            else:
                inner.append(copy.deepcopy(old))
        case 4:
            numbers = [(i, k) for i, k in places if type(i[k]) in (int, float)]
            if numbers:
                inner, key = rng.choice(numbers)
                old = inner[key]
                inner[key] = rng.choice(
                    (
                        -old,
                        old + 1,
                        old - 1,
                        old * 2,
                        old * 1000,
                        old * 10**6,
                        old + 0.5,
                        0,
                        str(old),
                    )
                )
        case 5:
            inner[key] = rng.choice(([old], {"a": old}, str(old), [old] * 3))
        case 6:
            other, there = rng.choice(places)
            inner[key] = copy.deepcopy(other[there])
    return value


def _json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.04:
        return rng.choice(
            (
                b"",
                b"{",
                b"[" * 100_000,
                b"1" * 5000,
                b"null",
                b"[]",
                b'{"a":1}',
                b"\xff\xfe{",
                b'"\\ud800"',
            )
        )
    try:
        return json.dumps(json_value(json.loads(data), rng)).encode()
    except (ValueError, RecursionError):  # it is broken already
        return _bytes(data, rng)


def _json_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True) or [b"\n"]
    i = rng.randrange(len(lines))
    match rng.randrange(8):
        case 0:
            lines.insert(i, lines[i])
        case 1:
            del lines[i]
        case 2:
            lines[i] = lines[i].rstrip(b"\n")
        case _:
            lines[i] = _json(lines[i], rng) + b"\n"
    return b"".join(lines)


def _text(data: bytes, rng: random.Random) -> bytes:
    text = data.decode("utf-8", "surrogateescape")
    lines = text.split("\n")
    i = rng.randrange(len(lines))
    separator = next((s for s in "\t,; " if s in lines[i]), " ")
    cells = lines[i].split(separator)
    j = rng.randrange(len(cells))
    match rng.randrange(8):
        case 0 | 1 | 2:
            cells[j] = rng.choice(TEXTS)
        case 3:
            cells.insert(j, rng.choice(TEXTS))
        case 4:
            del cells[j]
        case 5:
            return "\n".join([*lines[: i + 1], *lines[i:]]).encode("utf-8", "surrogateescape")
        case 6:
            return text.encode(rng.choice(("utf-16", "utf-8-sig", "utf-8")), "replace")
        case 7:
            separator = rng.choice("\t,; \r\x0b\x85")
    lines[i] = separator.join(cells)
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def _xml(data: bytes, rng: random.Random) -> bytes:
    """An attribute, a text or a whole element is another one, is gone, or is there twice."""
    text = data.decode("utf-8", "surrogateescape")
    kinds = (r'(?<=")[^"<>]*(?=")', r"(?<=>)[^<>]+(?=<)", r"<(\w+)[^<>]*(?:/>|>[^<>]*</\1>)",
             r'\s\w+="[^"]*"')  # fmt: skip
    kind = rng.choice(kinds)
    found = list(re.finditer(kind, text))
    if not found:
        return _bytes(data, rng)
    one = rng.choice(found)
    other = rng.choice(found)[0] if rng.random() < 0.3 else escape(rng.choice(TEXTS), {'"': "'"})
    new = other if kind in kinds[:2] else rng.choice(("", one[0] * 2))
    return f"{text[: one.start()]}{new}{text[one.end() :]}".encode("utf-8", "surrogatepass")


def _checksum(header: bytes) -> int:
    return sum(header) - sum(header[148:156]) + 8 * 32


def _tar(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    starts = [
        at for at in range(0, len(out) - 511, 512)
        if any(out[at : at + 512]) and out[at + 257 : at + 262] == b"ustar"
    ]  # fmt: skip
    if not starts:
        return _bytes(data, rng)
    at = rng.choice(starts)
    header = out[at : at + 512]
    match rng.randrange(6):
        case 0 | 1:
            size = rng.choice((
                b"%011o\0" % (rng.choice(NUMBERS) % 8**11),
                b"\x80" + rng.choice(NUMBERS).to_bytes(11, "big"), b"\xff" * 12, b"0x10".ljust(12),
                b"-1".ljust(12), "\u00b2".encode().ljust(12), b"0_1".ljust(12), bytes(12),
            ))  # fmt: skip
            header[124:136] = size
        case 2:
            name = rng.choice(
                (*TEXTS, "a.mp4", "/etc/x", "." * 100, "a/../../b.mp4", ".json", "x.mp4.json")
            ).encode()
            header[0:100] = name[:100].ljust(100, b"\0")
        case 3:
            header[156] = rng.choice(b"0\x001234567LKxgSDV\xff")
        case 4:
            header[rng.randrange(512)] = rng.randrange(256)
        case 5:  # an extended header before it
            key = rng.choice(
                (
                    b"size",
                    b"size",
                    b"path",
                    b"GNU.sparse.size",
                    b"mtime",
                    b"linkpath",
                    b"hdrcharset",
                )
            )
            value = rng.choice(
                (
                    b"9" * 5000,
                    "\u00b2".encode(),
                    rng.choice(TEXTS).encode("utf-8", "surrogatepass"),
                    b"%d" % rng.choice(NUMBERS),
                    b"\xff\xfe",
                )
            )
            record = b" %s=%s\n" % (key, value)
            length = len(record) + len(str(len(record) + 3))
            length = rng.choice(
                (str(length).encode(),) * 6 + (b"0", b"9" * 5000, b"-1", "\u00b2".encode(), b"7")
            )
            body = length + record
            pax = bytearray(512)
            pax[0:1], pax[124:136], pax[156:157] = (
                b"x",
                b"%011o\0" % len(body),
                rng.choice((b"x", b"x", b"x", b"g", b"L", b"K")),
            )
            pax[257:265] = b"ustar\x0000"
            pax[148:156] = b"%06o\0 " % _checksum(bytes(pax))
            out[at:at] = pax + body + bytes(-len(body) % 512)
            return bytes(out)
    if rng.random() < 0.9:
        header[148:156] = b"%06o\0 " % _checksum(bytes(header))
    out[at : at + 512] = header
    return bytes(out)


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    if len(data) < 8:
        return _bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.15:
        return rng.choice(NUMBERS).to_bytes(8, "little") + data[8:]
    header = _json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _pickle(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data or b".")
    at = rng.randrange(min(len(out), 4096))
    match rng.randrange(4):
        case 0 | 1:
            out[at:at] = rng.choice(PICKLE)
        case 2:
            out[at : at + rng.choice((1, 2, 5))] = rng.choice(PICKLE)
        case 3:
            return _bytes(bytes(out), rng)
    return bytes(out)


def _zip(data: bytes, rng: random.Random) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # it is broken already, or never was one
        return _pickle(data, rng)
    name = rng.choice(sorted(entries))
    pickled = [n for n in entries if n.endswith("data.pkl")]
    match rng.randrange(6):
        case 0:
            del entries[name]
        case 1:
            entries[rng.choice(("../x", "/x", "a/data.pkl", "archive/constants.pkl"))] = entries[
                name
            ]
        case 2:
            entries[name] = _bytes(entries[name], rng)
        case _ if pickled:
            entries[pickled[0]] = _pickle(entries[pickled[0]], rng)
    out = io.BytesIO()
    with zipfile.ZipFile(
        out, "w", rng.choice((zipfile.ZIP_STORED,) * 5 + (zipfile.ZIP_DEFLATED,))
    ) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()
