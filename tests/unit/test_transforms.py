"""Augmentations: the same for every frame, a function of the generator alone."""

import numpy as np
import pytest
import torch

from pretrain.data.transforms import Augment


def clip_of(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, 4, 6, 8), np.uint8))


def test_every_frame_gets_the_same():
    still = clip_of()[:, :1].expand(3, 5, 6, 8)
    for seed in range(8):
        out = Augment(True, 0.5)(still, np.random.default_rng(seed))
        assert out.dtype == torch.uint8 and out.shape == still.shape
        assert (out == out[:, :1]).all()


def test_half_of_the_clips_are_mirrored():
    clip, mirrored = clip_of(), 0
    for seed in range(100):
        out = Augment(flip=True)(clip, np.random.default_rng(seed))
        assert torch.equal(out, clip) or torch.equal(out, clip.flip(-1))
        mirrored += torch.equal(out, clip.flip(-1))
    assert 35 < mirrored < 65


def test_colour_is_one_affine_map_of_each_channel():
    clip = clip_of()
    out = Augment(colour=0.4)(clip, np.random.default_rng(3))
    for before, after in zip(clip, out, strict=True):
        x, y = before.flatten().double(), after.flatten().double()
        inside = (y > 0) & (y < 255)
        slope, offset = np.polyfit(x[inside], y[inside], 1)
        assert 0.3 < slope < 2
        assert (x[inside] * slope + offset - y[inside]).abs().max() < 1.1
    assert torch.equal(Augment()(clip, np.random.default_rng(3)), clip)
    again = Augment(colour=0.4)(clip, np.random.default_rng(3))
    assert torch.equal(out, again) and not torch.equal(out, clip)


def test_a_strength_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"colour 1\.5"):
        Augment(colour=1.5)
