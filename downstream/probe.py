"""How good frozen features are: logistic regression and nearest neighbours.

Nothing here sees the test part before the one time it is scored: fitting takes training videos
only. N videos, D features, C classes; labels are class numbers 0..C-1.
"""

import dataclasses
import functools
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file
from threadpoolctl import ThreadpoolController

from downstream.metrics import softmax, topk_accuracy
from downstream.splits import (
    HELD_OUT,
    Videos,
    choose_splits,
    hold_out,
    leave_one_subject_out,
    subset,
)
from pretrain.data.progress import counting
from pretrain.data.shards import Pack
from pretrain.files import share
from pretrain.folders import writing

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

MAX_ITER = 1000
# Inverse strengths of the L2 regularisation, half a decade apart; widened when the best is at an
# end.
GRID = tuple(float(f"{10**e:.3g}") for e in np.arange(-4, 2.1, 0.5))
LIMITS = (1e-8, 1e6)
# Sets of validation videos on which the linear probe's regularisation strength is chosen. One where
# subjects are left out in turn: every subject has a fit of its own there, over which the chance in
# the choice evens out.
VALIDATIONS = 4
DRAWS = 3  # random splits whose mean is said beside the number that counts
LEAKY = (
    "its clips of the same people, recordings and copies are on both sides, so it is not an "
    "estimate for new people"
)
# Added to the variance of every principal direction before it is scaled to one; the mean variance
# of standardised features is one.
WHITENING = 0.1
# Feature values up to which one thread fits. Measured: two threads, which wait for each other when
# something else has the cores, needed minutes for what one does in 5 s (2,000 videos, 192
# features).
ONE_THREAD = 2**22


@dataclass(frozen=True)
class LinearProbe:
    """A fitted linear classifier on standardised, perhaps whitened, features.

    Attributes:
        mean: (D,) of the training features.
        std: (D,) likewise, 1 where a feature is constant.
        weight: (C, D) on standardised features; whitening, being linear, is multiplied in.
        bias: (C,).
        whitened: whether the regularised weights are those of whitened features.
        c: the inverse regularisation strength that was chosen.
        sweep: validation accuracy of every value tried, ascending; empty without validation videos.
        rejected: the same with the other choice of whitening.
        at_edge: the chosen value is the smallest or largest tried and better than all others.
        converged: whether L-BFGS finished the final fit within its iterations.
    """

    mean: np.ndarray
    std: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    whitened: bool
    c: float
    sweep: dict[float, float]
    rejected: dict[float, float]
    at_edge: bool
    converged: bool

    @property
    def plain(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight (C, D) and bias (C,) on features that are not standardised."""
        weight = self.weight / self.std
        return weight, self.bias - weight @ self.mean

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Class probabilities (N, C) of features (N, D); of an SVM, the softmax of its margins."""
        return softmax((features - self.mean) / self.std @ self.weight.T + self.bias)


def _standardiser(features: np.ndarray, alike: bool) -> tuple[np.ndarray, np.ndarray]:
    mean, std = features.mean(0), features.std(0)
    if alike:
        std = np.full_like(std, np.sqrt(np.square(std).mean()))
    # A constant feature has rounding errors for a standard deviation; dividing by them would make
    # noise of it.
    return mean, np.where(std > 1e-6 * np.maximum(1, np.abs(mean)), std, 1.0)


def _make(svm: bool, c: float) -> "LogisticRegression | LinearSVC":
    # Here, for it takes a second which every process of a training would pay.
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    # One against the rest, squared hinge; the primal where there are more videos than features.
    if svm:
        return LinearSVC(C=c, dual="auto", max_iter=10 * MAX_ITER, random_state=0)
    return LogisticRegression(C=c, max_iter=MAX_ITER, warm_start=True)


@functools.cache
def _libraries() -> ThreadpoolController:
    """What limits the threads of libraries; to look for these takes as long as a small fit."""
    import sklearn.linear_model  # loads those that are there to be found
    import sklearn.svm  # noqa: F401

    return ThreadpoolController()


def _fit(model: "LogisticRegression | LinearSVC", features: np.ndarray, labels: np.ndarray) -> bool:
    """Fit in place; whether it converged. The warning becomes a field of the results."""
    from sklearn.exceptions import ConvergenceWarning

    threads = 1 if features.size <= ONE_THREAD else None
    with warnings.catch_warnings(), _libraries().limit(limits=threads):
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes")  # of few videos
        model.fit(features, labels)
    return bool(np.max(model.n_iter_) < model.max_iter)


def whitener(scaled: np.ndarray) -> np.ndarray:
    """(D, R) map of standardised features (N, D) to principal directions of equal variance.

    R is as in `spanned`.
    """
    directions, variance = spanned(scaled)
    return directions / np.sqrt(np.maximum(variance, 0) + WHITENING)


def spanned(scaled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal directions (D, R) of standardised features (N, D), and their variances (R,).

    R is D, or N where that is less: in all other directions the videos do not differ, so that
    regularised weights have nothing there, and a fit in R dimensions is the same and faster.
    """
    num, width = scaled.shape
    with _libraries().limit(limits=1 if scaled.size <= ONE_THREAD else None):
        if num < width:
            spread, directions = np.linalg.svd(scaled, full_matrices=False)[1:]
            return directions.T, spread**2 / num
        variance, directions = np.linalg.eigh(scaled.T @ scaled / num)
        return directions, variance


def _best(sweep: dict[float, float]) -> float:
    return min(sweep, key=lambda value: (-sweep[value], value))  # ties: the stronger regularisation


def _edge(sweep: dict[float, float]) -> str:
    """Say "low" or "high" if the only best value is the smallest or largest tried."""
    top = [value for value in sweep if sweep[value] == max(sweep.values())]
    if len(top) != 1:
        return ""  # a plateau: going further gains nothing
    return "low" if top[0] == min(sweep) else "high" if top[0] == max(sweep) else ""


def _scale(
    features: np.ndarray, whitened: bool, alike: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Mean and std (D,) of features (N, D), and the map of `whitener` or `spanned`, if any."""
    mean, std = _standardiser(features, alike)
    if whitened:
        return mean, std, whitener((features - mean) / std)
    few = len(features) < features.shape[1]
    return mean, std, spanned((features - mean) / std)[0] if few else None


def _scaled(
    features: np.ndarray, mean: np.ndarray, std: np.ndarray, white: np.ndarray | None
) -> np.ndarray:
    scaled = (features - mean) / std
    return scaled if white is None else scaled @ white


def _sweep(
    features: np.ndarray, labels: np.ndarray, validations: np.ndarray, whitened: bool, svm: bool,
    alike: bool,
) -> dict[float, float]:  # fmt: skip
    """Validation accuracy for the inverse strengths of `GRID`, and beyond while that gains.

    Args:
        features: (N, D).
        labels: (N,).
        validations: (P, N) True = in the fold; each is scaled as the videos outside it are.
        whitened: whether to regularise weights of whitened features.
        svm: as in `fit_linear`, likewise `alike`.
        alike: see there.
    """
    sweep: dict[float, float] = {}

    def try_out(values: list[float]) -> None:
        correct = dict.fromkeys(sorted(values), 0)
        for validation in validations:  # scaled one fold at a time: all would lie in memory
            scaled = _scaled(features, *_scale(features[~validation], whitened, alike))
            # From strong to weak regularisation, each from where the last one ended: several times
            # faster.
            model = _make(svm, 1.0)
            for value in correct:
                model.set_params(C=value)
                _fit(model, scaled[~validation], labels[~validation])
                correct[value] += (model.predict(scaled[validation]) == labels[validation]).sum()
        sweep.update({value: float(count / validations.sum()) for value, count in correct.items()})

    try_out(list(GRID))
    while (edge := _edge(sweep)) and LIMITS[0] < _best(sweep) < LIMITS[1]:
        factors = (0.01, 0.1) if edge == "low" else (10, 100)
        try_out([float(f"{_best(sweep) * f:.3g}") for f in factors])
    return dict(sorted(sweep.items()))


def fit_linear(
    features: np.ndarray, labels: np.ndarray, validations: np.ndarray, svm: bool = False,
    alike: bool = False,
) -> LinearProbe:  # fmt: skip
    """Choose the regularisation on the validation folds, then fit on all training videos.

    Validation chooses the regularisation strength and whether features are whitened first. Frozen
    features vary most along a few directions that do not depend on the class (subject, background),
    and regularising plain weights mostly limits these. Whitened, all directions are regularised
    equally, as in linear discriminant analysis.

    Args:
        features: (N, D) of the training videos.
        labels: (N,), every class 0..C-1 at least once.
        validations: (P, N) True = held out from fitting, to validate on; several folds, each a row
            from `downstream.splits.choose_validation`, count together: one of a few people may
            prefer any strength by a single video. All False: nothing can be judged, C is 1 and
            nothing is whitened.
        svm: a linear support vector machine instead of the logistic regression.
        alike: features of one kind, such as principal components: all are divided by the same
            number, not each by its own standard deviation.
    """
    features = features.astype(np.float64)  # float32 stops L-BFGS early under weak regularisation
    chosen, whitened = 1.0, False
    plain: dict[float, float] = {}
    white_sweep: dict[float, float] = {}
    validations = np.array([v for v in validations if v.any() and len(set(labels[~v])) > 1])
    if len(validations):
        plain, white_sweep = (
            _sweep(features, labels, validations, w, svm, alike) for w in (False, True)
        )
        whitened = max(white_sweep.values()) > max(plain.values())  # ties: the plain one
        chosen = _best(white_sweep if whitened else plain)
    sweep, rejected = (white_sweep, plain) if whitened else (plain, white_sweep)
    at_edge = bool(sweep and _edge(sweep))
    mean, std, weight, bias, converged = _final(features, labels, chosen, whitened, svm, alike)
    return LinearProbe(
        mean, std, weight, bias, whitened, chosen, sweep, rejected, at_edge, converged
    )


def _final(
    features: np.ndarray,
    labels: np.ndarray,
    chosen: float,
    whitened: bool,
    svm: bool,
    alike: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, bool]:
    """Mean, std, weight, bias and convergence of a fit as chosen; see `LinearProbe`."""
    mean, std, white = _scale(features, whitened, alike)
    model = _make(svm, chosen)
    converged = _fit(model, _scaled(features, mean, std, white), labels)
    weight, bias = model.coef_, model.intercept_
    if white is not None:
        weight = weight @ white.T
    if len(weight) == 1:  # two classes: scikit-learn keeps only the logit of the second
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    return mean, std, weight, bias, converged


def fit_some(
    features: np.ndarray, labels: np.ndarray, validations: np.ndarray, num_classes: int,
    alike: bool = False,
) -> LinearProbe:  # fmt: skip
    """`fit_linear` where not every class need be there; those that are not get probability 0.

    Args:
        features: (N, D).
        labels: (N,) class numbers below `num_classes`; of one class, all are taken for it.
        validations: as `fit_linear` takes them.
        num_classes: C.
        alike: as in `fit_linear`.
    """
    width = features.shape[1]
    present, numbers = np.unique(labels, return_inverse=True)
    weight, bias = np.zeros((num_classes, width)), np.full(num_classes, -1e9)
    bias[present] = 0
    if len(present) == 1:
        nothing, one = np.zeros(width), np.ones(width)
        return LinearProbe(nothing, one, weight, bias, False, 1.0, {}, {}, False, True)
    probe = fit_linear(features, numbers, validations, alike=alike)
    weight[present], bias[present] = probe.weight, probe.bias
    return dataclasses.replace(probe, weight=weight, bias=bias)


def held_out_probabilities(
    probe: LinearProbe, features: np.ndarray, labels: np.ndarray, held: np.ndarray, svm: bool
) -> np.ndarray:
    """Class probabilities (M, C) of training videos, from a probe fitted on the others.

    Args:
        probe: as `fit_linear` chose it.
        features: (N, D) of the training videos.
        labels: (N,).
        held: (N,) True = not fitted on; every class is among the others.
        svm: as in `fit_linear`.
    """
    features = features.astype(np.float64)
    mean, std, weight, bias, _ = _final(
        features[~held], labels[~held], probe.c, probe.whitened, svm
    )
    fitted = dataclasses.replace(probe, mean=mean, std=std, weight=weight, bias=bias)
    return fitted.probabilities(features[held])


def knn_scores(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """Votes of the k nearest training videos by cosine, each weighted by exp(cosine / temperature).

    The weighting of instance discrimination (Wu et al. 2018, https://arxiv.org/abs/1805.01978),
    with DINO's k.

    Args:
        train: (N, D) features.
        train_labels: (N,).
        test: (M, D) features.
        num_classes: C.
        k: neighbours; at most N are used.
        temperature: smaller trusts the nearest more.

    Returns:
        (M, C) votes.
    """
    train = train / np.maximum(np.linalg.norm(train, axis=1, keepdims=True), 1e-12)
    test = test / np.maximum(np.linalg.norm(test, axis=1, keepdims=True), 1e-12)
    k = min(k, len(train))
    scores = np.zeros((len(test), num_classes))
    for start in range(0, len(test), 1024):  # the (M, N) similarities would not fit for a large set
        similarity = test[start : start + 1024] @ train.T
        near = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        weight = np.exp(np.take_along_axis(similarity, near, 1) / temperature)
        row = start + np.arange(len(similarity))[:, None]
        np.add.at(scores, (row, train_labels[near]), weight)
    return scores


def knn_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 accuracy of `knn_scores` on the test videos; arguments as there."""
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    scores = knn_scores(train, train_labels, test, num_classes, k, temperature)
    return float((scores.argmax(1) == test_labels).mean())


# Numbers of the training videos, which of them are for validation (masks, one a row), numbers of
# the test videos.
Fold = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Folds:
    """Training and test videos of each fit; videos are numbered through all parts.

    Attributes:
        parts: the training and the test videos; or all, if each subject is left out in turn.
        folds: fits and the videos that each tests, which differ.
        classes: names of the C classes.
        labels: (N,) class numbers.
        subjects: (N,) who is seen.
        sources: (N,) names.
        validation: how many validation videos there are, and the rule that chose them.
        notes: sentences a reader of the result must see.
    """

    parts: tuple[Videos, ...]
    folds: list[Fold]
    classes: list[str]
    labels: np.ndarray
    subjects: list[str | None]
    sources: list[str]
    validation: str
    notes: list[str]

    @property
    def tested(self) -> np.ndarray:
        """The numbers of the videos that are tested, in the order of the folds."""
        return np.concatenate([test for _, _, test in self.folds])

    @property
    def num_train(self) -> int:
        """The number of training videos, over all folds."""
        return len(self.folds[0][0]) if len(self.folds) == 1 else len(self.labels)


def choose_folds(
    pack: Pack, train_split: str, test_split: str, leave_one_out: bool, seed: int
) -> Folds:
    """The folds of a pack: one from training to test videos, or one for each subject.

    Args:
        pack: the data.
        train_split: as `choose_splits` takes it, likewise the next.
        test_split: likewise.
        leave_one_out: leave out one subject in turn instead.
        seed: of the validation videos.

    Raises:
        ValueError: the splits, labels or subjects cannot be used.
    """
    if leave_one_out:
        everybody, held, notes = leave_one_subject_out(pack)
        parts: tuple[Videos, ...] = (everybody,)
        learned_from = [subset(everybody, ~mask) for mask in held]
    else:
        train, test, notes = choose_splits(pack, train_split, test_split, seed)
        parts = (train, test)
        held, learned_from = [np.arange(len(train) + len(test)) >= len(train)], [train]
    names = [label for part in parts for label in part.known_labels]
    subjects = [subject for part in parts for subject in part.subjects]
    classes, folds, rule = sorted(set(names)), [], ""
    for mask, videos in zip(held, learned_from, strict=True):
        chosen = [
            hold_out(videos, seed * VALIDATIONS + i, divide_people=True)
            for i in range(1 if leave_one_out else VALIDATIONS)
        ]
        rule = rule or chosen[0][1]
        validations = np.stack([chosen_mask for chosen_mask, _ in chosen])
        folds.append((np.flatnonzero(~mask), validations, np.flatnonzero(mask)))
    return Folds(
        parts, folds, classes, np.concatenate([part.numbers(classes) for part in parts]), subjects,
        [source for part in parts for source in part.sources],
        f"{_in_words(folds[0][1])}: {rule}", notes,
    )  # fmt: skip


def _in_words(validations: np.ndarray) -> str:
    """How many videos the validation masks (P, N) choose: "490", "4 times 490", or "none"."""
    sizes = sorted(set(validations.sum(1).tolist()))
    if sizes == [0]:
        return "none"
    words = " or ".join(map(str, sizes))
    return words if len(validations) == 1 else f"{len(validations)} times {words}"


def probe_features(
    features: np.ndarray, given: Folds, svm: bool
) -> tuple[dict[str, np.ndarray], list[LinearProbe]]:
    """Fit on the training videos of every fold and score its test videos.

    The segments of a video (S, D) are one long feature for the linear probe and for kNN;
    `mean_token` scores are of their mean.

    Args:
        features: (N, S, D) of all videos.
        given: their folds and labels.
        svm: fit a linear support vector machine instead.

    Returns:
        the class scores of the tested videos (M, C) by the name of their top-1, of which "top1" are
        the linear probes' probabilities; and the linear probe of each fold.
    """
    labels, num_classes = given.labels, len(given.classes)
    scores, mean_scores, votes, mean_votes = (
        np.zeros((len(labels), num_classes)) for _ in range(4)
    )
    long, means, probes = features.reshape(len(features), -1), features.mean(1), []
    several = len(given.folds) > 1
    for train, validations, test in counting(given.folds, "probing", "fold", several):
        probes.append(fit_linear(long[train], labels[train], validations, svm))
        scores[test] = probes[-1].probabilities(long[test])
        mean_probe = probes[-1]
        if features.shape[1] > 1:  # else the mean is all there is
            mean_probe = fit_linear(means[train], labels[train], validations, svm)
        mean_scores[test] = mean_probe.probabilities(means[test])
        votes[test] = knn_scores(long[train], labels[train], long[test], num_classes)
        mean_votes[test] = knn_scores(means[train], labels[train], means[test], num_classes)
    found = {
        "top1": scores, "knn_top1": votes, "mean_token_top1": mean_scores,
        "mean_token_knn_top1": mean_votes,
    }  # fmt: skip
    return {name: values[given.tested] for name, values in found.items()}, probes


def random_split_accuracy(features: np.ndarray, given: Folds, svm: bool, seed: int) -> float:
    """Linear top-1 if the same videos had been split at random, people and copies on both sides.

    Every class is divided alike, as many are tested as in a fold of `given`; mean of `DRAWS` draws.

    Args:
        features: (N, S, D) of all videos.
        given: their folds and labels.
        svm: as in `fit_linear`.
        seed: of the draws.
    """
    rng = np.random.default_rng([seed, 0x5EED])
    long, labels = features.reshape(len(features), -1), given.labels
    part = float(np.mean([len(test) / len(labels) for _, _, test in given.folds]))
    right = []
    for _ in range(DRAWS):
        test = _drawn(labels, part, rng)
        train = np.flatnonzero(~test)
        masks = [_drawn(labels[train], HELD_OUT, rng) for _ in range(VALIDATIONS)]
        probe = fit_linear(long[train], labels[train], np.stack(masks), svm)
        right.append(topk_accuracy(probe.probabilities(long[test]), labels[test], 1))
    return float(np.mean(right))


def random_split(
    features: np.ndarray, given: Folds, svm: bool, honest: float, seed: int
) -> tuple[str, dict]:
    """`random_split_accuracy` as a sentence, which is printed, and for the card.

    Args:
        features: see there.
        given: see there.
        svm: see there.
        honest: linear top-1 of the folds as they are.
        seed: see there.
    """
    drawn = random_split_accuracy(features, given, svm, seed)
    note = (
        f"a random split of the same videos would show a linear top-1 of {100 * drawn:.1f}, beside "
        f"{100 * honest:.1f} as it was scored: {LEAKY}"
    )
    print(note, flush=True)
    return note, {"top1": drawn, "draws": DRAWS, "meaning": LEAKY}


def _drawn(labels: np.ndarray, part: float, rng: np.random.Generator) -> np.ndarray:
    """About this part of every class at random (N,), and never all of it."""
    drawn = np.zeros(len(labels), dtype=bool)
    for number in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == number))
        drawn[members[: min(max(1, round(part * len(members))), len(members) - 1)]] = True
    return drawn


def fit_card(probes: list[LinearProbe]) -> dict:
    """The chosen hyperparameters of a linear probe; a list for those of several folds."""
    card: dict[str, Any] = {
        "C": [p.c for p in probes] if len(probes) > 1 else probes[0].c,
        "whitened": [p.whitened for p in probes] if len(probes) > 1 else probes[0].whitened,
        "C_at_edge": any(p.at_edge for p in probes),
        "converged": all(p.converged for p in probes),
    }
    if len(probes) == 1:
        sweeps = {"validation_accuracy": probes[0].sweep, "rejected_accuracy": probes[0].rejected}
        for name, sweep in sweeps.items():
            card[name] = {f"{c:g}": round(a, 4) for c, a in sweep.items()}
    return card


def save_probe(path: Path, probe: LinearProbe, classes: list[str]) -> None:
    """Write a linear probe: `mean`, `std`, `weight` and `bias`, and the names of the classes.

    Raises:
        ValueError: the disk does not take it.
    """
    values = {"mean": probe.mean, "std": probe.std, "weight": probe.weight, "bias": probe.bias}
    tensors = {name: np.ascontiguousarray(v, dtype=np.float32) for name, v in values.items()}
    with writing(path):
        save_file(tensors, path, {"classes": json.dumps(classes)})
        share(path)
