"""Near-duplicates: clips that show the same moments, however they were encoded, cut or cropped.

    python -m pretrain.data.near packs/mine

Every packed clip is shown in grey pictures of `SIDE` x `SIDE`, `RATE` a second. What counts most is
what changes over time: clips of the same place, or of people who do the same, look alike and are
none.

1. Windows of `WINDOW` pictures, a second. Their mean is subtracted, and what is left is laid out in
   a frame of its own: the centre and the spread of what moves (its image moments) become the origin
   and the unit of length, so that crops and sizes make little difference (Hu 1962).
2. Each clip's nearest windows of others by cosine, also mirrored, in blocks of matrix products; of
   many clips only within the nearest cells of a coarse quantiser (Jegou et al. 2011).
3. Those pairs are verified: aligned in time by their windows, and in space by a search over scales
   and shifts of both axes. Then what changes has to agree in detail, and what rests.

Of clips in which nothing moves, single pictures among them, only copies to the byte are found; of
blank ones none.

The pack then lists what was found in near_duplicates.jsonl, an object a pair: clips (numbers in
clips.jsonl), sources, starts (seconds into each at which what they share begins), seconds (for how
long), alike (correlation of the changes) and mirrored. The index has the file's hash and size;
packs in which none were looked for have no such entry. A pack whose clips change loses it.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from pretrain.data.index import NEAR, json_line
from pretrain.data.ingest import SHOWN, SLOW
from pretrain.data.near_list import MOST
from pretrain.data.shards import Pack
from pretrain.files import replacing, write_synced
from pretrain.folders import writing
from pretrain.names import counted, for_screen

SIDE = 64  # pixels
RATE = 8  # pictures a second
LONGEST = 2**12  # pictures of a clip that are compared
SMALL = SIDE // 4  # pixels of the pictures of which windows are made
WINDOW = 8  # pictures
PATCH = 6  # places of a window's own frame, in each direction
REACH = 1.7  # of that frame from its centre, in spreads
NOISE = 1.0  # grey levels of change
QUERIES = 4  # windows of a clip whose nearest are looked for
NEIGHBOURS = 48  # of each
PARTNERS = 10  # clips of which more is to be seen, of each
CELL = 4096  # windows in a cell of the quantiser, about
PROBED = 16  # cells
BLOCK = 512  # windows that are compared at once
PROMISING = 0.6  # cosine of two windows
IN_A_ROW = 0.55  # and of all that two clips share, on average
AT_ALL = 0.5  # correlation of small pictures
SHORTEST = 6  # pictures that two clips must share
AREA = 0.4  # of a picture that both must show
BLANK = 3.0  # grey levels of structure below which a picture is blank
# Correlations from which on two clips are near-duplicates: of what changes, in detail, and of what
# rests. Chosen by hand on planted copies of clips; not yet scored on people kept aside.
CHANGING, RESTING = 0.7, 0.45

Places = list[tuple[float, float]]  # (scale, shift) of an axis: x of ours = scale * theirs + shift


@dataclass(frozen=True)
class Near:
    """A pair of near-duplicates.

    Attributes:
        starts: the picture of each with which what they share begins.
        count: pictures that they share.
        alike: correlation of what changes in them.
        resting: and of what rests; 1 where it has no structure.
        mirrored: whether one is the mirror image of the other.
    """

    starts: tuple[int, int]
    count: int
    alike: float
    resting: float
    mirrored: bool


def halved(pictures: np.ndarray) -> np.ndarray:
    """Pictures (T, S, S) at half their size."""
    half = pictures.shape[1] // 2
    return pictures.reshape(len(pictures), half, 2, half, 2).mean((2, 4))


# ---- windows


@dataclass(frozen=True)
class Windows:
    """All windows of a clip in which something moves.

    Attributes:
        first: number of the first picture of each, (n,).
        shown: what changes, in frames of their own, (n, W * P * P) of length 1.
        mirrored: the same of the mirror image.
        frames: these frames, (n, 4): centre and spread across, and down, pixels.
    """

    first: np.ndarray
    shown: np.ndarray
    mirrored: np.ndarray
    frames: np.ndarray


def windows(pictures: np.ndarray) -> Windows:
    """The windows of the pictures of a clip (T, SIDE, SIDE)."""
    small = halved(halved(pictures))
    if len(small) < WINDOW:
        none = np.zeros((0, WINDOW * PATCH * PATCH), np.float32)
        return Windows(np.zeros(0, np.int64), none, none, np.zeros((0, 4), np.float32))
    stacks = np.lib.stride_tricks.sliding_window_view(small, WINDOW, axis=0)
    change = stacks - stacks.mean(-1, keepdims=True)
    change = change - np.median(change, axis=(1, 2), keepdims=True)  # a change of all the light
    strength = np.abs(change).mean(-1)
    peak = strength.max((1, 2), keepdims=True)
    weight = np.maximum(strength - np.maximum(NOISE, 0.15 * peak), 0)
    moving = np.flatnonzero(peak[:, 0, 0] > 2 * NOISE)
    change, weight = change[moving].transpose(0, 3, 1, 2), weight[moving]
    total, pixels = weight.sum((1, 2)), np.arange(SMALL, dtype=np.float32)
    frames, maps = [], []
    for axis in (1, 2):
        along = weight.sum(axis)
        centre = along @ pixels / total
        spread = np.sqrt((along * (pixels - centre[:, None]) ** 2).sum(1) / total + 0.3)
        at = centre[:, None] + spread[:, None] * np.linspace(-REACH, REACH, PATCH, dtype=np.float32)
        wide = np.maximum(1, spread * 2 * REACH / (PATCH - 1))[:, None, None]
        maps.append(np.maximum(0, 1 - np.abs(at[:, :, None] - pixels) / wide) / wide)
        frames += [centre, spread]
    shown = np.matmul(maps[1][:, None], change)
    shown = np.matmul(shown, maps[0][:, None].transpose(0, 1, 3, 2))
    shown = shown / (np.sqrt((shown**2).sum((1, 2, 3), keepdims=True)) + 1e-6)
    flat = lambda x: x.reshape(len(moving), WINDOW * PATCH**2).astype(np.float32)
    return Windows(moving, flat(shown), flat(shown[..., ::-1]), np.stack(frames, 1))


def candidates(of: Callable[[int], Windows], clips: list[int]) -> set[tuple[int, int]]:
    """Pairs of clips (a < b) that have windows in common, perhaps.

    Args:
        of: gives the windows of a clip.
        clips: those to be compared.
    """
    pool, owner, asked, asker = [], [], [], []
    for clip in clips:
        own = of(clip)
        if not len(own.first):
            continue
        kept = own.shown[::2].astype(np.float16)
        pool.append(kept)
        owner += [clip] * len(kept)
        few = np.unique(np.linspace(0, len(own.first) - 1, QUERIES).round().astype(int))
        asked += [own.shown[few].astype(np.float16), own.mirrored[few].astype(np.float16)]
        asker += [clip] * (2 * len(few))
    if not pool:
        return set()
    stored, owners = np.concatenate(pool), np.array(owner)
    queries, askers = np.concatenate(asked), np.array(asker)
    found: dict[int, dict[int, float]] = {}
    for rows, cell in _cells(stored, queries):
        theirs, whose = stored[cell].astype(np.float32), owners[cell]
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            cosines = queries[block].astype(np.float32) @ theirs.T
            cosines[askers[block][:, None] == whose] = -1
            most = min(NEIGHBOURS, len(whose))
            near = np.argpartition(-cosines, most - 1, axis=1)[:, :most]
            values = np.take_along_axis(cosines, near, 1)
            for r, c in zip(*np.nonzero(values > PROMISING), strict=True):
                mine = found.setdefault(int(askers[block[r]]), {})
                clip = int(whose[near[r, c]])
                mine[clip] = max(mine.get(clip, 0), float(values[r, c]))
    pairs = set()
    for clip, partners in found.items():
        for other in sorted(partners, key=lambda p: (-partners[p], p))[:PARTNERS]:
            pairs.add((min(clip, other), max(clip, other)))
    return pairs


def _cells(stored: np.ndarray, queries: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Which queries are to be compared with which of the stored windows, by number."""
    count = len(stored) // CELL
    if count < 2 * PROBED:
        yield np.arange(len(queries)), np.arange(len(stored))
        return
    rng = np.random.default_rng(0)
    sample = stored[rng.permutation(len(stored))[: 64 * count]].astype(np.float32)
    centres = sample[:count].copy()
    for _ in range(8):
        nearest = (sample @ centres.T).argmax(1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, sample)
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(length > 0, sums / np.maximum(length, 1e-6), centres)
    blocks = lambda x: (
        x[i : i + 4 * BLOCK].astype(np.float32) for i in range(0, len(x), 4 * BLOCK)
    )
    home = np.concatenate([(b @ centres.T).argmax(1) for b in blocks(stored)])
    probed = [
        np.argpartition(-(b @ centres.T), PROBED, axis=1)[:, :PROBED] for b in blocks(queries)
    ]
    asked = np.concatenate(probed)
    for cell in range(count):
        rows = np.flatnonzero((asked == cell).any(1))
        members = np.flatnonzero(home == cell)
        if len(rows) and len(members):
            yield rows, members


# ---- verification


def _around(place: tuple[float, float], side: int, scale: float, shift: float) -> Places:
    """Nine places: scales that differ by a part, around the middle of ours, and shifts."""
    middle = (side - 1) / 2
    scales = [place[0] * (1 + step * scale) for step in (-1, 0, 1)]
    turned = [(s, middle - s * (middle - place[1]) / place[0]) for s in scales]
    return [(s, t + step * shift) for s, t in turned for step in (-1, 0, 1)]


def _crops(side: int, count: int) -> Places:
    """Places where the one shows all of the other, or all but up to 15 % a side, or the reverse."""
    margins = np.linspace(0, 0.15 * side, count).tolist()
    found: Places = []
    for low in margins:
        for high in margins:
            scale = (side - low - high) / side
            shift = low - 0.5 + 0.5 * scale
            found += [(scale, shift), (1 / scale, -shift / scale)]
    return list(dict.fromkeys(found))


def _doubled(place: tuple[float, float]) -> tuple[float, float]:
    """A place in pictures of twice the size."""
    return place[0], 2 * place[1] + 0.5 - 0.5 * place[0]


@lru_cache(maxsize=8)
def _crop_maps(side: int, count: int) -> tuple[Places, np.ndarray, np.ndarray]:
    """`_crops`, and the maps of these places."""
    places = _crops(side, count)
    return places, *_maps(places, side)


def _maps(places: Places, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps from their pixels to ours (H, side, side), and which of ours they show (H, side)."""
    scale, shift = np.array(places, np.float32).T[:, :, None]
    pixels = np.arange(side, dtype=np.float32)
    at = (pixels - shift) / scale
    inside = ((at > -0.5) & (at < side - 0.5)).astype(np.float32)
    wide = np.maximum(1, 1 / scale)[:, :, None]  # of finer pixels, the mean of several
    maps = np.maximum(0, 1 - np.abs(at.clip(0, side - 1)[:, :, None] - pixels) / wide)
    return maps * inside[:, :, None] / maps.sum(2, keepdims=True), inside


def _detail(pictures: np.ndarray) -> np.ndarray:
    """What is left of pictures (..., S, S) minus their means over 7 x 7 pixels."""
    pixels = np.arange(pictures.shape[-1])
    near = (np.abs(pixels[:, None] - pixels) <= 3).astype(np.float32)
    near /= near.sum(1, keepdims=True)
    return pictures - np.matmul(near, np.matmul(pictures, near.T))


def _parts(pictures: np.ndarray) -> np.ndarray:
    """Details of what changes and, as a picture more, of what rests, each of length 1."""
    rest = pictures.mean(0)
    change, still = _detail(pictures - rest), _detail(rest)
    structured = still.std() > 2
    length = lambda x: np.sqrt(np.square(x).sum()) + 1e-6
    return np.concatenate([change / length(change), still[None] / length(still) * structured])


def _register(
    ours: np.ndarray, theirs: np.ndarray, across: Places, down: Places, crops: int = 0
) -> tuple[float, tuple[float, float], tuple[float, float]]:
    """The best correlation of pictures (T, S, S) at any of these places, and the place.

    Args:
        ours: pictures.
        theirs: of the other clip.
        across: places to try.
        down: likewise.
        crops: try those of `_crops`, too, with so many margins.
    """
    side = ours.shape[1]
    (maps_x, seen_x), (maps_y, seen_y) = _maps(across, side), _maps(down, side)
    if crops:
        more, maps, seen = _crop_maps(side, crops)
        maps_x, maps_y = np.concatenate([maps_x, maps]), np.concatenate([maps_y, maps])
        seen_x, seen_y = np.concatenate([seen_x, seen]), np.concatenate([seen_y, seen])
        across, down = across + more, down + more
    # By linearity each pair of maps costs a few sums over pixels, not over pictures.
    rows = np.matmul(theirs[None], maps_x.transpose(0, 2, 1)[:, None])
    rows = rows.transpose(0, 2, 1, 3).reshape(len(maps_x), side, -1)
    mine = ours.transpose(1, 0, 2).reshape(side, -1)
    both, own = np.matmul(mine, rows.transpose(0, 2, 1)), np.matmul(rows, rows.transpose(0, 2, 1))
    flat = lambda x: x.reshape(len(x), -1)
    cross = flat(maps_y) @ flat(both).T
    energy = flat(np.matmul(maps_y.transpose(0, 2, 1), maps_y)) @ flat(own).T
    seen = seen_y @ np.square(ours).sum(0) @ seen_x.T
    area = seen_y.sum(1)[:, None] * seen_x.sum(1) / side**2
    score = np.where(area < AREA, -1, cross / np.sqrt(np.maximum(energy * seen, 0) + 1e-5))
    y, x = np.unravel_index(int(score.argmax()), score.shape)
    return float(score[y, x]), across[x], down[y]


def _phases(ours: np.ndarray, theirs: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Both as they are, and as if the other began half a picture earlier, or later."""
    smooth = (ours[:-2] + 2 * ours[1:-1] + ours[2:]) / 4
    between = (theirs[:-1] + theirs[1:]) / 2
    return [(ours, theirs), (smooth, between[:-1]), (smooth, between[1:])]


def _agreement(
    ours: np.ndarray, theirs: np.ndarray, across: tuple[float, float], down: tuple[float, float]
) -> tuple[float, float]:
    """Correlation of what changes in pictures (T, S, S) at a place, and of what rests."""
    side = ours.shape[1]
    (map_x,), (seen_x,) = _maps([across], side)
    (map_y,), (seen_y,) = _maps([down], side)
    seen = (seen_y[:, None] * seen_x) > 0
    pair = ours, np.matmul(map_y, np.matmul(theirs, map_x.T))
    rests = [_detail(x.mean(0))[seen] for x in pair]
    changes = [_detail(x - x.mean(0))[:, seen] for x in pair]
    if min(float(rest.std()) for rest in rests) < 2:
        return _correlation(*changes), 1.0
    return _correlation(*changes), _correlation(*rests)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt(np.square(a).sum() * np.square(b).sum() + 1e-6))


@dataclass(frozen=True)
class _Try:
    """One way to lay two clips over each other: a guess of time, mirroring and place."""

    score: float
    across: tuple[float, float]
    down: tuple[float, float]
    lag: int
    mirrored: bool


def compare(ours: np.ndarray, theirs: np.ndarray, mine: Windows, other: Windows) -> Near | None:
    """How two clips agree where they agree best; None: nowhere near.

    Args:
        ours: pictures (T, SIDE, SIDE) of one clip.
        theirs: of the other.
        mine: the windows of the first.
        other: of the second.
    """
    tries: list[tuple[_Try, list[tuple[float, float]]]] = []
    small = [halved(halved(x)) for x in (ours, theirs)]
    lags = other.first[None] - mine.first[:, None]
    for mirrored in (False, True):
        cosines = mine.shown @ (other.mirrored if mirrored else other.shown).T
        if cosines.max(initial=-1) < PROMISING:
            continue
        shift = int(lags.min())
        counts = np.bincount((lags - shift).ravel())
        means = np.bincount((lags - shift).ravel(), cosines.ravel()) / np.maximum(counts, 1)
        means[counts < min(3, counts.max())] = -1
        frames = other.frames.copy()
        if mirrored:
            frames[:, 0] = SMALL - 1 - frames[:, 0]
        for place in np.argsort(-means)[:2]:
            if means[place] < IN_A_ROW:
                break
            lag = int(place) + shift
            i, j = np.nonzero(lags == lag)
            guesses = _guess(mine.frames[i], frames[j], np.maximum(cosines[i, j], 0.01) ** 2)
            if found := _coarse(small[0], small[1], lag, mirrored, guesses):
                tries.append((found, guesses))
    tries.sort(key=lambda t: -t[0].score)
    for one, guesses in [t for t in tries[:1] if t[0].score >= AT_ALL - 0.1]:
        for lag in (one.lag - 1, one.lag + 1):
            if found := _coarse(small[0], small[1], lag, one.mirrored, guesses):
                tries.append((found, guesses))
    best: Near | None = None
    for each, _ in sorted(tries, key=lambda t: -t[0].score)[:2]:
        if each.score < AT_ALL:
            break
        near = _refine(ours, theirs, each)
        if near and (best is None or near.alike + near.resting > best.alike + best.resting):
            best = near
    return best


def _guess(mine: np.ndarray, other: np.ndarray, weight: np.ndarray) -> list[tuple[float, float]]:
    """Place across and down by the frames of windows of the same moments."""
    places = []
    weight = weight / weight.sum()
    for axis in (0, 2):
        ratio = np.log(mine[:, axis + 1] / other[:, axis + 1])
        scale = float(np.exp((weight * ratio).sum()).clip(0.65, 1.55))
        places.append((scale, float((weight * (mine[:, axis] - scale * other[:, axis])).sum())))
    return places


def _shared(
    ours: np.ndarray, theirs: np.ndarray, lag: int, mirrored: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """The pictures that both have, if `lag` is how much later the other shows the same."""
    start = max(0, -lag)
    count = min(len(ours) - start, len(theirs) - start - lag)
    if count < SHORTEST:
        return None
    other = theirs[start + lag : start + lag + count]
    return ours[start : start + count], other[..., ::-1] if mirrored else other


def _coarse(
    ours: np.ndarray, theirs: np.ndarray, lag: int, mirrored: bool,
    guesses: list[tuple[float, float]],
) -> _Try | None:  # fmt: skip
    if (pair := _shared(ours, theirs, lag, mirrored)) is None:
        return None
    across, down = (_around(g, SMALL, 0.07, 0.6) for g in guesses)
    score, across_at, down_at = _register(_parts(pair[0]), _parts(pair[1]), across, down, 4)
    return _Try(score, across_at, down_at, lag, mirrored)


def _narrow(
    ours: np.ndarray, theirs: np.ndarray, place: tuple[tuple[float, float], tuple[float, float]],
    steps: tuple[tuple[float, float], ...],
) -> tuple[float, tuple[tuple[float, float], tuple[float, float]]]:  # fmt: skip
    """The best correlation and its place across and down, looked for in ever smaller steps."""
    score = 0.0
    for scale, shift in steps:
        across, down = (_around(p, ours.shape[1], scale, shift) for p in place)
        score, *best = _register(ours, theirs, across, down)
        place = best[0], best[1]
    return score, place


def _refine(ours: np.ndarray, theirs: np.ndarray, start: _Try) -> Near | None:
    """Align two clips more finely; None where that is in vain."""
    pair = _shared(ours, theirs, start.lag, start.mirrored)
    assert pair is not None  # it was compared
    across, down = _doubled(start.across), _doubled(start.down)
    found = []
    half = [halved(x) for x in pair]
    around = [_around(p, SIDE // 2, 0.05, 1.0) for p in (across, down)]
    _, across, down = _register(_parts(half[0]), _parts(half[1]), around[0], around[1], 6)
    for phase, (x, y) in enumerate(_phases(half[0], half[1])):
        parts, place = (_parts(x), _parts(y)), (across, down)
        score, place = _narrow(*parts, place, ((0.03, 0.6), (0.015, 0.3)))
        found.append((score, phase, place, (x, y)))
    _, phase, place, (x, y) = max(found, key=lambda f: f[0])
    changing, resting = _agreement(x, y, *place)
    if changing < 0.4 or resting < 0.3:
        return None
    x, y = _phases(*pair)[phase]
    parts, place = (_parts(x), _parts(y)), (_doubled(place[0]), _doubled(place[1]))
    _, place = _narrow(*parts, place, ((0.0125, 0.6), (0.006, 0.3)))
    first = max(0, -start.lag)
    changing, _ = _agreement(x, y, *place)
    return Near((first, first + start.lag), len(pair[0]), changing, resting, start.mirrored)


def is_near(found: Near | None) -> bool:
    """Whether what was found of two clips makes them near-duplicates."""
    return found is not None and found.alike >= CHANGING and found.resting >= RESTING


# ---- packs


def find_pairs(
    pictures: Callable[[int], np.ndarray], clips: list[int]
) -> dict[tuple[int, int], Near]:
    """The near-duplicates among some clips, by their numbers (a < b).

    Args:
        pictures: gives those of a clip, (T, SIDE, SIDE).
        clips: their numbers.
    """
    shown = lru_cache(maxsize=256)(pictures)
    own = lru_cache(maxsize=4096)(lambda clip: windows(shown(clip)))
    found: dict[tuple[int, int], Near] = {}
    for a, b in sorted(candidates(own, clips)):
        near = compare(shown(a), shown(b), own(a), own(b))
        if near is not None and is_near(near):
            found[a, b] = near
    return found


def pictures_of(pack: Pack, clip: int) -> np.ndarray:
    """Grey pictures of a clip, (T, SIDE, SIDE) from 0 to 255, the means of frames, `RATE` a second.

    Of a slow series 25 frames count as a second, as in packing. What comes after `LONGEST` pictures
    is not compared; of poses alone there are none.
    """
    import torch
    from torch.nn import functional as F

    record = pack.record(clip)
    fps = record["fps"] if record["fps"] >= SLOW else SHOWN
    if "main" in record:
        return np.zeros((0, SIDE, SIDE), np.float32)
    count = min(record["frames"], round(LONGEST * fps / RATE))
    grey = []
    for start in range(0, count, 64):
        frames = pack.frames(record, np.arange(start, min(count, start + 64)))
        shades = frames.to(torch.float32).mean(-1)
        grey.append(F.adaptive_avg_pool2d(shades, SIDE).numpy())
    small = np.concatenate(grey)
    if fps <= RATE:
        return small[(np.arange(int(count * RATE / fps)) * fps / RATE).astype(int)]
    starts = np.round(np.arange(int(np.ceil(count * RATE / fps - 1e-6))) * fps / RATE).astype(int)
    starts = starts[starts < count]
    sums = np.add.reduceat(small, starts, axis=0)
    return sums / np.diff(starts, append=count)[:, None, None].astype(np.float32)


def find_near(pack: Pack) -> bytes:
    """The list of the near-duplicates of a pack, as near_duplicates.jsonl has it."""
    rows = list(pack.records())
    shown = lambda clip: pictures_of(pack, clip)
    # Copies to the byte are a chain; all further pairs are of the first one of each.
    last: dict[str, int] = {}
    firsts, found = [], {}
    for clip, row in enumerate(rows):
        before = last.get(row["sha256"])
        if before is None:
            firsts.append(clip)
        elif "main" not in row and float(_detail(pictures := shown(clip)).std()) >= BLANK:
            found[before, clip] = Near((0, 0), len(pictures), 1.0, 1.0, False)
        last[row["sha256"]] = clip
    found |= find_pairs(shown, firsts)
    lines, listed = [], [0] * len(rows)
    for (a, b), near in sorted(found.items(), key=lambda f: (-round(f[1].alike, 3), f[0])):
        if max(listed[a], listed[b]) >= MOST:
            continue
        listed[a] += 1
        listed[b] += 1
        about = {
            "clips": [a, b], "sources": [rows[a]["source"], rows[b]["source"]],
            "starts": [round(rows[c]["start"] + first / RATE, 3)
                       for c, first in zip((a, b), near.starts, strict=True)],
            "seconds": near.count / RATE, "alike": round(near.alike, 3), "mirrored": near.mirrored,
        }  # fmt: skip
        lines.append(((a, b), json_line(about)))
    return "".join(line for _, line in sorted(lines)).encode()


def add_near(folder: str) -> str:
    """Look for the near-duplicates of a pack and list them in it; says what was found.

    Raises:
        ValueError: it is no pack, or cannot be written to.
    """
    pack, out = Pack(folder), Path(folder)
    found = find_near(pack)
    about = {"name": NEAR, "sha256": hashlib.sha256(found).hexdigest(), "bytes": len(found)}
    index = pack.index | {"near_duplicates": about}
    with writing(out / NEAR), replacing(out / NEAR) as aside:
        write_synced(aside, found)
    with writing(out / "index.json"), replacing(out / "index.json") as aside:
        write_synced(aside, (json.dumps(index, indent=1) + "\n").encode())
    pairs = found.count(b"\n")
    return f"{counted(pairs, 'pair')} of near-duplicates among {counted(len(pack), 'clip')}: " + (
        f"{out / NEAR}" if pairs else "every clip is its own"
    )


def main() -> None:
    """Look through the pack whose folder is given."""
    if len(sys.argv) != 2:
        raise ValueError("give the folder of a pack: python -m pretrain.data.near packs/mine")
    print(for_screen(add_near(sys.argv[1])))


if __name__ == "__main__":
    main()
