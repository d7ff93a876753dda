"""The flags of recipes/finetune.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from downstream.training import CHANGES, GIVEN, TRAINING, ChangesFlags, TrainingFlags, flags_of
from pretrain.flags import OptionalCount, Seed
from pretrain.log import cli
from pretrain.settings import JOINTS, MACHINE, RUN, JointFlags, MachineFlags, RunFlags


@dataclass(frozen=True)
class Config:
    """Train a classifier. What is None is as preset or model have it, unless its line says more."""

    preset: Annotated[str, tyro.conf.Suppress] = "tiny"

    # What to train
    model: str | None = None
    """A name of `python -m downstream.models`, from scratch or from --weights."""
    backbone: str | None = None
    """Instead: RUN/backbone, i3d_k400, hf:OWNER/NAME, a .pth or open_clip:MODEL/WEIGHTS."""
    weights: str | None = None
    """Of --model: imagenet, kinetics or a file, of a ViViT timm:NAME or open_clip:MODEL/WEIGHTS; of
    --backbone i3d_k400: the file."""
    stride: OptionalCount = None
    """Source frames between two sampled ones."""
    changes: ChangesFlags = CHANGES
    joints: JointFlags = JOINTS
    freeze: bool = False
    """Train the classifier and, in frame families, what follows the 2-D network; not the rest."""
    per_frame: bool = False
    """A label for every frame, from a column `segments` ("0-1.5 sit down; 2-4 stand up") or the
    clip's own."""

    # Data
    data: str = "synthetic:3600"
    """A packed folder, videos, a list file, WebDataset tars, or "synthetic": with labels."""
    train_split: str = "train"
    """The split to learn from."""
    test_split: str = "test"
    """The split that is scored, once, at the end."""
    leave_out: str | None = None
    """The subject whose videos are scored, after training on all others; splits are ignored."""
    val: Literal["auto", "hold-out", "off"] = "auto"
    """auto: the split "val" if there is one; hold-out: about a quarter of the training videos,
    subjects apart; off."""
    shots: OptionalCount = None
    """Training videos of each class, drawn; by default all."""
    out: str | None = None
    """The run's folder; by default runs/finetune-NAME."""

    # How to train
    seed: Seed = 0
    """Of weights, order, crops, augmentation and dropout."""
    val_every: OptionalCount = None
    """Steps between validations; by default an epoch, but at most 20 in a run."""
    training: TrainingFlags = GIVEN
    machine: MachineFlags = MACHINE
    run: RunFlags = RUN

    @property
    def name(self) -> str:
        """What is trained, as the user called it."""
        return self.model or self.backbone or ""

    @property
    def parts(self) -> tuple[str, str]:
        """Names of what is learned from and of what is scored."""
        who = self.leave_out
        return (self.train_split, self.test_split) if who is None else (f"all but {who}", who)


PRESETS = {
    "tiny": Config(),
    "paper": Config(preset="paper"),
    **{name: Config(preset=name, training=flags_of(t)) for name, t in TRAINING.items()},
}


ABOUT = {
    "tiny": "small clips and networks, 300 steps, minutes on two cores (the default)",
    "paper": "the first of the following that fits the backbone",
    **{name: training.about for name, training in TRAINING.items()},
}


def unused(cfg: Config) -> dict[str, str]:
    """Values that others leave without effect, and why."""
    given, one_view = cfg.training, "with --per-frame, which scores whole clips"
    reasons = (
        ("scales", "with --crop resized", given.crop == "resized"),
        ("drops", "with --schedule cosine", given.schedule == "cosine"),
        *((part, "with --leave-out", cfg.leave_out) for part in ("train_split", "test_split")),
        ("final_lr", "with --schedule step", given.schedule == "step"),
        ("epochs", f"with --steps {given.steps}", given.steps),
        ("val_every", "with --val off", cfg.val == "off"),
        ("patience", "with --val off", cfg.val == "off"),
        ("drop_path", "with --freeze: frozen blocks leave nothing out", cfg.freeze),
        ("num_clips", one_view, cfg.per_frame and (given.num_clips or 1) > 1),
        ("num_crops", one_view, cfg.per_frame and (given.num_crops or 1) > 1),
    )
    return {name: reason for name, reason, useless in reasons if useless}


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line and run the recipe's `main`."""
    cli(main, PRESETS, unused, ABOUT)
