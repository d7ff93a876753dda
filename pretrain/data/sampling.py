"""Which frames, which crop: counter-based randomness and the two kinds of view.

Every random choice is a function of (seed, epoch, sample, view) and of nothing else, so the same
clip gets the same crop whatever the number of workers and processes, and a resumed run needs
no generator state.
"""

import math

import numpy as np

# What is drawn for: no choice for one purpose is correlated with a choice for another. The numbers
# are part of every result.
ORDER = 1  # of the clips of an epoch
VIEW = 2  # frames, crop, augmentation, mask and caption of a view of a clip
SCORED = 3  # the clips behind a score while a training runs
FIGURE = 4  # the mask of a figure
MIXTURE = 5  # where in a batch the clips of several data sets stand
STEP = 6  # dropout, drop path and mixing of one step
SKETCH = 7  # the directions along which embeddings are seen in one step
MEASURED = 8  # the clips that the preset auto looks at


def counter_rng(seed: int, *counter: int, purpose: int = VIEW) -> np.random.Generator:
    """A generator that is a pure function of a seed and up to two or three counters.

    Philox is counter-based: key and counter select one of 2**192 disjoint sequences, and making one
    costs microseconds. The lowest counter word is left to the generator itself.
    """
    assert len(counter) <= 3, counter
    words = [0, *counter, *([0] * (3 - len(counter)))]
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=words))


def some_clips(ids: np.ndarray, most: int, seed: int, purpose: int, in_order: bool) -> np.ndarray:
    """So many samples, ascending: at random, or the first ones.

    Args:
        ids: to choose from, ascending.
        most: how many at most.
        seed: of the choice.
        purpose: see `counter_rng`.
        in_order: the first ones: of a pack far away, whose clips are shuffled, all others would
            have to come, too.
    """
    if in_order:
        return np.sort(ids)[:most]
    return np.sort(counter_rng(seed, 0, purpose=purpose).permutation(ids)[:most])


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The order of one epoch: a permutation that depends on (seed, epoch) only."""
    return counter_rng(seed, epoch, purpose=ORDER).permutation(num_samples)


def window_order(seed: int, epoch: int, shards: np.ndarray, lanes: int) -> np.ndarray:
    """The order of one epoch that wants few shards at a time: a permutation, by (seed, epoch) only.

    Shards follow each other in a random order, and the clips of each in a random one. That list is
    cut into `lanes` equal sub-lists, which take turns: place p of the epoch is of sub-list
    p % lanes. At any time each sub-list wants one shard, and a process that reads only some of them
    wants only theirs (as MosaicML Streaming has canonical nodes).

    Args:
        seed: of the order.
        epoch: its number.
        shards: (N,) the shard in which each clip lies.
        lanes: how many sub-lists.

    Returns:
        (N,) clips by place.
    """
    rng = counter_rng(seed, epoch, purpose=ORDER)
    _, shards = np.unique(shards, return_inverse=True)
    place_of_shard = rng.permutation(shards.max() + 1)
    shuffled = rng.permutation(len(shards))
    listed = shuffled[np.argsort(place_of_shard[shards[shuffled]], kind="stable")]
    each, longer = divmod(len(listed), lanes)
    lane = np.arange(lanes)
    starts = lane * each + np.minimum(lane, longer)  # the first `longer` have one more
    rows = starts + np.arange(each + (longer > 0))[:, None]
    return listed[rows.ravel()[: len(listed)]]


def dense_indices(
    num_frames: int, frames: int, stride: int, rng: np.random.Generator
) -> np.ndarray:
    """`frames` frame numbers, `stride` apart, from a random start: VideoMAE's, number for number.

    A start leaves room for `frames * stride` frames: 237 of them in 300, for 16 at stride 4. A clip
    without that room starts at 0 and repeats the last number that has a frame behind it.
    """
    room = num_frames - frames * stride + 1
    if room > 0:
        return int(rng.integers(room)) + stride * np.arange(frames)
    return np.minimum(stride * np.arange(frames), max(num_frames - 2, 0) // stride * stride)


def uniform_indices(num_frames: int, frames: int, rng: np.random.Generator) -> np.ndarray:
    """One random frame number of each of `frames` equal parts of a clip.

    TSN, Wang et al. 2016, https://arxiv.org/abs/1608.00859.
    VideoMAE is fine-tuned so on Something-Something. Parts are whole frames long, what is left over
    at the end is not seen; a clip of fewer frames than parts shows its first frame only. Both as
    officially.
    """
    part = num_frames // frames
    if not part:
        return np.zeros(frames, dtype=int)
    return part * np.arange(frames) + rng.integers(part, size=frames)


def even_indices(
    num_frames: int, frames: int, rng: np.random.Generator, span: float = 1.0
) -> np.ndarray:
    """One random frame number of each of `frames` equal parts of a clip, down to its last frame.

    Parts are fractions of frames: nothing at the end is left over, and a clip of fewer frames than
    parts repeats them in order. So the middle of each part is what `test_indices` takes.

    Args:
        num_frames: of the clip.
        frames: wanted.
        rng: of the draw.
        span: smallest fraction of the clip that the parts are of; how long it is and where it
            begins are drawn. 1: all of it.
    """
    start, length = 0.0, float(num_frames)
    if span < 1:
        length *= rng.uniform(span, 1)
        start = rng.uniform(0, num_frames - length)
    places = start + (np.arange(frames) + rng.random(frames)) * (length / frames)
    return np.minimum(places.astype(int), num_frames - 1)


def spread_starts(indices: np.ndarray, num_frames: int, views: int) -> list[np.ndarray]:
    """Frame numbers of several views of one video, at starts spread over it.

    The first is the one given; view k starts k / views of all possible starts later, round the end
    to the beginning.

    Args:
        indices: of the first view.
        num_frames: frames of the video.
        views: how many.
    """
    first, last = int(indices[0]), int(indices[-1])
    starts = max(num_frames - (last - first), 1)
    return [indices - first + (first + k * starts // views) % starts for k in range(views)]


def test_indices(num_frames: int, frames: int, stride: int, num_views: int) -> list[np.ndarray]:
    """Frame numbers of the clips of a test protocol, spread over the video; one is its centre.

    Both formulas are VideoMAE's. Dense, for K400: of every `stride`-th frame, starts evenly from
    the first to the last possible one; a clip too short repeats the last of them. Uniform (`stride`
    0), for Something-Something: the middle of each of `frames` equal parts, at several offsets: of
    two views, their beginnings and middles.
    """
    if not stride:
        part = num_frames / frames
        offsets = [0.5] if num_views == 1 else [view / num_views for view in range(num_views)]
        return [(part * offset + part * np.arange(frames)).astype(np.int64) for offset in offsets]
    seen = np.arange(0, num_frames, stride)
    room = max(len(seen) - frames, 0)
    starts = [room // 2]
    if num_views > 1:
        starts = [int(view * (room / (num_views - 1))) for view in range(num_views)]
    return [seen[np.minimum(start + np.arange(frames), len(seen) - 1)] for start in starts]


def multi_scale_box(
    width: int, height: int, scales: tuple[float, ...], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """TSN's multi-scale crop: left, top, width, height of one random box for the whole clip.

    Sides are the short side times two scales at most one step apart (max_distort 1), at one of 13
    fixed positions (corners, edges, centre and between), as VideoMAE pretrains.
    """
    short = min(width, height)
    sides = [int(short * s) for s in scales]
    pairs = [(w, h) for i, w in enumerate(sides) for j, h in enumerate(sides) if abs(i - j) <= 1]
    w, h = pairs[rng.integers(len(pairs))]
    step_x, step_y = (width - w) // 4, (height - h) // 4
    positions = [
        (0, 0), (4, 0), (0, 4), (4, 4), (2, 2),
        (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3),
    ]  # fmt: skip
    across, down = positions[rng.integers(len(positions))]
    return across * step_x, down * step_y, w, h


def random_resized_box(
    width: int, height: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """RandomResizedCrop: left, top, width, height of one random box for the whole clip.

    8 to 100 per cent of the area, sides 3:4 to 4:3, as VideoMAE and Video Swin are fine-tuned
    (Szegedy et al. 2015, https://arxiv.org/abs/1409.4842). Where ten draws do not fit, the largest
    centred box whose sides do.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = rng.uniform(0.08, 1.0) * width * height
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, w, h
    w, h = min(width, round(height * high)), min(height, round(width / low))
    return (width - w) // 2, (height - h) // 2, w, h


def test_boxes(width: int, height: int, num_crops: int) -> list[tuple[int, int, int, int]]:
    """Square boxes of the short side: the centre, or `num_crops` evenly along the long side."""
    side = min(width, height)
    positions = [0.5] if num_crops == 1 else np.linspace(0, 1, num_crops)
    return [(int(p * (width - side)), int(p * (height - side)), side, side) for p in positions]
