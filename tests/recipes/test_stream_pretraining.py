"""Pretraining on other streams than colour: optical flow is reconstructed, poses are contrasted."""

from pathlib import Path

import pytest
import torch

from downstream.models import load_backbone
from pretrain.data.pack import pack
from pretrain.data.shards import Pack
from pretrain.data.synthetic import make_dataset
from pretrain.figures import reconstruct
from pretrain.interop.layouts import obstacles
from pretrain.videomae import VideoMAE, start_from
from pretrain.vit import VideoTransformer, patchify
from recipes import finetune, linear_probe, videomae
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
