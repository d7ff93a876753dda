"""The video transformer encoder: a plain ViT over space-time tubelets.

The encoder of VideoMAE (Tong et al. 2022, https://arxiv.org/abs/2203.12602): a clip is cut into
tubelets of `tubelet x patch x patch` pixels, each becomes a token, tokens are ordered t, h, w, and
there is no class token. Shapes: B clips, C channels, T frames, H x W pixels, N tokens, D width,
P values in one tubelet.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.settings import SIZES
from pretrain.spec import (
    FLOW_ZERO,
    IMAGENET_MEAN,
    IMAGENET_STD,
    AnyFrames,
    InputSpec,
    Stream,
    flow_stream,
)

# 128 MiB in float32; the widest published networks need 100 MiB for 64 frames of 384 pixels.
MOST_POSITIONS = 2**25
ROWS = 1024


def sinusoid_table(num_positions: int, dim: int) -> Tensor:
    """Fixed 1-D sine-cosine positions over the flattened token index, shape (N, D).

    VideoMAE numbers all tokens 0..N-1 in t, h, w order and uses Vaswani's 1-D table, not a
    separable space-time one; computed in float64, as the original does.

    Raises:
        ValueError: the table has more than `MOST_POSITIONS` numbers.
    """
    _refuse_gigantic((num_positions,), dim)
    j = np.arange(dim)
    period = np.power(10000, 2 * (j // 2) / dim)
    table = np.empty((num_positions, dim), np.float32)
    for row in range(0, num_positions, ROWS):  # so that little of it is in float64 at a time
        angle = np.arange(row, min(row + ROWS, num_positions))[:, None] / period
        table[row : row + ROWS, 0::2] = np.sin(angle[:, 0::2])
        table[row : row + ROWS, 1::2] = np.cos(angle[:, 1::2])
    return torch.from_numpy(table)


def separable_table(grid: tuple[int, int, int], dim: int) -> Tensor:
    """Fixed sine-cosine positions of time, height and width, side by side, shape (N, D).

    Each axis has its own third of the width (MAE's 2-D table, He et al. 2021,
    https://arxiv.org/abs/2111.06377, with time added), so neighbours in space and in time look
    alike; in the flattened table a row apart is a phase that has to be learned. What is left of a
    width that six does not divide goes to the width axis.
    """
    per_axis = dim // 6 * 2
    table = np.empty((*grid, dim), np.float32)
    for axis, size in enumerate((per_axis, per_axis, dim - 2 * per_axis)):
        positions = np.arange(grid[axis]).reshape([-1 if a == axis else 1 for a in range(4)])
        angle = positions / np.power(10000, np.arange(size // 2) / (size // 2))
        first = axis * per_axis
        table[..., first : first + size] = np.concatenate([np.sin(angle), np.cos(angle)], -1)
    return torch.from_numpy(table.reshape(-1, dim))


def _refuse_gigantic(grid: tuple[int, ...], dim: int) -> None:
    if math.prod(grid) * dim > MOST_POSITIONS:
        raise ValueError(
            f"{math.prod(grid):,} tokens of width {dim:,} need a table of more than "
            f"{MOST_POSITIONS:,} numbers"
        )


def position_table(kind: str, grid: tuple[int, int, int], dim: int) -> Tensor:
    """The table of positions named `kind`, shape (N, D).

    Raises:
        ValueError: `kind` is neither "flat" nor "separable", the width is odd, or the table has
            more than `MOST_POSITIONS` numbers.
    """
    _refuse_gigantic(grid, dim)
    if dim % 2:
        raise ValueError(f"sine-cosine positions need an even width, got {dim}")
    if kind == "flat":
        return sinusoid_table(int(np.prod(grid)), dim)
    if kind == "separable":
        return separable_table(grid, dim)
    raise ValueError(f"positions {kind!r} are not one of {', '.join(POSITIONS)}")


POSITIONS = ("flat", "separable", "learned", "rotary")
# For axes of about ten positions: Heo et al. 2024, https://arxiv.org/abs/2403.13298.
ROTARY_BASE = 100.0


def rotary_table(
    grid: tuple[int, int, int], trained: tuple[int, int, int], head_dim: int
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, head_dim) of the rotary embedding of time, height and width.

    Each axis has a third of the channels; the rest of a width that six does not divide is not
    rotated.

    Args:
        grid: (t, h, w) of the tokens.
        trained: the grid that was trained with; positions of another are interpolated to its range.
        head_dim: channels of a head.
    """
    _refuse_gigantic(grid, head_dim)
    pairs = head_dim // 6
    frequencies = ROTARY_BASE ** -(torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
    cos, sin = torch.ones(*grid, head_dim), torch.zeros(*grid, head_dim)
    for axis, (n, was) in enumerate(zip(grid, trained, strict=True)):
        positions = (torch.arange(n, dtype=torch.float64) + 0.5) * was / n - 0.5
        angles = (positions[:, None] * frequencies).repeat_interleave(2, 1)
        angles = angles.view([n if a == axis else 1 for a in range(3)] + [2 * pairs])
        turned = slice(axis * 2 * pairs, (axis + 1) * 2 * pairs)
        cos[..., turned], sin[..., turned] = angles.cos(), angles.sin()
    return cos.flatten(0, 2), sin.flatten(0, 2)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring channels of x (B, heads, N, d).

    Args:
        x: queries or keys.
        rotation: cosines and sines of `rotary_table`, (N, d) or (B, N, d).
    """
    cos, sin = (r if r.ndim == 2 else r.unsqueeze(1) for r in rotation)
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    if x.shape[-1] % 2:
        turned = F.pad(turned, (0, 1))
    return (x * cos + turned * sin).to(x.dtype)


def resize_positions(table: Tensor, was: tuple[int, int, int], now: tuple[int, int, int]) -> Tensor:
    """A table of positions (N, D) of one grid for another, by trilinear interpolation."""
    if tuple(was) == tuple(now):
        return table
    cube = table.T.view(1, -1, *was)
    return F.interpolate(cube, now, mode="trilinear", align_corners=False).flatten(2)[0].T


def patchify(video: Tensor, tubelet: int, patch: int) -> Tensor:
    """Cut clips (B, C, T, H, W) into tubelets (B, N, P): N in t, h, w order, P channel-last."""
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


def motion_token_indices(
    video: Tensor, tubelet: int, patch: int, num: int, std: tuple[float, ...] | None = None,
    flow: bool = False,
) -> Tensor:  # fmt: skip
    """The indices (B, num), ascending, of the tokens with the largest frame difference.

    A static background looks the same in every time slot, so most tubelets of such footage are
    redundant. The measure is the mean squared difference of neighbouring frames inside the tubelet
    and at its start.

    Args:
        video: clips (B, C, T, H, W), normalised, or uint8 as they were before; T at least 2.
        tubelet: frames of a tubelet.
        patch: its height and width, pixels.
        num: tubelets to keep.
        std: of uint8 clips, the channels' standard deviations that normalise them (their mean makes
            no difference).
        flow: the clips are optical flow, which is motion itself: the measure is its mean square.
    """
    if flow:
        change = video.float() - (FLOW_ZERO if video.dtype == torch.uint8 else 0)
    elif video.dtype == torch.uint8:  # a quarter of the bytes to read
        change = (video[:, :, 1:].short() - video[:, :, :-1]).float()
    else:
        change = video[:, :, 1:] - video[:, :, :-1]
    batch, channels, times, _, width = change.shape
    # Rows, then columns: on the CPU a third of the time of a sum over both or of average pooling.
    rows = change.mul_(change).reshape(-1, patch, width).sum(1)
    energy = rows.view(-1, patch).sum(1).view(batch, channels, times, -1)
    if std is not None:
        energy = energy / energy.new_tensor(std).square()[:, None, None]
    energy = energy.sum(1)
    if not flow:
        energy = torch.cat([energy[:, :1], energy], 1)  # the first frame has none before it
    energy = energy.unflatten(1, (-1, tubelet)).sum(2).flatten(1)
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

    def _project(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, N, d)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)  # (B, N, 3D)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q, k, v

    def weights(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """How much each token of x (B, N, D) attends to each: (B, heads, N, N), rows sum to one."""
        q, k, _ = self._project(x, rotation)
        return (q.float() * q.shape[-1] ** -0.5 @ k.float().transpose(-2, -1)).softmax(-1)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend over all of x (B, N, D), with queries and keys rotated by `rotation` if given."""
        q, k, v = self._project(x, rotation)
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
        self.drop_path = 0.0  # probability of dropping a branch in training, per clip

    def _branch(self, y: Tensor) -> Tensor:
        """Stochastic depth (Huang et al. 2016, https://arxiv.org/abs/1603.09382)."""
        if not self.training or not self.drop_path:
            return y
        keep = 1 - self.drop_path
        return y * (torch.rand(len(y), 1, 1, device=y.device) < keep).to(y.dtype) / keep

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Tokens (B, N, D) to tokens."""
        x = x + self._branch(self.attn(self.norm1(x), rotation))
        return x + self._branch(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


def init_weights(module: nn.Module) -> None:
    """VideoMAE's initialisation: Xavier-uniform linear layers, zero biases, unit LayerNorm."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def mimetic_init(block: Block) -> None:
    """Initialise attention like that of trained models (Trockman & Kolter 2023, arXiv:2305.09828).

    In trained vision transformers the product of a head's query and key matrices is near a multiple
    of the identity, so that a token attends to those at its place and like it, and the product of
    value and projection near a negative multiple. Both products are sampled so, plus noise, with
    the factors of the paper, and split by their singular values, the former cut to the width of a
    head. Together with positional embeddings that are similar for neighbours, attention starts out
    local instead of uniform. Biases and the MLP are unchanged.
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


_DRAWS: ContextVar[bool] = ContextVar("_DRAWS", default=True)


@contextmanager
def without_init() -> Iterator[None]:
    """Inside, transformer blocks are built without initialising their weights.

    For weights that are loaded at once: `mimetic_init` would take long for nothing.
    """
    token = _DRAWS.set(False)
    try:
        yield
    finally:
        _DRAWS.reset(token)


def start_blocks(init: str, blocks: nn.ModuleList) -> None:
    """Initialise the weights of transformer blocks.

    Raises:
        ValueError: `init` is neither "xavier" nor "mimetic".
    """
    if init not in ("xavier", "mimetic"):
        raise ValueError(f"init {init!r} is neither xavier (as published) nor mimetic")
    if not _DRAWS.get():
        return
    blocks.apply(init_weights)
    if init == "mimetic":
        for block in blocks:
            assert isinstance(block, Block)
            mimetic_init(block)


def spread_drop_path(blocks: nn.ModuleList, rate: float) -> None:
    """Stochastic depth that rises linearly from 0 at the first block to `rate` at the last."""
    for block, probability in zip(blocks, np.linspace(0, rate, len(blocks)), strict=True):
        assert hasattr(block, "drop_path")  # here and in ViViT
        block.drop_path = float(probability)  # type: ignore[assignment]


class VideoTransformer(nn.Module):
    """A ViT over tubelets, a `Backbone`.

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
        positions: "flat", VideoMAE's published table over the token's number; "separable", of time,
            height and width by themselves, which learns sooner; "learned"; or "rotary" (queries and
            keys are rotated by `rotary_table`). No published VideoMAE has the last three.
        init: how weights are drawn: "xavier", as VideoMAE does, or "mimetic", see `mimetic_init`.
        motion_tokens: fraction of a clip's tokens that `forward` and `forward_features` use, those
            with the largest frame difference, see `motion_token_indices`; 1: all, as published. The
            cost falls with it. Where little of the picture moves, training takes far fewer steps.
        pool: "mean" of the tokens, each behind the last norm; "fc_norm": the last norm of their
            mean, as VideoMAE is fine-tuned, whose tokens have none; or "class": a token of its own,
            which every block attends with.
        trained_grid: (t, h, w) of the tokens that positions were made for, if they are used for
            another number of frames or another size, see `resized`.
        norm_eps: epsilon of the last norm: 1e-6, or 1e-5 in a fine-tuned VideoMAE of transformers.
        stream: what it sees, "rgb", or "flow", optical flow, which has its own mean and std.
        bound: of flow, see `pretrain.spec.flow_stream`, likewise `method`.
        method: see there.

    Raises:
        ValueError: the clip is not a whole number of tubelets, or `dim` of heads; or
            `motion_tokens` selects no token, or is below 1 for a single frame.
    """

    pos_embed: Tensor
    rotary_cos: Tensor
    rotary_sin: Tensor

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
        motion_tokens: float = 1.0,
        pool: str = "mean",
        trained_grid: tuple[int, int, int] | None = None,
        norm_eps: float = 1e-6,
        stream: str = "rgb",
        bound: float = 0.0,
        method: str = "",
    ):
        super().__init__()
        if size % patch or frames % tubelet:
            raise ValueError(
                f"a clip of {frames} frames of {size}x{size} pixels cannot be cut into tubelets of "
                f"{tubelet} frames of {patch}x{patch}: choose multiples"
            )
        # What rebuilds this encoder; written to config.json of an exported backbone.
        self.arguments: dict[str, Any] = {
            "dim": dim, "depth": depth, "heads": heads, "frames": frames, "size": size,
            "patch": patch, "tubelet": tubelet, "stride": stride, "mean": list(mean),
            "std": list(std), "positions": positions, "init": init,
            "motion_tokens": motion_tokens, "pool": pool, "norm_eps": norm_eps,
            "trained_grid": None if trained_grid is None else list(trained_grid),
            "stream": stream, "bound": bound, "method": method,
        }  # fmt: skip
        if stream not in ("rgb", "flow"):
            raise ValueError(f"stream {stream!r:.80} is neither rgb nor flow")
        if pool not in ("mean", "fc_norm", "class"):
            raise ValueError(f"pool {pool!r} is not one of mean, fc_norm, class")
        self.fc_norm = pool == "fc_norm"  # tokens have no norm, their means have
        if positions not in POSITIONS:
            raise ValueError(f"positions {positions!r} are not one of {', '.join(POSITIONS)}")
        self.embed_dim, self.patch, self.tubelet = dim, patch, tubelet
        self.grid = (frames // tubelet, size // patch, size // patch)
        num_tokens = math.prod(self.grid)
        self.num_motion_tokens = round(motion_tokens * num_tokens)
        if not 1 <= self.num_motion_tokens <= num_tokens or (motion_tokens < 1 and frames == 1):
            raise ValueError(
                f"motion_tokens {motion_tokens} selects no valid number of the {num_tokens} tokens "
                f"of {frames} frames: give --motion-tokens 1 for a single frame, else at least "
                f"{1 / num_tokens:.2g} and at most 1"
            )
        pixels = Stream(tuple(mean), tuple(std))
        pictures = flow_stream(size, bound, method) if stream == "flow" else pixels
        self.input_spec = InputSpec(frames, stride, size, {stream: pictures})
        # The published Conv3d with kernel = stride is a linear layer; written as one, masked
        # tubelets are dropped before it.
        self.patch_embed = nn.Linear(tubelet * patch**2 * pictures.channels, dim)
        t, h, w = trained_grid or self.grid  # from a file it is a list
        trained = (t, h, w)
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(math.prod(self.grid), dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        elif positions == "rotary":
            cos, sin = rotary_table(self.grid, trained, dim // heads)
            self.register_buffer("pos_embed", torch.zeros(1, dim), persistent=False)
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)
        else:
            table = resize_positions(position_table(positions, trained, dim), trained, self.grid)
            self.register_buffer("pos_embed", table, persistent=False)
        self.class_token = None
        if pool == "class":
            self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
            nn.init.trunc_normal_(self.class_token, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        start_blocks(init, self.blocks)  # patch_embed keeps torch's default, as the original does

    @property
    def kind(self) -> str:
        """Its name in the presets of published training, see `downstream.training.kind_of`."""
        sizes = {SIZES[size][0]: size for size in ("s", "b", "l", "h")}
        return f"videomae_{sizes.get(self.embed_dim, '')}"

    @property
    def any_frames(self) -> AnyFrames:
        """Other lengths of a clip that exports take; positions are interpolated, see `resized`."""
        given = self.arguments
        if given["motion_tokens"] != 1:
            return "it uses as many motion tokens as these frames have"
        trained = given["trained_grid"] or self.grid
        if given["positions"] == "rotary" or trained[0] != self.grid[0]:
            return "its rotary or interpolated positions are of these frames only"
        return 2 * self.tubelet, self.tubelet

    def set_drop_path(self, rate: float) -> None:
        """Set stochastic depth, rising from 0 at the first block to `rate` at the last."""
        spread_drop_path(self.blocks, rate)

    def with_fc_norm(self) -> "VideoTransformer":
        """The same encoder with a fresh last norm after the mean of the tokens.

        VideoMAE is fine-tuned so.

        Raises:
            ValueError: its embedding is no mean of normed tokens.
        """
        pool = self.arguments["pool"]
        if pool != "mean":
            raise ValueError(f"its pool is {pool}, and only the norm of averaged tokens can move")
        weights = {k: v for k, v in self.state_dict().items() if not k.startswith("norm.")}
        other = VideoTransformer(**{**self.arguments, "pool": "fc_norm", "norm_eps": 1e-6})
        other.load_state_dict(weights, strict=False)
        return other

    def resized(self, frames: int, size: int, stride: int | None = None) -> "VideoTransformer":
        """The same encoder for another number of frames or another size, in the mode it was in.

        Fixed and learned positions are interpolated (trilinear) from the grid they were made for;
        rotary ones are squeezed or stretched to its range. Weights are copied.

        Args:
            frames: frames of a clip; 0: as it is.
            size: height and width, pixels; 0: as it is.
            stride: source frames between two sampled ones, 0 for uniform sampling; None: as it is.

        Raises:
            ValueError: the clip is not a whole number of tubelets.
        """
        given = self.arguments
        changed = {
            "frames": frames or given["frames"],
            "size": size or given["size"],
            "stride": given["stride"] if stride is None else stride,
        }
        trained = given["trained_grid"] or list(self.grid)
        with without_init(), torch.random.fork_rng(devices=[]):
            other = VideoTransformer(**{**given, **changed, "trained_grid": trained})
        state = dict(self.state_dict())
        if given["positions"] == "learned":
            state["pos_embed"] = resize_positions(state["pos_embed"], self.grid, other.grid)
        other.load_state_dict(state)
        return other.train(self.training)

    def _positions(self, num: int) -> Tensor:
        """The table (num, D) of all tokens; in an export for any length as `resized` has it."""
        if not isinstance(num, torch.SymInt):
            return self.pos_embed
        slots, height, width = self.grid
        over_time = self.pos_embed.reshape(1, slots, -1).transpose(1, 2)
        over_time = F.interpolate(over_time, num // (height * width), mode="linear")
        return over_time.transpose(1, 2).reshape(num, -1)

    def _rotation(self, index: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the visible tokens; the class token, the first, is not rotated."""
        if self.arguments["positions"] != "rotary":
            return None
        cos, sin = self.rotary_cos, self.rotary_sin
        if index is not None:
            cos, sin = cos[index], sin[index]
        if self.class_token is not None:
            cos = torch.cat([torch.ones_like(cos[..., :1, :]), cos], -2)
            sin = torch.cat([torch.zeros_like(sin[..., :1, :]), sin], -2)
        return cos, sin

    def _embed(self, patches: Tensor, index: Tensor | None) -> Tensor:
        x = self.patch_embed(patches)
        if self.arguments["positions"] != "rotary":
            x = x + (self._positions(x.shape[1]) if index is None else self.pos_embed[index])
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1).to(x.dtype), x], 1)
        return x

    def encode_all(self, patches: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tokens (B, K, D) and the class token (B, D), if there is one."""
        x, rotation = self._embed(patches, index), self._rotation(index)
        for block in self.blocks:
            x = block(x, rotation)
        if not self.fc_norm:
            x = self.norm(x)
        return (x, None) if self.class_token is None else (x[:, 1:], x[:, 0])

    def encode(self, patches: Tensor, index: Tensor | None = None) -> Tensor:
        """Embed normalised tubelets and run the blocks.

        Args:
            patches: (B, K, P), the tubelets to see.
            index: (B, K), their indices in the grid; None: all N, in order.

        Returns:
            tokens (B, K, D), without the class token, after the last LayerNorm; with pool
            "fc_norm" before it.
        """
        return self.encode_all(patches, index)[0]

    def motion_indices(self, video: Tensor) -> Tensor:
        """`motion_token_indices` of clips, normalised, or uint8 as they were before."""
        ((name, stream),) = self.input_spec.pictures.items()
        std = stream.std if video.dtype == torch.uint8 else None
        return motion_token_indices(
            video, self.tubelet, self.patch, self.num_motion_tokens, std, name == "flow"
        )

    def _select(self, video: Tensor) -> tuple[Tensor, Tensor | None]:
        """The selected tokens' pixels (B, K, P) and indices (B, K); None: all tokens."""
        self.input_spec.expect(video)
        patches = patchify(video, self.tubelet, self.patch)
        if self.num_motion_tokens == math.prod(self.grid):
            return patches, None
        index = self.motion_indices(video)
        return take_tokens(patches, index), index

    def forward_features(self, video: Tensor) -> Tensor:
        """The tokens of the last block.

        Tokens that were not selected (`motion_tokens` below 1) are the mean of those that were, so
        that the mean over all remains the embedding.
        """
        patches, index = self._select(video)
        tokens = self.encode(patches, index)
        if index is None:
            return tokens
        rest = tokens.mean(1, keepdim=True).expand(-1, math.prod(self.grid), -1)
        return rest.scatter(1, index.unsqueeze(-1).expand_as(tokens), tokens)

    def forward(self, video: Tensor) -> Tensor:
        """The mean token, or the class token."""
        return self._pooled(*self.encode_all(*self._select(video)))

    def forward_visible(self, video: Tensor, visible: Tensor) -> Tensor:
        """One embedding of each clip (B, D) from a part of its tokens.

        FLIP trains so (Li et al. 2022, https://arxiv.org/abs/2212.00794).

        Args:
            video: normalised clips (B, C, T, H, W).
            visible: (B, K), indices of the tokens to use, below `num_motion_tokens`.
        """
        self.input_spec.expect(video)
        if self.num_motion_tokens < math.prod(self.grid):
            index = self.motion_indices(video)
            visible = index.gather(1, visible)
        patches = patchify(video, self.tubelet, self.patch)
        return self._pooled(*self.encode_all(take_tokens(patches, visible), visible))

    def _pooled(self, tokens: Tensor, token: Tensor | None) -> Tensor:
        """The class token, if there is one, or the mean token."""
        if token is not None:
            return token
        return self.norm(tokens.mean(1)) if self.fc_norm else tokens.mean(1)

    @torch.no_grad()
    def attention_maps(self, video: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Attention weights of every block, the mean over its heads.

        Args:
            video: normalised clips (B, C, T, H, W).

        Returns:
            for each block (B, K, K), rows sum to one, the class token first if there is one; and
            the tokens' indices in the grid (B, K); None: all, in order.
        """
        patches, index = self._select(video)
        x, rotation, maps = self._embed(patches, index), self._rotation(index), []
        for block in self.blocks:
            assert isinstance(block, Block)
            maps.append(block.attn.weights(block.norm1(x), rotation).mean(1))
            x = block(x, rotation)
        return maps, index
