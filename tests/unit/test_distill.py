"""Masked reconstruction held to the starting weights: the loss, and what the teacher is part of."""

import copy

import pytest
import torch
from torch import nn

from downstream.models import build_model
from pretrain.distill import Distilled
from pretrain.masked import MaskedPixels
from pretrain.videomae import VideoMAE
from pretrain.vit import VideoTransformer, patchify, take_tokens


def encoder(**form) -> VideoTransformer:
    torch.manual_seed(0)
    return VideoTransformer(24, 2, 2, 4, 16, 8, **form)


def small_i3d() -> nn.Module:
    """An encoder with statistics of batches."""
    torch.manual_seed(0)
    return build_model("i3d", True, width=0.1, frames=8, size=32, subtract_mean=False)


def batch(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clips, and which of so many tokens are visible and hidden."""
    generator = torch.Generator().manual_seed(1)
    video = torch.randint(0, 256, (3, 3, 4, 16, 16), generator=generator, dtype=torch.uint8)
    drawn = torch.rand(3, tokens, generator=generator).argsort(1)
    return video, drawn[:, :3], drawn[:, 3:]


def objectives() -> dict[str, nn.Module]:
    return {
        "all tokens": VideoMAE(encoder(), 12, 1, 2),
        "selected by motion": VideoMAE(encoder(motion_tokens=0.75), 12, 1, 2),
        "a class token": VideoMAE(encoder(pool="class"), 12, 1, 2),
        "mask tokens": MaskedPixels(encoder(), 2, 8),
    }


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 - cosine, written out."""
    return (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean().item()


@pytest.mark.parametrize("kind", [*objectives()])
def test_the_loss_is_reconstruction_and_the_distance_to_ateacher_that_sees_all(kind):
    masked = objectives()[kind]
    video, visible, hidden = batch(6 if kind == "selected by motion" else 8)
    start = copy.deepcopy(masked.encoder).eval()
    model = Distilled(masked, 10.0)
    for weight in masked.encoder.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    loss, prediction = model(video, visible, hidden)
    alone, same, tokens = masked.rebuild(video, visible, hidden)
    # The teacher's tokens, by its own way from a clip to tokens.
    clip = start.input_spec.normalise(video)
    if kind == "mask tokens":
        known = start.forward_features(clip)
    else:
        patches, index = patchify(clip, 2, 8), None
        if kind == "selected by motion":
            index = start.motion_indices(clip)
            patches = take_tokens(patches, index)
        known = take_tokens(start.encode(patches, index), visible)
    assert torch.equal(prediction, same)
    assert loss.item() == pytest.approx(alone.item() + 10 * far(tokens, known), rel=1e-4)
    assert far(tokens, known) > 0.001


def test_theteacher_neither_learns_nor_is_saved():
    masked = objectives()["all tokens"]
    model, names = Distilled(masked, 10.0).train(), {n for n, _ in masked.named_parameters()}
    assert {n for n, _ in model.named_parameters()} == {f"masked.{n}" for n in names}
    assert {*model.state_dict()} == {f"masked.{n}" for n in masked.state_dict()} | {"started"}
    video, visible, hidden = batch(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = model.teacher(video.device).state_dict()
    before = {name: value.clone() for name, value in before.items()}
    model(video, visible, hidden)[0].backward()
    optimizer.step()
    after = model.teacher(video.device).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not all(torch.equal(v, masked.encoder.state_dict()[n]) for n, v in before.items())


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("kind", ["all tokens", "batch norm"])
def test_what_is_kept_lies_between_the_starting_and_the_trained_weights(kind, share):
    masked = objectives()[kind] if kind in objectives() else MaskedPixels(small_i3d(), 2, 8)
    start = {name: value.clone() for name, value in masked.encoder.state_dict().items()}
    model = Distilled(masked, 10.0, share)
    for value in masked.encoder.state_dict().values():
        value += torch.rand(value.shape).to(value)
    trained = {name: value.clone() for name, value in masked.encoder.state_dict().items()}
    between = model.between().state_dict()
    assert between.keys() == start.keys()
    for name, value in between.items():
        wanted = start[name] + share * (trained[name] - start[name])
        whole = not value.is_floating_point()  # a count of batches is of the trained ones
        assert torch.allclose(value, trained[name] if whole else wanted, atol=1e-6), name
    assert all(torch.equal(v, trained[n]) for n, v in masked.encoder.state_dict().items())


def test_holding_on_keeps_tokens_nearer_to_the_starting_weights():
    moved = {}
    for weight in (0.0, 10.0):
        masked = objectives()["all tokens"]
        start = copy.deepcopy(masked.encoder).eval()
        model = Distilled(masked, weight)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        video, visible, hidden = batch(8)
        for _ in range(30):
            model(video, visible, hidden)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        clip = start.input_spec.normalise(video)
        moved[weight] = far(masked.encoder.forward_features(clip), start.forward_features(clip))
    assert moved[10.0] < 0.5 * moved[0.0]


def test_other_starting_weights_are_refused():
    model, other = Distilled(objectives()["all tokens"], 1.0), objectives()["all tokens"]
    model.refuse_other_weights("runs/a")
    next(other.encoder.parameters()).data.view(-1)[0] += 1
    other = Distilled(other, 1.0)
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="runs/a"):
        other.refuse_other_weights("runs/a")
