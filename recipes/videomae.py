"""VideoMAE: pretrain a video transformer by reconstructing what it did not see.

Tong et al. 2022, https://arxiv.org/abs/2203.12602; dual masking of VideoMAE V2,
https://arxiv.org/abs/2303.16727. Labels are never used for training; where there are any, a kNN score
on held-out subjects of the training split shows whether the features get better.

    python recipes/videomae.py                              the synthetic dataset
    python recipes/videomae.py --data my_videos/            your own clips
    python recipes/videomae.py shrec --data clips.csv       small clips, 2 CPU cores
    python recipes/videomae.py shrec_apart --data clips.csv --backbone RUN/backbone     the second of two steps
    accelerate launch --config_file launch/gpus.yaml recipes/videomae.py vit_b_k400 --data k400.csv

The first word chooses a preset, flags change single values, `--help` lists them. Starting the same
command again continues an interrupted run.
"""

import dataclasses
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import nn

from downstream.models import MODELS, load_backbone
from downstream.models import build_model as build_family
from downstream.monitor import online_knn
from pretrain import backbones, log
from pretrain.data.cache import open_data, packing_side, synthetic_clips
from pretrain.data.sampling import counter_rng
from pretrain.data.shards import Pack, TrainClips, warn_of_clips
from pretrain.data.transforms import Augment
from pretrain.figures import reconstruction_figure
from pretrain.files import is_folder
from pretrain.flags import (
    Count,
    Fraction,
    FractionBelowOne,
    NotNegative,
    OptionalCount,
    OptionalWhole,
    Positive,
    PositiveFraction,
    Seed,
    settle,
)
from pretrain.interop.videomae import import_videomae
from pretrain.loop import TrainingRun, plan_run
from pretrain.masked import MaskedPixels
from pretrain.names import did_you_mean, for_shell
from pretrain.optim import learning_rate, make_optimizers, set_rate, update
from pretrain.processes import is_first, start_accelerator
from pretrain.run import try_run
from pretrain.settings import MACHINE, RUN, MachineFlags, RunFlags
from pretrain.videomae import DECODERS, VideoMAE, draw_tokens, mask_of_view, start_from
from pretrain.views import ViewContrast
from pretrain.vit import SIZES, VITS, VideoTransformer


@dataclass(frozen=True)
class Config:
    """Pretrain by masked reconstruction."""

    preset: Annotated[str, tyro.conf.Suppress] = "tiny"

    # Data
    data: str = "synthetic"
    """A packed folder, a folder of videos, a list file, WebDataset tars, or "synthetic"."""
    split: str = "train"
    """The split to train on; "all" for everything. Data without splits are used whole."""
    out: str | None = None
    """The run's folder; by default runs/videomae-PRESET."""

    # Model
    model: str = "vit_ti"
    """The encoder: vit_xs to vit_h, whose hidden tokens cost nothing, or another name of python -m downstream.models
    (vivit_3, video_swin_t, i3d, ...), whose hidden tubelets are replaced by a mask token: every step costs a full pass."""
    small: bool = False
    """Of such another name: the small network, for minutes on a CPU, instead of the paper's."""
    depth: OptionalCount = None
    """Encoder blocks; by default as the size has them."""
    decoder_dim: OptionalCount = None
    """Decoder width, a multiple of 32; by default as published for the size."""
    decoder_depth: OptionalCount = None
    """Decoder blocks; by default as published for the size."""
    frames: OptionalCount = None
    """Frames of a clip; by default 16, or as another model of python -m downstream.models has it."""
    stride: Count = 4
    """Source frames between two sampled ones."""
    size: Count = 224
    """Height and width of a clip, pixels."""
    patch: Count = 16
    """Height and width of a tubelet, pixels."""
    tubelet: Count = 2
    """Frames of a tubelet."""
    positions: Literal["flat", "separable", "learned", "rotary"] = "flat"
    """flat, as published; separable in time, height and width, which learns sooner; learned; or rotary."""
    pool: Literal["mean", "class"] = "mean"
    """mean of the tokens, as published, or class: a class token."""
    init: Literal["xavier", "mimetic"] = "xavier"
    """xavier, as published, or mimetic: attention starts local, which learns much sooner."""
    motion_tokens: PositiveFraction = 1.0
    """Fraction of a clip's tokens that are encoded and predicted: those with the largest frame difference; 1: all."""
    backbone: str | None = None
    """Weights to start from: a backbone folder, a run, hf:OWNER/NAME or an official .pth."""

    # Objective
    mask: Literal["tube", "random", "frame"] = "tube"
    """Which tokens are hidden: the same patches in all frames, any tokens, or whole frames."""
    mask_ratio: FractionBelowOne = 0.9
    """Fraction of tokens hidden from the encoder."""
    dual_mask: bool = False
    """Decode only half of the hidden tokens (VideoMAE V2's running cell)."""
    target_eps: Positive = 1e-6
    """Added to a tubelet's standard deviation when targets are normalised; hundredths for plain backgrounds."""
    scales: tuple[PositiveFraction, ...] = (1.0, 0.875, 0.75, 0.66)
    """Sides of the random crop, as fractions of the short side."""
    views: Count = 1
    """Crops taken from one decode (repeated augmentation); each counts as a clip of the batch."""
    colour: Fraction = 0.0
    """Strength of random brightness, contrast and colour balance, each by up to this fraction."""
    contrast: NotNegative = 0.0
    """Weight of the contrast of mean tokens: the views of a clip against those of all others in the batch (CAN); 0:
    reconstruct only. Each view then draws its own frames, and a batch is one pass. Start it from a --backbone that
    reconstructs already."""

    # Optimisation
    epochs: Positive = 800
    """Passes over the data; a pass decodes every clip once and sees `views` crops of it."""
    steps: OptionalCount = None
    """Optimizer steps, instead of epochs."""
    batch_size: Count = 2048
    """Effective batch: clips in one optimizer step, over all devices and accumulation passes."""
    micro_batch: Count = 32
    """Most clips a device handles at once; the rest is accumulated."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, as published, or muon for the blocks' matrices: fewer steps where there is little time."""
    base_lr: Positive = 1.5e-4
    """Learning rate per 256 clips of effective batch."""
    final_lr: NotNegative = 1e-5
    """Where the cosine ends, per 256 clips likewise."""
    warmup: Fraction = 40 / 800
    """Fraction of the steps that warm up."""
    weight_decay: NotNegative = 0.05
    """The optimizer's, on matrices only."""
    beta2: FractionBelowOne = 0.95
    """AdamW's second beta; the first is 0.9."""
    clip_grad: NotNegative = 0.0
    """Largest gradient norm; 0: no clipping."""

    # Running
    seed: Seed = 0
    """Of weights, order, crops and masks."""
    compile: bool = False
    """torch.compile the model."""
    knn_every: OptionalWhole = None
    """Steps between online kNN scores; 0: only at the end; by default four in a run."""
    machine: MachineFlags = MACHINE
    run: RunFlags = RUN


# Nothing published: what learned most in little time, see the changelog on mimetic, muon and separable.
SHREC = Config(
    preset="shrec", small=True, depth=6, decoder_dim=96, decoder_depth=2, stride=2, size=48, patch=8,
    positions="separable", init="mimetic", mask="random", mask_ratio=0.9, dual_mask=True, target_eps=0.01,
    scales=(1.0, 0.95, 0.9), steps=3200, batch_size=32, micro_batch=32, optimizer="muon", base_lr=0.024,
    final_lr=2.4e-4, warmup=0.03, 
)  # fmt: skip
# For static backgrounds: only motion-selected tokens are encoded and predicted.
SHREC_MOVING = dataclasses.replace(
    SHREC, preset="shrec_moving", tubelet=4, init="xavier", motion_tokens=0.5, mask_ratio=0.75, dual_mask=False,
    batch_size=64, base_lr=0.016, final_lr=1.6e-4,
)  # fmt: skip
# The second step, from that one's backbone: clips that differ little are contrasted.
SHREC_APART = dataclasses.replace(
    SHREC_MOVING, preset="shrec_apart", contrast=0.3, views=2, colour=0.4, scales=(1.0, 0.9, 0.8), steps=500,
    batch_size=256, micro_batch=256, base_lr=0.006, weight_decay=0.5, 
)  # fmt: skip
TINY = dataclasses.replace(
    SHREC, preset="tiny", model="vit_xs", depth=4, decoder_dim=64, motion_tokens=0.375, mask_ratio=0.8,
    dual_mask=False, steps=400, batch_size=64, micro_batch=64, 
)  # fmt: skip
VIT_B_K400 = Config(
    preset="vit_b_k400",
    model="vit_b",
)
PRESETS = {
    "tiny": TINY,
    "shrec": SHREC,
    "shrec_moving": SHREC_MOVING,
    "shrec_apart": SHREC_APART,
    # As published (VideoMAE repository, scripts of each data set; section 4 of the paper).
    "vit_b_k400": VIT_B_K400,
    "vit_l_k400": dataclasses.replace(
        VIT_B_K400, preset="vit_l_k400", model="vit_l", epochs=1600, warmup=40 / 1600, batch_size=512
    ),
    "vit_b_ssv2": dataclasses.replace(
        VIT_B_K400, preset="vit_b_ssv2", stride=2, epochs=2400, warmup=40 / 2400
    ),
    "vit_b_ucf101": dataclasses.replace(
        VIT_B_K400, preset="vit_b_ucf101", mask_ratio=0.75, epochs=3200, warmup=40 / 3200, base_lr=3e-4,
        batch_size=192,
    ),
}  # fmt: skip

# A line a preset for --help.
ABOUT = {
    "tiny": "the synthetic dataset or any small data, minutes on two cores (the default)",
    "shrec": "clips of about two seconds and 50 pixels, such as SHREC'17, under 45 minutes on two cores",
    "shrec_moving": "such clips in two steps: this one, on motion-selected tokens,",
    "shrec_apart": "then this one, which contrasts clips, with --backbone runs/videomae-shrec_moving/backbone",
    "vit_b_k400": "ViT-B as published for Kinetics-400",
    "vit_l_k400": "ViT-L as published for Kinetics-400",
    "vit_b_ssv2": "ViT-B as published for Something-Something V2",
    "vit_b_ucf101": "ViT-B as published for UCF101",
}

# What says that something is not wanted: such a value is not without effect, also where nothing could be done.
OFF = {"small": False, "motion_tokens": 1.0, "dual_mask": False}


# ---------------------------------------------------------------------------------------- the step


def train_step(model, optimizers, batches, accumulate, accelerator, clip_grad, contrast):
    """One optimizer step over `accumulate` micro-batches; `contrast`: the model also takes the clip of each view.

    Returns:
        the mean loss of this process, the view-retrieval accuracy (None without `ViewContrast`), and the gradient
        norm over all processes; if that is not finite the weights were left alone.
    """
    total = torch.zeros((), device=accelerator.device)
    names = ("rgb", "visible", "masked", "clips") if contrast else ("rgb", "visible", "masked")
    for i in range(accumulate):
        batch = next(batches)
        tensors = [batch[name].to(accelerator.device, non_blocking=True) for name in names]
        last = i == accumulate - 1
        with nullcontext() if last else accelerator.no_sync(model):
            loss, second = model(*tensors)
            accelerator.backward(loss / accumulate)
        total += loss.detach() / accumulate
    # A prediction is freed: kept, it would lie beside the next step's.
    found = second.detach() if contrast else None
    return total, found, update(optimizers, model.parameters(), clip_grad)


# ------------------------------------------------------------------------------------- the pieces


def unused(cfg: Config) -> dict[str, str]:
    """Values that the encoder and the schedule chosen leave without effect, and why."""
    why: dict[str, str] = {}
    if cfg.model in MODELS and cfg.model not in VITS:
        names = [
            "depth",
            "decoder_dim",
            "decoder_depth",
            "positions",
            "pool",
            "init",
            "motion_tokens",
            "dual_mask",
        ]
        why |= dict.fromkeys(names, f"with --model {cfg.model}")
    else:
        why["small"] = f"with --model {cfg.model}"
        if cfg.backbone:
            why["init"] = f"with --backbone {cfg.backbone}, which has weights"
    if cfg.frames == 1:
        why["stride"] = "with --frames 1"
    if cfg.steps:
        why["epochs"] = f"with --steps {cfg.steps}"
    return {name: w for name, w in why.items() if getattr(cfg, name) != OFF.get(name)}


def build_model(cfg: Config) -> VideoMAE | MaskedPixels | ViewContrast:
    """What is trained, freshly initialised from the configuration's seed."""
    masked = build_masked(cfg)
    return ViewContrast(masked, cfg.views, cfg.contrast) if cfg.contrast else masked


def build_masked(cfg: Config) -> VideoMAE | MaskedPixels:
    """The encoder and what reconstructs."""
    if cfg.model not in MODELS:
        raise ValueError(
            f"--model {cfg.model!r} is not a name of python -m downstream.models{did_you_mean(cfg.model, MODELS)}"
        )
    if cfg.model not in VITS:
        return build_with_mask_token(cfg)
    size = VITS[cfg.model]
    dim, depth, heads = SIZES[size]
    decoder_dim, decoder_depth, decoder_heads = DECODERS[size]
    if cfg.decoder_dim:
        decoder_dim, decoder_heads = cfg.decoder_dim, max(cfg.decoder_dim // 32, 1)
    torch.manual_seed(cfg.seed)
    encoder = VideoTransformer(
        dim, cfg.depth or depth, heads, cfg.frames or 16, cfg.size, cfg.patch, cfg.tubelet, cfg.stride,
        positions=cfg.positions, init=cfg.init, motion_tokens=cfg.motion_tokens, pool=cfg.pool,
    )  # fmt: skip
    model = VideoMAE(
        encoder, decoder_dim, cfg.decoder_depth or decoder_depth, decoder_heads, cfg.target_eps
    )
    if cfg.backbone:
        start_from(model, load_start(cfg.backbone), cfg.backbone)
    return model


def build_with_mask_token(cfg: Config) -> MaskedPixels:
    """Any other family, freshly initialised: hidden tubelets are replaced by a mask token.

    Raises:
        ValueError: settings that belong to the plain video transformer.
    """
    if cfg.motion_tokens != 1 or cfg.dual_mask:
        raise ValueError(
            f"--model {cfg.model} sees the whole grid: give --motion-tokens 1 --no-dual-mask"
        )
    torch.manual_seed(cfg.seed)
    clip: dict[str, Any] = {"stride": cfg.stride, "size": cfg.size, "subtract_mean": False}
    clip |= {"frames": cfg.frames} if cfg.frames else {}
    encoder = build_family(cfg.model, small=cfg.small, weights=cfg.backbone or "", **clip)
    return MaskedPixels(encoder, cfg.tubelet, cfg.patch, cfg.target_eps)


def mask_grid(cfg: Config, model: VideoMAE | MaskedPixels) -> tuple[int, int, int]:
    """What masks are drawn over: the token grid, or the list of motion-selected tokens.

    Raises:
        ValueError: the mask is of a kind that needs the whole grid.
    """
    if isinstance(model, MaskedPixels):
        return model.grid
    encoder = model.encoder
    if encoder.num_motion_tokens == math.prod(encoder.grid):
        return model.grid
    if cfg.mask != "random":
        raise ValueError(
            f"a {cfg.mask} mask needs the whole grid and --motion-tokens {cfg.motion_tokens} leaves some tokens out: give "
            "--mask random"
        )
    return encoder.num_motion_tokens, 1, 1


def load_start(name: str) -> nn.Module:
    """What --backbone names: a run or published weights with their decoder, or a backbone."""
    if is_folder(Path(name) / "checkpoints"):
        return backbones.load_pretrained_videomae(Path(name))
    if name.startswith("hf:") or name.endswith((".pth", ".pt")):
        return import_videomae(name)[0]
    backbone = load_backbone(name)
    assert isinstance(backbone, nn.Module)
    return backbone


def print_plan(cfg: Config, run: TrainingRun, pack: Pack, model) -> None:
    """Print what the run resolved to, so that no number is applied silently."""
    parameters = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    spec = model.encoder.input_spec
    run.print_plan(
        f"VideoMAE {cfg.preset}",
        {
            "data": f"{run.plan.num_clips} clips of {pack.folder} ({cfg.split})",
            "model": f"{cfg.model}, {parameters:.1f} M parameters, {spec.frames} frames of {spec.size} "
            f"px, stride {spec.stride}",
            "mask": f"{cfg.mask} {cfg.mask_ratio:.0%}"
            + (", half of it predicted (dual masking)" if cfg.dual_mask else "")
            + (
                f", of the {cfg.motion_tokens:.0%} with the largest frame difference"
                if cfg.motion_tokens < 1
                else ""
            )
            + (
                f"; {cfg.views} views contrasted with other clips, weight {cfg.contrast:g}"
                if cfg.contrast
                else ""
            ),
            "learning rate": f"{cfg.base_lr:g} per 256 clips -> {run.plan.peak:g}, cosine to "
            f"{run.plan.final:g}",
        },
    )


@log.optional_figure
def draw_figure(path: Path, model: VideoMAE, cfg: Config, pack: Pack, sample: int) -> str:
    """Draw one clip, what the model saw of it and what it made of it."""
    rng = counter_rng(cfg.seed, 0, stream=4)
    tokens = draw_tokens(cfg.mask, mask_grid(cfg, model), cfg.mask_ratio, False, rng)
    title = f"VideoMAE {cfg.model} on {pack.record(sample)['source']}"
    mask = f"{cfg.mask} mask, {cfg.mask_ratio:.0%} hidden"
    return reconstruction_figure(path, model, pack, sample, tokens, title, mask)


# ------------------------------------------------------------------------------------------- main


def main(cfg: Config) -> dict:
    """Pretrain; returns the final step, loss, kNN score and counts."""
    cfg = settle(cfg, unused(cfg), PRESETS.get(cfg.preset))
    # ---- data: before the process group exists, since packing may take hours
    folder = Path(cfg.out or f"runs/videomae-{cfg.preset}")
    try_run(folder)
    pack = open_data(cfg.data, packing_side(cfg.size), say=is_first())
    ids = pack.split_if_any(cfg.split)

    # ---- processes
    accelerator = start_accelerator(cfg.machine)

    # ---- model and optimizer
    model = build_model(cfg)
    masked = model.masked if isinstance(model, ViewContrast) else model
    spec, grid = masked.encoder.input_spec, mask_grid(cfg, masked)
    draw_tokens(cfg.mask, grid, cfg.mask_ratio, cfg.dual_mask, counter_rng(0, 0))  # refuses early
    plan = plan_run(cfg, len(ids), accelerator.num_processes, cfg.views)
    if cfg.contrast and plan.accumulate > 1:
        raise ValueError(
            f"--contrast compares the clips of one pass and a batch of {cfg.batch_size} takes {plan.accumulate}: raise "
            f"--micro-batch, now {cfg.micro_batch}, or lower --batch-size"
        )
    fingerprint = pack.index["fingerprint"]
    with TrainingRun(folder, cfg, fingerprint, plan, accelerator, {"knn_every"}) as run:
        print_plan(cfg, run, pack, masked)
        if run.first:
            warn_of_clips(pack, ids, spec)
            if cfg.contrast and not cfg.backbone:
                print(
                    "note: --contrast without --backbone: from scratch it learned worse than from a backbone that reconstructs",
                    file=sys.stderr,
                )
        model.to(accelerator.device)
        optimizers = make_optimizers(cfg.optimizer, model, cfg.weight_decay, (0.9, cfg.beta2))
        run.restore(model, optimizers, {"loss": None, "knn": None, "knn_chance": None})

        # ---- loader and wrapper
        dataset = TrainClips(
            pack, ids, spec, cfg.seed, cfg.views, cfg.scales,
            mask_of_view(cfg.mask, grid, cfg.mask_ratio, cfg.dual_mask),
            Augment(colour=cfg.colour), spread=cfg.contrast > 0,
        )  # fmt: skip
        wrapped = accelerator.prepare_model(torch.compile(model) if cfg.compile else model)
        wrapped.train()  # what was loaded is in evaluation mode

        # ---- loop
        with run.batches(dataset) as batches:
            while run.unfinished:
                lr = learning_rate(run.step, plan.steps, plan.warmup, plan.peak, plan.final)
                set_rate(optimizers, lr)
                loss, found, norm = train_step(
                    wrapped, optimizers, batches, plan.accumulate, accelerator, cfg.clip_grad,
                    cfg.contrast > 0,
                )  # fmt: skip
                loss, *found = run.agree(norm, [loss] if found is None else [loss, found])
                values = {"loss": loss, "lr": lr, "grad_norm": norm}
                values |= {"view_retrieval_accuracy": found[0]} if found else {}
                if run.due(cfg.knn_every) and run.first:
                    knn = online_knn(masked.encoder, spec, pack, ids, cfg.seed, accelerator)
                    run.state |= dict(zip(("knn", "knn_chance"), knn or (None, None), strict=True))
                    values |= {name: run.state[name] for name in ("knn", "knn_chance") if knn}
                if run.log_due():
                    run.log(values, *progress(values, run.state))
                run.finish_step({"loss": loss})

        # ---- end
        if run.end():
            finish(cfg, masked, pack, ids, run)
        return run.state


def progress(values: dict, state: dict) -> tuple[str, str]:
    """What a person watches of a step, and the last kNN score."""
    text = f"loss {values['loss']:.4f}"
    if "view_retrieval_accuracy" in values:
        text += f"  view-retrieval accuracy {values['view_retrieval_accuracy']:.0%}"
    if state["knn"] is None:
        return text, ""
    score, chance = 100 * state["knn"], 100 * state["knn_chance"]
    return text, f"kNN {score:.1f} % (chance {chance:.1f} %)"


def finish(cfg: Config, model, pack: Pack, ids: np.ndarray, run: TrainingRun) -> None:
    """Export the backbone, draw the figure and say where everything is."""
    folder, state = run.folder, run.state
    scores = {"loss": state["loss"], "online_knn": state["knn"]}
    provenance = run.provenance("videomae", cfg.split) | scores
    backbones.export_backbone(model.encoder, folder / "backbone", provenance)
    picture = draw_figure(folder / "reconstruction.png", model, cfg, pack, int(ids[0]))
    curve = log.curve_figure(
        folder / "curve.png", folder / "log.jsonl", ("loss",), ("knn",),
        f"masked reconstruction, {cfg.model} on {cfg.data}, {len(ids)} clips: loss and online kNN",
    )  # fmt: skip
    data = cfg.data if synthetic_clips(cfg.data) else pack.folder
    run.print_done(
        {"backbone": folder / "backbone", "figure": picture, "curve": curve},
        f"python recipes/linear_probe.py --backbone {for_shell(folder / 'backbone')} --data {for_shell(data)}",
    )


if __name__ == "__main__":
    log.cli(main, PRESETS, unused, ABOUT)
