"""The streams of a clip are one: after any crop, mirror and resize, rgb, flow and joints agree."""

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.pack import pack
from pretrain.data.poses import SKELETONS
from pretrain.data.shards import EvalClips, Pack, TrainClips, crop_clip
from pretrain.data.synthetic import make_dataset
from pretrain.data.transforms import Augment, mirror
from pretrain.spec import InputSpec, Joints, Stream, flow_stream
from tests.unit.media import write_video

SIZE = 40
FLAT = Joints("synthetic20", 20, coordinates=2, people=1)


def quick(source: Path, out: Path, **more) -> Pack:
    pack(source, out, workers=1, progress=False, **more)
    return Pack(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of a synthetic dataset of six clips of 18 frames."""
    out = tmp_path_factory.mktemp("streams") / "dataset"
    make_dataset(out, num_clips=6, frames=18, workers=1, progress=False)
    return out


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory) -> Pack:
    return quick(folder / "clips.csv", tmp_path_factory.mktemp("streams") / "pack")


def spec_of(joints: Joints, size: int = SIZE, stride: int = 1) -> InputSpec:
    # A bound that nothing exceeds, however much a crop is enlarged.
    streams = {"rgb": Stream(), "flow": flow_stream(size, bound=60.0), "pose": joints}
    return InputSpec(6, stride, size, streams)


# ---- the property


@pytest.fixture(scope="module")
def drifting(tmp_path_factory) -> Pack:
    """A clip all of whose pixels move alike, each frame otherwise, and two people with them."""
    folder = tmp_path_factory.mktemp("drifting")
    rng = np.random.default_rng(0)
    write_video(folder / "a.mp4", 8, size=(96, 64))
    steps = rng.uniform(-3, 3, (7, 2))
    start = rng.uniform(20, 44, (1, 2, 20, 2))
    joints = start + np.concatenate([np.zeros((1, 2)), np.cumsum(steps, 0)])[:, None, None]
    np.save(folder / "a.npy", joints.astype(np.float32))
    flow = np.broadcast_to(steps[:, :, None, None], (7, 2, 64, 96)).astype(np.float32)
    np.savez(folder / "a.npz", flow=flow)
    table = "path,label,flow,pose,skeleton\na.mp4,x,a.npz,a.npy,synthetic20\n"
    (folder / "list.csv").write_text(table)
    return quick(folder / "list.csv", folder / "pack")


@settings(max_examples=40)
@given(
    left=st.integers(0, 60),
    top=st.integers(0, 40),
    width=st.integers(4, 96),
    height=st.integers(4, 64),
    size=st.integers(8, 80),
    mirrored=st.booleans(),
)
def test_joints_move_as_flow_says(drifting, left, top, width, height, size, mirrored):
    """Whatever is cut out, enlarged and mirrored, up to the two quantisations."""
    box = (left, top, min(width, 96 - left), min(height, 64 - top))
    bound = 6.5 * size / min(box[2:])
    joints = Joints("synthetic20", 20, coordinates=2, people=2)
    spec = InputSpec(8, 1, size, {"flow": flow_stream(size, bound=bound), "pose": joints})
    record = drifting.record(0)
    clip = crop_clip(drifting.clip(record, np.arange(8), spec), record, box, spec)
    if mirrored:
        clip = mirror(clip, spec)
    motion = spec.streams["flow"].normalise(clip["flow"][None])[0] * bound
    assert (motion - motion[..., :1, :1]).abs().max() < 1e-4  # everything moves alike
    u, v, seen = clip["pose"]
    assert (seen == 1).all()
    scale = size / np.array(box[2:])
    stored = record["streams"]["flow"]["bound"]
    for axis, where in enumerate((u, v)):
        moved = where[1:] - where[:-1]
        allowed = stored / 127 / 2 * scale[axis] + bound / 127 / 2 + 1e-3
        assert (moved - motion[axis, :-1, :1, 0:1]).abs().max() <= allowed


def test_the_synthetic_dataset_agrees_after_any_augmentation(packed):
    """Flow at the pixel of a joint is the joint's motion, and at another place it is not."""
    spec = spec_of(FLAT)
    clips = TrainClips(
        packed, np.arange(6), spec, 0, 2, None, lambda *_: {}, Augment(flip=True, colour=0.3)
    )
    gaps: dict[str, list] = {"flow": [], "zero": [], "turned": []}
    for position in range(18):
        item = clips[position]
        for levels, (u, v, seen) in zip(item["flow"], item["pose"], strict=True):
            motion = spec.streams["flow"].normalise(levels[None])[0] * 60
            column, row = u[:-1].floor().long(), v[:-1].floor().long()
            inside = (column >= 0) & (column < SIZE) & (row >= 0) & (row < SIZE) & (seen[:-1] > 0)
            t = torch.arange(5)[:, None, None].expand_as(column)
            there = motion[:, t[inside], row[inside], column[inside]]
            step = torch.stack([(x[1:] - x[:-1])[inside] for x in (u, v)])
            fast = step.norm(dim=0) > 2
            for name, used in (("flow", there), ("zero", 0 * there), ("turned", there * -1)):
                gaps[name].append((used - step).norm(dim=0)[fast])
    median = {name: torch.cat(values).median().item() for name, values in gaps.items()}
    assert len(torch.cat(gaps["flow"])) > 300
    # Some joints are hidden, and a joint lies inside the limb that is seen: hence the median.
    assert median["flow"] < 0.6 and median["flow"] < 0.25 * median["zero"], median
    assert median["flow"] < 0.25 * median["turned"], median


def test_a_mirror_swaps_left_and_right(packed):
    pairs = SKELETONS["synthetic20"].pairs
    record = packed.record(0)
    for coordinates in (2, 3):
        spec = InputSpec(4, 1, SIZE, {"pose": Joints("synthetic20", 20, coordinates)})
        whole = packed.clip(record, np.arange(4), spec)
        before = crop_clip(whole, record, (0, 0, 64, 64), spec)
        after = mirror(before, spec)
        left, right = pairs[0]
        other = SIZE - before["pose"][0] if coordinates == 2 else -before["pose"][0]
        assert torch.allclose(after["pose"][0, ..., left], other[..., right])
        assert torch.equal(after["pose"][1:, ..., right], before["pose"][1:, ..., left])
        assert torch.allclose(mirror(after, spec)["pose"], before["pose"], atol=1e-5)


def test_metres_do_not_know_of_a_crop(packed):
    spec = InputSpec(4, 1, SIZE, {"pose": Joints("synthetic20", 20, 3, people=2)})
    record = packed.record(0)
    whole = packed.clip(record, np.arange(4), spec)
    one = crop_clip(whole, record, (0, 0, 64, 64), spec)["pose"]
    assert torch.equal(one, crop_clip(whole, record, (9, 5, 30, 20), spec)["pose"])
    assert one.shape == (4, 4, 2, 20) and not one[:, :, 1].any()  # nobody is the second person


# ---- packed


def test_the_joints_of_the_synthetic_dataset_are_kept(folder, packed):
    about = packed.index["streams"]["pose"]
    assert about["num_clips"] == 6 and list(about["skeletons"]) == ["synthetic20"]
    assert len(about["skeletons"]["synthetic20"]["bones"]) == 19
    for record in packed.records():
        number = Path(record["source"]).stem
        true = np.load(folder / "joints" / f"{number}.npy")
        with np.load(folder / "flow" / f"{number}.npz") as stored:
            camera = stored["camera"]
        entry = record["streams"]["pose"]
        assert entry["columns"] == ["x", "y", "z", "u", "v", "confidence"]
        values = packed.poses(record, np.arange(18)).numpy()[:, 0]
        assert np.array_equal(values[..., :3], true) and (values[..., 5] == 1).all()
        where = true[..., :2] * camera[:, None, :1] + camera[:, None, 1:] + 0.5
        assert np.abs(values[..., 3:5] - where).max() < 1e-3


def landmarks(frames: int) -> bytes:
    """MediaPipe's, of somebody who is not there in the first frame."""
    point = {"x": 0.25, "y": 0.5, "z": 0.0, "visibility": 0.9}
    return json.dumps([None, *[[point] * 33] * (frames - 1)]).encode()


def test_members_of_a_tar_are_poses_of_the_size_the_frames_have(tmp_path):
    write_video(tmp_path / "a.mp4", 6, size=(96, 64))
    pixels = np.zeros((6, 17, 3), np.float32) + np.array([48, 16, 1], np.float32)
    np.save(array := io.BytesIO(), pixels)
    members = {"1.pose.json": landmarks(6), "2.pose.npy": array.getvalue(), "2.json": b"{}"}
    members["2.json"] = b'{"skeleton": "coco17"}'
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in ("1.mp4", "2.mp4"):
            tar.add(tmp_path / "a.mp4", name)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    packed = quick(tmp_path / "t.tar", tmp_path / "out", short_side=32)  # half as large
    for record in packed.records():
        entry = record["streams"]["pose"]
        values = packed.poses(record, np.arange(6)).numpy()[:, 0]
        u, v, seen = (values[..., entry["columns"].index(c)] for c in ("u", "v", "confidence"))
        if entry["skeleton"] == "coco17":
            assert (u == 24).all() and (v == 8).all() and (seen == 1).all()
        else:
            assert entry["skeleton"] == "blazepose33" and not values[0].any()
            assert np.allclose(u[1:], 12) and np.allclose(v[1:], 16) and (seen[1:] > 0).all()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.json", landmarks(5), "5 frames of poses"),
        ("a.json", b"[1, 2", ""),
        ("a.npy", b"\x93NUMPY" + bytes(100), "damaged header"),
        ("a.npy", b"", ""),
    ],
)
def test_poses_that_cannot_be_are_in_the_ledger(tmp_path, name, data, words):
    write_video(tmp_path / "a.mp4", 6, size=(96, 64))
    (tmp_path / name).write_bytes(data)
    (tmp_path / "list.csv").write_text(f"path,label,pose\na.mp4,x,{name}\n")
    packed = quick(tmp_path / "list.csv", tmp_path / "out")
    assert len(packed) == 1 and packed.streams == ("rgb",)
    (line,) = map(json.loads, (tmp_path / "out" / "refused.jsonl").read_text().splitlines())
    assert (line["source"], line["stream"]) == ("a.mp4", "pose") and words in line["reason"]
    assert "died" not in line["reason"]


def test_a_folder_of_openpose_files_is_the_poses_of_a_video(tmp_path):
    write_video(tmp_path / "a.mp4", 3, size=(96, 64))
    (tmp_path / "poses").mkdir()
    for t in range(3):
        joints = [x for j in range(25) for x in (10.0 + t + j, 20.0 + j, 0.5)]
        people = [{"pose_keypoints_2d": joints}] * (t != 1)
        content = {"version": 1.3, "people": people}
        (tmp_path / "poses" / f"a_{t:012d}_keypoints.json").write_text(json.dumps(content))
    (tmp_path / "list.csv").write_text("path,label,pose\na.mp4,x,poses/\n")
    packed = quick(tmp_path / "list.csv", tmp_path / "out")
    entry = packed.record(0)["streams"]["pose"]
    assert (entry["skeleton"], entry["joints"]) == ("openpose25", 25)
    values = packed.poses(packed.record(0), np.arange(3)).numpy()
    assert not values[1].any() and np.allclose(values[2, 0, :, 0], 12 + np.arange(25))


# ---- refused


@pytest.mark.parametrize(
    ("joints", "words"),
    [
        (Joints("coco17", 17, 2), "'coco17'.*'synthetic20'"),
        (Joints("synthetic20", 19, 2), "takes 19"),
    ],
)
def test_joints_of_another_skeleton_are_refused(packed, joints, words):
    with pytest.raises(ValueError, match=words):
        EvalClips(packed, np.arange(2), spec_of(joints), 1, 1)


def test_joints_without_depth_are_refused_where_metres_are_taken(drifting):
    with pytest.raises(ValueError, match="x, y, z"):
        EvalClips(drifting, np.arange(1), spec_of(Joints("synthetic20", 20, 3)), 1, 1)


def test_a_pack_without_poses_says_how_to_get_them(tmp_path):
    write_video(tmp_path / "a.mp4", 12, size=(96, 64))
    packed = quick(tmp_path / "a.mp4", tmp_path / "out")
    with pytest.raises(ValueError, match=r"no pose.*--pose blazepose"):
        EvalClips(packed, np.arange(1), InputSpec(4, 1, 16, {"pose": FLAT}), 1, 1)


def test_the_most_seen_people_come_first(tmp_path):
    write_video(tmp_path / "a.mp4", 6, size=(96, 64))
    values = np.zeros((6, 2, 17, 3), np.float32)
    values[0, 0] = (10, 10, 1)  # the first one, in one frame only
    values[2:, 1] = (30, 30, 1)
    np.save(tmp_path / "a.npy", values)
    table = "path,label,pose,skeleton\na.mp4,x,a.npy,coco17\n"
    (tmp_path / "list.csv").write_text(table)
    packed = quick(tmp_path / "list.csv", tmp_path / "out")
    spec = InputSpec(6, 1, 64, {"pose": Joints("coco17", 17, 2, people=1)})
    pose = EvalClips(packed, np.arange(1), spec, 1, 1)[0][1]["pose"][0]
    assert pose[2].sum() == 4 * 17


def test_a_stream_without_a_place_is_damaged(packed, tmp_path):
    """It crashed with a KeyError; found by fuzzing."""
    shutil.copytree(packed.folder, tmp_path / "pack")
    lines = [
        json.loads(line) for line in (tmp_path / "pack" / "clips.jsonl").read_text().splitlines()
    ]
    del lines[0]["streams"]["flow"]["offset"]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    index = json.loads((tmp_path / "pack" / "index.json").read_text())
    index["clips_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "pack" / "clips.jsonl").write_text(text)
    (tmp_path / "pack" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="offset"):
        Pack(tmp_path / "pack")
