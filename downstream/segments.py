"""Temporal segments: labels of parts of a video, for models that predict for every frame.

A list's column `segments` holds them as `start-end label; start-end label`, seconds in the source
video: `0-1.5 sit down; 2.25-4 stand up`. Rows of one file add up.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from downstream.splits import Videos
from pretrain.data.lists import SEGMENT
from pretrain.data.shards import Pack
from pretrain.names import counted, first_of
from pretrain.prompts import refuse_same_words

UNLABELLED = -1  # the class of a frame that no segment covers: neither trained on nor scored


def parse_segments(text: str, where: str) -> list[tuple[float, float, str]]:
    """(start, end, label) of every segment.

    Raises:
        ValueError: a part is not of the form above, ends after any video does, ends before it
            starts, or overlaps another.
    """
    segments = []
    for part in filter(str.strip, text.split(";")):
        match = SEGMENT.fullmatch(part.rstrip())
        if not match:
            raise ValueError(
                f"{where}: segment {part.strip()!r} is not of the form 'start-end label', such as "
                "'0-1.5 sit down'"
            )
        start, end, label = float(match[1]), float(match[2]), match[3].strip()
        if end >= 2**53:  # its last frame would have no number
            raise ValueError(f"{where}: segment {part.strip()[:50]!r} ends after any video does")
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


def frame_at(seconds: float, fps: float) -> int:
    """The number of the frame that begins nearest to a time: from it on a segment holds frames.

    So a frame is of the segment that covers the middle of the time for which it is shown. A time
    that was rounded to milliseconds finds its frame at up to 500 frames a second, one of two
    decimals at up to 60 (half of 0.01 s is less than half a frame below 100), one of one decimal
    below 10.
    """
    return math.ceil(round(seconds * fps, 6) - 0.5)


def frame_classes(record: dict, classes: dict[str, int]) -> np.ndarray:
    """The class number of every frame of a packed clip (frames,), `UNLABELLED` where no segment is.

    Without segments the clip's own label is every frame's.

    Args:
        record: its index entry; the clip starts at `start` seconds of its source.
        classes: name -> number; a label that is not among them is `UNLABELLED`.
    """
    frames = np.full(record["frames"], UNLABELLED, dtype=np.int64)
    segments = segments_of(record)
    if not segments and not record["extra"].get("segments"):
        frames[:] = classes.get(record["label"], UNLABELLED)
        return frames
    for start, end, label in segments:
        first, last = (frame_at(t - record["start"], record["fps"]) for t in (start, end))
        frames[max(first, 0) : max(last, 0)] = classes.get(label, UNLABELLED)
    return frames


def _broken(pack: Pack, record: dict) -> str:
    """The list's line with the first segment of a video that cannot be read, else the video's."""
    text = record["extra"]["segments"]
    for part in filter(None, map(str.strip, text.split(";"))):
        try:
            parse_segments(part, "")
        except ValueError:
            return pack.where(path=record["source"], segments=part)
    return pack.where(path=record["source"])


def _place(pack: Pack, name: str) -> str:
    """Where the list has a class of frames: as a label, or in the column `segments`."""
    place = pack.where(label=name)
    return pack.where(segments=name) if place == pack.name else place


def classes_of_frames(pack: Pack, train: Videos, test: Videos) -> list[str]:
    """The classes that frames of the training clips have.

    Raises:
        ValueError: fewer than two, two that differ in spelling only, or one that is tested and
            never trained.
    """
    found = []
    for videos in (train, test):
        names: set[str] = set()
        for record in map(pack.record, videos.samples):
            try:
                segments = segments_of(record)
            except ValueError as error:
                raise ValueError(f"{_broken(pack, record)}: {error}") from error
            names |= {label for *_, label in segments}
            if not segments and record["label"] is not None:
                names.add(record["label"])
        found.append(names)
    trained, tested = found
    refuse_same_words(
        {name: name for name in sorted(trained | tested)}, lambda name: _place(pack, name)
    )
    if len(trained) < 2:
        raise ValueError(
            f"{pack.name}: the only class of the frames is {', '.join(trained) or 'none'}: "
            "classification needs at least two"
        )
    if tested - trained:
        raise ValueError(
            f"{_place(pack, min(tested - trained))}: {counted(len(tested - trained), 'class')} "
            f"tested but never trained: {first_of(sorted(tested - trained), 10)}; correct the "
            "segments or the splits"
        )
    return sorted(trained)


OVERLAPS = (0.1, 0.25, 0.5)  # intersections over union at which segments are counted


def stretches(frames: np.ndarray) -> list[tuple[int, int]]:
    """(first frame, end) of every stretch of frames (T,) of one class, in order."""
    edges = [0, *(np.flatnonzero(np.diff(frames)) + 1).tolist(), len(frames)]
    return [(a, b) for a, b in pairwise(edges) if a < b]


def _pieces(frames: np.ndarray) -> list[tuple[int, int, int]]:
    """(class, first frame, end) of every stretch; `UNLABELLED` frames separate them."""
    return [(int(frames[a]), a, b) for a, b in stretches(frames) if frames[a] != UNLABELLED]


def labelled_frames(
    sequences: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """(truth, predicted) of the labelled frames of all sequences, one after the other."""
    none = np.empty(0, np.int64)
    truth, predicted = (np.concatenate([none, *(pair[i] for pair in sequences)]) for i in (0, 1))
    return truth[truth != UNLABELLED], predicted[truth != UNLABELLED]


def edit_score(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Edit score: 1 minus the normalised edit distance of the order of segments.

    Lea et al. 2016, "Segmental spatiotemporal CNNs for fine-grained action segmentation",
    https://arxiv.org/abs/1602.02995. Scattered frames of a wrong class cost little in frame
    accuracy and much here.

    Args:
        truth: class numbers of one sequence of frames (T,), `UNLABELLED` where there is no label.
        predicted: likewise; `UNLABELLED` at the same frames.

    Returns:
        0 to 1; 1 where both have no segment.
    """
    ours, theirs = ([c for c, _, _ in _pieces(frames)] for frames in (predicted, truth))
    return order_score(ours, theirs)


def order_score(ours: Sequence[object], theirs: Sequence[object]) -> float:
    """1 minus the edit distance of two sequences of classes over the longer one's length.

    1 where both are empty.
    """
    row = list(range(len(theirs) + 1))
    for i, a in enumerate(ours, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(theirs, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return 1 - row[-1] / max(len(ours), len(theirs), 1)


def segment_hits(truth: np.ndarray, predicted: np.ndarray, overlap: float) -> tuple[int, int, int]:
    """Segments found, invented and missed in one sequence, for the F1 of Lea et al. 2017, https://arxiv.org/abs/1611.05267.

    Each predicted segment is matched with the true one of its class that it overlaps most, if their
    intersection over union is at least `overlap`. A true segment is matched once; a second match
    is a false positive.

    Args:
        truth: class numbers (T,), `UNLABELLED` where there is no label.
        predicted: likewise; `UNLABELLED` at the same frames.
        overlap: in (0, 1].

    Returns:
        true positives, false positives, false negatives; add them up over sequences before taking
        F1.
    """
    return piece_hits(_pieces(truth), _pieces(predicted), overlap)


Pieces = Sequence[tuple[Any, float, float]]  # class, start and end of each


def piece_hits(true: Pieces, ours: Pieces, overlap: float) -> tuple[int, int, int]:
    """`segment_hits` of segments by class, start and end, which may overlap."""
    found = set()
    for number, start, end in ours:
        overlaps = [
            max(min(end, b) - max(start, a), 0) / (max(end, b) - min(start, a)) * (number == c)
            for c, a, b in true
        ]
        best = max(range(len(true)), key=overlaps.__getitem__, default=None)
        if best is not None and overlaps[best] >= overlap:
            found.add(best)
    return len(found), len(ours) - len(found), len(true) - len(found)


def segment_scores(sequences: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Edit score and segment F1, as in papers on action segmentation; fractions.

    Args:
        sequences: (truth, predicted) of each video, see `edit_score`.

    Returns:
        "edit", the mean over videos, and "f1_10", "f1_25", "f1_50", of all segments together.
    """
    edit = [edit_score(*pair) for pair in sequences]
    hits = lambda overlap: [segment_hits(*pair, overlap) for pair in sequences]
    return _of_one(_summary(edit, hits, np.ones((1, len(sequences)))))


def piece_scores(videos: Sequence[tuple[Pieces, Pieces]]) -> dict[str, float]:
    """`segment_scores` of segments that may overlap, by the true and found ones of each video.

    For the edit score they are in order of their starts.
    """
    return _of_one(piece_draws(videos, np.ones((1, len(videos)))))


def piece_draws(
    videos: Sequence[tuple[Pieces, Pieces]], times: np.ndarray
) -> dict[str, np.ndarray]:
    """`piece_scores` in each of R draws of the V videos (R,).

    Args:
        videos: the true and found pieces of each.
        times: how often each was drawn (R, V).
    """
    order = lambda pieces: [p[0] for p in sorted(pieces, key=lambda p: (p[1], p[2], str(p[0])))]
    edit = [order_score(order(found), order(true)) for true, found in videos]
    return _summary(edit, lambda overlap: [piece_hits(*pair, overlap) for pair in videos], times)


def _summary(
    edit: list[float], hits: Callable[[float], list[tuple[int, int, int]]], times: np.ndarray
) -> dict[str, np.ndarray]:
    scores = {"edit": times @ np.array(edit) / times.sum(1)}
    for overlap in OVERLAPS:
        found, invented, missed = (times @ np.array(hits(overlap))).T
        most = np.maximum(2 * found + invented + missed, 1)
        scores[f"f1_{overlap * 100:.0f}"] = 2 * found / most
    return scores


def _of_one(draws: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(values[0]) for name, values in draws.items()}
