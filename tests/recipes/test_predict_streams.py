"""Prediction by classifiers that take more than frames."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from downstream.classifier import Classifier
from downstream.models import build_model
from pretrain.backbones import export_backbone
from pretrain.data.pack import pack
from recipes import predict
from tests.conftest import draw_motion, write_video
from tests.recipes.runs import configure


def config(folder: Path, model: str, **arguments) -> predict.Config:
    """Two files, of which one is a single picture, and a classifier."""
    (folder / "videos").mkdir()
    motion = draw_motion("right", 0, 0, 16, 32)
    write_video(folder / "videos" / "clip.mp4", motion)
    write_video(folder / "videos" / "one.mp4", motion[:1])
    classifier = Classifier(build_model(model, True, **arguments), ["a", "b"])
    export_backbone(classifier, folder / "backbone", {})
    where, videos, out = (str(folder / name) for name in ("backbone", "videos", "out"))
    return configure(predict.Config, where, (videos,), out=out, num_workers=0)


def with_poses(config: predict.Config, folder: Path, frames: int) -> predict.Config:
    """The same of a list with poses of so many frames of the first file."""
    np.save(folder / "poses.npy", np.ones((frames, 1, 20, 4), np.float32))
    text = "path,pose,skeleton\nvideos/clip.mp4,poses.npy,kinect20\n"
    (folder / "list.csv").write_text(text)
    return dataclasses.replace(config, video=(str(folder / "list.csv"),))


def refused(folder: Path) -> dict:
    return json.loads((folder / "out" / "refused.json").read_text())


def test_a_file_without_flow_is_named_and_the_others_predicted(tmp_path):
    pytest.importorskip("cv2")
    answers = predict.main(config(tmp_path, "i3d_flow", width=0.1, frames=8, size=32))
    assert list(answers) == ["clip.mp4"]
    assert list(refused(tmp_path)) == ["one.mp4"] and "flow" in refused(tmp_path)["one.mp4"]


def test_a_classifier_of_poses_reads_those_of_a_list(tmp_path):
    about = config(tmp_path, "skeleton_lstm", skeleton="kinect20", frames=8)
    with pytest.raises(ValueError, match=r"column.* pose") as refusal:
        predict.main(about)
    assert "/pack" not in str(refusal.value)  # a folder that is gone by then
    assert list(predict.main(with_poses(about, tmp_path, 16))) == ["videos/clip.mp4"]


def test_a_stream_that_is_not_taken_is_no_reason_to_refuse(tmp_path):
    about = config(tmp_path, "i3d", width=0.1, frames=8, size=32)
    assert list(predict.main(with_poses(about, tmp_path, 3))) == ["videos/clip.mp4"]
    assert not refused(tmp_path)


def test_a_pack_is_predicted_as_its_list(tmp_path):
    about = with_poses(
        config(tmp_path, "skeleton_lstm", skeleton="kinect20", frames=8), tmp_path, 16
    )
    answers = predict.main(about)
    pack(tmp_path / "list.csv", tmp_path / "pack", workers=1, progress=False)
    packed = predict.main(dataclasses.replace(about, video=(str(tmp_path / "pack"),)))
    assert list(packed) == list(answers) == ["videos/clip.mp4"]
    ours, theirs = (
        [entry["probability"] for entry in a["videos/clip.mp4"]] for a in (answers, packed)
    )
    assert np.allclose(ours, theirs)


def test_poses_of_another_skeleton_are_refused_by_name(tmp_path):
    about = with_poses(config(tmp_path, "skeleton_lstm", skeleton="msr20", frames=8), tmp_path, 16)
    with pytest.raises(ValueError, match="kinect20"):
        predict.main(about)


def test_each_video_is_seen_at_the_stride_of_its_own_rate(monkeypatch, capsys):
    """Whatever is given beside it: 25, 50 and 25 frames a second; the weights learned from 25."""
    monkeypatch.setattr(predict, "trained_rate", lambda _: 25.0)
    three = SimpleNamespace(
        rates=lambda: np.array([25.0, 50.0, 25.0]), record=lambda i: {"source": f"{i}.mp4"}
    )
    given = configure(predict.Config, "backbone", ("a", "b", "c"))
    parts = predict.by_stride(given, 2, [(three, np.arange(3))])
    assert [(n, ids.tolist()) for n, _, ids in parts] == [(2, [0, 2]), (4, [1])]
    assert "stride 4 instead of 2 in 1 video" in capsys.readouterr().out
    given = dataclasses.replace(given, stride=3)
    assert [n for n, *_ in predict.by_stride(given, 3, [(three, np.arange(3))])] == [3]
