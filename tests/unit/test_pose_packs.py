"""Packs of recordings of poses without videos, and of such beside videos."""

import csv
import hashlib
import json
import tarfile

import numpy as np
import pytest

from pretrain.data import blazepose
from pretrain.data.guard import Refused
from pretrain.data.ingest import ingest
from pretrain.data.pack import pack
from pretrain.data.poses import read_array
from pretrain.data.shards import EvalClips, Pack, TrainClips
from pretrain.spec import InputSpec, Joints, Stream
from tests.unit import layouts
from tests.unit.media import write_video

SPEC = InputSpec(8, 1, 64, {"pose": Joints("msr20", 20, 3, 1)})


def listed(folder, rows):
    """A list of rows of one set of columns."""
    path = folder / "list.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def recordings(folder, num=4, frames=12):
    """So many files of MSR Action3D's layout, and a list of them."""
    rows = []
    for i in range(num):
        ((_, data),) = layouts.msr(layouts.people(frames + i, 1, "msr20", i)).items()
        (folder / f"a{i}.txt").write_bytes(data)
        rows.append({"pose": f"a{i}.txt", "label": f"act{i % 2}", "split": "train", "subject": "s"})
    return listed(folder, rows)


def packed(source, out, **settings):
    pack(source, out, progress=False, workers=1, **settings)
    return Pack(out)


def test_a_list_of_poses_alone_is_packed_and_read(tmp_path):
    data = packed(recordings(tmp_path), tmp_path / "pack")
    assert (
        data.streams == ("pose",) and len(data) == 4 and data.index["classes"] == ["act0", "act1"]
    )
    for record in data.records():
        number = int(record["source"][1])
        pose = layouts.people(12 + number, 1, "msr20", number)
        assert record["frames"] == 12 + number and record["fps"] == 30
        assert record["label"] == f"act{number % 2}" and record["subject"] == "s"
        found = data.poses(record, np.arange(record["frames"])).numpy()
        np.testing.assert_allclose(found, pose[..., [0, 1, 2, 5]], atol=1e-5)
    clips = EvalClips(data, np.arange(4), SPEC, 1, 1)
    assert clips[0][1]["pose"].shape == (1, 4, 8, 1, 20)
    train = TrainClips(data, np.arange(4), SPEC, 0, 1, None, lambda *_: {"x": clips[0][1]["pose"]})
    assert train[0]["pose"].shape == (1, 4, 8, 1, 20) and not train[0]["errors"]


def test_a_shard_holds_what_the_index_says(tmp_path):
    data = packed(recordings(tmp_path, 2), tmp_path / "pack")
    (shard,) = (tmp_path / "pack").glob("*.tar")
    with tarfile.open(shard) as tar:
        names = tar.getnames()
        assert sorted(n.partition(".")[2] for n in names) == ["json"] * 2 + ["pose.npy"] * 2
        for record in data.records():
            member = tar.extractfile(f"{record['key']}.pose.npy").read()
            assert member == data.read(record, "pose") == data.read(record)
            assert read_array(member).shape == (record["frames"], 1, 20, 4)
            about = json.load(tar.extractfile(f"{record['key']}.json"))
            assert about["main"] == "pose" and about["streams"]["pose"]["skeleton"] == "msr20"


def test_packing_again_reads_only_what_has_changed(tmp_path):
    source, out = recordings(tmp_path), tmp_path / "pack"
    index = pack(source, out, progress=False, workers=1)
    assert pack(source, out, progress=False, workers=1) == index
    ((_, data),) = layouts.msr(layouts.people(20, 1, "msr20", 9)).items()
    (tmp_path / "a1.txt").write_bytes(data)
    lines = len((out / ".pack" / "journal.jsonl").read_text().splitlines())
    again = packed(source, out)
    assert sorted(r["frames"] for r in again.records()) == [12, 14, 15, 20]
    assert len((out / ".pack" / "journal.jsonl").read_text().splitlines()) == lines
    assert again.index != index


def test_frames_a_second_are_of_the_list_and_long_recordings_are_cut(tmp_path):
    ((_, data),) = layouts.utkinect(layouts.people(100, 1, "kinect20")).items()
    (tmp_path / "a.txt").write_bytes(data)
    for fps, shape in (("10", [(50, 10)] * 2), ("", [(100, 30)])):
        rows = [{"pose": "a.txt", "fps": fps}]
        data = packed(listed(tmp_path, rows), tmp_path / f"pack{fps}", clip_seconds=5)
        assert [(r["frames"], r["fps"]) for r in data.records()] == shape
    given = (str(tmp_path / "a.txt"), None, "pose", str(tmp_path / "a"), 256, 5.0)
    (clip,) = ingest(*given, fps="120")
    assert (clip["frames"], clip["fps"]) == (50, 60)  # every second one
    for fps in ("quick", "-1", "0", "nan", "1e9"):
        with pytest.raises(Refused):
            ingest(*given, fps=fps)


def test_folders_of_a_file_a_frame_and_files_that_need_their_skeletons_name(tmp_path):
    pose = layouts.people(6, 2, "openpose25")
    (tmp_path / "jumps").mkdir()
    for name, data in layouts.openpose(pose).items():
        (tmp_path / "jumps" / name).write_bytes(data)
    ((_, data),) = layouts.numpy(layouts.people(5, 1, "kinect25")).items()
    (tmp_path / "b.npy").write_bytes(data)
    rows = [
        {"pose": "jumps/", "skeleton": "", "label": "jump"},
        {"pose": "b.npy", "skeleton": "kinect25", "label": "walk"},
    ]
    data = packed(listed(tmp_path, rows), tmp_path / "pack")
    by = {r["label"]: r for r in data.records()}
    assert by["jump"]["streams"]["pose"]["people"] == 2 and by["jump"]["frames"] == 6
    assert by["jump"]["width"] == int(np.ceil(pose[..., 3].max())) + 1
    assert by["walk"]["streams"]["pose"]["skeleton"] == "kinect25"
    # One frame more in the folder is another recording.
    (name, more), *_ = layouts.openpose(pose[:1], start=6).items()
    (tmp_path / "jumps" / name).write_bytes(more)
    data = packed(tmp_path / "list.csv", tmp_path / "pack")
    assert {r["label"]: r["frames"] for r in data.records()} == {"jump": 7, "walk": 5}


def test_files_that_are_no_poses_are_refused_with_their_reason(tmp_path):
    source = recordings(tmp_path)
    (tmp_path / "a2.txt").write_bytes(b"1 2 3 4\n5 6")
    data = packed(source, tmp_path / "pack")
    assert len(data) == 3 and data.index["num_refused"] == 1
    (line,) = (tmp_path / "pack" / "refused.jsonl").read_text().splitlines()
    assert json.loads(line)["source"] == "a2.txt" and "cut off" in json.loads(line)["reason"]
    (tmp_path / "a3.txt").unlink()
    with pytest.raises(ValueError) as caught:
        pack(source, tmp_path / "pack", progress=False)
    assert "a3.txt" in str(caught.value.__notes__)


def test_a_backbone_of_colours_is_refused_by_name(tmp_path):
    data = packed(recordings(tmp_path), tmp_path / "pack")
    colours = InputSpec(8, 1, 64, {"rgb": Stream()})
    with pytest.raises(ValueError, match="no rgb"):
        EvalClips(data, np.arange(4), colours, 1, 1)
    other = InputSpec(8, 1, 64, {"pose": Joints("kinect25", 25, 3, 1)})
    with pytest.raises(ValueError, match="msr20"):
        EvalClips(data, np.arange(4), other, 1, 1)
    flat = InputSpec(8, 1, 64, {"pose": Joints("msr20", 20, 2, 1)})
    with pytest.raises(ValueError, match="u, v"):
        EvalClips(data, np.arange(4), flat, 1, 1)


def test_videos_with_poses_and_poses_alone_in_one_list(tmp_path):
    write_video(tmp_path / "v.mp4", 12, size=(64, 64))
    recordings(tmp_path, 2, frames=12)
    rows = [
        {"path": "v.mp4", "pose": "a0.txt", "label": "both"},
        {"path": "", "pose": "a1.txt", "label": "pose"},
    ]
    data = packed(listed(tmp_path, rows), tmp_path / "pack")
    assert data.streams == ("rgb", "pose") and len(data) == 2
    assert EvalClips(data, np.arange(2), SPEC, 1, 1)[1][1]["pose"].any()
    colours = InputSpec(8, 1, 64, {"rgb": Stream()})
    (video,) = (i for i, r in enumerate(data.records()) if r["label"] == "both")
    assert EvalClips(data, np.array([video]), colours, 1, 1)[0][1]["rgb"].any()
    with pytest.raises(ValueError, match="poses alone"):
        EvalClips(data, np.arange(2), colours, 1, 1)


def test_a_line_that_claims_another_place_is_damaged(tmp_path):
    packed(recordings(tmp_path, 1), tmp_path / "pack")
    lines = (tmp_path / "pack" / "clips.jsonl").read_text()
    index = json.loads((tmp_path / "pack" / "index.json").read_text())
    for old, new in (
        ('"main": "pose"', '"main": "flow"'),
        ('"offset": 512', '"offset": 600'),
        ('"pose": {"offset": 512, ', '"pose": {'),
    ):
        changed = lines.replace(old, new, 1)
        (tmp_path / "pack" / "clips.jsonl").write_text(changed)
        index["clips_sha256"] = hashlib.sha256(changed.encode()).hexdigest()
        (tmp_path / "pack" / "index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"main|offset"):
            Pack(tmp_path / "pack")


def test_without_litert_torch_runs_blazepose_whose_weights_are_wanted_first(tmp_path, monkeypatch):
    def fetch(folder):
        raise ValueError("no network here")

    monkeypatch.setattr(blazepose, "find_spec", lambda name: None)
    monkeypatch.setattr(blazepose, "InTorch", lambda folder: ("torch", folder))
    assert blazepose.load_networks(tmp_path) == ("torch", tmp_path)
    monkeypatch.setattr(blazepose, "fetch_wheel", fetch)
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))
    write_video(tmp_path / "v.mp4", 12, size=(64, 64))
    with pytest.raises(ValueError, match="no network here"):
        pack(tmp_path / "v.mp4", tmp_path / "pack", pose="blazepose", progress=False, workers=1)
    assert not list((tmp_path / "pack").glob("*.tar"))  # nothing was decoded for it
