"""Which clips to label next: uncertain ones of which there are many and no label yet.

M candidates, L labelled clips, D features, C classes.
"""

import warnings

import numpy as np
from threadpoolctl import threadpool_limits

from downstream.probe import LinearProbe

MOST = 20_000  # candidates looked at
MOST_GROUPS = 400
ROUNDS = 30  # of k-means


def uncertainty(probabilities: np.ndarray) -> np.ndarray:
    """(M,) 1 less the margin between the best and the second class of (M, C): 1 is a tie."""
    best = np.sort(probabilities, axis=1)
    return 1 - (best[:, -1] - best[:, -2])


def propose(
    probe: LinearProbe, candidates: np.ndarray, labelled: np.ndarray, number: int, seed: int
) -> np.ndarray:
    """The candidates to label next, the most useful first.

    All clips are grouped by k-means, in as many groups as there are labels and are wanted. Groups
    without a label come first and, among them, those with the most uncertainty in all; of each the
    candidate nearest to its middle. So what is proposed is typical of many clips and not alike (as
    in TypiClust, Hacohen et al. 2022, arXiv 2202.02794), and the classifier is not sure of it.

    Args:
        probe: fitted on what is labelled.
        candidates: features (M, D).
        labelled: features (L, D).
        number: wanted; fewer candidates are all proposed.
        seed: of k-means.

    Returns:
        numbers of candidates, at most `number`.
    """
    from sklearn.cluster import KMeans  # here, for it takes a second

    doubt = uncertainty(probe.probabilities(candidates))
    num = len(candidates)
    if num <= number or not number:
        return np.argsort(-doubt, kind="stable")[:number]
    every = np.concatenate([candidates, labelled]).astype(np.float64)
    every = (every - every.mean(0)) / np.maximum(every.std(0), 1e-6)
    every /= np.maximum(np.linalg.norm(every, axis=1, keepdims=True), 1e-12)
    groups = min(len(labelled) + number, MOST_GROUPS)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Number of distinct clusters")  # of equal clips
        means = KMeans(groups, n_init=1, max_iter=ROUNDS, random_state=seed).fit(every)
        distances = np.linalg.norm(every - means.cluster_centers_[means.labels_], axis=1)
    owner = means.labels_[:num]
    labels = np.bincount(means.labels_[num:], minlength=groups)
    doubts = np.bincount(owner, doubt, minlength=groups)
    order = np.lexsort((-doubts, labels))
    members = [np.flatnonzero(owner == group) for group in order]
    chosen = [own[distances[own].argmin()] for own in members if len(own)][:number]
    # Where there are fewer groups, as of equal clips: the most uncertain of the rest.
    rest = np.setdiff1d(np.argsort(-doubt, kind="stable"), chosen, assume_unique=True)
    return np.array([*chosen, *rest[: number - len(chosen)]], dtype=np.int64)
