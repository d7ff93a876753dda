"""Small videos with their frame number drawn in, to make and to read back."""

import io
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np

BITS = 8
P = TypeVar("P", Path, io.BytesIO)


def picture(number: int, width: int = 96, height: int = 64) -> np.ndarray:
    """A frame whose columns are the bits of `number`, the lowest left, over a dark lower half."""
    image = np.full((height, width, 3), 16, np.uint8)
    for bit in range(BITS):
        if number >> bit & 1:
            image[: height // 2, width * bit // BITS : width * (bit + 1) // BITS] = 235
    return image


def number_of(image: np.ndarray) -> int:
    """The number drawn by `picture`, or -1 if the lower half is not dark."""
    height, width = image.shape[:2]
    if image[height * 5 // 8 :].mean() > 60:
        return -1
    rows = image[height // 8 : height * 3 // 8].astype(float).mean((0, 2))
    columns = [rows[width * b // BITS : width * (b + 1) // BITS] for b in range(BITS)]
    return sum(
        int(column[len(column) // 4 : -(len(column) // 4) or None].mean() > 120) << bit
        for bit, column in enumerate(columns)
    )


def write_video(
    path: P,
    frames: int | list[np.ndarray] = 20,
    fps: int | Fraction = 25,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (96, 64),
    times: list[int] | None = None,
    rotation: int = 0,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    audio: bool = False,
    format: str | None = None,
) -> P:
    """Write numbered frames; `times` are in milliseconds and make the frame rate variable."""
    images = [picture(i, *size) for i in range(frames)] if isinstance(frames, int) else frames
    target = path if isinstance(path, io.BytesIO) else str(path)
    with av.open(target, "w", format=format, container_options=container or {}) as file:
        stream = file.add_stream(codec, rate=fps, options=options or {})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        sound = file.add_stream("aac", rate=16000, layout="mono") if audio else None
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound:
            silence = av.AudioFrame(format="fltp", layout="mono", samples=1024)
            silence.sample_rate, silence.pts = 16000, 0
            silence.planes[0].update(bytes(4096))
            file.mux(sound.encode(silence))
            file.mux(sound.encode(None))
    return path


def ready_video(path: Path, frames: int = 20, gop: int = 8, **more: Any) -> Path:
    """A video that already is what a pack holds."""
    options = {"x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0"}
    return write_video(path, frames, options=options, **more)


def read_video(data: bytes | Path) -> list[np.ndarray]:
    """All frames, RGB, by PyAV."""
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else str(data), "r") as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def numbers(data: bytes | Path) -> list[int]:
    """The numbers drawn in all frames."""
    return [number_of(image) for image in read_video(data)]
