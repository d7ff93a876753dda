"""Skeletons over a clip."""

import sys

import numpy as np
import pytest
from PIL import Image

from downstream.skeletons import SIDES, draw_poses
from pretrain.data.poses import SKELETONS
from recipes import visualize
from tests.conftest import draw_motion, write_video
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


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "--backbone"),
        ({"pose": "there/is/none.json"}, "none.json"),
        ({"pose": "short"}, "16"),
        ({"pose": "metres"}, "metres"),
        ({"pose": "short", "video": ""}, "--video"),
        ({"pose": "blazepose", "pose_weights": "no/such"}, "pip install"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, monkeypatch, wrong, words):
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)  # as where it is not installed
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
