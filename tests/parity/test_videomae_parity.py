"""VideoMAE against transformers' VideoMAEForPreTraining and against literal formulas."""

import itertools
import math

import numpy as np
import pytest
import torch

from pretrain.interop.hugging_face import to_hf
from pretrain.interop.layouts import arguments_of
from pretrain.interop.videomae import to_transformers
from pretrain.videomae import (
    VideoMAE,
    draw_tokens,
    make_mask,
    normalise_target,
    running_cell,
)
from pretrain.vit import (
    VideoTransformer,
    patchify,
    separable_table,
    sinusoid_table,
    take_tokens,
    unpatchify,
)

PUBLISHED = (8, 14, 14)  # the token grid of 16 frames of 224 pixels

# encoder: dim, depth, heads, frames, size, patch; decoder: dim, depth, heads
CONFIGS = {
    "patch 8": ((48, 2, 3, 4, 32, 8), (36, 2, 2)),
    "patch 16, long": ((64, 3, 4, 8, 32, 16), (40, 1, 5)),
    "one head, wide decoder": ((32, 1, 1, 4, 48, 8), (60, 2, 3)),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter, biases and norms included, a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        norm_weight = "norm" in name and name.endswith("weight")
        parameter.data = 1 + 0.1 * noise if norm_weight else 0.1 * noise


def case(name: str) -> tuple:
    """A model, transformers' twin, two clips and their tokens."""
    (dim, depth, heads, frames, size, patch), decoder = CONFIGS[name]
    ours = VideoMAE(VideoTransformer(dim, depth, heads, frames, size, patch), *decoder)
    randomise(ours, seed=1)
    theirs = to_transformers(ours)
    # The original has 1e-6 here, transformers its LayerNorm's default 1e-5.
    theirs.decoder.norm.eps = 1e-6
    rng = np.random.default_rng(2)
    video = torch.from_numpy(rng.integers(256, size=(2, 3, frames, size, size), dtype=np.uint8))
    drawn = [draw_tokens("random", ours.encoder.grid, 0.7, False, rng) for _ in range(2)]
    visible, masked = (torch.from_numpy(np.stack(tokens)) for tokens in zip(*drawn, strict=True))
    return ours, theirs, video, visible, masked


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_every_gradient_equal_transformers(name, train):
    ours, theirs, video, visible, masked = case(name)
    ours.train(train)
    theirs.train(train)
    mask = torch.zeros(2, math.prod(ours.encoder.grid), dtype=torch.bool).scatter(1, masked, True)
    loss, prediction = ours(video, visible, masked)
    pixels = ours.encoder.input_spec.normalise(video).transpose(1, 2)
    output = theirs(pixels, bool_masked_pos=mask)
    assert relative(prediction, output.logits) < 1e-5
    assert relative(loss, output.loss) < 1e-5
    loss.backward()
    output.loss.backward()
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    mapped, _ = to_hf(gradients, arguments_of(ours))
    named = {n: p.grad for n, p in theirs.named_parameters() if not n.endswith("key.bias")}
    assert mapped.keys() == named.keys()
    errors = {n: relative(mapped[n], named[n]) for n in named}
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-5, f"{worst}: {errors[worst]:.1e}"


def test_transformers_untouched_differs_by_its_decoder_epsilon_only():
    ours, theirs, video, visible, masked = case("patch 8")
    theirs.decoder.norm.eps = 1e-5
    mask = torch.zeros(2, math.prod(ours.encoder.grid), dtype=torch.bool).scatter(1, masked, True)
    loss, _ = ours(video, visible, masked)
    output = theirs(ours.encoder.input_spec.normalise(video).transpose(1, 2), bool_masked_pos=mask)
    assert relative(loss, output.loss) < 1e-4


def test_tokens_equal_transformers_and_train_mode_changes_nothing():
    ours, theirs, video, visible, masked = case("patch 16, long")
    clip = ours.encoder.input_spec.normalise(video)
    tokens = ours.encoder.eval().forward_features(clip)
    theirs_tokens = theirs.videomae(clip.transpose(1, 2)).last_hidden_state
    assert relative(tokens, theirs_tokens) < 1e-5
    assert torch.equal(tokens, ours.encoder.train().forward_features(clip))
    assert torch.equal(
        ours.eval()(video, visible, masked)[1], ours.train()(video, visible, masked)[1]
    )
    assert torch.equal(ours.encoder(clip), tokens.mean(1))


def test_target_equals_the_literal_formula():
    tubelet, patch = 2, 4
    video = torch.from_numpy(
        np.random.default_rng(0).integers(256, size=(1, 3, 4, 8, 12), dtype=np.uint8)
    ).double() / 255  # fmt: skip
    target = normalise_target(patchify(video, tubelet, patch))[0]
    token = 0
    for t in range(2):
        for h in range(2):
            for w in range(3):
                cut = video[0, :, 2 * t : 2 * t + 2, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4]
                n = tubelet * patch * patch
                for c in range(3):
                    values = [
                        cut[c, p, q, r].item()
                        for p in range(tubelet) for q in range(patch) for r in range(patch)
                    ]  # fmt: skip
                    mean = sum(values) / n
                    variance = sum((v - mean) ** 2 for v in values) / (n - 1)  # unbiased
                    expected = [(v - mean) / (math.sqrt(variance) + 1e-6) for v in values]
                    got = target[token, c::3]  # channel fastest
                    assert torch.allclose(got, torch.tensor(expected).double(), atol=1e-6)
                token += 1


def test_a_flat_patch_has_a_finite_target():
    # The epsilon stands outside the root: noise of one float step would be blown up inside it.
    flat = torch.full((1, 1, 2 * 4 * 4 * 3), 0.5)
    assert normalise_target(flat).abs().max() == 0


def test_positions_equal_the_literal_formula():
    table = sinusoid_table(1568, 48)
    for position in (0, 1, 195, 196, 1567):
        for j in range(48):
            angle = position / 10000 ** (2 * (j // 2) / 48)
            expected = math.sin(angle) if j % 2 == 0 else math.cos(angle)
            assert table[position, j].item() == pytest.approx(expected, abs=1e-6)


def test_separable_positions_equal_the_literal_formula():
    """Time, height and width, each its sines and then its cosines; MAE's for the last two."""
    grid, dim = (3, 2, 4), 20  # 6 of the width for time and height each, 8 for width
    table = separable_table(grid, dim)
    token = 0
    for place in itertools.product(*(range(n) for n in grid)):
        expected = []
        for p, size in zip(place, (6, 6, 8), strict=True):
            angles = [p / 10000 ** (2 * j / size) for j in range(size // 2)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert table[token].tolist() == pytest.approx(expected, abs=1e-6)
        token += 1
    assert token == len(table)


def test_separable_positions_reach_encoder_decoder_and_config():
    model = VideoMAE(VideoTransformer(24, 1, 2, 4, 16, 8, positions="separable"), 12, 1, 2)
    assert torch.equal(model.encoder.pos_embed, separable_table((2, 2, 2), 24))
    assert torch.equal(model.decoder_pos, separable_table((2, 2, 2), 12))
    again = VideoTransformer(**model.arguments["encoder"])
    assert torch.equal(again.pos_embed, model.encoder.pos_embed)
    with pytest.raises(ValueError, match="'sine'"):
        VideoTransformer(24, 1, 2, 4, 16, 8, positions="sine")


def test_patch_order_is_t_h_w_with_the_channel_fastest():
    video = torch.arange(3 * 4 * 4 * 6).reshape(1, 3, 4, 4, 6)
    patches = patchify(video, 2, 2)
    assert patches.shape == (1, 2 * 2 * 3, 2 * 2 * 2 * 3)
    token = (1 * 2 + 0) * 3 + 2  # t=1, h=0, w=2
    place = ((1 * 2 + 0) * 2 + 1) * 3 + 2  # p=1, q=0, r=1, c=2
    assert patches[0, token, place] == video[0, 2, 2 * 1 + 1, 2 * 0 + 0, 2 * 2 + 1]
    assert torch.equal(unpatchify(patches, (2, 2, 3), 2, 2), video)


def test_published_tube_mask_hides_1408_of_1568_in_identical_slots():
    mask = make_mask("tube", PUBLISHED, 0.9, np.random.default_rng(0))
    assert (mask.sum(), (~mask).sum()) == (1408, 160)
    slots = mask.reshape(PUBLISHED[0], -1)
    assert (slots == slots[0]).all()
    assert (make_mask("tube", PUBLISHED, 0.9, np.random.default_rng(1)) != mask).any()


def test_every_place_is_masked_equally_often():
    rng = np.random.default_rng(0)
    often = np.mean([make_mask("tube", (1, 6, 6), 0.75, rng) for _ in range(2000)], axis=0)
    assert abs(often - 0.75).max() < 0.05  # five standard deviations


@pytest.mark.parametrize("kind", ["random", "frame"])
def test_other_masks(kind):
    mask = make_mask(kind, PUBLISHED, 0.75, np.random.default_rng(0))
    assert mask.sum() == 0.75 * 1568
    slots = mask.reshape(8, -1)
    if kind == "frame":
        assert all(slot.all() or not slot.any() for slot in slots)
    else:
        assert (slots != slots[0]).any()


@pytest.mark.parametrize(
    ("kind", "ratio", "names"),
    [
        ("tubes", 0.9, "'tubes'"),
        ("tube", 0.001, "0.001"),
        ("frame", 1.0, "1.0"),
        ("tube", -1, "-1"),
    ],
)
def test_impossible_masks_are_refused(kind, ratio, names):
    with pytest.raises(ValueError, match=names):
        make_mask(kind, PUBLISHED, ratio, np.random.default_rng(0))


def test_running_cell():
    starts = set()
    for seed in range(40):
        decode = running_cell((8, 4, 6), np.random.default_rng(seed)).reshape(8, 4, 6)
        cells = decode.reshape(8, 2, 2, 3, 2).transpose(0, 1, 3, 2, 4).reshape(8, 6, 4)
        assert (cells.sum(-1) == 2).all()  # half of every 2x2 cell
        assert (cells == cells[:, :1]).all()  # all cells alike within a slot
        assert (decode.sum(0) == 4).all()  # every place in half of the slots
        pair = cells[:, 0]
        for slot in range(7):  # and the pair moves on by one with every slot
            assert (pair[slot + 1] == np.roll(pair[slot], 1)).all()
        assert (pair[0] == pair[4]).all()
        starts.add(tuple(pair[0].tolist()))
    assert len(starts) == 4  # from a random start


def test_running_cell_needs_even_sides():
    with pytest.raises(ValueError, match="5x4"):
        running_cell((8, 5, 4), np.random.default_rng(0))


def test_dual_masking_predicts_704_of_1408():
    for seed in range(5):
        visible, masked = draw_tokens("tube", PUBLISHED, 0.9, True, np.random.default_rng(seed))
        assert (len(visible), len(masked)) == (160, 704)
        assert not set(visible) & set(masked)
        assert (np.diff(visible) > 0).all()
        assert (np.diff(masked) > 0).all()
        # Exactly what the running cell decodes: the mask is drawn first, then the cell.
        rng = np.random.default_rng(seed)
        hidden = make_mask("tube", PUBLISHED, 0.9, rng)
        assert (masked == np.flatnonzero(hidden & running_cell(PUBLISHED, rng))).all()


def test_without_dual_masking_every_token_is_seen_or_predicted():
    visible, masked = draw_tokens("tube", PUBLISHED, 0.9, False, np.random.default_rng(0))
    assert (np.sort(np.concatenate([visible, masked])) == np.arange(1568)).all()


def test_gathering_equals_boolean_masking():
    rng = np.random.default_rng(0)
    x = torch.randn(3, 24, 5)
    masks = np.stack([make_mask("random", (2, 3, 4), 0.6, rng) for _ in range(3)])
    index = torch.from_numpy(np.stack([np.flatnonzero(~mask) for mask in masks]))
    expected = x[torch.from_numpy(~masks)].reshape(3, -1, 5)
    assert torch.equal(take_tokens(x, index), expected)


def test_mimetic_start_has_the_products_of_the_paper():
    """Query-key near 0.7 I per head cut to its rank, projection-value near -0.4 I; the rest as
    xavier.
    """
    torch.manual_seed(0)
    dim, heads = 96, 3
    model = VideoMAE(
        VideoTransformer(dim, 2, heads, 4, 16, 8, positions="separable", init="mimetic"), 48, 1, 2
    )
    for block in (*model.encoder.blocks, *model.decoder_blocks):
        width = block.attn.proj.in_features
        query, key, value = block.attn.qkv.weight.detach().chunk(3)
        eye, rank = torch.eye(width), width // block.attn.heads
        product = block.attn.proj.weight.detach() @ value
        # What is added to the identity is noise of standard deviation 0.4 / sqrt(width).
        assert torch.diagonal(product).mean().item() == pytest.approx(-0.4, abs=0.05)
        assert (product + 0.4 * eye).std().item() * width**0.5 == pytest.approx(0.4, rel=0.1)
        for rows in torch.arange(width).chunk(block.attn.heads):
            product = query[rows].T @ key[rows]
            assert torch.linalg.matrix_rank(product) == rank
            # A third or a half of the rank keeps the largest singular values, so most of the trace.
            assert 0.3 * 0.7 < torch.diagonal(product).mean() < 0.7
            torch.testing.assert_close(query[rows] @ query[rows].T, key[rows] @ key[rows].T)
        assert block.fc1.weight.abs().max() <= (6 / (5 * width)) ** 0.5  # xavier's bound
    again = VideoTransformer(**model.arguments["encoder"])
    assert again.arguments["init"] == "mimetic"


def test_mimetic_start_attends_to_neighbours():
    """Its purpose: from the start a token attends to its neighbours more than to others."""

    def shares(init: str) -> tuple[float, float]:
        torch.manual_seed(0)
        encoder = VideoTransformer(192, 1, 3, 16, 48, 8, positions="separable", init=init)
        block, x = encoder.blocks[0], encoder.pos_embed
        query, key, _ = block.attn.qkv(block.norm1(x)).unflatten(1, (3, 3, 64)).unbind(1)
        weights = (torch.einsum("nhd,mhd->hnm", query, key) / 8).softmax(-1).mean(0)
        place = torch.cartesian_prod(*(torch.arange(n) for n in encoder.grid)).float()
        near = torch.cdist(place, place, p=1) <= 1
        return (weights * near).sum(1).mean().item(), near.float().mean().item()

    share, uniform = shares("mimetic")
    assert share > 2 * uniform
    assert shares("xavier")[0] < 1.3 * uniform


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="'zeros'"):
        VideoTransformer(24, 1, 2, 4, 16, 8, init="zeros")


def test_the_start_is_the_authors():
    """Xavier for linear layers in encoder and decoder; torch's own between them; the mask token cut
    at one deviation.
    """
    torch.manual_seed(0)
    model = VideoMAE(VideoTransformer(256, 1, 4, size=32), 512, 1, 8)
    uniform = lambda bound: bound / 3**0.5
    between, token = model.encoder_to_decoder.weight, model.mask_token
    assert between.std().item() == pytest.approx(uniform(256**-0.5), rel=0.02)
    assert between.abs().max() <= 256**-0.5
    # A normal distribution cut at one deviation has .5396 of it.
    assert token.std().item() == pytest.approx(0.0108, rel=0.1) and token.abs().max() <= 0.02
    for part, width in ((model.encoder, 256), (model.decoder_blocks, 512), (model.head, 512)):
        for name, value in part.named_parameters():
            if value.ndim == 2 and not name.startswith("patch_embed"):
                expected = uniform((6 / sum(value.shape)) ** 0.5)
                assert value.std().item() == pytest.approx(expected, rel=0.02), name
                assert width in value.shape
    assert not model.head.bias.any()
