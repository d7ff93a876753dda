"""SIGReg: the statistic against sums over pairs, and what it makes of shapes of clouds."""

import math

import pytest
import torch

from pretrain.sigreg import SHARE, directions, epps_pulley, lejepa


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_pairs(x: torch.Tensor) -> float:
    """Epps and Pulley's integral in closed form, for weight exp(-t^2): no quadrature."""
    n = len(x)
    pairs = sum(math.exp(-((a - b) ** 2) / 4) for a in x.tolist() for b in x.tolist())
    single = sum(math.exp(-(a**2) / 6) for a in x.tolist())
    return (
        math.sqrt(math.pi) * pairs / n
        - 2 * math.sqrt(2 * math.pi / 3) * single
        + n * math.sqrt(math.pi / 2)
    )


@pytest.mark.parametrize(
    "samples",
    [
        normal(40), 3 * normal(25), normal(7) + 2, torch.zeros(5).double(), torch.ones(1).double(),
        torch.tensor([-8.0, 8.0, 0.5]).double(), torch.linspace(-4, 4, 33).double(),
    ],
)  # fmt: skip
def test_equals_the_sum_over_pairs(samples):
    assert epps_pulley(samples).item() == pytest.approx(of_pairs(samples), abs=1e-6)
    in_columns = torch.stack([samples, -samples, samples.roll(1)], 1)
    assert epps_pulley(in_columns).tolist() == pytest.approx([of_pairs(samples)] * 3, abs=1e-6)
    single = epps_pulley(samples.float()).item()
    assert single == pytest.approx(of_pairs(samples), abs=1e-5 * len(samples))


def test_gradients_are_those_of_the_statistic():
    embeddings = normal(4, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(epps_pulley, embeddings)
    assert torch.autograd.gradcheck(lambda x: lejepa(x, 3), embeddings)


@pytest.mark.parametrize("size", [32, 1000])
def test_a_normal_cloud_scores_low_whatever_its_size_and_others_high(size):
    def score(x: torch.Tensor) -> float:
        return epps_pulley(x @ directions(0, x.shape[1])).mean().item()

    cloud = normal(size, 16)
    low = score(cloud)
    assert low < 1.5
    for worse in (
        cloud * 0, cloud * 0 + 1, cloud * 0.5, cloud * 2, cloud + 1,
        cloud[:, :1].expand(-1, 16),  # a line
    ):  # fmt: skip
        assert score(worse) > max(2 * low, 0.02 * size), worse.std()
    turn, _ = torch.linalg.qr(normal(16, 16, seed=1))
    assert score(cloud @ turn) == pytest.approx(low, rel=0.2)  # no axis is special


def test_directions_are_unit_vectors_of_the_step():
    assert torch.equal(directions(5, 12), directions(5, 12))
    assert torch.allclose(directions(5, 12).norm(dim=0), torch.ones(256).double())
    assert not torch.allclose(directions(5, 12), directions(6, 12))


def test_views_are_drawn_together_and_clips_are_not():
    clips = normal(64, 1, 8)
    alike, apart = clips.expand(-1, 2, -1), torch.cat([clips, normal(64, 1, 8, seed=2)], 1)
    assert lejepa(alike, 0) < SHARE * 1.5 < lejepa(apart, 0)
    x = torch.zeros(16, 2, 8, dtype=torch.float64) + 0.01 * normal(16, 2, 8)
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], 0.02)
    for step in range(300):  # from a cloud that has fallen together
        optimizer.zero_grad()
        lejepa(x, step).backward()
        optimizer.step()
    views = x.detach()
    assert (views[:, 0] - views[:, 1]).square().mean() < 0.05 * views.var(0).mean()
    assert 0.4 < views.mean(1).std(0).mean() < 1.3


def test_autocast_rounds_no_angle():
    x = normal(8, 2, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = lejepa(x, 0)
    assert found.item() == pytest.approx(lejepa(x.double(), 0).item(), rel=1e-5)
    assert lejepa(x.bfloat16(), 0).dtype == torch.float32
