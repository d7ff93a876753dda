"""The flags of recipes/detect.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pretrain.flags import Count, Fraction, NotNegative, OptionalCount, Within
from pretrain.log import cli
from pretrain.settings import MACHINE, MachineFlags


@dataclass(frozen=True)
class Config:
    """Configuration of detection."""

    backbone: str
    """RUN/backbone of recipes/finetune.py, or another classifier that recipes/predict.py takes;
    with --text RUN/backbone of recipes/clip.py, or open_clip:MODEL/WEIGHTS."""
    video: tuple[str, ...]
    """Files, folders, lists or tars of raw videos, or packs."""
    text: tuple[str, ...] = ()
    """Sentences, each a class; or a file: a sentence a line, or csv with label,text."""
    background: tuple[str, ...] = ()
    """Classes (with --text: sentences) that compete with the others and are no events."""
    weights: str | None = None
    """The file behind i3d_k400; of torchvision's networks, if not to be downloaded."""
    classes: str | None = None
    """Names of the classes in the order of the classifier, as recipes/predict.py takes them."""
    truth: str | None = None
    """ActivityNet's JSON, or a table with columns video, start, end, label and perhaps split."""
    test_split: str = "test"
    """The split that is measured, where the videos have splits."""
    stride: OptionalCount = None
    """Source frames between two sampled ones, if not those that the weights record."""
    smooth: Annotated[float, Within(0, 60)] = 0.5
    """Seconds over which scores are averaged."""
    shortest: NotNegative = 0.2
    """Seconds; shorter events are left out."""
    threshold: Fraction | None = None
    """Of every class; by default chosen on validation videos, or 0.5 where there are none."""
    thresholds: str | None = None
    """Instead: thresholds.json of an earlier run, such as one with validation videos."""
    pose_weights: str = ""
    """Of a model of poses: weights that estimate them, as recipes/pack.py takes them."""
    out: str | None = None
    """Folder of the results, by default detect-VIDEO beside the backbone; older results there are
    replaced, other files are refused."""
    batch_size: Count = 8
    """Windows in one forward pass; changes speed and memory only."""
    machine: MachineFlags = MACHINE


def unused(config: Config) -> dict[str, str]:
    """Values that others leave without effect, and why."""
    why = dict.fromkeys(("decoder", "cache_gib"), "where single files are read")
    why |= dict.fromkeys(("weights", "classes"), "with --text") if config.text else {}
    return why | ({"threshold": "with --thresholds"} if config.thresholds else {})


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line and run the recipe's `main`."""
    cli(main, Config, unused)
