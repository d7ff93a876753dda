"""What happens when: labels of parts of a video, for models that answer for every frame.

A list's column `segments` holds them as `start-end label; start-end label`, seconds in the source video:
`0-1.5 sit down; 2.25-4 stand up`. Rows of one file add up.
"""

import math
import re
from itertools import pairwise

import numpy as np

from downstream.splits import Videos
from pretrain.data.shards import Pack

NOTHING = -1  # the class of a frame that no segment covers: neither trained on nor scored
_SEGMENT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*-\s*(\d+(?:\.\d*)?|\.\d+)\s+(\S.*)")


def parse_segments(text: str, where: str) -> list[tuple[float, float, str]]:
    """(start, end, label) of every segment.

    Raises:
        ValueError: a part is not of the form above, ends before it starts, or overlaps another.
    """
    segments = []
    for part in filter(str.strip, text.split(";")):
        match = _SEGMENT.fullmatch(part.rstrip())
        if not match:
            raise ValueError(
                f"{where}: segment {part.strip()!r} is not of the form 'start-end label', such as '0-1.5 sit down'"
            )
        start, end, label = float(match[1]), float(match[2]), match[3].strip()
        if end <= start:
            raise ValueError(f"{where}: segment {part.strip()!r} ends before it starts")
        segments.append((start, end, label))
    segments.sort()
    for (_, end, first), (start, _, second) in pairwise(segments):
        if start < end - 1e-9:
            raise ValueError(f"{where}: segments {first!r} and {second!r} overlap at {start:g} s")
    return segments


def segments_of(record: dict) -> list[tuple[float, float, str]]:
    """The segments of the video that an index entry is of; none without such a column."""
    return parse_segments(record["extra"].get("segments", ""), record["source"])


def frame_classes(record: dict, classes: dict[str, int]) -> np.ndarray:
    """The class number of every frame of a packed clip (frames,), `NOTHING` where no segment is.

    Without segments the clip's own label is every frame's.

    Args:
        record: its index entry; the clip starts at `start` seconds of its source.
        classes: name -> number; a label that is not among them is `NOTHING`.
    """
    frames = np.full(record["frames"], NOTHING, dtype=np.int64)
    segments = segments_of(record)
    if not segments and not record["extra"].get("segments"):
        frames[:] = classes.get(record["label"], NOTHING)
        return frames
    for start, end, label in segments:
        # A frame belongs to the segment that its time lies in; rounding first, since 0.3 * 10 is above 3.
        first = math.ceil(round((start - record["start"]) * record["fps"], 6))
        last = math.ceil(round((end - record["start"]) * record["fps"], 6))
        frames[max(first, 0) : max(last, 0)] = classes.get(label, NOTHING)
    return frames


def classes_of_frames(pack: Pack, train: Videos, test: Videos) -> list[str]:
    """The classes that frames of the training clips have.

    Raises:
        ValueError: fewer than two, or a class is tested and never trained.
    """
    found = []
    for videos in (train, test):
        names: set[str] = set()
        for record in map(pack.record, videos.samples):
            segments = segments_of(record)
            names |= {label for *_, label in segments}
            if not segments and record["label"] is not None:
                names.add(record["label"])
        found.append(names)
    trained, tested = found
    if len(trained) < 2:
        raise ValueError(
            f"{pack.folder}: the only class of the frames is {', '.join(trained) or 'none'}: there is nothing to tell apart"
        )
    if tested - trained:
        raise ValueError(
            f"{pack.folder}: {len(tested - trained)} classes are tested but never trained: "
            f"{', '.join(sorted(tested - trained)[:10])}; correct the segments or the splits"
        )
    return sorted(trained)


def class_counts(pack: Pack, videos: Videos, classes: list[str], per_frame: bool) -> np.ndarray:
    """How many videos, or frames, each class has (K,)."""
    if not per_frame:
        return np.bincount(videos.numbers(classes), minlength=len(classes))
    numbers = {name: i for i, name in enumerate(classes)}
    frames = np.concatenate([frame_classes(pack.record(i), numbers) for i in videos.samples])
    return np.bincount(frames[frames != NOTHING], minlength=len(classes))
