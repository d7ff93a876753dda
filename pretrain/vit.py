"""The video transformer encoder: a plain ViT over space-time tubelets.

The encoder of VideoMAE (Tong et al. 2022, https://arxiv.org/abs/2203.12602): a clip is cut into
tubelets of `tubelet x patch x patch` pixels, each becomes a token, tokens are ordered t, h, w, and
there is no class token. Shapes: B clips, C channels, T frames, H x W pixels, N tokens, D width,
P values in one tubelet.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# width, depth, heads: Ti, S, B, L of ViT/DeiT; H of VideoMAE; XS is ours, for minutes on a CPU.
SIZES = {
    "xs": (128, 4, 4),
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "h": (1280, 32, 16),
}


@dataclass(frozen=True)
class InputSpec:
    """The clip a backbone wants to see.

    Attributes:
        frames: number of frames.
        stride: source frames between two sampled frames.
        size: height and width in pixels.
        mean: per-channel mean of the normalisation, for pixels in [0, 1]; three channels are colour, two
            are optical flow.
        std: per-channel standard deviation, likewise.
        interpolation: how crops are scaled to it, "bilinear" or "bicubic", always anti-aliased.
        still: "keep", or "subtract": the clip's mean frame is taken away, so that what stands still vanishes.
            Where people act before still backgrounds small networks learn from far fewer clips.

    Raises:
        ValueError: another interpolation, another word for `still`, or a single frame, of which nothing would be left.
    """

    frames: int
    stride: int
    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    still: str = "keep"

    @property
    def channels(self) -> int:
        """Values of a pixel: 3 for colour, 2 for optical flow."""
        return len(self.mean)

    def expect(self, video: Tensor) -> None:
        """Refuse clips (B, C, T, H, W) of another shape.

        Raises:
            ValueError: channels, frames or size are not those of this clip.
        """
        expected = (self.channels, self.frames, self.size, self.size)
        if tuple(video.shape[1:]) != expected:
            raise ValueError(
                f"this backbone sees clips of (C, T, H, W) = {expected}, got {tuple(video.shape[1:])}: "
                "sample and crop to `input_spec`"
            )

    def __post_init__(self):
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(
                f"interpolation {self.interpolation!r} is neither bilinear nor bicubic"
            )
        if self.still not in ("keep", "subtract") or (
            self.still == "subtract" and self.frames == 1
        ):
            raise ValueError(
                f"still {self.still!r} of {self.frames} frame(s): give keep, or subtract where there are at least two"
            )

    def normalise(self, video: Tensor) -> Tensor:
        """Turn uint8 clips (B, C, T, H, W) into what the backbone sees: float, normalised."""
        mean = torch.tensor(self.mean, device=video.device).view(-1, 1, 1, 1)
        std = torch.tensor(self.std, device=video.device).view(-1, 1, 1, 1)
        video = (video.float() / 255 - mean) / std
        return video - video.mean(2, keepdim=True) if self.still == "subtract" else video


def sinusoid_table(num_positions: int, dim: int) -> Tensor:
    """Fixed 1-D sine-cosine positions over the flattened token index, shape (N, D).

    VideoMAE numbers all tokens 0..N-1 in t, h, w order and uses Vaswani's 1-D table, not a
    separable space-time one; computed in float64, as the original does.
    """
    j = np.arange(dim)
    angle = np.arange(num_positions)[:, None] / np.power(10000, 2 * (j // 2) / dim)
    angle[:, 0::2] = np.sin(angle[:, 0::2])
    angle[:, 1::2] = np.cos(angle[:, 1::2])
    return torch.from_numpy(angle).float()


def separable_table(grid: tuple[int, int, int], dim: int) -> Tensor:
    """Fixed sine-cosine positions of time, height and width, side by side, shape (N, D).

    Each axis has its own third of the width (MAE's 2-D table, He et al. 2021,
    https://arxiv.org/abs/2111.06377, with time added), so neighbours in space and in time look alike;
    in the flattened table a row apart is a phase that has to be learned. What is left of a width that
    six does not divide goes to the width axis.
    """
    per_axis = dim // 6 * 2
    sizes = (per_axis, per_axis, dim - 2 * per_axis)
    places = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    columns = []
    for place, size in zip(places, sizes, strict=True):
        angle = place.reshape(-1, 1) / np.power(10000, np.arange(size // 2) / (size // 2))
        columns += [np.sin(angle), np.cos(angle)]
    return torch.from_numpy(np.concatenate(columns, axis=1)).float()


def position_table(kind: str, grid: tuple[int, int, int], dim: int) -> Tensor:
    """The table of positions named `kind`, shape (N, D).

    Raises:
        ValueError: `kind` is neither "flat" nor "separable", or the width is odd.
    """
    if dim % 2:
        raise ValueError(f"sine-cosine positions need an even width, got {dim}")
    if kind == "flat":
        return sinusoid_table(int(np.prod(grid)), dim)
    if kind == "separable":
        return separable_table(grid, dim)
    raise ValueError(f"positions {kind!r} are neither flat (as published) nor separable")


def patchify(video: Tensor, tubelet: int, patch: int) -> Tensor:
    """Cut clips (B, C, T, H, W) into tubelets (B, N, P), N in t, h, w order, channel fastest in P."""
    return rearrange(
        video, "b c (t p) (h q) (w r) -> b (t h w) (p q r c)", p=tubelet, q=patch, r=patch
    )


def unpatchify(patches: Tensor, grid: tuple[int, int, int], tubelet: int, patch: int) -> Tensor:
    """Invert `patchify`: (B, N, P) to (B, C, T, H, W)."""
    t, h, w = grid
    return rearrange(
        patches,
        "b (t h w) (p q r c) -> b c (t p) (h q) (w r)",
        t=t, h=h, w=w, p=tubelet, q=patch, r=patch,
    )  # fmt: skip


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Pick tokens by index: x (B, N, D), index (B, K) -> (B, K, D).

    Indices rather than a boolean mask: the shapes are static, so the model compiles.
    """
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def moving_tokens(video: Tensor, tubelet: int, patch: int, num: int) -> Tensor:
    """The tubelets in which most changes from frame to frame: their indices (B, num), ascending.

    What stands still looks the same in every time slot, so in footage of people most tubelets repeat what
    another one shows. The measure is the mean squared difference of neighbouring frames inside the
    tubelet and at its start.

    Args:
        video: clips (B, C, T, H, W), normalised; T at least 2.
        tubelet: frames of a tubelet.
        patch: its height and width, pixels.
        num: tubelets to keep.
    """
    change = (video[:, :, 1:] - video[:, :, :-1]).square().mean(1, keepdim=True)
    change = torch.cat([change[:, :, :1], change], 2)  # the first frame has none before it
    energy = F.avg_pool3d(change, (tubelet, patch, patch)).flatten(1)
    return energy.topk(num, dim=1).indices.sort(1).values


class Attention(nn.Module):
    """Multi-head self-attention with biases on q and v only, as BEiT and VideoMAE have it."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of the {heads} attention heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all of x (B, N, D)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)  # (B, N, 3D)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if x.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
            # Measured: on CPU the bf16 backward of SDPA is slower than three plain products.
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1).to(v.dtype)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """Pre-norm transformer block with exact GELU."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)
        self.drop_path = (
            0.0  # probability of leaving a branch out in training, for every clip by itself
        )

    def _branch(self, y: Tensor) -> Tensor:
        """Stochastic depth (Huang et al. 2016, https://arxiv.org/abs/1603.09382)."""
        if not self.training or not self.drop_path:
            return y
        keep = 1 - self.drop_path
        return y * (torch.rand(len(y), 1, 1, device=y.device) < keep).to(y.dtype) / keep

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) to tokens."""
        x = x + self._branch(self.attn(self.norm1(x)))
        return x + self._branch(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


def init_weights(module: nn.Module) -> None:
    """VideoMAE's start: Xavier-uniform linear layers, zero biases, unit LayerNorm."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def mimetic_init(block: Block) -> None:
    """Start a block's attention as trained ones look (Trockman & Kolter 2023, arXiv:2305.09828).

    In trained vision transformers the product of a head's query and key matrices is near a multiple of
    the identity, so that a token attends to those that stand and look like it, and the product of value
    and projection near a negative one. Both products are drawn so, plus noise, with the factors of the
    paper, and split by their singular values, the former cut to the width of a head. Together with
    positions whose neighbours look alike, attention starts out local instead of uniform. Vectors and the
    MLP are left alone.
    """
    attention, dim = block.attn, block.attn.proj.in_features
    query, key, value = attention.qkv.weight.chunk(3)  # views: writing fills the weight

    def near_identity(noise: float, identity: float) -> tuple[Tensor, Tensor]:
        target = noise * torch.randn(dim, dim) / dim**0.5 + identity * torch.eye(dim)
        u, s, vh = torch.linalg.svd(target)
        return u * s.sqrt(), s.sqrt()[:, None] * vh

    for rows in torch.arange(dim).chunk(attention.heads):
        left, right = near_identity(0.7, 0.7)
        query[rows], key[rows] = left[:, : len(rows)].T, right[: len(rows)]
    left, right = near_identity(0.4, -0.4)
    attention.proj.weight.copy_(left)
    value.copy_(right)


def start_blocks(init: str, blocks: nn.Module) -> None:
    """Draw the first weights of transformer blocks.

    Raises:
        ValueError: `init` is neither "xavier" nor "mimetic".
    """
    if init not in ("xavier", "mimetic"):
        raise ValueError(f"init {init!r} is neither xavier (as published) nor mimetic")
    blocks.apply(init_weights)
    if init == "mimetic":
        for block in blocks:
            mimetic_init(block)


class VideoTransformer(nn.Module):
    """A ViT over tubelets; honours the backbone contract.

    Args:
        dim: token width.
        depth: number of blocks.
        heads: attention heads.
        frames: frames of a clip.
        size: height and width of a clip, pixels.
        patch: height and width of a tubelet, pixels.
        tubelet: frames of a tubelet.
        stride: source frames between two sampled frames; only recorded in `input_spec`.
        mean: normalisation mean, recorded likewise.
        std: normalisation standard deviation, recorded likewise.
        positions: "flat", VideoMAE's published table over the token's number, or "separable", of time,
            height and width by themselves, which learns sooner; no published weights have it.
        init: how weights are drawn: "xavier", as VideoMAE does, or "mimetic", see `mimetic_init`.
        moving: share of a clip's tokens that `forward` and `forward_features` look at, those in which most
            moves, see `moving_tokens`; 1: all, as published. The cost falls with it, and where few tokens move
            what moves is learned much sooner.

    Raises:
        ValueError: the clip is not a whole number of tubelets, or `dim` of heads; or `moving` leaves no token,
            or picks among those of a single frame.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        frames: int = 16,
        size: int = 224,
        patch: int = 16,
        tubelet: int = 2,
        stride: int = 4,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        positions: str = "flat",
        init: str = "xavier",
        moving: float = 1.0,
    ):
        super().__init__()
        if size % patch or frames % tubelet:
            raise ValueError(
                f"a clip of {frames} frames of {size}x{size} pixels cannot be cut into tubelets of "
                f"{tubelet} frames of {patch}x{patch}: choose multiples"
            )
        # What rebuilds this encoder; written to config.json of an exported backbone.
        self.arguments = {
            "dim": dim, "depth": depth, "heads": heads, "frames": frames, "size": size,
            "patch": patch, "tubelet": tubelet, "stride": stride, "mean": list(mean), "std": list(std),
            "positions": positions, "init": init, "moving": moving,
        }  # fmt: skip
        self.embed_dim, self.patch, self.tubelet = dim, patch, tubelet
        self.grid = (frames // tubelet, size // patch, size // patch)
        num_tokens = math.prod(self.grid)
        self.num_moving = round(moving * num_tokens)
        if not 1 <= self.num_moving <= num_tokens or (moving < 1 and frames == 1):
            raise ValueError(
                f"moving {moving} of the {num_tokens} tokens of {frames} frames: give a share that keeps at least one, "
                "and 1 for single frames, in which nothing moves"
            )
        self.input_spec = InputSpec(frames, stride, size, tuple(mean), tuple(std))
        # The published Conv3d with kernel = stride, written as the linear layer that it is, so that
        # masked tubelets are dropped before it.
        self.patch_embed = nn.Linear(tubelet * patch * patch * 3, dim)
        table = position_table(positions, self.grid, dim)
        self.register_buffer("pos_embed", table, persistent=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        start_blocks(init, self.blocks)  # patch_embed keeps torch's default, as the original does

    def encode(self, patches: Tensor, index: Tensor | None = None) -> Tensor:
        """Embed normalised tubelets and run the blocks.

        Args:
            patches: (B, K, P), the tubelets to see.
            index: (B, K), where each stands in the grid; None: all N, in order.

        Returns:
            tokens (B, K, D) after the last LayerNorm.
        """
        x = self.patch_embed(patches)
        x = x + (self.pos_embed if index is None else self.pos_embed[index])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _seen(self, video: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens looked at (B, K, D), and where they stand (B, K); None: everywhere."""
        self.input_spec.expect(video)
        patches = patchify(video, self.tubelet, self.patch)
        if self.num_moving == patches.shape[1]:
            return self.encode(patches), None
        index = moving_tokens(video, self.tubelet, self.patch, self.num_moving)
        return self.encode(take_tokens(patches, index), index), index

    def forward_features(self, video: Tensor) -> Tensor:
        """Normalised clips (B, C, T, H, W) to tokens (B, N, D), N in the order of `grid`.

        Tokens that were not looked at (`moving` below 1) are the mean of those that were, so that the mean over
        all is still the embedding.
        """
        tokens, index = self._seen(video)
        if index is None:
            return tokens
        rest = tokens.mean(1, keepdim=True).expand(-1, math.prod(self.grid), -1)
        return rest.scatter(1, index.unsqueeze(-1).expand_as(tokens), tokens)

    def forward(self, video: Tensor) -> Tensor:
        """Normalised clips (B, C, T, H, W) to one embedding each, the mean token (B, D)."""
        return self._seen(video)[0].mean(1)
