"""Image towers of open_clip applied to the frames of a clip, and the pooling over time.

The towers are open_clip's own modules (https://github.com/mlfoundations/open_clip): ViTs, ResNets and
timm models. Shapes: B clips, C channels, T frames, H x W pixels, D width of a frame's embedding.
"""

import math

import torch
from torch import Tensor, nn

from pretrain.foreign import build_open_clip
from pretrain.spec import InputSpec, Stream
from pretrain.vit import Block, sinusoid_table

POOLS = ("mean", "attention", "temporal")


class AttentionPool(nn.Module):
    """A learned query weighs the frames; it starts as their mean.

    The values are the frames' embeddings themselves, so the result stays in the space of the image tower.
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

    As in CLIP4Clip (Luo et al. 2021, https://arxiv.org/abs/2104.08860, "seqTransf"), whose residual is
    here in the blocks: their last layers start at zero, so that it starts as the identity.
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
        # Scaled to the embeddings, whose length differs between towers; taken off again at the end, so
        # that the identity stays one.
        size = frames.detach().square().mean((1, 2), keepdim=True).sqrt()
        places = self.positions * size
        x = frames + places
        for block in self.blocks:
            x = block(x)
        return x - places


class FrameTower(nn.Module):
    """An open_clip image tower, frame by frame, and a pooling over time, a `Backbone`.

    Args:
        config: `embed_dim`, `vision_cfg` and `quick_gelu` as open_clip's model configurations have them.
        frames: frames of a clip.
        stride: source frames between two sampled frames; only recorded in `input_spec`.
        pool: "mean" of the frames' embeddings, which knows no order; "attention"; or "temporal": a small
            transformer, then the mean.
        pool_depth: blocks of the temporal transformer.
        mean: normalisation mean.
        std: normalisation standard deviation.
        interpolation: "bicubic" or "bilinear", how frames are scaled.

    Raises:
        ValueError: another pool, or frames that are not square.
    """

    kind = "frame_mean"  # to presets of published training, see `downstream.finetune.kind_of`

    def __init__(
        self,
        config: dict,
        frames: int,
        stride: int,
        pool: str,
        pool_depth: int = 2,
        mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073),
        std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711),
        interpolation: str = "bicubic",
    ):
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"frame pooling {pool!r} is not one of {', '.join(POOLS)}")
        visual = build_open_clip(vision=config).visual
        size = config["vision_cfg"].get("image_size", 224)
        if not isinstance(size, int):
            if len(set(size)) > 1:
                raise ValueError(
                    f"this image tower sees {size[0]} x {size[1]} pixels: only square ones can be used"
                )
            size = size[0]
        self.arguments = {
            "config": config, "frames": frames, "stride": stride, "pool": pool, "pool_depth": pool_depth,
            "mean": list(mean), "std": list(std), "interpolation": interpolation,
        }  # fmt: skip
        self.visual = visual
        self.embed_dim, self.grid = config["embed_dim"], (frames, 1, 1)
        self.input_spec = InputSpec(
            frames, stride, size, {"rgb": Stream(tuple(mean), tuple(std), interpolation)}
        )
        self.over_time: nn.Module = nn.Identity()
        if pool == "attention":
            self.over_time = AttentionPool(self.embed_dim)
        elif pool == "temporal":
            self.over_time = TemporalTransformer(self.embed_dim, frames, pool_depth)
        self.pool = pool

    def drop_tokens(self, share: float) -> None:
        """Let the tower see only part of every frame's patches while it trains (FLIP, Li et al. 2022).

        Raises:
            ValueError: the tower is no ViT of open_clip's.
        """
        from open_clip.transformer import PatchDropout, VisionTransformer

        if not isinstance(self.visual, VisionTransformer):
            raise ValueError(
                "--drop-tokens needs a ViT: a convolution cannot leave patches out; give 0"
            )
        self.visual.patch_dropout = PatchDropout(share) if share else nn.Identity()

    def _frames(self, video: Tensor) -> Tensor:
        self.input_spec.expect(video, any_clip=True)  # a mean over frames knows no number
        images = video.transpose(1, 2).flatten(0, 1)
        return self.visual(images).unflatten(0, (len(video), video.shape[2]))

    def forward_features(self, video: Tensor) -> Tensor:
        """The embeddings of the frames."""
        frames = self._frames(video)
        return self.over_time(frames) if self.pool == "temporal" else frames

    def forward(self, video: Tensor) -> Tensor:
        """The frames' embeddings pooled, not scaled to unit length."""
        frames = self._frames(video)
        if self.pool == "attention":
            return self.over_time(frames)
        return self.over_time(frames).mean(1)  # of un-normalised frames, as ViFi-CLIP has it
