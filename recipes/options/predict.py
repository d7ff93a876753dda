"""The flags of recipes/predict.py."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.files import is_folder
from pretrain.flags import Count, OptionalCount
from pretrain.log import cli
from pretrain.settings import MACHINE, MachineFlags


@dataclass(frozen=True)
class Config:
    """Configuration of prediction."""

    backbone: str
    """RUN/backbone of recipes/finetune.py or recipes/fit.py, a fine-tuned VideoMAE (hf:OWNER/NAME,
    hf:FOLDER or an official .pth), i3d_k400, or r3d_18_k400 and the like of torchvision."""
    video: str
    """A file, a folder of files, a list or a tar of them, or a pack."""
    weights: str | None = None
    """The file behind i3d_k400; of torchvision's networks, if not to be downloaded."""
    classes: str | None = None
    """Names of the classes in the order of the classifier, separated by commas, or a text file with
    one a line: an official .pth has none."""
    sampling: Literal["dense", "uniform"] | None = None
    """dense: frames at a stride; uniform: a frame of each equal part of a clip, as for VideoMAEs of
    Something-Something; by default what the weights record, else dense."""
    stride: OptionalCount = None
    """Source frames between two sampled ones, if not those that the weights record."""
    top_k: Count = 5
    """Labels shown for each file."""
    pose_weights: str = ""
    """Of a classifier of poses: weights that estimate them, as recipes/pack.py takes them."""
    out: str = "runs/predict"
    """Folder of the results; older results there are replaced, other files are refused."""
    num_clips: OptionalCount = None
    """Views spread over the time of each clip of at most 10 s; by default those of the fit of a
    classifier of recipes/fit.py, else 2."""
    num_crops: OptionalCount = None
    """Views spread over the longer side of each; likewise, else 1."""
    batch_size: Count = 16
    """Views in one forward pass; changes speed and memory only."""
    machine: MachineFlags = MACHINE


def unused(config: Config) -> dict[str, str]:
    """Values that sampling, or a classifier of frames, leaves without effect, and why."""
    from pretrain.backbones import folder_of, read_backbone_config  # loads torch

    why = dict.fromkeys(("decoder", "cache_gib"), "where single files are read")
    here = is_folder(config.backbone.removeprefix("hf:"))  # the hub is not asked for this
    folder = Path(folder_of(config.backbone) if here else config.backbone)
    if is_folder(folder) and read_backbone_config(folder)["arguments"].get("per_frame"):
        why |= dict.fromkeys(("num_clips", "num_crops", "batch_size"), "of a classifier of frames")
    if config.sampling == "uniform":
        why["stride"] = "with --sampling uniform"
    return {name: w for name, w in why.items() if name != "stride" or config.stride}


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line and run the recipe's `main`."""
    cli(main, Config, unused)
