"""The clip that a backbone takes: its streams by name, one or several."""

import pytest
import torch
from torch import nn

from pretrain.data.shards import refuse_missing_streams
from pretrain.spec import Backbone, InputSpec, Joints, Stream, flow_stream

FLOW = Stream((0.5, 0.5), (0.25, 0.5), subtract_mean=True, bound=1.0)
BOTH = InputSpec(4, 2, 8, {"rgb": Stream(), "flow": FLOW})


def batch() -> dict:
    """As a loader would give it, with what no backbone takes."""
    random = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (2, 5, 4, 8, 8), dtype=torch.uint8, generator=random)
    return {"flow": video[:, 3:], "rgb": video[:, :3], "samples": [7, 9]}


class TwoStreams(nn.Module):
    """Colour beside motion, each its mean."""

    def __init__(self, frames: int = 4):
        super().__init__()
        self.embed_dim, self.grid, self.arguments = 5, (frames, 1, 1), {"frames": frames}
        self.input_spec = InputSpec(frames, 2, 8, BOTH.streams)

    def forward_features(self, clip):
        self.input_spec.expect(clip)
        return torch.cat([clip["rgb"], clip["flow"]], 1).mean((3, 4)).transpose(1, 2)

    def forward(self, clip):
        return self.forward_features(clip).mean(1)


def test_a_backbone_of_two_streams():
    model = TwoStreams()
    assert isinstance(model, Backbone) and not isinstance(nn.Linear(1, 1), Backbone)
    loaded = batch()
    clip = BOTH.normalise(BOTH.take(loaded, torch.device("cpu")))
    for name, stream in BOTH.streams.items():
        assert torch.equal(clip[name], InputSpec(4, 2, 8, {name: stream}).normalise(loaded[name]))
    tokens = model.forward_features(clip)
    assert tokens.shape == (2, 4, 5) and torch.equal(model(clip), tokens.mean(1))
    assert {n: v.shape for n, v in BOTH.empty(2).items()} == {n: v.shape for n, v in clip.items()}


def test_one_stream_is_a_tensor_by_itself():
    """Whether it is given so or found among others."""
    spec, loaded = InputSpec(4, 2, 8, {"flow": FLOW}), batch()
    seen = spec.normalise(spec.take(loaded))
    assert torch.equal(seen, spec.normalise(loaded["flow"]))
    spec.expect(seen)
    assert spec.empty(3).shape == (3, 2, 4, 8, 8)


@pytest.mark.parametrize("take", [BOTH.take, BOTH.normalise, BOTH.expect])
def test_a_stream_that_is_missing_is_named(take):
    with pytest.raises(ValueError, match="flow is missing"):
        take({"rgb": batch()["rgb"]})


def test_a_clip_that_is_not_told_apart_is_refused():
    with pytest.raises(ValueError, match="rgb, flow"):
        BOTH.normalise(batch()["rgb"])
    with pytest.raises(ValueError, match="stream"):
        InputSpec(4, 2, 8, {})


@pytest.mark.parametrize(
    "change", [lambda f: f[:, :1], lambda f: f[:, :, :3], lambda f: f.byte(), lambda f: f[0]]
)
def test_every_stream_is_checked(change):
    clip = BOTH.normalise(BOTH.take(batch()))
    BOTH.expect(clip)
    with pytest.raises(ValueError, match="clips"):
        BOTH.expect(clip | {"flow": change(clip["flow"])})


def test_data_without_a_stream_are_refused():
    refuse_missing_streams(BOTH, ("rgb", "flow", "pose"), "the data", "the model")
    with pytest.raises(ValueError, match=r"the model takes rgb and flow.*no flow"):
        refuse_missing_streams(BOTH, ("rgb",), "the data", "the model")


def test_flow_is_motion_over_its_bound():
    """Zero is a level, and the bound that of the published networks at 224 pixels."""
    assert flow_stream(224).bound == 20 and flow_stream(56).bound == 5
    spec = InputSpec(1, 1, 112, {"flow": flow_stream(112, bound=4)})
    levels = torch.tensor([1, 64, 128, 129, 255], dtype=torch.uint8).expand(2, 112, 112, 5)
    motion = spec.normalise(levels.permute(0, 3, 1, 2)[None, :, :1])[0, 0, 0] * 4
    assert motion[0, 0].item() == pytest.approx(-4, abs=1e-5)
    seen = flow_stream(8).normalise(levels.permute(0, 3, 1, 2)[None, :, :, :8, :8])[0, 1, :, 0, 0]
    assert seen.tolist() == pytest.approx([-1, -64 / 127, 0, 1 / 127, 1], abs=1e-6)
    with pytest.raises(ValueError, match="bound"):
        InputSpec(4, 2, 8, {"flow": Stream((0.5,) * 2, (0.5,) * 2)})
    with pytest.raises(ValueError, match="bound"):
        flow_stream(8, bound=float("nan"))


@pytest.mark.parametrize("coordinates", [2, 3])
def test_people_are_centred_and_scaled_and_the_unseen_stay_zero(coordinates):
    """Wherever the camera stands and however large its pixels are; motion through it remains."""
    stream = Joints("ours", 5, coordinates, people=2)
    random = torch.Generator().manual_seed(0)
    where = torch.randn(3, coordinates, 4, 2, 5, generator=random)
    seen = torch.rand(3, 1, 4, 2, 5, generator=random).round()
    seen[:, :, :, 0, 0] = 0.4  # confidences are whatever the estimator says
    seen[2] = 0  # nobody at all
    pose = torch.cat([where * (seen > 0), seen], 1)
    moved = torch.cat([(where * 7 + 100) * (seen > 0), seen], 1)
    normal = stream.normalise(pose)
    assert torch.allclose(normal, stream.normalise(moved), atol=1e-4)
    assert (
        torch.equal(normal[:, -1:], seen) and not normal[:, :-1][(seen == 0).expand_as(where)].any()
    )
    for clip, there in zip(normal[:2, :-1], seen[:2, 0] > 0, strict=True):
        assert clip[:, there].mean(1) == pytest.approx([0] * coordinates, abs=1e-5)
        squares, num = 0.0, 0
        for t in range(4):
            for p in range(2):
                body = clip[:, t, p, there[t, p]]
                if num_seen := body.shape[1]:
                    squares += (body - body.mean(1, keepdim=True)).square().sum().item()
                    num += num_seen
        assert squares / num == pytest.approx(1, abs=1e-4)
    ratio = (where[0, 0, 0, 0, 0] - where[0, 0, 3, 0, 0]) / (
        normal[0, 0, 0, 0, 0] - normal[0, 0, 3, 0, 0]
    )
    assert ratio > 0  # it still moves between frames, to its own scale
    one = torch.zeros(1, coordinates + 1, 4, 2, 5)
    one[0, :, :, 0, 0] = torch.arange(4) * 50.0 + 1
    assert 0.5 < stream.normalise(one)[:, :-1].abs().max() < 2  # a single joint has no body
    assert torch.isfinite(normal).all() and torch.isfinite(stream.normalise(one)).all()


def test_a_backbone_of_joints_and_pictures():
    spec = InputSpec(4, 2, 8, {"rgb": Stream(), "pose": Joints("ours", 5, 2)})
    loaded = batch() | {"pose": torch.rand(2, 3, 4, 1, 5)}
    clip = spec.normalise(spec.take(loaded))
    spec.expect(clip)
    assert {n: v.shape for n, v in spec.empty(2).items()} == {n: v.shape for n, v in clip.items()}
    assert list(spec.pictures) == ["rgb"]
    for wrong in (clip["pose"][:, :2], clip["pose"][:, :, :3], clip["pose"].permute(0, 2, 3, 4, 1)):
        with pytest.raises(ValueError, match="clips"):
            spec.expect(clip | {"pose": wrong})
    with pytest.raises(ValueError, match="float32"):
        spec.normalise(loaded | {"pose": loaded["pose"].byte()})
    for wrong in ({"coordinates": 4}, {"people": 0}, {"joints": 10**9}):
        with pytest.raises(ValueError, match=r"coordinates|people"):
            Joints(**{"skeleton": "ours", "joints": 5} | wrong)


def test_weights_refuse_data_of_another_making():
    spec = InputSpec(4, 2, 8, {"flow": flow_stream(8, method="tvl1"), "pose": Joints("ours", 5)})
    spec.refuse_other_kinds({"flow": "tvl1", "pose": "ours", "rgb": ""}, "the model")
    InputSpec(4, 2, 8, {"flow": flow_stream(8)}).refuse_other_kinds({"flow": "dis"}, "the model")
    for made in ({"flow": "dis"}, {"flow": ""}, {"pose": "coco17"}):
        with pytest.raises(ValueError, match=f"the model takes {next(iter(made))}"):
            spec.refuse_other_kinds(made, "the model")
    with pytest.raises(ValueError, match="--skeleton 'coco17'"):  # what a new network is built with
        spec.refuse_other_kinds({"pose": "coco17"}, "the model")
    with pytest.raises(ValueError) as told:
        spec.refuse_other_kinds({"pose": ""}, "the model")
    assert "--skeleton" not in str(told.value)
