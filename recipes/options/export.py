"""The flags of recipes/export.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pretrain.flags import Count
from pretrain.log import cli


@dataclass(frozen=True)
class Config:
    """Configuration of the export."""

    backbone: str
    """RUN/backbone of any recipe, hf:OWNER/NAME, hf:FOLDER, an official VideoMAE .pth file,
    open_clip:MODEL/WEIGHTS, or a name of python -m downstream.models."""
    to: Literal["onnx", "torch", "hf"]
    """onnx: model.onnx; torch: model.pt2 of torch.export; hf: a folder for the Hugging Face hub,
    with a model card, that --backbone hf:OWNER/NAME loads again."""
    out: str
    """The folder to write; it must not exist."""
    data: str = "synthetic:100"
    """Where the clips are from on which the export is compared with the model: as in the other
    recipes, best your own."""
    clips: Count = 100
    """Most clips to compare on, spread over the data."""
    weights: str | None = None
    """The file behind i3d_k400 and the like, or of a name of python -m downstream.models."""


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line and run the recipe's `main`."""
    cli(main, Config)
