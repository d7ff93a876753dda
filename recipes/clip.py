"""Video-text contrast: train a video tower and a text tower with one embedding space.

CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020) for clips and their captions. Prompt
the result with class names (recipes/zero_shot.py), search (recipes/retrieval.py) or probe it.

    python recipes/clip.py                                      the synthetic dataset
    python recipes/clip.py --data clips.csv             your own, with captions, 20 minutes
    python recipes/clip.py motion --data clips.csv              people before static backgrounds
    python recipes/clip.py photos --data images.csv             image-text, from scratch
    python recipes/clip.py --data clips.csv photos.csv --data-weights 3 1    a mixture
    python recipes/clip.py --backbone runs/videomae-tiny/backbone       from a VideoMAE
    accelerate launch --config_file launch/gpus.yaml recipes/clip.py vificlip_b16 --data k400.csv

The first word chooses a preset, flags change single values, `--help` lists them. Without one, data
of your own have the preset `auto`: it looks at clips and texts, and prints what it chooses and why.
The same command continues an interrupted run. Batches over --micro-batch cost a second forward pass
and no memory.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import pretrain.threads  # noqa: F401 (before torch)

import torch
import tyro

from downstream import auto_pairs, monitor, pairs
from downstream.encoders import build_pair, idle_flags, text_model_name
from downstream.finetune import record_method
from pretrain import auto, backbones, flags, log, settings
from pretrain.clip import VideoText, backward_classes, backward_step, contrast
from pretrain.data import shards
from pretrain.data.cache import open_all, packing_side, synthetic_clips
from pretrain.data.sampling import STEP, counter_rng
from pretrain.data.transforms import Augment
from pretrain.engine import Engine
from pretrain.health import Health
from pretrain.loop import TrainingRun, plan_run
from pretrain.names import counted, for_shell
from pretrain.optim import counting_rate, learning_rate, make_optimizers, set_rate
from pretrain.processes import asked_processes, is_first
from pretrain.run import try_run

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
    auto.AUTO: flags.replace(
        TINY, preset=auto.AUTO, data=("synthetic",), steps=None, positives="caption",
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
    auto.AUTO: "your own clips: chosen by clips and texts, and printed (the default for --data)",
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


# ---------------------------------------------------------------------------------------- the step


def train_step(model, engine, batches, accumulate, loss, clip_grad, make_micro):
    """One optimizer step: a loss over all clips of all processes, in `accumulate` micro-batches.

    `loss` scores a whole batch; None: every clip is scored against all classes.

    Returns:
        what a person watches, the gradient norm, how many captions were cut, and the scale after
        it. If the norm is not finite the weights were left alone.
    """
    cut = 0

    def load():
        nonlocal cut
        for _ in range(accumulate):
            batch = next(batches)
            cut += int(batch["cut"].sum())
            yield make_micro(batch)

    if loss is None:
        result = backward_classes(model, load(), accumulate, engine)
    else:
        result = backward_step(model, load(), loss, engine)
    norm = engine.step(clip_grad)
    with engine.changing(engine.model.log_scale):
        engine.model.clamp_scale()
        scale = engine.model.scale().item()
    return result, norm, cut, scale


# ------------------------------------------------------------------------------------- the pieces


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
    why |= auto.idle_minutes(cfg)
    given = flags.flat(cfg)
    return {name: w for name, w in why.items() if given[name] != OFF.get(name)}


def build_model(cfg: Config) -> VideoText:
    """The two towers: fresh from the configuration's seed, or with the weights that it names."""
    torch.manual_seed(cfg.seed)
    stride = 0 if cfg.sampling == "uniform" else cfg.stride
    return build_pair(
        cfg.model, cfg.backbone, cfg.small, cfg.form, cfg.frames, stride, cfg.size, cfg.pool,
        cfg.pixels, cfg.drop_tokens, cfg.text_model, cfg.dim, cfg.loss, cfg.joints,
    )  # fmt: skip


def refuse_early(cfg: Config, texts: pairs.Texts, model: VideoText) -> None:
    """Raise ValueError for settings that contradict each other, whatever the data."""
    plan = plan_run(cfg.optim, 1, asked_processes())
    pairs.refuse_batch(model, plan, cfg.loss == "classes", cfg.data, cfg.data_weights)
    pairs.refuse_raw(texts, cfg.loss == "classes", cfg.data, cfg.split, model.video.input_spec)


def prepare(cfg: Config) -> tuple[Config, pairs.Texts, VideoText, Engine]:
    """What is trained, on which texts, and how; ValueError: what contradicts itself."""
    cfg = flags.settle(cfg, unused(cfg), PRESETS.get(cfg.preset))
    model = build_model(cfg)
    texts = pairs.Texts(cfg.text, cfg.templates, cfg.positives, cfg.sentences)
    refuse_early(cfg, texts, model)
    engine = Engine(cfg.machine, cfg.optim.optimizer, model, cfg.run.checkpoint_blocks)
    return cfg, texts, model, engine


def print_plan(cfg: Config, run: TrainingRun, counts, positives: str, model: VideoText) -> None:
    """Print what the run resolved to."""
    plan, spec, contrasted = run.plan, model.video.input_spec, cfg.loss != "classes"
    sources = [
        f"{name} ({counted(n, 'clip')}"
        + (f", {k} in a batch)" if len(cfg.data) > 1 else f", {cfg.split})")
        for name, n, k in zip(cfg.data, *counts, strict=True)
    ]
    clip = spec.in_words + f", {cfg.drop_tokens:.0%} of the tokens dropped" * (cfg.drop_tokens > 0)
    if model.video.arguments.get("motion_tokens", 1) < 1:
        clip += f", {model.video.num_motion_tokens} motion-selected tokens"
    text = text_model_name(cfg.model, cfg.backbone, cfg.text_model)
    context = model.text.tokenizer.context_length
    loss = cfg.loss + f", positives: {positives}" * contrasted
    rows = {
        "data": " + ".join(sources),
        "video tower": f"{cfg.backbone or cfg.model}, {log.parameters(model.video)}, {clip}",
        "text tower": f"{text}, {log.parameters(model.text)}, context {context}",
        "loss": loss + ", cached gradients" * (plan.accumulate > 1 and contrasted),
        "optimizer": f"{cfg.optim.optimizer}, learning rate {plan.rates}, {cfg.schedule}",
    }
    run.print_plan(f"video-text contrast, {cfg.preset}", rows)


# ------------------------------------------------------------------------------------------- main


def main(cfg: Config) -> dict:
    """Train; returns the final step, loss, validation score and counts."""
    folder, packs = Path(cfg.out or f"runs/clip-{cfg.preset}"), None
    if cfg.preset == auto.AUTO:
        cfg, packs = auto_pairs.choose_by_data(cfg, folder, unused, prepare)
    # ---- model and folder: what contradicts is refused before hours of packing
    cfg, texts, model, engine = prepare(cfg)
    try_run(folder, cfg, {"val_every"})

    # ---- data: before the process group exists, which does not wait so long
    say = is_first() and packs is None
    if packs is None:
        packs = open_all(cfg.data, packing_side(model.video.input_spec.size), say, cfg.machine)
    record_method(model.video, *(pack.index for pack in packs))
    spec = model.video.input_spec
    chosen = pairs.clips_with_text(texts, cfg.data, packs, cfg.split, spec, say)
    prompts = pairs.class_prompts(texts, cfg.data, packs, chosen) if cfg.loss == "classes" else {}
    per_source = [len(ids) for ids in chosen]
    weights = cfg.data_weights or tuple(map(float, per_source))
    per_batch = shards.batch_counts(weights, cfg.optim.batch_size)

    # ---- processes, loader and plan
    engine.start()
    text_of_view = pairs.TextOfView(texts, model, cfg.drop_tokens, list(prompts))
    augment = Augment(cfg.flip, cfg.colour, jitter=cfg.jitter, grey=cfg.grey)
    parts = [
        shards.TrainClips(pack, ids, spec, cfg.seed, 1, cfg.scales, text_of_view, augment)
        for pack, ids in zip(packs, chosen, strict=True)
    ]
    dataset = parts[0] if len(parts) == 1 else shards.Mixture(parts, per_batch, cfg.seed)
    compared = partial(contrast, loss=cfg.loss, several_positives=cfg.positives != "pair")
    if cfg.preset == auto.AUTO:
        timed = auto_pairs.loss_of_batch(model, cfg.trim_text, compared)
        cfg = auto.choose_steps(cfg, engine, model, dataset, 1, timed)
    optim = cfg.optim
    plan = plan_run(optim, sum(per_source), engine.processes)
    with TrainingRun(folder, cfg, shards.fingerprint(packs), plan, engine, {"val_every"}) as run:
        positives = pairs.positives_in_words(texts, packs, chosen)
        print_plan(cfg, run, (per_source, per_batch), positives, model)
        if run.first:
            for pack, ids in zip(packs, chosen, strict=True):
                shards.warn_of_clips(pack, ids, spec)
        how = (optim.optimizer, model, optim.weight_decay, optim.betas, optim.layer_decay)
        wrapped = engine.prepare(model, lambda: make_optimizers(*how))
        run.restore({"cut": 0, "loss": None, "val": None, "best": None})
        health = Health(plan.steps, run.state["best"])

        # ---- loss
        make_micro = partial(pairs.micro_batch, model, cfg.trim_text)
        loss_of = None if prompts else compared
        if prompts:
            against = pairs.AgainstClasses(
                model, list(prompts.values()), cfg.trim_text, cfg.smoothing, cfg.mixup, cfg.cutmix,
                engine.device,
            )  # fmt: skip
        rate = counting_rate if cfg.schedule == "counting" else learning_rate

        # ---- loop
        with run.batches(dataset) as batches:
            while run.unfinished:
                lr = rate(run.step, plan.steps, plan.warmup, plan.peak, plan.final)
                set_rate(engine.optimizers, lr)
                if prompts:  # what is drawn depends on the step and the process only
                    rng = counter_rng(cfg.seed, run.step, engine.place, purpose=STEP)
                    make_micro = partial(against, rng)
                result, norm, cut, scale = train_step(
                    wrapped, engine, batches, plan.accumulate, loss_of, optim.clip_grad, make_micro
                )
                watched = (result.loss, result.video_to_text, result.text_to_video, result.gap)
                loss, to_text, to_video, gap, cut = run.agree(norm, watched, [cut])
                run.state |= {"loss": loss, "cut": run.state["cut"] + int(cut)}
                chance = {}
                if cfg.loss != "siglip" or cfg.positives == "pair":  # else it is not known
                    count = len(prompts) or plan.batch_size
                    chance = health.contrasted("loss", loss, cfg.loss, count)
                measured, seen = run.due(cfg.val_every), {}
                if measured:
                    who = (cfg.seed, engine.accelerator, cfg.machine.precision)
                    with engine.whole() as whole:  # each process scores a share
                        run.state["val"] = monitor.online_retrieval(whole, packs, texts, *who)
                        seen = monitor.online_features(whole, packs, chosen, *who)
                    health.scored(seen)
                if run.log_due():
                    values = {
                        "loss": loss, "video_to_text": to_text, "text_to_video": to_video,
                        "gap": gap, "scale": scale, "lr": lr, "grad_norm": norm,
                        "duplicates": int(result.duplicates), "cut": run.state["cut"],
                    }  # fmt: skip
                    values |= monitor.retrieval_values(run.state["val"]) if measured else {}
                    values |= chance | seen | engine.gradient_norms() | health.values
                    run.log(values, *monitor.contrast_words(values, run.state["val"], health.word))
                    health.say()
                run.finish_step({"best": health.best})

        # ---- end
        with engine.whole() as whole:
            if run.end():
                finish(cfg, whole, packs, run)
        return run.state


def finish(cfg: Config, model: VideoText, packs: list[shards.Pack], run: TrainingRun) -> None:
    """Export the pair of towers, draw the curve and say where everything is."""
    folder, exported = run.folder, run.folder / "backbone"
    scores = {"loss": run.state["loss"], "val": run.state["val"]}
    backbones.export_backbone(model, exported, run.provenance("clip", cfg.split) | scores)
    curve = log.curve_figure(
        folder / "curve.png", folder / "log.jsonl", ("loss",),
        ("video_to_text", "text_to_video", "val_t2v_r1", "val_t2v_r10"),
        f"video-text contrast, {cfg.preset}, {cfg.model} on {', '.join(cfg.data)}, "
        f"{counted(run.plan.num_clips, 'clip')}: loss, accuracy in the batch"
        + ", retrieval on val" * (scores["val"] is not None),
    )  # fmt: skip
    source = for_shell(cfg.data[0] if synthetic_clips(cfg.data[0]) else packs[0].address)
    script = "zero-shot" if packs[0].classes else "retrieval"
    run.print_done(
        {"backbone": exported, "figure": curve},
        f"muybridge {script} --backbone {for_shell(exported)} --data {source}",
    )


if __name__ == "__main__":
    log.cli(main, PRESETS, unused, ABOUT, preset_of=auto.preset_of(synthetic_clips, "tiny"))
