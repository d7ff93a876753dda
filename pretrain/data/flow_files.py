"""Optical flow that came with the data, in the layouts that people have; anybody's, so checked.

- An array of a whole video: .npz or .npy.
- Middlebury's .flo, a file a pair of frames (Baker et al. 2011): "PIEH", width and height as 32-bit
  integers, then x and y of each pixel as float32, little-endian.
- Pictures, two a pair of frames, as the tools of TSN and denseflow write them:
  flow_x_00001.jpg and flow_y_00001.jpg, grey. A byte v is the motion v * 2 * bound / 255 - bound;
  the bound, 20 pixels unless those tools were told otherwise, stands in no file. No byte is no
  motion: what rests, 128, reads as bound / 255, 0.08 pixels of 20.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image

from pretrain.data.arrays import read_arrays
from pretrain.data.guard import MAX_PIXELS, Refused
from pretrain.files import open_regular

MAX_FILES = 2**20  # of one folder
_MAGIC = b"PIEH"
_FLO = re.compile(r"(?:.*\D)?(?P<number>\d{1,12})\.flo", re.IGNORECASE | re.DOTALL)
_PICTURE = re.compile(
    r"(?:flow_)?(?P<axis>[xyuv])_?(?P<number>\d{1,12})\.(?:jpe?g|png)", re.IGNORECASE
)


def read_flow(file: BinaryIO, before: int, frames: int, total: int) -> np.ndarray:
    """The flow of a clip out of a file of the flow of its whole video.

    Args:
        file: an .npz with an array `flow`, or only one array, or an .npy: (T - 1, 2, H, W) or (T -
            1, H, W, 2), pixels of its own frame size; or, of two frames, a .flo.
        before: frames of the video before the clip.
        frames: of the clip.
        total: frames of the video, T.

    Returns:
        float32 (frames - 1, 2, H, W).

    Raises:
        Refused: there is no such array, or it cannot be the flow of so many frames.
    """
    head = file.read(8)
    file.seek(0)
    if head[4:] == b"ftyp":
        raise Refused(
            "is flow out of a pack's shard, and what its levels mean stands in the pack's index "
            "alone: give the folder of the pack, not its shard"
        )
    arrays = {"": read_flo(file)[None]} if head.startswith(_MAGIC) else read_arrays(file, ("flow",))
    flow = arrays.get("flow", next(iter(arrays.values())) if len(arrays) == 1 else None)
    if flow is None:
        raise Refused(f"has no array called flow, only {', '.join(sorted(arrays))[:200]}")
    if flow.ndim != 4 or 2 not in (flow.shape[1], flow.shape[3]) or 0 in flow.shape:
        raise Refused(f"is an array of shape {flow.shape}, and flow is (frames - 1, 2, H, W)")
    _refuse_count(len(flow), total)
    if flow.shape[1] != 2:
        flow = flow.transpose(0, 3, 1, 2)
    flow = flow[before : before + frames - 1].astype(np.float32)
    _refuse_unreal(flow)
    return flow


def resize_flow(flow: np.ndarray, width: int, height: int) -> np.ndarray:
    """Flow (T, 2, h, w) of frames of another size, its values scaled likewise.

    Raises:
        Refused: the frames have other proportions.
    """
    h, w = flow.shape[2:]
    if (h, w) == (height, width):
        return flow
    refuse_proportions(flow, width, height)
    bilinear = Image.Resampling.BILINEAR
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), bilinear))
        for plane in flow.reshape(-1, h, w)
    ]
    scale = np.array([width / w, height / h], np.float32).reshape(1, 2, 1, 1)
    return np.stack(planes).reshape(len(flow), 2, height, width) * scale


def refuse_proportions(flow: np.ndarray, width: int, height: int) -> None:
    """Raise Refused where flow (T, 2, h, w) is not of scaled frames of this size."""
    h, w = flow.shape[2:]
    if abs(width * h / (w * height) - 1) > 0.05:
        raise Refused(f"is of frames of {w}x{h}, which are no scaled ones of {width}x{height}")


def read_flo(file: BinaryIO) -> np.ndarray:
    """The flow (2, H, W), float32, of a Middlebury .flo.

    Args:
        file: at its start, seekable.

    Raises:
        Refused: it is none, or has not the bytes that it claims.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if len(head) < 12 or not head.startswith(_MAGIC):
        raise Refused("is no .flo: it does not begin with PIEH and a size")
    width, height = (int(n) for n in np.frombuffer(head, "<i4", 2, 4))
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise Refused(f"is a .flo of {width}x{height} pixels")
    if size != 12 + 8 * width * height:
        raise Refused(f"is a .flo of {width}x{height} pixels and of {size} bytes")
    values = np.frombuffer(file.read(), "<f4").reshape(height, width, 2)
    return values.transpose(2, 0, 1).astype(np.float32)


def read_folder(
    folder: str, before: int, frames: int, total: int,
    fitted: Callable[[np.ndarray, int], np.ndarray], bound: float, beat: Callable[[], None],
) -> np.ndarray:  # fmt: skip
    """The flow of a clip out of a folder with the flow of its whole video, fitted to the clip.

    Args:
        folder: of .flo files, or of pairs of pictures; one video's.
        before: frames of the video before the clip.
        frames: of the clip.
        total: frames of the video, T.
        fitted: makes of the flow (1, 2, h, w) from a frame of the clip, of this number, that of the
            size of the clip.
        bound: of pictures: the pixels that their largest byte stands for; 0: unknown.
        beat: called after every pair.

    Returns:
        float32 (frames - 1, 2, H, W).

    Raises:
        Refused: there is no such flow, a number is missing or there twice, there is not one for
            each pair of frames, the bound is not known, or a file is damaged.
        OSError: a file cannot be read.
    """
    by_axis = _numbered(folder)
    first, *rest = ({*numbers} for numbers in by_axis.values())
    if rest and first != rest[0]:
        number = min(first ^ rest[0])
        raise Refused(f"has number {number} of one axis, and not of the other")
    numbers = sorted(first)
    if gaps := numbers[-1] - numbers[0] + 1 - len(numbers):
        gap = next(n for n in range(numbers[0], numbers[-1]) if n not in first)
        raise Refused(f"lacks {gaps} numbers between others, the first is {gap}")
    _refuse_count(len(numbers), total)
    if rest and not bound:
        raise Refused("is of pictures, whose bound is not known: give a column flow_bound")
    flows, size = [], None
    for at, number in enumerate(numbers[before : before + frames - 1]):
        parts = [_read(os.path.join(folder, files[number]), bound) for files in by_axis.values()]
        if parts[0].shape != parts[-1].shape or parts[0].shape != (size or parts[0].shape):
            raise Refused(f"number {number} is of another size than the others")
        size = parts[0].shape
        flow = parts[0] if len(parts) == 1 else np.stack(parts)
        _refuse_unreal(flow[None])
        flows.append(fitted(flow[None], at))
        beat()
    return np.concatenate(flows)


def _numbered(folder: str) -> dict[str, dict[int, str]]:
    """The files of a folder by their numbers: under "" those of .flo, or by axis, "x" and "y".

    Raises:
        Refused: there are none, those of both layouts, or two of one number.
    """
    found: dict[str, dict[int, str]] = {}
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            if count >= MAX_FILES:
                raise Refused(f"is a folder of more than {MAX_FILES} files")
            picture = _PICTURE.fullmatch(entry.name)
            match = picture or _FLO.fullmatch(entry.name)
            if not match:
                continue
            axis = picture["axis"].lower() if picture else ""
            axis = {"u": "x", "v": "y"}.get(axis, axis)
            number = int(match["number"])
            other = found.setdefault(axis, {}).setdefault(number, entry.name)
            if other != entry.name:
                raise Refused(f"has number {number} twice: {other!r:.80} and {entry.name!r:.80}")
    if not found:
        raise Refused("is a folder without flow: no 00001.flo, nor flow_x_00001.jpg")
    if len(found) != (1 if "" in found else 2):
        what = " and ".join("files .flo" if not axis else f"pictures of {axis}" for axis in found)
        raise Refused(f"is a folder of {what}, not of either .flo or both axes")
    return {axis: found[axis] for axis in sorted(found)}


def _read(path: str, bound: float) -> np.ndarray:
    """One file: a .flo, (2, H, W), or a grey picture of one axis, (H, W); float32."""
    name = os.path.basename(path)
    with open_regular(path) as file:
        if name.lower().endswith(".flo"):
            return read_flo(file)
        with _decoding(name):
            picture = Image.open(file, formats=["JPEG", "PNG"])
        if picture.width * picture.height > MAX_PIXELS:
            raise Refused(f"{name!r:.80} is a picture of over {MAX_PIXELS} pixels")
        if picture.mode not in ("L", "RGB"):
            raise Refused(f"{name!r:.80} is a picture of mode {picture.mode}, not grey")
        with _decoding(name):
            values = np.asarray(picture)
    if values.ndim == 3:
        # Saved with three channels, grey pictures are equal in them to a rounding error or two.
        if np.ptp(values.astype(int), axis=2).max() > 4:
            raise Refused(f"{name!r:.80} is in colours: flow of one axis is grey")
        values = values[..., 1]
    return values.astype(np.float32) * np.float32(2 * bound / 255) - np.float32(bound)


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except Image.DecompressionBombError as error:
        raise Refused(f"{name!r:.80} is a picture of over {MAX_PIXELS} pixels") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise Refused(f"{name!r:.80} is no picture, or a damaged one: {error}"[:300]) from error


def _refuse_count(flows: int, frames: int) -> None:
    if flows != frames - 1:
        raise Refused(
            f"has {flows} flows, and the {frames} frames of the video have {frames - 1} between "
            "them"
        )


def _refuse_unreal(flow: np.ndarray) -> None:
    """Refuse flow (T, 2, H, W) faster than any that stays in view, or that is not finite."""
    height, width = flow.shape[2:]
    if not (np.abs(flow) <= 2 * max(height, width)).all():  # false for NaN
        raise Refused(f"has values that are no motion in frames of {width}x{height}")
