"""Pretraining on other streams than colour: optical flow is reconstructed, poses are contrasted."""

from pathlib import Path

import pytest
import torch

from downstream.models import load_backbone, load_video_text
from pretrain.data.pack import pack
from pretrain.data.shards import Pack
from pretrain.data.synthetic import make_dataset
from pretrain.figures import reconstruct
from pretrain.interop.layouts import obstacles
from pretrain.videomae import VideoMAE, start_from
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
        with pytest.raises(ValueError, match=r"pack\.py .*--flow"):
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
    moves = (video.double() - 128) / 127
    target = patchify(moves, 2, 8)[:, 3:]
    assert loss.item() == pytest.approx((prediction - target).square().mean().item(), rel=1e-5)
    visible, rebuilt = reconstruct(model, video, tokens[:, :3], tokens[:, 3:])
    levels = patchify(rebuilt, 2, 8)
    assert torch.equal(levels[:, :3], patchify(video, 2, 8)[:, :3])
    expected = (prediction.clamp(-1, 1) * 127 + 128).round()
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


# ---- joints and sentences


def contrast(data, out, **changes) -> clip.Config:
    return configure(clip.Config,
        preset="test", data=(str(data),), out=str(out), split="all", text_model="xs", dim=16,
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
        with pytest.raises(ValueError, match=r"pack\.py .*--pose"):
            clip.main(contrast(data, tmp_path / "run", model="stgcn"))
    with pytest.raises(ValueError, match=r"kinect25.*synthetic20"):
        clip.main(contrast(packed, tmp_path / "run", model="stgcn", skeleton="kinect25"))
    mixed = {"text": "label", "templates": "vificlip", "loss": "classes", "mixup": 0.8}
    with pytest.raises(ValueError, match="pixels"):
        clip.main(contrast(packed, tmp_path / "mixed", model="stgcn", **mixed))
    assert not (tmp_path / "run").exists()


def test_flags_of_colours_and_joints_without_effect(tmp_path):
    joints = clip.unused(
        contrast("synthetic", tmp_path, model="stgcn", colour=0.4, skeleton="coco17")
    )
    assert "colour" in joints and "skeleton" not in joints
    assert "skeleton" in clip.unused(
        contrast("synthetic", tmp_path, model="i3d", skeleton="coco17")
    )
