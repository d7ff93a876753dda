"""The flags of recipes/benchmark.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pretrain.flags import Count, OptionalPositive, Seed
from pretrain.log import cli


@dataclass(frozen=True)
class Config:
    """The quantity to measure."""

    what: Literal["all", "loader", "step", "frames", "decode", "stream"] = "all"
    """Which part; all: loader and step."""
    model: str = "vit_s"
    """Encoder size of the step: ti, s, b, l or h."""
    batch_size: Count = 4
    """Clips in a step."""
    rounds: Count = 5
    """Interleaved rounds; the median is shown."""
    peak: OptionalPositive = None
    """Of the step's device, TFLOP/s in the precision at hand, as its maker says: for MFU."""
    seed: Seed = 0
    """Of everything random."""
    out: str | None = None
    """A JSON file for the numbers; empty: only printed."""


def unused(cfg: Config) -> dict[str, str]:
    """Values that a part leaves without effect, and why."""
    flags = () if cfg.what in ("all", "step") else ("model", "batch_size", "peak")
    return dict.fromkeys(flags, f"with --what {cfg.what}")


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line and run the recipe's `main`."""
    cli(main, Config, unused)
