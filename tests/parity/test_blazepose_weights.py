"""BlazePose's own networks on clips whose joints are known: those of the synthetic dataset."""

import numpy as np
import pytest

from pretrain.data.blazepose import LiteRT, estimate_poses, find_weights, load_networks
from pretrain.data.cache import cache_folder
from pretrain.data.poses import COLUMNS, SKELETONS, mirror_pose
from pretrain.data.synthetic import clip_specs, render

pytestmark = pytest.mark.weights
FPS, SIZE = 16, 256


@pytest.fixture(scope="module")
def networks():
    pytest.importorskip("ai_edge_litert")
    return LiteRT(find_weights("", cache_folder()))


@pytest.fixture(scope="module")
def clips():
    specs = {spec.action: spec for spec in clip_specs(0, 18)}
    return [render(specs[a], SIZE, 16, FPS) for a in ("close", "nod", "take_off", "shake_head")]


def truth(clip):
    """Pixels (T, J, 2) of the joints that both skeletons have, and their numbers in BlazePose's."""
    ours, theirs = (SKELETONS[name].joints for name in ("synthetic20", "blazepose33"))
    both = [name for name in ours if name in theirs]
    pixels = clip.joints[..., :2] * clip.camera[:, None, :1] + clip.camera[:, None, 1:] + 0.5
    return pixels[:, [ours.index(n) for n in both]], [theirs.index(n) for n in both]


def distance(values, clip, shift=0.0):
    """Mean distance of joints from where they are, as a part of the person's height."""
    pixels, which = truth(clip)
    there = values[..., -1].any(-1)
    apart = np.hypot(*np.moveaxis(values[:, which, 3:5] - pixels - (shift, 0), -1, 0))
    return apart[there].mean() / np.ptp(pixels[..., 1])


def test_joints_are_found_where_they_are(networks, clips):
    for clip in clips:
        values, names = estimate_poses(clip.frames, FPS, networks)
        assert len(names) == 1 and values[..., -1].any(-1).mean() > 0.9
        assert distance(values[:, 0], clip) < 0.08
        # Metres: the thigh is as long as it is, and the hips' centre is the origin.
        left = {n: SKELETONS["blazepose33"].joints.index(f"left_{n}") for n in ("hip", "knee")}
        there = values[:, 0, 0, -1] > 0
        thigh = np.linalg.norm(
            values[there, 0, left["hip"], :3] - values[there, 0, left["knee"], :3], axis=-1
        )
        assert 0.25 < thigh.mean() < 0.55


def test_two_people_are_two(networks, clips):
    beside = np.concatenate([clips[0].frames, clips[2].frames], 2)
    values, names = estimate_poses(beside, FPS, networks)
    assert len(names) == 2 and (values[..., -1].any(-1).mean(0) > 0.8).all()
    order = np.argsort(values[..., 3].mean((0, 2)))
    assert distance(values[:, order[0]], clips[0]) < 0.08
    assert distance(values[:, order[1]], clips[2], SIZE) < 0.08


def test_what_a_mirror_shows_is_mirrored(networks, clips):
    for clip in clips[::2]:
        one, two = (
            estimate_poses(frames, FPS, networks)[0]
            for frames in (clip.frames, np.ascontiguousarray(clip.frames[:, :, ::-1]))
        )
        back = mirror_pose(two, COLUMNS, "blazepose33", SIZE)
        both = (one[..., -1] > 0.5) & (back[..., -1] > 0.5)
        assert both.mean() > 0.5
        apart = np.hypot(*np.moveaxis(one[..., 3:5] - back[..., 3:5], -1, 0))[both]
        assert np.median(apart) < 0.02 * SIZE, np.median(apart)


def test_where_nobody_is_nobody_is_found(networks):
    noise = np.random.default_rng(0).integers(0, 255, (6, SIZE, SIZE, 3), dtype=np.uint8)
    grey = np.full((6, SIZE, SIZE, 3), 128, np.uint8)
    for frames in (noise, grey):
        assert not estimate_poses(frames, FPS, networks)[0].any()


class Both:
    """LiteRT, whose answers are compared with torch's on every picture that it is shown."""

    def __init__(self, first, second):
        self.first, self.second, self.apart = first, second, []

    def detect(self, picture):
        found, other = self.first.detect(picture), self.second.detect(picture)
        np.testing.assert_allclose(other[0], found[0], atol=0.01)
        np.testing.assert_allclose(other[1], found[1], atol=0.01)
        return found

    def landmarks(self, picture):
        found, other = self.first.landmarks(picture), self.second.landmarks(picture)
        self.apart.append(np.abs(other[0][:, :2] - found[0][:, :2]).max())
        np.testing.assert_allclose(other[1], found[1], atol=1e-3)
        np.testing.assert_allclose(other[2], found[2], atol=1e-3)
        return found


def test_torch_finds_what_litert_finds(networks, clips):
    """In every picture; from frame to frame a hundredth of a pixel may lead elsewhere."""
    both = Both(networks, load_networks(find_weights("", cache_folder()), in_torch=True))
    for clip in clips:
        estimate_poses(clip.frames, FPS, both)
    assert len(both.apart) > 50 and max(both.apart) < 0.05, max(both.apart)
