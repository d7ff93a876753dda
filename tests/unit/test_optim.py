"""The schedule against its closed form, and which parameters decay."""

import math

import numpy as np
import pytest
import torch

from downstream.models import build_model
from pretrain import optim
from pretrain.optim import adamw, counting_rate, learning_rate, make_optimizers
from pretrain.videomae import VideoMAE
from pretrain.vit import VideoTransformer


def test_schedule_closed_form():
    rates = [learning_rate(s, 100, 10, 2.0, 0.5) for s in range(10)]
    assert np.allclose(
        rates, np.linspace(0, 2.0, 10), atol=1e-12
    )  # utils.cosine_scheduler of VideoMAE
    assert learning_rate(10, 100, 10, 2.0, 0.5) == 2.0
    assert math.isclose(learning_rate(55, 100, 10, 2.0, 0.5), 1.25)
    assert math.isclose(learning_rate(100, 100, 10, 2.0, 0.5), 0.5)
    assert learning_rate(0, 1, 0, 2.0, 0.5) == 2.0


def test_the_cosine_that_counts_on_is_timms():
    from timm.scheduler.cosine_lr import CosineLRScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8e-6)
    theirs = CosineLRScheduler(
        optimizer, 1000, lr_min=8e-8, warmup_t=500, cycle_limit=1, t_in_epochs=False
    )
    for step in range(1000):
        theirs.step_update(step)
        rate = counting_rate(step, 1000, 500, 8e-6, 8e-8)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-18)
    assert counting_rate(500, 1000, 500, 8e-6, 8e-8) == pytest.approx(4.04e-6)


def test_matrices_decay_and_nothing_else_does():
    model = VideoMAE(VideoTransformer(16, 1, 2, 4, 16, 8), 8, 1, 2)
    groups = adamw(model, 0.05, (0.9, 0.95)).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for p in groups[0]["params"]}
    free = {names[id(p)] for p in groups[1]["params"]}
    assert groups[0]["weight_decay"] == 0.05 and groups[1]["weight_decay"] == 0
    assert decayed | free == set(names.values())
    assert all(n.endswith("weight") and "norm" not in n for n in decayed)
    assert {"mask_token", "encoder.blocks.0.attn.q_bias", "head.bias"} <= free


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest_each_once():
    model = VideoMAE(VideoTransformer(16, 1, 2, 4, 16, 8), 8, 1, 2)
    muon, rest = make_optimizers("muon", model, 0.05, (0.9, 0.95))
    names = {id(p): n for n, p in model.named_parameters()}
    hidden = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    others = [names[id(p)] for group in rest.param_groups for p in group["params"]]
    assert sorted(hidden + others) == sorted(names.values())
    parts = ("attn.qkv", "attn.proj", "fc1", "fc2")
    stacks = ("encoder.blocks.0", "decoder_blocks.0")
    assert sorted(hidden) == sorted(f"{s}.{p}.weight" for s in stacks for p in parts)
    decays = {names[id(p)]: g["weight_decay"] for g in rest.param_groups for p in g["params"]}
    assert decays["encoder.patch_embed.weight"] == decays["head.weight"] == 0.05
    assert decays["head.bias"] == decays["mask_token"] == 0


@pytest.mark.parametrize("shape", [(24, 24), (48, 24), (24, 30), (24, 96), (96, 24)])
@pytest.mark.parametrize("rank", [24, 3])
def test_muon_orthogonalises_as_five_steps_on_the_singular_values_do(shape, rank, monkeypatch):
    """In either order of multiplication, also where most singular values are near zero.

    In float32: some processors have bfloat16, whose rounding is larger than the smallest of these
    values.
    """
    monkeypatch.setattr(optim, "has_bf16", lambda device: False)
    torch.manual_seed(0)
    matrix = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1]) + 1e-4 * torch.randn(shape)
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    expected = (u * values) @ v
    error = (optim.orthogonalise(matrix) - expected).norm() / expected.norm()
    assert error < 1e-3


@pytest.mark.parametrize(
    ("name", "changes", "num"),
    [
        # qkv, proj and two of the MLP in each of five blocks
        ("video_swin_t", {"variant": "xs"}, 5 * 4),
        ("vivit_2", {"depth": 2, "temporal_depth": 1, "dim": 16, "heads": 2, "patch": 8}, 3 * 4),
        ("i3d", {"width": 0.1}, 0),
        ("frame_mean", {"network": "efficientnet_b0"}, 0),  # its convolutions are in `blocks`
    ],
)  # fmt: skip
def test_muon_has_an_answer_to_every_family(name, changes, num):
    model = build_model(name, frames=8, size=32, **changes)
    optimizers = make_optimizers("muon", model, 0.05, (0.9, 0.95))
    ids = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, model.parameters()))
    muon = [o for o in optimizers if isinstance(o, optim.Muon)]
    matrices = [p for o in muon for group in o.param_groups for p in group["params"]]
    assert len(matrices) == num and all(p.ndim == 2 and min(p.shape) > 8 for p in matrices)
    assert len(optimizers) == 1 + (num > 0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()


def test_a_muon_step_turns_a_matrix_by_an_orthogonal_one_of_adamws_size():
    torch.manual_seed(0)
    model = VideoMAE(VideoTransformer(16, 1, 2, 4, 16, 8), 8, 1, 2)
    muon, _ = make_optimizers("muon", model, 0.0, (0.9, 0.95))
    weight = model.encoder.blocks[0].fc1.weight  # (64, 16)
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight) * 1e-3
    left, _, right = torch.linalg.svd(weight.grad, full_matrices=False)
    for group in muon.param_groups:
        group["lr"] = 0.1
    muon.step()
    step = (before - weight.detach()) / 0.1
    # Newton-Schulz leaves singular values between 0.5 and 1.5 of the polar factor's.
    inside = left.T @ step / (0.2 * math.sqrt(64)) @ right.T
    assert inside.diagonal().min() > 0.5 and inside.diagonal().max() < 1.5
    assert (inside - torch.diag(inside.diagonal())).abs().max() < 0.05


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24)])
@pytest.mark.parametrize("bf16", [True, False])
def test_muon_follows_torchs_own(shape, bf16, monkeypatch):
    """Five steps with momentum and decay; equal up to the rounding of torch's bfloat16."""
    monkeypatch.setattr(optim, "has_bf16", lambda device: bf16)
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizers = (
        optim.Muon([ours], 0.1),
        torch.optim.Muon([theirs], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    start = ours.detach().clone()
    for step in range(5):
        gradient = torch.randn(shape)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.param_groups[0]["lr"] = 0.02 * (step + 1)
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    assert (ours - start).norm() > 0.9 * moved


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="'sgd'"):
        make_optimizers("sgd", torch.nn.Linear(2, 2), 0.05, (0.9, 0.95))
