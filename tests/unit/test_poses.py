"""Skeletons and what is done to poses."""

import numpy as np
import pytest

from pretrain.data.figure import JOINTS
from pretrain.data.poses import (
    SKELETONS,
    Poses,
    clip_poses,
    crop_pose,
    mirror_pose,
    pose_member,
    read_array,
)

UV = ("u", "v", "confidence")
ALL = ("x", "y", "z", "u", "v", "confidence")


@pytest.mark.parametrize("name", SKELETONS)
def test_a_skeleton_hangs_together_and_is_alike_on_both_sides(name):
    skeleton = SKELETONS[name]
    num = len(skeleton.joints)
    assert name.endswith(str(num)) and len(set(skeleton.joints)) == num
    reached = {skeleton.root}
    for _ in range(num):
        reached |= {end for bone in skeleton.bones if reached & set(bone) for end in bone}
    assert reached == set(range(num))
    swap = dict(skeleton.pairs) | {right: left for left, right in skeleton.pairs}
    bones = {frozenset(bone) for bone in skeleton.bones}
    assert len(bones) == len(skeleton.bones)
    assert {frozenset(swap.get(i, i) for i in bone) for bone in bones} == bones
    assert all("right" in skeleton.joints[right] for _, right in skeleton.pairs)
    assert len(swap) == sum("left" in j or "right" in j for j in skeleton.joints)


def test_the_synthetic_datasets_joints_are_in_its_order():
    assert SKELETONS["synthetic20"].joints == JOINTS


def some(columns, joints=20, seed=0):
    values = np.random.default_rng(seed).uniform(1, 90, (4, 2, joints, len(columns)))
    values[0, 1] = values[2, 0, 3] = 0
    return values.astype(np.float32)


@pytest.mark.parametrize("columns", [UV, ALL, ("x", "y", "z", "confidence")])
def test_twice_mirrored_is_as_before_and_absent_joints_stay_zero(columns):
    values = some(columns)
    once = mirror_pose(values, columns, "kinect20", 100)
    np.testing.assert_allclose(
        mirror_pose(once, columns, "kinect20", 100), values, rtol=0, atol=2e-5
    )
    assert not np.array_equal(once, values)
    assert (once[0, 1] == 0).all() and (once == 0).sum() == (values == 0).sum()


def test_a_mirror_puts_the_left_wrist_where_the_right_one_was():
    values = some(ALL)
    left, right = (SKELETONS["kinect20"].joints.index(f"{s}_wrist") for s in ("left", "right"))
    once = mirror_pose(values, ALL, "kinect20", 100)
    x, y, z, u, v, c = values[1, 0, right]
    np.testing.assert_allclose(once[1, 0, left], (-x, y, z, 100 - u, v, c), rtol=1e-6)


def test_a_crop_shifts_and_scales_pixels_and_leaves_metres():
    values = some(ALL)
    out = crop_pose(values, ALL, (10, 20, 50, 40), (100, 20))
    seen = values[..., -1] > 0
    np.testing.assert_allclose(out[..., 3][seen], ((values[..., 3] - 10) * 2)[seen], rtol=1e-5)
    np.testing.assert_allclose(
        out[..., 4][seen], ((values[..., 4] - 20) / 2)[seen], rtol=1e-5, atol=1e-5
    )
    assert (out[~seen] == 0).all()
    np.testing.assert_array_equal(out[..., [0, 1, 2, 5]], values[..., [0, 1, 2, 5]])


def test_crop_and_mirror_agree_with_pixels():
    """A bright pixel in a picture that is cropped and mirrored is where the joint says."""
    picture = np.zeros((30, 40))
    picture[12, 17] = 1
    pose = np.array([[[17.5, 12.5, 1]]], np.float32)
    cropped = picture[4:24, 8:32][:, ::-1]
    out = crop_pose(pose, UV, (8, 4, 24, 20), (24, 20))
    u = 24 - out[0, 0, 0]  # a single joint has no pair to swap
    assert cropped[int(out[0, 0, 1]), int(u)] == 1 and u == 24 - 9.5


def test_a_part_of_a_video_has_its_frames_and_its_pixels():
    values = some(ALL)
    poses = Poses(values, ALL, "kinect20", None, ("a", "b"))
    second = clip_poses(poses, range(2, 4), 4, (200, 100), (100, 50))
    np.testing.assert_allclose(second[..., 3:5], values[2:, ..., 3:5] / 2, rtol=1e-5)
    np.testing.assert_array_equal(second[..., :3], values[2:, ..., :3])
    fractions = Poses(values, ALL, "kinect20", None, ("a", "b"), (1, 1))
    out = clip_poses(fractions, range(2, 4), 4, (200, 100), (100, 50))
    np.testing.assert_allclose(out[..., 3], values[2:, ..., 3] * 100, rtol=1e-5)
    with pytest.raises(ValueError, match="4 frames"):
        clip_poses(poses, range(2), 5, (200, 100), (100, 50))


def test_of_a_clips_people_the_most_seen_comes_first_and_who_is_nowhere_goes():
    values = some(ALL)
    values[1:, 0, :, -1] *= 0.1  # the second is seen more
    data, about = pose_member(np.concatenate([values, values[:, :1] * 0], 1), ALL, "kinect20")
    np.testing.assert_array_equal(read_array(data), values[:, ::-1])
    assert about == {
        "skeleton": "kinect20",
        "columns": list(ALL),
        "people": 2,
        "joints": 20,
    }
    data, about = pose_member(values * 0, ALL, "kinect20")
    assert read_array(data).shape == (4, 1, 20, 6) and about["people"] == 1
