"""Skeletons over a clip."""

import numpy as np
import pytest
import torch
from PIL import Image

from downstream.models import build_model, load_backbone
from downstream.models.pose_attention import PoseAttention
from downstream.skeletons import SIDES, draw_poses
from pretrain.backbones import export_backbone
from pretrain.data.poses import SKELETONS
from pretrain.data.synthetic import make_dataset
from recipes import finetune, visualize
from tests.conftest import draw_motion, write_video
from tests.recipes.runs import configure, flags_of
from tests.unit import layouts


def test_bones_are_where_the_joints_are_and_in_the_colour_of_their_side():
    names = SKELETONS["coco17"].joints
    joints = np.zeros((1, 1, 17, 3), np.float32)
    for side, x in (("left", 40), ("right", 10)):
        for name, y in (("shoulder", 5), ("elbow", 15), ("wrist", 25)):
            joints[0, 0, names.index(f"{side}_{name}")] = (x, y, 1)
    frames = np.zeros((1, 30, 50, 3), np.uint8)
    drawn = draw_poses(frames, joints, ("u", "v", "confidence"), "coco17", 2)
    assert drawn.shape == (1, 60, 100, 3)
    assert tuple(drawn[0, 40, 80]) == SIDES["left"] and tuple(drawn[0, 40, 20]) == SIDES["right"]
    assert not drawn[0, 52:].any() and not drawn[0, 20:, 30:70].any()
    nobody = draw_poses(frames, joints * 0, ("u", "v", "confidence"), "coco17")
    np.testing.assert_array_equal(nobody, frames)


def test_poses_of_a_file_are_drawn(tmp_path, capsys):
    write_video(tmp_path / "clip.mp4", draw_motion("right", 0, 0, 16, 64))
    ((name, data),) = layouts.coco(layouts.people(16, 2, "coco17")).items()
    (tmp_path / name).write_bytes(data)
    config = visualize.Config(
        video=str(tmp_path / "clip.mp4"), pose=str(tmp_path / name), out=str(tmp_path / "out")
    )
    visualize.main(config)
    assert "pose.png" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "pose.gif") as moving:
        assert moving.n_frames > 1 and moving.size == (256, 256)
    assert not (tmp_path / "out" / "attention.png").exists()


# ---- attention that poses drive


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    """A backbone of 2-D joints that looks at the upper right and at the second half."""
    model = build_model(
        "pose_attention", True, width=0.05, size=64, hidden=4, skeleton="coco17", coordinates=2
    )
    assert model.grid == (2, 2, 2)
    model.space[-1].bias.data[:] = torch.tensor([-2.0, 2.0, -2.0, -2.0])
    model.time[-1].bias.data[:] = torch.tensor([0.0, 2.0])
    folder = tmp_path_factory.mktemp("driven")
    export_backbone(model, folder / "backbone", {})
    write_video(folder / "clip.mp4", draw_motion("right", 0, 0, 32, 64))
    for name, poses in {
        "poses.json": layouts.coco(layouts.people(32, 1, "coco17")),
        "short.json": layouts.coco(layouts.people(9, 1, "coco17")),
        "metres.txt": layouts.msr(layouts.people(32, 1, "msr20")),
    }.items():
        (folder / name).write_bytes(next(iter(poses.values())))
    (folder / "clip.csv").write_text("path,pose\nclip.mp4,poses.json\n")
    (folder / "none.csv").write_text("path,label\nclip.mp4,up\n")
    (folder / "short.csv").write_text("path,pose\nclip.mp4,short.json\n")
    return folder


@pytest.mark.parametrize(
    "given", [{"video": "clip.mp4", "pose": "poses.json"}, {"video": "clip.csv"}]
)
def test_what_poses_attend_to_is_drawn(driven, tmp_path, given, capsys):
    given = {name: str(driven / file) for name, file in given.items()}
    out = tmp_path / "out"
    visualize.main(visualize.Config(str(driven / "backbone"), out=str(out), **given))
    said = capsys.readouterr()
    assert "attention.png" in said.out and not said.err
    assert {p.name for p in out.iterdir()} - {".lock"} == {"attention.png", "attention.gif"}
    with Image.open(out / "attention.gif") as moving:
        assert moving.n_frames == 16 and moving.size == (2 * 256, 256 + 48)
        moving.seek(15)
        last = np.asarray(moving.convert("RGB")).astype(int)
    red = last[:256, 256:, 0] - last[:256, 256:, 2]  # of the map
    quarters = [red[y : y + 128, x : x + 128].mean() for y in (0, 128) for x in (0, 128)]
    assert quarters[1] > 60 > 40 + max(quarters[0], *quarters[2:])
    bars = last[256:]
    assert (bars[-1, 300] - (255, 140, 0)).max() < 30  # the half at hand
    assert np.ptp(bars[-1, 100]) < 30 and (bars[10, 300] != bars[10, 100]).any()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"video": "clip.mp4"}, "--pose"),
        ({"video": "none.csv"}, "--pose"),
        ({"video": "short.csv"}, "9 frames"),
        ({"video": "clip.mp4", "pose": "short.json"}, "9 frames"),
        ({"video": "clip.mp4", "pose": "metres.txt"}, "msr20"),
        ({"video": "clip.mp4", "pose": "no.json"}, r"no\.json"),
    ],
)
def test_attention_without_its_poses_is_refused(driven, tmp_path, given, words):
    given = {name: str(driven / file) for name, file in given.items()}
    with pytest.raises(ValueError, match=words):
        visualize.main(visualize.Config(str(driven / "backbone"), out=str(tmp_path), **given))


@pytest.mark.slow
def test_pose_attention_is_trained_in_stages(tmp_path):
    """Each network on the classes, then both: what looked at the joints stays as it was."""
    listing = make_dataset(tmp_path / "data", 20, size=32, frames=16, workers=1, progress=False)
    small = {
        "preset": "tiny", "data": str(listing), "steps": 2, "batch_size": 4,
        "micro_batch": 4, "num_workers": 0, "threads": 1, "precision": "fp32", "num_clips": 1,
        "val": "off", "log_seconds": 0.0,
    }  # fmt: skip
    parts = []
    for name, changes in {
        "i3d": {"width": 0.05, "frames": 16, "size": 32},
        "skeleton_lstm": {"size": 32},
        "pose_attention": {"parts": parts},
    }.items():
        finetune.main(
            configure(finetune.Config, model=name, out=str(tmp_path / name), **small | changes)
        )
        parts.append(str(tmp_path / name / "backbone"))
    video, pose, both = map(load_backbone, parts)
    assert isinstance(both, PoseAttention)
    after = both.state_dict()
    assert all(torch.equal(after[f"pose.{n}"], p) for n, p in pose.state_dict().items())
    assert not any(torch.equal(after[f"video.{n}"], p) for n, p in video.state_dict().items())
    # Its attention is no longer the same everywhere.
    assert both.space[-1].bias.any() and both.time[-1].bias.any()
    visualize.main(
        visualize.Config(
            parts[2],
            str(tmp_path / "data" / "clips" / "00000.mp4"),
            str(tmp_path / "seen"),
            pose=str(tmp_path / "data" / "joints" / "00000.npy"),
            skeleton="synthetic20",
        )
    )
    assert (tmp_path / "seen" / "attention.png").is_file()


def test_weights_of_time_are_bars():
    strip = visualize.weights_strip(np.array([0.25, 0.5, 0.25]), 6, 30, 8)
    assert strip.shape == (6, 8, 30, 3)
    filled = (strip != 255).any(-1)
    assert (filled.sum(1) == np.repeat([4, 8, 4], 10)).all()
    now = (strip == (255, 140, 0)).all(-1).any(1)
    assert [np.flatnonzero(row).tolist() for row in now] == [
        list(range(10 * (t // 2), 10 * (t // 2) + 10)) for t in range(6)
    ]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "--backbone"),
        ({"pose": "there/is/none.json"}, "none.json"),
        ({"pose": "short"}, "16"),
        ({"pose": "metres"}, "metres"),
        ({"pose": "short", "video": ""}, "--video"),
        ({"pose": "blazepose", "pose_weights": "no/such"}, "no/such"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, wrong, words):
    write_video(tmp_path / "clip.mp4", draw_motion("right", 0, 0, 16, 64))
    for name, (_, data) in {
        "short": next(iter(layouts.coco(layouts.people(9, 1, "coco17")).items())),
        "metres": next(iter(layouts.msr(layouts.people(16, 1, "msr20")).items())),
    }.items():
        (tmp_path / name).write_bytes(data)
    given = {"video": str(tmp_path / "clip.mp4"), "out": str(tmp_path / "out")} | wrong
    if wrong.get("pose") in ("short", "metres"):
        given["pose"] = str(tmp_path / wrong["pose"])
    with pytest.raises(ValueError, match=words):
        visualize.main(visualize.Config(**given))


def test_a_flag_that_draws_nothing_is_known():
    flags = lambda **given: flags_of("visualize").unused(visualize.Config(**given)).keys()
    assert flags(flow="dis") == {"skeleton", "pose_weights"}
    assert flags(pose="blazepose") == {"skeleton"} and flags(pose="a.json") == {"pose_weights"}
