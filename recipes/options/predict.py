"""The flags of recipes/predict.py."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pretrain.files import is_folder
from pretrain.flags import Count, Fraction, NotNegative, OptionalCount, Positive, Within
from pretrain.log import cli
from pretrain.settings import MACHINE, MachineFlags


@dataclass(frozen=True)
class Config:
    """Configuration of prediction."""

    backbone: str
    """RUN/backbone of recipes/finetune.py or recipes/fit.py, a fine-tuned VideoMAE (hf:OWNER/NAME,
    hf:FOLDER or an official .pth), i3d_k400, or r3d_18_k400 and the like of torchvision."""
    video: tuple[str, ...]
    """Files, folders of files, lists or tars of them, or packs; or a camera: rtsp://HOST/...,
    webcam, or webcam:1 of several. May stand first, without the flag."""
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
    bouts: bool = False
    """Of long files: instead what happens from when to when, as always of a camera."""
    threshold: Fraction = 0.5
    """Of bouts: a bout of a class lasts while its probability is at least this."""
    smooth: Annotated[float, Within(0, 60)] = 0.5
    """Of bouts: seconds over which probabilities are averaged."""
    shortest: NotNegative = 0.2
    """Of bouts: seconds; shorter ones are left out."""
    seconds: Positive | None = None
    """Of a camera: when to stop; by default at Ctrl-C."""
    pose_weights: str = ""
    """Of a classifier of poses: weights that estimate them, as recipes/pack.py takes them."""
    out: str | None = None
    """Folder of the results, by default predict-VIDEO beside the backbone; older results there are
    replaced, other files are refused. Of a camera a new folder, by default runs/live-TIME."""
    num_clips: OptionalCount = None
    """Views spread over the time of each clip of at most 10 s; by default those of the fit of a
    classifier of recipes/fit.py, else 2."""
    num_crops: OptionalCount = None
    """Views spread over the longer side of each; likewise, else 1."""
    batch_size: Count = 16
    """Views, of bouts windows, in one forward pass; changes speed and memory only."""
    machine: MachineFlags = MACHINE


def unused(config: Config) -> dict[str, str]:
    """Values that sampling, or a classifier of frames, leaves without effect, and why."""
    from pretrain.backbones import folder_of, read_backbone_config  # loads torch
    from pretrain.data.live import is_live

    why = dict.fromkeys(("decoder", "cache_gib"), "where single files are read")
    here = is_folder(config.backbone.removeprefix("hf:"))  # the hub is not asked for this
    folder = Path(folder_of(config.backbone) if here else config.backbone)
    if is_folder(folder) and read_backbone_config(folder)["arguments"].get("per_frame"):
        why |= dict.fromkeys(("num_clips", "num_crops", "batch_size"), "of a classifier of frames")
    if config.sampling == "uniform":
        why["stride"] = "with --sampling uniform"
    if any(map(is_live, config.video)):
        camera = ("top_k", "num_clips", "num_crops", "batch_size", "bouts", "pose_weights")
        why |= dict.fromkeys(camera, "of a camera")
    elif config.bouts:
        why |= dict.fromkeys(("top_k", "num_clips", "num_crops"), "with --bouts")
        why |= {"seconds": "where there is no camera"}
        why.pop("batch_size", None)
    else:
        why |= dict.fromkeys(("threshold", "smooth", "shortest"), "without --bouts")
        why |= {"seconds": "where there is no camera"}
    return {name: w for name, w in why.items() if name != "stride" or config.stride}


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line, of which --video may stand first, and run the recipe's `main`."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--video")
    cli(main, Config, unused)
