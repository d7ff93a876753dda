"""Any 2-D network inflated to three dimensions.

Carreira & Zisserman 2017 (https://arxiv.org/abs/1705.07750), section 2.4: a 2-D filter is repeated
over time and divided by its length, so that a static video gives the output of its single frame. B
clips, T frames, D width.
"""

from collections.abc import Container
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.models.attention import OverClips, insert
from downstream.models.images import ImageNetwork, load_image_weights, read_network
from pretrain.modes import evaluating
from pretrain.spec import InputSpec
from pretrain.weights import load_strict


class InflatedConv(nn.Module):
    """A 2-D convolution of frames that also spans `kernel` of them.

    Frames stay in the batch, (B T, C, H, W), as the 2-D network around it has them. In time the
    clip's first and last frame are repeated as padding, not zeros, so that a static video stays
    static at its ends.
    """

    def __init__(self, conv: nn.Conv2d, kernel: int):
        super().__init__()
        assert kernel % 2 and conv.padding_mode == "zeros"
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.groups, self.kernel, self.frames = conv.groups, kernel, 0
        shape = (*conv.weight.shape[:2], kernel, *conv.weight.shape[2:])
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(B T, C, H, W) to (B T, outputs, H', W')."""
        clips = x.unflatten(0, (-1, self.frames)).transpose(1, 2)
        side = self.kernel // 2
        clips = F.pad(clips, (0, 0, 0, 0, side, side), mode="replicate")
        padding = self.padding if isinstance(self.padding, str) else (0, *self.padding)
        y = F.conv3d(
            clips,
            self.weight,
            self.bias,
            (1, *self.stride),
            padding,
            (1, *self.dilation),
            self.groups,
        )
        return y.transpose(1, 2).flatten(0, 1)


class Inflated(nn.Module):
    """A 2-D network whose spatial convolutions also span time; time is never subsampled.

    Args:
        network: of timm or torchvision, with convolutions.
        time_kernel: frames that each spans, odd.
        frames: frames of a clip.
        stride: source frames between two sampled frames; only recorded.
        size: height and width, pixels.
        attention: blocks to insert, see `downstream.models.attention.insert`.
        subtract_mean: whether each clip's mean frame is subtracted, see `Stream`.

    Raises:
        ValueError: an even kernel, or a network without a convolution larger than 1x1.
    """

    frames_in_batch = True  # as `insert` has to know
    any_frames = (2, 1)  # other lengths of a clip that exports take, see `pretrain.spec.AnyFrames`

    def __init__(
        self, network: str | dict = "resnet18", time_kernel: int = 3, frames: int = 16,
        stride: int = 4, size: int = 224, attention: str = "", subtract_mean: bool = False,
    ):  # fmt: skip
        super().__init__()
        if time_kernel % 2 == 0 or time_kernel < 1:
            raise ValueError(f"time_kernel {time_kernel} is not an odd number of frames")
        self.arguments: dict[str, Any] = {
            "network": network, "time_kernel": time_kernel, "frames": frames, "stride": stride,
            "size": size, "attention": attention, "subtract_mean": subtract_mean,
        }  # fmt: skip
        self.images = ImageNetwork(network, size)
        self.time_kernel = time_kernel
        self.inflated: list[str] = []  # their names in the 2-D network, for its weights
        for name, module in list(self.images.net.named_modules()):
            # Kernels as large as their stride only cut patches; every other larger one looks
            # around.
            if (
                type(module) is nn.Conv2d
                and max(module.kernel_size) > 1
                and module.kernel_size != module.stride
            ):
                parent = self.images.net.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], InflatedConv(module, time_kernel))
                self.inflated.append(name)
        if not self.inflated:
            raise ValueError(f"{network} has no convolution that looks around: nothing to inflate")
        self.embed_dim, self.grid = self.images.embed_dim, (frames, 1, 1)
        self.input_spec = InputSpec(
            frames, stride, size, {"rgb": self.images.stream(subtract_mean)}
        )
        insert(self, attention)

    @property
    def kind(self) -> str:
        """Its name in the presets of published training, see `downstream.training.kind_of`."""
        return "nonlocal" if "nonlocal" in self.arguments["attention"] else "inflated"

    @classmethod
    def with_weights(cls, weights: str, arguments: dict, given: Container[str]) -> Self:
        """Built with these arguments, and started from weights of its 2-D network."""
        arguments, theirs, origin = read_network(weights, arguments)
        backbone = cls(**arguments)
        if theirs is not None:
            load_image_weights(backbone.images, backbone.inflate(theirs), origin)
            check_still_clip(backbone)
        return backbone

    def inflate(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The 2-D network's weights for this one: filters repeated over time, over its length."""
        changed = dict(weights)
        for name in (f"{place}.weight" for place in self.inflated):
            if name in weights:
                repeated = weights[name].unsqueeze(2).repeat(1, 1, self.time_kernel, 1, 1)
                changed[name] = repeated / self.time_kernel
        return changed

    def forward_features(self, video: Tensor) -> Tensor:
        """The vectors of the frames, which see their neighbours."""
        self.input_spec.expect(video)
        for module in self.images.net.modules():
            if isinstance(module, InflatedConv | OverClips):
                module.frames = video.shape[2]
        return self.images.frames(video)

    def forward(self, video: Tensor) -> Tensor:
        """The mean of the frames' vectors."""
        return self.forward_features(video).mean(1)


@torch.no_grad()
def check_still_clip(backbone: Inflated) -> None:
    """Assert that a static clip gives the 2-D network's output for its frame."""
    spec = backbone.input_spec
    flat = ImageNetwork(backbone.arguments["network"], spec.size)
    weights = backbone.images.net.state_dict()
    for place in backbone.inflated:
        weights[f"{place}.weight"] = weights[f"{place}.weight"].sum(2)
    load_strict(flat.net, weights, "the inflated network")
    image = torch.rand(1, 3, spec.size, spec.size, generator=torch.Generator().manual_seed(0))
    with evaluating(backbone):
        clip = backbone(image.unsqueeze(2).expand(-1, -1, spec.frames, -1, -1))
    expected = flat.eval()(image)
    error = ((clip - expected).norm() / expected.norm().clamp(min=1e-12)).item()
    assert error < 1e-3, f"the inflated network is off by {error:.1e} on a static clip"
