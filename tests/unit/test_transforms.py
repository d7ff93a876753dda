"""Augmentations: the same for every frame, a function of the generator alone."""

import numpy as np
import pytest
import torch

from pretrain.data import transforms
from pretrain.data.shards import EvalClips, Pack, TrainClips
from pretrain.data.transforms import Augment
from pretrain.spec import InputSpec

SPEC = InputSpec(4, 1, 8)


def clip_of(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, 4, 6, 8), np.uint8))


def test_every_frame_gets_the_same():
    still = clip_of()[:, :1].expand(3, 5, 6, 8)
    for seed in range(8):
        out = Augment(True, 0.5)({"rgb": still}, np.random.default_rng(seed), SPEC)["rgb"]
        assert out.dtype == torch.uint8 and out.shape == still.shape
        assert (out == out[:, :1]).all()


def test_half_of_the_clips_are_mirrored():
    clip, mirrored = clip_of(), 0
    for seed in range(100):
        out = Augment(flip=True)({"rgb": clip}, np.random.default_rng(seed), SPEC)["rgb"]
        assert torch.equal(out, clip) or torch.equal(out, clip.flip(-1))
        mirrored += torch.equal(out, clip.flip(-1))
    assert 35 < mirrored < 65


def test_colour_is_one_affine_map_of_each_channel():
    clip = clip_of()
    out = Augment(colour=0.4)({"rgb": clip}, np.random.default_rng(3), SPEC)["rgb"]
    for before, after in zip(clip, out, strict=True):
        x, y = before.flatten().double(), after.flatten().double()
        inside = (y > 0) & (y < 255)
        slope, offset = np.polyfit(x[inside], y[inside], 1)
        assert 0.3 < slope < 2
        assert (x[inside] * slope + offset - y[inside]).abs().max() < 1.1
    assert torch.equal(Augment()({"rgb": clip}, np.random.default_rng(3), SPEC)["rgb"], clip)
    again = Augment(colour=0.4)({"rgb": clip}, np.random.default_rng(3), SPEC)["rgb"]
    assert torch.equal(out, again) and not torch.equal(out, clip)


def test_a_strength_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"colour 1\.5"):
        Augment(colour=1.5)


def test_randaugment_comes_before_the_crop(tiny_pack, monkeypatch):
    """As VideoMAE is fine-tuned: what is moved in from outside the crop is picture, and not a grey
    border.
    """
    pack, seen = Pack(tiny_pack), []
    done = transforms.rand_augment
    monkeypatch.setattr(
        transforms, "rand_augment", lambda clip, *a: seen.append(clip.shape) or done(clip, *a)
    )
    augment, spec = Augment(rand_augment="n2-m9"), InputSpec(4, 2, 16)
    labels = lambda *_: {"labels": torch.zeros(())}
    for scales in ((0.5,), None):
        clips = TrainClips(pack, pack.split("train"), spec, 0, 2, scales, labels, augment)
        assert clips[0]["rgb"].shape == (2, 3, 4, 16, 16)
    assert seen == [(3, 4, 32, 32)] * 4


def test_uniform_sampling_reaches_training_and_test(tiny_pack):
    pack, shown = Pack(tiny_pack), []
    ids, spec = pack.split("train"), InputSpec(4, 0, 32)
    labels = lambda rng, record, frames: shown.append(frames) or {"labels": torch.zeros(())}
    clips = TrainClips(pack, ids, spec, 0, 1, (1.0,), labels)
    for place in range(8):
        clips[place]
    assert {tuple(frames // 4) for frames in shown} == {(0, 1, 2, 3)}  # of 16 frames
    first, second = EvalClips(pack, ids, spec, 2, 1)[0][1]["rgb"]
    frames = pack.frames(pack.record(ids[0]), np.arange(16)).permute(3, 0, 1, 2)
    assert torch.equal(first, frames[:, ::4]) and torch.equal(second, frames[:, 2::4])


def test_jittered_colours_are_torchvisions_frame_by_frame():
    """No value leaves what the four changes can reach, every frame has its own, and grey is their
    grey.
    """
    import torchvision.transforms.v2.functional as TF

    still = clip_of()[:, :1].expand(3, 6, 6, 8).contiguous()
    out = Augment(jitter=1.0)({"rgb": still}, np.random.default_rng(0), SPEC)["rgb"]
    assert (
        out.dtype == torch.uint8 and len({bytes(f.numpy().tobytes()) for f in out.unbind(1)}) == 6
    )
    means = [out[:, t].float().mean() / still[:, t].float().mean() for t in range(6)]
    assert min(means) > 0.5 and max(means) < 1.5
    grey = Augment(grey=1.0)({"rgb": clip_of()}, np.random.default_rng(0), SPEC)["rgb"]
    theirs = TF.rgb_to_grayscale(clip_of().transpose(0, 1), 3).transpose(0, 1)
    assert (grey.int() - theirs.int()).abs().max() <= 1 and (grey[0] == grey[2]).all()
    counts = [
        torch.equal(
            Augment(grey=0.2)({"rgb": clip_of()}, np.random.default_rng(i), SPEC)["rgb"], clip_of()
        )
        for i in range(200)
    ]
    assert 0.7 < np.mean(counts) < 0.9
