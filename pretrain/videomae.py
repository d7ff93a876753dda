"""VideoMAE: masks, decoder, targets and loss.

Tong et al. 2022, "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised
Video Pre-Training", https://arxiv.org/abs/2203.12602; dual masking from Wang et al. 2023,
"VideoMAE V2", https://arxiv.org/abs/2303.16727. Shapes as in `pretrain/vit.py`; V visible tokens
are seen by the encoder, M masked tokens are predicted. In a mask True means masked.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.spec import FLOW_LEVELS, FLOW_ZERO, InputSpec, flow_stream
from pretrain.vit import (
    Block,
    VideoTransformer,
    init_weights,
    patchify,
    position_table,
    start_blocks,
    take_tokens,
)
from pretrain.weights import load_strict

# Decoder width, depth, heads published for each encoder size. XS and Ti are ours.
DECODERS = {
    "xs": (64, 2, 2),
    "ti": (96, 4, 3),
    "s": (192, 4, 3),
    "b": (384, 4, 6),
    "l": (512, 12, 8),
    "h": (640, 12, 8),
}


MOST_MOTION = 20  # what the bound of flow is in a target


def make_mask(
    kind: str, grid: tuple[int, int, int], ratio: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw one mask over the token grid, True = masked, shape (N,).

    Args:
        kind: "tube": one spatial map repeated over time, so that a still object cannot be copied
            from a neighbouring frame; "random": every token by itself; "frame": whole temporal
            slots.
        grid: (t, h, w).
        ratio: fraction to mask; the count is rounded down, so it is the same for every clip.
        rng: the source of randomness.

    Raises:
        ValueError: an unknown kind, or a ratio that leaves nothing to see or nothing to predict.
    """
    t, h, w = grid
    units = {"tube": h * w, "random": t * h * w, "frame": t}
    if kind not in units:
        raise ValueError(f"mask kind {kind!r} is not one of {', '.join(units)}")
    num = units[kind]
    num_masked = int(ratio * num)
    if not 0 < num_masked < num:
        raise ValueError(
            f"--mask-ratio {ratio} masks {num_masked} of the {num} units of a {kind} mask over "
            f"the grid {t}x{h}x{w}: at least one must be masked and one visible"
        )
    drawn = np.zeros(num, dtype=bool)
    drawn[rng.permutation(num)[:num_masked]] = True
    if kind == "tube":
        return np.tile(drawn, t)
    return drawn if kind == "random" else np.repeat(drawn, h * w)


def running_cell(grid: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """VideoMAE V2's decoder mask: which tokens to decode, half of them, shape (N,), True = decode.

    Each 2x2 cell decodes two neighbouring positions, and the pair moves on by one with every
    temporal slot, from a random start: every place is decoded in half of the slots.

    Raises:
        ValueError: the grid has an odd height or width.
    """
    t, h, w = grid
    if h % 2 or w % 2:
        raise ValueError(
            f"dual masking needs an even token grid, got {h}x{w}: change --size or --patch"
        )
    first = (rng.integers(4) + np.arange(t)) % 4
    position = np.arange(h)[:, None] % 2 * 2 + np.arange(w)[None, :] % 2  # (h, w), 0..3 in a cell
    return np.isin((position[None] - first[:, None, None]) % 4, (0, 1)).reshape(-1)


def draw_tokens(
    kind: str,
    grid: tuple[int, int, int],
    ratio: float,
    dual: bool,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one clip's visible (V,) and to-be-predicted (M,) token indices, both ascending.

    With `dual`, the predicted tokens are the masked ones that the running cell decodes: exactly
    half of them under a tube mask over a multiple of four slots. Elsewhere the number varies a
    little from clip to clip while a batch needs one, so it is brought to half at random. V2's
    decoder is also given mask tokens at the decoded tokens that the encoder saw, and leaves them
    out of the loss; ours never makes them.

    Raises:
        ValueError: as `make_mask` and `running_cell`; or half of the masked tokens are none.
    """
    mask = make_mask(kind, grid, ratio, rng)
    masked = np.flatnonzero(mask)
    if dual and len(masked) < 2:
        raise ValueError(
            f"dual masking predicts half of the hidden tokens and --mask-ratio {ratio:g} hides "
            "one: raise it, or give --no-dual-mask"
        )
    if dual and grid[1:] == (1, 1):  # a list of tokens has no cells
        masked = np.sort(rng.permutation(masked)[: len(masked) // 2])
    elif dual:
        decoded = running_cell(grid, rng)[masked]
        masked = np.sort(
            np.concatenate([rng.permutation(masked[decoded]), rng.permutation(masked[~decoded])])
            [: len(masked) // 2]
        )  # fmt: skip
    return np.flatnonzero(~mask), masked


def mask_of_view(
    kind: str, grid: tuple[int, int, int], ratio: float, dual: bool
) -> Callable[[np.random.Generator, dict, np.ndarray], dict[str, Tensor]]:
    """`draw_tokens` as the loader wants it, see `Describe`: tensors "visible" and "masked"."""

    def draw(rng: np.random.Generator, _: dict, __: np.ndarray) -> dict[str, Tensor]:
        tokens = draw_tokens(kind, grid, ratio, dual, rng)
        return {n: torch.from_numpy(i) for n, i in zip(("visible", "masked"), tokens, strict=True)}

    return draw


def flow_target(patches: Tensor) -> Tensor:
    """The decoder's target where it is optical flow: pixels of a crop of 224, up to the bound's 20.

    In units of the bound most motion is below a tenth: after 300 steps of the preset tiny on the
    synthetic dataset the loss was 99 % of that of who predicts no motion; in pixels it is 89 %. It
    is not normalised by tubelet: a tubelet's mean is its motion, which would be lost, and where
    nothing moves the noise of the estimate would become the target. Masked Motion Encoding (Sun et
    al. 2022, https://arxiv.org/abs/2210.06096) divides displacements by 20 pixels, too; it then
    normalises them by patch, which it can since trajectories that rest are left out of its loss.

    Args:
        patches: (B, M, P) levels, see `pretrain.spec.Stream`.

    Returns:
        (B, M, P).
    """
    return (patches.float() - FLOW_ZERO) * (MOST_MOTION / FLOW_LEVELS)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of tubelets (B, M, P) per channel: (B, M, 1, 3)."""
    x = rearrange(patches, "b m (s c) -> b m s c", c=3)
    return x.mean(2, keepdim=True), x.var(dim=2, unbiased=True, keepdim=True).sqrt()


def normalise_target(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """The decoder's target: tubelets normalised over their positions, per colour channel.

    Args:
        patches: (B, M, P) in [0, 1], channel fastest.
        eps: added to the standard deviation, outside the root. 1e-6 is the original's; with it a
            flat tubelet's sensor and compression noise is blown up to unit variance, so footage
            with plain backgrounds wants some hundredths.

    Returns:
        (B, M, P).
    """
    mean, std = patch_statistics(patches)
    x = rearrange(patches, "b m (s c) -> b m s c", c=3)
    return ((x - mean) / (std + eps)).flatten(2)


def hidden_target(patches: Tensor, target: str, eps: float) -> Tensor:
    """What a decoder is to predict of hidden tubelets.

    Args:
        patches: (B, M, P), uint8, of the stream that is reconstructed.
        target: its name: "rgb", see `normalise_target`, or "flow", see `flow_target`.
        eps: see `normalise_target`.

    Returns:
        (B, M, P).
    """
    if target == "flow":
        return flow_target(patches)
    return normalise_target(patches.float() / 255, eps)


def loss_beside_mean(loss: Tensor, true: Tensor) -> Tensor:
    """The loss, and what it is of who predicts zero, the mean of targets: (2,), no gradient.

    Args:
        loss: of a batch.
        true: its targets, of `hidden_target`.
    """
    return torch.stack([loss.detach(), true.square().mean()])


def add_target(spec: InputSpec, target: str) -> InputSpec:
    """The clip that training loads: what an encoder sees, and beside it what is reconstructed.

    Both streams have the same frames, crop and mirror. Frame n has the flow to frame n + 1 of the
    source, whatever the stride, and the last frame of a video that of the one before.

    Args:
        spec: of the encoder, which sees one stream of pictures.
        target: "rgb", "flow", or "": what is seen.

    Raises:
        ValueError: nothing is reconstructed from joints, nor colour from flow.
    """
    if target in ("", *spec.pictures):
        return spec
    if target != "flow" or [*spec.streams] != ["rgb"]:
        raise ValueError(
            f"--target {target:.80} cannot be reconstructed from {' and '.join(spec.streams)}: it "
            "is what is seen, or flow from rgb"
        )
    return replace(spec, streams={**spec.streams, "flow": flow_stream(spec.size)})


class VideoMAE(nn.Module):
    """A video transformer and a light pixel decoder that predicts the masked tokens.

    Args:
        encoder: the backbone to pretrain.
        decoder_dim: width of the decoder.
        decoder_depth: its number of blocks.
        decoder_heads: its attention heads.
        target_eps: see `normalise_target`.
        target: the stream that is predicted, "rgb" or "flow"; "": the one that is seen.

    Raises:
        ValueError: the encoder's tokens have no norm; or as `add_target`.
    """

    decoder_pos: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: VideoTransformer,
        decoder_dim: int,
        decoder_depth: int,
        decoder_heads: int,
        target_eps: float = 1e-6,
        target: str = "",
    ):
        super().__init__()
        if encoder.fc_norm:
            raise ValueError(
                "this encoder's tokens have no norm, as a fine-tuned one's (pool fc_norm): a "
                "decoder needs pool mean or class"
            )
        ((seen, pictures),) = encoder.input_spec.pictures.items()
        self.target, self.target_eps = target or seen, target_eps
        # What rebuilds it all; written into checkpoints.
        self.arguments: dict[str, Any] = {
            "encoder": encoder.arguments,
            "decoder": {
                "decoder_dim": decoder_dim, "decoder_depth": decoder_depth,
                "decoder_heads": decoder_heads, "target_eps": target_eps, "target": self.target,
            },
        }  # fmt: skip
        self.watched = torch.zeros(2)  # `loss_beside_mean` of the last forward pass
        self.encoder = encoder
        self.encoder_to_decoder = nn.Linear(encoder.embed_dim, decoder_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        kind = encoder.arguments["positions"]
        table = position_table(
            kind if kind == "flat" else "separable", encoder.grid, decoder_dim
        )  # the decoder's are fixed
        self.register_buffer("decoder_pos", table, persistent=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        values = encoder.tubelet * encoder.patch**2
        self.head = nn.Linear(decoder_dim, values * self.clip.pictures[self.target].channels)
        start_blocks(encoder.arguments["init"], self.decoder_blocks)
        for module in (self.decoder_norm, self.head):
            module.apply(init_weights)
        # The authors' code starts `encoder_to_decoder` as torch does, and cuts the mask token at
        # one standard deviation.
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        mean, std = torch.tensor(pictures.mean), torch.tensor(pictures.std)
        self.register_buffer("mean", mean.repeat(values), persistent=False)  # (P,)
        self.register_buffer("std", std.repeat(values), persistent=False)

    @property
    def clip(self) -> InputSpec:
        """The clip that training loads, see `add_target`."""
        return add_target(self.encoder.input_spec, self.target)

    @property
    def tubelet(self) -> int:
        """Frames of what is hidden at once."""
        return self.encoder.tubelet

    @property
    def patch(self) -> int:
        """Its height and width, pixels."""
        return self.encoder.patch

    @property
    def grid(self) -> tuple[int, int, int]:
        """The grid of the encoder's tokens."""
        return self.encoder.grid

    @property
    def mask_grid(self) -> tuple[int, int, int]:
        """What masks are drawn over: the grid, or the list of motion-selected tokens."""
        selected = self.encoder.num_motion_tokens
        return self.grid if selected == math.prod(self.grid) else (selected, 1, 1)

    def grid_indices(self, video: Tensor, selected: Tensor) -> Tensor:
        """Indices in the grid (B, K) of the k-th selected tokens.

        Args:
            video: uint8 clips (B, C, T, H, W).
            selected: (B, K), indices among the encoder's motion-selected tokens, below
                `num_motion_tokens`; if it selects none, indices in the grid, which are returned as
                they are.
        """
        encoder = self.encoder
        if encoder.num_motion_tokens == math.prod(encoder.grid):
            return selected
        return encoder.motion_indices(video).gather(1, selected)

    def forward(
        self, video: Tensor, visible: Tensor, masked: Tensor, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reconstruct the masked tokens.

        Args:
            video: uint8 clips (B, C, T, H, W); uint8, so that only the tokens in use become floats.
            visible: (B, V), indices of the tokens that the encoder sees: in the grid, or, of an
                encoder with `motion_tokens` below 1, among the motion-selected tokens (see
                `grid_indices`).
            masked: (B, M), indices of the tokens to predict, likewise.
            target: uint8 clips (B, C, T, H, W) of the stream that is predicted; None where that is
                the one that is seen.

        Returns:
            the mean squared error against `hidden_target`, and the prediction (B, M, P).
        """
        loss, prediction, _ = self.rebuild(video, visible, masked, target)
        return loss, prediction

    def rebuild(
        self, video: Tensor, visible: Tensor, masked: Tensor, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward`, and the encoder's tokens (B, V, D) besides."""
        both = torch.cat([visible, masked], 1)  # together: frame differences are computed once
        visible, masked = self.grid_indices(video, both).split(
            [visible.shape[1], masked.shape[1]], 1
        )
        patches = patchify(video, self.encoder.tubelet, self.encoder.patch)
        seen = self._normalise(take_tokens(patches, visible))
        assert (target is None) == (self.target in self.encoder.input_spec.pictures)
        if target is not None:
            patches = patchify(target, self.encoder.tubelet, self.encoder.patch)
        true = hidden_target(take_tokens(patches, masked), self.target, self.target_eps)
        tokens = self.encoder.encode(seen, visible)
        x = self.encoder_to_decoder(tokens)
        x = torch.cat(
            [x + self.decoder_pos[visible], self.mask_token + self.decoder_pos[masked]], dim=1
        )
        for block in self.decoder_blocks:
            x = block(x)
        prediction = self.head(self.decoder_norm(x[:, visible.shape[1] :]))
        loss = F.mse_loss(prediction.float(), true)
        self.watched = loss_beside_mean(loss, true)
        return loss, prediction, tokens

    def _normalise(self, patches: Tensor) -> Tensor:
        return (patches.float() / 255 - self.mean) / self.std

    def see(self, video: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """The tokens of `rebuild` (B, V, D) alone: nothing is decoded, and `masked` is unused."""
        visible = self.grid_indices(video, visible)
        patches = patchify(video, self.encoder.tubelet, self.encoder.patch)
        return self.encoder.encode(self._normalise(take_tokens(patches, visible)), visible)

    def unmasked(self, encoder: VideoTransformer, video: Tensor, visible: Tensor) -> Tensor:
        """The tokens (B, V, D) that an encoder like this one makes of `visible`, seeing the whole.

        The whole are all tokens that `visible` is drawn from: the grid, or its selected ones.
        """
        every = torch.arange(math.prod(self.mask_grid), device=video.device)
        index = self.grid_indices(video, every.expand(len(video), -1))
        patches = patchify(video, self.encoder.tubelet, self.encoder.patch)
        tokens = encoder.encode(self._normalise(take_tokens(patches, index)), index)
        return take_tokens(tokens, visible)

    def drop_decoder(self) -> None:
        """Free what reconstructs: only `see` remains."""
        del self.encoder_to_decoder, self.mask_token, self.decoder_pos, self.decoder_blocks
        del self.decoder_norm, self.head
        self.arguments = {"encoder": self.encoder.arguments}


def build_videomae(
    size: str, encoder: VideoTransformer, decoder_dim: int | None, decoder_depth: int | None,
    target_eps: float, target: str = "",
) -> VideoMAE:  # fmt: skip
    """An encoder with the decoder that was published for its size.

    Args:
        size: of `DECODERS`.
        encoder: the backbone to pretrain.
        decoder_dim: another width, a multiple of 32, the width of a head.
        decoder_depth: another number of blocks.
        target_eps: see `normalise_target`.
        target: see `VideoMAE`.

    Raises:
        ValueError: another width, or as `add_target`.
    """
    dim, depth, heads = DECODERS[size]
    if decoder_dim:
        if decoder_dim % 32:
            raise ValueError(
                f"--decoder-dim {decoder_dim} is not a multiple of 32, the width of a head: give "
                f"{32 * math.ceil(decoder_dim / 32)}"
            )
        dim, heads = decoder_dim, decoder_dim // 32
    return VideoMAE(encoder, dim, decoder_depth or depth, heads, target_eps, target)


_FORM = ", or leave the preset out: auto takes their form"


def start_from(model: VideoMAE, loaded: nn.Module, name: str) -> None:
    """Copy the weights of an earlier model; its decoder's too, if it predicts the same stream.

    Args:
        model: to start.
        loaded: a `VideoMAE`, or an encoder of the kind of `model.encoder`.
        name: of `loaded`, for errors.

    Raises:
        ValueError: it is another network.
    """
    theirs = loaded.encoder if isinstance(loaded, VideoMAE) else loaded
    if type(theirs) is not type(model.encoder):
        raise ValueError(
            f"{name} is a {type(theirs).__name__}, and this run trains a "
            f"{type(model.encoder).__name__}: give --model the network that it has"
        )
    # What no shape shows: every token would get another position, every head other channels.
    for what in ("positions", "heads", "stream", "bound"):
        was, now = (encoder.arguments.get(what) for encoder in (theirs, model.encoder))
        if was != now:
            given = what in ("positions", "stream")
            remedy = f"give --{what} {was}" if given else "give the --model that they are of"
            raise ValueError(
                f"{name} was trained with {what} {was}, this run has {what} {now}: {remedy}{_FORM}"
            )
    if method := theirs.arguments.get("method"):  # of flow: that of others remains refused
        spec = model.encoder.input_spec
        flow = replace(spec.pictures["flow"], method=method)
        model.encoder.input_spec = replace(spec, streams={"flow": flow})
        model.encoder.arguments["method"] = method
    try:
        if isinstance(loaded, VideoMAE) and loaded.target == model.target:
            load_strict(model, loaded.state_dict(), name)
        else:
            load_strict(model.encoder, theirs.state_dict(), name)
    except ValueError as error:
        flags = "--model, --depth, --patch and --tubelet have to be those of the weights"
        raise ValueError(f"{error}: {flags}{_FORM}") from error
