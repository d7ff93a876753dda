"""Settings that recipes have under the same flags.

Of the machine and of a training run; of pretraining also the optimisation and the form of a video
transformer. A configuration holds them as groups whose flags have no prefix:
`machine: MachineFlags = MACHINE`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from pretrain.flags import (
    Count,
    Fraction,
    FractionBelowOne,
    NotNegative,
    OptionalCount,
    OptionalPositive,
    OptionalWhole,
    Positive,
    PositiveFraction,
)

# width, depth, heads: Ti, S, B, L of ViT/DeiT; H of VideoMAE; XS is ours, for minutes on a CPU.
SIZES = {
    "xs": (128, 4, 4),
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "h": (1280, 32, 16),
}
VITS = {f"vit_{size}": size for size in SIZES}  # as recipes and `downstream.models` name them

# A --backbone: a small video-text pair that comes with the package, trained on the synthetic
# dataset; its card is pretrain/starter/CARD.md.
STARTER = "starter"


@dataclass(frozen=True)
class Machine:
    """How a recipe uses the machine."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the device has it, else fp32."""
    num_workers: OptionalWhole = None
    """Decoding processes of each process; 0: decode in between; by default up to 8 beside a GPU,
    and on the CPU none in training, one in evaluation."""
    threads: OptionalCount = None
    """CPU threads of each process; by default OMP_NUM_THREADS, or all cores; of a launch all cores,
    shared by the processes."""
    decoder: Literal["pyav", "decord", "torchcodec"] | None = None
    """What decodes frames, to the same bits; by default pyav, the fastest wherever it was measured
    (benchmark.py --what decode)."""
    cache_gib: OptionalPositive = None
    """Most of data far away (s3://, gs://, https://, hf://) that is kept here, GiB; by default 16.
    It decides no number."""


@dataclass(frozen=True)
class RunSettings:
    """How a training run is kept: it decides no number and may change when a run is continued."""

    resume: bool = False
    """Insist on continuing: an error if the run's folder holds no checkpoint."""
    save_every: Count = 200
    """Steps between checkpoints."""
    async_save: bool = False
    """Write checkpoints in the background, while training goes on: a save stops it only for a copy
    in the machine's memory, which with AdamW has 12 bytes a parameter, of a sharded model each
    process's part of them."""
    log_seconds: NotNegative = 10.0
    """Seconds between progress lines."""
    max_bad_clips: Fraction = 0.01
    """Fraction of undecodable clips that stops the run."""
    checkpoint_blocks: bool = False
    """Gradient checkpointing: of a transformer's blocks only the inputs are kept, and the rest is
    computed again in the backward pass. Less memory, about a third more work, the same numbers."""
    track: Literal["tensorboard", "wandb", "trackio", "mlflow"] | None = None
    """Also hand scalars, figures and configuration to a tracker. Nothing leaves this machine unless
    WANDB_MODE=online, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL or MLFLOW_TRACKING_URI says so."""


@dataclass(frozen=True)
class Form:
    """How a video transformer, vit_xs to vit_h, is built."""

    depth: OptionalCount = None
    """Blocks; by default as the size has them."""
    patch: Count = 16
    """Height and width of a tubelet, pixels."""
    tubelet: Count = 2
    """Frames of a tubelet; 1 for images."""
    positions: Literal["flat", "separable", "learned", "rotary"] = "flat"
    """flat, as published; separable in time, height and width, which learns sooner; learned; or
    rotary."""
    init: Literal["xavier", "mimetic"] = "xavier"
    """xavier, as published, or mimetic: attention starts local, which learns much sooner."""
    motion_tokens: PositiveFraction = 1.0
    """Fraction of the tokens that are used: those with the largest frame difference; 1: all."""


@dataclass(frozen=True)
class JointForm:
    """Which joints a network takes; None: as its family has them."""

    skeleton: str | None = None
    """Of a network of joints: a name of pretrain/data/poses.py, such as kinect25 or coco17."""
    coordinates: OptionalCount = None
    """Likewise: 2 (pixels) or 3 (metres) of a joint."""
    people: OptionalCount = None
    """Likewise: in a frame."""

    def given(self) -> dict[str, Any]:
        """Those that were given, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Optimisation:
    """The schedule and the optimizer of pretraining; what is published of VideoMAE unless given."""

    epochs: Positive = 800
    """Passes over the data; a pass decodes every clip once."""
    steps: OptionalCount = None
    """Optimizer steps, instead of epochs."""
    batch_size: Count = 2048
    """Effective batch: clips in one optimizer step, over all devices and passes."""
    micro_batch: Count = 32
    """Most clips a device handles at once; a larger batch takes several passes."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, as published, or muon for the blocks' matrices, for fewer steps in little time."""
    base_lr: Positive = 1.5e-4
    """Learning rate per 256 clips of effective batch."""
    final_lr: NotNegative = 1e-5
    """Where the cosine ends, per 256 clips likewise."""
    warmup: Fraction = 40 / 800
    """Fraction of the steps that warm up."""
    weight_decay: NotNegative = 0.05
    """The optimizer's, on matrices only."""
    layer_decay: PositiveFraction = 1.0
    """Learning rate of an encoder's layer over that of the layer after it (BEiT): below 1, its
    first layers are moved least, for going on from a --backbone; 1: all alike."""
    beta2: FractionBelowOne = 0.95
    """AdamW's second beta; the first is 0.9."""
    clip_grad: NotNegative = 0.0
    """Largest gradient norm; 0: no clipping."""

    @property
    def betas(self) -> tuple[float, float]:
        """AdamW's."""
        return 0.9, self.beta2


FormFlags = Annotated[Form, tyro.conf.arg(name="")]
JointFlags = Annotated[JointForm, tyro.conf.arg(name="")]
OptimFlags = Annotated[Optimisation, tyro.conf.arg(name="")]
MachineFlags = Annotated[Machine, tyro.conf.arg(name="")]
RunFlags = Annotated[RunSettings, tyro.conf.arg(name="")]
MACHINE, RUN, FORM, JOINTS, OPTIM = Machine(), RunSettings(), Form(), JointForm(), Optimisation()
