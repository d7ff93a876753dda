"""Settings that every recipe has under the same flags: of the machine, and of a training run.

A configuration holds them as groups whose flags have no prefix: `machine: MachineFlags = MACHINE`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from pretrain.flags import Count, Fraction, NotNegative, OptionalCount, OptionalWhole


@dataclass(frozen=True)
class Machine:
    """How a recipe uses the machine."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the device has it, else fp32."""
    num_workers: OptionalWhole = None
    """Decoding processes of each process; 0: decode in between; by default up to 8 beside a GPU, and on the CPU none in
    training, one in evaluation."""
    threads: OptionalCount = None
    """CPU threads of each process; by default all cores, shared by the processes."""


@dataclass(frozen=True)
class RunSettings:
    """How a training run is kept; none of it decides a number, so all of it may change when a run is continued."""

    resume: bool = False
    """Insist on continuing: an error if the run's folder holds no checkpoint."""
    save_every: Count = 200
    """Steps between checkpoints."""
    log_seconds: NotNegative = 10.0
    """Seconds between progress lines."""
    max_bad_clips: Fraction = 0.01
    """Fraction of undecodable clips that stops the run."""
    tensorboard: bool = False
    """Also write TensorBoard event files."""


MachineFlags = Annotated[Machine, tyro.conf.arg(name="")]
RunFlags = Annotated[RunSettings, tyro.conf.arg(name="")]
MACHINE, RUN = Machine(), RunSettings()
