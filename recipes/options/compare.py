"""The flags of recipes/compare.py."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from downstream.training import Changes, Given
from pretrain.flags import Count, OptionalCount, OptionalSwitch, Positive, flat
from pretrain.log import cli
from pretrain.settings import MACHINE, JointForm, MachineFlags, RunSettings


@dataclass(frozen=True)
class Config:
    """Configuration of the comparison."""

    data: str = "synthetic:3600"
    """The data that new runs train on and are scored on; as recipes/finetune.py takes it, with
    labels."""
    models: str | None = None
    """Names of python -m downstream.models, separated by commas; `inflated:frame_mean` starts from
    another's weights."""
    backbones: tuple[str, ...] = ()
    """Trained backbones to fine-tune or probe beside them."""
    results: tuple[str, ...] = ()
    """Folders with results.json to put into the table as they are."""
    protocol: Literal["finetune", "probe"] = "finetune"
    """Train everything, or leave it frozen and fit a linear probe."""
    preset: Literal["tiny", "paper"] = "tiny"
    """Of recipes/finetune.py."""
    seeds: Count = 1
    """Runs of each model: seeds 0, 1, ..."""
    epochs: Positive | None = None
    """Passes over the training videos, the same for all; 0: the preset's."""
    steps: OptionalCount = None
    """Optimizer steps instead, the same for all."""
    size: OptionalCount = None
    """Height and width of the models' clips, pixels; 0: the preset's."""
    train_split: str = "train"
    """The training split."""
    test_split: str = "test"
    """The split that is scored."""
    flip: OptionalSwitch = None
    """Mirror half of the training clips; --no-flip where classes differ by left and right; by
    default as the preset has it."""
    num_clips: Count = 2
    """Test views spread over the time of each clip."""
    num_crops: Count = 1
    """Test views spread over the longer side of each."""
    machine: MachineFlags = MACHINE
    out: str = "runs/compare"
    """Where runs and tables go."""


# Flags that the recipes of the runs have and a comparison has not: it would have to be the same for
# all models.
OF_RUNS = dict.fromkeys(
    (
        *(f.name for group in (Changes, JointForm, Given, RunSettings) for f in fields(group)),
        "weights", "stride", "freeze", "per_frame", "val", "shots", "val_every", "leave_out",
        "leave_one_out", "also_random_split", "time_segments", "classifier", "attentive",
    ),
    "each run takes it from --preset of recipes/finetune.py, or has recipes/linear_probe.py's "
    "default. To set it, run these recipes yourself and show their folders with --results",
)  # fmt: skip


def unused(config: Config) -> dict[str, str]:
    """Flags that the others leave without effect, and why; see `pretrain.flags`."""
    run = (
        "data", "protocol", "preset", "seeds", "epochs", "steps", "size", "train_split",
        "test_split", "flip", "num_clips", "num_crops", *flat(config.machine),
    )  # fmt: skip
    if not config.models and not config.backbones:
        return dict.fromkeys(run, "where only --results are shown, as they are")
    if config.protocol == "probe":
        training = ("preset", "epochs", "steps", "size", "flip")
        return dict.fromkeys(training, "with --protocol probe, which trains nothing")
    why = {}
    if not config.models:
        why["size"] = "without --models: a backbone has its own"
    if config.steps:
        why["epochs"] = f"with --steps {config.steps}"
    return why


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line and run the recipe's `main`."""
    cli(main, Config, unused, elsewhere=OF_RUNS)
