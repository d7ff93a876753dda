"""The flags of recipes/clip.py."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Annotated, Literal

import tyro

from pretrain import flags, settings
from pretrain.log import cli
from pretrain.presets import AUTO, idle_minutes, preset_of
from pretrain.settings import JOINTS, VITS

FORM = ("depth", "patch", "tubelet", "positions", "init", "motion_tokens", "small")
FIXED_FRAMES = {"frame_single": 1, "frame_late": 2}
# As CLIP is published.
PUBLISHED = settings.Optimisation(
    epochs=32, batch_size=1024, micro_batch=64, base_lr=1.25e-4, final_lr=0.0, warmup=0.06,
    weight_decay=0.2, beta2=0.98,
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Pretrain by contrasting videos with their captions."""

    preset: Annotated[str, tyro.conf.Suppress] = "tiny"
    given: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()  # flags that were typed
    reasons: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()  # of what auto chose
    minutes: flags.Positive = 20.0
    """Of the preset auto: how long training takes; the number of steps follows from it."""

    # Data
    data: tuple[str, ...] = ("synthetic",)
    """One source or several to mix: packs, folders, lists, tars, or "synthetic"; with captions."""
    data_weights: tuple[flags.Positive, ...] | None = None
    """Weight of each source in every batch; by default their numbers of clips."""
    split: str = "train"
    """The split to train on; "all" for everything. Data without splits are used whole."""
    text: Literal["caption", "label"] = "caption"
    """What a clip is paired with: one of its captions, or its class name in one of --templates."""
    sentences: bool = False
    """Draw one sentence of a caption at a time: for captions longer than the context."""
    templates: str = "plain"
    """For --text label: plain, vificlip, openai_kinetics, openai_ucf101 or a file of templates."""
    out: str | None = None
    """The run's folder; by default runs/clip-PRESET."""

    # Model
    model: str = "vit_ti"
    """The video tower: vit_xs to vit_h; frames:vit_xs to frames:vit_h, an image ViT on frames;
    open_clip:MODEL/WEIGHTS; or a name of python -m downstream.models, such as i3d or lstm."""
    joints: settings.JointFlags = settings.JOINTS
    small: bool = False
    """Of such a name: the small network, for minutes on a CPU, instead of the paper's."""
    backbone: str | None = None
    """A trained video tower: a backbone folder, hf:OWNER/NAME, an official VideoMAE .pth, ..."""
    text_model: str | None = None
    """The text tower: xs, ti, s, b, open_clip:MODEL/WEIGHTS or hf:NAME; else the pair's or ti."""
    dim: flags.Count = 256
    """Width of the joint space."""
    frames: flags.OptionalCount = None
    """Frames of a clip, 1 for images; by default 16, or as a model family has it."""
    stride: flags.Count = 4
    """Source frames between two sampled ones."""
    sampling: Literal["dense", "uniform"] = "dense"
    """dense: frames at a stride; uniform: a frame of each of --frames equal parts (TSN)."""
    size: flags.Count = 224
    """Height and width of a clip, pixels; open_clip towers have their own."""
    form: settings.FormFlags = settings.FORM
    pool: Literal["mean", "max", "attention", "temporal"] = "mean"
    """How the frames of an image tower are pooled; temporal: by a transformer over them."""
    pixels: Literal["tower", "imagenet"] = "tower"
    """Pixels of an open_clip tower: as it was trained, or ImageNet's mean, scaled bilinearly."""

    # Objective
    loss: Literal["infonce", "siglip", "classes"] = "infonce"
    """infonce (CLIP), siglip, or classes: every clip against the prompts of all classes, which
    leaves the embeddings of words alone (ViFi-CLIP); with --text label."""
    positives: Literal["pair", "caption", "label"] = "pair"
    """Which texts of a batch are positives of a clip: its own; all equal ones; all of its class."""
    drop_tokens: flags.FractionBelowOne = 0.0
    """Fraction of the video tokens that --motion-tokens leaves, left out in training (FLIP)."""
    trim_text: bool = True
    """Cut a batch's token rows to its longest caption: the same numbers, sooner."""
    scales: tuple[flags.PositiveFraction, ...] = (1.0, 0.9, 0.8)
    """Sides of the random crop, as fractions of the short side."""
    flip: bool = False
    """Mirror half of the clips; not where texts say left or right."""
    colour: flags.Fraction = 0.0
    """Strength of random brightness, contrast and colour balance, 0 to 1."""
    jitter: flags.Fraction = 0.0
    """Fraction of the clips whose frames get random colours, each its own, as ViFi-CLIP does."""
    grey: flags.Fraction = 0.0
    """Fraction of the clips turned grey."""
    smoothing: flags.FractionBelowOne = 0.0
    """Of --loss classes: fraction of every target spread over all classes."""
    mixup: flags.NotNegative = 0.0
    """Of --loss classes: alpha of mixup; 0: off."""
    cutmix: flags.NotNegative = 0.0
    """Of --loss classes: alpha of cutmix; 0: off."""

    # Running
    optim: settings.OptimFlags = PUBLISHED
    schedule: Literal["cosine", "counting"] = "cosine"
    """cosine: from the peak, after the warm-up; counting: it counted meanwhile (ViFi-CLIP's)."""
    seed: flags.Seed = 0
    """Of weights, order, crops, captions and dropped tokens."""
    val_every: flags.OptionalWhole = None
    """Steps between scores on a split "val"; 0: only at the end; by default four in a run."""
    machine: settings.MachineFlags = settings.MACHINE
    run: settings.RunFlags = settings.RUN


# Nothing published: what learned most in little time on two cores, see the changelog.
TINY = flags.replace(
    Config(), data=("synthetic:3600",), model="vit_xs", small=True, text_model="xs", dim=128,
    stride=2, size=48, patch=8, positions="separable", init="mimetic", motion_tokens=0.375,
    drop_tokens=0.33, positives="label", flip=True, colour=0.4, scales=(1.0, 0.93, 0.86, 0.8),
    steps=1700, batch_size=64, optimizer="muon", base_lr=0.016, warmup=0.03, weight_decay=0.05,
    beta2=0.95, clip_grad=1.0,
)  # fmt: skip
PRESETS = {
    # What it does not choose (downstream/auto_pairs.py) is what learned most in little time.
    AUTO: flags.replace(
        TINY, preset=AUTO, data=("synthetic",), steps=None, positives="caption",
        motion_tokens=1.0, drop_tokens=0.0,
    ),
    "tiny": TINY,
    # Frames in slow fusion, mean frame subtracted, regularised by a strong decay. Little but the
    # actions is left to meet by, so captions are enough.
    "motion": flags.replace(
        TINY, preset="motion", model="frame_slow", frames=14, motion_tokens=1.0, drop_tokens=0.0,
        positives="caption", weight_decay=4.0, steps=1900,
    ),
    "photos": flags.replace(
        TINY, preset="photos", frames=1, tubelet=1, size=64, motion_tokens=1.0, drop_tokens=0.0
    ),
    # ViFi-CLIP (Rasheed et al. 2022, arXiv:2212.03640), a whole CLIP fine-tuned on labels: its
    # repository's configs/zero_shot/train/k400/16_16_vifi_clip.yaml (32 frames, batch 256, 8e-6, 10
    # epochs) over utils/config.py (5 epochs of warm-up, decay 0.001, smoothing, mixup, cutmix,
    # colour 0.8, grey 0.2), utils/optimizer.py (beta2, a hundredth at the end, the cosine that
    # counts on), datasets/build.py (uniform sampling, scales, flip, ImageNet's pixels) and
    # trainers/vificlip.py (prompt, loss, word embeddings that stay). Other than published are: the
    # crop has 13 places (5), vectors do not decay (all do), the half precision is bf16 (fp16),
    # clips are mixed with that at their mirrored place (with any), and of clips of fewer than 32
    # frames only the first is seen.
    "vificlip_b16": flags.replace(
        Config(), preset="vificlip_b16", model="open_clip:ViT-B-16/openai", text="label",
        templates="vificlip", pixels="imagenet", frames=32, sampling="uniform", loss="classes",
        smoothing=0.1, mixup=0.8, cutmix=1.0, scales=(1.0, 0.875, 0.75, 0.66), flip=True,
        jitter=0.8, grey=0.2, schedule="counting", epochs=10, warmup=0.5, batch_size=256,
        micro_batch=8, base_lr=8e-6, final_lr=8e-8, weight_decay=0.001,
    ),
}  # fmt: skip

# A line a preset for --help.
ABOUT = {
    AUTO: "your own clips: chosen by clips and texts, and printed (the default for --data)",
    "tiny": "the synthetic dataset or small captioned data, minutes on two cores (its default)",
    "motion": "people in front of static backgrounds: the mean frame of a clip is subtracted",
    "photos": "photographs with captions, from scratch, minutes on two cores",
    "vificlip_b16": "ViFi-CLIP: a CLIP ViT-B/16 fine-tuned on labels, against all class prompts",
}

# What says that something is not wanted; such a value is never refused.
OFF = {
    "grey": 0.0, "small": False, "smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "pixels": "tower",
    "sampling": "dense", "motion_tokens": 1.0, "drop_tokens": 0.0, "colour": 0.0, "jitter": 0.0,
    "sentences": False,
}  # fmt: skip


def unused(cfg: Config) -> dict[str, str]:
    """Values that the towers and the data chosen leave without effect, and why."""
    why = idle_flags(cfg.model, cfg.backbone, cfg.frames, cfg.text_model)
    if cfg.frames == 1:
        why = {"stride": "with --frames 1", "sampling": "with --frames 1"} | why
    elif cfg.sampling == "uniform":
        why.setdefault("stride", "with --sampling uniform")
    of_texts = "templates" if cfg.text == "caption" else "sentences"
    why[of_texts] = f"with --text {cfg.text}"
    if len(cfg.data) == 1:
        why["data_weights"] = "with one source of --data"
    if cfg.loss == "classes":
        why["positives"] = "with --loss classes"
    else:
        why |= dict.fromkeys(("smoothing", "mixup", "cutmix"), f"with --loss {cfg.loss}")
    if cfg.optim.steps:
        why["epochs"] = f"with --steps {cfg.optim.steps}"
    why |= idle_minutes(cfg)
    given = flags.flat(cfg)
    return {name: w for name, w in why.items() if given[name] != OFF.get(name)}


def idle_flags(
    model: str, backbone: str | None, frames: int | None, text_model: str | None
) -> dict[str, str]:
    """The flags that a video tower leaves without effect, and why.

    Args:
        model: see `downstream.encoders.video_tower`, likewise `frames`.
        backbone: a trained tower instead.
        frames: see there.
        text_model: see `downstream.encoders.build_pair`.
    """
    if backbone:
        clip = ("frames", "stride", "sampling", "size", "pixels")
        names = ("model", "pool", *clip, *FORM, *vars(JOINTS))
        return dict.fromkeys(names, f"with --backbone {backbone}, which has its own")
    why = f"with --model {model}"
    if model in VITS:
        return dict.fromkeys(("pool", "small", "pixels", *vars(JOINTS)), why)
    if model.startswith("frames:"):
        return dict.fromkeys({"pixels", *FORM, *vars(JOINTS)} - {"depth", "patch"}, why)
    # Not before: networks and their libraries take seconds to load.
    from downstream.encoders import text_model_name
    from downstream.models import MODELS
    from pretrain.backbones import parts_of
    from pretrain.interop.openclip import PREFIX, is_trained

    if model in MODELS:
        idle = {"pool", "drop_tokens", "pixels", *FORM} - {"small"}
        fixed = FIXED_FRAMES.get(model)
        idle |= {"frames"} if fixed and frames != fixed else set()
        idle |= {"stride", "sampling"} if fixed == 1 else set()
        build = MODELS[model].build
        if "skeleton" in signature(build).parameters:  # of poses alone
            idle |= {"colour", "jitter", "grey"}
        elif not parts_of(build):
            idle |= vars(JOINTS).keys()
        return dict.fromkeys(idle, why)
    if not model.startswith(PREFIX):
        return {}  # there is no such model
    own = dict.fromkeys(("size", *FORM, *vars(JOINTS)), f"{why}, which has its own")
    if text_model_name(model, backbone, text_model) == model and is_trained(model):
        own["dim"] = f"{why}, whose two towers share a space already"
    return own


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line and run the recipe's `main`."""
    cli(main, PRESETS, unused, ABOUT, preset_of=preset_of)
