"""Clips as a browser plays them.

A pack has H.264 in MP4, 8 bit, 4:2:0, which browsers play, whatever the user's own file is. For one
without that decoder a clip is encoded again as VP8 in WebM.
"""

import os
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from pretrain.data.decode import DecodeError
from pretrain.data.shards import Pack
from pretrain.files import cache_folder, keep_newest, replacing
from pretrain.names import for_screen

KEPT = 200  # files
MOST_FRAMES = 3000  # of a clip that is encoded again; what follows is left out
_LOCK = threading.Lock()


def web_clip(pack: Pack, record: dict, ending: str) -> Path:
    """A file with a clip of a pack, of which the newest are kept in the cache.

    Args:
        pack: that has it.
        record: its index entry.
        ending: "mp4", the bytes of the pack, or "webm".

    Raises:
        ValueError: it cannot be decoded, or there is no room for it.
    """
    folder = cache_folder() / "look"
    path = folder / f"{record['sha256']}.{ending}"
    with _LOCK:  # one encoder at a time
        try:
            if path.is_file():
                os.utime(path)
                return path
            data = pack.read(record) if ending == "mp4" else None
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path, shared=True) as aside:
                if data is not None:
                    aside.write_bytes(data)
                else:
                    _encode(pack, record, aside)
            keep_newest(folder, f".{ending}", KEPT)
        except (OSError, DecodeError) as error:
            raise ValueError(f"the clip cannot be shown: {for_screen(error, 200)}") from error
    return path


def _encode(pack: Pack, record: dict, path: Path) -> None:
    frames = min(record["frames"], MOST_FRAMES)
    rate = Fraction(record["fps"]).limit_denominator(1001)
    with av.open(str(path), "w", format="webm") as container:
        stream = container.add_stream("libvpx", rate=rate)
        stream.width, stream.height = record["width"], record["height"]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        stream.options = {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "2M"}
        for start in range(0, frames, 64):
            numbers = np.arange(start, min(start + 64, frames))
            for image in pack.frames(record, numbers).numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
