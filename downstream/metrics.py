"""Accuracies and how far to trust them. N videos, C classes; labels are class numbers."""

import numpy as np


def topk_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of the videos whose label is among the k best-scored classes.

    Args:
        scores: (N, C), larger is better; of equal scores the lower class number comes first.
        labels: (N,).
        k: with k >= C every answer is right, so say so wherever such a number is shown.
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(1).mean())


def mean_class_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes that occur in `labels` of the share recognised (macro recall)."""
    return _accuracies(labels, labels == predicted, np.ones(len(labels)))[1]


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (C, C): row = true class, column = predicted class."""
    flat = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def per_class_accuracy(counts: np.ndarray, classes: list[str]) -> dict[str, dict]:
    """What became of each class that occurs, from a confusion matrix (C, C).

    Returns:
        class name -> `accuracy`, `num` (its videos) and `most_confused`, the class it is most often taken
        for (None if it never is).
    """
    wrong = counts - np.diag(np.diag(counts))
    return {
        name: {
            "accuracy": float(counts[i, i] / counts[i].sum()),
            "num": int(counts[i].sum()),
            "most_confused": classes[wrong[i].argmax()] if wrong[i].any() else None,
        }
        for i, name in enumerate(classes)
        if counts[i].sum()
    }


def _accuracies(
    labels: np.ndarray, correct: np.ndarray, weights: np.ndarray
) -> tuple[float, float]:
    """Top-1 and mean class accuracy when video i counts `weights[i]` times."""
    totals = np.bincount(labels, weights)
    hits = np.bincount(labels, weights * correct)
    present = totals > 0
    return float(hits.sum() / totals.sum()), float((hits[present] / totals[present]).mean())


def bootstrap_intervals(
    labels: np.ndarray,
    predicted: np.ndarray,
    subjects: list[str | None],
    seed: int,
    resamples: int = 2000,
) -> tuple[tuple[float, float], tuple[float, float], str]:
    """95 % percentile intervals of top-1 and of mean class accuracy.

    Clips of one person are not independent: where every subject is known, and there are at least two,
    subjects are drawn with replacement and then, from each, as many videos as they have; otherwise
    videos alone. Without the second draw, a few subjects of equal accuracy would give an interval of
    no width at all.

    Args:
        labels: (N,).
        predicted: (N,).
        subjects: who is seen in each video.
        seed: of the draws.
        resamples: number of draws.

    Returns:
        the interval of top-1, that of mean class accuracy, and what was drawn: "subjects" or "videos".
    """
    by_subject = None not in subjects and len(set(subjects)) > 1
    group = np.unique(subjects, return_inverse=True)[1] if by_subject else np.arange(len(labels))
    sizes = np.bincount(group)
    starts, members = np.cumsum(sizes) - sizes, np.argsort(group, kind="stable")
    correct = labels == predicted
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        groups = rng.integers(len(sizes), size=len(sizes))
        each = np.repeat(sizes[groups], sizes[groups])
        within = (rng.random(len(each)) * each).astype(int)
        videos = members[np.repeat(starts[groups], sizes[groups]) + within]
        times = np.bincount(videos, minlength=len(labels)).astype(float)
        drawn.append(_accuracies(labels, correct, times))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0).tolist()
    return (low[0], high[0]), (low[1], high[1]), "subjects" if by_subject else "videos"
