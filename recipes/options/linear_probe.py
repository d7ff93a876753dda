"""The flags of recipes/linear_probe.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pretrain.flags import Count, OptionalCount, Seed, Whole
from pretrain.log import cli
from pretrain.settings import MACHINE, MachineFlags


@dataclass(frozen=True)
class Config:
    """Configuration of the probe."""

    backbone: str
    """RUN/backbone, starter (in the package), hf:OWNER/NAME of a VideoMAE, an official .pth of one,
    open_clip:MODEL/WEIGHTS, i3d_k400, or a name of python -m downstream.models."""
    data: str
    """A packed folder, a folder of videos, a list file, tars, or `synthetic`: with labels."""
    out: str | None = None
    """Results folder; by default probe-DATA beside the backbone."""
    weights: str | None = None
    """Weights of a named model: imagenet, kinetics or a file; of i3d_k400: its file."""
    train_split: str = "train"
    """The split that the classifiers are fitted on."""
    test_split: str = "test"
    """The split that is scored, once."""
    leave_one_out: bool = False
    """Leave one subject out: test each with probes fitted on all others and pool the predictions;
    splits are ignored."""
    also_random_split: bool = False
    """Also say what the same features would score if the same videos were split at random, which is
    no estimate for new people: it shows how much people and copies on both sides would add."""
    num_clips: OptionalCount = None
    """Views spread over the time of each clip; by default as many as show all of most clips, at
    most 4."""
    num_crops: OptionalCount = None
    """Views spread over the longer side of each; by default 3 where pictures are not square."""
    time_segments: Whole = 4
    """Segments of a view's time that are averaged separately; 1: the mean token; 0: the backbone's
    own embedding."""
    classifier: Literal["logistic", "svm"] = "logistic"
    """Multinomial logistic regression, or a linear support vector machine, the classic on frame
    descriptors."""
    attentive: Literal["auto", "on", "off"] = "auto"
    """The attentive probe; auto: if the tokens take no more than 4 GiB of disk."""
    seed: Seed = 0
    """Of the random backbone, the validation folds and the bootstrap."""
    batch_size: Count = 64
    """Views in one forward pass; changes speed and memory only."""
    machine: MachineFlags = MACHINE


def unused(config: Config) -> dict[str, str]:
    """Values without effect under --leave-one-out, and why."""
    flags = ("train_split", "test_split")
    return dict.fromkeys(flags, "with --leave-one-out") if config.leave_one_out else {}


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line and run the recipe's `main`."""
    cli(main, Config, unused)
