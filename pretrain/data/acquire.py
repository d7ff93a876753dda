"""Adds further streams to packed clips, inside a process that may be killed.

`python -m pretrain.data.acquire` is the worker, as `ingest.py` is one: a job is a clip and a stream
of it, and what makes that stream: a method that estimates flow or poses from the clip's frames, or
a file that came with the video. The answer is the stream's entry in the index.
"""

import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data import blazepose, flow, flow_files, methods
from pretrain.data.beside import given_poses, opened, reading, refuse_frames
from pretrain.data.cuts import crop_flow, is_cut, places
from pretrain.data.decode import DecodeError, decode_frames
from pretrain.data.encode import DiskError
from pretrain.data.guard import Refused
from pretrain.data.index import GOP
from pretrain.data.ingest import serve
from pretrain.data.poses import COLUMNS, crop_pose, in_view, pose_member

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
        if file["member"] is None and os.path.isdir(file["path"]):
            with reading(file["path"]):
                flows = flow_files.read_folder(
                    file["path"], *part, functools.partial(_fitted, clip), given_bound, beat
                )
        else:
            with opened(file) as given:
                flows = _fitted(clip, flow_files.read_flow(given, *part), 0)
    bound = flow.choose_bound(flows, clip["width"], clip["height"])
    beat()
    data = flow.encode_levels(flow.to_levels(flows, bound))
    made = method or about or "given"
    return data, {"method": made, "parameters": parameters, "bound": bound}


def _fitted(clip: dict, flows: np.ndarray, first: int) -> np.ndarray:
    """Flow (T, 2, h, w) of whole pictures from frame `first` of a clip on, as it is there."""
    size = clip["width"], clip["height"]
    if not is_cut(clip):
        return flow_files.resize_flow(flows, *size)
    about = clip["follow"]
    way = places(about["way"], clip["frames"])[first : first + len(flows) + 1]
    return crop_flow(flows, way, about["size"], about["picture"], size)


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
    seen = None
    if is_cut(clip) and "u" in columns:
        seen = in_view(values, columns, (clip["width"], clip["height"]))
        if clip["follow"]["method"] == "pose" and file is not None:
            seen[int(clip["follow"]["subject"]) - 1] = np.inf
    data, entry = pose_member(values, columns, skeleton, seen)
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
    poses = given_poses(file, camera, skeleton)
    refuse_frames(poses, clip["total"])
    values, frame = poses.values, poses.frame or clip.get("seen")
    values = values[clip["before"] : clip["before"] + clip["frames"]]
    if "u" in poses.columns:
        if frame is None:
            raise Refused("is of a clip packed by an older version: pack into another folder")
        values = crop_pose(
            values, poses.columns, _box(clip, frame), (clip["width"], clip["height"])
        )
    if not np.isfinite(values).all():
        raise Refused("has a joint that is nowhere")
    return values, poses.columns, poses.skeleton


def _box(clip: dict, frame: tuple[float, float]) -> tuple:
    """Left, top, width and height of a clip in a frame of another size, of each of its frames."""
    if not is_cut(clip):
        return (0, 0, *frame)
    about = clip["follow"]
    scale = np.array(frame) / about["picture"]
    left, top = (places(about["way"], clip["frames"]) * scale).T[:, :, None, None]
    return (left, top, *(scale * about["size"]))


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
