"""Metrics of predictions on the synthetic dataset only."""

import numpy as np

from pretrain.data.figure import REVERSED_PAIRS


def reversed_pairs_accuracy(
    scores: np.ndarray, labels: np.ndarray, classes: list[str]
) -> float | None:
    """Accuracy on the synthetic dataset's pairs of actions that hold the same frames in reversed order.

    Of the scores (N, C) only those of the two actions of a pair are compared, so 0.5 is what looking at frames
    without their order gives. None where the data have no such classes.
    """
    right = []
    for first, second in REVERSED_PAIRS:
        if first not in classes or second not in classes:
            return None
        a, b = classes.index(first), classes.index(second)
        difference = scores[:, a] - scores[:, b]
        right += [*(difference[labels == a] > 0), *(difference[labels == b] < 0)]
    return float(np.mean(right)) if right else None
