"""Masked reconstruction that keeps what the starting weights know.

Going on from weights by reconstruction alone forgets what they know (recipes/RESULTS.md).
Here the starting weights are kept beside as a teacher that sees the whole clip, and the tokens that
the encoder makes of the visible part are also held to the teacher's: Unmasked Teacher (Li et al.
2023, https://arxiv.org/abs/2303.16058), whose teacher is a CLIP model and whose encoder starts from
fresh weights; here the two start alike, and the pixels are reconstructed besides.

What is scored and exported lies between the starting weights and the trained ones: WiSE-FT
(Wortsman et al. 2022, https://arxiv.org/abs/2109.01903), which does it to fine-tuned classifiers.
"""

import copy
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.masked import MaskedPixels
from pretrain.videomae import VideoMAE


class Distilled(nn.Module):
    """What reconstructs, held to the tokens of the weights that it starts from.

    The teacher is no part of the module: neither optimizers nor checkpoints have it, processes do
    not shard it, and a run that goes on takes it from the starting weights again.

    Args:
        masked: what reconstructs, with the starting weights: its encoder is copied as the teacher.
        weight: of the distance, 1 - cosine of each token and the teacher's.
        share: of the trained weights in `between`.
    """

    started: Tensor

    def __init__(self, masked: VideoMAE | MaskedPixels, weight: float, share: float = 1.0):
        super().__init__()
        self.masked, self.weight, self.share = masked, weight, share
        self.teacher, self._digest = _frozen(masked.encoder), digest(masked.encoder)
        self.register_buffer("started", torch.tensor(self._digest))  # a checkpoint's, if it goes on
        self.arguments: dict[str, Any] = masked.arguments | {
            "distill": {"weight": weight} | ({"share": share} if share < 1 else {})
        }

    def forward(
        self, video: Tensor, visible: Tensor, masked: Tensor, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As the `forward` of what reconstructs, with `weight` times the distance in the loss."""
        loss, prediction, tokens = self.masked.rebuild(video, visible, masked, target)
        with torch.no_grad():
            known = self.masked.unmasked(self.teacher(video.device), video, visible)
        far = 1 - F.cosine_similarity(tokens.float(), known.float(), dim=-1).mean()
        return loss + self.weight * far, prediction

    @torch.no_grad()
    def between(self) -> nn.Module:
        """The encoder whose weights lie `share` of the way from the starting to the trained ones.

        So do the statistics of batch norm, which belong to neither then.
        """
        if self.share == 1:
            return self.masked.encoder
        encoder = copy.deepcopy(self.masked.encoder)
        weights = encoder.state_dict()
        device = next(iter(weights.values())).device
        for name, start in self.teacher(device).state_dict().items():
            if start.is_floating_point():
                weights[name].lerp_(start, 1 - self.share)
        return encoder

    def refuse_other_weights(self, name: str) -> None:
        """Raise ValueError where a run goes on from other starting weights, by their name."""
        if int(self.started) != self._digest:
            raise ValueError(
                f"--backbone {name} has other weights than when this run began, and --distill "
                "holds to them: put them back, or give another --out"
            )


def digest(module: nn.Module) -> int:
    """A checksum of a module's weights."""
    total = 0
    for name, value in sorted(module.state_dict().items()):
        total = zlib.crc32(value.detach().cpu().float().numpy().tobytes(), total)
        total = zlib.crc32(name.encode(), total)
    return total


def _frozen(encoder: nn.Module) -> Callable[[torch.device], Any]:
    """A copy that does not learn, as a function, which stays where modules are copied or moved."""
    kept = copy.deepcopy(encoder).eval().requires_grad_(False)
    return lambda device: kept.to(device)
