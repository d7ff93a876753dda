"""Adds further streams to packed clips, inside a process that may be killed.

`python -m pretrain.data.acquire` is the worker, as `ingest.py` is one: a job is a clip and a stream
of it, and what makes that stream: a method that estimates flow or poses from the clip's frames, or
a file that came with the video. The answer is the stream's entry in the index.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data import blazepose, flow, flow_files, methods
from pretrain.data.arrays import read_arrays
from pretrain.data.decode import DecodeError, decode_frames
from pretrain.data.encode import DiskError
from pretrain.data.guard import Refused
from pretrain.data.index import GOP
from pretrain.data.ingest import OURS, open_part, serve
from pretrain.data.pose_files import MAX_BYTES, parse_poses, read_poses
from pretrain.data.poses import COLUMNS, crop_pose, pose_member

# A network in torch maps more addresses than any limit; it reads only what we packed.
UNLIMITED = "--unlimited" in sys.argv


def acquire(
    stream: str,
    clip: dict[str, Any],
    out: str,
    beat: Callable[[], None] = lambda: None,
    method: str = "",
    file: dict[str, Any] | None = None,
    camera: dict[str, Any] | None = None,
    about: str = "",
    bound: float = 0.0,
) -> dict:
    """Make one stream of one clip.

    Args:
        stream: "flow" or "pose".
        clip: of the clip: path, offset and bytes of its .mp4, sha256, frames, fps, width, height,
            and `seen`, width and height before they were scaled; of its video: before (frames that
            precede the clip) and total (all its frames).
        out: the file to write.
        beat: called whenever there was progress.
        method: what estimates it from the frames.
        file: or else path and member of the file that came with the video.
        camera: of poses: a file that may say where joints are in the picture, see `_project`.
        about: what the file holds: the method of its flow, the skeleton of its poses.
        bound: of flow in pictures, see `pretrain.data.flow_files`.

    Returns:
        The entry in the index, without an offset.

    Raises:
        Refused: it cannot be made; the message is the reason.
        DiskError: it could not be written.
    """
    if stream == "flow":
        data, entry = _make_flow(clip, beat, method, file, about, bound)
    else:
        data, entry = _make_pose(clip, beat, method, file, camera, about)
    try:
        Path(out).write_bytes(data)
    except OSError as error:
        raise DiskError(f"{out}: {error.strerror or error}") from error
    digest = hashlib.sha256(data).hexdigest()
    return {"entry": {"bytes": len(data), "sha256": digest, "of": clip["sha256"]} | entry}


def _make_flow(
    clip: dict,
    beat: Callable[[], None],
    method: str,
    file: dict | None,
    about: str,
    given_bound: float,
) -> tuple[bytes, dict]:
    parameters: dict = {}
    if file is None:
        methods.refuse_size(method, clip["width"], clip["height"])
        flows = flow.estimate_flow(_pairs(clip, beat), flow.estimator(method))
        parameters = methods.METHODS["flow"][method]
    else:
        part = clip["before"], clip["frames"], clip["total"]
        size = clip["width"], clip["height"]
        if file["member"] is None and os.path.isdir(file["path"]):
            with _reading(file["path"]):
                flows = flow_files.read_folder(file["path"], *part, *size, given_bound, beat)
        else:
            with _opened(file) as given:
                flows = flow_files.resize_flow(flow_files.read_flow(given, *part), *size)
    bound = flow.choose_bound(flows, clip["width"], clip["height"])
    beat()
    data = flow.encode_levels(flow.to_levels(flows, bound))
    made = method or about or "given"
    return data, {"method": made, "parameters": parameters, "bound": bound}


def _make_pose(
    clip: dict,
    beat: Callable[[], None],
    method: str,
    file: dict | None,
    camera: dict | None,
    about: str,
) -> tuple[bytes, dict]:
    parameters: dict = {}
    if file is None:
        parameters = methods.METHODS["pose"][method]
        found, _ = blazepose.estimate_poses(
            _frames(clip), clip["fps"], _networks(), parameters["smooth"], beat
        )
        values, skeleton = found, "blazepose33"
        columns: tuple[str, ...] = COLUMNS
    else:
        values, columns, skeleton = _given_poses(clip, file, camera, about)
    data, entry = pose_member(values, columns, skeleton)
    return data, {"method": method or "given", "parameters": parameters} | entry


@functools.cache
def _networks() -> blazepose.Networks:
    try:
        return blazepose.load_networks(methods.pose_weights(), in_torch=UNLIMITED)
    except ValueError as error:  # they were there when packing began
        raise Refused(str(error), retry=True) from error


def _given_poses(
    clip: dict, file: dict, camera: dict | None, skeleton: str
) -> tuple[np.ndarray, tuple[str, ...], str]:
    """The poses of a clip out of a file of those of its video: values, columns, skeleton."""
    try:
        if file["member"] is None and os.path.isdir(file["path"]):
            poses = read_poses(file["path"], skeleton)
        else:
            with _opened(file) as given:
                poses = parse_poses(given.read(MAX_BYTES + 1), skeleton)
    except ValueError as error:
        raise Refused(str(error)) from error
    total, before, frames = clip["total"], clip["before"], clip["frames"]
    if len(poses.values) != total:
        raise Refused(
            f"has {len(poses.values)} frames of poses, and the video has {total}: give one for each"
        )
    values, columns, frame = poses.values, poses.columns, poses.frame or clip.get("seen")
    if "u" not in columns and camera is not None:
        values, columns = _project(values, columns, camera)
        frame = clip.get("seen")
    values = values[before : before + frames]
    if "u" in columns:
        if frame is None:
            raise Refused("is of a clip packed by an older version: pack into another folder")
        values = crop_pose(values, columns, (0, 0, *frame), (clip["width"], clip["height"]))
    if not np.isfinite(values).all():
        raise Refused("has a joint that is nowhere")
    return values, columns, poses.skeleton


def _project(
    values: np.ndarray, columns: tuple[str, ...], camera: dict
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Add to joints in metres where they are in the picture, if the file beside them says.

    That is an array `camera` (T, 3), as the synthetic dataset has: pixels a metre, and column and
    row of the origin, pixel centres at whole numbers; the projection is parallel.
    """
    with _opened(camera) as given:
        found = read_arrays(given, ("camera",)).get("camera")
    if found is None or found.shape != (len(values), 3) or columns[:3] != COLUMNS[:3]:
        return values, columns
    place = found.astype(np.float32)[:, None, None]
    pixels = values[..., :2] * place[..., :1] + place[..., 1:] + 0.5
    pixels = pixels * (values[..., -1:] > 0)
    return np.concatenate([values[..., :3], pixels, values[..., -1:]], -1), COLUMNS


@contextlib.contextmanager
def _opened(file: dict) -> Iterator[io.BufferedReader]:
    """A file beside a video, or a member of a tar, for reading."""
    with _reading(file["path"]), open_part(file["path"], file["member"]) as given:
        yield given


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """What cannot be read is Refused, unless this machine is to blame."""
    try:
        yield
    except OSError as error:
        if error.errno in OURS:
            raise DiskError(f"cannot open {path}: {error.strerror}") from error
        raise Refused(f"cannot be read: {error.strerror or error}", retry=True) from error


def _pairs(clip: dict, beat: Callable[[], None]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Neighbouring frames of a packed clip."""
    for pair in itertools.pairwise(_frames(clip)):
        yield pair
        beat()


def _frames(clip: dict) -> Iterator[np.ndarray]:
    """The frames of a packed clip, of which one group of pictures is in memory."""
    with open(clip["path"], "rb") as file:
        file.seek(clip["offset"])
        data = file.read(clip["bytes"])
    if hashlib.sha256(data).hexdigest() != clip["sha256"]:
        raise Refused(f"{clip['path']} has changed since the clip was packed", retry=True)
    for start in range(0, clip["frames"], GOP):
        numbers = np.arange(start, min(start + GOP, clip["frames"]))
        try:
            yield from decode_frames(data, numbers, (clip["width"], clip["height"]))
        except DecodeError as error:
            raise Refused(f"the packed clip cannot be decoded: {error}", retry=True) from error


if __name__ == "__main__":
    serve(acquire, memory=not UNLIMITED)
