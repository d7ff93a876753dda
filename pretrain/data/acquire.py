"""Adds further streams to packed clips, inside a process that may be killed.

`python -m pretrain.data.acquire` is the worker, as `ingest.py` is one: a job is a clip and a stream
of it, and what makes that stream: a method that estimates flow from the clip's frames, or a file
that came with the video. The answer is the stream's entry in the index.
"""

import contextlib
import hashlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data import flow, methods
from pretrain.data.decode import DecodeError, decode_frames
from pretrain.data.encode import DiskError
from pretrain.data.guard import Refused
from pretrain.data.index import GOP
from pretrain.data.ingest import OURS, open_part, serve


def acquire(
    stream: str,
    clip: dict[str, Any],
    out: str,
    beat: Callable[[], None] = lambda: None,
    method: str = "",
    file: dict[str, Any] | None = None,
) -> dict:
    """Makes one stream of one clip.

    Args:
        stream: "flow".
        clip: Of the clip: path, offset and bytes of its .mp4, sha256, frames, width, height; of its
            video: before (frames that precede the clip) and total (all its frames).
        out: The file to write.
        beat: Called whenever there was progress.
        method: What estimates it from the frames, or what the file has been made by.
        file: path and member of the file that came with the video; None: it is to be estimated.

    Returns:
        The entry in the index, without an offset.

    Raises:
        Refused: It cannot be made; the message is the reason.
        DiskError: It could not be written.
    """
    assert stream == "flow", stream
    if file is None:
        methods.refuse_size(method, clip["width"], clip["height"])
        flows = flow.estimate_flow(_pairs(clip, beat), flow.estimator(method))
        parameters = methods.METHODS[method]
    else:
        with _opened(file) as given:
            flows = flow.read_flow(given, clip["before"], clip["frames"], clip["total"])
        flows = flow.resize_flow(flows, clip["width"], clip["height"])
        method, parameters = method or "given", {}
    bound = flow.choose_bound(flows, clip["width"], clip["height"])
    beat()
    data = flow.encode_levels(flow.to_levels(flows, bound))
    made = {"method": method, "parameters": parameters, "bound": bound}
    return {"entry": _written(out, data, clip) | made}


def _written(out: str, data: bytes, clip: dict) -> dict:
    try:
        Path(out).write_bytes(data)
    except OSError as error:
        raise DiskError(f"{out}: {error.strerror or error}") from error
    digest = hashlib.sha256(data).hexdigest()
    return {"bytes": len(data), "sha256": digest, "of": clip["sha256"]}


@contextlib.contextmanager
def _opened(file: dict) -> Iterator[io.BufferedReader]:
    """A file beside a video, or a member of a tar, for reading."""
    try:
        with open_part(file["path"], file["member"]) as given:
            yield given
    except OSError as error:
        if error.errno in OURS:
            raise DiskError(f"cannot open {file['path']}: {error.strerror}") from error
        raise Refused(f"cannot be read: {error.strerror or error}", retry=True) from error


def _pairs(clip: dict, beat: Callable[[], None]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Neighbouring frames of a packed clip, of which one group of pictures is in memory."""
    with open(clip["path"], "rb") as file:
        file.seek(clip["offset"])
        data = file.read(clip["bytes"])
    if hashlib.sha256(data).hexdigest() != clip["sha256"]:
        raise Refused(f"{clip['path']} has changed since the clip was packed", retry=True)
    last: np.ndarray | None = None
    for start in range(0, clip["frames"], GOP):
        numbers = np.arange(start, min(start + GOP, clip["frames"]))
        try:
            frames = decode_frames(data, numbers, (clip["width"], clip["height"]))
        except DecodeError as error:
            raise Refused(f"the packed clip cannot be decoded: {error}", retry=True) from error
        for frame in frames:
            if last is not None:
                yield last, frame
                beat()
            last = frame


if __name__ == "__main__":
    # A network on a GPU maps more addresses than any limit; it reads only what we packed.
    serve(acquire, memory="--unlimited" not in sys.argv)
