"""Positions, class token, resizing and attention maps of the plain video transformer."""

import math
import tracemalloc

import pytest
import timm
import torch
import torch.nn.functional as F

from downstream.attention_maps import attention_on_grid, overlay, rollout
from pretrain.backbones import BUILDERS, build, describe
from pretrain.videomae import VideoMAE
from pretrain.vit import (
    POSITIONS,
    VideoTransformer,
    position_table,
    resize_positions,
    rotary_table,
    rotate,
)
from pretrain.weights import load_strict
from recipes import visualize
from tests.conftest import draw_motion, write_video

SMALL = {"dim": 24, "depth": 2, "heads": 2, "frames": 4, "size": 32, "patch": 8}


def encoder(seed: int = 0, **changes) -> VideoTransformer:
    torch.manual_seed(seed)
    return VideoTransformer(**SMALL | changes).eval()


def clips(num: int = 2, frames: int = 4, size: int = 32) -> torch.Tensor:
    return torch.randn(num, 3, frames, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("pool", ["mean", "class"])
def test_every_kind_keeps_the_contract(positions, pool):
    model = encoder(positions=positions, pool=pool)
    video = clips()
    with torch.no_grad():
        tokens, embedding = model.forward_features(video), model(video)
    assert tokens.shape == (2, 32, 24) and embedding.shape == (2, 24)
    if pool == "mean":
        assert torch.allclose(embedding, tokens.mean(1), atol=1e-6)
    again = build(describe(model), BUILDERS)
    load_strict(again, model.state_dict(), "itself")
    assert torch.equal(again.eval()(video), embedding)
    model.train()
    model(video).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("pool", ["mean", "class"])
def test_tokens_know_their_place(positions, pool):
    """All tokens in another order with their places: the same tokens; with other places: others."""
    model = encoder(positions=positions, pool=pool)
    if positions == "learned":
        torch.nn.init.normal_(model.pos_embed)
    patches, order = torch.randn(1, 32, 2 * 64 * 3), torch.randperm(32)
    with torch.no_grad():
        plain = model.encode(patches)
        shuffled = model.encode(patches[:, order], order[None])
        misplaced = model.encode(patches[:, order])
    assert torch.allclose(shuffled, plain[:, order], atol=1e-5)
    assert not torch.allclose(misplaced, plain[:, order], atol=1e-3)


def test_a_class_token_is_timms():
    """One frame, learned positions, a class token: an image ViT, so timm's answer with the same
    weights.
    """
    theirs = timm.models.VisionTransformer(
        32, 8, embed_dim=24, depth=2, num_heads=2, num_classes=0, qkv_bias=True
    ).eval()
    ours = encoder(frames=1, tubelet=1, positions="learned", pool="class")
    generator = torch.Generator().manual_seed(2)
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    state = {
        "cls_token": ours.class_token, "norm.weight": ours.norm.weight, "norm.bias": ours.norm.bias,
        "pos_embed": torch.cat([torch.zeros(1, 1, 24), ours.pos_embed[None]], 1),
        "patch_embed.proj.weight": ours.patch_embed.weight.view(24, 8, 8, 3).permute(0, 3, 1, 2),
        "patch_embed.proj.bias": ours.patch_embed.bias,
    }  # fmt: skip
    for i, block in enumerate(ours.blocks):
        a = block.attn
        state |= {
            f"blocks.{i}.attn.qkv.weight": a.qkv.weight,
            f"blocks.{i}.attn.qkv.bias": torch.cat(
                [a.q_bias, torch.zeros_like(a.q_bias), a.v_bias]
            ),
        }
        modules = {"norm1": block.norm1, "norm2": block.norm2, "attn.proj": a.proj}
        modules |= {"mlp.fc1": block.fc1, "mlp.fc2": block.fc2}
        for name, module in modules.items():
            state |= {
                f"blocks.{i}.{name}.weight": module.weight,
                f"blocks.{i}.{name}.bias": module.bias,
            }
    load_strict(theirs, {k: v.detach().contiguous() for k, v in state.items()}, "ours")
    video = clips(2, 1)
    with torch.no_grad():
        expected = theirs.forward_features(video[:, :, 0])
        assert torch.allclose(ours(video), expected[:, 0], atol=1e-5)
        assert torch.allclose(ours.forward_features(video), expected[:, 1:], atol=1e-5)


# ------------------------------------------------------------------------------------------ rotary


def test_rotary_is_a_turn_by_the_place():
    cos, sin = rotary_table((2, 3, 4), (2, 3, 4), 14)
    assert cos.shape == (24, 14) and (cos[:, 12:] == 1).all() and (sin[:, 12:] == 0).all()
    x = torch.randn(1, 1, 24, 14)
    turned = rotate(x, (cos, sin))
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    # Token (1, 2, 3): pair 0 of time by 1, of height by 2, of width by 3 radians.
    at = (1 * 3 + 2) * 4 + 3
    for axis, angle in enumerate((1.0, 2.0, 3.0)):
        pair = slice(4 * axis, 4 * axis + 2)
        a, b = x[0, 0, at, pair]
        expected = torch.stack(
            [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
        )
        assert torch.allclose(turned[0, 0, at, pair], expected, atol=1e-5)


def test_rotary_attention_depends_on_distances_only():
    cos, sin = rotary_table((1, 1, 9), (1, 1, 9), 12)
    q, k = torch.randn(12), torch.randn(12)
    turn = lambda v, n: rotate(v.view(1, 1, 1, 12), (cos[n : n + 1], sin[n : n + 1])).flatten()
    near = [turn(q, i) @ turn(k, i + 3) for i in range(6)]
    assert torch.allclose(torch.stack(near), near[0].expand(6), atol=1e-4)
    assert not torch.allclose(turn(q, 0) @ turn(k, 4), near[0], atol=1e-3)


def test_a_longer_clip_is_squeezed_into_the_trained_range():
    long, short = rotary_table((8, 1, 1), (4, 1, 1), 6), rotary_table((4, 1, 1), (4, 1, 1), 6)
    centres = (
        long[0][0::2].acos() + long[0][1::2].acos()
    ) / 2  # two new slots lie around each old one
    assert torch.allclose(centres[1:, 0], short[0][1:, 0].acos(), atol=0.3)


@pytest.mark.parametrize("kind", ["flat", "separable"])
def test_a_table_takes_the_memory_of_its_numbers(kind):
    """And not that of several in twice the precision, from which it is rounded."""
    tracemalloc.start()
    try:
        table = position_table(kind, (32, 32, 32), 64)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * 4 * table.numel()
    finally:
        tracemalloc.stop()


# ----------------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("positions", POSITIONS)
def test_another_clip(positions):
    model = encoder(positions=positions)
    same = model.resized(4, 32)
    video = clips()
    with torch.no_grad():
        assert torch.allclose(same(video), model(video), atol=1e-6)
        larger = model.resized(8, 48, 3)
        assert larger.grid == (4, 6, 6) and larger.input_spec.stride == 3
        assert larger.eval()(clips(2, 8, 48)).shape == (2, 24)
        if positions in ("flat", "separable"):
            expected = resize_positions(
                position_table(positions, (2, 4, 4), 24), (2, 4, 4), (4, 6, 6)
            )
            assert torch.equal(larger.pos_embed, expected)
        if positions == "learned":
            assert torch.allclose(
                larger.pos_embed, resize_positions(model.pos_embed, (2, 4, 4), (4, 6, 6)), atol=1e-6
            )
        # There and back, fixed positions are those of the start: the grid they were made for is
        # kept.
        back = larger.resized(4, 32, 4)
        if positions != "learned":
            assert torch.allclose(back(video), model(video), atol=1e-5)
    again = build(describe(larger), BUILDERS)
    load_strict(again, larger.state_dict(), "itself")
    assert torch.equal(again.eval()(clips(2, 8, 48)), larger(clips(2, 8, 48)))
    with pytest.raises(ValueError, match="cannot be cut"):
        model.resized(5, 32)


def test_interpolation_is_linear():
    """Positions that are a plane stay that plane inside."""
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0), torch.arange(4.0))
    now = resize_positions(grid, (4, 4, 4), (8, 8, 8)).view(8, 8, 8, 3)
    inner = (torch.arange(8.0) + 0.5) / 2 - 0.5
    assert torch.allclose(now[1:-1, 3, 3, 0], inner[1:-1], atol=1e-5)
    assert torch.allclose(now[3, 3, 1:-1, 2], inner[1:-1], atol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_pretraining_with_other_positions(positions):
    model = VideoMAE(encoder(positions=positions, pool="class"), 12, 1, 2)
    video = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    order = torch.stack([torch.randperm(32) for _ in range(2)])
    loss, prediction = model(video, order[:, :8], order[:, 8:])
    loss.backward()
    assert prediction.shape == (2, 24, 2 * 64 * 3) and model.encoder.class_token.grad is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"pool": "max"}, "not one of mean, fc_norm"), ({"positions": "sine"}, "not one of")],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        encoder(**changes)


# ----------------------------------------------------------------------------------- attention maps


@pytest.mark.parametrize("positions", ["flat", "rotary"])
def test_attention_maps_are_those_of_the_forward_pass(positions):
    model = encoder(positions=positions)
    video = clips()
    maps, index = model.attention_maps(video)
    assert index is None and len(maps) == 2
    for layer in maps:
        assert layer.shape == (2, 32, 32) and torch.allclose(
            layer.sum(-1), torch.ones(2, 32), atol=1e-5
        )
    # With them, the first block's attention can be done by hand.
    attention, seen = model.blocks[0].attn, []
    attention.register_forward_hook(lambda _, given, out: seen.append((*given, out)))
    model(video)
    ((x, rotation, out),) = seen
    weights = attention.weights(x, rotation)
    assert torch.allclose(weights.mean(1), maps[0])
    value = F.linear(x, attention.qkv.weight.chunk(3)[2], attention.v_bias)
    value = value.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    by_hand = attention.proj((weights @ value).transpose(1, 2).flatten(2))
    assert torch.allclose(by_hand, out, atol=1e-5)


def test_rollout_is_its_product():
    maps = [torch.rand(1, 3, 3).softmax(-1) for _ in range(3)]
    expected = torch.eye(3)
    for layer in maps:
        expected = (0.5 * layer[0] + 0.5 * torch.eye(3)) @ expected
    assert torch.allclose(rollout(maps)[0], expected, atol=1e-6)
    assert torch.allclose(rollout(maps).sum(-1), torch.ones(1, 3), atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"pool": "class"}, {"motion_tokens": 0.25}])
def test_what_is_looked_at_lies_on_the_grid(changes):
    model = encoder(**changes)
    for seen in attention_on_grid(model, clips()).values():
        assert seen.shape == (2, 2, 4, 4) and torch.allclose(
            seen.sum((1, 2, 3)), torch.ones(2), atol=1e-5
        )
        assert (seen > 0).sum().item() == (2 * 8 if "motion_tokens" in changes else 2 * 32)


def test_the_overlay_is_red_where_most_is():
    clip, seen = torch.full((3, 4, 16, 16), 100, dtype=torch.uint8), torch.zeros(2, 2, 2)
    seen[1, 0, 1] = 0.5
    out = overlay(clip, seen)
    assert (
        (out[0, 2:, :8, 8:] > 190).all()
        and (out[0, :2] == 60).all()
        and (out[:, 2, 0, 0] == 60).all()
    )


def test_the_recipe(tiny_backbone, tmp_path):
    write_video(tmp_path / "a b.mp4", draw_motion("up", 1, 0, 16, 32))
    config = visualize.Config(str(tiny_backbone), str(tmp_path / "a b.mp4"), str(tmp_path / "out"))
    visualize.main(config)
    visualize.main(config)  # again replaces its own
    assert (tmp_path / "out" / "attention.png").is_file()
    from PIL import Image

    with Image.open(tmp_path / "out" / "attention.gif") as gif:
        assert gif.n_frames == 8 and gif.size == (3 * 32 * 4, 32 * 4)
    for video, out, message in (
        ("none.mp4", "o", "no such file"),
        ("a b.mp4", ".", "holds something else"),
    ):
        with pytest.raises(ValueError, match=message):
            visualize.main(
                visualize.Config(str(tiny_backbone), str(tmp_path / video), str(tmp_path / out))
            )
    with pytest.raises(ValueError, match="is a FrameNetwork"):
        visualize.main(
            visualize.Config("frame_mean", str(tmp_path / "a b.mp4"), str(tmp_path / "o"))
        )
