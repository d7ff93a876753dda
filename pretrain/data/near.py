"""Near-duplicates: clips that show the same moments, however they were encoded, cut or cropped.

    python -m pretrain.data.near packs/mine

Packing looks for them at its end; this does so in a pack that is there.

1. The windows of every clip (`pretrain/data/windows.py`): of some, the nearest of other clips by
   cosine, also mirrored, in blocks of matrix products; of many clips only within the nearest cells
   of a coarse quantiser (Jegou et al. 2011). Of clips in which nothing moves, and of pictures, what
   rests takes their place.
2. Each such pair is aligned in time and space and compared (`pretrain/data/alike.py`). Most pairs
   end at windows, or at pictures of 16 or 32 pixels; of those that are left, frames are read from
   the pack.

What was found is listed in near_duplicates.csv of the pack (`pretrain/data/near_list.py`), and the
index has the hash of that file; packs in which none were looked for have no such entry.

Clips of one source are not compared: no split divides it. Of blank clips nothing can be said. Of
long ones the first `LONGEST` pictures of their signature count.
"""

import hashlib
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from pretrain.data.alike import SURE, Alike, Clip, compare, compare_stills
from pretrain.data.decode import DecodeError, decode_frames
from pretrain.data.index import NEAR, SIGNATURES, checked_lines, load_index, refuse_part
from pretrain.data.near_list import MOST, near_lines, read_struck, unmatched
from pretrain.data.progress import counting
from pretrain.data.register import shrunk
from pretrain.data.signatures import (
    LONGEST,
    RATE,
    SIDE,
    Signature,
    open_signatures,
    pace,
    read_signature,
    write_signatures,
)
from pretrain.data.windows import Lag, best_lags
from pretrain.files import open_regular, reading, replacing, write_synced
from pretrain.folders import writing
from pretrain.log import cli
from pretrain.names import counted, for_screen

QUERIES = 4  # windows of a clip whose nearest are looked for
EVERY = 2  # of so many windows one is stored
PARTNERS = 12  # clips of which more is to be seen, of each
CELL = 4096  # windows in a cell of the quantiser, about
PROBED = 16  # cells
BLOCK = 512  # windows that are compared at once
PROMISING = 0.55  # cosine of two windows
DOUBTFUL = 2.0  # score below which clips may be lookalikes
KEPT = 2**29  # bytes of clips that are kept in memory, about
EACH = 7 * SIDE**2  # bytes of a picture and what is made of it
WHOLE = 20.0  # seconds of a clip whose frames are kept


# ---- which pairs may be


class Vectors:
    """Vectors of clips and whose they are; in a file, so that they may be many."""

    def __init__(self, folder: str, name: str):
        self.path = Path(folder) / name
        self.file = open(self.path, "wb")  # noqa: SIM115 - `pairs` closes it
        self.owner: list[np.ndarray] = []
        self.asked: list[np.ndarray] = []
        self.asker: list[np.ndarray] = []
        self.width = 0

    def add(self, clip: int, stored: np.ndarray, asked: np.ndarray) -> None:
        """Store vectors (n, D) of a clip, and note others whose nearest are to be found."""
        self.width = stored.shape[1]
        self.file.write(stored.astype(np.float16).tobytes())
        self.owner.append(np.full(len(stored), clip))
        self.asked.append(asked.astype(np.float16))
        self.asker.append(np.full(len(asked), clip))

    def pairs(self, apart: np.ndarray) -> set[tuple[int, int]]:
        """Pairs of clips (a < b) that have nearest vectors; none of equal numbers in `apart`."""
        self.file.close()
        if not self.owner:
            return set()
        owners, askers = np.concatenate(self.owner), np.concatenate(self.asker)
        queries = np.concatenate(self.asked)
        stored = np.memmap(self.path, np.float16, "r", shape=(len(owners), self.width))
        found: dict[int, dict[int, float]] = {}
        for rows, cell in _cells(stored, queries):
            theirs, whose = stored[cell].astype(np.float32), owners[cell]
            first = np.flatnonzero(np.diff(whose, prepend=-1))  # of each clip in the cell
            clips = whose[first]
            for start in range(0, len(rows), BLOCK):
                block = rows[start : start + BLOCK]
                cosines = queries[block].astype(np.float32) @ theirs.T
                cosines = np.maximum.reduceat(cosines, first, axis=1)
                begin = np.flatnonzero(np.diff(askers[block], prepend=-1))
                cosines = np.maximum.reduceat(cosines, begin, axis=0)
                asking = askers[block[begin]]
                cosines[apart[asking][:, None] == apart[clips]] = -1
                most = min(PARTNERS, len(clips))
                near = np.argpartition(-cosines, most - 1, axis=1)[:, :most]
                values = np.take_along_axis(cosines, near, 1)
                for r, c in zip(*np.nonzero(values > PROMISING), strict=True):
                    mine = found.setdefault(int(asking[r]), {})
                    clip = int(clips[near[r, c]])
                    mine[clip] = max(mine.get(clip, 0), float(values[r, c]))
        pairs = set()
        for clip, partners in found.items():
            for other in sorted(partners, key=lambda p: (-partners[p], p))[:PARTNERS]:
                pairs.add((min(clip, other), max(clip, other)))
        return pairs


def _cells(stored: np.ndarray, queries: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Which queries are to be compared with which of the stored vectors, by number."""
    count = len(stored) // CELL
    if count < 2 * PROBED:
        yield np.arange(len(queries)), np.arange(len(stored))
        return
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(len(stored), min(len(stored), 64 * count), replace=False))
    sample = rng.permutation(stored[chosen].astype(np.float32))
    centres = sample[:count].copy()
    for _ in range(8):
        nearest = np.concatenate([(b @ centres.T).argmax(1) for b in _blocks(sample)])
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, sample)
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(length > 0, sums / np.maximum(length, 1e-6), centres)
    home = np.concatenate([(b @ centres.T).argmax(1) for b in _blocks(stored)])
    asked = np.concatenate(
        [np.argpartition(-(b @ centres.T), PROBED, axis=1)[:, :PROBED] for b in _blocks(queries)]
    )
    order, visits = np.argsort(home, kind="stable"), np.argsort(asked.ravel(), kind="stable")
    members = np.split(order, np.searchsorted(home[order], np.arange(1, count)))
    visitors = np.split(visits, np.searchsorted(asked.ravel()[visits], np.arange(1, count)))
    for own, rows in zip(members, visitors, strict=True):
        if len(own) and len(rows):
            yield rows // PROBED, own


def _blocks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(vectors), 4 * BLOCK):
        yield vectors[start : start + 4 * BLOCK].astype(np.float32)


def find_pairs(
    clip: Callable[[int], Clip], numbers: list[int], apart: np.ndarray,
    progress: bool = False,
) -> tuple[dict[tuple[int, int], Alike], int]:  # fmt: skip
    """The near-duplicates among some clips, by their numbers (a < b), and how many are blank.

    Args:
        clip: gives what is known of one.
        numbers: of the clips.
        apart: of every clip a number; those of equal ones are not compared.
        progress: show it.
    """
    blank, still = 0, set()
    with tempfile.TemporaryDirectory() as folder:
        moving, resting = Vectors(folder, "windows"), Vectors(folder, "stills")
        for number in counting(numbers, "near-duplicates", "clip", progress):
            one = clip(number)
            own = one.windows
            if one.moves:
                few = np.linspace(0, len(own.first) - 1, QUERIES).round().astype(int)
                asked = np.concatenate([own.shown[np.unique(few)], own.mirrored[np.unique(few)]])
                moving.add(number, own.shown[::EVERY], asked)
            elif one.structured:
                still.add(number)
                rests = np.stack([one.rest, one.rest[:, ::-1]]).reshape(2, -1)
                rests = rests / np.linalg.norm(rests, axis=1, keepdims=True)
                resting.add(number, rests[:1], rests)
            else:
                blank += 1
        pairs = sorted(moving.pairs(apart) | resting.pairs(apart))
    found: dict[tuple[int, int], Alike] = {}
    hints = _hints(clip, [pair for pair in pairs if pair[0] not in still])
    for a, b in counting(pairs, "near-duplicates", "pair", progress):
        if a in still:
            near = compare_stills(clip(a), clip(b))
        else:
            near = compare(clip(a), clip(b), next(hints))
        if near is not None:
            found[a, b] = near
    return without_lookalikes(found), blank


def _hints(clip: Callable[[int], Clip], pairs: list[tuple[int, int]]) -> Iterator[tuple[Lag, Lag]]:
    """What `best_lags` says of pairs, which are sorted."""
    for a, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        yield from best_lags(clip(a).windows, [clip(b).windows for _, b in group])


def without_lookalikes(tested: dict[tuple[int, int], Alike]) -> dict[tuple[int, int], Alike]:
    """Those of the pairs whose frames were compared that are near-duplicates.

    Frames of few pixels do not tell a copy from somebody else who does the same before the same
    camera. So a clip of such frames that resembles others, too, needs a higher score.
    """
    resembled: Counter[int] = Counter()
    for pair, near in tested.items():
        resembled.update(pair if near.score < DOUBTFUL else ())

    def good(pair: tuple[int, int], near: Alike) -> bool:
        others = sum(resembled[c] - (near.score < DOUBTFUL) for c in pair)
        return near.score > (SURE if near.small and others else 0)

    return {pair: near for pair, near in tested.items() if good(pair, near)}


# ---- packs


class _Packed:
    """The clips of a pack, for comparing."""

    def __init__(self, folder: Path, index: dict):
        self.folder, self.index = folder, index
        self.rows = [row for _, row in checked_lines(folder, index)]
        self.signatures = open_signatures(folder, index)
        pictures = sum(min(LONGEST, row["frames"] / pace(row["fps"]) * RATE) for row in self.rows)
        most = max(64, int(KEPT / (pictures * EACH / len(self.rows))))
        self.clip = lru_cache(maxsize=most)(self._clip)
        self._whole = lru_cache(maxsize=64)(self._all_frames)

    def lacking(self) -> bool:
        """Whether a clip has no signature that could have one."""
        if self.signatures is None:
            return True
        none = np.flatnonzero(np.diff(self.signatures.starts) == 0)
        return any("main" not in self.rows[number] for number in none)

    def signature(self, number: int) -> bytes:
        """Of a clip, as it is stored; made of its frames where the pack has none."""
        row = self.rows[number]
        if "main" in row:
            return b""
        if self.signatures and (data := self.signatures.get(number)):
            return data
        made = Signature(row["fps"])
        for start in range(0, row["frames"], 256):
            for picture in shrunk(self._decoded(row, start, start + 256), 32).round():
                made.take(picture)
        return made.data()

    def _decoded(self, row: dict, start: int, stop: int) -> np.ndarray:
        """Grey frames of a clip (n, H, W)."""
        path = self.folder / self.index["shards"][row["shard"]]["name"]
        with reading(path), open_regular(path) as file:
            file.seek(row["offset"])
            data = file.read(row["bytes"])
        numbers = np.arange(start, min(stop, row["frames"]))
        try:
            return decode_frames(data, numbers, (row["width"], row["height"]), grey=True)
        except DecodeError as error:
            raise ValueError(f"{path} has changed on the disk: pack again ({error})") from error

    def _all_frames(self, number: int, side: int) -> np.ndarray:
        row = self.rows[number]
        return shrunk(self._decoded(row, 0, row["frames"]), side).astype(np.float16)

    def _clip(self, number: int) -> Clip:
        row = self.rows[number]
        fps = pace(row["fps"])

        def frames(start: float, stop: float, side: int) -> tuple[np.ndarray, np.ndarray]:
            first = max(0, int(np.ceil(start * fps - 1e-6)))
            last = min(row["frames"], max(first, int(np.floor(stop * fps - 1e-6)) + 1))
            times = np.arange(first, last) / fps
            if first >= last:
                return np.zeros((0, side, side), np.float32), times
            if row["frames"] <= WHOLE * fps:
                return self._whole(number, side)[first:last].astype(np.float32), times
            return shrunk(self._decoded(row, first, last), side), times

        pictures = read_signature(self.signature(number), row["frames"], row["fps"])
        return Clip(pictures, min(row["width"], row["height"]), frames)


def find_near(packed: _Packed, progress: bool = False) -> tuple[list[dict], int]:
    """The near-duplicates of a pack as lines of its list, and how many clips are blank."""
    rows = packed.rows
    numbers: dict[str, int] = {}
    apart = np.array([numbers.setdefault(row["source"], len(numbers)) for row in rows])
    # Copies to the byte are a chain; all further pairs are of the first one of each.
    last: dict[str, int] = {}
    firsts, found, blank = [], {}, 0
    for clip, row in enumerate(rows):
        before = last.get(row["sha256"])
        if before is None and "main" not in row:
            firsts.append(clip)
        elif before is not None and ("main" in row or _shows_anything(packed.clip(clip))):
            seconds = row["frames"] / pace(row["fps"])
            found[before, clip] = ("same bytes", 99.0, (0.0, 0.0), seconds)
        last[row["sha256"]] = clip
    pairs, blank = find_pairs(packed.clip, firsts, apart, progress)
    for (a, b), near in pairs.items():
        lengths = [packed.rows[c]["frames"] / pace(packed.rows[c]["fps"]) for c in (a, b)]
        found[a, b] = (_kind(near, lengths), near.score, near.starts, near.seconds)
    lines, listed = [], [0] * len(rows)
    for (a, b), (kind, score, starts, seconds) in sorted(
        found.items(), key=lambda f: (-round(f[1][1], 2), f[0])
    ):
        if max(listed[a], listed[b]) >= MOST:
            continue
        listed[a] += 1
        listed[b] += 1
        lines.append({
            "clip": a, "other_clip": b, "kind": kind, "score": round(score, 1),
            "seconds": round(seconds, 2), "source": rows[a]["source"], "start": rows[a]["start"],
            "from": round(starts[0], 2), "other_source": rows[b]["source"],
            "other_start": rows[b]["start"], "other_from": round(starts[1], 2),
        })  # fmt: skip
    return sorted(lines, key=lambda line: (line["clip"], line["other_clip"])), blank


def _shows_anything(clip: Clip) -> bool:
    return clip.moves or clip.structured


def _kind(near: Alike, lengths: list[float]) -> str:
    """What kind of copy, in words."""
    cropped = max(abs(scale - 1) for scale, _ in near.place) > 0.03
    part = min(lengths) < max(lengths) - 0.2 or near.seconds < min(lengths) - 0.2
    words = ["mirrored"] * near.mirrored + ["cropped"] * cropped + ["part"] * part
    return " ".join(words) or "same"


def add_near(out: Path, index: dict, progress: bool = False) -> str:
    """Look for the near-duplicates of a pack and list them in it; says what was found.

    Args:
        out: the pack.
        index: of it, to which is added what was found.
        progress: show it.

    Raises:
        ValueError: it is a part, is damaged, or cannot be written to.
    """
    refuse_part(index, str(out))
    read_struck(out)  # what is wrong with it is said before the search
    packed = _Packed(out, index)
    if packed.lacking():  # made before there were any
        with writing(out / SIGNATURES), replacing(out / SIGNATURES) as aside:
            made = map(packed.signature, range(len(packed.rows)))
            about = write_signatures(aside, made, len(packed.rows))
        index |= {"signatures": {"name": SIGNATURES} | about}
        packed = _Packed(out, index)
    lines, blank = find_near(packed, progress)
    found = near_lines(lines)
    about = {"name": NEAR, "sha256": hashlib.sha256(found).hexdigest(), "bytes": len(found)}
    with writing(out / NEAR), replacing(out / NEAR) as aside:
        write_synced(aside, found)
    index |= {"near_duplicates": about}
    with writing(out / "index.json"), replacing(out / "index.json") as aside:
        write_synced(aside, (json.dumps(index, indent=1) + "\n").encode())
    words = f"{counted(len(lines), 'pair')} of near-duplicates among "
    words += counted(len(packed.rows), "clip")
    words += f": {out / NEAR}" if lines else ""
    words += f"; {counted(blank, 'blank clip')} cannot be compared" * bool(blank)
    in_vain = unmatched(out, about, len(packed.rows))
    return words + f"; {in_vain}" * bool(in_vain)


@dataclass(frozen=True)
class Config:
    """Configuration of the search."""

    pack: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PACK")]
    """The folder of a pack."""


def main(config: Config) -> None:
    """Look through a pack."""
    out = Path(config.pack)
    print(for_screen(add_near(out, load_index(out), progress=True)))


if __name__ == "__main__":
    cli(main, Config)
