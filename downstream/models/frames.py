"""A 2-D network on every frame, and a pooling of what it says over time.

Networks of timm and torchvision, and image towers of open_clip as CLIP4Clip and ViFi-CLIP use them.
Shapes: B clips, C channels, T frames, H x W pixels, D width of a frame's vector.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from downstream.models.attention import insert
from downstream.models.images import ImageNetwork
from pretrain.interop.openclip import Pair
from pretrain.spec import AnyFrames, InputSpec
from pretrain.vit import Block, sinusoid_table
from pretrain.weights import load_strict

POOLS = ("mean", "max", "attention", "temporal")


class AttentionPool(nn.Module):
    """A learned query weighs the frames; it starts as their mean.

    The values are the frames' embeddings themselves, so the result stays in the space of the image
    tower.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Parameter(torch.zeros(dim))

    def forward(self, frames: Tensor) -> Tensor:
        """Frames (B, T, D) to one embedding each (B, D)."""
        scores = self.norm(frames) @ self.query / math.sqrt(frames.shape[-1])
        return (scores.softmax(1).unsqueeze(-1) * frames).sum(1)


class TemporalTransformer(nn.Module):
    """A few transformer blocks over the frames' embeddings, which know their place in time.

    As in CLIP4Clip (Luo et al. 2021, https://arxiv.org/abs/2104.08860, "seqTransf"), whose residual
    is here in the blocks: their last layers start at zero, so that it starts as the identity.
    """

    positions: Tensor

    def __init__(self, dim: int, frames: int, depth: int):
        super().__init__()
        self.register_buffer("positions", sinusoid_table(frames, dim), persistent=False)
        heads = max(dim // 64, 1)
        heads -= next(i for i in range(heads) if dim % (heads - i) == 0)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.attn.proj.bias)
            nn.init.zeros_(block.fc2.weight)
            nn.init.zeros_(block.fc2.bias)

    def forward(self, frames: Tensor) -> Tensor:
        """Frames (B, T, D) to frames."""
        # Scaled to the embeddings, whose length differs between towers; taken off again at the end,
        # so that the identity stays one.
        size = frames.detach().square().mean((1, 2), keepdim=True).sqrt()
        positions = self.positions * size
        x = frames + positions
        for block in self.blocks:
            x = block(x)
        return x - positions


class FrameNetwork(nn.Module):
    """A network on every frame, and its vectors pooled over time.

    With one frame it is the single-frame model of Karpathy et al. 2014 (CVPR); several views of a
    clip are then averaged at test.

    Args:
        network: as `ImageNetwork` takes it.
        frames: frames of a clip.
        stride: source frames between two sampled frames; only recorded.
        size: height and width, pixels.
        pool: "mean" or "max" of the frames' vectors, which know no order; "attention", an
            `AttentionPool`; or "temporal", a `TemporalTransformer`, then the mean.
        pool_depth: blocks of the temporal transformer.
        attention: blocks to insert, see `downstream.models.attention.insert`.
        subtract_mean: whether each clip's mean frame is subtracted, see `Stream`.

    Raises:
        ValueError: another pool, or the network cannot be built.
    """

    def __init__(
        self, network: str | dict = "resnet18", frames: int = 1, stride: int = 1, size: int = 224,
        pool: str = "mean", pool_depth: int = 2, attention: str = "", subtract_mean: bool = False,
    ):  # fmt: skip
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"frame pooling {pool!r} is not one of {', '.join(POOLS)}")
        self.arguments: dict[str, Any] = {
            "network": network, "frames": frames, "stride": stride, "size": size, "pool": pool,
            "pool_depth": pool_depth, "attention": attention, "subtract_mean": subtract_mean,
        }  # fmt: skip
        self.images = ImageNetwork(network, size)
        self.pool, self.embed_dim, self.grid = pool, self.images.embed_dim, (frames, 1, 1)
        self.over_time: nn.Module = nn.Identity()
        if pool == "attention":
            self.over_time = AttentionPool(self.embed_dim)
        elif pool == "temporal":
            self.over_time = TemporalTransformer(self.embed_dim, frames, pool_depth)
        self.input_spec = InputSpec(
            frames, stride, size, {"rgb": self.images.stream(subtract_mean)}
        )
        insert(self, attention)

    @property
    def kind(self) -> str:
        """Its name in the presets of published training, see `downstream.training.kind_of`."""
        return "frame_single" if self.input_spec.frames == 1 else "frame_mean"

    @property
    def any_frames(self) -> AnyFrames:
        """Other lengths of a clip that exports take."""
        if self.pool == "temporal":
            return "its temporal transformer has positions for these frames only"
        return 2, 1

    def drop_tokens(self, fraction: float) -> None:
        """Let the network see only part of every frame's patches while it trains.

        FLIP, Li et al. 2022, https://arxiv.org/abs/2212.00794.

        Args:
            fraction: of the patches that are dropped, 0 to below 1.

        Raises:
            ValueError: it is no ViT of open_clip's.
        """
        from open_clip.transformer import PatchDropout, VisionTransformer

        if not isinstance(self.images.net, VisionTransformer):
            raise ValueError(
                "--drop-tokens needs a video transformer or a ViT of open_clip; give 0"
            )
        self.images.net.patch_dropout = PatchDropout(fraction) if fraction else nn.Identity()

    def forward_features(self, video: Tensor) -> Tensor:
        """The vectors of the frames."""
        self.input_spec.expect(video)
        frames = self.images.frames(video)
        return self.over_time(frames) if self.pool == "temporal" else frames

    def forward(self, video: Tensor) -> Tensor:
        """The frames' vectors pooled, not scaled to unit length."""
        frames = self.forward_features(video)
        if self.pool == "attention":
            return self.over_time(frames)
        if self.pool == "max":
            return frames.amax(1)
        return frames.mean(1)  # of frames that are not normalised, as ViFi-CLIP has it


def frame_tower(
    pair: Pair, frames: int, stride: int, pool: str = "mean", pixels: str = "tower"
) -> FrameNetwork:
    """The image tower of an open_clip pair on the frames of clips, in evaluation mode.

    Args:
        pair: of open_clip.
        frames: as of `FrameNetwork`, like `stride` and `pool`.
        stride: see there.
        pool: see there.
        pixels: see `Pair.network`.

    Raises:
        ValueError: another pool, or a tower that sees no squares.
    """
    tower = FrameNetwork(pair.network(pixels), frames, stride, pair.size, pool)
    load_strict(tower.images.net, pair.visual.state_dict(), "the image tower of open_clip")
    return tower.eval()
