"""Whether this machine reads a codec: a tiny clip is encoded in it and decoded again."""

import io
import os

import av
import numpy as np
from av.video.stream import VideoStream

from pretrain.data.decode import DecodeError, read_frames
from pretrain.names import first_line

# Encoders that make a clip of each codec, in the order of preference, with their options.
CODECS: dict[str, dict[str, dict[str, str]]] = {
    "h264": {"libx264": {"bf": "0"}, "libopenh264": {}, "h264_videotoolbox": {}},
    "hevc": {"libx265": {"x265-params": "log-level=none"}},
    "vp9": {"libvpx-vp9": {}},
    "av1": {"libsvtav1": {"preset": "12"}, "libaom-av1": {"cpu-used": "8"}, "librav1e": {}},
    "mjpeg": {"mjpeg": {}},
}
SIDE, FRAMES = 64, 6
FAR_OFF = 12  # mean absolute error of a level, of 255, at which it is another picture


def moving_edge() -> np.ndarray:
    """The pictures of the clip: uint8 (FRAMES, SIDE, SIDE)."""
    columns, starts = np.arange(SIDE)[None, None], 8 * np.arange(FRAMES)[:, None, None]
    return np.where(columns < starts + 8, 200, 60).repeat(SIDE, 1).astype(np.uint8)


def tiny_clip(codec: str, encoder: str) -> bytes:
    """The clip as a file: MP4 of H.264, Matroska of others; av's errors where that fails."""
    os.environ.setdefault("SVT_LOG", "1")  # or SVT-AV1 reports on the screen
    target = io.BytesIO()
    with av.open(target, "w", format="mp4" if codec == "h264" else "matroska") as file:
        stream = file.add_stream(encoder, rate=8, options=CODECS[codec][encoder])
        assert isinstance(stream, VideoStream)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for picture in moving_edge():
            grey = np.repeat(picture[..., None], 3, 2)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        file.mux(stream.encode(None))
    return target.getvalue()


def try_codec(codec: str) -> tuple[bool | None, str]:
    """Whether a clip of a codec comes out as it went in, and what was found.

    Args:
        codec: a name in `CODECS`.

    Returns:
        None: there is no clip to try it with.
    """
    try:
        reads = av.Codec(codec, "r").long_name
    except av.FFmpegError:
        return False, "this PyAV has no decoder"
    why = "no encoder here"
    for encoder in CODECS[codec]:
        try:
            data = tiny_clip(codec, encoder)
        except (av.FFmpegError, ValueError, OSError) as error:
            why = f"{encoder} makes no clip ({first_line(error)})"
            continue
        try:
            with av.open(io.BytesIO(data), "r") as file:
                found = np.stack([f.to_ndarray(format="gray") for f in file.decode(video=0)])
        except (av.FFmpegError, ValueError, IndexError) as error:
            return False, f"what {encoder} made cannot be decoded: {first_line(error)}"
        wanted = moving_edge()
        if found.shape != wanted.shape or np.abs(found - wanted.astype(int)).mean() > FAR_OFF:
            return False, f"what {encoder} made comes out as other frames"
        return True, f"{reads}; a clip by {encoder} decodes"
    return None, f"{why}, so there is no clip to decode; {reads}"


def try_decoder(decoder: str) -> tuple[bool | None, str]:
    """Whether a decoder of `--decoder` gives PyAV's frames, and what was found.

    Args:
        decoder: "decord" or "torchcodec".

    Returns:
        None: it is not installed, or there is no clip.
    """
    wanted = np.arange(FRAMES)
    try:
        data = tiny_clip("h264", "libx264")
        frames = read_frames(data, wanted)
    except (av.FFmpegError, DecodeError, OSError) as error:
        return None, f"there is no clip to try it with: {first_line(error)}"
    try:
        same = bool((read_frames(data, wanted, decoder=decoder) == frames).all())
    except ValueError as error:
        return None, first_line(error)
    except (DecodeError, RuntimeError) as error:
        return False, first_line(error)
    return same, "the same frames as PyAV's" if same else "other frames than PyAV's"
