"""Packed clip bytes -> uint8 frames, exactly the frames asked for.

A packed clip has a constant frame rate, starts at zero and has short closed groups of pictures, so
frame i is the one whose timestamp is i / fps, and a seek costs at most one group. Raw files do not
keep these promises; they go through `pretrain/data/ingest.py` first.
"""

import contextlib
import functools
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from pretrain.data.guard import MAX_PIXELS, Refused, check_container
from pretrain.data.h264 import unit_headers

if TYPE_CHECKING:  # seconds of importing, and processes that pack need none of it
    from torch import Tensor

# What a file without a stream, a frame rate, a header or time stamps leads to.
_ODD = (ArithmeticError, AttributeError, IndexError, TypeError, ValueError)


class DecodeError(Exception):
    """A packed clip did not give the frames its index promises."""


def read_frames(
    data: bytes, indices: np.ndarray, size: tuple[int, int] | None = None, decoder: str = "pyav"
) -> "Tensor":
    """Frames by a decoder, as a tensor: uint8 (len(indices), H, W, 3), RGB.

    Args:
        data: the bytes of a packed .mp4.
        indices: frame numbers, any order, repeats allowed.
        size: width and height that every frame must have, pixels; None if they are not known.
        decoder: "pyav", which is `decode_frames`; "decord" or "torchcodec", to the same bits, of
            which only what the header claims is looked at before.

    Raises:
        DecodeError: the bytes are not a video, or do not hold every frame asked for.
        ValueError: `data` is no bytes, or the decoder is not installed.
    """
    import torch

    if decoder == "pyav":
        return torch.from_numpy(decode_frames(data, indices, size))
    check_decoder(decoder)
    _refuse_names(data)
    read = {"decord": _by_decord, "torchcodec": _by_torchcodec}[decoder]
    try:
        if check_container(io.BytesIO(data)) != "mov":
            raise DecodeError("not an MP4 file")
        with _opened(data, size):  # what the header says is looked at before
            pass
        frames = read(data, indices)
    except (av.error.FFmpegError, RuntimeError, Refused, *_ODD) as error:
        raise DecodeError(
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    if frames is None:
        return torch.from_numpy(decode_frames(data, indices, size))
    if size and frames.shape[1:3] != size[::-1]:
        raise DecodeError(f"frames of {frames.shape[2]}x{frames.shape[1]}, not of {size}")
    return torch.from_numpy(frames)


@functools.cache
def check_decoder(decoder: str) -> None:
    """Refuse a decoder that is not here.

    Raises:
        ValueError: saying how to install it.
    """
    try:
        if decoder == "decord":
            import decord  # noqa: F401
        elif decoder == "torchcodec":
            import torchcodec  # noqa: F401
    # torchcodec looks for the system's FFmpeg and says all that it tried.
    except (ImportError, OSError, RuntimeError) as error:
        needs = "; it needs a version for this torch, and the libraries of FFmpeg 4 to 8"
        raise ValueError(
            f"--decoder {decoder}: pip install {decoder}{needs * (decoder == 'torchcodec')} "
            f"({' '.join(str(error).split())[:200]})"
        ) from error


def installed_decoders() -> list[str]:
    """Names of the decoders that work here."""
    found = []
    for name in ("pyav", "decord", "torchcodec"):
        with contextlib.suppress(ValueError):
            check_decoder(name)
            found.append(name)
    return found


def _by_decord(data: bytes, indices: np.ndarray) -> np.ndarray | None:
    """None if decord cannot read them: decord 0.6 copies no frames 48 or 72 wide."""
    import decord

    try:
        reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        return reader.get_batch(indices).asnumpy()
    except decord.DECORDError:
        return None


def _by_torchcodec(data: bytes, indices: np.ndarray) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    reader = VideoDecoder(bytes(data), dimension_order="NHWC", num_ffmpeg_threads=1)
    return reader.get_frames_at(indices.tolist()).data.numpy()


def decode_frames(
    data: bytes, indices: np.ndarray, size: tuple[int, int] | None = None, grey: bool = False
) -> np.ndarray:
    """Decode the frames at `indices`.

    This happens in the process that trains, on packs that may be anybody's: the bytes must be those
    of an MP4 with H.264 that claims no more frames than it holds, and no frame of another size is
    decoded.

    Args:
        data: the bytes of a packed .mp4.
        indices: frame numbers, any order, repeats allowed.
        size: width and height that every frame must have, pixels; None if they are not known.
        grey: give the grey plane as it was stored, not converted to any colours.

    Returns:
        uint8 frames (len(indices), H, W, 3), RGB; or (len(indices), H, W).

    Raises:
        DecodeError: the bytes are not a video, or do not hold every frame asked for.
        ValueError: `data` is no bytes, but the path of a file.
    """
    _refuse_names(data)
    wanted = np.unique(indices)
    try:
        if check_container(io.BytesIO(data)) != "mov":
            raise DecodeError("not an MP4 file")
        found = _decode(data, wanted, size, grey, seek=True)
        if len(found) < len(wanted):
            # Files with B-frames seek by decoding time, which can land one group too late.
            found = _decode(data, wanted, size, grey, seek=False)
    except (av.error.FFmpegError, Refused, *_ODD) as error:
        raise DecodeError(f"{type(error).__name__}: {error}") from error
    missing = [int(i) for i in wanted if i not in found]
    if missing:
        raise DecodeError(f"frames {missing[:5]} of the {len(wanted)} asked for are not there")
    return np.stack([found[int(i)] for i in indices])


def _refuse_names(data: object) -> None:
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ValueError(
            f"frames are read from the bytes of a packed .mp4, got {data!r:.80}: give "
            "Path(...).read_bytes(). Raw files are packed first (muybridge pack)"
        )


@contextlib.contextmanager
def _opened(data: bytes, size: tuple[int, int] | None) -> Iterator[av.container.InputContainer]:
    """An MP4 whose video is H.264 of a size, if that is known."""
    # A stream may change its size on the way. A frame in memory is larger than what is seen of it:
    # whole blocks of 16 pixels, and rows that FFmpeg widens to up to 128 where the processor has
    # long vectors (AVX-512).
    most = (size[0] + 144) * (size[1] + 64) if size else MAX_PIXELS
    limits = {"max_pixels": str(most)}
    alone = {"format_whitelist": "mov", "protocol_whitelist": "none"}
    with av.open(
        io.BytesIO(data), "r", format="mp4", options=limits, container_options=alone
    ) as container:
        codec = container.streams.video[0].codec_context
        if codec.name != "h264" or (size or (codec.width, codec.height)) != (
            codec.width,
            codec.height,
        ):
            raise DecodeError(f"{codec.name} of {codec.width}x{codec.height}, not h264 of {size}")
        codec.options = limits
        yield container


def _decode(
    data: bytes, wanted: np.ndarray, size: tuple[int, int] | None, grey: bool, seek: bool
) -> dict[int, np.ndarray]:
    """Frames by number, those of `wanted` that are there."""
    numbers = set(wanted.tolist())
    found: dict[int, np.ndarray] = {}
    with _opened(data, size) as container:
        stream = container.streams.video[0]
        size = stream.codec_context.width, stream.codec_context.height
        stream.thread_count = 1  # the loader's workers are the parallelism
        head = stream.codec_context.extradata
        if not stream.average_rate or not stream.time_base or not head:
            raise DecodeError(
                "its header tells neither when frames are shown nor how they are packed"
            )
        per_frame = float(1 / (stream.average_rate * stream.time_base))
        # One converter for all frames: making one costs more than converting a small frame.
        to_rgb = VideoReformatter()
        prefix = (head[4] & 3) + 1  # bytes of a unit's length
        if seek and wanted[0]:
            container.seek(int(wanted[0] * per_frame), stream=stream)  # to the keyframe before
        for packet in container.demux(stream):
            if (
                packet.pts is not None
                and round(packet.pts / per_frame) not in numbers
                and nothing_needs(bytes(packet), prefix)
            ):
                continue
            for frame in packet.decode():
                if (frame.width, frame.height) != size:
                    raise DecodeError(f"a frame of {frame.width}x{frame.height}")
                if frame.pts is None:
                    raise DecodeError("a frame does not say when it is shown")
                index = round(frame.pts / per_frame)
                if index in numbers and grey:
                    found[index] = _grey_plane(frame)
                elif index in numbers:
                    found[index] = to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
                if index >= wanted[-1]:
                    return found
    return found


def _grey_plane(frame: av.VideoFrame) -> np.ndarray:
    if frame.format.name not in ("gray", "yuv420p"):
        raise DecodeError(f"a frame of {frame.format.name}, which has no grey plane of bytes")
    plane = frame.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
    return rows[:, : plane.width].copy()  # rows are padded


def nothing_needs(packet: bytes, prefix: int) -> bool:
    """Whether no other frame is predicted from this H.264 packet, so that it may be left out.

    The demuxer does not say; the answer is nal_ref_idc in the header of the first slice.
    """
    slices = (header for header in unit_headers(packet, prefix) if header & 31 in (1, 5))
    return not next(slices, 0x60) & 0x60


def crop_resize(
    frames: "Tensor", box: tuple[int, int, int, int], size: int, interpolation: str = "bilinear"
) -> "Tensor":
    """Cut one box out of every frame and scale it to a square: a clip is treated as one thing.

    Args:
        frames: uint8 (T, H, W, 3).
        box: left, top, width, height in pixels.
        size: side of the result, pixels.
        interpolation: "bilinear" or "bicubic".

    Returns:
        uint8 clip (C, T, size, size); anti-aliased, on uint8 throughout.
    """
    from torch.nn import functional as F

    x, y, w, h = box
    clip = frames[:, y : y + h, x : x + w].permute(0, 3, 1, 2)  # a channels-last view
    if (w, h) != (size, size):
        clip = F.interpolate(clip, (size, size), mode=interpolation, antialias=True)
    return clip.transpose(0, 1).contiguous()
