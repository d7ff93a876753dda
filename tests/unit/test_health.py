"""Effective rank and std against closed forms, and the word for a loss and for features."""

import math

import numpy as np
import pytest

from pretrain.health import Health, chance_loss, effective_rank, feature_health, feature_std

RNG = np.random.default_rng(0)
CLOUD = RNG.normal(size=(300, 32))
SPREAD = feature_health(CLOUD)


@pytest.mark.parametrize("shape", [(300, 32), (20, 32), (32, 32), (1, 8)])
def test_effective_rank_is_the_entropy_of_the_singular_values(shape):
    x = RNG.normal(size=shape) * np.geomspace(1, 0.01, shape[1])
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    shares = values[values > 1e-9] / values.sum().clip(1e-9)
    expected = math.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(x.astype(np.float32)) == pytest.approx(expected, rel=1e-3)


def test_effective_rank_counts_directions():
    axes = np.repeat(np.concatenate([np.eye(5, 16), -np.eye(5, 16)]), 3, 0)
    assert effective_rank(axes + 7) == pytest.approx(5)  # whatever their mean
    line = np.outer(RNG.normal(size=50), np.ones(16))
    assert effective_rank(line) == pytest.approx(1)


@pytest.mark.parametrize("noise", [0, 1e-9])
def test_features_that_are_all_alike(noise):
    """Rounding errors are no directions."""
    alike = np.full((50, 16), 3.0) + noise * RNG.normal(size=(50, 16))
    assert effective_rank(alike.astype(np.float32)) == pytest.approx(1)
    assert feature_std(alike) < 1e-6
    assert np.isfinite(list(feature_health(np.zeros((4, 3))).values())).all()


def test_std_does_not_depend_on_scale_or_width():
    for width in (8, 512):
        assert feature_std(5 * RNG.normal(size=(2000, width))) == pytest.approx(1, abs=0.05)


def word(shares, steps=400, noise=0.0):
    """The word after a run's reconstructions that explain these parts of the target."""
    health = Health(steps)
    for share in shares:
        health.rebuilt(1 - share + noise * RNG.normal(), 1.0)
    return health.word


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        (np.full(60, -0.4), "not learning"),  # a learning rate of nearly zero
        (np.full(60, 0.004), "not learning"),
        (np.linspace(-0.4, 0.05, 60), "starting"),
        (np.linspace(-0.02, 0.015, 60), "starting"),  # slowly
        (np.full(60, 0.3), "healthy"),  # converged
        (np.full(30, -0.4), "starting"),  # too early to say
        (np.r_[np.full(100, 0.3), np.full(60, -5.0)], "not learning"),  # diverged
        (np.full(60, np.nan), "not learning"),
        (np.tile([-0.1, -0.7, -0.3], 20), "not learning"),  # it jumps
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_a_loss_that_leaves_the_one_of_knowing_nothing_or_does_not(shares, expected, noise):
    assert [word(shares, noise=noise) for _ in range(20)] == [expected] * 20


@pytest.mark.parametrize("steps", [8, 12, 20, 60])
def test_a_falling_loss_near_chance_is_not_said_to_sit_there(steps, capsys):
    """A tiny run passes through the neighbourhood of ln(n)."""
    health, chance = Health(steps), math.log(16)
    for loss in np.linspace(1.015, 0.985, steps) * chance:
        seen = health.contrasted("loss", loss, "infonce", 16)
        health.say()
    assert seen["loss_chance"] == chance and health.word == "starting"
    assert not capsys.readouterr().out


def test_a_few_noisy_steps_exclude_nothing():
    assert {word(0.05 * RNG.normal(size=8), steps=10) for _ in range(50)} <= {"healthy", "starting"}


def test_few_clips_have_no_rank_to_judge():
    health = Health(100)
    for clips in (1, 3):
        health.scored(feature_health(CLOUD[:clips]))
        assert health.word == "healthy"


def test_chance_of_losses():
    """By the losses themselves, where all embeddings are one."""
    import torch

    from pretrain.clip import contrast

    same = torch.ones(8, 1)
    one, base = torch.ones(()), -math.log(7.0)
    for loss, several, groups in (
        ("infonce", False, torch.arange(8)),
        ("infonce", True, torch.arange(8) // 4),
        ("siglip", False, torch.arange(8)),
    ):
        bias = torch.tensor(base - 1 if loss == "siglip" else 0.0)
        value = contrast(same, same, one, bias, groups, loss, several).loss
        assert float(value) == pytest.approx(chance_loss(loss, 8), rel=1e-5)


def test_features_that_become_alike_collapse_and_that_is_said_when_it_begins(capsys):
    health = Health(100)
    assert health.word == "healthy"  # nothing is known
    for size, expected in ((1, "healthy"), (0.6, "healthy"), (0.1, "collapsing")) * 2:
        health.scored(feature_health(CLOUD * size + 1))
        health.say()
        assert health.word == expected
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("collapsing" in line and "--base-lr" in line for line in said)
    health.scored({})  # a clip was broken
    assert health.word == "collapsing" and health.values == {"collapsing": 1, "not_learning": 0}


def test_a_continued_run_remembers_the_best_features():
    first = Health(100)
    first.scored(SPREAD)
    second = Health(100, first.best)
    second.scored({name: value / 10 for name, value in SPREAD.items()})
    assert second.word == "collapsing"


def test_directions_alone_collapse():
    line = np.outer(RNG.normal(size=300), RNG.normal(size=32))
    health = Health(100)
    health.scored(feature_health(line))
    assert health.word == "collapsing"
