"""Poses from pictures: all around the two networks, with networks of our own in their place."""

import hashlib
import http.server
import os
import threading
import zipfile

import numpy as np
import pytest
import torch
from scipy import ndimage

from downstream.detect import list_videos, opened
from pretrain.data import blazepose
from pretrain.data.blazepose import (
    DETECT_SIDE,
    LANDMARK_SIDE,
    SHA256,
    WHEEL,
    decode_people,
    estimate_poses,
    find_joints,
    find_weights,
    letterbox,
    read_weights,
    smoothed,
)
from pretrain.data.poses import COLUMNS
from pretrain.spec import InputSpec, Joints
from tests.conftest import write_video

NUM = 2254


# ---- what the detector's numbers mean


def raw_of(centre, points, anchor, score, raw=None, scores=None):
    """The detector's output for a person, at one of its anchors."""
    raw = np.zeros((NUM, 12), np.float32) if raw is None else raw
    scores = np.full(NUM, -100, np.float32) if scores is None else scores
    at = blazepose.anchors()[anchor] * DETECT_SIDE
    raw[anchor, :2], raw[anchor, 2:4] = np.array(centre) - at, (40, 40)
    raw[anchor, 4:8] = (np.array(points) - at).ravel()
    scores[anchor] = score
    return raw, scores


def nearest(point, number=0):
    far = np.abs(blazepose.anchors() * DETECT_SIDE - point).sum(1)
    return int(np.argsort(far, kind="stable")[number])


def test_there_are_as_many_anchors_as_the_network_has_outputs():
    grid = blazepose.anchors()
    assert grid.shape == (NUM, 2) and grid.min() > 0 and grid.max() < 1
    np.testing.assert_allclose(grid[:3] * 224, [[4, 4], [4, 4], [12, 4]])
    np.testing.assert_allclose(grid[28 * 28 * 2] * 224, [8, 8])
    np.testing.assert_allclose(grid[-1] * 224, [208, 208])


def test_a_detection_is_read_relative_to_its_anchor():
    raw, scores = raw_of((100, 60), ((101, 90), (101, 50)), nearest((100, 60)), 2.0)
    (found,) = decode_people(raw, scores)
    np.testing.assert_allclose(found, [(101, 90), (101, 50)], atol=1e-4)
    assert decode_people(raw, np.full(NUM, -1, np.float32)) == []


def test_detections_of_one_person_are_averaged_and_others_are_others():
    raw, scores = raw_of((100, 60), ((100, 90), (100, 50)), nearest((100, 60)), 0.5)
    raw, scores = raw_of((104, 60), ((104, 90), (104, 50)), nearest((100, 60), 3), 0.5, raw, scores)
    raw, scores = raw_of((190, 60), ((190, 90), (190, 50)), nearest((190, 60)), 3.0, raw, scores)
    far, both = decode_people(raw, scores)  # the surest first
    np.testing.assert_allclose(far[0], (190, 90), atol=1e-4)
    np.testing.assert_allclose(both[0], (102, 90), atol=1e-4)


@pytest.mark.parametrize("shape", [(144, 180), (256, 256), (300, 100), (8, 500)])
def test_a_frame_lies_in_the_middle_of_the_input(shape):
    frame = np.zeros((*shape, 3), np.uint8)
    frame[: shape[0] // 2, shape[1] // 2 :] = 255  # the upper right quarter
    picture, scale, start = letterbox(frame)
    assert picture.shape == (224, 224, 3) and picture.min() == -1 and picture.max() == 1
    rows, columns = np.nonzero(picture[..., 0] > 0)
    bright = np.array([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]])
    back = (bright - start) / scale
    np.testing.assert_allclose(back, [(shape[1] / 2, 0), (shape[1], shape[0] / 2)], atol=2 / scale)


# ---- people drawn as discs, and networks that see these


class Discs:
    """Networks that take every bright disc for somebody, whose joints are around its centre."""

    def __init__(self):
        self.detections = 0

    def detect(self, picture):
        self.detections += 1
        bright = picture[..., 0] > 0.5
        raw, scores = np.zeros((NUM, 12), np.float32), np.full(NUM, -100, np.float32)
        for x, y, count in blobs(bright):
            if count > 8:
                reach = 2.5 * np.sqrt(count)
                raw_of((x, y), ((x, y), (x, y - reach)), nearest((x, y)), 3.0, raw, scores)
        return raw, scores

    def landmarks(self, picture):
        there = blobs(picture[..., 0] > 0.5)
        middle = LANDMARK_SIDE / 2
        landmarks, world = np.zeros((39, 5), np.float32), np.zeros((39, 3), np.float32)
        if not there:
            return landmarks, 0.0, world
        x, y, count = min(there, key=lambda blob: abs(blob[0] - middle) + abs(blob[1] - middle))
        if count < 300:
            return landmarks, 0.1, world
        radius = np.sqrt(count / np.pi)
        angle = np.arange(33) * 2 * np.pi / 33
        ring = np.stack([np.cos(angle), np.sin(angle)], 1)
        landmarks[:33, :2] = (x, y) + ring * radius
        landmarks[33:35, :2] = (x, y), (x, y - 2.5 * np.sqrt(count))
        landmarks[:, 3] = 3
        world[:33, :2] = ring
        return landmarks, 0.9, world


def blobs(bright):
    """Centre and size of each connected bright spot."""
    marks, num = ndimage.label(bright)
    spots = [np.nonzero(marks == i + 1) for i in range(num)]
    return [(x.mean() + 0.5, y.mean() + 0.5, len(x)) for y, x in spots]


def scene(*people, frames=20, size=(120, 240)):
    """Frames with discs whose centres are functions of the frame's number, or None."""
    out = np.full((frames, *size, 3), 20, np.uint8)
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    for t in range(frames):
        for at in people:
            if (centre := at(t)) is not None:
                out[t][np.hypot(x - centre[0], y - centre[1]) < 7] = 255
    return out


def middles(values):
    """(T, P, 2) centres in pixels, NaN where nobody is."""
    there = values[..., -1].any(-1)
    return np.where(there[..., None], values[..., 3:5].mean(2), np.nan)


@pytest.mark.parametrize("turn", [0, 0.4, np.pi / 2, -2.0])
def test_joints_are_where_they_are_in_the_frame_however_the_region_is_turned(turn):
    frame = scene(lambda t: (90, 60), frames=1)[0]
    up = np.array([np.sin(turn), -np.cos(turn)])
    person = find_joints(frame, np.stack([np.array([85.0, 62]), (85, 62) + 45 * up]), Discs())
    np.testing.assert_allclose(person.joints[:, 3:5].mean(0), (90, 60), atol=0.5)
    np.testing.assert_allclose(person.points[0], (90, 60), atol=0.5)
    # The first joint is to the right of the disc in the region; so it is, turned, in the frame.
    right = np.array([np.cos(turn), np.sin(turn)])
    np.testing.assert_allclose(person.joints[0, :2], right, atol=1e-6)
    np.testing.assert_allclose((person.joints[0, 3:5] - (90, 60)) / 7, right, atol=0.15)
    assert person.joints[:, 5] == pytest.approx(1 / (1 + np.exp(-3)))


def test_somebody_who_walks_is_one_person_and_is_detected_now_and_then():
    nets = Discs()
    values, names = estimate_poses(scene(lambda t: (30 + 5 * t, 60)), 25, nets, smooth=False)
    assert values.shape == (20, 1, 33, len(COLUMNS)) and values.dtype == np.float32
    assert len(names) == 1
    path = middles(values)[:, 0]
    np.testing.assert_allclose(path, [(30 + 5 * t, 60) for t in range(20)], atol=0.5)
    assert nets.detections == 4  # at every fifth frame


def test_two_people_who_pass_each_other_stay_who_they_are():
    frames = scene(lambda t: (30 + 9 * t, 40), lambda t: (210 - 9 * t, 90))
    values, names = estimate_poses(frames, 25, Discs(), smooth=False)
    assert len(names) == 2
    seen = middles(values)
    there = ~np.isnan(seen[..., 0])
    assert there.all()
    np.testing.assert_allclose(seen[:, :, 1], np.broadcast_to((40, 90), (20, 2)), atol=0.5)


def test_where_nobody_is_there_is_a_mask_and_a_short_gap_keeps_the_identity():
    frames = scene(lambda t: None if 8 <= t < 13 or t < 2 else (30 + 3 * t, 60))
    values, names = estimate_poses(frames, 25, Discs())
    there = values[:, 0, :, -1].any(-1)
    assert len(names) == 1
    assert there.tolist() == [not (8 <= t < 13 or t < 2) for t in range(20)]
    assert not values[~there].any()


def test_nobody_at_all_and_frames_of_any_size():
    for size in ((2, 300), (40, 40), (1, 1)):
        values, names = estimate_poses(scene(frames=3, size=size), 25, Discs())
        assert values.shape == (3, 1, 33, 6) and not values.any() and names == ("",)


def test_of_many_people_four_are_kept():
    people = [lambda t, i=i: (20 + 28 * i, 60) for i in range(8)]
    values, names = estimate_poses(scene(*people, frames=6), 25, Discs())
    assert values.shape[1] == len(names) == 4


def test_a_network_that_answers_nonsense_sees_nobody():
    class Mad(Discs):
        def landmarks(self, picture):
            landmarks, _, world = super().landmarks(picture)
            return landmarks * np.nan, 1.0, world

    values, _ = estimate_poses(scene(lambda t: (60, 60), frames=3), 25, Mad())
    assert not values.any()


def test_poses_of_a_raw_video_are_those_of_its_parts(monkeypatch, tmp_path):
    """Streamed, they are what packing estimates of each clip, in the crop that a model sees."""
    monkeypatch.setattr("downstream.detect.PART_SECONDS", 1.0)
    monkeypatch.setattr("downstream.detect.load_networks", lambda _: Discs())
    monkeypatch.setattr("pretrain.data.methods.pose_weights", lambda: tmp_path)
    frames = scene(lambda t: (70 + 2 * t, 60), lambda t: (200, 60) if t < 30 else None, frames=40)
    write_video(tmp_path / "a.mp4", frames, 16)
    (video,), _ = list_videos((str(tmp_path / "a.mp4"),))
    joints = Joints("blazepose33", 33, 2, 2)
    with opened(video, InputSpec(8, 1, 112, {"pose": joints})) as stream:
        parts = [chunk["pose"] for chunk in stream.chunks]
    assert [part.shape[1] for part in parts] == [13, 13, 14] and not stream.reason()
    pose = torch.cat(parts, 1).numpy()  # (3, T, P, J)
    seen = pose[2].any(-1)
    assert seen[:, 0].all() and seen[:30, 1].sum() > 20 and not seen[32:, 1].any()
    at = pose[:2].mean(-1)  # the centre of the crop, 120 of 240 pixels wide
    where = np.where(seen.T, np.array([at[0].T, at[1].T]), np.nan)
    scale = 112 / 120
    x = np.nanmin(where[0], 0)  # the one on the left
    np.testing.assert_allclose(x[14:26], (70 + 2 * np.arange(14, 26) - 60) * scale, atol=2)
    np.testing.assert_allclose(where[1][seen.T], 60 * scale, atol=1)


# ---- smoothing


def walk(frames=80, joints=33):
    values = np.zeros((frames, joints, 6))
    values[..., 3] = np.linspace(0, 60, joints) + 2.0 * np.arange(frames)[:, None]
    values[..., 4] = np.linspace(0, 100, joints)
    values[..., :3] = np.linspace(0, 1, joints)[:, None]
    values[..., 5] = 0.9
    return values


def test_smoothing_takes_the_noise_and_not_the_motion():
    truth = walk()
    noisy = truth.copy()
    noise = np.random.default_rng(0).normal(0, 1.0, truth[..., 3:5].shape)
    noisy[..., 3:5] += noise
    out = smoothed(noisy, 25)
    error = [np.abs(v[20:, :, 3:5] - truth[20:, :, 3:5]).mean() for v in (noisy, out)]
    jerk = [np.abs(np.diff(v[20:, :, 3:5], 2, axis=0)).mean() for v in (noisy, out)]
    assert error[1] < error[0] and jerk[1] < 0.8 * jerk[0]
    np.testing.assert_array_equal(out[..., 5], noisy[..., 5])
    # Noise of a joint at rest is smoothed away; exact motion is left as it is.
    np.testing.assert_allclose(smoothed(truth, 25)[..., 4], truth[..., 4])
    still = np.abs(out[20:, :, 4] - truth[20:, :, 4]).mean()
    assert still < 0.8 * np.abs(noise[20:, :, 1]).mean()


def test_smoothing_begins_anew_behind_an_absence():
    values = walk(40)
    values[10:20] = 0
    values[20:, :, 3] += 50
    out = smoothed(values, 25)
    assert not out[10:20].any()
    np.testing.assert_array_equal(out[20], values[20])
    np.testing.assert_array_equal(out[0], values[0])


def test_a_flag_turns_smoothing_off():
    rng = np.random.default_rng(0)
    jitter = rng.uniform(-3, 3, (20, 2))
    frames = scene(lambda t: (60 + jitter[t, 0], 60 + jitter[t, 1]))
    raw, smooth = (estimate_poses(frames, 25, Discs(), smooth=s)[0] for s in (False, True))
    speed = [np.abs(np.diff(middles(v)[:, 0], axis=0)).mean() for v in (raw, smooth)]
    assert speed[1] < speed[0]
    np.testing.assert_array_equal(raw[..., 5], smooth[..., 5])


# ---- weights


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A wheel of two files in place of the networks; their hashes count as the published ones."""
    files = {name: name.encode() * 100 for name in SHA256}
    for name, data in files.items():
        monkeypatch.setitem(SHA256, name, hashlib.sha256(data).hexdigest())
    (folder := tmp_path / "index" / "mediapipe").mkdir(parents=True)
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(f"mediapipe/modules/{name}", data)
        wheel.writestr(
            "mediapipe-0.10.21.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: mediapipe\nVersion: 0.10.21\n",
        )
        wheel.writestr("mediapipe-0.10.21.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        wheel.writestr("mediapipe-0.10.21.dist-info/RECORD", "")
    data = (folder / WHEEL).read_bytes()
    (folder / "index.html").write_text(f'<a href="{WHEEL}">{WHEEL}</a>')
    monkeypatch.setattr(blazepose, "WHEEL_SHA256", hashlib.sha256(data).hexdigest())
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return files, folder / WHEEL


@pytest.fixture
def index(fake, monkeypatch, tmp_path):
    """A package index on the loopback, and what was asked of it."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "index")

        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
    yield asked
    server.shutdown()
    server.server_close()


def test_weights_are_fetched_once_and_checked(fake, index, tmp_path):
    files, _ = fake
    folder = find_weights("", tmp_path / "cache")
    assert read_weights(folder) == files and any(WHEEL in path for path in index)
    index.clear()
    assert find_weights("", tmp_path / "cache") == folder and not index


def test_other_weights_on_the_index_are_refused(fake, index, tmp_path):
    with open(fake[1], "ab") as wheel:
        wheel.write(b" ")
    with pytest.raises(ValueError, match="SHA-256"):
        find_weights("", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_without_a_network_a_sentence_says_what_to_do(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="--pose-weights") as caught:
        find_weights("", tmp_path / "cache")
    assert "\n" not in str(caught.value) and "https://" in str(caught.value)


def test_weights_from_a_folder_or_the_wheel(fake, tmp_path):
    files, wheel = fake
    folder = find_weights(str(wheel), tmp_path / "cache")
    assert folder.is_relative_to(tmp_path / "cache") and read_weights(folder) == files
    other = find_weights(str(folder), tmp_path / "other")
    assert other.is_relative_to(tmp_path / "other") and read_weights(other) == files
    (folder / next(iter(files))).write_bytes(b"TFL3 of somebody else")
    for given in (str(folder), ""):
        with pytest.raises(ValueError, match="not run"):
            find_weights(given, tmp_path / "cache")
    with pytest.raises(ValueError, match="not run"):  # before LiteRT is even imported
        blazepose.LiteRT(folder)
    (folder / next(iter(files))).unlink()
    with pytest.raises(ValueError, match="No such file"):
        find_weights(str(folder), tmp_path / "cache")
    with pytest.raises(ValueError, match="SHA-256"):
        find_weights(__file__, tmp_path / "cache")
    with pytest.raises(ValueError, match="cannot be read"):
        find_weights(str(tmp_path / "nothing"), tmp_path / "cache")
