"""The synthetic dataset: what it promises about splits, reversal, flow, captions and files."""

import csv
import hashlib
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import av
import numpy as np
import pytest

from pretrain.data import synthetic
from pretrain.data.drawing import Part, draw
from pretrain.data.figure import make_person, make_pose, rotation
from pretrain.data.synthetic import (
    ACTIONS,
    JOINTS,
    REVERSED_PAIRS,
    ClipSpec,
    clip_specs,
    make_dataset,
    render,
)

SMALL = {"size": 32, "frames": 8, "fps": 8, "progress": False}


def _digest(spec):
    clip = render(spec, size=32, frames=6, fps=8)
    whole = b"".join(a.tobytes() for a in (clip.frames, clip.flow, clip.joints, clip.camera))
    return hashlib.sha256(whole + repr(clip.captions).encode()).hexdigest()


def _hashes(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_clip_is_a_function_of_its_spec_in_any_process():
    specs = clip_specs(3, 4)
    here = [_digest(s) for s in specs]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(_digest, specs)) == here
    assert len(set(here)) == 4
    assert _digest(replace(specs[0], seed=specs[0].seed + 1)) != here[0]


def test_dataset_is_balanced_and_shares_no_person():
    specs = clip_specs(0, 640)
    assert specs == clip_specs(0, 640) and specs != clip_specs(1, 640)
    counts = [sum(s.action == a for s in specs) for a in ACTIONS]
    assert sum(counts) == 640 and max(counts) - min(counts) <= 1
    splits = ("train", "val", "test", "compose")
    people = {k: {s.person for s in specs if s.split == k} for k in splits}
    assert not people["train"] & people["val"]
    assert not people["train"] & people["test"]
    assert not people["val"] & people["test"]
    assert not {s.person for s in specs} & {s.person for s in clip_specs(1, 640)}
    shares = {k: sum(s.split == k for s in specs) / 640 for k in people}
    expected = {"train": 0.55, "val": 0.10, "test": 0.25, "compose": 0.10}
    assert shares == pytest.approx(expected, abs=0.04)
    assert len({s.seed for s in specs}) == 640


@pytest.mark.parametrize(("seed", "num_clips"), [(0, 900), (3, 90), (1, 3600)])
def test_compose_shows_known_people_and_places_in_actions_new_to_them(seed, num_clips):
    specs = clip_specs(seed, num_clips)
    train = [s for s in specs if s.split == "train"]
    compose = [s for s in specs if s.split == "compose"]
    assert {s.action for s in compose} == set(ACTIONS)
    assert not {(s.person, s.action) for s in compose} & {(s.person, s.action) for s in train}
    assert not {(s.place, s.action) for s in compose} & {(s.place, s.action) for s in train}
    if num_clips >= 900:
        assert {s.person for s in compose} <= {s.person for s in train}
        assert {s.place for s in compose} <= {s.place for s in train}


@pytest.mark.parametrize("num_clips", [3 * len(ACTIONS), 100, 640])
def test_every_action_is_in_every_split(num_clips):
    specs = clip_specs(5, num_clips)
    assert len(specs) == num_clips
    splits = 4 if num_clips >= 5 * len(ACTIONS) else 3
    assert len({(s.action, s.split) for s in specs}) == splits * len(ACTIONS)


def test_dataset_refuses_nonsense():
    with pytest.raises(ValueError, match="num_clips"):
        clip_specs(0, 0)
    with pytest.raises(ValueError, match="num_clips"):
        clip_specs(-1, 3)
    with pytest.raises(ValueError, match="moonwalk"):
        render(ClipSpec("moonwalk", 0, 0, 0, "train"))
    with pytest.raises(ValueError, match="even"):
        render(clip_specs(0, 1)[0], size=33)


# ----------------------------------------------------------------------------- motion


def test_bones_keep_their_length():
    for i, action in enumerate(ACTIONS):
        joints = make_pose(action, make_person(i), 10 + i, 16, 8, 1).joints
        at = dict(zip(JOINTS, np.moveaxis(joints, 1, 0), strict=True))
        for a, b in (("elbow", "wrist"), ("shoulder", "elbow"), ("hip", "knee"), ("knee", "ankle")):
            for side in ("left", "right"):
                length = np.linalg.norm(at[f"{side}_{a}"] - at[f"{side}_{b}"], axis=1)
                assert np.ptp(length) < 1e-9, (action, side, a)
        speed = np.linalg.norm(np.diff(joints, axis=0), axis=-1) * 8
        assert speed.max() < 8, (action, speed.max())  # metres a second: nothing teleports


@pytest.mark.parametrize(("first", "second"), REVERSED_PAIRS)
def test_reversed_pair_holds_the_same_frames_in_another_order(first, second):
    for seed in range(3):
        one = render(ClipSpec(first, 7, seed, seed, "train"), size=32, frames=12, fps=8)
        two = render(ClipSpec(second, 7, seed, seed, "train"), size=32, frames=12, fps=8)
        assert np.array_equal(one.joints, two.joints[::-1])
        assert np.array_equal(one.camera, two.camera[::-1])
        assert np.array_equal(one.frames, two.frames[::-1])
        moved = np.abs(one.joints - two.joints).max()
        assert moved > 0.15, "forwards and backwards look alike"


def test_a_single_pose_does_not_tell_a_reversed_pair_apart():
    """A nearest-neighbour classifier of single poses does no better than chance."""
    person, rng = make_person(1), np.random.default_rng(0)
    for first, second in REVERSED_PAIRS:
        poses, labels, ends = [], [], []
        for seed in range(240):
            action = (first, second)[seed % 2]
            joints = make_pose(action, person, seed, 16, 8, 1).joints
            poses.append(joints[rng.integers(16)].ravel())
            ends.append(np.concatenate([joints[0].ravel(), joints[-1].ravel()]))
            labels.append(seed % 2)
        poses, ends, labels = np.array(poses), np.array(ends), np.array(labels)
        for seen, low, high in ((poses, 0.3, 0.68), (ends, 0.0, 1.0)):
            far = np.linalg.norm(seen[:120, None] - seen[None, 120:], axis=-1)
            right = np.mean(labels[120:][far.argmin(1)] == labels[:120])
            assert low <= right <= high, (first, right)
        if first in ("sit_down", "pick_up"):  # ... while first and last pose together do tell
            assert right > 0.8, (first, right)


# ----------------------------------------------------------------------------- flow and joints


def _warp(image, flow):
    """Reads `image` (H, W, 3) at pixel + flow, bilinear; also which pixels stay inside."""
    size = image.shape[0]
    v, u = np.mgrid[:size, :size].astype(float)
    u, v = u + flow[0], v + flow[1]
    inside = (u >= 0) & (u <= size - 1) & (v >= 0) & (v <= size - 1)
    u, v = np.clip(u, 0, size - 1.001), np.clip(v, 0, size - 1.001)
    i, j = v.astype(int), u.astype(int)
    a, b = (v - i)[..., None], (u - j)[..., None]
    top = image[i, j] * (1 - b) + image[i, j + 1] * b
    return top * (1 - a) + (image[i + 1, j] * (1 - b) + image[i + 1, j + 1] * b) * a, inside


def test_flow_carries_each_frame_to_the_next():
    errors = {"flow": [], "zero": [], "negated": []}
    for i, action in enumerate(("sit_down", "jog", "walk", "wave", "pick_up", "open")):
        clip = render(ClipSpec(action, i, i, 40 + i, "train"), size=64, frames=12, fps=12)
        assert clip.flow.shape == (11, 2, 64, 64) and clip.flow.dtype == np.float16
        frames = clip.frames.astype(float)
        for t in range(11):
            flow = clip.flow[t].astype(float)
            moving = np.hypot(*flow) > 1.0
            for name, used in (("flow", flow), ("zero", 0 * flow), ("negated", -flow)):
                back, inside = _warp(frames[t + 1], used)
                errors[name].append(np.abs(back - frames[t]).mean(-1)[moving & inside])
    mean = {k: np.concatenate(v).mean() for k, v in errors.items()}
    assert len(np.concatenate(errors["flow"])) > 2000
    assert mean["flow"] < 0.5 * mean["zero"], mean
    assert mean["flow"] < 0.4 * mean["negated"], mean
    median = {k: np.median(np.concatenate(v)) for k, v in errors.items()}
    assert median["flow"] < 0.3 * median["zero"], median


def test_flow_of_a_turning_ball_under_a_zooming_camera_is_the_closed_form():
    angle, radius, size = 0.2, 1.0, 48
    still = np.zeros((2, 3))
    turn = rotation(1, np.array([0.0, angle]))
    camera = np.array([[20.0, 23.5, 23.5], [22.0, 24.0, 22.5]])
    ball = Part("ellipsoid", still, turn, (radius,) * 3, ((200, 0, 0), (0, 0, 200)), "ball")
    backdrop = np.zeros((2, size, size, 3), np.float32)
    frames, flow = draw([ball], np.eye(3), camera, backdrop, size)
    v, u = np.mgrid[:size, :size].astype(float)
    x, y = (u - 23.5) / 20, (v - 23.5) / 20
    on_ball = x * x + y * y < 0.97
    z = -np.sqrt(np.where(on_ball, 1 - x * x - y * y, 0))
    there_u = np.where(on_ball, x * np.cos(angle) + z * np.sin(angle), x) * 22 + 24.0
    there_v = y * 22 + 22.5
    sure = on_ball | (x * x + y * y > 1.03)
    assert np.abs(flow[0, 0] - (there_u - u))[sure].max() < 1e-3
    assert np.abs(flow[0, 1] - (there_v - v))[sure].max() < 1e-3
    assert frames[0, 24, 24].sum() > 0 and frames[0, 0, 0].sum() == 0


def test_depth_decides_who_is_seen():
    camera = np.tile([10.0, 15.5, 15.5], (2, 1))
    turn = np.broadcast_to(np.eye(3), (2, 3, 3))
    for near in (0, 1):
        parts = [
            Part("box", np.tile([0.0, 0, z], (2, 1)), turn, (1.0, 1, 0.1), (colour,))
            for z, colour in ((-near, (255, 0, 0)), (-1 + near, (0, 255, 0)))
        ]
        frames, _ = draw(parts, np.eye(3), camera, np.zeros((2, 32, 32, 3), np.float32), 32)
        assert frames[0, 16, 16].argmax() == (0 if near else 1)


def test_joints_project_to_where_the_flow_goes():
    gaps, moves = [], []
    for i, action in enumerate(("sit_down", "jog", "jump", "pick_up", "walk")):
        clip = render(ClipSpec(action, i, i, 80 + i, "train"), size=64, frames=16, fps=16)
        assert clip.joints.shape == (16, len(JOINTS), 3) and clip.joints.dtype == np.float32
        seen = clip.joints[..., :2] * clip.camera[:, None, :1] + clip.camera[:, None, 1:]
        at = np.round(seen[:-1]).astype(int)
        step = np.diff(seen, axis=0)
        t, j = np.nonzero(((at >= 0) & (at < 64)).all(-1) & (np.linalg.norm(step, axis=-1) > 1))
        flow = clip.flow[t, :, at[t, j, 1], at[t, j, 0]]
        gaps.append(np.linalg.norm(flow - step[t, j], axis=-1))
        moves.append(np.linalg.norm(step[t, j], axis=-1))
    gaps, moves = np.concatenate(gaps), np.concatenate(moves)
    # Some joints are hidden, and a joint lies inside the limb whose surface is seen: hence the
    # median.
    assert len(gaps) > 100 and np.median(gaps) < 0.2 * np.median(moves)


# ----------------------------------------------------------------------------- captions


def test_captions_have_several_wordings_and_lack_nothing():
    for action in ACTIONS:
        assert len(set(synthetic.VERBS[action])) >= 6
        seen = set()
        for seed in range(12):
            spec = ClipSpec(action, seed, seed, seed, "train")
            captions = synthetic.write_captions(spec, make_person(seed))
            assert len(set(captions)) == 3
            seen |= set(captions)
        assert len(seen) > 20
        assert sum(any(verb in c for c in seen) for verb in synthetic.VERBS[action]) >= 6
        for caption in seen:
            assert caption and not re.search(r"[{}]|None|  |\ba [aeiou]", caption), caption
    verbs = [v for verbs in synthetic.VERBS.values() for v in verbs]
    assert len(verbs) == len(set(verbs)), "two actions share a wording"


# ----------------------------------------------------------------------------- files


def test_make_dataset_writes_what_it_says(tmp_path):
    num = 3 * len(ACTIONS)  # the least that has every split
    listing = make_dataset(tmp_path / "w", num_clips=num, workers=1, **SMALL)
    assert listing == tmp_path / "w" / "clips.csv"
    with open(listing, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["path", "label", "class_text", "caption", "split", "subject", "flow", "joints"]
    assert list(rows[0]) == [*columns, "flow_method", "skeleton"]
    assert len(rows) == 3 * num and len({r["path"] for r in rows}) == num
    assert all(value for row in rows for value in row.values())
    specs = clip_specs(0, num)
    for spec, row in zip(specs, rows[::3], strict=True):
        assert row["label"] == spec.action and row["split"] == spec.split
        assert row["subject"] == f"person-{spec.person:010d}"
    for i, row in list(enumerate(rows[::3]))[::9]:
        clip = render(specs[i], 32, 8, 8)
        with np.load(listing.parent / row["flow"], allow_pickle=False) as stored:
            assert np.array_equal(stored["flow"], clip.flow)
            assert np.array_equal(stored["camera"], clip.camera)
        joints = np.load(listing.parent / row["joints"], allow_pickle=False)
        assert np.array_equal(joints, clip.joints)
        with av.open(str(listing.parent / row["path"])) as container:
            stream = container.streams[0]
            assert len(container.streams) == 1 and stream.codec.name == "h264"
            assert stream.average_rate == 8 and not stream.codec_context.has_b_frames
            decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert np.abs(np.stack(decoded).astype(float) - clip.frames).mean() < 16


def test_keyframe_every_sixteen_frames():
    data = synthetic.encode_video(render(clip_specs(0, 1)[0], 32, 40, 16).frames, 16)
    with av.open(synthetic.io.BytesIO(data)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    assert [i for i, p in enumerate(packets) if p.is_keyframe] == [0, 16, 32]
    assert [p.pts for p in packets] == [p.dts for p in packets]  # no B-frames


def test_bytes_do_not_depend_on_workers(tmp_path):
    make_dataset(tmp_path / "one", num_clips=9, workers=1, **SMALL)
    make_dataset(tmp_path / "two", num_clips=9, workers=2, **SMALL)
    one = _hashes(tmp_path / "one")
    assert one == _hashes(tmp_path / "two")
    assert len(one) == 9 * 3 + 2


def test_interrupted_make_is_finished(tmp_path, monkeypatch):
    make_dataset(tmp_path / "whole", num_clips=6, workers=1, **SMALL)
    whole, encode, made = _hashes(tmp_path / "whole"), synthetic.encode_video, []

    def fails_at_the_fourth(frames, fps):
        made.append(1)
        if len(made) == 4:
            raise KeyboardInterrupt
        return encode(frames, fps)

    monkeypatch.setattr(synthetic, "encode_video", fails_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        make_dataset(tmp_path / "cut", num_clips=6, workers=1, **SMALL)
    assert not (tmp_path / "cut" / "clips.csv").exists()
    (tmp_path / "cut" / "clips" / "tmp-00004.mp4").write_bytes(b"half")
    make_dataset(tmp_path / "cut", num_clips=6, workers=1, **SMALL)
    assert len(made) == 4 + 3, "finished clips are kept, the rest is made"
    assert _hashes(tmp_path / "cut") == whole


def test_finished_dataset_is_returned_and_another_refused(tmp_path, monkeypatch):
    out = tmp_path / "w"
    listing = make_dataset(out, num_clips=4, workers=1, **SMALL)
    before = _hashes(out)
    monkeypatch.setattr(synthetic, "render", lambda *_: pytest.fail("rendered again"))
    assert make_dataset(out, num_clips=4, workers=1, **SMALL) == listing
    with pytest.raises(ValueError, match=r"num_clips 4 instead of 5.*another folder"):
        make_dataset(out, num_clips=5, workers=1, **SMALL)
    with pytest.raises(ValueError, match="seed 0 instead of 1"):
        make_dataset(out, num_clips=4, seed=1, workers=1, **SMALL)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "holiday.mp4").write_bytes(b"dear to me")
    with pytest.raises(ValueError, match=r"no synthetic\.json"):
        make_dataset(mine, num_clips=4, workers=1, **SMALL)
    assert _hashes(out) == before and len(list(mine.iterdir())) == 1


def test_a_folder_with_a_hostile_description_is_refused_in_words(tmp_path):
    (tmp_path / "synthetic.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        make_dataset(tmp_path, num_clips=18)
