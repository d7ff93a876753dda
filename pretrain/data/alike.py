"""Says of two clips whether one is a copy of the other: aligned in time and space, then compared.

1. Small pictures (`SMALL` pixels): the time by windows that look alike (`pretrain/data/windows.py`)
   and by a correlation of what changes at every shift; the place in space by the frames of these
   windows, or by the still picture (the median over time). Where motion repeats itself, a short
   overlap counts less than a long one. Most pairs end here.
2. Pictures of the signatures, `SIDE` pixels: the place and the time more finely.
3. Frames, of 64 pixels: times to the frame, places to a fraction of a pixel; then what changes has
   to agree in detail, and so do moving and still parts. Two people who do the same at the same
   place look alike in 1 and 2, not in 3.

In 2 and 3 the shift in space is searched at several shifts in time: of a moving person, an error in
one can hide an error in the other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pretrain.data.register import (
    EVEN,
    Place,
    around,
    correlate,
    correlation,
    detail,
    doubled,
    halved,
    laid_over,
    parts,
    settle,
)
from pretrain.data.signatures import RATE, SIDE
from pretrain.data.windows import DOUBT, SMALL, Lag, Windows, windows

FINE = (64, 32, 20)  # pixels: the most that frames of both have
SHORTEST = 8  # pictures that two clips must share
AGREEING = 0.55  # mean cosine of windows at the best lag
SURELY = 0.75  # from which on the lag, of motion that repeats itself, may be a wrong one
WORTH_MORE = 0.5  # correlation of small pictures at that lag; of copies over 0.6
HOPEFUL = 0.6  # of small pictures at the best lag and place
CHANGING, RESTING, BOTH = 0.6, 0.5, 1.35  # correlations of the pictures of signatures, in detail
STARTING = 0.5  # of frames, at the lag and place of these pictures
MOST_PICTURES = 16  # of each clip that are compared at a time
LONGEST = 10.0  # seconds in common whose frames are compared
# What decides in the end is a weighted sum of transformed correlations (Fisher 1921).
SURE = 5.0  # score
STILL = 0.9  # correlation of still parts, where nothing moves
WEIGHTS, OFFSET = (5.0, 5.5, 1.6), -13.4

# Gives the frames of a clip between two times, seconds, as squares of a side: (T, side, side), and
# when each is shown.
Frames = Callable[[float, float, int], tuple[np.ndarray, np.ndarray]]


class Clip:
    """What is known of a clip.

    Args:
        pictures: of its signature, (T, SIDE, SIDE) from 0 to 255, `RATE` a second.
        short: short side of its frames, pixels.
        frames: gives these.
    """

    def __init__(self, pictures: np.ndarray, short: int, frames: Frames):
        self.pictures, self.short, self.frames = pictures.astype(np.float32), short, frames

    @cached_property
    def small(self) -> np.ndarray:
        """Pictures of SMALL pixels."""
        return halved(self.pictures)

    @cached_property
    def windows(self) -> Windows:
        """Its windows."""
        return windows(self.small)

    @cached_property
    def rest(self) -> np.ndarray:
        """What rests, in detail, (SMALL, SMALL)."""
        return detail(np.median(self.small, 0))

    @cached_property
    def change(self) -> np.ndarray:
        """What changes, (T, SMALL, SMALL)."""
        return self.small - np.median(self.small, 0)

    @property
    def moves(self) -> bool:
        """Whether anything does."""
        return len(self.windows.first) > 0

    @property
    def structured(self) -> bool:
        """Whether the still picture is no blank."""
        return float(self.rest.std()) > 2


@dataclass(frozen=True)
class Alike:
    """How two clips agree where they agree best.

    Attributes:
        score: above 0 they are copies, above SURE even if they have lookalikes.
        starts: seconds into each at which what they share begins.
        seconds: for how long.
        place: of the second in the first, across and down, in pictures of some side.
        mirrored: whether one is the mirror image of the other.
        changing: correlation of what changes, in detail.
        moving: of moving parts.
        resting: and of still ones; 1 where it has no structure.
        small: whether frames are too small to tell lookalikes apart.
    """

    score: float
    starts: tuple[float, float]
    seconds: float
    place: tuple[Place, Place]
    mirrored: bool
    changing: float
    moving: float
    resting: float
    small: bool


@dataclass(frozen=True)
class _Guess:
    score: float
    sure: float  # less of fewer pictures
    place: tuple[Place, Place]  # of pictures of SMALL pixels
    lag: int  # how much later the other shows the same, pictures
    mirrored: bool


def shared(
    ours: np.ndarray, theirs: np.ndarray, lag: int, mirrored: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """The pictures that both have, if `lag` is how much later the other shows the same."""
    start = max(0, -lag)
    count = min(len(ours) - start, len(theirs) - start - lag)
    if count < SHORTEST:
        return None
    other = theirs[start + lag : start + lag + count]
    return ours[start : start + count], other[..., ::-1] if mirrored else other


def _some(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of many pictures some, evenly."""
    step = -(-len(ours) // MOST_PICTURES)
    return ours[::step], theirs[::step]


def _best_lag(ours: Clip, theirs: Clip, place: tuple[Place, Place], mirrored: bool) -> int | None:
    """The shift in time at which what changes correlates best at a place."""
    other, seen = laid_over(theirs.change[..., ::-1] if mirrored else theirs.change, place)
    a, b = detail(ours.change, 3, seen), detail(other, 3, seen)
    lags = np.arange(SHORTEST - len(a), len(b) - SHORTEST + 1)
    if not len(lags):
        return None
    # The sums along diagonals of the products of all pictures.
    places = np.arange(len(b)) - np.arange(len(a))[:, None] + len(a) - 1
    sums = np.bincount(places.ravel(), (a @ b.T).ravel())[lags + len(a) - 1]
    energy = [np.concatenate([[0], np.cumsum(np.square(x).sum(1))]) for x in (a, b)]
    starts = np.maximum(0, -lags)
    counts = np.minimum(len(a) - starts, len(b) - starts - lags)
    mine = energy[0][starts + counts] - energy[0][starts]
    other_energy = energy[1][starts + lags + counts] - energy[1][starts + lags]
    scores = sums / np.sqrt(mine * other_energy + 1e-3) - DOUBT / np.sqrt(counts)
    return int(lags[scores.argmax()])


def _guesses(ours: Clip, theirs: Clip, hints: tuple[Lag, Lag]) -> list[_Guess]:
    """Ways to lay two clips over each other, the best first.

    Args:
        ours: a clip.
        theirs: another.
        hints: what `best_lags` says of them.
    """
    found: dict[tuple[int, bool], _Guess] = {}

    def consider(lag: int | None, place: tuple[Place, Place], mirrored: bool, count: int) -> float:
        pair = None if lag is None else shared(ours.small, theirs.small, lag, mirrored)
        if pair is None or lag is None:
            return 0.0
        a, b = map(parts, _some(*pair))
        across, down = (around(p, SMALL, 0.07, 0.6) for p in place)
        score, *best = correlate(a, b, across, down, count)
        sure = score - DOUBT / np.sqrt(len(pair[0]))
        known = found.get((lag, mirrored))
        if known is None or sure > known.sure:
            found[lag, mirrored] = _Guess(score, sure, (best[0], best[1]), lag, mirrored)
        return score

    for mirrored, (cosine, lag) in zip((False, True), hints, strict=True):
        if cosine < AGREEING:
            continue
        at = ours.windows.place(theirs.windows, mirrored, lag)
        good = consider(lag, at, mirrored, 4) > WORTH_MORE
        if good:
            at = found[lag, mirrored].place
            better = _best_lag(ours, theirs, at, mirrored)
            if better != lag:
                consider(better, at, mirrored, 0)
        elif cosine < SURELY:
            continue
        if ours.structured and theirs.structured:
            other = theirs.rest[:, ::-1] if mirrored else theirs.rest
            score, *place = correlate(ours.rest[None], other[None], [EVEN], [EVEN], 7)
            if score > 0.6:
                at = (place[0], place[1])
                consider(_best_lag(ours, theirs, at, mirrored), at, mirrored, 0)
    return sorted(found.values(), key=lambda g: -g.sure)


def _scaled(place: Place, side: int) -> Place:
    """A place of pictures of SIDE pixels in those of another side."""
    times = side / SIDE
    return place[0], times * place[1] + (times - 1) * (1 - place[0]) / 2


def _phases(ours: np.ndarray, theirs: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Both as they are, and as if the other began half a picture earlier, or later."""
    smooth = (ours[:-2] + 2 * ours[1:-1] + ours[2:]) / 4
    between = (theirs[:-1] + theirs[1:]) / 2
    return [(ours, theirs), (smooth, between[1:]), (smooth, between[:-1])]


def _agreement(
    ours: np.ndarray, theirs: np.ndarray, place: tuple[Place, Place], reach: int
) -> tuple[float, float]:
    """Correlations in detail of changes and of still parts."""
    other, seen = laid_over(theirs, place)
    rests = [detail(x.mean(0), reach, seen) for x in (ours, other)]
    changes = [detail(x - x.mean(0), reach, seen) for x in (ours, other)]
    structured = min(float(rest.std()) for rest in rests) >= 2
    return correlation(*changes), correlation(*rests) if structured else 1.0


def _moving(
    ours: np.ndarray, theirs: np.ndarray, place: tuple[Place, Place], reach: int
) -> float | None:
    """Correlation in detail of moving parts; None where there are hardly any."""
    other, seen = laid_over(theirs, place)
    strength = np.abs(ours - np.median(ours, 0))[:, seen]
    moving = strength >= max(np.quantile(strength, 0.9), 4)
    whole = [detail(x, reach, seen)[moving] for x in (ours, other)]
    return correlation(*whole) if moving.sum() > 20 else None


def _refined(ours: Clip, theirs: Clip, guess: _Guess) -> tuple[float, tuple[Place, Place]] | None:
    """The lag in seconds, and the place in pictures of SIDE pixels; None where that is in vain."""
    pair = shared(ours.pictures, theirs.pictures, guess.lag, guess.mirrored)
    assert pair is not None  # it was compared
    place = doubled(guess.place[0]), doubled(guess.place[1])
    found = []
    for phase, halves in zip((0.0, 0.5, -0.5), _phases(*pair), strict=True):
        a, b = _some(*halves)
        _, own = settle(parts(a[::2]), parts(b[::2]), place)
        changing, resting = _agreement(a, b, own, 3)
        found.append((changing + resting, changing, resting, phase, own))
        if changing < CHANGING - 0.2 or changing + resting < BOTH - 0.2:
            break  # half a picture makes less of a difference
    both, changing, resting, phase, place = max(found)
    if changing < CHANGING or resting < RESTING or both < BOTH:
        return None
    return (guess.lag + phase) / RATE, place


def _matched(times: tuple[np.ndarray, np.ndarray], lag: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the frames that both clips show at the same moments, as the rarer ones come."""
    mine, other = times[0], times[1] - lag
    few, many = (mine, other) if len(mine) <= len(other) else (other, mine)
    place = np.searchsorted(many, few).clip(1, max(1, len(many) - 1))
    place -= (few - many[place - 1] < many[np.minimum(place, len(many) - 1)] - few).astype(int)
    place = place.clip(0, len(many) - 1)
    half = 0.75 * max(np.diff(x).mean() if len(x) > 1 else 1.0 for x in (mine, other))
    good = np.flatnonzero(np.abs(many[place] - few) <= half)
    chosen = (good, place[good])
    return chosen if few is mine else chosen[::-1]


def _finest(
    ours: Clip, theirs: Clip, lag: float, place: tuple[Place, Place], mirrored: bool
) -> Alike | None:
    """Compare frames."""
    ends = [len(c.pictures) / RATE for c in (ours, theirs)]
    start, stop = max(0.0, -lag), min(ends[0], ends[1] - lag)
    middle = max(0.0, (stop - start - LONGEST) / 2)
    margin = 2 / RATE
    short = min(ours.short, theirs.short)
    side = next((side for side in FINE if side <= 1.1 * short), FINE[-1])
    place = _scaled(place[0], side), _scaled(place[1], side)
    a, when = ours.frames(start + middle, stop - middle, side)
    b, other = theirs.frames(start + middle + lag - margin, stop - middle + lag + margin, side)
    if mirrored:
        b = b[..., ::-1]
    if min(len(a), len(b)) < 2:
        return None
    step = min(float(np.diff(x).mean()) for x in (when, other)) / 2

    def pair(shift: float, most: int) -> tuple[np.ndarray, np.ndarray]:
        i, j = _matched((when, other), shift)
        if not len(i):
            return i, j
        some = np.unique(np.linspace(0, len(i) - 1, most).round().astype(int))
        return i[some], j[some]

    def latest(lags: list[float], reach: int, most: int) -> tuple[float, float]:
        """The best correlation of what changes at any of these lags, and the lag."""
        chosen = {at: found for at in lags if len((found := pair(at, most))[0]) >= 2}
        if not chosen:
            return -1.0, lag
        mine, others = (np.unique(np.concatenate(x)) for x in zip(*chosen.values(), strict=True))
        laid, seen = laid_over(b[others], place)
        details = detail(a[mine], reach, seen), detail(laid, reach, seen)
        scores = []
        for at, (i, j) in chosen.items():
            x, y = details[0][np.searchsorted(mine, i)], details[1][np.searchsorted(others, j)]
            scores.append((correlation(x - x.mean(0), y - y.mean(0)), -abs(at - lag), at))
        score, _, at = max(scores)
        return score, at

    reached = int(np.ceil(1 / RATE / step))
    score, lag = latest([lag + k * step for k in range(-reached, reached + 1)], 3, 12)
    if score < STARTING:
        return None
    for reach, most, shifts in ((3, 12, (0,)), (3, 12, (-2, 0, 2)), (2, 24, (0,))):
        settled = []
        for shift in shifts:  # a place a little beside does for a frame sooner or later
            i, j = pair(lag + shift * step, most)
            if len(i) >= 2:
                found = settle(parts(a[i], reach), parts(b[j], reach), place)
                settled.append((found, -abs(shift), lag + shift * step))
        if not settled:
            return None
        (_, place), _, lag = max(settled)
        score, lag = latest([lag + k * step / 2 for k in range(-4, 5)], reach, most)
        if score < CHANGING:
            return None
    i, j = pair(lag, 64)
    changing, resting = _agreement(a[i], b[j], place, 2)
    moving = _moving(a[i], b[j], place, 2)
    moving = changing if moving is None else moving
    sizes = np.arctanh(np.clip([moving, changing, resting], -0.99, 0.995))
    starts = max(0.0, -lag), max(0.0, lag)
    seconds = min(ends[0] - starts[0], ends[1] - starts[1])
    score = float(sizes @ WEIGHTS + OFFSET)
    small = side < FINE[0]
    return Alike(score, starts, seconds, place, mirrored, changing, moving, resting, small)


def compare(ours: Clip, theirs: Clip, hints: tuple[Lag, Lag]) -> Alike | None:
    """How two clips agree, of which `best_lags` says where; None: nowhere near."""
    best: Alike | None = None
    guesses = _guesses(ours, theirs, hints)
    for guess in guesses[:3]:  # where motion repeats itself, the first one may be a wrong time
        if guess.score < max(HOPEFUL, guesses[0].score - 0.1):
            break
        if fine := _refined(ours, theirs, guess):
            near = _finest(ours, theirs, *fine, guess.mirrored)
            if near and (best is None or near.score > best.score):
                best = near
        if best and best.score > 0:
            break
    return best


def compare_stills(ours: Clip, theirs: Clip) -> Alike | None:
    """How two clips agree in which nothing moves; None: nowhere near."""
    best: Alike | None = None
    for mirrored in (False, True):
        other = theirs.rest[:, ::-1] if mirrored else theirs.rest
        score, *found = correlate(ours.rest[None], other[None], [EVEN], [EVEN], 7)
        if score < HOPEFUL:
            continue
        short = min(ours.short, theirs.short)
        side = next((side for side in FINE if side <= 1.1 * short), FINE[-1])
        places = _scaled(doubled(found[0]), side), _scaled(doubled(found[1]), side)
        pair = [clip.frames(0.0, 1.0, side)[0].mean(0) for clip in (ours, theirs)]
        pair[1] = pair[1][:, ::-1] if mirrored else pair[1]
        a, b = (detail(picture)[None] for picture in pair)
        _, place = settle(a, b, places)
        laid, seen = laid_over(pair[1][None], place)
        alike = correlation(*(detail(x, 2, seen) for x in (pair[0], laid[0])))
        ends = [len(c.pictures) / RATE for c in (ours, theirs)]
        sure = float(10 * (np.arctanh(min(alike, 0.995)) - np.arctanh(STILL)))
        if best is None or sure > best.score:
            best = Alike(sure, (0.0, 0.0), min(ends), place, mirrored, 1.0, 1.0, alike, False)
    return best
