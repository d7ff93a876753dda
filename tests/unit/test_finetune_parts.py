"""Layers, rates, targets, mixing, averages, segments and augmentation, each by itself."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from downstream.claims import claims_about, difference_interval, paired_claims
from downstream.classifier import Classifier
from downstream.finetune import (
    Learner,
    balanced_weights,
    make_optimizer,
    make_targets,
    mix,
    scheduled_rate,
    soft_cross_entropy,
)
from downstream.models import MODELS, build_model
from downstream.results import ClassScore
from downstream.segments import UNLABELLED, frame_classes, parse_segments
from downstream.splits import few_shots
from downstream.training import TRAINING, fitting
from pretrain.data.transforms import Augment, rand_augment, random_erase
from pretrain.loop import Plan
from pretrain.optim import layer_groups
from pretrain.spec import InputSpec, Stream
from pretrain.vit import VideoTransformer

SPEC = InputSpec(4, 1, 8)


def tiny_vit() -> VideoTransformer:
    return VideoTransformer(16, 3, 2, frames=4, size=16, patch=8)


# ------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    "name", ["vit_xs", "lstm", "i3d", "c3d", "r3d_18", "inflated_nonlocal", "frame_slow"]
)
def test_layers_hold_every_parameter_once(name):
    with torch.device("cpu"):
        small = (
            {"network": "test_resnet", "size": 32}
            if name in ("lstm", "inflated_nonlocal", "frame_slow")
            else {}
        )
        small |= {"width": 0.1} if name in ("i3d", "c3d") else {}
        model = build_model(name, **small)
    names = [n for group in layer_groups(model) for n in group]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert 4 <= len(layer_groups(model)) <= 40


def test_layers_go_from_the_pixels_on():
    groups = layer_groups(tiny_vit())
    assert [g[0].rpartition(".")[0].split(".attn")[0] for g in groups] == [
        "patch_embed", "blocks.0.norm1", "blocks.1.norm1", "blocks.2.norm1", "norm",
    ]  # fmt: skip
    first, *_, last = layer_groups(build_model("lstm", network="test_resnet", size=32))
    assert first[0].startswith("images.net.conv1") and last[0].startswith("rnn.")


def test_rates_fall_by_layer_and_vectors_do_not_decay():
    model = Classifier(tiny_vit(), ["a", "b"])
    optimizer = make_optimizer("adamw", model, 0.05, 0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: g for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == set(names.values())
    assert found["head.weight"]["lr_scale"] == found["backbone.norm.weight"]["lr_scale"] == 1
    scales = [found[f"backbone.blocks.{i}.fc1.weight"]["lr_scale"] for i in range(3)]
    assert (
        scales == [0.125, 0.25, 0.5] and found["backbone.patch_embed.weight"]["lr_scale"] == 0.0625
    )
    assert found["backbone.blocks.0.fc1.weight"]["weight_decay"] == 0.05
    assert found["backbone.blocks.0.fc1.bias"]["weight_decay"] == 0
    assert found["backbone.blocks.0.attn.q_bias"]["weight_decay"] == 0


def test_drop_path_leaves_out_whole_branches():
    encoder = tiny_vit()
    encoder.set_drop_path(0.5)
    assert [b.drop_path for b in encoder.blocks] == [0.0, 0.25, 0.5]
    block, x = encoder.blocks[2], torch.randn(4000, 2, 16)
    torch.manual_seed(0)
    block.train()
    with torch.no_grad():
        dropped = (block(x) == x).flatten(1).all(1).float().mean().item()
        assert dropped == pytest.approx(0.25, abs=0.03)  # both branches, independently
        # What is left of a branch is scaled up: the mean stays.
        torch.nn.init.zeros_(block.attn.proj.weight)
        x = x[:1].expand(4000, -1, -1)
        change = (block(x) - x).mean(0)
        assert torch.allclose(change, (block.eval()(x) - x)[0], atol=0.1 * change.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_every_family_has_a_published_recipe(name):
    """By its class and arguments, so that an exported backbone of a family has it too."""
    with torch.device("meta"):
        backbone = build_model(name, small=not name.startswith("vi"))
    found = fitting(backbone)
    for part, wanted in {
        "vit_b": "videomae_b_k400", "vit_l": "videomae_l_k400", "vit_xs": "videomae_b_k400",
        "c3d": "c3d_ucf101", "vivit": "vivit_b_k400", "video_swin_b": "video_swin_b_k400",
        "frame_swin": "tsn_ucf101", "lstm": "lrcn_ucf101", "ed_tcn": "ed_tcn_50salads",
        "nonlocal": "nonlocal_k400", "r2plus": "r2plus1d_k400", "i3d": "i3d_k400",
        "frame_late": "karpathy_sports1m",
    }.items():  # fmt: skip
        if part in name and name != "skeleton_lstm":
            assert found[0] == wanted
    others = {
        "vit_b": "videomae_l_k400",
        "vit_l": "videomae_b_k400",
        "video_swin_b": "video_swin_t_k400",
    }
    assert others.get(name) not in found


def rate(step, num_steps, warmup, peak, schedule, final=0.0, drops=(0.25, 0.5, 0.75)) -> float:
    plan = Plan(num_steps, warmup, 1, 1, 1, 1, 1, 1, peak, final)
    return scheduled_rate(step, plan, schedule, drops)


def test_schedules():
    rates = [rate(s, 40, 0, 1.0, "step") for s in range(40)]
    assert rates == pytest.approx([1.0] * 10 + [0.1] * 10 + [0.01] * 10 + [0.001] * 10)
    cosine = [rate(s, 100, 10, 2.0, "cosine") for s in range(100)]
    assert cosine[:10] == pytest.approx([2 / 9 * i for i in range(10)]) and cosine[10] == 2.0
    assert cosine[55] == pytest.approx(1.0) and cosine[99] < 0.01
    # C3D on UCF101 (every 4 of 16 epochs), R(2+1)D (10 of warm-up, then every 10 of 45), VideoMAE's
    # last rate.
    r2plus1d = (45, 10, 1.0, "step", 0.0, (20 / 45, 30 / 45, 40 / 45))
    assert rate(29, *r2plus1d) == 0.1 and rate(40, *r2plus1d) == pytest.approx(1e-3)
    last = rate(9, 10, 0, 1.0, "cosine", 0.5)
    assert last == pytest.approx(0.5 + 0.25 * (1 + np.cos(0.9 * np.pi)))


# scripts/*/finetune.sh of MCG-NJU/VideoMAE: the rate as its run_class_finetuning.py scales it (lr x
# videos / 256), videos of a step, epochs, layer decay, drop path, dropout, the last rate, test
# views.
VIDEOMAE = {
    "videomae_s_k400": (5e-4 * 384 / 256, 384, 150, 0.75, 0.1, 0.0, 1e-6 * 384 / 256, (5, 3)),
    "videomae_b_k400": (5e-4 * 384 / 256, 384, 75, 0.75, 0.1, 0.0, 1e-6 * 384 / 256, (5, 3)),
    "videomae_l_k400": (2e-3 * 128 / 256, 128, 35, 0.75, 0.1, 0.0, 1e-6 * 128 / 256, (5, 3)),
    "videomae_h_k400": (1e-3 * 512 / 256, 512, 50, 0.75, 0.2, 0.5, 1e-5 * 512 / 256, (5, 3)),
    "videomae_b_ssv2": (5e-4 * 384 / 256, 384, 30, 0.75, 0.1, 0.0, 1e-6 * 384 / 256, (2, 3)),
    "videomae_s_ssv2": (1e-3 * 384 / 256, 384, 40, 0.7, 0.1, 0.0, 1e-6 * 384 / 256, (2, 3)),
    "videomae_b_ucf101": (5e-4 * 128 / 256, 128, 100, 0.7, 0.2, 0.5, 1e-5 * 128 / 256, (5, 3)),
}


@pytest.mark.parametrize("name", VIDEOMAE)
def test_videomaes_recipes_are_its_scripts(name):
    rate, videos, epochs, decay, path, dropout, last, views = VIDEOMAE[name]
    t = TRAINING[name]
    assert (t.batch_size / t.views, t.epochs, t.layer_decay) == (videos, epochs, decay)
    assert (t.drop_path, t.dropout, (t.num_clips, t.num_crops)) == (path, dropout, views)
    assert t.base_lr * t.batch_size / 256 == pytest.approx(rate)
    assert t.final_lr * t.batch_size / 256 == pytest.approx(last)
    assert t.warmup * t.epochs == pytest.approx(5)
    assert (t.smoothing, t.mixup, t.cutmix, t.erase, t.rand_augment) == (
        0.1,
        0.8,
        1.0,
        0.25,
        "n4-m7",
    )
    assert (t.crop, t.pool, t.head_std, t.weight_decay) == ("resized", "fc_norm", 2e-5, 0.05)
    assert (t.sampling, t.flip) == (("uniform", False) if "ssv2" in name else ("dense", True))


def test_video_swins_and_vivits_recipes_are_their_configurations():
    found = {
        name: (
            t.base_lr * t.batch_size / 256,
            t.weight_decay,
            t.drop_path,
            t.backbone_lr,
            t.num_clips,
            t.num_crops,
        )
        for name, t in TRAINING.items()
        if name.startswith("vi") and "mae" not in name
    }
    assert found == {
        "video_swin_t_k400": (1e-3, 0.02, 0.1, 0.1, 4, 3),
        "video_swin_s_k400": (1e-3, 0.02, 0.1, 0.1, 4, 3),
        "video_swin_b_k400": (1e-3, 0.05, 0.3, 0.1, 4, 3),
        "video_swin_b_k400_22k": (3e-4, 0.05, 0.2, 0.1, 4, 3),
        "vivit_b_k400": (0.1, 0.0, 0.0, 1.0, 4, 3),
    }
    assert TRAINING["vivit_b_k400"].head_std == 0


def test_video_swin_learns_below_its_head_and_tables_do_not_decay():
    model = Classifier(build_model("video_swin_t", small=True), ["a", "b"])
    model.positions = torch.nn.ParameterDict(
        {
            name: torch.nn.Parameter(torch.zeros(2, 3))
            for name in ("pos_embed", "positional_embedding")
        }
    )
    optimizer = make_optimizer("adamw", model, 0.02, 1.0, backbone_lr=0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: g for g in optimizer.param_groups for p in g["params"]}
    assert found["head.weight"]["lr_scale"] == 1 and found["head.weight"]["weight_decay"] == 0.02
    tables = [n for n in found if "relative_position_bias_table" in n or "positions." in n]
    assert len(tables) == 5 + 2 and all(found[n]["weight_decay"] == 0 for n in tables)
    attention = found["backbone.features.0.0.attn.qkv.weight"]
    assert attention["lr_scale"] == 0.1 and attention["weight_decay"] == 0.02
    model.backbone.set_drop_path(0.3)
    paths = [m.p for m in model.modules() if type(m).__name__ == "StochasticDepth"]
    assert paths == pytest.approx(np.linspace(0, 0.3, 5))


# ------------------------------------------------------------------------------------------ targets


def mean_loss(logits, targets, weights):
    total, mass = soft_cross_entropy(logits, targets, weights)
    return total / mass


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_is_torchs(smoothing, weighted):
    """Torch's own smoothing and class weights, on hard labels; its weights do not enter smoothing
    alike, so apart.
    """
    if smoothing and weighted:
        pytest.skip("torch weighs smoothed targets otherwise; the next test has the formula")
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 5, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 4, 4])
    weights = torch.tensor([3.0, 1, 0.5, 2, 1]) if weighted else None
    ours = mean_loss(logits, make_targets(labels, 5, smoothing), weights)
    theirs = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)
    assert torch.allclose(ours, theirs)
    a, b = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (ours, theirs))
    assert torch.allclose(a, b, atol=1e-7)


def test_frames_without_a_label_count_nothing():
    logits = torch.randn(2, 4, 3)
    labels = torch.tensor([[0, UNLABELLED, 2, 1], [UNLABELLED, UNLABELLED, 1, UNLABELLED]])
    ours = mean_loss(logits, make_targets(labels, 3, 0.1), None)
    theirs = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=UNLABELLED, label_smoothing=0.1
    )
    assert torch.allclose(ours, theirs)
    nothing = make_targets(torch.full((2, 4), UNLABELLED), 3, 0.1)
    assert soft_cross_entropy(logits, nothing, None) == (0, 0)


def test_balanced_weights():
    counts = np.array([1, 2, 5])
    weights = balanced_weights(counts).numpy()
    assert weights * counts == pytest.approx([8 / 3] * 3) and (
        weights * counts
    ).sum() == pytest.approx(8)


@given(st.integers(0, 200), st.sampled_from([(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)]))
def test_mixing_keeps_pixels_and_targets_together(seed, alphas):
    """Every clip has its own grey: the fraction of each clip in a mixture can be read off, and
    is the target's.
    """
    video = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 2, 16, 16)
    targets = torch.eye(4)
    mixed, soft = mix(video, targets, *alphas, np.random.default_rng(seed))
    assert torch.allclose(soft.sum(1), torch.ones(4))
    seen = mixed.mean((1, 2, 3, 4))
    assert torch.allclose(seen, soft @ torch.arange(4.0), atol=1e-4)
    assert (mixed == mixed[:, :, :1]).all()  # the same in every frame
    if not alphas[0]:  # a cut box: every pixel is of one of the two
        assert ((mixed == video) | (mixed == video.flip(0))).all()


@pytest.mark.parametrize("alphas", [(0.8, 0), (0, 1.0)])
def test_all_streams_of_a_clip_are_mixed_alike(alphas):
    video, targets = torch.rand(4, 3, 2, 16, 16), torch.eye(4)
    alone, soft = mix(video, targets, *alphas, np.random.default_rng(1))
    clip = {"rgb": video, "flow": video[:, :2]}
    both, again = mix(clip, targets, *alphas, np.random.default_rng(1))
    assert torch.equal(both["rgb"], alone) and torch.equal(both["flow"], alone[:, :2])
    assert torch.equal(soft, again) and not torch.equal(alone, video) and clip["rgb"] is video


def test_no_mixing_changes_nothing():
    video, targets = torch.randn(2, 3, 2, 4, 4), torch.eye(2)
    assert mix(video, targets, 0, 0, np.random.default_rng(0)) == (video, targets)


def test_few_shots():
    labels = ["a"] * 10 + ["b"] * 2 + ["c"] * 5
    keep = few_shots(labels, 3, 0)
    assert [sum(k for k, n in zip(keep, labels, strict=True) if n == c) for c in "abc"] == [3, 2, 3]
    assert (keep == few_shots(labels, 3, 0)).all() and (keep != few_shots(labels, 3, 1)).any()
    with pytest.raises(ValueError, match="--shots 0"):
        few_shots(labels, 0, 0)


def test_the_average_follows():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
    model.arguments = {}
    learner = Learner(model, 0.75)
    start = learner.average[0].weight.clone()
    with torch.no_grad():
        model[0].weight += 1
        model[1].running_mean += 5
    learner.update_average()
    assert torch.equal(learner.average[0].weight, start.lerp(model[0].weight, 0.25))
    assert torch.equal(learner.average[1].running_mean, model[1].running_mean)
    assert learner.best_guess is learner.average and not learner.average[0].weight.requires_grad
    assert Learner(model, 0).best_guess is model


# ----------------------------------------------------------------------------------------- segments


def record(**more) -> dict:
    return {
        "source": "x.mp4",
        "frames": 10,
        "fps": 5.0,
        "start": 0.0,
        "label": None,
        "extra": {},
    } | more


def test_segments_of_frames():
    numbers = {"sit down": 0, "up": 1}
    seen = frame_classes(
        record(extra={"segments": "0.2-0.6 sit down; 1-1.4 up; 1.4-1.6 other"}), numbers
    )
    assert seen.tolist() == [-1, 0, 0, -1, -1, 1, 1, -1, -1, -1]
    later = frame_classes(
        record(start=1.0, extra={"segments": "0.2-0.6 sit down; 1-1.4 up"}), numbers
    )
    assert later.tolist() == [1, 1, *[-1] * 8]  # the clip begins a second into its video
    assert frame_classes(record(label="up"), numbers).tolist() == [1] * 10
    between = frame_classes(
        record(extra={"segments": "0.3-0.7 up"}), numbers
    )  # frames from 0, 0.2, 0.4, 0.6, ..., whose middles are 0.1, 0.3, 0.5, 0.7, ...
    assert between.tolist() == [-1, 1, 1, *[-1] * 7]
    exact = frame_classes(record(fps=10.0, extra={"segments": "0.1-0.3 up"}), numbers)
    assert exact.tolist() == [-1, 1, 1, *[-1] * 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1-2", "start-end label"),
        ("a-b c", "start-end label"),
        ("2-1 x", "ends before"),
        ("0-2 x; 1-3 y", "overlap at 1 s"),
        (f"0-{'9' * 400} x", "after any video"),
        (f"0-{'9' * 308} x", "after any video"),
    ],
)
def test_wrong_segments_are_named(text, message):
    with pytest.raises(ValueError, match=f"x.mp4: segment.*{message}"):
        parse_segments(text, "x.mp4")


def test_segments_in_any_order():
    assert parse_segments(" 1.5-2 b c ;0-1.5 a;", "x") == [(0, 1.5, "a"), (1.5, 2, "b c")]


# ------------------------------------------------------------------------------------- augmentation


def moving_clip() -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (3, 4, 24, 24), dtype=np.uint8))


@pytest.mark.parametrize("seed", range(12))
def test_every_frame_gets_the_same(seed):
    """A clip of one repeated frame stays one: whatever is drawn, is drawn once a clip."""
    still = moving_clip()[:, :1].expand(-1, 4, -1, -1).contiguous()
    augment = Augment(flip=True, colour=0.4, rand_augment="n3-m9")
    frames = augment.before_crop(still.permute(1, 2, 3, 0), np.random.default_rng(seed))
    assert frames.shape == (4, 24, 24, 3)
    for out in (
        rand_augment(still, 4, 7, np.random.default_rng(seed)),
        frames.permute(3, 0, 1, 2),
        augment({"rgb": still}, np.random.default_rng(seed), SPEC)["rgb"],
    ):
        assert out.dtype == torch.uint8 and out.shape == still.shape
        assert (out == out[:, :1]).all()


def test_randaugment_does_something_and_is_repeatable():
    clip, outs = moving_clip(), []
    for seed in range(30):
        a = rand_augment(clip, 2, 7, np.random.default_rng(seed))
        assert torch.equal(a, rand_augment(clip, 2, 7, np.random.default_rng(seed)))
        outs.append(a)
    changed = sum(not torch.equal(a, clip) for a in outs)
    assert 15 <= changed <= 28  # each of the two is left out half of the time
    assert torch.equal(clip, moving_clip())


@pytest.mark.parametrize("name", ["rotate", "shift_x", "shift_y", "shear_x", "shear_y"])
def test_geometry_moves_by_the_level(name):
    from pretrain.data.transforms import apply_operation

    clip = torch.zeros(2, 3, 20, 20, dtype=torch.uint8)
    clip[:, :, 9:11, 9:11] = 255
    small, large = (apply_operation(name, clip, level, 1, 20, 20) for level in (0.1, 0.9))
    assert not torch.equal(large, clip)
    assert (large.float() - clip.float()).abs().sum() >= (small.float() - clip.float()).abs().sum()


def test_one_box_is_erased_in_all_frames():
    clip = torch.full((3, 4, 24, 24), 7, dtype=torch.uint8)
    shares = []
    for seed in range(40):
        out = random_erase({"rgb": clip}, np.random.default_rng(seed))["rgb"]
        hit = (out != 7).any(0)  # (T, H, W); noise may be 7 by chance, in single channels
        rows, columns = hit.any((0, 2)).nonzero(), hit.any((0, 1)).nonzero()
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        shares.append(box.item() / 24**2)
        assert hit.sum().item() > 0.98 * 4 * box.item()
    assert min(shares) > 0.01 and max(shares) < 0.4
    assert (clip == 7).all()


def test_wrong_augmentation_is_named():
    turns = ({"turn": wrong} for wrong in (-1, 181, math.nan, math.inf))
    joints = ({"affine": 1.5}, {"span": 0.0}, {"span": 1.1}, {"span": math.nan})
    for wrong in ({"colour": 2}, {"erase": -0.1}, {"rand_augment": "m7-n4"}, *turns, *joints):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Augment(**wrong)


def test_temporal_mean_subtraction():
    spec = InputSpec(4, 1, 8, {"rgb": Stream(subtract_mean=True)})
    video = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    seen = spec.normalise(video)
    assert seen.mean(2).abs().max() < 1e-6
    plain = InputSpec(4, 1, 8).normalise(video)
    assert torch.allclose(seen, plain - plain.mean(2, keepdim=True))
    assert (spec.normalise(video[:, :, :1].expand(-1, -1, 4, -1, -1)) == 0).all()
    with pytest.raises(ValueError, match="subtract_mean"):
        InputSpec(1, 1, 8, {"rgb": Stream(subtract_mean=True)})


# -------------------------------------------------------------------------------------- comparisons


def result(pairs: float) -> tuple[dict, list[SimpleNamespace]]:
    counts = {"sit_down": 50, "stand_up": 50, "walk": 70}
    per_class = {name: ClassScore(0.5, num, None) for name, num in counts.items()}
    return {"reversed_pairs": pairs}, [SimpleNamespace(per_class=per_class)]


def test_claims_are_held_against_chance():
    """100 videos of pairs: chance is 50 ± 9.8."""
    found = {
        "frame_mean": result(0.58),
        "frame_early": result(0.7),
        "lstm": result(0.62),
        "tcn": result(0.59),
    }
    claims = claims_about({k: v[0] for k, v in found.items()}, {k: v[1] for k, v in found.items()})
    held = {c["claim"]: c["held"] for c in claims}
    assert held == {
        "frame_mean classifies reversed actions at chance": "yes",
        "lstm classifies reversed actions above chance": "yes",
        "tcn classifies reversed actions above chance": "no",
        "frame_early lies between pooled frames and models of order": "no",
    }
    assert "50 ± 9.8" in claims[0]["measured"]
    found["frame_mean"] = result(0.61)
    claims = claims_about({k: v[0] for k, v in found.items()}, {k: v[1] for k, v in found.items()})
    assert claims[0]["held"] == "no"
    assert claims_about({"lstm": {"reversed_pairs": None}}, {}) == []


def test_differences_are_paired():
    sources = [f"v{i}" for i in range(40)]
    people = {s: f"p{i // 4}" for i, s in enumerate(sources)}
    base = {s: i % 2 == 0 for i, s in enumerate(sources)}
    better = base | {s: True for i, s in enumerate(sources) if i % 4 == 1}
    mean, low, high, groups = difference_interval([better], [base], people)
    assert mean == 0.25 and 0 < low < 0.25 < high
    assert difference_interval([base], [base], people) == (0, 0, 0, groups)
    assert groups == len(set(people.values()))
    # Of people of unequally many videos more or fewer are drawn than there are.
    unequal = people | dict.fromkeys(sources[: len(sources) // 2], "p0")
    everything, nothing = dict.fromkeys(sources, True), dict.fromkeys(sources, False)
    assert difference_interval([everything], [nothing], unequal)[:3] == (1, 1, 1)
    claims = paired_claims(
        {
            "inflated": [base],
            "inflated_se": [better],
            "inflated:frame_mean": [base],
            "lstm": [base],
        },
        people,
    )
    assert [(c["claim"], c["held"]) for c in claims] == [
        ("se helps inflated", "yes"),
        ("inflated inflated from frame_mean beats inflated from scratch", "not shown"),
    ]
