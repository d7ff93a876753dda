"""Accuracies and their intervals. N videos, C classes; labels are class numbers.

scikit-learn is imported where it is used: importing it takes as long as scoring.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from pretrain.data.figure import REVERSED_PAIRS

RESAMPLES = 2000  # of the bootstrap


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities from logits, along the last axis."""
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def topk_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Fraction of the videos that `topk_hits` finds."""
    return float(topk_hits(scores, labels, k).mean())


def topk_hits(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Whether the label of each video is among its k best-scored classes (N,).

    Not scikit-learn's: of equal scores it prefers the higher class number, where `argmax`, and so
    the prediction, is the lower one, and it takes two classes in another form.

    Args:
        scores: (N, C), larger is better; of equal scores the lower class number comes first.
        labels: (N,).
        k: with k >= C every prediction counts as correct, so say so wherever such a number is
            shown.
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return (best == labels[:, None]).any(1)


def mean_class_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes that occur in `labels` of the fraction recognised (macro recall)."""
    from sklearn.metrics import recall_score

    return float(recall_score(labels, predicted, labels=np.unique(labels), average="macro"))


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (C, C): row = true class, column = predicted class."""
    from sklearn import metrics

    return metrics.confusion_matrix(labels, predicted, labels=np.arange(num_classes))


def per_class_accuracy(counts: np.ndarray, classes: list[str]) -> dict[str, dict]:
    """Accuracy and most frequent confusion of each class, from a confusion matrix (C, C).

    Returns:
        class name -> `accuracy`, `num` (its videos) and `most_confused`, the class it is most often
        taken for (None if it never is).
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


def bootstrap(
    statistic: Callable[[np.ndarray], float | tuple[float, ...]],
    groups: Sequence[str | None] | np.ndarray,
    seed: int,
) -> tuple[list[float], list[float]]:
    """95 % percentile intervals of numbers about N videos.

    Clips of one person are not independent: groups are drawn with replacement and then, from each,
    as many videos as it has. Without the second draw, a few groups of equal accuracy would give an
    interval of no width at all. (`scipy.stats.bootstrap` knows no groups.)

    Args:
        statistic: how often each video was drawn (N,) -> a number, or several.
        groups: (N,) who is seen in each video; all different: videos are drawn.
        seed: of the draws.

    Returns:
        the lower and the upper bounds, one a number.
    """
    low, high = interval([statistic(times) for times in draws(groups, seed)])
    return np.atleast_1d(low).tolist(), np.atleast_1d(high).tolist()


def paired_difference(
    difference: np.ndarray, subjects: Sequence[str | None], seed: int
) -> tuple[float, float, float]:
    """Mean over videos of what one model has above another, and its 95 % interval, see `bootstrap`.

    Args:
        difference: (N,) of each video: correct, 1 or 0, or the mean of seeds; ours minus theirs.
        subjects: (N,) who is seen; nobody known: a video is a person of its own.
        seed: of the draws.
    """
    people = {person: i for i, person in enumerate(sorted({s for s in subjects if s is not None}))}
    alone = itertools.count(len(people))
    groups = np.array([next(alone) if s is None else people[s] for s in subjects])
    # Not over N: of people of many videos more are drawn than there are.
    low, high = bootstrap(lambda times: times @ difference / times.sum(), groups, seed)
    return float(difference.mean()), low[0], high[0]


def interval(drawn: list | np.ndarray) -> np.ndarray:
    """Both ends of the 95 % percentile interval of numbers (R, ...) of R draws; NaN is left out."""
    return np.nanpercentile(np.asarray(drawn, dtype=float), [2.5, 97.5], axis=0)


def exact_at_ends(ends: tuple[float, float], groups: int) -> tuple[float, float]:
    """The 95 % interval of a share, where all draws of `bootstrap` are 0 or all are 1.

    No draw shows then that another video may be otherwise; the binomial distribution does (Clopper
    & Pearson 1934), of as many trials as there are groups.

    Args:
        ends: of the bootstrap.
        groups: how many people or videos were drawn.
    """
    room = 1 - 0.025 ** (1 / groups)
    if ends == (0.0, 0.0):
        return 0.0, room
    return (1 - room, 1.0) if ends == (1.0, 1.0) else ends


def draws(groups: Sequence[str | None] | np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """How often each video (N,) is drawn, in each of the draws of `bootstrap`."""
    group = np.unique(np.asarray(groups), return_inverse=True)[1]
    sizes = np.bincount(group)
    starts, members = np.cumsum(sizes) - sizes, np.argsort(group, kind="stable")
    rng = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        chosen = rng.integers(len(sizes), size=len(sizes))
        each = np.repeat(sizes[chosen], sizes[chosen])
        within = (rng.random(len(each)) * each).astype(int)
        videos = members[np.repeat(starts[chosen], sizes[chosen]) + within]
        yield np.bincount(videos, minlength=len(group)).astype(float)


def all_named(subjects: Sequence[str | None]) -> bool:
    """Whether people can be drawn: every one is known, and there are at least two."""
    return None not in subjects and len(set(subjects)) > 1


def bootstrap_intervals(
    labels: np.ndarray,
    predicted: np.ndarray,
    subjects: list[str | None],
    seed: int,
    hits: Mapping[str, np.ndarray],
) -> tuple[dict[str, tuple[float, float]], str]:
    """95 % intervals of top-1, of mean class accuracy and of further scores, see `bootstrap`.

    Subjects are drawn where every one is known and there are at least two; otherwise videos.

    Args:
        labels: (N,).
        predicted: (N,).
        subjects: who is seen in each video.
        seed: of the draws.
        hits: name -> what each video counts (N,) for a score that is their mean.

    Returns:
        the intervals of "top1", "mean_class_accuracy" and each name, and what was drawn: "subjects"
        or "videos".
    """
    by_subject = all_named(subjects)
    correct = labels == predicted
    scored = np.stack([correct, *hits.values()]).astype(float)

    def accuracies(times: np.ndarray) -> tuple[float, ...]:
        # By hand: scikit-learn would take 50 times as long, and there are thousands of draws.
        totals, found = np.bincount(labels, times), np.bincount(labels, times * correct)
        present = totals > 0
        means = scored @ times / times.sum()
        return ((found[present] / totals[present]).mean(), *means)

    groups = subjects if by_subject else np.arange(len(labels))
    low, high = bootstrap(accuracies, groups, seed)
    names, ends = ("mean_class_accuracy", "top1", *hits), zip(low, high, strict=True)
    found = {n: exact_at_ends(e, len({*groups})) for n, e in zip(names, ends, strict=True)}
    return found, "subjects" if by_subject else "videos"


def reversed_pairs_accuracy(
    scores: np.ndarray, labels: np.ndarray, classes: list[str]
) -> float | None:
    """Accuracy on the synthetic dataset's pairs of actions that are each other's reversal.

    Of the scores (N, C) only those of the two actions of a pair are compared, so 0.5 is what
    looking at frames without their order gives. None where the data have no such classes.
    """
    correct = []
    for first, second in REVERSED_PAIRS:
        if first not in classes or second not in classes:
            return None
        a, b = classes.index(first), classes.index(second)
        difference = scores[:, a] - scores[:, b]
        correct += [*(difference[labels == a] > 0), *(difference[labels == b] < 0)]
    return float(np.mean(correct)) if correct else None


# Class, start, end (seconds) of what is true of a video, and with a score of what was found.
Event = tuple[str, float, float]
FoundEvent = tuple[str, float, float, float]


def detection_precision(
    true: dict[str, list[Event]], found: dict[str, list[FoundEvent]], overlap: float
) -> dict[str, float]:
    """Average precision of detected events, by class, as ActivityNet measures it.

    Events of a class, of all videos, in falling order of their score: each takes the true one of
    its video that it overlaps most among those that it overlaps enough and that no better one took.
    Precision is the largest at this or a higher recall (Heilbron et al. 2015; the challenge's
    evaluation).

    Args:
        true: video -> its events.
        found: video -> what was found there.
        overlap: the least intersection over union in time.

    Returns:
        of the classes that occur in `true`.
    """
    once = np.ones((1, len(true)))
    drawn = precision_draws(true, found, (overlap,), once)
    return {name: float(values[0, 0]) for name, values in drawn.items()}


def precision_draws(
    true: dict[str, list[Event]],
    found: dict[str, list[FoundEvent]],
    overlaps: Sequence[float],
    times: np.ndarray,
) -> dict[str, np.ndarray]:
    """`detection_precision` at O overlaps in each of R draws of the videos.

    Args:
        true: video -> its events; V videos.
        found: video -> what was found there; no other videos.
        overlaps: the least intersections over union in time.
        times: how often each video, in the order of `true`, was drawn (R, V).

    Returns:
        class -> (R, O), NaN where no event of the class was drawn.
    """
    place = {video: number for number, video in enumerate(true)}
    drawn = {}
    for name in sorted({event[0] for events in true.values() for event in events}):
        known = {v: [e[1:] for e in events if e[0] == name] for v, events in true.items()}
        ranked = sorted(
            ((e[3], v, e[1], e[2]) for v, events in found.items() for e in events if e[0] == name),
            key=lambda event: -event[0],
        )
        owners = np.array([place[video] for _, video, *_ in ranked], dtype=int)
        hits = np.array([_hits(known, ranked, overlap) for overlap in overlaps], dtype=float)
        totals = times @ np.array([len(events) for events in known.values()])
        size = max(1, 2**22 // max(1, hits.size))  # draws at once, for memory
        parts = [slice(start, start + size) for start in range(0, len(times), size)]
        drawn[name] = np.concatenate(
            [_average_precision(hits, times[part][:, owners], totals[part]) for part in parts]
        )
    return drawn


def _average_precision(hits: np.ndarray, times: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Average precision (R, O) of n ranked events.

    Args:
        hits: whether an event takes a true one at an overlap (O, n).
        times: how often its video was drawn (R, n).
        totals: how many true events were drawn (R,).
    """
    caught = times[:, None] * hits
    precision = caught.cumsum(-1) / np.maximum(times.cumsum(-1), 1)[:, None]
    envelope = np.maximum.accumulate(precision[..., ::-1], -1)[..., ::-1]
    with np.errstate(invalid="ignore"):  # none was drawn: not a number
        return (caught * envelope).sum(-1) / totals[:, None]


def _hits(
    true: dict[str, list[tuple[float, float]]],
    found: list[tuple[float, str, float, float]],
    overlap: float,
) -> list[bool]:
    """Whether each event (score, video, start, end) takes a true one, those of its video."""
    taken: set[tuple[str, int]] = set()
    hits = []
    for _, video, start, end in found:
        overlaps = [
            (max(min(end, b) - max(start, a), 0) / max(max(end, b) - min(start, a), 1e-12), i)
            for i, (a, b) in enumerate(true[video])
            if (video, i) not in taken
        ]
        best, place = max(overlaps, default=(-1.0, -1))
        hits.append(best >= overlap)
        if hits[-1]:
            taken.add((video, place))
    return hits
