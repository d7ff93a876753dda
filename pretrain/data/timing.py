"""When frames are shown: from the timestamps of a file to the ticks of a constant clock.

A header's frame rate is a claim, and libavformat's is a guess, so the timestamps themselves decide.
They jitter, are rounded to milliseconds, come twice, rest for a minute and jump; frames are left
out where nothing moved. The clock ticks as fast as frames follow each other where they do, so that
a rest makes nobody's movements faster or coarser: in a rest the frame before is repeated.
"""

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np

from pretrain.data.guard import Refused
from pretrain.data.index import MAX_FPS

MAX_GAP = 120.0  # seconds; a longer gap is a broken clock, unless frames are always far apart
MAX_STEPS = 20  # so many frames apart is a gap they may have wherever they are
SLOWEST = Fraction(1, 86400)  # a picture a day
REPEATS = 20  # ticks for each frame, at most and on average: more would fill the disk with repeats
LOST = 0.1  # of the frames may fall on the tick of another one before the clock is made faster
SLOW = 2  # frames a second; a series slower than this is cut by frames, as if it had `SHOWN`
SHOWN = 25
HALF = Fraction(1, 2)  # floor(x + 1/2): round() would send every second tie the other way
_USUAL = [Fraction(n) for n in (5, 6, 8, 10, 12, 15, 16, 20, 24, 25, 30, 48, 50, 60)]
_USUAL += [Fraction(n * 1000, 1001) for n in (24, 30, 60)]


def frame_rate(
    times: np.ndarray, base: Fraction, count: int, claims: Iterable[Fraction | None]
) -> Fraction:
    """Ticks a second of a clock on which frames have a tick each, where there are many.

    Args:
        times: timestamps of the frames, in any order, unit `base`.
        base: seconds of one unit.
        count: frames, with those that have no timestamp.
        claims: what the header says of the rate; taken where the timestamps do not contradict.
    """
    told = [Fraction(c) for c in claims if c and 0 < c <= 1000]
    seconds = np.unique(times).astype(np.float64) * float(base)
    if len(seconds) < 2:  # none to go by
        return plain_rate(told[0] if told else Fraction(25))
    if len(seconds) < 0.9 * count:  # as where each group of frames has one, or several the same
        step = (seconds[-1] - seconds[0]) / (len(seconds) - 1) * len(seconds) / count
        near = np.full(count - 1, step)
    else:
        near = _usual_steps(seconds)
        step = float(near.mean())
        parts = np.diff(seconds) / step
        if np.mean(np.abs(parts - np.round(parts)) > 0.1) > 0.1:
            # No step is usual, as in a GIF of pictures with delays: a clock that fits all of them,
            # if there is one.
            grid = int(np.gcd.reduce(np.diff(np.unique(times)))) * base
            if 1 / grid <= MAX_FPS and seconds[-1] - seconds[0] <= REPEATS * len(seconds) * grid:
                return plain_rate(1 / grid)
    # The claim, or a usual rate, unless it would be half a frame off somewhere.
    fits = [c for c in (*told, *_USUAL) if abs(step - 1 / c) * len(near) < step / 2]
    exact = next((c for c in told if c in fits), None)
    exact = exact or min(fits, key=lambda c: abs(1 / c - step), default=None)
    return _affordable(plain_rate(exact or Fraction(1 / step)), seconds)


def _usual_steps(seconds: np.ndarray) -> np.ndarray:
    """The usual ones among the steps from a frame to the next, where frames are dense."""
    buckets = np.floor(seconds * 2 * MAX_FPS)  # two that no clock of ours can distinguish are one
    seconds = seconds[np.append(True, np.diff(buckets) > 0)]
    steps = np.diff(seconds)
    if not len(steps):
        return np.array([1 / MAX_FPS])
    # Sixteen steps in a row show the rate in spite of jitter; the fastest twentieth of them counts,
    # or a long part in which little happens would decide over the rest.
    width = min(16, len(steps))
    rows = (seconds[width:] - seconds[:-width]) / width
    usual = min(np.median(steps), np.quantile(rows, 0.05))
    for typical in (usual, np.quantile(steps, 0.25), np.quantile(steps, 0.1), steps.min()):
        near = steps[(steps > typical / 2) & (steps < typical * 1.5)]
        ticks = np.floor((seconds - seconds[0]) / near.mean() + 0.5) if len(near) else seconds[:1]
        if len(np.unique(ticks)) >= (1 - LOST) * len(seconds):
            break
    return near


def _affordable(rate: Fraction, seconds: np.ndarray) -> Fraction:
    """This rate, or a lower one if most ticks by far would be repeats."""
    shown = float(np.minimum(np.diff(seconds), gap_limit(rate)).sum())
    allowed = REPEATS * len(seconds)
    if shown > MAX_GAP and shown * rate > allowed + MAX_GAP * rate:
        rate = plain_rate(Fraction(allowed / (shown - MAX_GAP)))
    return rate


def plain_rate(rate: Fraction) -> Fraction:
    """A rate that a clip may have, as a ratio of small numbers."""
    if rate < 1:
        return max(1 / (1 / rate).limit_denominator(1001), SLOWEST)
    return min(rate, Fraction(MAX_FPS)).limit_denominator(1001)


def gap_limit(fps: Fraction) -> float:
    """Seconds between two frames beyond which the clock is broken, not the scene at rest."""
    return max(MAX_GAP, float(MAX_STEPS / fps))


def count_ticks(times: np.ndarray, base: Fraction, fps: Fraction) -> int:
    """Ticks from the first of these timestamps to the last, as `on_ticks` goes."""
    steps = np.diff(np.unique(times)) * float(base)
    steps[steps > gap_limit(fps)] = float(1 / fps)
    return math.floor(float(steps.sum()) * fps + HALF) + 1


def on_ticks(
    frames: Iterable[av.VideoFrame], fps: Fraction, clock: str | None, ticks: int, last: int
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Put frames on a constant clock; yield each kept frame and how many ticks it lasts.

    Args:
        frames: in the order in which they are shown.
        fps: ticks a second.
        clock: which number of a frame tells when it is shown, "pts" or "dts"; None: they are
            counted.
        ticks: how many the packets' timestamps make.
        last: ticks of the last one.

    Raises:
        Refused: there are far more ticks than that.
    """
    held: av.VideoFrame | None = None
    start: Fraction | None = None
    tick, before, total = 0, None, 0
    for count, frame in enumerate(frames, 1):
        due, now = tick + 1, None
        stamp = getattr(frame, clock) if clock else None
        if stamp not in (None, before) and frame.time_base:
            before, now = stamp, stamp * frame.time_base
            if start is not None:
                due = math.floor((now - start) * fps + HALF)
        if held is None:
            tick = due = 0
            start = now
        elif tick - fps < due < tick:  # one that is a little too early does not set the clock
            due, now = tick + 1, None
        elif not tick <= due <= tick + max(1, gap_limit(fps) * fps):
            due = tick + 1
        if now is not None and (start is None or due != math.floor((now - start) * fps + HALF)):
            start = now - due / fps  # set the clock anew after a jump
        if held is not None and due > tick:
            total += due - tick
            if total > 2 * ticks + count:
                raise Refused(f"its timestamps make no sense: {count} frames for {total} ticks")
            yield held, due - tick
        held, tick = frame, due
    if held is not None:
        yield held, last
