"""Pretraining on other streams than colour: optical flow is reconstructed, poses are contrasted."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream.finetune import record_method
from downstream.models import load_backbone, load_video_text
from pretrain import figures
from pretrain.data.pack import pack
from pretrain.data.shards import Pack, TrainClips
from pretrain.data.synthetic import make_dataset
from pretrain.data.transforms import Augment
from pretrain.figures import reconstruct
from pretrain.interop.layouts import obstacles
from pretrain.masked import MaskedPixels
from pretrain.videomae import VideoMAE, mask_of_view, start_from
from pretrain.vit import VideoTransformer, patchify
from recipes import clip, finetune, linear_probe, videomae, zero_shot
from tests.recipes.runs import configure, equal, final_weights, stop_in_step

SMALL = {
    "frames": 4, "stride": 2, "size": 32, "steps": 4, "batch_size": 4, "micro_batch": 4,
    "precision": "fp32", "num_workers": 0, "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A synthetic dataset with its exact flow and joints."""
    folder = tmp_path_factory.mktemp("streams")
    make_dataset(folder / "data", num_clips=30, frames=12, workers=1, progress=False)
    pack(folder / "data" / "clips.csv", folder / "pack", workers=1, progress=False)
    return folder / "pack"


def config(data, out, **changes) -> videomae.Config:
    return configure(videomae.Config,
        preset="test", data=str(data), out=str(out), split="all", depth=1, decoder_dim=32,
        decoder_depth=1, patch=8, mask="random", mask_ratio=0.75, save_every=2, log_seconds=0.0,
        **SMALL | {"stream": "flow"} | changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def flow_run(packed, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("flow") / "run"
    videomae.main(config(packed, run, motion_tokens=0.5))
    return run


def test_a_backbone_of_flow_is_pretrained_probed_and_fine_tuned(flow_run, packed, tmp_path):
    ((method, _),) = Pack(packed).index["streams"]["flow"]["methods"].items()
    stream = load_backbone(str(flow_run / "backbone")).input_spec.streams
    assert [*stream] == ["flow"] and stream["flow"].method == method
    assert (flow_run / "reconstruction.png").is_file()
    given = {"backbone": str(flow_run / "backbone"), "data": str(packed)}
    quick = {"num_workers": 0, "threads": 1, "precision": "fp32"}
    probe = configure(linear_probe.Config, out=str(tmp_path / "probe"), **given, **quick)
    linear_probe.main(probe)
    assert (tmp_path / "probe" / "results.json").is_file()
    again = configure(
        finetune.Config, out=str(tmp_path / "tuned"), steps=2, batch_size=4, micro_batch=4,
        subtract_mean=None, **given, **quick,
    )  # fmt: skip
    finetune.main(again)
    tuned = load_backbone(str(tmp_path / "tuned" / "backbone"))
    assert tuned.input_spec.streams["flow"].method == method


@pytest.mark.parametrize("streams", [{"stream": "flow"}, {"stream": "rgb", "target": "flow"}])
def test_a_figure_of_flow_says_how_fast_full_colour_is(streams, packed, tmp_path, monkeypatch):
    captions: list[str] = []
    real = figures.log.clips_figure
    monkeypatch.setattr(
        figures.log, "clips_figure", lambda *given: captions.append(given[4]) or real(*given)
    )
    model = videomae.build_model(config(packed, tmp_path, **streams))
    tokens = np.split(np.arange(int(np.prod(model.grid))), [2])
    figures.reconstruction_figure(tmp_path / "f.png", model, Pack(packed), 0, tokens, "M", "random")
    (said,) = captions
    fastest = float(re.search(r"full colour: ([\d.]+) pixels a frame", said)[1])
    flow = Pack(packed).flow(record := Pack(packed).record(0), np.arange(record["frames"]))
    speed = np.hypot(*flow.numpy().swapaxes(0, 1)).max() * model.clip.size / record["height"]
    assert 0 < fastest < 1.2 * speed


def test_a_run_of_flow_resumes_and_starts_another(flow_run, packed, tmp_path, monkeypatch):
    stop_in_step(monkeypatch, videomae, 3)
    cfg = config(packed, tmp_path / "run", motion_tokens=0.5)
    with pytest.raises(SystemExit):
        videomae.main(cfg)
    monkeypatch.undo()
    videomae.main(cfg)
    assert equal(final_weights(tmp_path / "run"), final_weights(flow_run))
    further = config(packed, tmp_path / "more", motion_tokens=0.5, backbone=str(flow_run))
    assert videomae.build_model(further).encoder.input_spec.streams["flow"].method
    with pytest.raises(ValueError, match="--stream flow"):
        videomae.build_model(config(packed, tmp_path, stream="rgb", backbone=str(flow_run)))


def test_data_without_flow_are_refused_before_anything(tiny_pack, tmp_path):
    (tmp_path / "list.csv").write_text("path\na.mp4\n")
    (tmp_path / "a.mp4").touch()
    for data in (tiny_pack, tmp_path / "list.csv"):
        with pytest.raises(ValueError, match=r"muybridge pack .*--flow"):
            videomae.main(config(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_another_family_reconstructs_flow_only_if_it_takes_flow(packed, tmp_path):
    other = {"small": True, "frames": 8}
    videomae.main(config(packed, tmp_path / "run", model="i3d_flow", **other))
    for changes in ({"model": "i3d"}, {"model": "i3d_flow", "stream": "rgb"}):
        with pytest.raises(ValueError, match="--stream"):
            videomae.main(config(packed, tmp_path / "no", **other | changes))


def test_what_has_no_effect_on_flow_is_refused(packed, tmp_path):
    for changes in ({"target_eps": 0.3}, {"colour": 0.5}):
        cfg = config(packed, tmp_path / "run", **changes)
        preset = configure(type(cfg), preset="tiny")
        with pytest.raises(ValueError, match="--stream flow"):
            videomae.flags.refuse_given(cfg, videomae.unused(cfg), preset)


def flow_model(**changes) -> VideoMAE:
    torch.manual_seed(0)
    given = {"frames": 4, "size": 16, "patch": 8, "stream": "flow"} | changes
    return VideoMAE(VideoTransformer(32, 1, 2, **given), 32, 1, 1).eval()


def test_the_target_of_flow_is_motion_over_the_bound():
    model = flow_model()
    video = torch.randint(1, 256, (2, 2, 4, 16, 16), dtype=torch.uint8)
    tokens = torch.arange(8).expand(2, 8)
    loss, prediction = model(video, tokens[:, :3], tokens[:, 3:])
    moves = (video.double() - 128) * 20 / 127  # pixels of a crop of 224
    target = patchify(moves, 2, 8)[:, 3:]
    assert loss.item() == pytest.approx((prediction - target).square().mean().item(), rel=1e-5)
    visible, rebuilt = reconstruct(model, video, tokens[:, :3], tokens[:, 3:])
    levels = patchify(rebuilt, 2, 8)
    assert torch.equal(levels[:, :3], patchify(video, 2, 8)[:, :3])
    expected = ((prediction / 20).clamp(-1, 1) * 127 + 128).round()
    assert (levels[:, 3:].float() - expected).abs().max() <= 1
    assert (patchify(visible, 2, 8)[:, 3:] == 128).all()


def test_tokens_of_flow_are_selected_by_how_much_moves():
    model = flow_model(motion_tokens=0.25)
    video = torch.full((1, 2, 4, 16, 16), 128, dtype=torch.uint8)
    video[:, 0, :2, :8, 8:] = 200  # evenly: a difference of frames would not see it
    video[:, 1, 2:, 8:, :8] = 60
    assert model.encoder.motion_indices(video).tolist() == [[1, 6]]
    normalised = model.encoder.input_spec.normalise(video)
    before = normalised.clone()
    assert model.encoder.motion_indices(normalised).tolist() == [[1, 6]]
    assert torch.equal(normalised, before)


def test_flow_is_no_colour_for_other_formats_or_weights():
    model = flow_model()
    assert any("flow" in what for what in obstacles(model.arguments))
    with pytest.raises(ValueError, match="--stream flow"):
        start_from(flow_model(stream="rgb"), model, "it")
    with pytest.raises(ValueError, match="bound"):
        start_from(model, flow_model(bound=3.0), "it")
    start_from(model, flow_model(method="tvl1"), "it")
    assert model.encoder.input_spec.streams["flow"].method == "tvl1"
    with pytest.raises(ValueError, match="depth"):
        flow_model(stream="depth")


# ---- flow from colour

TO_FLOW = {"stream": "rgb", "target": "flow"}


@pytest.fixture(scope="module")
def to_flow_run(packed, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("to_flow") / "run"
    videomae.main(config(packed, run, motion_tokens=0.5, **TO_FLOW))
    return run


def test_flow_from_colour_leaves_a_backbone_of_colour(to_flow_run, packed):
    backbone = load_backbone(str(to_flow_run / "backbone"))
    assert [*backbone.input_spec.streams] == ["rgb"]
    assert (to_flow_run / "reconstruction.png").is_file()
    colour = config(packed, "", motion_tokens=0.5, backbone=str(to_flow_run), stream="rgb")
    started = videomae.build_model(colour)
    assert equal(started.encoder.state_dict(), backbone.state_dict())
    fresh = videomae.build_model(config(packed, "", motion_tokens=0.5, stream="rgb"))
    assert torch.equal(started.head.weight, fresh.head.weight)  # a decoder of flow is no start
    again = config(packed, "", motion_tokens=0.5, backbone=str(to_flow_run), **TO_FLOW)
    weight = videomae.build_model(again).head.weight
    assert torch.equal(weight, final_weights(to_flow_run)["head.weight"])


def test_a_run_to_flow_resumes(to_flow_run, packed, tmp_path, monkeypatch):
    stop_in_step(monkeypatch, videomae, 3)
    cfg = config(packed, tmp_path / "run", motion_tokens=0.5, **TO_FLOW)
    with pytest.raises(SystemExit):
        videomae.main(cfg)
    monkeypatch.undo()
    videomae.main(cfg)
    assert equal(final_weights(tmp_path / "run"), final_weights(to_flow_run))


def test_streams_have_folders_of_their_own(packed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # The last two say the same, with and without the flag.
    for changes in ({"stream": "rgb"}, TO_FLOW, {}, {"target": "flow"}):
        cfg = config(packed, "", steps=1, knn_every=0, **changes)
        videomae.main(videomae.flags.replace(cfg, out=None))
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_flow_from_colour_wants_data_with_flow(tiny_pack, tmp_path):
    (tmp_path / "list.csv").write_text("path\na.mp4\n")
    (tmp_path / "a.mp4").touch()
    for data in (tiny_pack, tmp_path / "list.csv"):
        with pytest.raises(ValueError, match=r"--target flow.*muybridge pack .*--flow"):
            videomae.main(config(data, tmp_path / "run", **TO_FLOW))
    assert not (tmp_path / "run").exists()


def test_colour_is_not_reconstructed_from_flow(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(videomae, "open_data", lambda *_, **__: pytest.fail("packs for hours"))
    with pytest.raises(ValueError, match="--target rgb"):
        videomae.main(config(packed, tmp_path / "run", stream="flow", target="rgb"))
    other = {"small": True, "frames": 8}
    with pytest.raises(ValueError, match="takes flow"):
        videomae.main(config(packed, tmp_path / "run", model="i3d_flow", **TO_FLOW | other))
    cfg = config(packed, tmp_path / "run", target_eps=0.3, **TO_FLOW)
    with pytest.raises(ValueError, match="--target flow"):
        videomae.flags.refuse_given(cfg, videomae.unused(cfg), configure(type(cfg), preset="tiny"))


def test_other_encoders_and_contrast_predict_flow(packed, tmp_path):
    other = {"small": True, "frames": 8, "model": "i3d", "steps": 1}
    views = {"views": 2, "contrast": 0.3, "colour": 0.4, "dual_mask": True}
    alike = other | {"views": 2, "sigreg": 0.3}
    for number, changes in enumerate((other, views, alike)):
        run = tmp_path / str(number)
        videomae.main(config(packed, run, **TO_FLOW | changes))
        assert [*load_backbone(str(run / "backbone")).input_spec.streams] == ["rgb"]


def to_flow_models() -> list[VideoMAE | MaskedPixels]:
    torch.manual_seed(0)
    encoder = VideoTransformer(32, 1, 2, frames=4, size=16, patch=8)
    vit = VideoMAE(encoder, 32, 1, 1, target="flow")
    return [vit.eval(), MaskedPixels(encoder, 2, 8, target="flow").eval()]


@pytest.mark.parametrize("number", [0, 1])
def test_the_loss_is_that_of_flow_over_its_bound(number):
    model = to_flow_models()[number]
    video = torch.randint(256, (2, 3, 4, 16, 16), dtype=torch.uint8)
    flow = torch.randint(1, 256, (2, 2, 4, 16, 16), dtype=torch.uint8)
    tokens = torch.stack([torch.randperm(8) for _ in range(2)])
    loss, prediction = model(video, tokens[:, :3], tokens[:, 3:], flow)
    assert prediction.shape == (2, 5, 2 * 2 * 8 * 8)
    total, count = 0.0, 0
    for row in range(2):
        for place, token in enumerate(tokens[row, 3:].tolist()):
            t, y, x = token // 4 * 2, token // 2 % 2 * 8, token % 2 * 8
            block = flow[row, :, t : t + 2, y : y + 8, x : x + 8].double()
            moves = (block.permute(1, 2, 3, 0).flatten() - 128) * 20 / 127
            total += (prediction[row, place].double() - moves).square().sum().item()
            count += moves.numel()
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    if number == 0:
        assert any("decoder of flow" in what for what in obstacles(model.arguments))
        assert not obstacles({"encoder": model.arguments["encoder"]})
    # Nothing of the target is seen: the prediction is that of colour.
    assert torch.equal(model(video, tokens[:, :3], tokens[:, 3:], 255 - flow)[1], prediction)


@pytest.mark.parametrize("number", [0, 1])
def test_who_predicts_an_even_motion_has_no_loss(number):
    model = to_flow_models()[number]
    torch.nn.init.zeros_(model.head.weight)
    levels = torch.tensor([178, 90])
    per_value = (levels.float() - 128) * (20 / 127)
    model.head.bias.data.copy_(per_value.repeat(model.head.out_features // 2))
    video = torch.randint(256, (1, 3, 4, 16, 16), dtype=torch.uint8)
    flow = levels.to(torch.uint8).view(1, 2, 1, 1, 1).expand(1, 2, 4, 16, 16).contiguous()
    tokens = torch.arange(8)[None]
    assert model(video, tokens[:, :2], tokens[:, 2:], flow)[0].item() == 0
    _, hidden, predicted = reconstruct(model, video, tokens[:, :2], tokens[:, 2:], flow)
    assert torch.equal(hidden, predicted)
    assert torch.equal(patchify(hidden, 2, 8)[:, 2:], patchify(flow, 2, 8)[:, 2:])
    assert (patchify(hidden, 2, 8)[:, :2] == 128).all()


def test_both_streams_are_drawn_with_the_draws_of_colour_alone(packed):
    """The clip of colour stays to the bit, and its flow is that of the same frames and crop."""
    model, pack_of = to_flow_models()[0], Pack(packed)
    ids = pack_of.split("all")
    draw = mask_of_view("random", model.mask_grid, 0.5, False)
    clips = [
        TrainClips(pack_of, ids, spec, 3, 2, (1.0, 0.66), draw, Augment(flip=True))
        for spec in (model.encoder.input_spec, model.clip, flow_model().encoder.input_spec)
    ]
    for position in range(6):
        colour, both, flow = (part[position] for part in clips)
        assert torch.equal(colour["rgb"], both["rgb"]) and torch.equal(flow["flow"], both["flow"])
        assert torch.equal(colour["masked"], both["masked"])


# ---- joints and sentences


def contrast(data, out, **changes) -> clip.Config:
    return configure(clip.Config,
        preset="test", data=(str(data),), out=str(out), split="all", text_model="xxs", dim=16,
        small=True, **SMALL | {"frames": 8, "val_every": 0} | changes,
    )  # fmt: skip


@pytest.mark.parametrize("model", ["stgcn", "skeleton_lstm"])
def test_a_network_of_joints_is_a_tower(packed, tmp_path, model):
    state = clip.main(contrast(packed, tmp_path / "run", model=model, flip=True))
    assert 0 < state["loss"] < 5
    pair = load_video_text(str(tmp_path / "run" / "backbone"))
    assert pair.video.input_spec.streams["pose"].skeleton == "synthetic20"
    if model == "stgcn":
        scored = configure(
            zero_shot.Config, backbone=str(tmp_path / "run" / "backbone"), data=str(packed),
            out=str(tmp_path / "scored"), num_workers=0, precision="fp32",
        )  # fmt: skip
        zero_shot.main(scored)
        assert (tmp_path / "scored" / "results.json").is_file()


def test_joints_are_refused_where_there_are_none_or_others(packed, captioned_pack, tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "list.csv").write_text("path,caption\na.mp4,somebody waves\n")
    for data in (captioned_pack, tmp_path / "list.csv"):
        with pytest.raises(ValueError, match=r"muybridge pack .*--pose"):
            clip.main(contrast(data, tmp_path / "run", model="stgcn"))
    with pytest.raises(ValueError, match=r"kinect25.*synthetic20"):
        clip.main(contrast(packed, tmp_path / "run", model="stgcn", skeleton="kinect25"))
    mixed = {"text": "label", "templates": "vificlip", "loss": "classes", "mixup": 0.8}
    with pytest.raises(ValueError, match="pixels"):
        clip.main(contrast(packed, tmp_path / "mixed", model="stgcn", **mixed))
    assert not (tmp_path / "run").exists()


def test_a_tower_of_joints_in_pixels_and_of_two_people(packed, tmp_path):
    changes = {"model": "skeleton_lstm", "coordinates": 2, "people": 2, "steps": 1}
    clip.main(contrast(packed, tmp_path / "run", **changes))
    joints = load_video_text(str(tmp_path / "run" / "backbone")).video.input_spec.streams["pose"]
    assert (joints.coordinates, joints.people) == (2, 2)
    for name in ("skeleton", "coordinates", "people"):
        value = "coco17" if name == "skeleton" else 2
        for model in ("i3d", "vit_xs"):
            assert name in clip.unused(
                contrast("synthetic", tmp_path, model=model, **{name: value})
            )
    with pytest.raises(ValueError, match="2 or 3 coordinates"):
        clip.build_model(contrast(packed, tmp_path, model="stgcn", coordinates=4))


def test_a_tower_of_flow_refuses_flow_of_another_method(packed, tmp_path):
    ((method, _),) = Pack(packed).index["streams"]["flow"]["methods"].items()
    flow = {"model": "i3d_flow", "size": 32, "steps": 1}
    clip.main(contrast(packed, tmp_path / "run", **flow))
    exported = str(tmp_path / "run" / "backbone")
    assert load_video_text(exported).video.input_spec.streams["flow"].method == method
    # Of data by two methods none is recorded.
    backbone = clip.build_model(contrast(packed, tmp_path, **flow)).video
    record_method(backbone, *({"streams": {"flow": {"methods": {m: 1}}}} for m in "ab"))
    assert not backbone.input_spec.streams["flow"].method


def test_flags_of_colours_and_joints_without_effect(tmp_path):
    joints = clip.unused(
        contrast("synthetic", tmp_path, model="stgcn", colour=0.4, skeleton="coco17")
    )
    assert "colour" in joints and "skeleton" not in joints
    assert "skeleton" in clip.unused(
        contrast("synthetic", tmp_path, model="i3d", skeleton="coco17")
    )
