"""Augmentations that treat a clip as one thing: every frame gets the same."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """What is done to a training clip after its crop.

    Attributes:
        flip: mirror half of the clips left to right; not for texts or classes that know left from right.
        colour: strength of random brightness, contrast and colour balance, each by up to this share; 0: none.

    Raises:
        ValueError: a strength outside 0 to 1.
    """

    flip: bool = False
    colour: float = 0.0

    def __post_init__(self):
        if not 0 <= self.colour <= 1:
            raise ValueError(f"colour {self.colour} is not a strength between 0 and 1")

    def __call__(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """Augment one clip, uint8 (C, T, H, W); all randomness comes from `rng`."""
        if self.flip and rng.random() < 0.5:
            clip = clip.flip(-1)
        if self.colour:
            low, high = 1 - self.colour, 1 + self.colour
            contrast = rng.uniform(low, high) * rng.uniform(
                low, high, 3
            )  # of all, and of each channel
            brightness = 128 * self.colour * rng.uniform(-0.5, 0.5)
            # One product and one sum a value: each of the 256 values is looked up.
            values = np.arange(256)[None] - 128.0
            table = np.clip(values * contrast[:, None] + 128 + brightness, 0, 255).round()
            table = torch.from_numpy(table.astype(np.uint8))
            clip = torch.stack(
                [row[channel.int()] for row, channel in zip(table, clip, strict=True)]
            )
        return clip.contiguous()
