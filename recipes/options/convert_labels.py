"""The flags of recipes/convert_labels.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pretrain.flags import OptionalPositive
from pretrain.log import cli


@dataclass(frozen=True)
class Config:
    """Configuration of the conversion."""

    data: str
    """A file of annotations, or a list."""
    to: Literal["activitynet", "cvat", "labelstudio", "csv"]
    """The format to write."""
    out: str
    """The file to write; it must not exist."""
    fps: OptionalPositive = None
    """Frames a second of Label Studio's ranges (those of each video then)."""
    only_present: bool = False
    """Leave out videos that are not there."""


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line and run the recipe's `main`."""
    cli(main, Config)
