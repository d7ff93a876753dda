"""Accuracies and intervals against numbers worked out by hand."""

import numpy as np
import pytest
from scipy.stats import binomtest

from downstream.metrics import (
    bootstrap_intervals,
    confusion_matrix,
    mean_class_accuracy,
    topk_accuracy,
)


@pytest.mark.parametrize(
    ("k", "expected"), [(1, 1 / 4), (2, 2 / 4), (3, 3 / 4), (4, 1.0), (9, 1.0)]
)
def test_topk_counts_labels_among_the_k_best(k, expected):
    scores = np.array([[9, 5, 4, 0], [9, 8, 1, 0], [7, 6, 5, 1], [4, 3, 2, 1]])
    assert topk_accuracy(scores, np.array([0, 1, 2, 3]), k) == expected


def test_topk_of_equal_scores_prefers_the_lower_class():
    scores = np.zeros((2, 3))
    assert topk_accuracy(scores, np.array([0, 1]), 1) == 0.5
    assert topk_accuracy(scores, np.array([2, 2]), 2) == 0.0


def test_mean_class_accuracy_weighs_classes_equally_and_skips_absent_ones():
    labels = np.array([0, 0, 0, 0, 2, 2])
    predicted = np.array([0, 0, 0, 1, 2, 1])
    assert mean_class_accuracy(labels, predicted) == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_confusion_matrix_has_true_classes_in_rows():
    counts = confusion_matrix(np.array([0, 0, 1]), np.array([2, 2, 0]), 3)
    assert counts.tolist() == [[0, 0, 2], [1, 0, 0], [0, 0, 0]]


def test_interval_over_two_subjects_is_that_of_the_three_possible_draws():
    # One subject all right, one all wrong: accuracy 0 (1 in 4), 1/2 (2 in 4), 1 (1 in 4).
    labels, predicted = np.zeros(20, int), np.repeat([0, 1], 10)
    ends, drawn = bootstrap_intervals(labels, predicted, ["a"] * 10 + ["b"] * 10, 0, {})
    assert (ends["top1"], drawn) == ((0.0, 1.0), "subjects")


@pytest.mark.parametrize("subjects", [[None] * 200, ["a"] * 200, ["a"] * 199 + [None]])
def test_interval_over_videos_is_the_binomial_one(subjects):
    labels, predicted = np.zeros(200, int), np.repeat([0, 1], [150, 50])
    ends, drawn = bootstrap_intervals(labels, predicted, subjects, 0, {})
    half = 1.96 * np.sqrt(0.75 * 0.25 / 200)
    assert drawn == "videos"
    assert ends["top1"] == pytest.approx((0.75 - half, 0.75 + half), abs=0.012)


def test_subjects_of_equal_accuracy_do_not_make_the_interval_vanish():
    labels, predicted = np.zeros(30, int), np.tile(np.repeat([0, 1], [3, 7]), 3)
    ends, drawn = bootstrap_intervals(
        labels, predicted, list("a" * 10 + "b" * 10 + "c" * 10), 0, {}
    )
    low, high = ends["top1"]
    assert drawn == "subjects" and low < 0.2 and high > 0.4


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("subjects", [["a", "b", "c"] * 4, [None] * 12])
def test_nothing_is_certain_of_videos_that_are_all_wrong_or_all_right(right, subjects):
    labels = np.arange(12) % 2
    predicted = labels if right else 1 - labels
    groups = len(set(subjects)) if subjects[0] else 12
    limits = binomtest(right * groups, groups).proportion_ci(0.95, "exact")
    ends, _ = bootstrap_intervals(labels, predicted, subjects, 0, {})
    assert ends["top1"] == ends["mean_class_accuracy"] == pytest.approx((limits.low, limits.high))


def test_intervals_hold_their_point_estimates_and_repeat():
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=120)
    predicted = np.where(rng.random(120) < 0.6, labels, rng.integers(5, size=120))
    subjects = [f"s{i % 8}" for i in range(120)]
    half = np.repeat([0.0, 1.0], 60)
    other = {"again": labels == predicted, "half": half}
    first, _ = bootstrap_intervals(labels, predicted, subjects, 3, other)
    assert first == bootstrap_intervals(labels, predicted, subjects, 3, other)[0]
    assert first != bootstrap_intervals(labels, predicted, subjects, 4, other)[0]
    values = {
        "top1": (labels == predicted).mean(),
        "mean_class_accuracy": mean_class_accuracy(labels, predicted),
        "half": 0.5,
    }
    for name, value in values.items():
        assert first[name][0] < value < first[name][1]
    assert first["again"] == pytest.approx(first["top1"])
