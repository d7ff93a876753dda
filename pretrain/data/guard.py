"""The gate before libavformat: what a file's first bytes are, and whether its claims can be true.

Nothing is decoded here and no table is built, so that a hostile file costs nothing.
"""

import io
import struct


class Refused(Exception):
    """The file cannot be used; the message says why. `retry`: the machine may be to blame."""

    def __init__(self, reason: str, retry: bool = False):
        super().__init__(reason)
        self.retry = retry


MAX_PIXELS = 4096 * 4096  # in a frame
# A black video of 3840x2160 has 30,000 pixels a byte, black or still slides of 1920x1080 have 6,000
# to 20,000 (x264, a keyframe every 250 frames); real clips have 20 to 130. A GIF of 4000x4000 whose
# frames change one pixel has 700,000.
PIXELS_A_BYTE = 100_000
FREE_PIXELS = 2**35  # half a minute of decoding


def too_many_pixels(pixels: int, size: int) -> bool:
    """Whether all frames together have far more pixels than so many bytes can describe."""
    return pixels > FREE_PIXELS + PIXELS_A_BYTE * size


def check_container(file: io.BufferedIOBase) -> str:
    """The name of the one demuxer that may read this file.

    Args:
        file: the payload, seekable.

    Returns:
        A libavformat name: mov, matroska, avi, mpeg, mpegvideo, h264, mpegts, gif, flv, asf or ogg.

    Raises:
        Refused: it is no video we know, it is cut short, or it claims more than it holds.
    """
    total = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(1024)
    file.seek(0)
    if not head:
        raise Refused("the file is empty")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"):
        _check_boxes(file, 0, total, total)
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        _check_ebml(head, total)
        return "matroska"
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        claimed = int.from_bytes(head[4:8], "little") + 8
        if claimed > total + 1:  # some writers count the padding byte they did not write
            raise Refused(f"is cut short: {total} bytes of {claimed}")
        return "avi"
    if head[:4] == b"\0\0\1\xba":
        return "mpeg"
    if head[:4] == b"\0\0\1\xb3":
        return "mpegvideo"
    unit = head.lstrip(b"\0")
    if (
        head[:3] in (b"\0\0\0", b"\0\0\1")
        and unit[:1] == b"\1"
        and unit[1:2] in (b"\x09", b"\x27", b"\x47", b"\x67")
    ):
        return "h264"
    for first, step in ((0, 188), (4, 192)):
        if len(head) > first + 2 * step and all(head[first + i * step] == 0x47 for i in range(3)):
            return "mpegts"
    for magic, name in (
        (b"GIF87a", "gif"),
        (b"GIF89a", "gif"),
        (b"FLV\x01", "flv"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
        (b"OggS", "ogg"),
    ):
        if head.startswith(magic):
            if name == "gif":
                file.seek(max(0, total - 64))
                if not file.read().rstrip(b"\0").endswith(b";"):
                    raise Refused("is cut short: a GIF without its end mark")
                file.seek(0)
            return name
    raise Refused(f"not a video: {describe(head)}")


def describe(head: bytes) -> str:
    """The kind of a file that is not a video, by its first bytes."""
    for magic, what in (
        (b"\xff\xd8\xff", "a JPEG image"),
        (b"\x89PNG", "a PNG image"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\x1f\x8b", "gzip data"),
        (b"#EXTM3U", "text (a playlist)"),
        (b"ffconcat", "text (a playlist)"),
    ):
        if head.startswith(magic):
            return what
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image"
    if not any(head):
        return "only zero bytes"
    if b"\0" not in head and all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        return "text"
    return f"unknown content (starts with {head[:8].hex(' ')})"


_MP4_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")


def _check_boxes(file, start: int, end: int, total: int, budget: list[int] | None = None) -> None:
    """Walk the boxes of an MP4 from `start` to `end` before libavformat builds its tables.

    libavformat allocates some 22 bytes a claimed frame, so a 2 kB file can ask for gigabytes.
    """
    budget = [100_000] if budget is None else budget
    at = start
    while at + 8 <= end:
        budget[0] -= 1
        if budget[0] < 0:
            raise Refused("has too many boxes")
        file.seek(at)
        size, box = struct.unpack(">I4s", file.read(8))
        body = at + 8
        if size == 1:
            size, body = int.from_bytes(file.read(8), "big"), at + 16
        if size == 0:
            size = end - at
        if size < body - at or not all(32 <= byte < 127 or byte == 0xA9 for byte in box):
            break  # padding or junk behind the last box: libavformat ignores it too
        if at + size > end and box in (b"moov", b"mdat", b"moof"):
            raise Refused(f"is cut short: box {box.decode()} ends at {at + size} of {total} bytes")
        if box == b"cmov":
            raise Refused("has a compressed header, which is not supported")
        if box in _MP4_PARENTS:
            _check_boxes(file, body, min(at + size, end), total, budget)
        elif box in (b"stsz", b"stz2", b"trun"):
            file.seek(body + 4)
            fields = file.read(8)
            constant, count = struct.unpack(">II", fields) if len(fields) == 8 else (0, 0)
            if box == b"trun":
                constant, count = 0, constant  # here the count comes first
            if box == b"stz2":
                constant = 0
            if count * max(1, constant) > total:
                raise Refused(f"claims {count} frames in {total} bytes")
        at += size
    file.seek(0)


def _check_ebml(head: bytes, total: int) -> None:
    """Compare the size of the Matroska segment, where it is known, with the bytes there are."""

    def number(at: int) -> tuple[int | None, int]:
        width = 9 - head[at].bit_length() if at < len(head) and head[at] else 0
        if not width or at + width > len(head):
            return None, at
        value = int.from_bytes(head[at : at + width], "big") & ((1 << 7 * width) - 1)
        return (None if value == (1 << 7 * width) - 1 else value), at + width

    size, at = number(4)
    if size is None or head[at + size : at + size + 4] != b"\x18\x53\x80\x67":
        return
    size, at = number(at + size + 4)
    if size is not None and at + size > total:
        raise Refused(f"is cut short: {total} bytes of {at + size}")
