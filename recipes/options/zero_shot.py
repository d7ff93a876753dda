"""The flags of recipes/zero_shot.py."""

from collections.abc import Callable
from dataclasses import dataclass

from pretrain.flags import Count, Seed
from pretrain.log import cli
from pretrain.settings import MACHINE, MachineFlags


@dataclass(frozen=True)
class Config:
    """Configuration of zero-shot classification; give --data or --video."""

    backbone: str
    """RUN/backbone of recipes/clip.py, starter (in the package), or open_clip:MODEL/WEIGHTS."""
    data: str | None = None
    """A packed folder, a folder of videos, a list file, tars, or `synthetic`: with labels."""
    video: str | None = None
    """A single video file, which needs --classes."""
    classes: str | None = None
    """Class names separated by commas, or a file: a name a line, or csv with label,text."""
    templates: str = "auto"
    """plain, vificlip, openai_kinetics, openai_ucf101, third_person, or a file with a template a
    line; auto: third_person if the data have texts for their classes (a class_text column), else
    openai_kinetics."""
    out: str | None = None
    """Results folder; by default zero-shot-DATA beside the backbone."""
    test_split: str = "test"
    """The split that is scored; "all" for everything."""
    num_clips: Count = 2
    """Views spread over the time of each clip."""
    num_crops: Count = 1
    """Views spread over the longer side of each."""
    seed: Seed = 0
    """Of the bootstrap."""
    batch_size: Count = 64
    """Views in one forward pass; changes speed and memory only."""
    machine: MachineFlags = MACHINE


def unused(config: Config) -> dict[str, str]:
    """Values that a single file leaves without effect, and why."""
    return (
        dict.fromkeys(("test_split", "seed", "decoder", "cache_gib"), "with --video")
        if config.video
        else {}
    )


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line and run the recipe's `main`."""
    cli(main, Config, unused)
