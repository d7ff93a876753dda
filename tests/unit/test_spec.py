"""The clip that a backbone takes: its streams by name, one or several."""

import pytest
import torch
from torch import nn

from pretrain.spec import Backbone, InputSpec, Stream

FLOW = Stream((0.5, 0.5), (0.25, 0.5), subtract_mean=True)
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
    BOTH.refuse_lacking(("rgb", "flow", "pose"), "the model")
    with pytest.raises(ValueError, match=r"the model takes rgb and flow.*no flow"):
        BOTH.refuse_lacking(("rgb",), "the model")
