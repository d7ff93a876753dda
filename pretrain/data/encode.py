"""Writes decoded frames as uniform clips: scaled, upright, H.264 with short closed GOPs in MP4.

Beside each clip lies its signature, see `pretrain/data/signatures.py`.

On such files every decoder measured for this project is exact, and fast to seek. One thread a file,
bit-exact flags and no dates: the same frames give the same bytes, on one kind of processor. On
another one x264 takes other instructions, which round differently.

x264's macroblock tree is off. With it 2 to 3 of 100 encodings of the very same frames gave other
bytes (the pixels were equal), in one process and with one thread; without it none of 2,400 did. Why
is not known. It costs nothing in time, and about a sixth in size.
"""

import contextlib
import errno
import hashlib
import math
import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.sidedata.sidedata import SideDataContainer
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from pretrain.data.guard import MAX_PIXELS, Refused
from pretrain.data.index import CRF, PRESET, X264
from pretrain.data.signatures import SUFFIX, Signature

LONGER = 0.05  # a clip may be this much longer than asked, so that 10.01 s stay one clip of 10 s

# One hostile file must not fill the disk, or the pack. A clip of 10 s from 1 KB is 800 bits a
# second.
FREE_CLIPS, BYTES_A_CLIP = 1000, 1024  # so many clips, and one more for so many bytes of the file
FREE_BYTES, GROWTH = 2**30, 64  # bytes of all clips, and so many more for each byte of the file


class DiskError(Exception):
    """The clips could not be written: no fault of the file, the whole pack has to stop."""


def cut_places(ticks: int, longest: int) -> set[int]:
    """The numbers of the frames with which the equal parts of a video begin.

    Args:
        ticks: frames of the video.
        longest: frames of a part at most, up to `LONGER`.
    """
    parts = max(1, math.ceil(ticks / longest - LONGER))
    return {ticks * i // parts for i in range(parts)}


class Clips:
    """Scales, turns and encodes the frames it is given, and starts a new file at each cut.

    Colours become BT.601, limited range, untagged: what every decoder assumes when nobody tells.
    """

    def __init__(self, out: str, scan: dict, longest: int, short_side: int, write: bool):
        self.cuts = cut_places(scan["ticks"], longest)
        self.out, self.fps, self.write, self.short_side = out, scan["fps"], write, short_side
        self.longest = math.ceil(longest * (1 + LONGER)) + 1
        self.aspect = scan["aspect"]
        self.most_clips = FREE_CLIPS + scan["size"] // BYTES_A_CLIP
        self.most_bytes = FREE_BYTES + GROWTH * scan["size"]
        if len(self.cuts) > self.most_clips:
            raise self._too_many(len(self.cuts))
        self.scaler = VideoReformatter()
        self.done: list[dict] = []
        self.file: OutputContainer | None = None
        self.signature = Signature(float(self.fps))  # of the clip that is being made
        self.first: tuple[int, int, str] | None = None  # width, height and format of the frames
        self.tick = self.frames = self.decoded = self.bytes = self.repeated = 0
        self.plain = True  # nothing but a plain copy of the frames would be written

    def __enter__(self):
        return self

    def __exit__(self, kind, *_) -> None:
        if self.write and kind is None:
            self.finish()
            return
        if self.file:
            with contextlib.suppress(av.FFmpegError):
                self.file.close()
        if kind is not None:  # of a refused file nothing stays, or many of them fill the disk
            for number in range(len(self.done) + 1):
                for path in (Path(self._name(number)), _beside(self._name(number))):
                    path.unlink(missing_ok=True)

    def _name(self, number: int) -> str:
        return f"{self.out}-{number:04d}.mp4"

    def add(self, frame: av.VideoFrame, repeats: int) -> None:
        """Take the next frame, which lasts this many ticks."""
        self.decoded += 1
        tag = (frame.width, frame.height, frame.format.name)
        if self.first is None:
            self.first = tag
            self.turn = _turn(frame)
            turned = self.turn is not None and self.turn[0]
            seen = frame.width, frame.height
            self.seen: tuple[int, int] = seen[::-1] if turned else seen
            self.size = target_size(frame.width, frame.height, self.aspect, self.short_side)
            if self.size[0] * self.size[1] > MAX_PIXELS:
                raise Refused(
                    f"would become {self.size[0]}x{self.size[1]}, over {MAX_PIXELS} pixels"
                )
        self.plain = self.plain and repeats == 1 and tag == self.first and self.turn is None
        self.plain = self.plain and frame.color_range != ColorRange.JPEG
        self.plain = self.plain and frame.colorspace in DEFAULT_COLOURS
        if not self.write:
            if self.out:  # and not only looked at
                self.signature.take(self.signature.small(frame), repeats)
            return
        frame = self.convert(frame)
        small = self.signature.small(frame)
        for repeat in range(repeats):
            if self.tick in self.cuts or self.frames >= self.longest:
                self.finish()
            if self.file is None:
                self._start(frame)
            frame.pts, frame.time_base = self.frames, 1 / self.fps
            self._mux(frame)
            self.signature.take(small)
            self.frames += 1
            self.tick += 1
            self.repeated += repeat > 0

    def convert(self, frame: av.VideoFrame) -> av.VideoFrame:
        """A frame as it is written, scaled and upright; one had to be added before."""
        full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
        rgb = frame.format.is_rgb or frame.format.name == "pal8"
        space = Colorspace.ITU601 if rgb or frame.colorspace not in _SPACES else frame.colorspace
        frame = self.scaler.reformat(
            frame,
            *self.size,
            "yuv420p",
            src_colorspace=space,
            dst_colorspace=Colorspace.ITU601,
            src_color_range=ColorRange.JPEG if full or rgb else ColorRange.MPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=_SCALING,
            threads=1,
        )
        if self.turn is not None:
            frame = _turned(frame, self.turn)
        frame.pict_type = 0  # or a keyframe of the source would become one of ours
        return frame

    def _too_many(self, clips: int) -> Refused:
        return Refused(
            f"would become {clips} clips, more than {self.most_clips} for its size: if the file is "
            "good, cut it into longer ones (--clip-seconds)"
        )

    def _start(self, frame: av.VideoFrame) -> None:
        if len(self.done) >= self.most_clips:
            raise self._too_many(len(self.done) + 1)
        self.path = self._name(len(self.done))
        with _writing(self.path):
            options = {"movflags": "+faststart", "fflags": "+bitexact"}
            file = self.file = av.open(self.path, "w", format="mp4", container_options=options)
            stream = self.stream = file.add_stream("libx264", rate=self.fps)
            stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv420p"
            stream.codec_context.time_base = 1 / self.fps
            stream.codec_context.flags |= av.codec.context.Flags.bitexact
            stream.options = {"preset": PRESET, "crf": str(CRF), "x264-params": X264}

    def _mux(self, frame: av.VideoFrame | None) -> None:
        assert self.file is not None
        try:
            packets = self.stream.encode(frame)
        except MemoryError:
            raise
        except av.FFmpegError as error:  # nothing is written here: x264 refuses what it was given
            raise Refused(f"cannot be encoded: {error.strerror or error}") from error
        with _writing(self.path):
            self.file.mux(packets)
        self.bytes += sum(packet.size for packet in packets)
        if self.bytes > self.most_bytes:
            raise Refused(
                f"its clips take more than {self.most_bytes} bytes, too many for its size"
            )

    def finish(self) -> None:
        """End the file that is being written, if there is one."""
        if self.file is None:
            return
        self._mux(None)
        self.bytes += write_signature(self.path, self.signature)
        self.signature = Signature(float(self.fps))
        with _writing(self.path):
            width, height = self.stream.width, self.stream.height
            self.file.close()
            self.file = None
            try:
                with av.open(self.path, format="mp4") as check:
                    written = sum(packet.size > 0 for packet in check.demux(video=0))
            except av.error.InvalidDataError:
                written = 0
            if written != self.frames:  # a full disk does not always say so
                raise DiskError(f"{self.path}: {written} frames of {self.frames} were written")
            start = round(float((self.tick - self.frames) / self.fps), 6)
            size = (width, height)
            self.done.append(
                _described(self.path, self.frames, self.fps, size, start, copied=False)
                | {"repeated": self.repeated, "seen": self.seen}
            )
        self.frames = self.repeated = 0


_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
DEFAULT_COLOURS = (0, 2, 5, 6)  # unspecified, BT.470 BG and SMPTE 170M: what BT.601 is called
_SPACES = [space.value for space in Colorspace]


def target_size(width: int, height: int, aspect: Fraction | None, short: int) -> tuple[int, int]:
    """The size to scale to: square pixels, short side at most `short`, never up, both even."""
    if aspect and Fraction(1, 4) <= aspect <= 4:  # beyond that the tag is a mistake
        width = max(1, round(width * aspect))
    scale = min(1.0, short / min(width, height))
    width, height = (max(2, round(side * scale) // 2 * 2) for side in (width, height))
    return width, height


def _turn(frame: av.VideoFrame) -> tuple[bool, bool, bool] | None:
    """The display matrix as (transpose, flip rows, flip columns); None: nothing to do."""
    about: SideDataContainer = frame.side_data  # type: ignore[assignment]  # PyAV's stub has a dict
    data = next((d for d in about if d.type.name == "DISPLAYMATRIX"), None)
    if data is None:
        return None
    a, b, _, c, d = struct.unpack("<5i", bytes(data)[:20])
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, b < 0, c < 0
    return (False, d < 0, a < 0) if a < 0 or d < 0 else None


def _turned(frame: av.VideoFrame, turn: tuple[bool, bool, bool]) -> av.VideoFrame:
    transpose, rows, columns = turn
    width, height = (frame.height, frame.width) if transpose else (frame.width, frame.height)
    turned = av.VideoFrame(width, height, "yuv420p")
    for old, new in zip(frame.planes, turned.planes, strict=True):
        plane = np.frombuffer(memoryview(old), np.uint8).reshape(old.height, old.line_size)[
            :, : old.width
        ]
        plane = plane.T if transpose else plane
        plane = plane[:: -1 if rows else 1, :: -1 if columns else 1]
        target = np.frombuffer(memoryview(new), np.uint8).reshape(new.height, new.line_size)
        target[:, : new.width] = plane
    return turned


@contextlib.contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong with a file that we write is no fault of the file that we read."""
    try:
        yield
    except OSError as error:  # not av's ArgumentError: it is about what is written
        if error.errno == errno.ENOMEM:
            raise MemoryError from error
        raise DiskError(f"{path}: {error.strerror or error}") from error


def copy_clip(file, out: str, scan: dict, clips: Clips) -> dict:
    """Write the payload as it is, as the one clip of its source."""
    path = Path(f"{out}-0000.mp4")
    assert clips.first is not None  # it was decoded
    file.seek(0)
    with _writing(path):
        target = open(path, "wb")  # noqa: SIM115
    with contextlib.closing(target):
        while chunk := file.read(2**20):  # an error of reading is not one of ours
            with _writing(path):
                target.write(chunk)
        with _writing(path):
            target.close()
            write_signature(path, clips.signature)
            about = _described(path, clips.decoded, scan["fps"], clips.first[:2], 0.0, copied=True)
            return about | {"seen": clips.first[:2]}


def _beside(path: str | Path) -> Path:
    """Where the signature of a clip is written."""
    return Path(path).with_suffix(SUFFIX)


def write_signature(path: str | Path, signature: Signature) -> int:
    """Write the signature of a clip beside it; returns its size, bytes."""
    with _writing(_beside(path)):
        return _beside(path).write_bytes(signature.data())


def _described(
    path: str | Path, frames: int, fps: Fraction, size: tuple[int, int], start: float, copied: bool
) -> dict:
    """The journal's entry of a written clip."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "file": Path(path).name,
        "frames": frames,
        "fps": int(fps) if fps.denominator == 1 else round(float(fps), 6 if fps > 1 else 12),
        "width": size[0],
        "height": size[1],
        "start": start,
        "bytes": os.path.getsize(path),
        "sha256": digest,
        "copied": copied,
    }
