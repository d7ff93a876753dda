"""Late, early and slow fusion: where in a 2-D network the frames of a clip are fused.

Karpathy et al. 2014, "Large-scale video classification with convolutional neural networks" (CVPR):
the connectivity is theirs, the networks are today's. Shapes: B clips, C channels, T frames, D
width.
"""

from collections.abc import Container
from typing import Any, Self

import torch
from torch import Tensor, nn

from downstream.models.attention import insert
from downstream.models.images import (
    ImageNetwork,
    describe_network,
    load_image_weights,
    over_colour,
    read_network,
)
from pretrain.spec import FLOW_LEVELS, InputSpec, flow_stream
from pretrain.third_party import timm_network


class FusedFrames(nn.Module):
    """What the three have in common: their arguments, a 2-D network, and one token a clip.

    Args:
        network: as `ImageNetwork` takes it.
        frames: frames of a clip.
        stride: source frames between two sampled frames; only recorded.
        size: height and width, pixels.
        attention: blocks that the class inserts, see `downstream.models.attention.insert`.
        subtract_mean: whether each clip's mean frame is subtracted, see `Stream`.
        channels: that the network sees at once.

    Raises:
        ValueError: the network cannot be built.
    """

    kind = "fusion"  # to presets of published training, see `downstream.training.kind_of`
    grid = (1, 1, 1)
    any_frames = "a layer of it has all frames as channels"

    def __init__(
        self, network: str | dict, frames: int, stride: int, size: int, attention: str,
        subtract_mean: bool, channels: int = 3,
    ):  # fmt: skip
        super().__init__()
        self.arguments: dict[str, Any] = {
            "network": network, "frames": frames, "stride": stride, "size": size,
            "attention": attention, "subtract_mean": subtract_mean,
        }  # fmt: skip
        self.images = ImageNetwork(network, size, channels)
        self.embed_dim = self.images.embed_dim
        pixels = {"rgb": self.images.stream(subtract_mean)}
        self.input_spec = InputSpec(frames, stride, size, pixels)

    def forward_features(self, video: Tensor) -> Tensor:
        """One token (B, 1, D) for the whole clip."""
        raise NotImplementedError

    def forward(self, video: Tensor) -> Tensor:
        """The only token."""
        return self.forward_features(video).squeeze(1)


class LateFusion(FusedFrames):
    """Two frames, `stride` apart, seen by one network and merged by a fully connected layer.

    Args:
        network: as `ImageNetwork` takes it.
        frames: 2; said because every backbone has it.
        stride: source frames between the two; 15 in the paper.
        size: height and width, pixels.
        attention: blocks to insert, see `downstream.models.attention.insert`.
        subtract_mean: whether each clip's mean frame is subtracted, see `Stream`.

    Raises:
        ValueError: other than two frames, or the network cannot be built.
    """

    def __init__(
        self,
        network: str | dict = "resnet18",
        frames: int = 2,
        stride: int = 15,
        size: int = 224,
        attention: str = "",
        subtract_mean: bool = False,
    ):
        if frames != 2:
            raise ValueError(
                f"late fusion sees 2 frames, not {frames}; --stride sets their distance"
            )
        super().__init__(network, frames, stride, size, attention, subtract_mean)
        self.merge = nn.Linear(2 * self.embed_dim, self.embed_dim)
        insert(self, attention)

    def forward_features(self, video: Tensor) -> Tensor:
        """One token (B, 1, D): both frames side by side."""
        self.input_spec.expect(video)
        return self.merge(self.images.frames(video).flatten(1)).relu().unsqueeze(1)


class EarlyFusion(FusedFrames):
    """The first convolution sees all frames at once, as channels; the rest is the 2-D network.

    Args:
        network: of timm or torchvision.
        frames: frames of a clip; 10 in the paper.
        stride: source frames between two sampled frames; only recorded.
        size: height and width, pixels.
        attention: blocks to insert, see `downstream.models.attention.insert`.
        subtract_mean: whether each clip's mean frame is subtracted, see `Stream`.

    Raises:
        ValueError: the network cannot be built with so many channels.
    """

    def __init__(
        self,
        network: str | dict = "resnet18",
        frames: int = 10,
        stride: int = 1,
        size: int = 224,
        attention: str = "",
        subtract_mean: bool = False,
    ):
        super().__init__(network, frames, stride, size, attention, subtract_mean, 3 * frames)
        insert(self, attention)

    def forward_features(self, video: Tensor) -> Tensor:
        """One token (B, 1, D) for the whole clip."""
        self.input_spec.expect(video)
        stacked = video.transpose(1, 2).flatten(1, 2)  # channels: frame, colour
        return self.images(stacked).unsqueeze(1)


class EarlyStreams(FusedFrames):
    """The first convolution sees colour and optical flow of all frames at once, as channels.

    Args:
        network: of timm or torchvision.
        frames: frames of a clip, each with the flow to the next one.
        stride: source frames between two sampled frames; only recorded.
        size: height and width, pixels.
        attention: blocks to insert, see `downstream.models.attention.insert`.
        subtract_mean: whether the mean frame of colour is subtracted, see `Stream`.
        bound: of the flow, see `Stream`; 0: 20 pixels at 224.
        method: of the flow, see `Stream`.

    Raises:
        ValueError: the network cannot be built with so many channels.
    """

    def __init__(
        self, network: str | dict = "resnet18", frames: int = 10, stride: int = 1, size: int = 224,
        attention: str = "", subtract_mean: bool = False, bound: float = 0.0, method: str = "",
    ):  # fmt: skip
        super().__init__(network, frames, stride, size, attention, subtract_mean, 5 * frames)
        self.arguments |= {"bound": bound, "method": method}
        streams = {**self.input_spec.streams, "flow": flow_stream(size, bound, method)}
        self.input_spec = InputSpec(frames, stride, size, streams)
        insert(self, attention)

    @classmethod
    def with_weights(cls, weights: str, arguments: dict, given: Container[str]) -> Self:
        """Built with these arguments; filters over colour see every frame, and flow as TSN has it.

        Their sum is divided by the number of frames.

        Raises:
            ValueError: there are no such weights, or they do not fit.
        """
        arguments, theirs, origin = read_network(weights, arguments)
        backbone = cls(**arguments)
        if theirs is not None:
            images, frames = backbone.images, backbone.input_spec.frames
            scale = FLOW_LEVELS / 255 / (sum(images.pixels.std) / 3)  # as of `FlowStack`
            for name, own in images.net.state_dict().items():
                first = theirs.get(name)
                if first is not None and first.ndim == 4 and first.shape[1] == 3 != own.shape[1]:
                    flow = over_colour(first, 2 * frames) * scale
                    seen = torch.cat([first.repeat(1, frames, 1, 1), flow], 1)
                    theirs[name] = seen / frames
            load_image_weights(images, theirs, origin)
        return backbone

    def forward_features(self, clip: Any) -> Tensor:
        """One token (B, 1, D) for the whole clip."""
        self.input_spec.expect(clip)
        # Channels: frame, colour; then frame, axis of the flow.
        stacked = [clip[name].transpose(1, 2).flatten(1, 2) for name in ("rgb", "flow")]
        return self.images(torch.cat(stacked, 1)).unsqueeze(1)


class SlowFusion(FusedFrames):
    """Time is merged little by little: 4 frames at first, pairs after a stage, all after the next.

    In the paper the first convolution spans 4 frames at stride 2, the second 2 responses at stride
    2, the third the rest. Here the three stages are the start, the first and the second stage of
    the network, and responses are merged by a 1x1 convolution over their channels.

    Args:
        network: of timm, one that shows its stages (`features_only`).
        frames: 4k + 2 of a clip, at least 6; 10 in the paper.
        stride: source frames between two sampled frames; only recorded.
        size: height and width, pixels.
        attention: blocks to insert, see `downstream.models.attention.insert`.
        subtract_mean: whether each clip's mean frame is subtracted, see `Stream`.

    Raises:
        ValueError: another number of frames, or the network shows no stages.
    """

    def __init__(
        self,
        network: str | dict = "resnet18",
        frames: int = 10,
        stride: int = 1,
        size: int = 224,
        attention: str = "",
        subtract_mean: bool = False,
    ):
        if frames < 6 or frames % 4 != 2:
            near = max(6, 4 * round((frames - 2) / 4) + 2)
            raise ValueError(
                "slow fusion halves (frames - 2) / 2 responses, so it sees 6, 10, 14, 18 ... "
                f"frames, not {frames}: give --frames {near}"
            )
        super().__init__(network, frames, stride, size, attention, subtract_mean)
        del self.images  # the same network follows, as one that shows its stages
        from timm.models._features import FeatureDictNet

        if not isinstance(network, str) or network.startswith("torchvision:"):
            raise ValueError(
                "slow fusion needs a timm network whose stages it can enter, not "
                f"{describe_network(network)}"
            )
        try:
            stages = timm_network(network, channels=12, stages=True)
            assert isinstance(stages, FeatureDictNet)
            layers = list(stages.return_layers)
            assert all(name in stages for name in layers)
        except (RuntimeError, AttributeError, AssertionError) as error:
            raise ValueError(
                f"timm's {network} does not show its stages: slow fusion needs one that does, such "
                "as resnet18"
            ) from error
        # The stem's own output counts as a stage where its stride is 2; merging begins after the
        # next ones.
        self.stages, info = stages, stages.feature_info
        starts = [i for i, reduction in enumerate(info.reduction()) if reduction > 2][:2]
        if len(starts) < 2:
            raise ValueError(f"{network} has too few stages for slow fusion")
        self.merge_after = [layers[i] for i in starts]
        responses = (frames - 2) // 2
        first, second = (info.channels()[i] for i in starts)
        self.merges = nn.ModuleList(
            [
                nn.Conv2d(2 * first, first, 1, bias=False),
                nn.Conv2d(responses // 2 * second, second, 1, bias=False),
            ]
        )
        for merge in self.merges:  # each response at first counts alike
            assert isinstance(merge, nn.Conv2d)
            nn.init.zeros_(merge.weight)
            channels = merge.out_channels
            times = merge.in_channels // channels
            with torch.no_grad():
                for i in range(times):
                    merge.weight[:, i * channels : (i + 1) * channels, 0, 0] = (
                        torch.eye(channels) / times
                    )
        self.embed_dim = info.channels()[-1]
        insert(self, attention)

    @classmethod
    def with_weights(cls, weights: str, arguments: dict, given: Container[str]) -> Self:
        """Built with these arguments.

        Raises:
            ValueError: third-party weights were given: it takes none.
        """
        arguments, theirs, _ = read_network(weights, arguments)
        if theirs is not None:
            raise ValueError(
                "slow fusion starts from frames it stacks: it takes no ImageNet weights"
            )
        return cls(**arguments)

    def forward_features(self, video: Tensor) -> Tensor:
        """One token (B, 1, D) for the whole clip."""
        self.input_spec.expect(video)
        frames = video.transpose(1, 2)  # (B, T, C, H, W)
        groups = frames.unfold(1, 4, 2).movedim(-1, 2)  # (B, responses, 4, C, H, W)
        x = groups.flatten(2, 3).flatten(0, 1)
        if x.device.type == "cpu":  # measured: both passes in two thirds of the time
            x = x.contiguous(memory_format=torch.channels_last)
        for name, layer in self.stages.items():
            x = layer(x)
            if name in self.merge_after:
                nth = self.merge_after.index(name)
                merge = self.merges[nth]
                assert isinstance(merge, nn.Conv2d)
                times = merge.in_channels // merge.out_channels
                x = merge(x.unflatten(0, (-1, times)).flatten(1, 2))
        return x.mean((-2, -1)).unsqueeze(1)
