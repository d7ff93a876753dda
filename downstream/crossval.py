"""Cross-validation of a frozen probe on few labels, and how its accuracy grows with their number.

Folds never divide a group (`Videos.groups`): a person where people are known, else a source file,
and never near-duplicates. N videos, D features, C classes.
"""

import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np

from downstream.metrics import draws, interval
from downstream.probe import VALIDATIONS, Folds, LinearProbe, fit_some
from downstream.splits import Videos, choose_validation
from pretrain.data.progress import counting
from pretrain.names import counted, for_screen

EACH = 10  # groups up to which each is left out in turn
FOLDS = 5  # of more groups; fewer where no class has so many videos
TRIES = 20  # draws of folds, of which the first is taken that tests most videos
ORDERS = 5  # in which labels are added
MANY = 400  # labels
POINTS = 6  # of a learning curve, each of twice as many labels as the one before
MOST_CLASSES = 1000
PAYS = 0.02  # accuracy that twice the labels bring, below which they pay little


@dataclass(frozen=True)
class Grouped:
    """Folds that divide no group.

    Attributes:
        folds: of all labelled videos; those of a class that its training part lacks are not tested.
        groups: (N,) the group of each video.
        named: what a group is: "subjects" or "source files".
        rule: how videos were divided, in words.
    """

    folds: Folds
    groups: list[str]
    named: str
    rule: str

    @property
    def tested(self) -> list[str | None]:
        """The groups of the tested videos, in the order of the folds."""
        return [self.groups[i] for i in self.folds.tested]


def grouped_folds(name: str, videos: Videos, seed: int) -> Grouped:
    """Folds grouped by person where people are known, else by source file.

    Args:
        name: of the data, for messages.
        videos: that have a label.
        seed: of the folds and the validation videos.

    Raises:
        ValueError: there is one class only, or too many; or no class is in two groups, or one only,
            so that nothing can be tested on a group that was not learned from.
    """
    names = videos.known_labels
    classes = sorted(set(names))
    if len(classes) == 1:
        raise ValueError(
            f"{name}: the only label is {classes[0]!r}, on {counted(len(names), 'video')}: "
            "classification needs at least two classes: label some videos of another"
        )
    if len(classes) > MOST_CLASSES:
        raise ValueError(
            f"{name}: {len(names):,} videos have {len(classes):,} different labels, such as "
            f"{', '.join(repr(c) for c in classes[:3])}, and fit takes at most {MOST_CLASSES:,} "
            "classes: is the column of labels one of names or sentences? For a data set of so many "
            "classes there is recipes/linear_probe.py"
        )
    groups, named, notes = _groups(videos)
    labels, number = videos.numbers(classes), np.unique(groups, return_inverse=True)[1]
    alone = [c for i, c in enumerate(classes) if len(set(number[labels == i])) < 2]
    what = "person" if named == "subjects" else "source file"
    if len(classes) - len(alone) < 2:
        good = [c for c in classes if c not in alone]
        raise ValueError(
            f"{name}: {counted(len(names), 'labelled video')} of {counted(len(classes), 'class')}, "
            f"and {'only ' + repr(good[0]) if good else 'no class'} is seen of two "
            f"{'people' if what == 'person' else 'source files'}: accuracy is measured on a {what} "
            f"that was not learned from, so label another {what} of at least two classes"
        )
    each = number.max() < EACH
    draws = [_divide(labels, number, seed * TRIES + i) for i in range(1 if each else TRIES)]
    folds = max(draws, key=lambda masks: _num_tested(labels, masks))
    made, rules = [], []
    for held in folds:
        train = np.flatnonzero(~held)
        chosen = [_validation(videos, train, named, seed * 2 + i) for i in range(1 if each else 2)]
        rules.append(chosen[0][1])
        test = np.flatnonzero(held & np.isin(labels, labels[train]))
        made.append((train, np.stack([mask for mask, _ in chosen]), test))
    made = [fold for fold in made if len(fold[2])]
    tested = np.concatenate([test for *_, test in made])
    untested = Counter(names[i] for i in np.setdiff1d(np.arange(len(names)), tested))
    for label, count in sorted(untested.items()):
        notes.append(
            f"{counted(count, 'video')} of {for_screen(label)} could not be tested: its class is "
            f"in no other fold; label another {what} of it"
        )
    rule = (
        f"every one of {counted(number.max() + 1, what)} left out in turn"
        if each
        else f"{len(folds)} folds, none of which shares a {what} with another"
    )
    return Grouped(
        Folds((videos,), made, classes, labels, videos.subjects, videos.sources,
              f"in each fold {rules[0]}", notes),
        [f"group {group}" for group in groups], named, rule,
    )  # fmt: skip


def _groups(videos: Videos) -> tuple[list[int], str, list[str]]:
    """The group of each video, what a group is, and what a reader must know of that."""
    known = {who for who in videos.subjects if who is not None}
    if len(known) > 1:
        alone = videos.subjects.count(None)
        note = f"{counted(alone, 'video')} without a subject: each counts as a person of its own"
        return videos.groups, "subjects", [note] * bool(alone)
    why = "all videos are of one person" if known else "no subjects are known"
    remedy = "label videos of other people" if known else "give the list a column subject"
    notes = [
        f"{why}: folds are divided by source file, so the accuracy says little about other people: "
        f"{remedy}"
    ]
    return videos.recordings, "source files", notes


def _validation(videos: Videos, train: np.ndarray, named: str, seed: int) -> tuple[np.ndarray, str]:
    """Which of the training videos are for validation (len(train),), and the rule."""
    of = lambda values: [values[i] for i in train]
    people = of(videos.subjects) if named == "subjects" else [None] * len(train)
    groups = of(videos.groups if named == "subjects" else videos.recordings)
    return choose_validation(of(videos.known_labels), people, seed, groups, of(videos.recordings))


def _divide(labels: np.ndarray, groups: np.ndarray, seed: int) -> list[np.ndarray]:
    """Masks (N,) of the folds' test videos, alike in their classes as far as groups allow."""
    if groups.max() < EACH:
        return [groups == number for number in range(groups.max() + 1)]
    from sklearn.model_selection import StratifiedGroupKFold

    counts = np.zeros((groups.max() + 1, labels.max() + 1))
    np.add.at(counts, (groups, labels), 1)
    number = min(FOLDS, int(np.bincount(labels).max()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")
        split = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
        tests = [test for _, test in split.split(labels, labels, groups)]
    return [np.isin(np.arange(len(labels)), test) for test in tests]


def _num_tested(labels: np.ndarray, folds: list[np.ndarray]) -> int:
    return sum(int(np.isin(labels[held], labels[~held]).sum()) for held in folds)


def cross_validate(features: np.ndarray, given: Folds) -> tuple[np.ndarray, list[LinearProbe]]:
    """Class probabilities (M, C) of the tested videos, and the probe of each fold.

    Args:
        features: (N, D).
        given: the folds.
    """
    scores, probes = [], []
    for train, validations, test in counting(given.folds, "probing", "fold"):
        about = features[train], given.labels[train], validations
        probes.append(fit_some(*about, len(given.classes)))
        scores.append(probes[-1].probabilities(features[test]))
    return np.concatenate(scores), probes


def fit_all(features: np.ndarray, grouped: Grouped, seed: int) -> LinearProbe:
    """The probe of all labelled videos (N, D), which is kept."""
    given, every = grouped.folds, np.arange(len(features))
    seeds = range(seed * VALIDATIONS, (seed + 1) * VALIDATIONS)
    masks = [_validation(given.parts[0], every, grouped.named, number)[0] for number in seeds]
    return fit_some(features, given.labels, np.stack(masks), len(given.classes))


# ---- how many labels


@dataclass(frozen=True)
class Curve:
    """Accuracy over the number of labels learned from.

    Attributes:
        sizes: numbers of labels.
        accuracies: of each.
        intervals: 95 %, over the groups and the orders.
        gain: what the last doubling brought, and the ends of its interval.
    """

    sizes: list[int]
    accuracies: list[float]
    intervals: list[tuple[float, float]]
    gain: tuple[float, float, float]


def learning_curve(features: np.ndarray, grouped: Grouped, seed: int) -> Curve:
    """Fit with fewer labels, drawn at random among the training videos of every fold.

    The regularisation is one and the same (C 1, not whitened): too few labels choose none. So the
    last point may differ a little from `cross_validate`.

    Args:
        features: (N, D).
        grouped: the folds.
        seed: of the orders in which labels are added.
    """
    given = grouped.folds
    truth, num = given.labels[given.tested], len(given.classes)
    most = min(len(train) for train, _, _ in given.folds)
    sizes = [most // 2**i for i in range(POINTS)]
    sizes = sorted(size for size in sizes if size >= min(num, most))
    hits = np.zeros((len(sizes), ORDERS, len(truth)))
    done = 0
    folds = counting(given.folds, "learning curve", "fold")
    for fold, (train, _, test) in enumerate(folds):
        place = slice(done, done := done + len(test))
        for i, size in enumerate(sizes):
            # Of many labels two orders, taken in turn: they differ little, and take longest.
            orders = ORDERS if size <= MANY else 2
            for order in range(orders):
                some = np.random.default_rng([seed, order, fold]).permutation(train)[:size]
                model = fit_some(features[some], given.labels[some], np.empty((0, size)), num)
                said = model.probabilities(features[test]).argmax(1)
                hits[i, order::orders, place] = said == given.labels[test]
    return _summarised(sizes, hits, grouped, seed)


def _summarised(sizes: list[int], hits: np.ndarray, grouped: Grouped, seed: int) -> Curve:
    """Means and intervals of hits (sizes, orders, M): groups and orders are drawn anew."""
    rng = np.random.default_rng([seed, 1])
    drawn = []
    for times in draws(np.array(grouped.tested), seed):
        orders = rng.integers(hits.shape[1], size=hits.shape[1])
        drawn.append(hits[:, orders].mean(1) @ times / times.sum())
    means, values = hits.mean((1, 2)), np.array(drawn)
    low, high = interval(values)
    gain = means[-1] - means[max(len(means) - 2, 0)]
    ends = interval(values[:, -1] - values[:, max(len(means) - 2, 0)])
    return Curve(
        sizes, means.tolist(), list(zip(low.tolist(), high.tolist(), strict=True)),
        (float(gain), float(ends[0]), float(ends[1])),
    )  # fmt: skip


def when_to_stop(curve: Curve) -> str:
    """A sentence on whether more labels pay, which claims no more than the curve shows."""
    if len(curve.sizes) < 2:
        return (
            "too few labels for a learning curve: whether more pay cannot be said, which at this "
            "number they nearly always do"
        )
    gain, low, high = (100 * value for value in curve.gain)
    told = (
        f"from {curve.sizes[-2]} to {curve.sizes[-1]} labels accuracy changed by {gain:+z.1f} "
        f"points (95 % interval {low:+z.1f} to {high:+z.1f})"
    )
    if low > 0:
        return f"more labels still pay: {told}; expect less than that from the next doubling"
    if high < 100 * PAYS:
        return (
            f"more labels of such clips pay little: {told}, so less than {100 * PAYS:.0f} points; "
            "a better backbone, or people and places that are not there yet, may bring more"
        )
    return (
        f"whether more labels pay is not certain: {told}; the interval contains both nothing and "
        f"{100 * PAYS:.0f} points or more: label some more and look again"
    )
