"""Video Swin: attention inside windows of space and time that shift from block to block.

Liu et al. 2022, https://arxiv.org/abs/2106.13230. The blocks are torchvision's, which were checked
against the authors' weights there; sizes, embeddings and starts from others are here. B clips, N
tokens of the last stage, D = 8 C.
"""

from collections.abc import Container
from typing import Any, Self

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from downstream.models.images import SWIN_XS, video_weights
from pretrain.spec import AnyFrames, InputSpec, Stream
from pretrain.weights import load_strict

# Width C, blocks of the four stages, their heads, stochastic depth, as published.
SIZES = {
    "xs": SWIN_XS,
    "t": (96, (2, 2, 6, 2), (3, 6, 12, 24), 0.1),
    "s": (96, (2, 2, 18, 2), (3, 6, 12, 24), 0.1),
    "b": (128, (2, 2, 18, 2), (4, 8, 16, 32), 0.3),
    "l": (192, (2, 2, 18, 2), (6, 12, 24, 48), 0.2),
}


class VideoSwin(nn.Module):
    """A Video Swin without its classifier.

    Args:
        variant: "t", "s", "b", "l" or "xs".
        window: frames, height and width of a window, in tokens of each stage; (8, 7, 7) as
            published, (16, 7, 7) for Something-Something.
        patch: frames, height and width of the first tokens; (2, 4, 4) as published.
        frames: frames of a clip; 32 as published.
        stride: source frames between two sampled ones; only recorded.
        size: height and width, pixels.
        subtract_mean: whether each clip's mean frame is subtracted, see `Stream`.
        recompute: save memory: keep no activations inside stages, compute them again in the
            backward pass.

    Raises:
        ValueError: another variant, or a clip of which the stages leave nothing.
    """

    def __init__(
        self, variant: str = "t", window: tuple[int, int, int] = (8, 7, 7),
        patch: tuple[int, int, int] = (2, 4, 4), frames: int = 32, stride: int = 2, size: int = 224,
        subtract_mean: bool = False, recompute: bool = False,
    ):  # fmt: skip
        super().__init__()
        if variant not in SIZES:
            raise ValueError(f"Video Swin {variant!r} is not one of {', '.join(SIZES)}")
        if frames < patch[0] or size < 8 * patch[1]:
            raise ValueError(
                f"Video Swin halves space three times after patches of {patch[1]}: {frames} frames "
                f"of {size} pixels are too few, give at least {patch[0]} of {8 * patch[1]}"
            )
        from torchvision.models.video.swin_transformer import SwinTransformer3d

        dim, depths, heads, drop_path = SIZES[variant]
        self.arguments: dict[str, Any] = {
            "variant": variant, "window": list(window), "patch": list(patch), "frames": frames,
            "stride": stride, "size": size, "subtract_mean": subtract_mean, "recompute": recompute,
        }  # fmt: skip
        net = SwinTransformer3d(
            list(patch),
            dim,
            list(depths),
            list(heads),
            list(window),
            stochastic_depth_prob=drop_path,
            num_classes=1,
        )
        self.patch_embed, self.features, self.norm = net.patch_embed, net.features, net.norm
        self.embed_dim, self.recompute = 8 * dim, recompute
        side = -(-size // patch[1])
        for _ in range(3):
            side = -(-side // 2)
        self.grid = (-(-frames // patch[0]), side, side)
        self.input_spec = InputSpec(
            frames, stride, size, {"rgb": Stream(subtract_mean=subtract_mean)}
        )

    @property
    def kind(self) -> str:
        """Its name in the presets of published training, see `downstream.training.kind_of`."""
        return f"video_swin_{self.arguments['variant']}"

    @property
    def any_frames(self) -> AnyFrames:
        """Other lengths of a clip that exports take: whole windows, at least two."""
        window = self.arguments["patch"][0] * self.arguments["window"][0]
        return 2 * window, window

    def set_drop_path(self, rate: float) -> None:
        """Let blocks be left out in training, the last with probability `rate`.

        A new network has the published rate of its variant.
        """
        from torchvision.ops import StochasticDepth

        parts = [m for m in self.modules() if isinstance(m, StochasticDepth)]
        for part, probability in zip(parts, np.linspace(0, rate, len(parts)), strict=True):
            part.p = float(probability)

    @classmethod
    def with_weights(cls, weights: str, arguments: dict, given: Container[str]) -> Self:
        """Built with these arguments, and started from "kinetics" or a file, see `swin_weights`."""
        backbone = cls(**arguments)
        if weights:
            load_strict(backbone, swin_weights(weights, backbone)[0], weights)
        return backbone

    def forward_features(self, video: Tensor) -> Tensor:
        """The tokens of the last stage."""
        self.input_spec.expect(video)
        x = self.patch_embed(video)  # (B, t, h, w, C)
        for stage in self.features:
            if self.recompute and self.training:
                x = checkpoint(stage, x, use_reentrant=False)
            else:
                x = stage(x)
        return self.norm(x).flatten(1, 3)

    def forward(self, video: Tensor) -> Tensor:
        """The mean token."""
        return self.forward_features(video).mean(1)


def convert_swin(
    weights: dict[str, Tensor], model: VideoSwin
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Third-party weights as a `VideoSwin` takes them, and those of their classifier.

    Known layouts: the authors' Video Swin (`backbone.layers...`), torchvision's 3-D
    (`features...`), and the image Swins of torchvision and of timm, which are inflated: patches
    divided over a tubelet's frames, tables of relative positions repeated over time, and resized
    where the window differs.

    Raises:
        ValueError: another layout.
    """
    weights = {k.removeprefix("backbone."): v for k, v in weights.items()}
    ours: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    image = "features.0.0.weight" in weights or (
        "patch_embed.proj.weight" in weights and weights["patch_embed.proj.weight"].ndim == 4
    )
    # timm's image Swins keep the merging at the start of a stage, the authors at the end of the one
    # before.
    early = (
        image
        and "layers.1.downsample.reduction.weight" in weights
        and "layers.3.downsample.reduction.weight" in weights
    )
    for key, value in weights.items():
        if key.endswith(("relative_position_index", "attn_mask")):
            continue
        first, _, rest = key.partition(".")
        if first in ("cls_head", "head"):
            leaf = key.rpartition(".")[2]
            head[leaf] = value
            continue
        if first == "layers":
            stage, kind, *path = rest.split(".")
            if kind == "blocks":
                name = f"features.{2 * int(stage)}." + ".".join(path)
            else:
                name = f"features.{2 * int(stage) + (-1 if early else 1)}." + ".".join(path)
            name = name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
        elif (
            first == "features" and image
        ):  # torchvision's image Swin counts its patches as a stage
            stage, *path = rest.split(".")
            place = {"0.0": "patch_embed.proj", "0.2": "patch_embed.norm"}.get(f"{stage}.{path[0]}")
            name = f"{place}.{path[1]}" if place else f"features.{int(stage) - 1}." + ".".join(path)
        elif first in ("features", "patch_embed", "norm"):
            name = key
        else:
            raise ValueError(f"{key} is of no Swin that is known here")
        ours[name] = value
    if image:
        ours = inflate_swin(ours, model)
    # Buffers that only say which entry of a table belongs to which pair.
    own = model.state_dict()
    ours |= {k: v for k, v in own.items() if k.endswith("relative_position_index")}
    return ours, head


def inflate_swin(weights: dict[str, Tensor], model: VideoSwin) -> dict[str, Tensor]:
    """2-D weights under 3-D names to 3-D weights, as section 3.3 of the paper has it."""
    tubelet = model.arguments["patch"][0]
    wd, wh, ww = model.arguments["window"]
    inflated = {}
    for name, value in weights.items():
        if name == "patch_embed.proj.weight":
            value = value.unsqueeze(2).repeat(1, 1, tubelet, 1, 1) / tubelet
        elif name.endswith("relative_position_bias_table"):
            side = round(value.shape[0] ** 0.5)
            if side != 2 * wh - 1 or side != 2 * ww - 1:
                picture = value.T.view(1, -1, side, side)
                size = (2 * wh - 1, 2 * ww - 1)
                value = F.interpolate(picture, size, mode="bicubic").flatten(2)[0].T
            value = value.repeat(2 * wd - 1, 1)
        inflated[name] = value
    return inflated


def swin_weights(source: str, model: VideoSwin) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights for a `VideoSwin`, and of a classifier.

    Args:
        source: "kinetics", torchvision's own (downloaded once; t, s and b), or a file in a layout
            that `convert_swin` knows.
        model: whose they shall be.

    Raises:
        ValueError: nothing can be downloaded, or the file is of another kind.
    """
    return convert_swin(video_weights(f"swin3d_{model.arguments['variant']}", source), model)
