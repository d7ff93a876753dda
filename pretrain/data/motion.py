"""Finds who moves in front of a camera that rests.

Neighbouring samples, a tenth of a second apart, are compared. What counts is change beyond the
noise of that very pair: `a + b g^2` at a place with the gradient g, whose a (sensor, compression)
is taken from all of the picture and b (edges: the camera, or a codec that shifts them) from places
all over it. A change of all the light is taken out before. So whatever befalls the whole picture is
no motion, and b is how far the picture as a whole has moved.
"""

import itertools
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pretrain.data.cuts import MARGIN, Track
from pretrain.data.tracks import Tracks

SHORT = 180  # pixels of the short side that is looked at
RATE = 10.0  # samples a second
MOST_SAMPLES = 600  # of one part of a video
WINDOW, HOP = 5, 2  # pairs that are looked at together, and from one to the next
LASTING = 3  # windows in which a subject moves at least
HIGH, LOW = 6.0, 2.0  # times the noise: where motion begins, and how far it reaches
# Codecs flicker in patches: where changes so large are common, they are noise, too; but a subject
# may be as large, so that they count at most twice.
QUIET, EVEN = 0.9, 1.3
FLOOR = 0.5  # of a, grey levels squared: rounding
CAMERA = 0.35  # pixels in a sample's time: the camera moves
MOVES = 0.25  # of the pairs, in which it does
TEXTURED = 0.1  # of the cells, that have edges: or nobody can say whether it does
CELL = 9  # pixels of one
JOINED = 4  # pixels between parts of one subject, on each side
AREA = 12  # pixels of the smallest subject
FAINT = 0.15  # of the most active one's changes: less is none
BEFORE = 1.0  # seconds that are kept before somebody moves, and after
PEOPLE = 4
NOTHING = "nothing moves"
_CHI = 0.455  # median of the square of a normal number of variance 1


@dataclass
class Found:
    """What moves in a part of a video: tracks, or why there are none."""

    tracks: list[Track]
    why: str = ""


def sampled_size(width: int, height: int) -> tuple[int, int]:
    """The size at which a picture is looked at."""
    scale = min(1.0, SHORT / min(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def sampling_step(fps: Fraction, longest: int) -> int:
    """Frames from a sample to the next."""
    return max(1, round(float(fps) / RATE), -(-longest // MOST_SAMPLES))


def find_motion(
    samples: np.ndarray, ticks: np.ndarray, stop: int, picture: tuple[int, int], fps: Fraction
) -> Found:
    """Who moves in a part of a video.

    Args:
        samples: uint8 (N, h, w), grey, see `sampled_size`.
        ticks: numbers of their frames, (N,).
        stop: number of the frame behind the part.
        picture: width and height of the frames, pixels.
        fps: frames a second.
    """
    if len(samples) < 3:
        return Found([], "is too short to see what moves")
    excess, moved = _excess(samples)
    if (moved > CAMERA).mean() > MOVES:
        return Found([], "the camera moves")
    starts = range(0, max(1, len(excess) - WINDOW + 1), HOP)
    tracker = Tracks()
    seen: dict[int, list[tuple[int, np.ndarray, float]]] = {}
    for number, start in enumerate(starts):
        regions, amounts = _moving(excess[start : start + WINDOW].mean(0))
        for who, region, amount in zip(tracker.update(regions), regions, amounts, strict=True):
            seen.setdefault(who, []).append((number, region, amount))
    if not seen:
        return Found([], NOTHING)
    h, w = samples.shape[1:]
    scale = np.tile(np.array(picture) / (w, h), 2)
    amount_of = lambda who: sum(amount for _, _, amount in seen[who])
    strongest = max(map(amount_of, seen))
    strong = [who for who in seen if amount_of(who) >= FAINT * strongest]
    subjects: list[dict[int, np.ndarray]] = []  # of each, number of the window -> region
    for who in sorted(strong, key=amount_of, reverse=True):
        mine = {number: region for number, region, _ in seen[who]}
        if len(mine) < min(LASTING, len(starts)):
            continue
        whole = next((other for other in subjects if _belongs(mine, other)), None)
        if whole is None:
            subjects.append(mine)
            continue
        for number, region in mine.items():  # a hand, of who moves it
            other = whole.get(number, region)
            low, high = np.minimum(other, region), np.maximum(other, region)
            whole[number] = np.concatenate([low[:2], high[2:]])
    span = float(np.diff(ticks).mean()) * min(WINDOW, len(excess))
    around = round(BEFORE * float(fps) + span / 2)
    tracks = []
    for number, windows in enumerate(subjects[:PEOPLE], 1):
        order = sorted(windows)
        at = ticks[[starts[n] + min(WINDOW, len(excess)) // 2 for n in order]]
        regions = _without_way(np.stack([windows[n] for n in order]), at, span)
        first, last = max(int(ticks[0]), at[0] - around), min(stop - 1, at[-1] + around)
        filled = np.arange(first, last + 1)
        sides = [np.interp(filled, at, side) for side in (regions * scale).T]
        tracks.append(Track(str(number), filled, np.stack(sides, 1)))
    return Found(tracks, "" if tracks else NOTHING)


def _belongs(part: dict[int, np.ndarray], whole: dict[int, np.ndarray]) -> bool:
    """Whether what moves in `part` is of `whole`: mostly inside the box that is cut around that."""
    both = sorted(part.keys() & whole.keys())
    if not both:
        return False
    inner, outer = (np.stack([each[n] for n in both]) for each in (part, whole))
    margin = MARGIN["motion"] * (outer[:, 2:] - outer[:, :2]).max(1, keepdims=True)
    low = np.maximum(inner[:, :2], outer[:, :2] - margin)
    high = np.minimum(inner[:, 2:], outer[:, 2:] + margin)
    shared = np.clip(high - low, 0, None).prod(1) / (inner[:, 2:] - inner[:, :2]).prod(1)
    return float(shared.mean()) > 0.5


def _without_way(regions: np.ndarray, at: np.ndarray, span: float) -> np.ndarray:
    """Usual regions (N, 4) at times (N,) less the way that their middles go in a `span` of time."""
    if len(regions) < 2:
        return regions
    from scipy.ndimage import median_filter, uniform_filter1d

    # Not those in which two subjects, or a subject and a flicker, were one.
    regions = median_filter(regions, (5, 1), mode="nearest")
    middles = (regions[:, :2] + regions[:, 2:]) / 2
    smooth = uniform_filter1d(middles, 3, axis=0, mode="nearest")
    went = np.abs(np.gradient(smooth, at, axis=0)) * span
    sides = regions[:, 2:] - regions[:, :2]
    less = np.minimum(went, sides / 2) / 2
    return np.concatenate([regions[:, :2] + less, regions[:, 2:] - less], 1)


def _excess(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Change over noise (N - 1, h, w), about 1 where nothing moves, and how far the picture moves.

    The latter are pixels, (N - 1,).
    """
    from scipy.ndimage import uniform_filter

    frames = [uniform_filter(frame.astype(np.float32), 3, mode="nearest") for frame in samples]
    out = np.empty((len(frames) - 1, *frames[0].shape), np.float32)
    moved = np.zeros(len(out))
    for number, (first, second) in enumerate(itertools.pairwise(frames)):
        change = _without_light(first, second)
        slope = np.stack(np.gradient(first))
        steep = (slope**2).sum(0)
        squared = change**2
        noise = max(FLOOR, float(np.median(squared)) / _CHI)
        places = _cells(steep)
        edges = steep.flat[places]
        textured = edges > 4 + noise
        rate = 0.0
        if textured.mean() > TEXTURED:
            beyond = squared.flat[places[textured]] - noise * _CHI
            rate = max(0.0, float(np.median(beyond / edges[textured])))
            moved[number] = rate**0.5
        # Noise again, of flat places: what is at edges is counted for itself.
        flat = squared[steep <= np.median(steep)]
        noise = max(FLOOR, float(np.median(flat)) / _CHI)
        out[number] = squared / (noise + rate / _CHI * steep)
    return out, moved


def _without_light(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """What changes between two pictures but for their light: gain and offset, by least squares."""
    keep = np.ones(first.shape, bool)
    change = second - first
    for _ in range(2):
        x, y = first[keep], second[keep]
        middle = x.mean()
        spread = float(((x - middle) ** 2).sum())
        gain = float(((x - middle) * (y - y.mean())).sum()) / spread if spread > 0 else 1.0
        gain = min(max(gain, 0.5), 2.0)
        change = second - y.mean() - gain * (first - middle)
        keep = np.abs(change) <= 3 * max(1.0, float(np.median(np.abs(change))) * 1.5)
        if not keep.any():
            break
    return change


def _cells(steep: np.ndarray) -> np.ndarray:
    """The steepest place of every cell of a picture, as numbers of pixels."""
    h, w = (side // CELL * CELL for side in steep.shape)
    if not h or not w:
        return np.array([int(steep.argmax())])
    numbers = np.arange(steep.size).reshape(steep.shape)[:h, :w]
    blocks = lambda x: (
        x[:h, :w].reshape(h // CELL, CELL, w // CELL, CELL).swapaxes(1, 2).reshape(-1, CELL**2)
    )
    best = blocks(steep).argmax(1)
    return blocks(numbers)[np.arange(len(best)), best]


def _moving(excess: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """The regions that move, (N, 4), and how much changes in each, of mean changes (h, w)."""
    from scipy.ndimage import binary_dilation, find_objects, gaussian_filter, label

    smooth = gaussian_filter(np.minimum(excess, 100.0), 1.0)
    smooth /= min(2.0, max(1.0, float(np.percentile(smooth, 100 * QUIET)) / EVEN))
    low = smooth > LOW
    joined, count = label(binary_dilation(low, iterations=JOINED))
    regions, amounts = [], []
    for number, part in enumerate(find_objects(joined, count), 1):
        inside = (joined[part] == number) & low[part]
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if inside.sum() < AREA or smooth[part][inside].max() < HIGH:
            continue
        top, left = part[0].start, part[1].start
        sides = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
        regions.append(sides)
        amounts.append(float(smooth[part][inside].sum()))
    return np.array(regions, float).reshape(-1, 4), amounts
