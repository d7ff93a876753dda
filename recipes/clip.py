"""Video-text contrast: train a video tower and a text tower to meet in one space.

CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020) for clips and their captions: the result is
prompted with class names (recipes/zero_shot.py), searched (recipes/retrieval.py) or probed.

    python recipes/clip.py                                      the synthetic dataset
    python recipes/clip.py --data clips.csv                     your own, with a caption column
    python recipes/clip.py motion --data clips.csv              people in front of static backgrounds
    python recipes/clip.py photos --data images.csv             image-text, from scratch
    python recipes/clip.py --data clips.csv photos.csv --data-weights 3 1    a mixture
    python recipes/clip.py --backbone runs/videomae-tiny/backbone       from a VideoMAE
    accelerate launch --config_file launch/gpus.yaml recipes/clip.py vificlip_b16 --data k400.csv

The first word chooses a preset, flags change single values, `--help` lists them. Starting the same
command again continues an interrupted run. Batches larger than --micro-batch cost a second forward pass
and no memory; loss and gradients are those of the whole batch (cached gradients).
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn

from downstream.models import MODELS, load_backbone
from downstream.models import build_model as build_family
from downstream.models.frames import FrameNetwork, frame_tower
from downstream.monitor import online_retrieval
from downstream.pairs import (
    AgainstClasses,
    TextOfView,
    Texts,
    class_prompts,
    clips_with_text,
    micro_batch,
)
from pretrain import backbones, log
from pretrain.clip import (
    VideoText,
    backward_classes,
    backward_step,
    contrast,
    has_batch_norm,
    sits_at_chance,
)
from pretrain.data.cache import open_data, packing_side, synthetic_clips
from pretrain.data.sampling import counter_rng
from pretrain.data.shards import Mixture, Pack, TrainClips, batch_counts, warn_of_clips
from pretrain.data.transforms import Augment
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
from pretrain.interop.openclip import MEAN as CLIP_MEAN
from pretrain.interop.openclip import PREFIX as OPEN_CLIP
from pretrain.interop.openclip import STD as CLIP_STD
from pretrain.interop.openclip import Pair, is_trained, load_open_clip
from pretrain.loop import Plan, TrainingRun, plan_run
from pretrain.names import did_you_mean, for_shell
from pretrain.optim import counting_rate, learning_rate, make_optimizers, set_rate, update
from pretrain.processes import is_first, start_accelerator
from pretrain.run import try_run
from pretrain.settings import MACHINE, RUN, MachineFlags, RunFlags
from pretrain.spec import Backbone, Selective
from pretrain.text import HuggingFaceText, OpenClipText, TextTower, fresh_text
from pretrain.vit import SIZES, VITS, VideoTransformer
from pretrain.weights import load_strict


@dataclass(frozen=True)
class Config:
    """Pretrain by contrasting videos with their captions."""

    preset: Annotated[str, tyro.conf.Suppress] = "tiny"

    # Data
    data: tuple[str, ...] = ("synthetic",)
    """One source or several to mix: packs, folders, lists, tars, or "synthetic"; with captions."""
    data_weights: tuple[Positive, ...] | None = None
    """Weight of each source in every batch; by default their numbers of clips."""
    split: str = "train"
    """The split to train on; "all" for everything. Data without splits are used whole."""
    text: Literal["caption", "label"] = "caption"
    """What a clip is paired with: one of its captions, or its class name in one of --templates."""
    templates: str = "plain"
    """Prompt templates for --text label: plain, vificlip, openai_kinetics, openai_ucf101 or a file."""
    out: str | None = None
    """The run's folder; by default runs/clip-PRESET."""

    # Model
    model: str = "vit_ti"
    """The video tower: vit_xs to vit_h; frames:vit_xs to frames:vit_h, an image ViT on frames; open_clip:MODEL/WEIGHTS; or a
    name of python -m downstream.models, such as i3d or lstm."""
    small: bool = False
    """Of such a name: the small network, for minutes on a CPU, instead of the paper's."""
    backbone: str | None = None
    """Weights of the video tower: a backbone folder, hf:OWNER/NAME, an official VideoMAE .pth or what else is a backbone."""
    text_model: str | None = None
    """The text tower: xs, ti, s, b, open_clip:MODEL/WEIGHTS or hf:NAME; by default the pair's own for open_clip, else ti."""
    dim: Count = 256
    """Width of the joint space."""
    pool: Literal["mean", "max", "attention", "temporal"] = "mean"
    """How the frames of an image tower are pooled; temporal: by a transformer over them."""
    pixels: Literal["tower", "imagenet"] = "tower"
    """How an open_clip tower's pixels are normalised and scaled: as it was trained, or by ImageNet's mean, bilinearly."""
    depth: OptionalCount = None
    """Blocks of a fresh video tower; by default as the size has them."""
    frames: OptionalCount = None
    """Frames of a clip, 1 for images; by default 16, or as a model of python -m downstream.models has it."""
    stride: Count = 4
    """Source frames between two sampled ones."""
    sampling: Literal["dense", "uniform"] = "dense"
    """dense: frames at a stride; uniform: a frame of each of --frames equal parts of the clip (TSN)."""
    size: Count = 224
    """Height and width of a clip, pixels; open_clip towers have their own."""
    patch: Count = 16
    """Height and width of a patch, pixels."""
    tubelet: Count = 2
    """Frames of a tubelet; 1 for images."""
    positions: Literal["flat", "separable", "learned", "rotary"] = "flat"
    """flat, as published, or separable in time, height and width, which learns sooner."""
    init: Literal["xavier", "mimetic"] = "xavier"
    """xavier, as published, or mimetic: attention starts local, which learns much sooner."""
    motion_tokens: PositiveFraction = 1.0
    """Fraction of a clip's tokens that the video transformer encodes: those with the largest frame difference; 1: all."""

    # Objective
    loss: Literal["infonce", "siglip", "classes"] = "infonce"
    """infonce (CLIP), siglip, or classes: every clip against the prompts of all classes, which leaves the embeddings of
    words alone (ViFi-CLIP); with --text label."""
    positives: Literal["pair", "caption", "label"] = "pair"
    """Which texts of a batch are positives of a clip: its own; all equal ones; all of its class."""
    drop_tokens: FractionBelowOne = 0.0
    """Fraction of video tokens (of those that --motion-tokens leaves) left out while training (FLIP)."""
    trim_text: bool = True
    """Cut a batch's token rows to its longest caption: the same numbers, sooner."""
    scales: tuple[PositiveFraction, ...] = (1.0, 0.9, 0.8)
    """Sides of the random crop, as fractions of the short side."""
    flip: bool = False
    """Mirror half of the clips; not where texts say left or right."""
    colour: Fraction = 0.0
    """Strength of random brightness, contrast and colour balance, 0 to 1."""
    jitter: Fraction = 0.0
    """Fraction of the clips whose frames get random colours, each its own, as ViFi-CLIP does."""
    grey: Fraction = 0.0
    """Fraction of the clips turned grey."""
    smoothing: FractionBelowOne = 0.0
    """Of --loss classes: fraction of every target spread over all classes."""
    mixup: NotNegative = 0.0
    """Of --loss classes: alpha of mixup; 0: off."""
    cutmix: NotNegative = 0.0
    """Of --loss classes: alpha of cutmix; 0: off."""

    # Optimisation
    epochs: Positive = 32
    """Passes over the data."""
    steps: OptionalCount = None
    """Optimizer steps, instead of epochs."""
    batch_size: Count = 1024
    """Effective batch: clips that are contrasted with each other, over all devices."""
    micro_batch: Count = 64
    """Most clips a device handles at once; beyond it, cached gradients."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, as published, or muon for the blocks' matrices: fewer steps where there is little time."""
    base_lr: Positive = 1.25e-4
    """Learning rate per 256 clips of effective batch."""
    final_lr: NotNegative = 0.0
    """Where the cosine ends, per 256 clips likewise."""
    warmup: Fraction = 0.06
    """Fraction of the steps that warm up."""
    schedule: Literal["cosine", "counting"] = "cosine"
    """cosine: from the peak, after the warm-up; counting: it counted while that lasted, as timm's and ViFi-CLIP's."""
    weight_decay: NotNegative = 0.2
    """The optimizer's, on matrices only."""
    beta2: FractionBelowOne = 0.98
    """AdamW's second beta; the first is 0.9."""
    clip_grad: NotNegative = 0.0
    """Largest gradient norm; 0: no clipping."""

    # Running
    seed: Seed = 0
    """Of weights, order, crops, captions and dropped tokens."""
    val_every: OptionalWhole = None
    """Steps between retrieval scores on the split "val", if there is one; 0: only at the end; by default four in a run."""
    machine: MachineFlags = MACHINE
    run: RunFlags = RUN


# Nothing published: what learned most in little time on two cores, see the changelog.
TINY = Config(
    data=("synthetic:3600",), model="vit_xs", small=True, text_model="xs", dim=128, stride=2, size=48, patch=8,
    positions="separable", init="mimetic", motion_tokens=0.375, drop_tokens=0.33, positives="label", flip=True,
    colour=0.4, scales=(1.0, 0.93, 0.86, 0.8), steps=1700, batch_size=64, micro_batch=64, optimizer="muon",
    base_lr=0.016, warmup=0.03, weight_decay=0.05, beta2=0.95, clip_grad=1.0, 
    
)  # fmt: skip
# People in front of static backgrounds: frames in slow fusion, mean frame subtracted, regularised by a
# strong decay. Little but the actions is left to meet by, so captions are enough.
MOTION = dataclasses.replace(
    TINY, preset="motion", model="frame_slow", frames=14, motion_tokens=1.0, drop_tokens=0.0, positives="caption",
    weight_decay=4.0, steps=1900,
)  # fmt: skip
PRESETS = {
    "tiny": TINY,
    "motion": MOTION,
    "photos": dataclasses.replace(TINY, preset="photos", frames=1, tubelet=1, size=64, motion_tokens=1.0, drop_tokens=0.0),
    # ViFi-CLIP (Rasheed et al. 2022, arXiv:2212.03640), a whole CLIP fine-tuned on labels: its repository's
    # configs/zero_shot/train/k400/16_16_vifi_clip.yaml (32 frames, batch 256, 8e-6, 10 epochs) over utils/config.py (5
    # epochs of warm-up, decay 0.001, smoothing, mixup, cutmix, colour 0.8, grey 0.2), utils/optimizer.py (beta2, a
    # hundredth at the end, the cosine that counts on), datasets/build.py (uniform sampling, scales, flip, ImageNet's
    # pixels) and trainers/vificlip.py (prompt, loss, word embeddings that stay). Other than published are: the crop has 13
    # places (5), vectors do not decay (all do), the half precision is bf16 (fp16), clips are mixed with that at their
    # mirrored place (with any), and of clips of fewer than 32 frames only the first is seen.
    "vificlip_b16": Config(
        preset="vificlip_b16", model="open_clip:ViT-B-16/openai", text="label", templates="vificlip", pixels="imagenet",
        frames=32, sampling="uniform", loss="classes", smoothing=0.1, mixup=0.8, cutmix=1.0, scales=(1.0, 0.875, 0.75, 0.66), flip=True,
        jitter=0.8, grey=0.2, epochs=10, warmup=0.5, schedule="counting", batch_size=256, micro_batch=8, base_lr=8e-6,
        final_lr=8e-8, weight_decay=0.001, 
    ),
}  # fmt: skip

# A line a preset for --help.
ABOUT = {
    "tiny": "the synthetic dataset or small captioned data, minutes on two cores (the default)",
    "motion": "people in front of static backgrounds: the mean frame of a clip is subtracted",
    "photos": "photographs with captions, from scratch, minutes on two cores",
    "vificlip_b16": "ViFi-CLIP: a whole CLIP ViT-B/16 fine-tuned on labels, against all class prompts",
}

# What says that something is not wanted: such a value is not without effect, also where nothing could be done.
OFF = {
    "small": False,
    "smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "pixels": "tower",
    "sampling": "dense",
    "motion_tokens": 1.0,
    "drop_tokens": 0.0,
}
FIXED_FRAMES = {"frame_single": 1, "frame_late": 2}
PATIENCE = 0.15  # fraction of the steps after which a loss at chance is worth a sentence


# ---------------------------------------------------------------------------------------- the step


def train_step(model, optimizers, batches, accumulate, accelerator, loss, clip_grad, make_micro):
    """One optimizer step: a loss over all clips of all processes, in `accumulate` micro-batches.

    `loss` scores a whole batch; None: every clip is scored against all classes.

    Returns:
        what a person watches, the gradient norm, and how many captions were cut. If the norm is not finite the
        weights were left alone.
    """
    cut = 0

    def load():
        nonlocal cut
        for _ in range(accumulate):
            batch = next(batches)
            cut += int(batch["cut"].sum())
            yield make_micro(batch)

    if loss is None:
        result = backward_classes(model, load(), accumulate, accelerator)
    else:
        result = backward_step(model, load(), loss, accelerator)
    norm = update(optimizers, model.parameters(), clip_grad)
    accelerator.unwrap_model(model).clamp_scale()
    return result, norm, cut


# ------------------------------------------------------------------------------------- the pieces


def build_model(cfg: Config) -> VideoText:
    """The towers of a configuration, fresh from its seed or with the weights it names.

    Raises:
        ValueError: a tower's name is unknown, or what it names cannot be loaded.
    """
    torch.manual_seed(cfg.seed)
    text_name = text_model_name(cfg)
    # A pair that gives both towers is loaded once.
    names = {n for n in (text_name, cfg.model) if n.startswith(OPEN_CLIP)}
    pairs = {n: load_open_clip(n) for n in sorted(names)}
    video = build_video_tower(cfg, pairs.get(cfg.model))
    pair = pairs.get(text_name)
    if pair:
        text: TextTower = OpenClipText(pair.text_config, pair.tokenizer)
        load_strict(text.tower, pair.text.state_dict(), text_name)
    elif text_name.startswith("hf:"):
        text = HuggingFaceText.from_name(text_name.removeprefix("hf:"))
    else:
        text = fresh_text(text_name, cfg.dim)
    whole = pair if pair and text_name == cfg.model and pair.trained else None
    if cfg.loss == "classes" and isinstance(text, OpenClipText):
        # As ViFi-CLIP: the prompts are always the same, and the words of other classes shall stay where they are.
        text.tower.token_embedding.requires_grad_(False)
    dim = text.embed_dim if whole else cfg.dim
    model = VideoText(video, text, dim, project=not whole, loss=cfg.loss)
    if whole and (whole.bias is None) == (cfg.loss != "siglip"):
        model.log_scale.data.copy_(whole.log_scale.reshape(()))
        if whole.bias is not None and model.bias is not None:
            model.bias.data.copy_(whole.bias.reshape(()))
    return model


def unused(cfg: Config) -> dict[str, str]:
    """Values that the towers and the data chosen leave without effect, and why."""
    tower = f"with --model {cfg.model}"
    form = ("depth", "patch", "tubelet", "positions", "init", "motion_tokens", "small")
    why: dict[str, str] = {}
    if cfg.backbone:
        names = ("model", "frames", "stride", "sampling", "size", "pool", *form)
        why |= dict.fromkeys(names, f"with --backbone {cfg.backbone}, which has its own")
    elif cfg.model in VITS:
        why |= dict.fromkeys(("pool", "small"), tower)
    elif cfg.model in MODELS:
        idle = (set(form) - {"small"}) | {"pool", "drop_tokens"}
        fixed = FIXED_FRAMES.get(cfg.model)
        idle |= {"frames"} if fixed and cfg.frames != fixed else set()
        idle |= {"stride", "sampling"} if fixed == 1 else set()
        why |= dict.fromkeys(idle, tower)
    elif cfg.model.startswith("frames:"):
        why |= dict.fromkeys(set(form) - {"depth", "patch"}, tower)
    elif cfg.model.startswith(OPEN_CLIP):
        why |= dict.fromkeys(("size", *form), f"{tower}, which has its own")
        if text_model_name(cfg) == cfg.model and is_trained(cfg.model):
            why["dim"] = f"{tower}, whose two towers share a space already"
    if cfg.backbone or not cfg.model.startswith(OPEN_CLIP):
        why["pixels"] = tower if not cfg.backbone else f"with --backbone {cfg.backbone}"
    if cfg.frames == 1 or cfg.sampling == "uniform":
        why.setdefault(
            "stride", "with --frames 1" if cfg.frames == 1 else "with --sampling uniform"
        )
    if cfg.frames == 1 and not cfg.backbone:
        why["sampling"] = "with --frames 1"
    if cfg.text == "caption":
        why["templates"] = "with --text caption"
    if len(cfg.data) == 1:
        why["data_weights"] = "with one source of --data"
    if cfg.loss == "classes":
        why["positives"] = "with --loss classes"
    else:
        why |= dict.fromkeys(("smoothing", "mixup", "cutmix"), f"with --loss {cfg.loss}")
    if cfg.steps:
        why["epochs"] = f"with --steps {cfg.steps}"
    return {name: w for name, w in why.items() if getattr(cfg, name) != OFF.get(name)}


def text_model_name(cfg: Config) -> str:
    """--text-model, or what it is when not given."""
    own = cfg.model.startswith(OPEN_CLIP) and not cfg.backbone
    return cfg.text_model or (cfg.model if own else "ti")


def build_video_tower(cfg: Config, pair: Pair | None) -> nn.Module:
    """The `Backbone` that --backbone or --model names; `pair`, if that is open_clip's."""
    if cfg.backbone:
        if cfg.backbone.startswith(OPEN_CLIP):
            raise ValueError(
                f"give --model {cfg.backbone}, not --backbone: it has no clip of its own"
            )
        backbone = load_backbone(cfg.backbone)
        assert isinstance(backbone, nn.Module)
        return backbone
    stride = 0 if cfg.sampling == "uniform" else cfg.stride
    if cfg.model not in VITS and cfg.model in MODELS:
        clip: dict[str, Any] = {"stride": stride, "size": cfg.size}
        clip |= {"frames": cfg.frames} if cfg.frames else {}
        tower = build_family(cfg.model, small=cfg.small, **clip)
        assert isinstance(tower, Backbone)
        return tower
    frames = cfg.frames or 16
    if pair:
        return frame_tower(pair, frames, stride, cfg.pool, cfg.pixels)
    by_frames = cfg.model.startswith("frames:")
    name = cfg.model.removeprefix("frames:")
    if name not in VITS:
        raise ValueError(
            f"--model {cfg.model!r} is not a name of python -m downstream.models, frames: and one of {', '.join(VITS)}, or "
            "open_clip:MODEL/WEIGHTS"
            + did_you_mean(cfg.model, [*MODELS, *(f"frames:{s}" for s in VITS)])
        )
    dim, depth, heads = SIZES[VITS[name]]
    depth = cfg.depth or depth
    if not by_frames:
        return VideoTransformer(
            dim, depth, heads, frames, cfg.size, cfg.patch, cfg.tubelet, stride,
            positions=cfg.positions, init=cfg.init, motion_tokens=cfg.motion_tokens,
        )  # fmt: skip
    if cfg.size % cfg.patch:
        raise ValueError(f"--size {cfg.size} is not a multiple of --patch {cfg.patch}")
    vision_cfg = {
        "layers": depth, "width": dim, "head_width": dim // heads, "patch_size": cfg.patch,
        "image_size": cfg.size,
    }  # fmt: skip
    config = {"embed_dim": dim, "vision_cfg": vision_cfg, "quick_gelu": False}
    pixels = {"mean": list(CLIP_MEAN), "std": list(CLIP_STD), "interpolation": "bilinear"}
    return FrameNetwork({"open_clip": config, **pixels}, frames, stride, cfg.size, cfg.pool)


def refuse_early(cfg: Config, model: VideoText, plan: Plan) -> None:
    """Validate the configuration before anything is written.

    Raises:
        ValueError: settings that contradict each other.
    """
    if not 0 <= cfg.drop_tokens < 1:
        raise ValueError(f"--drop-tokens {cfg.drop_tokens} is not a fraction between 0 and 1")
    if cfg.drop_tokens and not isinstance(model.video, Selective):
        drop = getattr(model.video, "drop_tokens", None)
        if drop is None:
            raise ValueError(
                "--drop-tokens needs a video transformer or a ViT of open_clip; give 0"
            )
        drop(cfg.drop_tokens)
    if plan.accumulate > 1 and has_batch_norm(model):
        raise ValueError(
            f"a batch of {cfg.batch_size} in micro-batches of {plan.micro} would not be exact: this tower has "
            "batch normalisation, which mixes the clips of a micro-batch; raise --micro-batch or take a ViT"
        )
    if cfg.loss != "classes" and cfg.positives != "pair" and cfg.batch_size < 2:
        raise ValueError(
            "a batch of one clip has nothing to be contrasted with: raise --batch-size"
        )


def print_plan(cfg: Config, run: TrainingRun, counts, model: VideoText) -> None:
    """Print what the run resolved to, so that no number is applied silently."""
    millions = {n: sum(p.numel() for p in t.parameters()) / 1e6 for n, t in (("v", model.video), ("t", model.text))}  # fmt: skip
    spec, (per_source, per_batch) = model.video.input_spec, counts
    sources = [
        f"{name} ({n} clips" + (f", {k} in a batch)" if len(cfg.data) > 1 else f", {cfg.split})")
        for name, n, k in zip(cfg.data, per_source, per_batch, strict=True)
    ]
    cached = run.plan.accumulate > 1 and cfg.loss != "classes"
    run.print_plan(
        f"video-text contrast, {cfg.preset}",
        {
            "data": " + ".join(sources),
            "video tower": f"{cfg.backbone or cfg.model}, {millions['v']:.1f} M parameters, {spec.frames} "
            f"frames of {spec.size} px, {f'stride {spec.stride}' if spec.stride else 'uniform sampling'}"
            + (f", {cfg.drop_tokens:.0%} of the tokens dropped" if cfg.drop_tokens else "")
            + (
                f", {model.video.num_motion_tokens} motion-selected tokens"
                if model.video.arguments.get("motion_tokens", 1) < 1
                else ""
            ),
            "text tower": f"{text_model_name(cfg)}, {millions['t']:.1f} M parameters, context "
            f"{model.text.tokenizer.context_length}",
            "loss": cfg.loss
            + (f", positives: {cfg.positives}" if cfg.loss != "classes" else "")
            + ", cached gradients" * cached,
            "learning rate": f"{cfg.base_lr:g} per 256 clips -> {run.plan.peak:g}, cosine to "
            f"{run.plan.final:g}",
        },
    )


# ------------------------------------------------------------------------------------------- main


def main(cfg: Config) -> dict:
    """Train; returns the final step, loss, validation score and counts."""
    cfg = settle(cfg, unused(cfg), PRESETS.get(cfg.preset))
    # ---- data: before the process group exists, since packing may take hours
    if cfg.data_weights and len(cfg.data_weights) != len(cfg.data):
        raise ValueError(
            f"{len(cfg.data_weights)} --data-weights for {len(cfg.data)} sources of --data"
        )
    model = build_model(cfg)
    spec = model.video.input_spec
    folder = Path(cfg.out or f"runs/clip-{cfg.preset}")
    try_run(folder)
    packs = [open_data(source, packing_side(spec.size), say=is_first()) for source in cfg.data]
    texts = Texts(cfg.text, cfg.templates, cfg.positives)
    chosen = clips_with_text(texts, cfg.data, packs, cfg.split, is_first())
    per_source = [len(ids) for ids in chosen]
    by_class = cfg.loss == "classes"
    prompts = class_prompts(texts, cfg.data, packs, chosen) if by_class else {}

    # ---- processes
    accelerator = start_accelerator(cfg.machine)

    # ---- plan and folder
    plan = plan_run(cfg, sum(per_source), accelerator.num_processes)
    per_batch = batch_counts(cfg.data_weights or tuple(map(float, per_source)), cfg.batch_size)
    refuse_early(cfg, model, plan)
    prints = "".join(pack.index["fingerprint"] for pack in packs)
    fingerprint = hashlib.sha256(prints.encode()).hexdigest() if len(packs) > 1 else prints
    with TrainingRun(folder, cfg, fingerprint, plan, accelerator, {"val_every"}) as run:
        print_plan(cfg, run, (per_source, per_batch), model)
        if run.first:
            for pack, ids in zip(packs, chosen, strict=True):
                warn_of_clips(pack, ids, spec)
        model.to(accelerator.device)
        optimizers = make_optimizers(cfg.optimizer, model, cfg.weight_decay, (0.9, cfg.beta2))
        run.restore(model, optimizers, {"cut": 0, "loss": None, "val": None})

        # ---- loader, wrapper and loss
        text_of_view = TextOfView(texts, model, cfg.drop_tokens, list(prompts))
        augment = Augment(cfg.flip, cfg.colour, jitter=cfg.jitter, grey=cfg.grey)
        parts = [
            TrainClips(pack, ids, spec, cfg.seed, 1, cfg.scales, text_of_view, augment)
            for pack, ids in zip(packs, chosen, strict=True)
        ]
        dataset = parts[0] if len(parts) == 1 else Mixture(parts, per_batch, cfg.seed)
        wrapped = accelerator.prepare_model(model)
        wrapped.train()  # what was loaded is in evaluation mode
        make_micro, loss_of = partial(micro_batch, model, cfg.trim_text), None
        if prompts:
            against = AgainstClasses(
                model, list(prompts.values()), cfg.trim_text, cfg.smoothing, cfg.mixup, cfg.cutmix, accelerator.device
            )  # fmt: skip
        else:
            loss_of = partial(contrast, loss=cfg.loss, several_positives=cfg.positives != "pair")
        rate = counting_rate if cfg.schedule == "counting" else learning_rate

        # ---- loop
        stuck = False
        with run.batches(dataset) as batches:
            while run.unfinished:
                lr = rate(run.step, plan.steps, plan.warmup, plan.peak, plan.final)
                set_rate(optimizers, lr)
                if prompts:  # what is drawn depends on the step and the process only
                    place = accelerator.process_index
                    rng = counter_rng(cfg.seed, run.step, place, stream=6)
                    make_micro = partial(against, rng)
                result, norm, cut = train_step(
                    wrapped, optimizers, batches, plan.accumulate, accelerator, loss_of, cfg.clip_grad,
                    make_micro,
                )  # fmt: skip
                watched = (result.loss, result.video_to_text, result.text_to_video, result.gap)
                loss, to_text, to_video, gap, cut = run.agree(norm, watched, [cut])
                run.state |= {"loss": loss, "cut": run.state["cut"] + int(cut)}
                measured = run.due(cfg.val_every)
                if measured and run.first:
                    run.state["val"] = online_retrieval(
                        model, packs, texts, cfg.seed, accelerator.device, cfg.machine.precision
                    )  # fmt: skip
                if run.log_due():
                    values = {
                        "loss": loss, "video_to_text": to_text, "text_to_video": to_video, "gap": gap,
                        "scale": model.scale().item(), "duplicates": int(result.duplicates), "lr": lr,
                        "grad_norm": norm, "cut": run.state["cut"],
                    }  # fmt: skip
                    if measured and run.state["val"]:
                        val = run.state["val"]
                        values |= {f"val_t2v_{k}": v for k, v in val.items() if k != "num"}
                        values |= {
                            f"val_t2v_r{k}_chance": min(1, k / val["num"]) for k in (1, 5, 10)
                        }
                    run.log(values, *progress(values, run.state["val"]))
                    stuck = warn_of_chance(cfg, plan, run.step, loss, stuck)
                run.finish_step({})

        # ---- end
        if run.end():
            finish(cfg, model, packs, run)
        return run.state


def warn_of_chance(cfg: Config, plan: Plan, step: int, loss: float, said: bool) -> bool:
    """Say that the loss sits at chance, once until it has moved; whether it does."""
    stuck = (
        cfg.loss == "infonce"
        and step > PATIENCE * plan.steps
        and sits_at_chance(loss, cfg.batch_size)
    )
    if stuck and not said:
        print(
            f"  the loss sits at ln({cfg.batch_size}) = {math.log(cfg.batch_size):.2f}: the towers do not tell one pair "
            "from another yet. If it stays there, check that captions belong to their clips, and try "
            "another --base-lr",
            flush=True,
        )
    return stuck


def progress(values: dict, val: dict | None) -> tuple[str, str]:
    """What a person watches of a step, and the last score on val."""
    parts = [
        f"loss {values['loss']:.3f}",
        f"in-batch {values['video_to_text']:.0%} to text {values['text_to_video']:.0%} to video",
        f"gap {values['gap']:.2f}", f"scale {values['scale']:.1f}", f"{values['duplicates']} duplicates",
    ]  # fmt: skip
    after = []
    if val is not None:
        chance = [100 * min(1, k / val["num"]) for k in (1, 10)]
        after.append(
            f"val R@1 {100 * val['r1']:.1f} % R@10 {100 * val['r10']:.1f} % of {val['num']} clips "
            f"(chance {chance[0]:.1f} and {chance[1]:.1f} %)"
        )
    if values["cut"]:
        after.append(f"{values['cut']} captions cut to the context")
    return "  ".join(parts), "  ".join(after)


def finish(cfg: Config, model: VideoText, packs: list[Pack], run: TrainingRun) -> None:
    """Export the pair of towers, draw the curve and say where everything is."""
    folder, state = run.folder, run.state
    scores = {"loss": state["loss"], "val": state["val"]}
    provenance = run.provenance("clip", cfg.split) | scores
    backbones.export_backbone(model, folder / "backbone", provenance)
    curve = log.curve_figure(
        folder / "curve.png", folder / "log.jsonl", ("loss",),
        ("video_to_text", "text_to_video", "val_t2v_r1", "val_t2v_r10"),
        f"video-text contrast, {cfg.preset}, {cfg.model} on {', '.join(cfg.data)}, {run.plan.num_clips} clips: loss, accuracy in the batch"
        + ", retrieval on val" * (state["val"] is not None),
    )  # fmt: skip
    source = cfg.data[0] if synthetic_clips(cfg.data[0]) else packs[0].folder
    script = "zero_shot" if packs[0].classes else "retrieval"
    run.print_done(
        {"backbone": folder / "backbone", "figure": curve},
        f"python recipes/{script}.py --backbone {for_shell(folder / 'backbone')} --data {for_shell(source)}",
    )


if __name__ == "__main__":
    log.cli(main, PRESETS, unused, ABOUT)
