"""Every layout of poses: read back what was written, and whatever may be wrong with a file."""

import io
import json

import numpy as np
import pytest

from pretrain.data.pose_files import read_poses
from pretrain.data.poses import COLUMNS, SKELETONS, read_array, write_array
from recipes.options.visualize import Config
from recipes.visualize import poses_of
from tests.unit import layouts
from tests.unit.layouts import LAYOUTS


def put(folder, files):
    """Writes files and returns what names them together."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder / next(iter(files)) if len(files) == 1 else folder


def read(folder, files, skeleton="", people=4):
    return read_poses(put(folder, files), skeleton, people)


def want(pose, columns):
    return pose[..., [COLUMNS.index(name) for name in columns]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_was_written_is_read(tmp_path, name):
    skeleton, write = LAYOUTS[name]
    one = name in ("msr", "utkinect")
    pose = layouts.people(9, 1 if one else 2, skeleton)
    if name in ("kinect", "coco"):
        pose[..., 5] = np.round(pose[..., 5] * 2) / 2  # seen, inferred or not
    if name == "utkinect":
        pose[..., 5] = 1  # nothing is said
    found = read(tmp_path, write(pose))
    assert found.skeleton == skeleton and len(found.people) == pose.shape[1]
    expected = want(pose, found.columns)
    if found.frame:
        width, height = (640, 480) if name == "mediapipe" else (1, 1)
        for column, scale in (("u", width), ("v", height)):
            expected[..., found.columns.index(column)] /= scale
    assert found.values.dtype == np.float32
    np.testing.assert_allclose(found.values, expected, atol=2e-5, rtol=1e-5)
    # As a pack's member it is the same to the bit.
    np.testing.assert_array_equal(read_array(write_array(found.values)), found.values)


@pytest.mark.parametrize("name", LAYOUTS)
def test_frames_with_nobody_are_zero(tmp_path, name):
    skeleton, write = LAYOUTS[name]
    pose = layouts.people(6, 1, skeleton)
    pose[..., 5] = 1
    pose[2:4] = 0
    found = read(tmp_path, write(pose))
    there = found.values[:, 0].any((-1, -2))
    assert there.tolist() == [True, True, False, False, True, True]
    assert (found.values[2:4] == 0).all() and len(found.people) == 1


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "coco_results"])
def test_nobody_at_all_is_an_empty_clip(tmp_path, name):
    skeleton, write = LAYOUTS[name]
    pose = layouts.people(5, 1, skeleton) * 0
    found = read(tmp_path, write(pose), skeleton)
    assert found.values.shape[:3] == (5, 1, len(SKELETONS[skeleton].joints))
    assert not found.values.any()


@pytest.mark.parametrize("name", ["kinect", "openpose", "coco", "mediapipe"])
def test_those_who_are_seen_most_stay_in_the_order_of_appearance(tmp_path, name):
    skeleton, write = LAYOUTS[name]
    pose = layouts.people(9, 2, skeleton)
    pose[..., 5] = 1
    pose[2:, 0] = 0  # the first is there for two frames
    both = read(tmp_path, write(pose))
    assert both.values[:, 0].any((-1, -2)).sum() == 2
    assert both.values[:, 1].any((-1, -2)).all()
    one = read_poses(put(tmp_path, write(pose)), people=1)
    np.testing.assert_array_equal(one.values[:, 0], both.values[:, 1])
    assert one.people == both.people[1:]


def test_where_nothing_tells_people_apart_their_places_do(tmp_path):
    pose = layouts.people(9, 2, "openpose25")
    files = layouts.openpose(pose)
    for name in list(files)[::2]:  # every other frame lists them the other way round
        content = json.loads(files[name])
        content["people"].reverse()
        files[name] = json.dumps(content).encode()
    found = read(tmp_path, files).values
    first = found[0, 0, :, 0].mean() > found[0, 1, :, 0].mean()
    expected = want(pose, ("u", "v", "confidence"))
    np.testing.assert_allclose(found, expected[:, ::-1] if first else expected, atol=2e-5)


def test_a_joint_that_was_not_seen_is_zero(tmp_path):
    for name in ("openpose", "coco"):
        skeleton, write = LAYOUTS[name]
        pose = layouts.people(3, 1, skeleton)
        pose[1, 0, 4, 5] = 0
        (folder := tmp_path / name).mkdir()
        found = read(folder, write(pose)).values
        assert (found[1, 0, 4] == 0).all() and (found[..., -1] == 0).sum() == 1


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "1e30", "1e999"])
def test_numbers_that_are_none_make_a_joint_unseen(tmp_path, bad):
    pose = layouts.people(4, 1, "msr20")
    (name, data) = next(iter(layouts.msr(pose).items()))
    lines = data.decode().splitlines()
    lines[25] = f"{bad} " + lines[25].split(" ", 1)[1]
    found = read(tmp_path, {name: "\n".join(lines).encode()}).values
    assert (found[1, 0, 5] == 0).all() and np.isfinite(found).all()
    assert (found[..., -1] == 0).sum() == 1


@pytest.mark.parametrize("bad", ["NaN", "-Infinity", "null", "1" + "0" * 400, "1e999"])
def test_json_numbers_that_are_none_make_a_joint_unseen(tmp_path, bad):
    (name, data) = next(iter(layouts.coco(layouts.people(2, 1, "coco17")).items()))
    text = data.decode()
    start = text.index("[", text.index('"keypoints"')) + 1
    text = text[:start] + bad + text[text.index(",", start) :]
    found = read(tmp_path, {name: text.encode()}).values
    assert (found[0, 0, 0] == 0).all() and (found[..., -1] == 0).sum() == 1


def test_frames_that_a_numbering_leaves_out_have_nobody(tmp_path):
    pose = layouts.people(4, 1, "kinect20")
    pose[..., 5] = 1
    found = read(tmp_path, layouts.utkinect(pose, [252, 253, 256, 257])).values
    assert found[:, 0].any((-1, -2)).tolist() == [True, True, False, False, True, True]
    np.testing.assert_allclose(found[4], want(pose, ("x", "y", "z", "confidence"))[2], atol=1e-5)
    (folder := tmp_path / "openpose").mkdir()
    files = layouts.openpose(layouts.people(6, 1, "openpose25"), start=7)
    del files["a_000000000009_keypoints.json"]
    found = read(folder, files).values
    assert found[:, 0].any((-1, -2)).tolist() == [True, True, False, True, True, True]


def test_of_frames_with_one_number_the_first_is_read(tmp_path):
    pose = layouts.people(4, 1, "kinect20")
    found = read(tmp_path, layouts.utkinect(pose, [1, 2, 2, 3])).values
    np.testing.assert_allclose(found[..., :3], pose[[0, 1, 3], :, :, :3], atol=1e-5)
    pose = layouts.people(3, 1, "blazepose33")
    content = json.loads(layouts.mediapipe(pose)["landmarks.json"])
    content["frames"][2]["frame"] = 1
    found = read(tmp_path, {"landmarks.json": json.dumps(content).encode()}).values
    np.testing.assert_allclose(found[..., :3], pose[:2, ..., :3], atol=1e-5)


@pytest.mark.parametrize(
    "lines",
    [
        "{t} {x} {y} {z}",
        "{t} {x} {y} {z} 1",
        "{t} {j} {x} {y} {z}",
        "{t},{j},{x},{y},{z},1",
        "{t};{x};{y};{z}",
    ],
)
@pytest.mark.parametrize("header", ["", "frame joint x y z\n"])
def test_a_line_a_joint(tmp_path, lines, header):
    pose = layouts.people(5, 1, "kinect20")[:, 0]
    text = header + "\n".join(
        lines.format(t=t + 3, j=j + 1, x=-x, y=-y, z=z)
        for t, frame in enumerate(pose)
        for j, (x, y, z) in enumerate(frame[:, :3])
    )
    found = read(tmp_path, {"a.txt": text.encode()}).values
    np.testing.assert_allclose(found[:, 0, :, :3], pose[..., :3], atol=1e-5)
    assert (found[..., 3] == 1).all()


def test_a_joint_that_a_frame_leaves_out_is_unseen(tmp_path):
    text = "\n".join(
        f"{t} {j} 1.5 2.5 3.5" for t in range(4) for j in range(20) if (t, j) != (2, 7)
    )
    found = read(tmp_path, {"a.txt": text.encode()}).values
    assert (found[2, 0, 7] == 0).all() and (found[..., 3] == 0).sum() == 1


def test_shrec_hands_are_known_by_their_number_of_columns(tmp_path):
    rows = np.random.default_rng(0).normal(0, 1, (5, 66))
    found = read(tmp_path, {"skeletons_world.txt": b"\n".join(
        " ".join(f"{n:.6f}" for n in row).encode() for row in rows
    )})  # fmt: skip
    assert found.skeleton == "hand22"
    np.testing.assert_allclose(found.values[:, 0, :, :3].reshape(5, 66), rows, atol=1e-5)


def test_numbers_of_text_that_are_times_are_refused(tmp_path):
    pose = layouts.people(40, 1, "kinect20")
    times = [33 * t for t in range(40)]
    with pytest.raises(ValueError, match="count frames"):
        read(tmp_path, layouts.utkinect(pose, times))


def test_joints_centred_on_the_root_are_seen_there(tmp_path):
    pose = layouts.people(4, 1, "kinect20")
    pose[..., :3] -= pose[..., :1, :3]
    pose[..., 5] = 1
    pose[2, 0, 9] = 0
    found = read(tmp_path, layouts.utkinect(pose)).values
    assert (found[..., 3] == 0).sum() == 1 and (found[:, 0, 0, 3] == 1).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_number_of_joints_is_refused(tmp_path, name):
    skeleton, write = LAYOUTS[name]
    pose = layouts.people(5, 1, skeleton)[:, :, :-1]
    with pytest.raises(ValueError, match=r"joint|numbers|lines"):
        read(tmp_path, write(pose))
    other = "coco17" if skeleton != "coco17" else "openpose18"
    with pytest.raises(ValueError, match=r"joint|numbers|lines"):
        read(tmp_path, write(layouts.people(5, 1, skeleton)), other)


def test_a_number_of_joints_that_several_skeletons_have_is_asked_about(tmp_path):
    files = layouts.numpy(layouts.people(5, 1, "kinect25"))
    with pytest.raises(ValueError, match="openpose25"):
        read(tmp_path, files)
    assert read(tmp_path, files, "kinect25").skeleton == "kinect25"
    for more in (files, layouts.utkinect(layouts.people(5, 1, "kinect20"))):
        with pytest.raises(ValueError, match="kinect9"):
            read(tmp_path, more, "kinect9")
    with pytest.raises(ValueError, match="kinect9"):
        read_poses(tmp_path, "kinect9")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_that_is_cut_off_is_refused_and_never_crashes(tmp_path, name):
    skeleton, write = LAYOUTS[name]
    files = write(layouts.people(4, 1, skeleton))
    last, data = list(files.items())[-1]
    for cut in np.linspace(0, len(data) - 30, 23).astype(int):
        path = put(tmp_path, files | {last: data[:cut]})
        try:
            found = read_poses(path)
        except ValueError as error:
            assert "\n" not in str(error)
        else:  # at the end of a frame nothing shows that there were more
            assert name in ("msr", "utkinect") and len(found.values) < 4


def header(kind, frames):
    text = f"{{'descr': {kind}, 'fortran_order': False, 'shape': ({frames}, 33, 4)}}".ljust(118)
    return b"\x93NUMPY\x01\x00\x76\x00" + text.encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n \n",
        bytes(range(256)),
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
        header("'<f4'", 9999999999) + bytes(99),
        header("'<f4'", 2) + bytes(99),
        header("'|O'", 1) + bytes(99),
        b"[" * 100_000,
        b'{"frames":' * 50_000,
        b'{"people": [' + b"[" * 90_000,
        b"[" + b"1" * 5000 + b"]",
        b"[]",
        b"{}",
        b'{"people": 3}',
        b'{"people": [{"pose_keypoints_2d": [1, 2, "x"]}]}',
        b'{"annotations": [{"image_id": 1000000000000, "keypoints": [1, 2, 3]}]}',
        b'[{"image_id": "' + b"9" * 90 + b'", "keypoints": [' + b"1," * 50 + b"1]}]",
        b'[{"image_id": [1], "keypoints": [1, 1, 1]}]',
        b'{"annotations": [{"image_id": 3, "keypoints": [1, 1, 1]}], "images": [{"id": [1]}]}',
        b'{"frames": [{"frame": 1e400, "landmarks": []}]}',
        b'{"frames": [{"frame": 0}, {"frame": 9007199254740990}]}',
        b"999999999\n999999999\n",
        b"9" * 5000 + b"\n1\n",
        b"1\n1\n72 0 0 0 0 0 0 0 0 2\n999999999\n",
        b"1\n1\n\n",
        b'{"annotations": [], "images": [{"id": 1, "width": [1]}, {"id": 2, "width": 3}]}',
        b"1 2 3\n",
        b"1 2 3 4 5\n" * 40,
        b"a b c d\ne f g h\n",
        b"0 0 0 0\n" * 19,
        b"1e300 " * 61 + b"\n",
        b"5 1 1 1\n" * 20 + b"9000000000000000 1 1 1\n" * 20,
        b"nan nan nan nan\n" * 5,
    ],
    ids=range(34),
)
def test_anything_else_is_refused_in_a_sentence(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match=r"x: .{10,}") as caught:
        read_poses(tmp_path / "x")
    assert len(str(caught.value)) < 700


def test_folders_that_are_no_single_video_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such"):
        read_poses(tmp_path / "a" / "b")
    with pytest.raises(ValueError, match="no files"):
        read_poses(tmp_path)
    pose = layouts.people(3, 1, "openpose25")
    put(tmp_path, layouts.openpose(pose) | layouts.openpose(pose[:2], video="b"))
    with pytest.raises(ValueError, match="2 videos"):
        read_poses(tmp_path)
    assert len(read_poses(tmp_path / "a").values) == 3
    assert len(read_poses(tmp_path / "b").values) == 2
    with pytest.raises(ValueError, match="c_"):
        read_poses(tmp_path / "c")
    put(tmp_path, {"b_9" + "0" * 60 + "_keypoints.json": b"{}"})
    with pytest.raises(ValueError, match=r"people|frames"):
        read_poses(tmp_path / "b")


def test_coco_of_several_videos_or_sizes_is_refused(tmp_path):
    content = json.loads(layouts.coco(layouts.people(3, 1, "coco17"))["keypoints.json"])
    for key, value in (("video_id", 7), ("width", 100)):
        changed = json.loads(json.dumps(content))
        changed["images"][1][key] = value
        with pytest.raises(ValueError, match="video"):
            read(tmp_path, {"a.json": json.dumps(changed).encode()})


def test_the_order_of_cocos_images_is_that_of_their_numbers(tmp_path):
    pose = layouts.people(12, 1, "coco17")
    content = json.loads(layouts.coco(pose)["keypoints.json"])
    for row in content["images"]:
        row["id"] = f"frame{row['id']}"
    for row in content["annotations"]:
        row["image_id"] = f"frame{row['image_id']}"
    content["images"].reverse()
    found = read(tmp_path, {"a.json": json.dumps(content).encode()})
    np.testing.assert_allclose(found.values, pose[..., 3:], atol=1e-4)
    assert found.frame == (640, 480)


def test_pixels_that_are_all_below_one_are_fractions(tmp_path):
    pose = layouts.people(4, 1, "openpose25")
    (inside := tmp_path / "inside").mkdir()
    assert read(tmp_path, layouts.openpose(pose)).frame is None
    pose[..., 3:5] /= (640, 480)
    found = read(inside, layouts.openpose(pose))
    assert found.frame == (1, 1)
    np.testing.assert_allclose(found.values, pose[..., 3:], atol=1e-5)


def test_results_without_images_count_from_0_or_1(tmp_path):
    pose = layouts.people(6, 1, "coco17")
    pose[:2] = 0
    rows = json.loads(layouts.coco(pose, images=False)["keypoints.json"])
    found = read(tmp_path, {"a.json": json.dumps(rows).encode()}).values  # 2 to 5: from 1
    assert found.shape[0] == 5 and not found[0].any() and found[1].any()
    for row in rows:
        row["image_id"] = f"{row['image_id']}.jpg"
    again = read(tmp_path, {"a.json": json.dumps(rows).encode()}).values
    np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize(
    "layout",
    [
        lambda frames: frames,
        lambda frames: {"frames": frames},
        lambda frames: {str(t): frame for t, frame in enumerate(frames)},
        lambda frames: [{"landmarks": frame} for frame in frames],
        lambda frames: [{"poseLandmarks": frame, "frame": t} for t, frame in enumerate(frames)],
        lambda frames: [{"pose_landmarks": {"landmark": f} if f else None} for f in frames],
        lambda frames: [{"pose_landmarks": [f] if f else []} for f in frames],
        lambda frames: [[[*p.values()] for p in f] if f else [] for f in frames],
    ],
    ids=range(8),
)
def test_mediapipes_landmarks_as_people_write_them(tmp_path, layout):
    pose = layouts.people(4, 1, "blazepose33")
    frames = [
        [
            {"x": float(u), "y": float(v), "z": 0.1, "visibility": float(c)}
            for u, v, c in joints[:, 3:] / (640, 480, 1)
        ]
        for joints in pose[:, 0]
    ]
    frames[2] = None
    pose[2] = 0
    content = layout(frames)
    found = read(tmp_path, {"a.json": json.dumps(content).encode()})
    assert found.columns == ("u", "v", "confidence") and found.frame == (1, 1)
    np.testing.assert_allclose(found.values, pose[..., 3:] / (640, 480, 1), atol=1e-5)
    if isinstance(content, list) and isinstance(content[0], dict):
        lines = "\n".join(json.dumps(row) for row in content).encode()
        again = read(tmp_path, {"a.jsonl": lines})
        np.testing.assert_array_equal(again.values, found.values)


@pytest.mark.parametrize("kind", ["<f4", ">f8", "<f2", "<i8", "|u1"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 5), (2, 1, 33, 4)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_as_numpy_writes_them(kind, shape, order):
    array = np.asarray(np.random.default_rng(0).integers(0, 99, shape), np.dtype(kind), order=order)
    file = io.BytesIO()
    np.save(file, array)
    np.testing.assert_array_equal(read_array(file.getvalue()), array)


def test_an_array_says_what_is_wrong_with_it():
    good = write_array(np.zeros((2, 3, 4)))
    for data in (good[:-1], good + b"0", good[:40], good.replace(b"<f4", b"|O8")):
        with pytest.raises(ValueError, match="npy"):
            read_array(data)


def test_a_mistyped_method_is_told_from_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"--pose blazpose: .*did you mean blazepose"):
        poses_of(Config(pose="blazpose"))
    (tmp_path / "blazepose.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"--pose .*blazepose.npy") as caught:
        poses_of(Config(pose=str(tmp_path / "blazepose.npy")))
    assert "did you mean" not in str(caught.value)
