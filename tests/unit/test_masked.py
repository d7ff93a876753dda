"""Masked reconstruction with a mask token in the pixels, and the recipe with other families."""

import numpy as np
import pytest
import torch

from downstream.models import build_model, load_backbone
from pretrain import backbones
from pretrain.figures import reconstruct
from pretrain.masked import MaskedPixels, unpatchify_cells
from pretrain.videomae import draw_tokens, normalise_target
from pretrain.vit import patchify, take_tokens
from pretrain.weights import CheckpointError
from recipes import videomae
from tests.recipes.runs import change, equal, final_weights, modes_in_steps
from tests.recipes.test_videomae import config

SMALL = {
    "dim": 16,
    "depth": 1,
    "heads": 2,
    "temporal_depth": 1,
    "frames": 4,
    "size": 32,
    "patch": 8,
}
FAMILIES = {
    "vivit_1": SMALL, "vivit_2": SMALL, "vivit_3": SMALL,
    "video_swin_t": {"variant": "xs", "frames": 4, "size": 32},
    "i3d": {"width": 0.1, "frames": 8, "size": 32},
    "inflated": {"network": "test_resnet", "frames": 4, "size": 32},
}  # fmt: skip


def masked(name: str) -> MaskedPixels:
    torch.manual_seed(0)
    return MaskedPixels(build_model(name, **FAMILIES[name]), 2, 8, 0.01)


def inputs(model: MaskedPixels):
    spec = model.encoder.input_spec
    rng = np.random.default_rng(0)
    video = torch.from_numpy(
        rng.integers(0, 256, (2, 3, spec.frames, spec.size, spec.size), dtype=np.uint8)
    )
    tokens = [
        draw_tokens("tube", model.grid, 0.75, False, np.random.default_rng(i)) for i in range(2)
    ]
    visible, hidden = (torch.from_numpy(np.stack(part)) for part in zip(*tokens, strict=True))
    return video, visible, hidden


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_reconstructs(name):
    model = masked(name).train()
    video, visible, hidden = inputs(model)
    loss, prediction = model(video, visible, hidden)
    assert prediction.shape == (2, hidden.shape[1], 2 * 8 * 8 * 3) and torch.isfinite(loss)
    loss.backward()
    assert all(
        p.grad is not None for n, p in model.named_parameters() if "head" in n or "mask" in n
    )
    assert model.mask_token.grad.abs().sum() > 0
    truth = take_tokens(patchify(video, 2, 8), hidden).float() / 255
    assert loss.item() == pytest.approx(
        (prediction - normalise_target(truth, 0.01)).square().mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_pixels_are_not_seen(name):
    """Other hidden pixels, the same prediction; other visible ones, another."""
    model = masked(name).eval()
    video, visible, hidden = inputs(model)
    with torch.no_grad():
        before = model(video, visible, hidden)[1]
        patches = patchify(video, 2, 8)
        for which, same in ((hidden, True), (visible, False)):
            changed = patches.scatter(1, which[..., None].expand(-1, -1, patches.shape[2]), 7)
            from pretrain.vit import unpatchify

            after = model(unpatchify(changed, model.grid, 2, 8), visible, hidden)[1]
            assert torch.equal(before, after) == same


def test_cells_are_laid_out_in_order():
    grid, cell = (2, 2, 3), (2, 4, 4)
    video = torch.randn(1, 3, 4, 8, 12)
    cut = [
        video[0, :, 2 * t : 2 * t + 2, 4 * y : 4 * y + 4,
              4 * x : 4 * x + 4].permute(1, 2, 3, 0).flatten()
        for t in range(2) for y in range(2) for x in range(3)
    ]  # fmt: skip
    assert torch.equal(unpatchify_cells(torch.stack(cut)[None], grid, cell), video)


def test_the_figure_shows_what_was_hidden():
    model = masked("vivit_1").eval()
    video, visible, hidden = inputs(model)
    shown, with_truth, _ = reconstruct(model, video, visible, hidden)
    grey = (shown == 128).all(1)
    assert grey.float().mean().item() == pytest.approx(0.75, abs=0.02)
    assert torch.equal(with_truth.movedim(1, -1)[~grey], video.movedim(1, -1)[~grey])


@pytest.mark.parametrize(
    ("changes", "patch", "message"),
    [
        ({"subtract_mean": True}, 8, "subtract_mean"),
        ({}, 12, "not a whole number of tubelets"),
    ],
)
def test_what_cannot_be_is_refused(changes, patch, message):
    with pytest.raises(ValueError, match=message):
        MaskedPixels(build_model("vivit_1", **SMALL | changes), 2, patch)


def test_a_decoder_larger_than_any_backbone_is_refused():
    with pytest.raises(ValueError, match="not worth training"):
        MaskedPixels(build_model("c3d", width=0.5, size=112), 2, 16)


@pytest.mark.parametrize("encoder", ["vivit_3", pytest.param("i3d", marks=pytest.mark.slow)])
def test_the_recipe_with_another_family(tiny_pack, tmp_path, encoder, monkeypatch):
    cfg = config(
        tiny_pack, tmp_path / "run", model=encoder, depth=None, decoder_dim=None,
        decoder_depth=None, frames=8, mask_ratio=0.5, steps=6, batch_size=4, base_lr=0.05,
        small=True,
    )  # fmt: skip
    modes = modes_in_steps(monkeypatch, videomae)
    videomae.main(cfg)
    assert modes == [{True}] * 6
    assert (tmp_path / "run" / "reconstruction.png").is_file()
    assert (tmp_path / "run" / "curve.png").is_file()
    backbone = load_backbone(str(tmp_path / "run" / "backbone"))
    assert type(backbone).__name__ == {"vivit_3": "ViViT", "i3d": "I3D"}[encoder]
    assert (
        backbone.input_spec.frames == 8
        and backbone.input_spec.streams["rgb"].subtract_mean is False
    )
    # Interrupted and started again, to the bit.
    real, count = videomae.train_step, [0]

    def step(*args):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(videomae, "train_step", step)
    again = change(cfg, out=str(tmp_path / "again"), save_every=1)
    with pytest.raises(KeyboardInterrupt):
        videomae.main(again)
    monkeypatch.setattr(videomae, "train_step", real)
    videomae.main(again)
    assert equal(final_weights(tmp_path / "again"), final_weights(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="VideoMAE"):
        backbones.load_pretrained_videomae(tmp_path / "run")


def test_flags_that_mean_nothing_are_refused(tiny_pack, tmp_path):
    with pytest.raises(ValueError, match="give --motion-tokens 1"):
        videomae.main(
            config(tiny_pack, tmp_path / "run", model="vivit_1", motion_tokens=0.5, mask="random")
        )
    with pytest.raises(ValueError, match="did you mean"):
        videomae.main(config(tiny_pack, tmp_path / "run", model="vivit"))


def test_what_is_kept_for_the_backward_pass_is_counted():
    from recipes.benchmark import kept_bytes

    layer = torch.nn.Linear(8, 4)
    x = torch.randn(5, 8, requires_grad=True)
    assert (
        kept_bytes(torch.nn.Sequential(layer), x) == 5 * 8 * 4
    )  # its input; the weight is not counted
    both = torch.nn.Sequential(layer, torch.nn.Sigmoid())
    assert kept_bytes(both, x) == 5 * 8 * 4 + 5 * 4 * 4
