"""Lays small grey videos over each other: in space by scales and shifts of both axes.

A place of an axis is (scale, shift): pixel x of the other is scale * x + shift of ours, so a crop
of the sides and a change of size are a place across and one down. Correlations at very many places
are sums over pixels, not over pictures: `correlate` tries thousands in a millisecond.
"""

from functools import lru_cache

import numpy as np

Place = tuple[float, float]
ROUNDS = 6  # in which a place is moved, at most
AREA = 0.4  # of a picture that both must show
EVEN: Place = (1.0, 0.0)  # neither moved nor scaled


def around(place: Place, side: int, scale: float, shift: float) -> list[Place]:
    """Nine places: scales that differ by a part, around the middle of ours, and shifts."""
    middle = (side - 1) / 2
    scales = [place[0] * (1 + step * scale) for step in (-1, 0, 1)]
    turned = [(s, middle - s * (middle - place[1]) / place[0]) for s in scales]
    return [(s, t + step * shift) for s, t in turned for step in (-1, 0, 1)]


@lru_cache(maxsize=8)
def crops(side: int, count: int) -> tuple[tuple[Place, ...], np.ndarray, np.ndarray]:
    """Places where the one shows all of the other, or all but up to 16 % a side, or the reverse.

    Args:
        side: of pictures, pixels.
        count: margins to try at each end.

    Returns:
        the places, and their `maps`.
    """
    margins = np.linspace(0, 0.16 * side, count).tolist()
    found: list[Place] = []
    for low in margins:
        for high in margins:
            scale = (side - low - high) / side
            shift = low - 0.5 + 0.5 * scale
            found += [(scale, shift), (1 / scale, -shift / scale)]
    places = tuple(dict.fromkeys(found))
    return places, *maps(places, side)


def doubled(place: Place) -> Place:
    """A place in pictures of twice the size."""
    return place[0], 2 * place[1] + 0.5 - 0.5 * place[0]


def maps(places: tuple[Place, ...] | list[Place], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps from their pixels to ours (H, side, side), and which of ours they show (H, side)."""
    scale, shift = np.array(places, np.float32).T[:, :, None]
    pixels = np.arange(side, dtype=np.float32)
    at = (pixels - shift) / scale
    inside = ((at > -0.5) & (at < side - 0.5)).astype(np.float32)
    wide = np.maximum(1, 1 / scale)[:, :, None]  # of finer pixels, the mean of several
    found = np.maximum(0, 1 - np.abs(at.clip(0, side - 1)[:, :, None] - pixels) / wide)
    return found * inside[:, :, None] / found.sum(2, keepdims=True), inside


def correlate(
    ours: np.ndarray, theirs: np.ndarray, across: list[Place], down: list[Place], count: int = 0
) -> tuple[float, Place, Place]:
    """The best correlation of pictures (T, S, S) at any of these places, and the place.

    Args:
        ours: pictures.
        theirs: of the other clip.
        across: places to try.
        down: likewise.
        count: try `crops`, too, with so many margins.
    """
    side = ours.shape[1]
    (maps_x, seen_x), (maps_y, seen_y) = maps(across, side), maps(down, side)
    if count:
        more, known, seen = crops(side, count)
        maps_x, maps_y = np.concatenate([maps_x, known]), np.concatenate([maps_y, known])
        seen_x, seen_y = np.concatenate([seen_x, seen]), np.concatenate([seen_y, seen])
        across, down = [*across, *more], [*down, *more]
    rows = np.matmul(theirs[None], maps_x.transpose(0, 2, 1)[:, None])
    rows = rows.transpose(0, 2, 1, 3).reshape(len(maps_x), side, -1)
    mine = ours.transpose(1, 0, 2).reshape(side, -1)
    both, own = np.matmul(mine, rows.transpose(0, 2, 1)), np.matmul(rows, rows.transpose(0, 2, 1))
    flat = lambda x: x.reshape(len(x), -1)
    cross = flat(maps_y) @ flat(both).T
    energy = flat(np.matmul(maps_y.transpose(0, 2, 1), maps_y)) @ flat(own).T
    shown = seen_y @ np.square(ours).sum(0) @ seen_x.T
    area = seen_y.sum(1)[:, None] * seen_x.sum(1) / side**2
    score = np.where(area < AREA, -1, cross / np.sqrt(np.maximum(energy * shown, 0) + 1e-5))
    y, x = np.unravel_index(int(score.argmax()), score.shape)
    return float(score[y, x]), across[x], down[y]


def settle(
    ours: np.ndarray, theirs: np.ndarray, place: tuple[Place, Place]
) -> tuple[float, tuple[Place, Place]]:
    """The best correlation near a place and its place, by Gauss-Newton (Lucas & Kanade 1981).

    Args:
        ours: pictures (T, S, S), or details of them.
        theirs: of the other clip.
        place: across and down, about a pixel from the best.
    """
    best, pixels = (-1.0, place), np.arange(ours.shape[1], dtype=np.float32)
    for _ in range(ROUNDS):
        other, seen = laid_over(theirs, place)
        if seen.mean() < AREA:
            break
        rows, columns = (np.flatnonzero(seen.any(axis)) for axis in (1, 0))
        box = (..., slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        mine = ours[box]
        score = correlation(mine, other[box])
        if score <= best[0]:
            break
        gained, best = score - best[0], (score, place)
        if gained < 2e-3:
            break
        slopes = np.empty((5, *mine.shape), np.float32)
        slopes[0] = other[box]
        for n, axis, (scale, shift) in zip((1, 3), (2, 1), place, strict=True):
            at = (pixels - shift) / scale - pixels.mean()
            slopes[n] = -np.gradient(other, axis=axis)[box]
            slopes[n + 1] = slopes[n] * (at[box[2]] if axis == 2 else at[box[1], None])
        flat = slopes.reshape(5, -1)
        gram = flat @ flat.T
        gram[np.diag_indices(5)] *= 1.001
        found = np.linalg.solve(gram + 1e-9 * np.eye(5), flat @ mine.ravel())
        steps = (found[1:] / max(float(found[0]), 0.2)).tolist()
        moved = []
        for (scale, shift), by, wider in zip(place, steps[::2], steps[1::2], strict=True):
            wider = min(max(wider, -0.08), 0.08)
            shift += min(max(by, -1.5), 1.5) - wider * float(pixels.mean())
            moved.append((scale + wider, shift))
        place = moved[0], moved[1]
    return best


def laid_over(theirs: np.ndarray, place: tuple[Place, Place]) -> tuple[np.ndarray, np.ndarray]:
    """Their pictures (T, S, S) in our pixels, and which of these they show (S, S)."""
    side = theirs.shape[1]
    (map_x,), (seen_x,) = maps([place[0]], side)
    (map_y,), (seen_y,) = maps([place[1]], side)
    return np.matmul(map_y, np.matmul(theirs, map_x.T)), (seen_y[:, None] * seen_x) > 0


def detail(pictures: np.ndarray, reach: int = 3, seen: np.ndarray | None = None) -> np.ndarray:
    """What is left of pictures minus their means over squares of 2 reach + 1 pixels.

    Args:
        pictures: (..., S, S).
        reach: pixels.
        seen: (S, S), which pixels count, or all.

    Returns:
        (..., S, S), or (..., K) of the K pixels that count.
    """
    pixels = np.arange(pictures.shape[-1])
    near = (np.abs(pixels[:, None] - pixels) <= reach).astype(np.float32)
    if seen is None:
        near /= near.sum(1, keepdims=True)
        return pictures - np.matmul(near, np.matmul(pictures, near.T))
    counts = near @ seen.astype(np.float32) @ near
    means = np.matmul(near, np.matmul(pictures * seen, near)) / np.maximum(counts, 1)
    return (pictures - means)[..., seen]


def parts(pictures: np.ndarray, reach: int = 3) -> np.ndarray:
    """Details of what changes and, as a picture more, of what rests, each of length 1."""
    rest = pictures.mean(0)
    change, still = detail(pictures - rest, reach), detail(rest, reach)
    structured = still.std() > 2
    length = lambda x: np.sqrt(np.square(x).sum()) + 1e-6
    return np.concatenate([change / length(change), still[None] / length(still) * structured])


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of two arrays of the same shape, whose means are near 0."""
    return float((a * b).sum() / np.sqrt(np.square(a).sum() * np.square(b).sum() + 1e-6))


def shrunk(pictures: np.ndarray, side: int) -> np.ndarray:
    """Pictures (T, H, W) as (T, side, side) float32: of smaller pixels the means."""

    def weights(size: int) -> np.ndarray:
        at = (np.arange(side, dtype=np.float32) + 0.5) * size / side - 0.5
        wide = max(1.0, size / side)
        found = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(size)) / wide)
        return found / found.sum(1, keepdims=True)

    down, across = (weights(size).astype(np.float32) for size in pictures.shape[1:])
    return np.matmul(down, np.matmul(pictures.astype(np.float32), across.T))


def halved(pictures: np.ndarray) -> np.ndarray:
    """Pictures (T, S, S) at half their size."""
    half = pictures.shape[1] // 2
    return pictures.reshape(len(pictures), half, 2, half, 2).mean((2, 4))
