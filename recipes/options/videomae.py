"""The flags of recipes/videomae.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from pretrain import flags, settings
from pretrain.log import cli
from pretrain.presets import AUTO, idle_minutes, preset_of
from pretrain.settings import VITS


@dataclass(frozen=True)
class Config:
    """Pretrain by masked reconstruction."""

    preset: Annotated[str, tyro.conf.Suppress] = "tiny"
    given: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()  # flags that were typed
    reasons: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()  # of what auto chose
    minutes: flags.Positive = 20.0
    """Of the preset auto: how long training takes; the number of steps follows from it."""

    # Data
    data: str = "synthetic"
    """A packed folder, a folder of videos, a list file, WebDataset tars, or "synthetic"."""
    split: str = "train"
    """The split to train on; "all" for everything. Data without splits are used whole."""
    out: str | None = None
    """The run's folder; by default runs/videomae-PRESET, with -flow or -to-flow behind it where
    flow is seen, or the target."""

    # Model
    stream: Literal["rgb", "flow"] = "rgb"
    """What is seen: colour, or optical flow, which `pack.py --flow` adds."""
    target: Literal["rgb", "flow"] | None = None
    """What is reconstructed of the hidden tokens: by default what is seen; flow also from rgb."""
    model: str = "vit_ti"
    """The encoder: vit_xs to vit_h, whose hidden tokens cost nothing, or another name of
    python -m downstream.models (vivit_3, video_swin_t, i3d, ...), whose hidden tubelets are
    replaced by a mask token: every step costs a full pass."""
    small: bool = False
    """Of such another name: the small network, for minutes on a CPU, instead of the paper's."""
    backbone: str | None = None
    """Weights to start from: a backbone folder, a run, starter, hf:OWNER/NAME or an official
    .pth."""
    guard: bool | None = None
    """Stop where the features become worse than the best so far, and restore those (see
    --knn-every); by default with --backbone."""
    frames: flags.OptionalCount = None
    """Frames of a clip; by default 16, or as another model has it."""
    stride: flags.Count = 4
    """Source frames between two sampled ones."""
    size: flags.Count = 224
    """Height and width of a clip, pixels."""
    form: settings.FormFlags = settings.FORM
    pool: Literal["mean", "class"] = "mean"
    """mean of the tokens, as published, or class: a class token."""
    decoder_dim: flags.OptionalCount = None
    """Decoder width, a multiple of 32; by default as published for the size."""
    decoder_depth: flags.OptionalCount = None
    """Decoder blocks; by default as published for the size."""

    # Objective
    mask: Literal["tube", "random", "frame"] = "tube"
    """Which tokens are hidden: the same patches in all frames, any tokens, or whole frames."""
    mask_ratio: flags.FractionBelowOne = 0.9
    """Fraction of tokens hidden from the encoder."""
    dual_mask: bool = False
    """Decode only half of the hidden tokens (VideoMAE V2's running cell)."""
    target_eps: flags.Positive = 1e-6
    """Added to a tubelet's standard deviation when targets are normalised; hundredths for plain
    backgrounds."""
    scales: tuple[flags.PositiveFraction, ...] = (1.0, 0.875, 0.75, 0.66)
    """Sides of the random crop, as fractions of the short side."""
    views: flags.Count = 1
    """Crops taken from one decode (repeated augmentation); each counts as a clip of the batch."""
    colour: flags.Fraction = 0.0
    """Strength of random brightness, contrast and colour balance, each by up to this fraction."""
    contrast: flags.NotNegative = 0.0
    """Weight of the contrast of mean tokens: the views of a clip against those of all others in the
    batch (CAN); 0: none. Each view then draws its own frames, and a batch is one pass. Start it
    from a --backbone that reconstructs already."""
    sigreg: flags.NotNegative = 0.0
    """Weight of LeJEPA's loss, instead: views of a clip alike, all clips in a Gaussian cloud."""
    reconstruct: bool = True
    """Whether to reconstruct hidden tokens; without, --sigreg or --contrast is all that is
    learned, and no decoder runs."""

    distill: flags.NotNegative = 0.0
    """Weight of keeping what --backbone knows, beside reconstruction: tokens are held to those of
    the starting weights, which see the whole clip. 0: none, and they may be forgotten."""
    trained_share: flags.PositiveFraction = 1.0
    """With --distill: how far from the starting weights to the trained ones those lie that are
    scored and exported (WiSE-FT); 1: the trained ones."""

    # Running
    optim: settings.OptimFlags = settings.OPTIM
    seed: flags.Seed = 0
    """Of weights, order, crops and masks."""
    compile: bool = False
    """torch.compile the model."""
    knn_every: flags.OptionalWhole = None
    """Steps between online kNN scores; 0: only at the end; by default four in a run."""
    machine: settings.MachineFlags = settings.MACHINE
    run: settings.RunFlags = settings.RUN


# Nothing published: what learned most in little time, see the changelog.
SHREC = flags.replace(
    Config(), preset="shrec", small=True, stride=2, size=48, depth=6, patch=8, decoder_dim=96,
    decoder_depth=2, positions="separable", init="mimetic", mask="random", dual_mask=True,
    target_eps=0.01, scales=(1.0, 0.95, 0.9), steps=3200, batch_size=32, optimizer="muon",
    base_lr=0.024, final_lr=2.4e-4, warmup=0.03,
)  # fmt: skip
# For static backgrounds: only motion-selected tokens are encoded and predicted.
SHREC_MOVING = flags.replace(
    SHREC, preset="shrec_moving", tubelet=4, init="xavier", motion_tokens=0.5, mask_ratio=0.75,
    dual_mask=False, batch_size=64, base_lr=0.016, final_lr=1.6e-4,
)  # fmt: skip
# As published (VideoMAE repository, scripts of each data set; section 4 of the paper).
VIT_B_K400 = Config(preset="vit_b_k400", model="vit_b")
PRESETS = {
    # What it does not choose (pretrain/auto.py) is what learned most in little time elsewhere.
    AUTO: flags.replace(SHREC, preset=AUTO, steps=None, dual_mask=False),
    "tiny": flags.replace(
        SHREC, preset="tiny", model="vit_xs", depth=4, decoder_dim=64, motion_tokens=0.375,
        mask_ratio=0.8, dual_mask=False, steps=400, batch_size=64, micro_batch=64,
    ),
    "shrec": SHREC,
    "shrec_moving": SHREC_MOVING,
    # The second step, from that one's backbone: clips that differ little are contrasted.
    "shrec_apart": flags.replace(
        SHREC_MOVING, preset="shrec_apart", contrast=0.3, views=2, colour=0.4, steps=500,
        scales=(1.0, 0.9, 0.8), batch_size=256, micro_batch=256, base_lr=0.006, weight_decay=0.5,
    ),
    "vit_b_k400": VIT_B_K400,
    "vit_l_k400": flags.replace(
        VIT_B_K400, preset="vit_l_k400", model="vit_l", epochs=1600, warmup=40 / 1600,
        batch_size=512,
    ),
    "vit_b_ssv2": flags.replace(
        VIT_B_K400, preset="vit_b_ssv2", stride=2, epochs=2400, warmup=40 / 2400
    ),
    "vit_b_ucf101": flags.replace(
        VIT_B_K400, preset="vit_b_ucf101", mask_ratio=0.75, epochs=3200, warmup=40 / 3200,
        base_lr=3e-4, batch_size=192,
    ),
}  # fmt: skip

# A line a preset for --help.
ABOUT = {
    AUTO: "your own clips: chosen by what they are like, and printed (the default for --data)",
    "tiny": "the synthetic dataset or any small data, minutes on two cores (its default)",
    "shrec": "clips of two seconds and 50 pixels, such as SHREC'17, under 45 minutes on two cores",
    "shrec_moving": "such clips in two steps: this one, on motion-selected tokens,",
    "shrec_apart": "then this one, which contrasts clips, with the --backbone of that one",
    "vit_b_k400": "ViT-B as published for Kinetics-400",
    "vit_l_k400": "ViT-L as published for Kinetics-400",
    "vit_b_ssv2": "ViT-B as published for Something-Something V2",
    "vit_b_ucf101": "ViT-B as published for UCF101",
}

# What says that something is not wanted; such a value is never refused.
OFF = {
    "small": False, "motion_tokens": 1.0, "dual_mask": False, "colour": 0.0, "distill": 0.0,
    "trained_share": 1.0,
}  # fmt: skip


def unused(cfg: Config) -> dict[str, str]:
    """Values that the encoder and the schedule chosen leave without effect, and why."""
    why: dict[str, str] = {}
    if cfg.model in VITS:
        why["small"] = f"with --model {cfg.model}"
        if cfg.backbone:
            why["init"] = f"with --backbone {cfg.backbone}, which has weights"
    else:
        names = ("depth", "decoder_dim", "decoder_depth", "positions", "pool", "init")
        why |= dict.fromkeys((*names, "motion_tokens", "dual_mask"), f"with --model {cfg.model}")
    if cfg.target == "flow":  # its tubelets are not normalised
        why["target_eps"] = "with --target flow"
    if cfg.stream == "flow":  # nor have they colours
        why |= dict.fromkeys(("target_eps", "colour"), "with --stream flow")
    if cfg.frames == 1:
        why["stride"] = "with --frames 1"
    if not cfg.reconstruct:
        decodes = ("target", "target_eps", "decoder_dim", "decoder_depth", "dual_mask")
        why |= dict.fromkeys(decodes, "with --no-reconstruct")
    if not cfg.backbone and (cfg.preset != AUTO or "backbone" in cfg.given):  # auto may start so
        why["distill"] = "without --backbone, whose weights it holds to"
    alone = cfg.reconstruct and not (cfg.contrast or cfg.sigreg)
    if not alone:
        compared = "contrast" if cfg.contrast else "sigreg" if cfg.sigreg else "no_reconstruct"
        why["distill"] = f"with {flags.flag(compared)}: it goes with reconstruction alone"
    may_hold = alone and cfg.preset == AUTO and "distill" not in cfg.given
    if not (cfg.distill or may_hold):
        why["trained_share"] = "without --distill"
    if cfg.optim.steps:
        why["epochs"] = f"with --steps {cfg.optim.steps}"
    why |= idle_minutes(cfg)
    given = flags.flat(cfg)
    return {name: w for name, w in why.items() if given[name] != OFF.get(name)}


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line and run the recipe's `main`."""
    cli(main, PRESETS, unused, ABOUT, preset_of=preset_of)
