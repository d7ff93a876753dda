"""Exact search among unit vectors, near-duplicates, and groups.

M moments, D width, K groups.
"""

import numpy as np

BLOCK = 8192  # rows compared at once
MOST_COMPARED = 20_000  # moments of which every pair is compared
SAME = 0.97  # similarity from which two moments of different videos count as near-duplicates


def nearest(vectors: np.ndarray, query: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The most similar rows of (M, D) to a query (D,), the best first: numbers and similarities.

    Equal similarities stand in the order of the rows.
    """
    numbers, scores = np.empty(0, np.int64), np.empty(0, np.float32)
    for start in range(0, len(vectors), BLOCK):
        found = vectors[start : start + BLOCK] @ query
        numbers = np.concatenate([numbers, np.arange(start, start + len(found))])
        scores = np.concatenate([scores, found])
        if len(scores) > most:
            worst = np.partition(scores, len(scores) - most)[len(scores) - most]
            kept = scores >= worst
            numbers, scores = numbers[kept], scores[kept]
    order = np.argsort(-scores, kind="stable")[:most]
    return numbers[order], scores[order]


def near_duplicates(
    vectors: np.ndarray, video: np.ndarray, most: int, same: float = SAME
) -> list[tuple[int, int, float]]:
    """Pairs of moments of different videos that are nearly the same, the most similar first.

    Of two videos only the most similar pair is told.

    Args:
        vectors: (M, D); of more than `MOST_COMPARED` an evenly spaced part is compared.
        video: (M,) the number of each moment's video.
        most: pairs.
        same: the smallest similarity.
    """
    step = -(-len(vectors) // MOST_COMPARED)
    chosen = np.arange(0, len(vectors), max(step, 1))
    rows, owner = vectors[chosen], video[chosen]
    best: dict[tuple[int, int], tuple[int, int, float]] = {}
    for start in range(0, len(rows), 1024):
        block = rows[start : start + 1024]
        similar = block @ rows[start:].T
        similar[owner[start : start + 1024, None] == owner[None, start:]] = -1
        # Each with the most similar one: so many pairs at most, however alike all are.
        for a, b in enumerate(similar.argmax(1).tolist()):
            score = float(similar[a, b])
            if score < same:
                continue
            first, second = sorted((int(owner[start + a]), int(owner[start + b])))
            if (first, second) not in best or best[first, second][2] < score:
                best[first, second] = int(chosen[start + a]), int(chosen[start + b]), score
    return sorted(best.values(), key=lambda found: (-found[2], found[:2]))[:most]


def group(vectors: np.ndarray, wanted: int) -> list[np.ndarray]:
    """K-means groups of unit vectors: of each its moments, those nearest to its centre first.

    The largest group comes first; the same vectors give the same groups.

    Args:
        vectors: (M, D).
        wanted: groups; there are no more than different vectors.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    different = len(np.unique(vectors[:: max(1, len(vectors) // 2000)], axis=0))
    wanted = max(1, min(wanted, different))
    kind = KMeans if len(vectors) <= 5000 else MiniBatchKMeans
    fitted = kind(wanted, n_init=3, random_state=0).fit(vectors)
    distance = np.linalg.norm(vectors - fitted.cluster_centers_[fitted.labels_], axis=1)
    groups = [np.flatnonzero(fitted.labels_ == k) for k in range(wanted)]
    groups = [members[np.argsort(distance[members], kind="stable")] for members in groups]
    return sorted((g for g in groups if len(g)), key=len, reverse=True)
