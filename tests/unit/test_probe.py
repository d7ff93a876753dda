"""Linear, nearest-neighbour and attentive probes on features whose structure is known."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC
from torch import nn

from downstream.attentive import AttentiveHead, classify, fit_attentive
from downstream.probe import (
    GRID,
    Folds,
    choose_folds,
    fit_linear,
    knn_accuracy,
    knn_scores,
    random_split_accuracy,
)


def blobs(
    num: int, classes: int, dim: int, noise: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Features around one centre a class, the same centres for every seed, on unlike scales."""
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % classes
    features = centres[labels] + noise * rng.normal(size=(num, dim))
    return (features * 10.0 ** np.linspace(-3, 3, dim) + 5).astype(np.float32), labels


def quarter(num: int) -> np.ndarray:
    return np.random.default_rng(5).random(num) < 0.25


def crowded(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes that differ a little in 60 features, which also carry 20 stronger nuisances."""
    rng = np.random.default_rng(99)
    centres, shared = 0.2 * rng.normal(size=(4, 60)), 0.5 * rng.normal(size=(20, 60))
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % 4
    noise = rng.normal(size=(num, 20)) @ shared + 0.5 * rng.normal(size=(num, 60))
    return (centres[labels] + noise).astype(np.float32), labels


@pytest.mark.parametrize("whitened", [False, True])
def test_linear_probe_equals_scikit_learn_at_the_chosen_penalty(whitened):
    x, y = crowded(160, 0) if whitened else blobs(160, 4, 10, 1.5, 0)
    test, _ = crowded(40, 1) if whitened else blobs(40, 4, 10, 1.5, 1)
    probe = fit_linear(x, y, quarter(160)[None])
    assert probe.whitened == whitened
    mean, std = x.astype(float).mean(0), x.astype(float).std(0)
    x, test_x = (x - mean) / std, (test - mean) / std
    if whitened:  # literally: along each principal direction, divided by its deviation
        _, singular, directions = np.linalg.svd(x, full_matrices=False)
        deviation = np.sqrt(singular**2 / len(x) + 0.1)
        x, test_x = x @ directions.T / deviation, test_x @ directions.T / deviation
    reference = LogisticRegression(C=probe.c, max_iter=5000, tol=1e-6).fit(x, y)
    np.testing.assert_allclose(
        probe.probabilities(test), reference.predict_proba(test_x), atol=5e-3
    )
    assert probe.converged and set(GRID) <= set(probe.sweep)


def test_whitening_is_chosen_by_validation_and_helps_where_features_share_nuisances(monkeypatch):
    x, y = crowded(160, 0)
    test, labels = crowded(800, 1)
    probe = fit_linear(x, y, quarter(160)[None])
    assert probe.whitened and max(probe.sweep.values()) > max(probe.rejected.values())
    white = (probe.probabilities(test).argmax(1) == labels).mean()
    monkeypatch.setattr("downstream.probe.whitener", lambda scaled: np.eye(scaled.shape[1]))
    plain = fit_linear(x, y, quarter(160)[None])
    assert not plain.whitened and plain.sweep == plain.rejected  # equals: the plain one
    assert white > (plain.probabilities(test).argmax(1) == labels).mean() + 0.02


def test_the_penalty_is_the_best_on_validation_and_the_stronger_of_equals():
    x, y = blobs(160, 4, 30, 4.0, 0)
    probe = fit_linear(x, y, quarter(160)[None])
    best = max(probe.sweep.values())
    assert probe.c == min(c for c, accuracy in probe.sweep.items() if accuracy == best)
    assert len(set(probe.sweep.values())) > 1


def test_several_validation_parts_count_together():
    x, y = blobs(160, 4, 30, 4.0, 0)
    parts = np.random.default_rng(6).random((3, 160)) < np.array([[0.1], [0.2], [0.4]])
    alone = [fit_linear(x, y, part[None]) for part in parts]
    assert len({tuple(probe.sweep.values()) for probe in alone}) == 3
    together = fit_linear(x, y, np.concatenate([parts, np.zeros((1, 160), bool)]))
    accuracies = {
        whitened: np.array(
            [[(p.sweep if p.whitened == whitened else p.rejected)[c] for c in GRID] for p in alone]
        )
        for whitened in (False, True)
    }
    pooled = {w: parts.sum(1) @ a / parts.sum() for w, a in accuracies.items()}
    assert together.whitened == (pooled[True].max() > pooled[False].max())
    np.testing.assert_allclose(
        [together.sweep[c] for c in GRID], pooled[together.whitened], rtol=1e-12
    )


def test_two_classes_and_constant_features():
    x, y = blobs(60, 2, 6, 0.3, 0)
    x[:, 3], x[::2, 3] = 0.1, np.nextafter(np.float32(0.1), 1)  # a rounding error, not a feature
    probe = fit_linear(x, y, quarter(60)[None])
    assert probe.weight.shape == (2, 6) and probe.std[3] == 1
    assert (probe.probabilities(x).argmax(1) == y).all()
    np.testing.assert_allclose(probe.probabilities(x).sum(1), 1)


def test_without_validation_nothing_is_chosen():
    x, y = blobs(3, 3, 4, 0.1, 0)
    probe = fit_linear(x, y, np.zeros((1, 3), bool))
    assert (probe.c, probe.sweep) == (1.0, {})
    assert (probe.probabilities(x).argmax(1) == y).all()


def test_a_class_that_only_validation_has_still_gets_its_weights():
    x, y = blobs(40, 4, 8, 0.2, 0)
    probe = fit_linear(x, y, (y == 3)[None])
    assert (probe.probabilities(x).argmax(1) == y).all()


def test_the_grid_is_widened_past_its_end(monkeypatch):
    monkeypatch.setattr("downstream.probe.GRID", (1e-4, 1e-3))
    x, y = blobs(160, 8, 10, 1.0, 0)
    probe = fit_linear(x, y, quarter(160)[None])
    assert probe.c > 1e-3 and max(probe.sweep) > 1e-3


def test_unfinished_fits_are_confessed(monkeypatch):
    monkeypatch.setattr("downstream.probe.MAX_ITER", 2)
    x, y = blobs(80, 4, 10, 2.0, 0)
    assert not fit_linear(x, y, quarter(80)[None]).converged


def test_fitting_cannot_see_test_videos():
    # The test part is no argument of anything that fits or chooses.
    assert list(inspect.signature(fit_linear).parameters) == [
        "features",
        "labels",
        "validations",
        "svm",
        "alike",
    ]
    assert "test" not in " ".join(inspect.signature(fit_attentive).parameters)


def test_permuting_the_test_videos_permutes_the_answers():
    x, y = blobs(80, 4, 10, 2.0, 0)
    test, labels = blobs(50, 4, 10, 2.0, 1)
    order = np.random.default_rng(0).permutation(50)
    probe = fit_linear(x, y, quarter(80)[None])
    np.testing.assert_allclose(
        probe.probabilities(test[order]), probe.probabilities(test)[order], rtol=1e-6
    )
    np.testing.assert_allclose(
        knn_scores(x, y, test[order], 4), knn_scores(x, y, test, 4)[order], rtol=1e-4
    )
    assert knn_accuracy(x, y, test[order], labels[order]) == knn_accuracy(x, y, test, labels)


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (5, 1.0), (1, 0.07)])
def test_knn_equals_scikit_learn(k, temperature):
    rng = np.random.default_rng(0)
    train, y, test = rng.normal(size=(90, 8)), rng.integers(5, size=90), rng.normal(size=(40, 8))
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    ).fit(train, y)
    scores = knn_scores(train, y, test, 5, k, temperature)
    np.testing.assert_allclose(scores / scores.sum(1, keepdims=True), reference.predict_proba(test))


def test_knn_by_hand():
    # Cosines to the test video: 1, 0.6, 0.6; two votes of exp(6) do not outweigh one of exp(10).
    train = np.array([[2.0, 0.0], [3.0, 4.0], [0.6, -0.8]])
    scores = knn_scores(
        train, np.array([0, 1, 1]), np.array([[5.0, 0.0]]), 2, k=20, temperature=0.1
    )
    np.testing.assert_allclose(scores, [[np.exp(10), 2 * np.exp(6)]])
    assert knn_accuracy(train, np.array([0, 1, 1]), np.array([[5.0, 0.0]]), np.array([0])) == 1.0


def test_attentive_head_is_the_textbook_cross_attention():
    torch.manual_seed(0)
    dim, num_heads = 128, 2
    head = AttentiveHead(dim, 3)
    assert head.heads == num_heads
    textbook = nn.MultiheadAttention(dim, num_heads, batch_first=True)
    query, tokens = torch.randn(1, dim), torch.randn(5, 7, dim)
    with torch.no_grad():
        w_q, w_k, w_v = textbook.in_proj_weight.chunk(3)
        textbook.in_proj_bias.normal_()
        b_q, _, b_v = textbook.in_proj_bias.chunk(3)  # a key bias adds the same to every token
        textbook.out_proj.weight.copy_(torch.eye(dim))
        textbook.out_proj.bias.zero_()
        q = (query @ w_q.T + b_q).view(num_heads, -1) / (dim // num_heads) ** 0.5
        head.query.copy_(torch.einsum("he,hed->hd", q, w_k.view(num_heads, -1, dim)))
        head.value.weight.copy_(w_v)
        head.value.bias.copy_(b_v)
        pooled, _ = textbook(query.expand(5, 1, dim), tokens, tokens)
        expected = head.classifier(head.norm(pooled[:, 0]))
        torch.testing.assert_close(classify([head], tokens)[0], expected)


def token_clips(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips (K, V, N, D) whose class is in one token of twelve, and lost in their mean."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % 3
    tokens = rng.normal(size=(num, 2, 12, 16))
    tokens[..., 1:4] *= 3
    rows, place = np.arange(num), rng.integers(12, size=num)
    tokens[rows, :, place] = 0
    tokens[rows, :, place, 0] = 6
    tokens[rows, :, place, 1 + labels] = 9
    return tokens.astype(np.float16), labels


def test_attentive_probe_finds_what_the_mean_hides_and_repeats():
    tokens, labels = token_clips(240, 0)
    test, truth = token_clips(90, 1)
    probe = fit_attentive(tokens, labels, quarter(240), seed=0)
    scores = probe.probabilities(test)
    assert (scores.argmax(1) == truth).mean() > 0.95
    np.testing.assert_allclose(scores.sum(1), 1, rtol=1e-5)
    mean = fit_linear(tokens.astype(np.float32).mean((1, 2)), labels, quarter(240)[None])
    assert (
        mean.probabilities(test.astype(np.float32).mean((1, 2))).argmax(1) == truth
    ).mean() < 0.8
    again = fit_attentive(tokens, labels, quarter(240), seed=0)
    assert probe.sweep == again.sweep and torch.equal(probe.head.query, again.head.query)


def test_a_linear_svm_is_sklearns():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 40)
    x = (rng.normal(size=(160, 8)) + 1.5 * np.eye(8)[y]).astype(np.float32)
    probe = fit_linear(x, y, quarter(160)[None], svm=True)
    scaled = (x.astype(np.float64) - probe.mean) / probe.std
    assert probe.converged
    if not probe.whitened:
        theirs = LinearSVC(C=probe.c, dual="auto", max_iter=10000, random_state=0).fit(scaled, y)
        assert (theirs.predict(scaled) == probe.probabilities(x).argmax(1)).all()
        assert np.allclose(theirs.coef_, probe.weight)
    assert (probe.probabilities(x).argmax(1) == y).mean() > 0.7


def test_videos_as_few_as_classes_are_fitted_in_silence(recwarn):
    """Of scikit-learn's own doubts nobody is told once a fit."""
    rng = np.random.default_rng(0)
    fit_linear(rng.normal(size=(24, 4)), np.arange(24) % 18, np.zeros((1, 24), bool))
    assert not recwarn.list


@pytest.mark.parametrize(
    "labels, people, words",
    [
        (list("abab") * 4, list("pqrs") * 4, "4 times 4: "),
        (list("abcd"), [None] * 4, "none: every class has a single video"),
    ],
)
def test_how_many_videos_validate_is_said(labels, people, words):
    videos = [f"{i}.mp4" for i in range(len(labels))]
    rows = [("train", *row) for row in zip(videos, labels, people, strict=True)]
    rows += [("test", f"t{name}", label, who) for _, name, label, who in rows]
    records = [
        {"split": split, "source": name, "label": label, "subject": who, "extra": {}}
        for split, name, label, who in rows
    ]
    pack = SimpleNamespace(
        name="clips", records=lambda: iter(records), near_duplicates=lambda: None
    )
    given = choose_folds(pack, "train", "test", False, 0)
    assert given.validation.startswith(words) and given.num_train == len(videos)
    assert given.tested.tolist() == list(range(len(videos), 2 * len(videos)))


def test_a_random_split_shows_what_people_on_both_sides_add():
    """Features tell the person and nothing else: of people kept apart they would tell nothing."""
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(12), 10)
    labels = people % 3
    features = rng.normal(size=(12, 1, 24))[people] + 0.1 * rng.normal(size=(120, 1, 24))
    test = people >= 9
    validation = (people[~test] < 3)[None]
    fold = (np.flatnonzero(~test), validation, np.flatnonzero(test))
    names = [f"p{i}" for i in people]
    given = Folds((), [fold], ["a", "b", "c"], labels, list(names), names, "", [])
    assert random_split_accuracy(features, given, False, 0) > 0.95
    long = features[:, 0]
    honest = fit_linear(long[~test], labels[~test], validation)
    assert (honest.probabilities(long[test]).argmax(1) == labels[test]).mean() < 0.8
