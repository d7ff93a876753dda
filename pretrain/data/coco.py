"""The images of a COCO file, of which a video's frames are made; boxes and poses lie in such files.

A file is somebody else's: what it says is checked.
"""

import re
from typing import TypeGuard

LARGEST = 1e6  # pixels of a side; a larger number is a mistake

Id = int | str


def read_images(images: object) -> tuple[tuple[float, float] | None, dict[Id, int]]:
    """The frames that a list of images makes.

    Args:
        images: as the file has it.

    Returns:
        width and height, pixels, if they are told; and the frame of each image's id: in the order
        of `frame_id` where all have one, else of their ids, names by their last number.

    Raises:
        ValueError: that is no list of one video's images.
    """
    if not isinstance(images, list) or not all(
        isinstance(i, dict) and is_id(i.get("id")) for i in images
    ):
        raise ValueError("its images are no list of objects with an id")
    videos = {str(i.get("video_id", i.get("vid_id"))) for i in images}
    if len(videos) > 1:
        raise ValueError(f"it holds {len(videos)} videos: write a file for each")
    key = "frame_id" if all(type(i.get("frame_id")) is int for i in images) else "id"
    numbers: dict[Id, int] = {}
    for image in sorted(images, key=lambda i: _natural(i[key])):
        numbers.setdefault(image["id"], len(numbers))
    sizes = {(_side(i.get("width")), _side(i.get("height"))) for i in images}
    if len(sizes) > 1:
        raise ValueError("its images are not of one size: they are no video's")
    width, height = sizes.pop() if sizes else (0.0, 0.0)
    return ((width, height) if width and height else None), numbers


def is_id(value: object) -> TypeGuard[Id]:
    """Whether an image can be called so."""
    return type(value) in (int, str)


def last_number(name: object) -> int:
    """The last number in an image's name, by which frames are ordered.

    Raises:
        ValueError: there is none.
    """
    digits = re.findall(r"\d+", str(name)[:200])
    if not digits:
        raise ValueError(f"the image {str(name)[:40]!r} has no number to order frames by")
    return int(digits[-1][-18:])


def _natural(value: Id) -> tuple[int, str]:
    return (value, "") if isinstance(value, int) else (last_number(value), value)


def _side(value: object) -> float:
    """Of a picture; 0: not known."""
    known = type(value) in (int, float) and 0 < value < LARGEST  # type: ignore[operator]
    return float(value) if known else 0.0  # type: ignore[arg-type]
