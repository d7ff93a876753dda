"""The flags of recipes/fuse.py."""

from collections.abc import Callable
from dataclasses import dataclass

from pretrain.flags import Seed
from pretrain.log import cli


@dataclass(frozen=True)
class Config:
    """Configuration of late fusion."""

    results: tuple[str, ...]
    """Folders of two to six runs, such as runs/rgb runs/flow, or with a run for each fold."""
    out: str | None = None
    """Results folder; by default runs/fuse-NAMES."""
    seed: Seed = 0
    """Of the bootstrap."""


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line and run the recipe's `main`."""
    cli(main, Config)
