"""Identities of people over time, from where they are in each frame."""

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np

GAP = 15  # frames that a person may be out of view and is the same afterwards
LEAST = 0.1  # of overlap, for two regions to be of one person
Name = TypeVar("Name", bound=Hashable)


def region_of(joints: np.ndarray) -> np.ndarray:
    """The upright box around the joints that are seen, widened by a tenth on each side.

    Args:
        joints: (J, 3 or more): two coordinates first, the confidence last.

    Returns:
        Left, top, right and bottom; all 0 where no joint is seen.
    """
    points = joints[joints[:, -1] > 0, :2]
    if not len(points):
        return np.zeros(4)
    low, high = points.min(0), points.max(0)
    margin = np.maximum(0.1 * (high - low), 0.05 * (high - low).max() + 1e-3)
    return np.concatenate([low - margin, high + margin]).astype(float)


def regions_of(people: Sequence[np.ndarray]) -> np.ndarray:
    """The regions (N, 4) of people who are each given by their joints, see `region_of`."""
    return np.array([region_of(joints) for joints in people]).reshape(-1, 4)


def most_seen(people: Iterable[tuple[Name, np.ndarray]], most: int) -> list[Name]:
    """Identities of the people with the largest sums of confidence, in the order they appear in.

    Args:
        people: identity and joints (J, K), confidence last, of everybody in every frame.
        most: how many to keep at most.
    """
    seen: dict[Name, float] = {}
    for name, joints in people:
        seen[name] = seen.get(name, 0) + float(joints[:, -1].sum())
    chosen = {*sorted(seen, key=lambda name: -seen[name])[:most]}
    return [name for name in seen if name in chosen]


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of each of (N, 4) boxes with each of (M, 4), as (N, M)."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = [np.clip(b[:, 2:] - b[:, :2], 0, None).prod(-1) for b in (first, second)]
    return shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-12)


class Tracks:
    """Who is who, frame after frame: regions get the identity of the last ones that they overlap.

    Each known region moves on as it last did; all pairs are decided at once, so that the overlaps
    together are largest (Kuhn 1955). Who is out of view for more than `GAP` frames is a new person.
    """

    def __init__(self) -> None:
        self.count = 0
        self.known: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}  # region, velocity, missed

    def update(self, regions: np.ndarray) -> list[int]:
        """Identities of the (N, 4) regions of the next frame, as `region_of` gives them."""
        names = list(self.known)
        found: dict[int, int] = {}
        if names and len(regions):
            expected = np.stack([self.expected(name) for name in names])
            overlap = overlaps(expected, regions)
            from scipy.optimize import linear_sum_assignment  # a third of a second

            for i, j in zip(*linear_sum_assignment(-overlap), strict=True):
                if overlap[i, j] > LEAST:
                    found[j] = names[i]
        out = []
        for j, region in enumerate(regions):
            name, velocity = found.get(j), np.zeros(2)
            if name is None:
                name, self.count = self.count, self.count + 1
            else:
                last, before, missed = self.known[name]
                moved = (region - last).reshape(2, 2).mean(0) / (missed + 1)
                velocity = (before + moved) / 2
            self.known[name] = (region, velocity, 0)
            out.append(name)
        for name in set(names) - set(out):
            last, velocity, missed = self.known.pop(name)
            if missed < GAP:
                self.known[name] = (last, velocity, missed + 1)
        return out

    def expected(self, name: int) -> np.ndarray:
        """Where a known person's region should be in the next frame."""
        region, velocity, missed = self.known[name]
        return region + np.tile(velocity * (missed + 1), 2)


def link(frames: Sequence[Sequence[np.ndarray]]) -> list[list[int]]:
    """Identities of the people of each frame, each given by the joints, see `region_of`."""
    tracks = Tracks()
    return [tracks.update(regions_of(frame)) for frame in frames]
