"""Masked reconstruction for any backbone: hidden tubelets are replaced by a mask token.

SimMIM (Xie et al. 2022, https://arxiv.org/abs/2111.09886) for clips. VideoMAE leaves hidden tokens
out, so its encoder costs a tenth; windows (Swin), factorised attention (ViViT) and convolutions
need the full grid, so here hidden tubelets are replaced by a learned one and every step costs a
whole forward and backward pass of the backbone. Shapes as in `pretrain/videomae.py`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.spec import Backbone, InputSpec
from pretrain.videomae import add_target, hidden_target, loss_beside_mean
from pretrain.vit import patchify, take_tokens, unpatchify

MOST_DECODER = 200_000_000  # parameters of the linear decoder


class MaskedPixels(nn.Module):
    """A backbone and a linear decoder, from each token to the pixels of its part of the clip.

    Args:
        encoder: a `Backbone` of colour or of flow, without temporal-mean subtraction.
        tubelet: frames of what is hidden at once.
        patch: its height and width, pixels.
        target_eps: see `hidden_target`.
        target: the stream that is predicted, "rgb" or "flow"; "": the one that is seen.

    Raises:
        ValueError: the clip is not a whole number of tubelets; one token covers so many pixels that
            the decoder would be larger than any backbone; or as `add_target`.
    """

    def __init__(
        self, encoder: nn.Module, tubelet: int, patch: int, target_eps: float = 1e-6,
        target: str = "",
    ):  # fmt: skip
        super().__init__()
        assert isinstance(encoder, Backbone)
        spec = encoder.input_spec
        if len(spec.streams) > 1 or not spec.pictures or spec.subtracts_mean:
            raise ValueError(
                "masked reconstruction needs one stream, colour or flow, without subtract_mean, "
                "since a clip's mean frame shows masked pixels to the encoder: give subtract_mean "
                "False"
            )
        ((seen, pictures),) = spec.pictures.items()
        self.watched = torch.zeros(2)  # `loss_beside_mean` of the last pass
        self.encoder, self.target, self.target_eps = encoder, target or seen, target_eps
        if spec.size % patch or spec.frames % tubelet:
            raise ValueError(
                f"a clip of {spec.frames} frames of {spec.size} pixels is not a whole number of "
                f"tubelets of {tubelet} frames of {patch} pixels: choose multiples with --tubelet "
                "and --patch"
            )
        self.tubelet, self.patch = tubelet, patch
        side = spec.size // patch
        self.grid = self.mask_grid = (spec.frames // tubelet, side, side)
        lengths = (spec.frames, spec.size, spec.size)
        t, h, w = (-(-n // g) for n, g in zip(lengths, encoder.grid, strict=True))
        self.cell = (t, h, w)
        values = self.clip.pictures[self.target].channels * math.prod(self.cell)
        if encoder.embed_dim * values > MOST_DECODER:
            raise ValueError(
                f"a token of this backbone covers {self.cell[0]} frames of {self.cell[1]} x "
                f"{self.cell[2]} pixels: a decoder from {encoder.embed_dim} to {values} values is "
                "not worth training; take a smaller clip or another family"
            )
        self.head = nn.Linear(encoder.embed_dim, values)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.mask_token = nn.Parameter(torch.zeros(pictures.channels * tubelet * patch**2))
        self.arguments: dict[str, Any] = {
            "encoder": encoder.arguments,
            "masked": {
                "tubelet": tubelet, "patch": patch, "target_eps": target_eps, "target": self.target,
            },
        }  # fmt: skip

    @property
    def clip(self) -> InputSpec:
        """The clip that training loads, see `add_target`."""
        return add_target(self.encoder.input_spec, self.target)

    def grid_indices(self, video: Tensor, selected: Tensor) -> Tensor:
        """Indices of tubelets in the grid: as given, since none are selected by motion."""
        return selected

    def forward(
        self, video: Tensor, visible: Tensor, masked: Tensor, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reconstruct the hidden tubelets.

        Args:
            video: uint8 clips (B, C, T, H, W).
            visible: (B, V), unused: everything that is not hidden is seen.
            masked: (B, M) which tubelets of the grid are hidden and predicted.
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
        """`forward`, and the backbone's tokens (B, N, D) besides."""
        tokens = self.see(video, visible, masked)
        pixels = self.head(tokens)  # (B, N, t h w C), then as a clip, cropped to its size
        pixels = unpatchify_cells(pixels, self.encoder.grid, self.cell)
        frames, size = self.encoder.input_spec.frames, self.encoder.input_spec.size
        pixels = pixels[:, :, :frames, :size, :size]
        prediction = take_tokens(patchify(pixels, self.tubelet, self.patch), masked)
        assert (target is None) == (self.target in self.encoder.input_spec.pictures)
        known = patchify(video if target is None else target, self.tubelet, self.patch)
        true = hidden_target(take_tokens(known, masked), self.target, self.target_eps)
        loss = F.mse_loss(prediction.float(), true)
        self.watched = loss_beside_mean(loss, true)
        return loss, prediction, tokens

    def see(self, video: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """The tokens of `rebuild` (B, N, D) alone; `visible` is unused."""
        patches = patchify(self.encoder.input_spec.normalise(video), self.tubelet, self.patch)
        index = masked.unsqueeze(-1).expand(-1, -1, patches.shape[2])
        hidden = self.mask_token.to(patches.dtype).expand(*masked.shape, -1)
        seen = patches.scatter(1, index, hidden)
        return self.encoder.forward_features(unpatchify(seen, self.grid, self.tubelet, self.patch))

    def unmasked(self, encoder: Backbone, video: Tensor, visible: Tensor) -> Tensor:
        """All tokens (B, N, D) of an encoder like this one that sees the whole clip."""
        return encoder.forward_features(encoder.input_spec.normalise(video))

    def drop_decoder(self) -> None:
        """Free what reconstructs: only `see` remains."""
        del self.head
        self.arguments = {"encoder": self.encoder.arguments}


def unpatchify_cells(
    values: Tensor, grid: tuple[int, int, int], cell: tuple[int, int, int]
) -> Tensor:
    """Lay out what tokens predict: (B, N, t h w C), channel fastest, to (B, C, T, H, W)."""
    x = values.unflatten(1, grid).unflatten(-1, (*cell, -1))  # (B, gt, gh, gw, t, h, w, C)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.flatten(2, 3).flatten(3, 4).flatten(4, 5)
