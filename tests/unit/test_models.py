"""One matrix over all model families, and what each promises by itself."""

import dataclasses
import json
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from downstream.classifier import Classifier
from downstream.models import (
    MODELS,
    PUBLISHED,
    Family,
    build_model,
    builders,
    load_backbone,
    load_classifier,
    load_video_text,
)
from downstream.models.__main__ import COSTS, count_costs, main
from downstream.models.attention import KINDS, insert, make_block
from downstream.models.flops import count_flops, shapes_only
from downstream.models.frames import FrameNetwork
from downstream.models.fusion import EarlyFusion, LateFusion, SlowFusion
from downstream.models.images import ImageNetwork
from downstream.models.inflated import Inflated, InflatedConv
from downstream.models.recurrent import FrameRNN
from downstream.models.tcn import TCN, EncoderDecoder, FrameTCN
from pretrain.backbones import build, describe, export_backbone, fresh_like
from pretrain.clip import VideoText
from pretrain.spec import Backbone, InputSpec
from pretrain.text import fresh_text
from pretrain.weights import weights_hash

# The smallest clip each family can see, and a second legal one.
SMALL = {"network": "test_resnet", "size": 32}
NARROW_VIT = {"dim": 32, "depth": 2, "heads": 2, "frames": 4, "size": 32, "patch": 8}
CHEAP = {
    "frame_single": [SMALL, SMALL | {"size": 40, "frames": 2}],
    "frame_mean": [SMALL | {"frames": 3}, SMALL | {"frames": 5}],
    "frame_max": [SMALL | {"frames": 3, "pool": pool} for pool in ("max", "attention", "temporal")],
    "frame_late": [SMALL, SMALL | {"stride": 3}],
    "frame_early": [SMALL, SMALL | {"frames": 3}],
    "frame_slow": [SMALL, SMALL | {"frames": 6}, SMALL | {"frames": 14, "size": 64}],
    "c3d": [
        {"width": 0.05, "size": 32},
        {"width": 0.05, "frames": 32, "size": 48, "batch_norm": True},
    ],
    "i3d": [{"width": 0.1, "frames": 8, "size": 32}, {"width": 0.1, "frames": 17, "size": 45}],
    "i3d_flow": [{"width": 0.1, "frames": 8, "size": 32, "method": "tvl1", "bound": 3.0}],
    "i3d_early": [{"width": 0.1, "frames": 8, "size": 32}],
    "i3d_two_stream": [{"width": 0.1, "frames": 8, "size": 32}],
    "two_stream": [SMALL, SMALL | {"frames": 3, "stride": 0}],
    "skeleton_lstm": [
        {"hidden": 8, "frames": 5},
        {"hidden": 8, "layers": 1, "people": 2, "coordinates": 2, "skeleton": "coco17"},
    ],
    **{
        f"stgcn{end}": [{"width": 0.05, "frames": 7, "dropout": 0.0}]
        for end in ("", "_bone", "_both")
    },
    "pose_attention": [
        {"width": 0.1, "frames": 16, "size": 64, "hidden": 8, "freeze_pose": False},
    ],
    "feature_fusion": [
        {"width": 0.1, "frames": 8, "size": 32, "hidden": 8},
        {"parts": ("frame_mean", "stgcn"), "network": "test_resnet", "frames": 4, "size": 32},
    ],
    "r3d_18": [{"frames": 8, "size": 16}],
    "mc3_18": [{"frames": 8, "size": 16}],
    "r2plus1d_18": [{"frames": 8, "size": 16}],
    "s3d": [{"frames": 16, "size": 32}],
    **{name: [NARROW_VIT] for name in MODELS if name.startswith("vit_")},
    **{
        f"vivit_{i}": [NARROW_VIT, NARROW_VIT | {"frames": 6, "size": 24, "tubelet": 1}]
        for i in (1, 2, 3, 4)
    },
    "frame_swin": [{"frames": 2, "size": 32}],
    **{f"video_swin_{v}": [{"variant": "xs", "frames": 4, "size": 32}] for v in "tsbl"},
}
CHEAP |= {name: [SMALL | {"frames": 5}] for name in MODELS if name not in CHEAP}
CHEAP["vivit_2"].append(NARROW_VIT | {"class_token": False, "temporal_depth": 1})
CHEAP["video_swin_t"].append({"variant": "xs", "frames": 5, "size": 40, "window": (2, 3, 3)})
CHEAP["lstm"].append(SMALL | {"frames": 2, "size": 48})
CHEAP["ed_tcn"].append(SMALL | {"frames": 8})
CASES = [pytest.param(n, a, id=f"{n}-{i}") for n, all_ in CHEAP.items() for i, a in enumerate(all_)]


def clip_for(model: nn.Module, num: int = 2) -> torch.Tensor | dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return changed(model.input_spec.empty(num), lambda x: torch.randn(x.shape, generator=random))


def changed(clip, change):
    """Every stream of a clip changed alike."""
    return {k: change(v) for k, v in clip.items()} if isinstance(clip, dict) else change(clip)


def fresh(name: str, seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(name, **changes)


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_the_contract(name, changes, tmp_path):
    model = fresh(name, **changes)
    assert isinstance(model, Backbone)
    video = clip_for(model)
    model.train()
    embedding = model(video)
    assert embedding.shape == (2, model.embed_dim) and torch.isfinite(embedding).all()
    # A gradient to every parameter. A loss that is linear in the embedding could hide a dead half.
    (embedding * torch.randn_like(embedding)).sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without
    model.eval()
    with torch.no_grad():
        tokens, embedding = model.forward_features(video), model(video)
        t, h, w = model.grid
        assert tokens.shape == (2, t * h * w, model.embed_dim) and torch.isfinite(tokens).all()
        # Another clip of the batch changes nothing.
        alone = model(changed(video, lambda x: x[:1]))
        assert torch.allclose(alone, embedding[:1], atol=1e-4, rtol=1e-3)
        # Saved and built again.
        export_backbone(model, tmp_path / "backbone", {})
        again = load_backbone(str(tmp_path / "backbone")).eval()
        assert torch.equal(again(video), embedding) and again.grid == model.grid
        assert again.input_spec == model.input_spec
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(video).float()
        assert torch.isfinite(rough).all()
        assert (rough - embedding).norm() / embedding.norm() < 0.1
    for wrong in (lambda x: x[:, :1], lambda x: x[..., :-1, :-1], lambda x: torch.cat([x, x], 2)):
        with pytest.raises(ValueError, match=r"takes clips|clips are"):
            model(changed(video, wrong))


def test_every_model_is_in_the_matrix():
    assert set(CHEAP) == set(MODELS)


@pytest.mark.parametrize(
    "name", [n for n in MODELS if n not in ("vit_l", "vit_h", "frame_swin")]
)  # as large when small
def test_small_arguments_build(name):
    with shapes_only():
        model = build_model(name, small=True)
    assert all(p.is_meta for p in model.parameters())  # nothing is allocated
    assert model.input_spec.size <= 64 and count_flops(model) > 0


FIRST_OF_CLASS = list({MODELS[name].build: name for name in reversed(MODELS)}.values())


@pytest.mark.parametrize(
    "names", [FIRST_OF_CLASS, pytest.param(list(MODELS), marks=pytest.mark.slow)], ids=len
)
def test_the_table_says_what_is_counted(names):
    """If not: python -m downstream.models --write."""
    kept = json.loads(COSTS.read_text())
    assert kept.keys() <= MODELS.keys() and len(kept) >= 39
    assert [n for n in names if n in kept and kept[n] != count_costs(n)] == []


def test_the_table_is_printed_without_building_a_network():
    code = (
        "import json, runpy, sys, torch, downstream.models\n"
        # One that was added without --write is counted, which takes its time.
        f"kept = json.load(open({str(COSTS)!r})); rows = downstream.models.MODELS\n"
        "[rows.pop(name) for name in rows.keys() - kept.keys()]\n"
        "torch.nn.Module.__init__ = lambda self: sys.exit('a network is built')\n"
        "runpy.run_module('downstream.models', run_name='__main__')\n"
        # Each takes a second or two to import.
        "slow = {'timm', 'torchvision', 'open_clip', 'transformers', 'sklearn', 'torch._dynamo'}\n"
        "sys.exit(slow & set(sys.modules) or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    kept = json.loads(COSTS.read_text())
    assert [line.split()[0] for line in lines[1 : len(kept) + 1]] == [
        n for n in MODELS if n in kept
    ]
    (i3d,) = [line for line in lines if line.startswith("i3d ")]
    assert "12.3 M" in i3d and "64 x 224 x 224" in i3d and "1705.07750" in i3d


def test_a_family_of_ones_own_is_counted_on_the_spot(capsys, monkeypatch):
    monkeypatch.setitem(MODELS, "mine", dataclasses.replace(MODELS["vit_xs"], paper="ours"))
    main(dict.fromkeys(MODELS.keys() - {"mine"}, count_costs("vit_xs")))
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:9] for line in lines if line}
    assert rows["mine"] == rows["vit_xs"] and lines[len(MODELS)].endswith("ours")


def test_flops_of_known_models():
    with shapes_only():
        resnet18, r3d = build_model("frame_single"), build_model("r3d_18")
        videomae, swin = build_model("vit_b"), build_model("video_swin_t")
    assert count_flops(videomae) == pytest.approx(
        2 * 180.5e9, rel=0.01
    )  # as VideoMAE's paper has it
    assert count_flops(swin) == pytest.approx(2 * 87.9e9, rel=0.02)  # Video Swin's paper: 88 GMAC
    assert count_flops(resnet18) == pytest.approx(2 * 1.814e9, rel=0.01)  # ResNet-18: 1.81 GMAC
    assert count_flops(r3d) == pytest.approx(2 * 40.70e9, rel=0.01)  # torchvision's own number
    base = count_flops(fresh("frame_mean", **SMALL, frames=4))
    for cell, gates in (("rnn", 1), ("lstm", 4), ("gru", 3)):
        extra = count_flops(fresh(cell, **SMALL, frames=4, hidden=8)) - base
        width = ImageNetwork("test_resnet", 32).embed_dim
        assert extra == 2 * 4 * gates * 8 * (width + 8)


def test_counting_computes_and_changes_nothing():
    model = fresh("inflated", **SMALL, frames=3).train()
    before = weights_hash(model)
    count_flops(model)
    assert weights_hash(model) == before and all(m.training for m in model.modules())


# --------------------------------------------------------------------------------- order and frames


def reversed_is_the_same(model: nn.Module) -> bool:
    model.eval()
    video = clip_for(model)
    with torch.no_grad():
        return torch.allclose(model(video), model(video.flip(2)), atol=1e-5)


def test_pooled_frames_know_no_order_and_the_others_do():
    for name in ("frame_mean", "frame_max"):
        assert reversed_is_the_same(fresh(name, **SMALL, frames=4))
    for name in (
        "frame_late",
        "frame_early",
        "frame_slow",
        "rnn",
        "lstm",
        "gru",
        "bilstm",
        "tcn",
        "inflated",
    ):
        changes = CHEAP[name][0]
        assert not reversed_is_the_same(fresh(name, **changes)), name


def test_frames_are_seen_one_by_one():
    model = FrameNetwork("test_resnet", frames=3, size=32).eval()
    video = clip_for(model)
    with torch.no_grad():
        for t in range(3):
            assert torch.allclose(
                model.forward_features(video)[:, t], model.images(video[:, :, t]), atol=1e-5
            )
        assert torch.allclose(model(video), model.forward_features(video).mean(1))
        model.pool = "max"
        assert torch.equal(model(video), model.forward_features(video).amax(1))


def test_slow_fusion_merges_as_karpathy_does():
    """Ten frames: the first layer sees 0-3, 2-5, 4-7, 6-9; then pairs of these; then all."""
    model = SlowFusion("test_resnet", size=32).eval()
    seen, sizes = [], []
    model.stages[next(iter(model.stages))].register_forward_hook(lambda m, i, o: seen.append(i[0]))
    for merge in model.merges:
        merge.register_forward_hook(lambda m, i, o: sizes.append((i[0].shape[0], o.shape[0])))
    video = clip_for(model, 1)
    with torch.no_grad():
        model(video)
    assert sizes == [(2, 2), (1, 1)]
    for response, first in enumerate((0, 2, 4, 6)):
        frames = video[0, :, first : first + 4].transpose(0, 1).flatten(0, 1)
        assert torch.equal(seen[0][response], frames)


def test_late_fusion_shares_its_towers():
    model = LateFusion("test_resnet", size=32)
    assert model.input_spec.stride == 15 and model.input_spec.frames == 2
    video = clip_for(model)
    expected = torch.cat([model.images.eval()(video[:, :, t]) for t in (0, 1)], 1)
    assert torch.allclose(model.eval()(video), model.merge(expected).relu(), atol=1e-5)


# ----------------------------------------------------------------------------------------- TCN, RNN


@pytest.mark.parametrize(("depth", "kernel"), [(2, 2), (2, 3), (3, 2)])
def test_tcn_is_causal_and_sees_its_receptive_field(depth, kernel):
    model = FrameTCN(
        network="test_resnet", depth=depth, kernel=kernel, hidden=8, frames=24, size=32
    ).eval()
    field = model.temporal.receptive_field
    assert field == 1 + 2 * (kernel - 1) * (2**depth - 1) < 24
    frames = torch.randn(1, 24, model.images.embed_dim, requires_grad=True)
    tokens = model.temporal(frames)
    at = 20
    tokens[0, at].sum().backward()
    reach = frames.grad[0].abs().sum(1).nonzero().flatten().tolist()
    assert max(reach) == at and min(reach) >= at - field + 1
    # Every frame of the field matters to some network; ReLUs may hide a few in this one.
    assert min(reach) <= at - field + 1 + (kernel - 1)


@pytest.mark.parametrize("make", [TCN, EncoderDecoder])
def test_a_tcn_takes_features(make):
    """(Batch, Temporal_length, Feature_size) to a token for every step, of any length."""
    model = make(7, hidden=8).eval()
    for steps in (1, 5, 40):
        assert model(torch.randn(2, steps, 7)).shape == (2, steps, 8)
    features, later = torch.randn(1, 40, 7), torch.randn(1, 40, 7)
    changed = torch.cat([features[:, :20], later[:, 20:]], 1)
    same = torch.equal(model(features)[:, :20], model(changed)[:, :20])
    assert same == (make is TCN)
    for wrong in (torch.randn(2, 7, 40), torch.randn(2, 3, 5, 32, 32), torch.randn(5, 7)):
        with pytest.raises(ValueError, match="Temporal_length"):
            model(wrong)


def test_what_is_not_causal_sees_later_frames():
    for changes in ({"causal": False}, {"form": "encoder_decoder", "causal": False, "depth": 2}):
        model = FrameTCN(network="test_resnet", hidden=8, frames=8, size=32, **changes).eval()
        video = clip_for(model, 1)
        other = video.clone()
        other[:, :, -1] += 1
        with torch.no_grad():
            change = (model.forward_features(video) - model.forward_features(other)).abs().sum(-1)
        assert (change[0, :-1] > 0).any()
    model = FrameTCN(network="test_resnet", hidden=8, frames=8, size=32).eval()
    with torch.no_grad():
        change = (model.forward_features(video) - model.forward_features(other)).abs().sum(-1)
    assert not change[0, :-1].any() and change[0, -1] > 0


def test_a_recurrent_embedding_is_the_last_state():
    for cell, both in (("rnn", False), ("gru", False), ("lstm", False), ("lstm", True)):
        model = FrameRNN(cell, "test_resnet", 8, bidirectional=both, frames=5, size=32).eval()
        video = clip_for(model)
        with torch.no_grad():
            frames = model.norm(model.images.frames(video))
            _, state = model.rnn(frames)
            last = state[0] if cell == "lstm" else state
            assert torch.allclose(model(video), last.transpose(0, 1).flatten(1), atol=1e-6)


# ---------------------------------------------------------------------------------------- inflation


@pytest.mark.parametrize(
    "network", ["test_resnet", "torchvision:mobilenet_v3_small", "test_convnext"]
)
def test_a_still_video_gives_the_answer_of_its_frame(network, tmp_path):
    torch.manual_seed(0)
    flat = ImageNetwork(network, 32)
    for module in flat.modules():  # statistics that a trained network has
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    save_file(dict(flat.net.state_dict()), tmp_path / "net.safetensors")
    model = build_model(
        "inflated", network=network, frames=6, size=32, weights=str(tmp_path / "net.safetensors")
    ).eval()
    assert len(model.inflated) > 2
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        still = model.forward_features(image.unsqueeze(2).expand(-1, -1, 6, -1, -1))
        expected = flat.eval()(image)
        for t in range(6):
            assert torch.allclose(still[:, t], expected, atol=1e-4, rtol=1e-3)
        moving = model(torch.randn(2, 3, 6, 32, 32))
    assert torch.isfinite(moving).all()


def test_inflated_convolution_is_a_3d_convolution():
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    inflated = InflatedConv(conv, 3)
    inflated.frames = 5
    x = torch.randn(2, 3, 5, 8, 8)
    ours = inflated(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 5)).transpose(1, 2)
    reference = nn.Conv3d(3, 4, 3, stride=(1, 2, 2), padding=(0, 1, 1))
    reference.weight.data, reference.bias.data = inflated.weight.data, conv.bias.data
    padded = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
    assert torch.allclose(ours, reference(padded), atol=1e-5)


def test_stacked_frames_start_from_image_weights(tmp_path):
    flat = timm.create_model("test_resnet", num_classes=10)
    torch.save(flat.state_dict(), tmp_path / "net.pth")
    model = build_model("frame_early", **SMALL, frames=4, weights=str(tmp_path / "net.pth")).eval()
    image = torch.randn(1, 3, 32, 32)
    flat.reset_classifier(0)
    with torch.no_grad():
        still = model(image.unsqueeze(2).expand(-1, -1, 4, -1, -1))
        assert torch.allclose(still, flat.eval()(image), atol=1e-4)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    other = timm.create_model("test_convnext", num_classes=0)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    for weights, message in (
        (str(tmp_path / "other.safetensors"), "does not fit"),
        (str(tmp_path / "none.pth"), "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            build_model("frame_mean", **SMALL, weights=weights)
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(ValueError, match="plain tensors"):
        build_model("frame_mean", **SMALL, weights=str(tmp_path / "text.pth"))
    (tmp_path / "config.json").write_text("{")
    for load in (load_backbone, load_classifier):
        for name in (str(tmp_path / "text.pth"), f"hf:{tmp_path}"):
            with pytest.raises(ValueError) as refused:
                load(name)
            assert str(refused.value).count(str(tmp_path)) == 1
    with pytest.raises(ValueError, match="takes no"):
        build_model("c3d", weights="imagenet")


# ---------------------------------------------------------------------------------------- attention


def test_blocks_stand_where_they_were_put_and_are_saved(tmp_path):
    model = build_model("inflated_se", **SMALL, frames=3)
    names = [n for n, m in model.named_modules() if type(m).__name__ == "SqueezeExcitation"]
    # test_resnet has basic blocks and, in its third stage, a bottleneck.
    assert [n.split(".")[4] for n in names] == ["bn2", "bn2", "bn3", "bn2"]
    efficient = FrameNetwork("test_efficientnet", size=32)  # has a norm behind its last block
    assert "images.net.bn2" in dict(efficient.named_modules())
    places = insert(efficient, "se@sums")
    assert places and all(n.startswith("images.net.blocks.") for n in places)
    again = build(describe(model), builders())
    assert describe(again) == describe(model)
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_an_export_from_before_blocks_saw_clips_is_refused(tmp_path):
    """Its weights would fit in shape, squeeze-and-excitation's all of them, and mean another
    network.
    """
    model = build_model("inflated_se", **SMALL, frames=3)
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "OverClips":  # as it was
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.block)
    export_backbone(model, tmp_path / "backbone", {})
    with pytest.raises(ValueError, match="another version"):
        load_backbone(str(tmp_path / "backbone"))


def test_a_vivits_classifier_starts_at_zero():
    for name, zero in (("vivit_1", True), ("vivit_2", True), ("vit_xs", False)):
        head = Classifier(fresh(name, **NARROW_VIT), ["a", "b"]).head
        assert head.weight.any() != zero and not head.bias.any()


def test_a_nonlocal_block_starts_as_the_identity():
    torch.manual_seed(0)
    plain = build_model("i3d", width=0.1, frames=8, size=32).eval()
    video = clip_for(plain)
    with torch.no_grad():
        before = plain(video)
        for kind in KINDS:
            if kind.startswith("nonlocal"):
                model = build_model("i3d", width=0.1, frames=8, size=32)
                model.load_state_dict(plain.state_dict())
                assert insert(model, f"{kind}@features.Mixed_4?") == [
                    f"features.Mixed_4{c}" for c in "bcdef"
                ]
                assert torch.equal(model.eval()(video), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [2, 3])
def test_every_block_learns_and_keeps_the_shape(kind, axes):
    block = make_block(kind, 6, axes).train()
    if hasattr(block, "norm"):
        nn.init.ones_(block.norm.weight)  # or nothing behind it gets a gradient at the start
    x = torch.randn(2, 6, *[4] * axes, requires_grad=True)
    y = block(x)
    assert y.shape == x.shape
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize(
    ("where", "message", "network"),
    [
        ("se@nowhere", "no place of the network", "test_resnet"),
        ("se", "no place of the network", "test_resnet"),
        ("sse@images.net.layer1", "not one of", "test_resnet"),
        ("se@norm", "no feature map", "test_resnet"),
        ("se@sums", "no place of the network", "test_convnext"),
        ("se@*.features.1", "channels first", "torchvision:swin_xs"),
    ],
)
def test_wrong_places_are_named(where, message, network):
    with pytest.raises(ValueError, match=message):
        build_model("lstm", network=network, size=32, frames=3, attention=where)


# ------------------------------------------------------------------------------ classifiers, errors


def test_a_classifier_is_saved_with_its_classes(tmp_path):
    torch.manual_seed(0)
    model = Classifier(
        build_model("lstm", **SMALL, frames=3), ["zwölf Äpfel", "b c"], 0.1, per_frame=True
    )
    export_backbone(model, tmp_path / "backbone", {})
    again = load_classifier(str(tmp_path / "backbone"))
    assert again.classes == model.classes and again.per_frame
    video = clip_for(model)
    assert torch.equal(again(video), model.eval()(video))
    assert again(video).shape == (2, 3, 2)
    backbone = load_backbone(str(tmp_path / "backbone"))  # what is under the head
    assert weights_hash(backbone) == weights_hash(model.backbone)


@torch.no_grad()
def test_whatever_is_loaded_answers_twice_alike_and_learns_nothing_by_it(tmp_path):
    """Evaluation mode: no dropout, and batch statistics stay."""
    classifier = Classifier(build_model("frame_mean", **SMALL, frames=3), ["a", "b"], dropout=0.5)
    export_backbone(classifier.train(), tmp_path / "classifier", {})
    loaded = [
        load_classifier(str(tmp_path / "classifier")),
        load_backbone(str(tmp_path / "classifier")),
        load_backbone("frame_mean"),
        build_model("inflated", **SMALL, frames=3, attention="se@*.layer3"),
    ]
    loaded.append(fresh_like(loaded[0].train(), 1))
    loaded[0].eval()
    assert not [type(m).__name__ for m in loaded for part in m.modules() if part.training]
    for model in (loaded[0], loaded[1]):
        before, video = weights_hash(model), clip_for(model)
        assert torch.equal(model(video), model(video))
        assert weights_hash(model) == before


def test_a_label_a_frame_needs_a_token_a_frame():
    with pytest.raises(ValueError, match="every frame"):
        Classifier(build_model("i3d", width=0.1, frames=8, size=32), ["a", "b"], per_frame=True)
    with pytest.raises(ValueError, match="the only"):
        Classifier(build_model("frame_mean", **SMALL), ["a"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("i4d", {}, "did you mean i3d"),
        ("c3d", {"frames": 8}, "at least 16"),
        ("i3d", {"size": 16}, "at least 8 of 32"),
        ("frame_slow", {"frames": 8}, "give --frames 10"),
        ("frame_late", {"frames": 3}, "sees 2 frames"),
        ("frame_early", {"network": "resnet9999"}, "timm"),
        ("lstm", {"network": "torchvision:resnet19"}, "torchvision"),
        ("lstm", {"width": 2}, "width.*lstm"),
        ("ed_tcn", {"causal": True}, "not causal"),
        ("inflated", {"time_kernel": 2}, "odd"),
        ("inflated", {"network": "test_vit", "size": 32}, "nothing to inflate"),
        ("frame_slow", {"network": "torchvision:resnet18"}, "timm"),
        ("vivit_1", {"model": 5}, "1 to 4"),
        ("vivit_4", {"heads": 3, "dim": 96}, "3 is odd"),
        ("vivit_3", {"class_token": True}, "class token"),
        ("vivit_1", {"size": 100}, "tubelets"),
        ("video_swin_t", {"variant": "m"}, "not one of"),
        ("video_swin_t", {"size": 24}, "at least 2 of 32"),
    ],
)
def test_mistakes_are_named(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, **changes)


def test_names_of_classifiers(tmp_path):
    assert "i3d_k400" in PUBLISHED
    with pytest.raises(ValueError, match="needs --weights FILE"):
        load_classifier("i3d_k400")
    with pytest.raises(ValueError, match="trained classifier"):
        load_classifier("lstm")
    with pytest.raises(ValueError, match="no classifier at"):
        load_classifier(str(tmp_path / "none"))
    export_backbone(build_model("frame_mean", **SMALL), tmp_path / "backbone", {})
    with pytest.raises(ValueError, match="has no classifier"):
        load_classifier(str(tmp_path / "backbone"))


def test_networks_of_torchvision_and_open_clip(tmp_path):
    """Three libraries, one door: their own answers."""
    image = torch.randn(2, 3, 32, 32)
    ours = ImageNetwork("torchvision:resnet18", 32).eval()
    theirs = torchvision.models.resnet18().eval()
    theirs.load_state_dict(
        ours.net.state_dict() | {k: theirs.state_dict()[k] for k in ("fc.weight", "fc.bias")}
    )
    theirs.fc = nn.Identity()
    with torch.no_grad():
        assert torch.equal(ours(image), theirs(image))
    vision = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 16, "image_size": 32}
    config = {"embed_dim": 16, "vision_cfg": vision, "quick_gelu": False}
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    network = {"open_clip": config, **pixels}
    model = FrameRNN("lstm", network, 8, frames=3, size=32)
    assert (
        model(clip_for(model)).shape == (2, 8)
        and model.input_spec.streams["rgb"].mean == (0.5,) * 3
    )
    with pytest.raises(ValueError, match="3 channels"):
        EarlyFusion(network, size=32)
    again = build(describe(model), builders())
    assert isinstance(again, FrameRNN) and isinstance(
        Inflated("test_resnet", frames=3, size=32), nn.Module
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_xs", {"positions": "rotary", "pool": "class"}),
        ("vit_xs", {"motion_tokens": 0.5}),
        *[(f"vivit_{i}", {}) for i in (1, 2, 3, 4)],
        ("video_swin_t", None),
    ],
)
def test_transformers_compile_without_graph_breaks(name, changes):
    model = build_model(
        name, **(CHEAP["video_swin_t"][0] if changes is None else NARROW_VIT | changes)
    ).eval()
    video = clip_for(model)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(
            model, backend="eager", fullgraph=True
        )  # raises where the graph breaks
        assert torch.allclose(compiled(video), model(video), atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [name for name in MODELS
     if not name.startswith(("vit_", "vide", "r3d_18", "mc3_18", "r2plus1d_18"))],
)  # fmt: skip
def test_small_ones_are_for_minutes_on_a_cpu(name):
    """300 steps of 32 clips at 2 GFLOPs, forward and backward, are ten minutes at 100 GFLOP/s."""
    model = build_model(name, small=True)
    assert count_flops(model) < 2e9
    assert sum(p.numel() for p in model.parameters()) < 8e6


@pytest.mark.parametrize("name", ["vit_xs", "lstm", "i3d", "video_swin_t", "open_clip"])
def test_clips_in_another_layout_are_told_how_to_turn(name):
    """To a backbone and to its `input_spec`: channels last, time first, no batch, bytes, floats of
    unknown scale.
    """
    if name == "open_clip":
        vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
        config = {"embed_dim": 16, "vision_cfg": vision, "quick_gelu": False}
        pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
        model = FrameNetwork({"open_clip": config, **pixels}, 4, 4, 32)
    else:
        model = build_model(name, **CHEAP[name][0])
    spec = model.input_spec
    clips = torch.zeros(2, 3, spec.frames, spec.size, spec.size, dtype=torch.uint8)
    assert spec.normalise(clips).dtype == torch.float32
    slips = {
        "permute": clips.permute(0, 2, 3, 4, 1),
        "transpose": clips.transpose(1, 2),
        "None": clips[0],
    }
    for words, clip in slips.items():
        for take in (
            spec.normalise,
            lambda c: model(c.float()),
            lambda c: model.forward_features(c.float()),
        ):
            with pytest.raises(ValueError, match=words):
                take(clip)
    with pytest.raises(ValueError, match="normalise"):
        model(clips)
    for kind in (torch.float32, torch.int64):
        with pytest.raises(ValueError, match="uint8"):
            spec.normalise(clips.to(kind))


class Elsewhere(nn.Module):
    """A family that this repository does not have: the mean colour of every frame."""

    def __init__(self, frames: int = 4, size: int = 16):
        super().__init__()
        self.arguments = {"frames": frames, "size": size}
        self.input_spec, self.embed_dim = InputSpec(frames, 2, size), 3
        self.grid, self.scale = (frames, 1, 1), nn.Parameter(torch.rand(3))

    def forward_features(self, clip):
        self.input_spec.expect(clip)
        return clip.mean((3, 4)).transpose(1, 2) * self.scale

    def forward(self, clip):
        return self.forward_features(clip).mean(1)


def test_a_family_from_elsewhere_is_a_row(tmp_path, monkeypatch):
    """Nothing is registered when a module is imported: the table of the moment decides what a
    folder may name.
    """
    with monkeypatch.context() as patch:
        patch.setitem(MODELS, "elsewhere", Family(Elsewhere, "here"))
        model = build_model("elsewhere", frames=2)
        clip = clip_for(model)
        wrapped = Classifier(model, ["nods", "waves"], per_frame=True)
        pair = VideoText(model, fresh_text("xxs", 8), 8, project=True, loss="infonce")
        for name, kind in {"plain": model, "classifier": wrapped, "pair": pair}.items():
            export_backbone(kind, tmp_path / name, {})
            loaded = load_backbone(str(tmp_path / name))
            assert torch.equal(loaded(clip), model(clip)) and isinstance(loaded, Backbone)
        assert load_classifier(str(tmp_path / "classifier")).per_frame
        assert load_video_text(str(tmp_path / "pair")).text.embed_dim == 8
    for name in ("plain", "classifier", "pair"):
        with pytest.raises(ValueError, match="Elsewhere"):
            load_backbone(str(tmp_path / name))
