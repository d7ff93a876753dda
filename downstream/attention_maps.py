"""Attention of the last layer and attention rollout, and what poses attend to, over the clip.

Abnar & Zuidema 2020, "Quantifying attention flow in transformers",
https://arxiv.org/abs/2005.00928. Shapes: B clips, (t, h, w) the grid of tokens, K tokens that
attend (the class token first, if there is one).
"""

import math
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor


@runtime_checkable
class Attends(Protocol):
    """A backbone with attention maps."""

    class_token: Tensor | None
    grid: tuple[int, int, int]

    def attention_maps(self, video: Tensor, /) -> tuple[list[Tensor], Tensor | None]:
        """Attention of each block (B, K, K), and the tokens' grid indices (None: all, in order)."""
        ...


@runtime_checkable
class AttendsByPose(Protocol):
    """A backbone of video whose attention joints drive."""

    def attentions(self, clip: Any, /) -> tuple[Tensor, Tensor]:
        """Attention over space (B, h, w), each in 0 to 1, and over time (B, t), which sums to 1."""
        ...


def rollout(maps: list[Tensor]) -> Tensor:
    """The product (B, K, K) of all layers' attention.

    The residual connection of a layer is the identity, averaged with its attention.
    """
    identity = torch.eye(maps[0].shape[-1], device=maps[0].device)
    total = identity.expand_as(maps[0])
    for layer in maps:
        mixed = (layer + identity) / 2
        total = mixed / mixed.sum(-1, keepdim=True) @ total
    return total


def attention_on_grid(encoder: Attends, video: Tensor) -> dict[str, Tensor]:
    """Attention (B, t, h, w) from the class token, or the mean over all tokens.

    Args:
        encoder: in evaluation mode.
        video: normalised clips (B, C, T, H, W).

    Returns:
        "last layer" and "rollout"; each sums to one over the grid; zero for tokens that were not
        selected (`motion_tokens`).
    """
    maps, index = encoder.attention_maps(video)
    found = {}
    for name, weights in (("last layer", maps[-1]), ("rollout", rollout(maps))):
        if encoder.class_token is not None:
            seen = weights[:, 0, 1:]
        else:
            seen = weights.mean(1)
        seen = seen / seen.sum(1, keepdim=True)
        grid = torch.zeros(len(seen), math.prod(encoder.grid), device=seen.device)
        grid = seen if index is None else grid.scatter(1, index, seen)
        found[name] = grid.unflatten(1, encoder.grid)
    return found


def overlay(clip: Tensor, seen: Tensor) -> Tensor:
    """A clip, uint8 (C, T, H, W), under its map (t, h, w): grey at no attention, red at the most.

    The map is scaled so that its largest value is one, and enlarged to pixels without smoothing
    over time.
    """
    heat = F.interpolate(
        seen[None, None] / seen.max().clamp(min=1e-12), clip.shape[1:], mode="nearest"
    )[0, 0]
    grey = clip.float().mean(0, keepdim=True).expand(3, -1, -1, -1) * 0.6
    red = torch.tensor([255.0, 40.0, 0.0]).view(3, 1, 1, 1)
    return (grey * (1 - 0.7 * heat) + red * 0.7 * heat).round().clamp(0, 255).to(torch.uint8)
