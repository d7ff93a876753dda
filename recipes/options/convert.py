"""The flags of recipes/convert.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pretrain.flags import Count
from pretrain.log import cli


@dataclass(frozen=True)
class Config:
    """Configuration of the conversion."""

    source: str
    """A run, RUN/backbone, hf:OWNER/NAME, hf:FOLDER, or an official .pth file."""
    to: Literal["hf", "official", "ours"]
    """hf: a folder for transformers; official: a .pth file; ours: a backbone folder (encoder
    only)."""
    out: str
    """The folder or file to write; it must not exist."""
    frames: Count | None = None
    """Frames of a clip, where an official file does not record them (16 then)."""
    size: Count | None = None
    """Height and width of a clip in pixels, likewise (224 then)."""
    heads: Count | None = None
    """Attention heads of the encoder, likewise (by its width then)."""
    decoder_heads: Count | None = None
    """Attention heads of the decoder, likewise."""


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line and run the recipe's `main`."""
    cli(main, Config)
