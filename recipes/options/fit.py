"""The flags of recipes/fit.py."""

from collections.abc import Callable
from dataclasses import dataclass

from pretrain.flags import Count, OptionalCount, Seed, Whole
from pretrain.log import cli
from pretrain.settings import MACHINE, STARTER, MachineFlags


@dataclass(frozen=True)
class Config:
    """Configuration of a fit."""

    data: str
    """A list file, a folder of videos, a packed folder, tars, or `synthetic`: with some labels."""
    backbone: str = STARTER
    """RUN/backbone, starter (which comes with the package), hf:OWNER/NAME of a VideoMAE, an
    official VideoMAE .pth, open_clip:MODEL/WEIGHTS, or a name of python -m downstream.models."""
    out: str | None = None
    """Results folder; by default fit-DATA beside the backbone. An earlier fit there is replaced."""
    split: str = "all"
    """The split that is fitted on and cross-validated; all: every clip."""
    weights: str | None = None
    """Weights of a named model: imagenet, kinetics or a file; of i3d_k400: its file."""
    also_random_split: bool = False
    """Also say what a random split of the same videos would score, people and copies on both sides:
    no estimate for new people."""
    propose: Whole = 20
    """Clips without a label that are proposed to be labelled next."""
    num_clips: OptionalCount = None
    """Views spread over the time of each clip; by default as many as show all of most clips, at
    most 4."""
    num_crops: OptionalCount = None
    """Views spread over the longer side of each; by default 3 where pictures are not square."""
    time_segments: Whole = 4
    """Segments of a view's time that are averaged separately; 1: the mean token; 0: the backbone's
    own embedding."""
    seed: Seed = 0
    """Of the folds, the orders of labels and the bootstrap."""
    batch_size: Count = 64
    """Views in one forward pass; changes speed and memory only."""
    machine: MachineFlags = MACHINE


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line and run the recipe's `main`."""
    cli(main, Config)
