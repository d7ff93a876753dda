"""How long the index takes: seconds of one core for random unit vectors.

    OMP_NUM_THREADS=1 python -m downstream.look.speed

Search, grouping and near-duplicates take as long whatever the vectors say.
"""

import time
from collections.abc import Callable

import pretrain.threads  # noqa: F401 (before torch)

import numpy as np

from downstream.look.index import group, near_duplicates, nearest
from downstream.zero_shot import unit


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """The least processor time of several runs."""
    taken = []
    for _ in range(times):
        before = time.process_time()
        work()
        taken.append(time.process_time() - before)
    return min(taken)


def measure(count: int, width: int = 512, groups: int = 12, found: int = 600) -> dict[str, float]:
    """Seconds for a search, for groups, and for near-duplicates, of so many moments."""
    vectors = unit(np.random.default_rng(0).normal(size=(count, width))).astype(np.float32)
    video = np.arange(count) // 5
    return {
        "search": seconds(lambda: nearest(vectors, vectors[0], found), 5),
        "groups": seconds(lambda: group(vectors, groups)),
        "near-duplicates": seconds(lambda: near_duplicates(vectors, video, found)),
    }


if __name__ == "__main__":
    measure(100)  # loads scikit-learn
    for number in (10_000, 100_000):
        told = ", ".join(f"{what} {taken:.3f} s" for what, taken in measure(number).items())
        print(f"{number:,} moments: {told}", flush=True)
