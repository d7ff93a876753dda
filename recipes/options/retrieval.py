"""The flags of recipes/retrieval.py."""

from collections.abc import Callable
from dataclasses import dataclass

from pretrain.flags import Count
from pretrain.log import cli
from pretrain.settings import MACHINE, MachineFlags


@dataclass(frozen=True)
class Config:
    """Configuration of retrieval."""

    backbone: str
    """RUN/backbone of recipes/clip.py, starter (in the package), or open_clip:MODEL/WEIGHTS."""
    data: str
    """A packed folder, a folder of videos, a list file, tars, images, or `synthetic`."""
    query: str | None = None
    """A sentence: list the best videos instead of scoring."""
    top: Count = 12
    """How many of them."""
    out: str | None = None
    """Results folder; by default retrieval-DATA beside the backbone."""
    test_split: str = "test"
    """The split that is scored; "all" for everything. A search uses everything."""
    num_clips: Count = 2
    """Views spread over the time of each clip."""
    num_crops: Count = 1
    """Views spread over the longer side of each."""
    batch_size: Count = 64
    """Views in one forward pass; changes speed and memory only."""
    machine: MachineFlags = MACHINE


def unused(config: Config) -> dict[str, str]:
    """Values that searching, or scoring, leaves without effect, and why."""
    if config.query is None:
        return {"top": "without --query"}
    return {"test_split": "with --query, which searches everything"}


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line and run the recipe's `main`."""
    cli(main, Config, unused)
