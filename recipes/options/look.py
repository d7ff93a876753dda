"""The flags of recipes/look.py."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pretrain.flags import Count, Positive, Within
from pretrain.log import cli
from pretrain.settings import MACHINE, MachineFlags


@dataclass(frozen=True)
class Config:
    """Configuration of the page."""

    data: str
    """A folder of videos, a list file, a single video, tars, a packed folder, or `synthetic`; may
    stand first, without the flag."""
    backbone: str | None = None
    """RUN/backbone of any recipe (of recipes/clip.py: with search by a sentence), or
    open_clip:MODEL/WEIGHTS, or what recipes/linear_probe.py takes; by default
    open_clip:ViT-B-32/laion2b_s34b_b79k, downloaded once, or without a network starter, which comes
    with the package."""
    out: str | None = None
    """Folder of labels.csv; by default runs/look-DATA."""
    source: str | None = None
    """Of a packed folder: the folder or list that it was made of, so that labels can name files."""
    labels: tuple[str, ...] = ()
    """Names of labels, in the order of the keys 1 to 9; more can be added on the page."""
    first: str | None = None
    """A csv with columns path, start and end, such as next.csv of recipes/fit.py: moments that the
    page offers to label first."""
    every: Positive = 4.0
    """Seconds of a moment, about: a clip is divided into equal parts."""
    num_crops: Count = 1
    """Views spread over the longer side of each moment; 3 see all of a wide picture."""
    port: Annotated[int, Within(0, 65535)] = 0
    """Of the page; 0: one that is free."""
    open: bool = True
    """Open the page in the browser, where there is a screen."""
    batch_size: Count = 64
    """Views in one forward pass; changes speed and memory only."""
    machine: MachineFlags = MACHINE


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line, of which --data may stand first, and run the recipe's `main`."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--data")
    cli(main, Config)
