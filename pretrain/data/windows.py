"""Windows of a clip: what changes within two thirds of a second, in a frame of its own.

The centre and the spread of the motion (its image moments, Hu 1962) become the origin and the unit
of length, so that crops and sizes make little difference.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pretrain.data.register import Place

SMALL = 16  # pixels of the pictures of which windows are made
WINDOW = 8  # pictures
PATCH = 6  # places of a window's own frame, in each direction
KEPT = 4  # of its cosine transform, in each direction and over time
REACH = 1.7  # of that frame from its centre, in spreads
NOISE = 1.0  # grey levels of change
DOUBT = 0.5  # over the root of how many agree, what a mean of few counts less than one of many
MOST = 2**22  # cosines that are computed at once
Lag = tuple[float, int]  # mean cosine of windows at a lag, pictures


@dataclass(frozen=True)
class Windows:
    """All windows of a clip in which something moves.

    Attributes:
        first: number of the first picture of each, (n,).
        shown: what changes, in frames of their own, (n, KEPT**3) of length 1.
        mirrored: the same of the mirror image.
        frames: these frames, (n, 4): centre and spread across, and down, pixels.
    """

    first: np.ndarray
    shown: np.ndarray
    mirrored: np.ndarray
    frames: np.ndarray

    def place(self, other: "Windows", mirrored: bool, lag: int) -> tuple[Place, Place]:
        """The place in another clip that shows the same so many pictures later."""
        _, i, j = np.intersect1d(self.first + lag, other.first, return_indices=True)
        shown, frames = (other.mirrored if mirrored else other.shown)[j], other.frames[j]
        if mirrored:
            frames = frames * (-1, 1, 1, 1) + (SMALL - 1, 0, 0, 0)
        weight = np.maximum((self.shown[i] * shown).sum(1), 0.01) ** 2
        weight = weight / weight.sum()
        places = []
        for axis in (0, 2):
            ratio = np.log(self.frames[i, axis + 1] / frames[:, axis + 1])
            scale = float(np.exp((weight * ratio).sum()).clip(0.65, 1.55))
            offset = self.frames[i, axis] - scale * frames[:, axis]
            places.append((scale, float((weight * offset).sum())))
        return places[0], places[1]


def best_lags(ours: Windows, others: list[Windows]) -> list[tuple[Lag, Lag]]:
    """How much later each of other clips shows the same: as it is, and mirrored.

    Args:
        ours: windows of a clip, at least one.
        others: of others, likewise.
    """
    ways = [(o.first, v) for o in others for v in (o.shown, o.mirrored)]
    most = max(1, MOST // (len(ours.first) * max(len(first) for first, _ in ways)))
    found: list[Lag] = []
    for at in range(0, len(ways), most):
        some = ways[at : at + most]
        # All lags of all of them in a row, those of each after those of the one before.
        least = np.array([first[0] - ours.first[-1] for first, _ in some])
        widths = np.array([first[-1] - ours.first[0] for first, _ in some]) - least + 1
        begins = np.concatenate([[0], np.cumsum(widths)])
        columns = np.concatenate(
            [f + b - low for (f, _), b, low in zip(some, begins, least, strict=False)]
        )
        bins = (columns - ours.first[:, None]).ravel()
        cosines = (ours.shown @ np.concatenate([vectors for _, vectors in some]).T).ravel()
        counts = np.bincount(bins, minlength=begins[-1])
        means = np.bincount(bins, cosines, minlength=begins[-1]) / np.maximum(counts, 1)
        sure = means - DOUBT / np.sqrt(np.maximum(counts, 0.01))
        for low, begin, end in zip(least.tolist(), begins, begins[1:], strict=False):
            best = int(sure[begin:end].argmax())
            found.append((float(means[begin + best]), best + low))
    return list(zip(found[::2], found[1::2], strict=True))


@lru_cache(maxsize=4)
def _cosines(size: int, first: int) -> np.ndarray:
    """`KEPT` rows of a cosine transform from a number on, (KEPT, size)."""
    waves = np.arange(first, first + KEPT)[:, None]
    rows = np.cos(np.pi * waves * (2 * np.arange(size) + 1) / (2 * size))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def windows(small: np.ndarray) -> Windows:
    """The windows of the pictures of a clip (T, SMALL, SMALL)."""
    nothing = np.zeros((0, KEPT**3), np.float32)
    if len(small) < WINDOW:
        return Windows(np.zeros(0, np.int64), nothing, nothing, np.zeros((0, 4), np.float32))
    stacks = np.lib.stride_tricks.sliding_window_view(small, WINDOW, axis=0)
    change = stacks - stacks.mean(-1, keepdims=True)
    change = change - np.median(change, axis=(1, 2), keepdims=True)  # a change of all the light
    strength = np.abs(change).mean(-1)
    peak = strength.max((1, 2), keepdims=True)
    weight = np.maximum(strength - np.maximum(NOISE, 0.15 * peak), 0)
    moving = np.flatnonzero(peak[:, 0, 0] > 2 * NOISE)
    change, weight = change[moving].transpose(0, 3, 1, 2), weight[moving]
    total, pixels = weight.sum((1, 2)), np.arange(SMALL, dtype=np.float32)
    frames, ways = [], []
    for axis in (1, 2):
        along = weight.sum(axis)
        centre = along @ pixels / total
        spread = np.sqrt((along * (pixels - centre[:, None]) ** 2).sum(1) / total + 0.3)
        at = centre[:, None] + spread[:, None] * np.linspace(-REACH, REACH, PATCH, dtype=np.float32)
        wide = np.maximum(1, spread * 2 * REACH / (PATCH - 1))[:, None, None]
        ways.append(np.maximum(0, 1 - np.abs(at[:, :, None] - pixels) / wide) / wide)
        frames += [centre, spread]

    def described(across: np.ndarray) -> np.ndarray:
        inside, time = _cosines(PATCH, 0), _cosines(WINDOW, 1)  # the mean over time is 0
        found = np.matmul(np.matmul(inside, ways[1])[:, None], change)
        found = np.matmul(found, np.matmul(inside, across)[:, None].transpose(0, 1, 3, 2))
        found = np.einsum("kt,ntyx->nkyx", time, found).reshape(len(moving), KEPT**3)
        return found / (np.linalg.norm(found, axis=1, keepdims=True) + 1e-6)

    shown, mirrored = described(ways[0]), described(ways[0][:, ::-1])
    return Windows(moving, shown, mirrored, np.stack(frames, 1))
