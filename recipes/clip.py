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

import statistics
from functools import partial
from pathlib import Path

import pretrain.threads  # noqa: F401 (before torch)

import numpy as np
import torch

from downstream import auto_pairs, monitor, pairs
from downstream.encoders import build_pair, text_model_name
from downstream.finetune import record_method
from downstream.models import match_rate
from pretrain import auto, backbones, flags, log
from pretrain.clip import VideoText, backward_classes, backward_step, contrast
from pretrain.data import shards
from pretrain.data.cache import open_all, packing_side
from pretrain.data.sampling import STEP, counter_rng
from pretrain.data.transforms import Augment
from pretrain.engine import Engine
from pretrain.health import Health
from pretrain.loop import TrainingRun, plan_run
from pretrain.modes import too_large
from pretrain.names import counted, for_shell
from pretrain.optim import counting_rate, learning_rate, make_optimizers, set_rate
from pretrain.presets import AUTO
from pretrain.processes import asked_processes, is_first
from pretrain.run import try_run
from pretrain.run_report import Curve
from recipes.options.clip import PRESETS, Config, command, unused

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


def match_data(cfg: Config, model: VideoText, packs: list[shards.Pack]) -> None:
    """Let the video tower know how its flow was made, and weights the frame rate of the clips."""
    record_method(model.video, *(pack.index for pack in packs))
    if cfg.backbone:
        match_rate(cfg.backbone, model.video, np.concatenate([pack.rates() for pack in packs]))


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
    run.report.curve = Curve(
        ("loss",), ("video_to_text", "text_to_video", "val_t2v_r1", "val_t2v_r10"),
        f"video-text contrast, {cfg.preset}, {cfg.model} on {', '.join(cfg.data)}, "
        f"{counted(plan.num_clips, 'clip')}",
    )  # fmt: skip
    run.print_plan(f"video-text contrast, {cfg.preset}", rows)
    if run.first and run.accelerator.device.type == "cpu":
        with torch.device("meta"):
            seen = spec.empty(1)
        num, half = plan.micro, run.accelerator.mixed_precision == "bf16"
        if warning := too_large(model.video, (seen,), num, half):
            print(warning, flush=True)


# ------------------------------------------------------------------------------------------- main


def main(cfg: Config) -> dict:
    """Train; returns the final step, loss, validation score and counts."""
    folder, packs = Path(cfg.out or f"runs/clip-{cfg.preset}"), None
    if cfg.preset == AUTO:
        cfg, packs = auto_pairs.choose_by_data(cfg, folder, unused, prepare)
    # ---- model and folder: what contradicts is refused before hours of packing
    cfg, texts, model, engine = prepare(cfg)
    try_run(folder, cfg, {"val_every"})

    # ---- data: before the process group exists, which does not wait so long
    say = is_first() and packs is None
    if packs is None:
        packs = open_all(cfg.data, packing_side(model.video.input_spec.size), say, cfg.machine)
    match_data(cfg, model, packs)
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
    if cfg.preset == AUTO:
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
        run.report.health = health = Health(plan.steps, run.state["best"])

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
    """Export the pair of towers and say where everything is."""
    exported = run.folder / "backbone"
    scores = {"loss": run.state["loss"], "val": run.state["val"]}
    scores["fps"] = statistics.median(pack.rate() for pack in packs)
    backbones.export_backbone(model, exported, run.provenance("clip", cfg.split) | scores)
    script = "zero-shot" if packs[0].classes else "retrieval"
    run.print_done(
        {"backbone": exported},
        f"muybridge {script} --backbone {for_shell(exported)} --data {for_shell(cfg.data[0])}",
    )


if __name__ == "__main__":
    command(main)
