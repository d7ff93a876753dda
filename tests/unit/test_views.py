"""Views of one clip told from all others: the loss against a literal sum, and what it trains."""

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.masked import MaskedPixels
from pretrain.sigreg import lejepa
from pretrain.videomae import VideoMAE
from pretrain.views import TEMPERATURE, ViewObjective, match_views
from pretrain.vit import VideoTransformer

GRID = (2, 2, 2)


def unit(rows: int) -> torch.Tensor:
    return F.normalize(
        torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows)).double(), dim=1
    )


def videomae() -> VideoMAE:
    return VideoMAE(VideoTransformer(24, 1, 2, 4, 16, 8), 12, 1, 2)


def masked_pixels() -> MaskedPixels:
    return MaskedPixels(VideoTransformer(24, 1, 2, 4, 16, 8), 2, 8)


def clips_of(rows: int, views: int = 2) -> torch.Tensor:
    return torch.arange(rows // views).repeat_interleave(views)


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    video = torch.randint(0, 256, (rows, 3, 4, 16, 16), generator=generator, dtype=torch.uint8)
    tokens = torch.rand(rows, math.prod(GRID), generator=generator).argsort(1)
    return video, tokens[:, :3], tokens[:, 3:]


@pytest.mark.parametrize("views", [2, 3])
def test_loss_equals_the_literal_sum(views):
    x = unit(4 * views)
    total, hits = 0.0, 0
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        logits = {j: (x[i] @ x[j]).item() / TEMPERATURE for j in others}
        partition = math.log(sum(math.exp(v) for v in logits.values()))
        own = [j for j in others if j // views == i // views]
        total += sum(partition - logits[j] for j in own) / len(own)
        hits += max(logits, key=logits.get) in own
    loss, found = match_views(x, clips_of(len(x), views))
    assert loss.item() == pytest.approx(total / len(x), rel=1e-5)
    assert found.item() == pytest.approx(hits / len(x))


def test_equal_views_are_found_and_unlike_ones_are_not():
    clips = torch.eye(6).repeat_interleave(2, 0)
    loss, found = match_views(clips, clips_of(12))
    assert found == 1 and loss < 0.001
    loss, found = match_views(clips.roll(1, 0), clips_of(12))  # every neighbour is another clip's
    assert found == 0 and loss > 5


def test_a_clip_that_comes_twice_is_no_negative_of_itself():
    """Where epochs meet in a batch: all its views are positives, wherever they lie."""
    x, clips = unit(8), torch.tensor([7, 7, 3, 3, 5, 5, 7, 7])
    loss, _ = match_views(x, clips)
    order = torch.tensor([0, 1, 6, 7, 2, 3, 4, 5])
    again, _ = match_views(x[order], clips[order])
    assert loss.item() == pytest.approx(again.item(), rel=1e-12)
    same = torch.eye(4)[[0, 0, 1, 1, 2, 2, 0, 0]]
    assert match_views(same, clips)[0] == pytest.approx(
        # four rows have three that are equal to them, four have one; all others are at right angles
        (4 * math.log(3 + 4 * math.exp(-10)) + 4 * math.log(1 + 6 * math.exp(-10))) / 8,
        rel=1e-4,
    )


def test_the_sum_of_both_losses_trains_encoder_decoder_and_head():
    torch.manual_seed(0)
    model = ViewObjective(videomae(), 2, 0.5, 0.0, True)
    inputs = batch(6)
    loss, _ = model(*inputs, clips_of(6))
    tokens = model.masked.rebuild(*inputs)[2]
    assert tokens.shape == (6, 3, 24)
    contrast, _ = match_views(F.normalize(model.head(tokens.mean(1)), dim=-1), clips_of(6))
    rebuilt, _ = model.masked(*inputs)
    assert loss.item() == pytest.approx((rebuilt + 0.5 * contrast).item(), rel=1e-6)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("family", [videomae, masked_pixels])
@pytest.mark.parametrize("reconstruct", [True, False])
@pytest.mark.parametrize("weights", [(0.3, 0.0), (0.0, 0.3)], ids=["contrast", "sigreg"])
def test_everything_that_is_kept_learns(family, reconstruct, weights):
    """Beside reconstruction and alone, where nothing is kept of what reconstructs."""
    torch.manual_seed(0)
    inputs, whole = batch(6), family()
    rebuilt, _ = whole(*inputs)
    tokens = whole.rebuild(*inputs)[2]
    assert torch.equal(whole.see(*inputs), tokens)
    size = sum(p.numel() for p in whole.parameters())
    model = ViewObjective(whole, 2, *weights, reconstruct)
    assert (sum(p.numel() for p in model.masked.parameters()) == size) == reconstruct
    loss, _ = model(*inputs, clips_of(6))
    embeddings = model.head(tokens.mean(1))
    if weights[0]:
        compared, _ = match_views(F.normalize(embeddings, dim=-1), clips_of(6))
    else:
        compared = lejepa(embeddings.unflatten(0, (3, 2)), 0)
    assert loss.item() == pytest.approx((rebuilt * reconstruct + 0.3 * compared).item(), rel=1e-6)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_the_directions_of_a_step_are_saved_with_the_weights():
    torch.manual_seed(0)
    inputs = (*batch(6), clips_of(6))
    model = ViewObjective(videomae(), 2, 0.0, 1.0, False)
    again = ViewObjective(videomae(), 2, 0.0, 1.0, False)
    first, second = (model(*inputs)[0].item() for _ in range(2))
    again.load_state_dict(model.state_dict())
    assert first != second  # other directions of the same embeddings
    third, found = (m(*inputs)[0].item() for m in (model, again))
    assert third == found not in (first, second)


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="--views 2"):
        ViewObjective(videomae(), 1, 0.3, 0.0, True)
    with pytest.raises(ValueError, match="--sigreg"):
        ViewObjective(videomae(), 1, 0.0, 0.3, True)
    with pytest.raises(ValueError, match="not positive"):
        ViewObjective(videomae(), 2, -1, 0.0, True)
    with pytest.raises(ValueError, match="give one"):
        ViewObjective(videomae(), 2, 1.0, 1.0, True)
    with pytest.raises(ValueError, match="nothing to learn"):
        ViewObjective(videomae(), 2, 0.0, 0.0, False)
