"""Which frames, which crop: counter-based randomness and the two kinds of view.

Every random choice is a function of (seed, epoch, sample, view) and of nothing else, so the same
clip gets the same crop whatever the number of workers and processes, and a resumed run needs
no generator state.
"""

import numpy as np

# Streams kept apart so that no choice of one kind is correlated with a choice of another.
# 3 and 4 are the recipes' own: the clips of the online kNN, the mask of the figure.
ORDER, VIEW, PLACES = 1, 2, 5


def counter_rng(seed: int, *counter: int, stream: int = VIEW) -> np.random.Generator:
    """A generator that is a pure function of a seed and up to two or three counters.

    Philox is counter-based: key and counter select one of 2**192 disjoint streams, and making one
    costs microseconds. The lowest counter word is left to the generator itself.
    """
    assert len(counter) <= 3, counter
    words = [0, *counter, *([0] * (3 - len(counter)))]
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=words))


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The order of one epoch: a permutation that depends on (seed, epoch) only."""
    return counter_rng(seed, epoch, stream=ORDER).permutation(num_samples)


def dense_indices(
    num_frames: int, frames: int, stride: int, rng: np.random.Generator
) -> np.ndarray:
    """`frames` frame numbers, `stride` apart, from a random start.

    A clip too short for the span repeats its last frame that the stride reaches, as VideoMAE does.
    """
    span = (frames - 1) * stride + 1
    start = int(rng.integers(max(num_frames - span, 0) + 1))
    last = (num_frames - 1) // stride * stride if num_frames < span else num_frames - 1
    return np.minimum(start + stride * np.arange(frames), last)


def spread_starts(indices: np.ndarray, num_frames: int, views: int) -> list[np.ndarray]:
    """Frame numbers of several views of one video: those given, and others at starts spread over the rest of it.

    View k starts k / views of all possible starts later, round the end to the beginning.

    Args:
        indices: of the first view.
        num_frames: frames of the video.
        views: how many.
    """
    first, last = int(indices[0]), int(indices[-1])
    starts = max(num_frames - (last - first), 1)
    return [indices - first + (first + k * starts // views) % starts for k in range(views)]


def test_indices(num_frames: int, frames: int, stride: int, num_views: int) -> list[np.ndarray]:
    """Frame numbers of `num_views` clips, starts evenly spread from the first to the last possible.

    VideoMAE's K400 test protocol places start i at int(i * (n - span) / (views - 1)); one view is
    the centre.
    """
    span = (frames - 1) * stride + 1
    room = max(num_frames - span, 0)
    last = (num_frames - 1) // stride * stride if num_frames < span else num_frames - 1
    places = [0.5] if num_views == 1 else np.linspace(0, 1, num_views)
    return [np.minimum(int(p * room) + stride * np.arange(frames), last) for p in places]


def multi_scale_box(
    width: int, height: int, scales: tuple[float, ...], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """TSN's multi-scale crop: left, top, width, height of one random box for the whole clip.

    Sides are the short side times two scales at most one step apart (max_distort 1), at one of 13
    fixed places (corners, edges, centre and between), as VideoMAE pretrains.
    """
    short = min(width, height)
    sides = [int(short * s) for s in scales]
    pairs = [(w, h) for i, w in enumerate(sides) for j, h in enumerate(sides) if abs(i - j) <= 1]
    w, h = pairs[rng.integers(len(pairs))]
    step_x, step_y = (width - w) // 4, (height - h) // 4
    places = [
        (0, 0), (4, 0), (0, 4), (4, 4), (2, 2),
        (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3),
    ]  # fmt: skip
    across, down = places[rng.integers(len(places))]
    return across * step_x, down * step_y, w, h


def test_boxes(width: int, height: int, num_crops: int) -> list[tuple[int, int, int, int]]:
    """Square boxes of the short side: the centre, or `num_crops` evenly along the long side."""
    side = min(width, height)
    places = [0.5] if num_crops == 1 else np.linspace(0, 1, num_crops)
    return [(int(p * (width - side)), int(p * (height - side)), side, side) for p in places]
