"""Two streams: appearance and motion, each seen by a network of its own.

Simonyan & Zisserman 2014, "Two-stream convolutional networks for action recognition in videos"
(https://arxiv.org/abs/1406.2199); started from ImageNet as in TSN, Wang et al. 2016
(https://arxiv.org/abs/1608.00859), section 3.2. In three dimensions: Carreira & Zisserman 2017
(https://arxiv.org/abs/1705.07750). B clips, T frames, D width.
"""

from collections.abc import Container
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from downstream.models.attention import insert
from downstream.models.images import (
    ImageNetwork,
    load_image_weights,
    over_colour,
    read_network,
)
from pretrain.spec import FLOW_LEVELS, Backbone, Clip, InputSpec, Joints, Stream, flow_stream


class FlowStack(nn.Module):
    """The temporal stream: a 2-D network that sees the flow of successive frames as channels.

    The mean of every flow field is subtracted, which takes off most of a camera's own motion.

    Args:
        network: of timm or torchvision.
        frames: L of the paper, whose best is 10; each brings the flow to the next one, x and y.
        stride: source frames between two sampled ones; 1 as published.
        size: height and width, pixels.
        attention: blocks to insert, see `downstream.models.attention.insert`.
        bound: of the flow, see `Stream`; 0: 20 pixels at 224.
        method: of the flow, see `Stream`.

    Raises:
        ValueError: the network cannot be built with so many channels.
    """

    kind = "flow_stack"  # to presets of published training, see `downstream.training.kind_of`
    any_frames = "its first layer has all frames as channels"
    grid = (1, 1, 1)

    def __init__(
        self, network: str | dict = "resnet18", frames: int = 10, stride: int = 1, size: int = 224,
        attention: str = "", bound: float = 0.0, method: str = "",
    ):  # fmt: skip
        super().__init__()
        self.arguments: dict[str, Any] = {
            "network": network, "frames": frames, "stride": stride, "size": size,
            "attention": attention, "bound": bound, "method": method,
        }  # fmt: skip
        self.images = ImageNetwork(network, size, channels=2 * frames)
        self.embed_dim = self.images.embed_dim
        self.input_spec = InputSpec(
            frames, stride, size, {"flow": flow_stream(size, bound, method)}
        )
        insert(self, attention)

    @classmethod
    def with_weights(cls, weights: str, arguments: dict, given: Container[str]) -> Self:
        """Built with these arguments; filters over colour of its 2-D network see flow instead.

        Raises:
            ValueError: there are no such weights, or they do not fit.
        """
        arguments, theirs, origin = read_network(weights, arguments)
        backbone = cls(**arguments)
        if theirs is not None:
            images = backbone.images
            for name, own in images.net.state_dict().items():
                first = theirs.get(name)
                if first is not None and first.ndim == 4 and first.shape[1] == 3 != own.shape[1]:
                    # What it saw were bytes over 255 over the colours' standard deviation, and
                    # what it sees now is levels over the bound's.
                    scale = FLOW_LEVELS / 255 / (sum(images.pixels.std) / 3)
                    theirs[name] = over_colour(first, own.shape[1]) * scale
            load_image_weights(images, theirs, origin)
        return backbone

    def forward_features(self, flow: Tensor) -> Tensor:
        """One token (B, 1, D) for the whole stack."""
        self.input_spec.expect(flow)
        still = flow - flow.mean((3, 4), keepdim=True)
        # Channels: x and y of the first flow, of the second, ...
        return self.images(still.transpose(1, 2).flatten(1, 2)).unsqueeze(1)

    def forward(self, flow: Tensor) -> Tensor:
        """The only token."""
        return self.forward_features(flow).squeeze(1)


def common_spec(specs: list[InputSpec]) -> InputSpec:
    """The clip that several backbones share: the streams of all, the frames of the longest.

    Raises:
        ValueError: they have other sizes, or the same stream in two ways.
    """
    longest = max(specs, key=lambda spec: spec.frames)
    streams: dict[str, Stream | Joints] = {}
    for spec in specs:
        if spec.size != longest.size:
            raise ValueError(
                f"networks of {spec.size} and of {longest.size} pixels cannot share a clip: give "
                "both the same size"
            )
        for name, stream in spec.streams.items():
            if streams.setdefault(name, stream) != stream:
                raise ValueError(f"both networks take {name}, and each normalises it in its way")
    return InputSpec(longest.frames, longest.stride, longest.size, streams)


def part_of(clip: Any, spec: InputSpec) -> Clip:
    """What one of several backbones sees of a clip: its streams, and frames evenly spread over it.

    A single frame is the one in the middle.

    Args:
        clip: by name, or the only stream.
        spec: of that backbone.
    """
    streams = clip if isinstance(clip, dict) else dict.fromkeys(spec.streams, clip)
    seen = {}
    for name in spec.streams:
        num = streams[name].shape[2]
        places = [(2 * i + 1) * num // (2 * spec.frames) for i in range(spec.frames)]
        seen[name] = streams[name] if spec.frames == num else streams[name][:, :, places]
    return spec.take(seen)


class FeatureFusion(nn.Module):
    """Two backbones on one clip, their embeddings side by side.

    A linear classifier of both is the sum of one of each: logits added, as in two-stream I3D. The
    clip has the frames of the longer one; of them the other sees as many as it takes, evenly
    spread, a single one in the middle. So a spatial stream on one frame and a temporal stream on
    ten flows take a clip of ten frames.

    Args:
        first: a backbone.
        second: another one, of the same size.
        stride: source frames between two sampled ones, 0: a frame of each equal part; None: those
            of the longer one.

    Raises:
        ValueError: they cannot share a clip, see `common_spec`.
    """

    parts = ("first", "second")  # arguments that are models, see `pretrain.backbones`
    any_frames = "two networks share its clip, and each takes its own frames of it"

    def __init__(self, first: nn.Module, second: nn.Module, stride: int | None = None):
        super().__init__()
        assert isinstance(first, Backbone) and isinstance(second, Backbone)
        self.arguments: dict[str, Any] = {"stride": stride}
        self.first, self.second = first, second
        spec = common_spec([first.input_spec, second.input_spec])
        self.input_spec = spec if stride is None else replace(spec, stride=stride)
        self.embed_dim = first.embed_dim + second.embed_dim
        # Tokens side by side where they lie at the same places; otherwise one for the clip.
        self.grid = first.grid if first.grid == second.grid else (1, 1, 1)

    @property
    def kind(self) -> str:
        """Its name in the presets of published training, see `downstream.training.kind_of`."""
        kinds = [getattr(part, "kind", "") for part in (self.first, self.second)]
        return {"frame_single flow_stack": "two_stream", "i3d i3d": "i3d"}.get(
            " ".join(kinds), "feature_fusion"
        )

    def forward_features(self, clip: Any) -> Tensor:
        """Tokens of both side by side, or one for the whole clip."""
        if self.first.grid != self.second.grid:
            return self(clip).unsqueeze(1)
        self.input_spec.expect(clip)
        return torch.cat(
            [p.forward_features(part_of(clip, p.input_spec)) for p in (self.first, self.second)], -1
        )

    def forward(self, clip: Any) -> Tensor:
        """Embeddings of both side by side."""
        self.input_spec.expect(clip)
        return torch.cat([p(part_of(clip, p.input_spec)) for p in (self.first, self.second)], -1)
