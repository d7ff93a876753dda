"""Fine-tune a backbone, or train any model of the families from scratch, on labelled clips.

    python recipes/finetune.py --model lstm                           the synthetic dataset
    python recipes/finetune.py --model i3d --data clips.csv           small, minutes on two cores
    python recipes/finetune.py paper --model c3d --data clips.csv     as the family's paper trains
    python recipes/finetune.py videomae_b_k400 --backbone hf:MCG-NJU/videomae-base --data clips.csv
    python recipes/finetune.py --backbone runs/mine/backbone --data clips.csv
    python recipes/finetune.py --model tcn --per-frame --data clips.csv    a label for every frame

The first word chooses a preset: `tiny` (small inputs and networks, minutes on a CPU), a published
recipe (every value's source is in `downstream/training.py`), or `paper`, the first published one
that fits the backbone. Flags change single values; those that are not given are the preset's, and
the table at the start shows what everything came to. The same command continues an interrupted run.

The test split, or one person's videos (--leave-out), is scored once, at the end, in several views
of every clip whose probabilities are averaged. Where the data have a split "val" (or --val hold-out
makes one of training videos) the exported weights are those that were best on it; without one they
are the last. Written: RUN/backbone and RUN/last (classifiers that recipes/predict.py reads),
results.json, CARD.md, confusion.png, predictions.csv and scores.csv (which recipes/fuse.py reads).
"""

import math
from dataclasses import replace
from pathlib import Path

import pretrain.threads  # noqa: F401 (before torch)

import torch
from torch import nn

from downstream.classifier import CHECKED, Classifier, refuse_per_frame
from downstream.features import Extraction, choose_views
from downstream.finetune import (
    Learner,
    StepLoss,
    adapt,
    balanced_weights,
    describe_classifier,
    freeze,
    is_best,
    make_optimizer,
    progress,
    record_method,
    scheduled_rate,
    start_from,
)
from downstream.floor import against_floor, folds_of
from downstream.fusion import scored, scores_csv, write_scores
from downstream.models import choose_sampling, load_classifier, match_rate
from downstream.report import publish
from downstream.results import (
    Metric,
    accuracies,
    build_results,
    describe_data,
    describe_views,
    versions,
)
from downstream.splits import videos_digest, write_leaks
from downstream.tasks import Chosen, LabelOfView, choose_videos, refuse_raw, task_of, validate
from downstream.training import Training, flags_of, resolve_training
from pretrain import backbones, log
from pretrain.data.cache import open_data, packing_side
from pretrain.data.shards import Pack, TrainClips, warn_of_clips
from pretrain.engine import Engine
from pretrain.flags import flat, refuse_given
from pretrain.loop import TrainingRun, plan_run
from pretrain.modes import too_large
from pretrain.names import counted, file_name, for_shell
from pretrain.optim import set_rate
from pretrain.processes import asked_processes, is_first, loader_workers
from pretrain.run import try_run
from pretrain.run_report import Curve
from pretrain.spec import Backbone
from recipes.options.finetune import PRESETS, Config, command, unused


def resolve(cfg: Config, backbone: nn.Module) -> tuple[Config, Training, nn.Module]:
    """The configuration with all of it filled in, the training it says, and the backbone for it."""
    choose_sampling(backbone, cfg.training.sampling, cfg.stride)
    training = resolve_training(cfg.preset, cfg.training, backbone, cfg.name, bool(cfg.model))
    named = cfg.model or Path(cfg.name).resolve().parent.name or "backbone"
    out = cfg.out or f"runs/finetune-{file_name(named)}"
    flags, typed = flags_of(training), cfg.training
    if cfg.preset == "tiny":  # what is not typed is left to the data
        flags = replace(flags, num_clips=typed.num_clips, num_crops=typed.num_crops)
    filled = replace(cfg, training=flags, out=out)
    useless = unused(filled) | (training.unused_rates(backbone) if cfg.freeze else {})
    refuse_given(cfg, useless, PRESETS.get(cfg.preset, Config()))
    choose_sampling(backbone, training.sampling, cfg.stride)  # of the preset `paper`
    backbone = adapt(backbone, training.pool, training.drop_path)
    assert isinstance(backbone, Backbone)
    training.check(backbone.input_spec, cfg.per_frame)
    plan_run(training, 1, asked_processes(), training.views)
    if cfg.per_frame:
        refuse_per_frame(backbone)
    return filled, training, backbone


def build_backbone(cfg: Config) -> nn.Module:
    """The backbone of a configuration, fresh from its seed or with the weights it names."""
    torch.manual_seed(cfg.seed)
    small, changes = cfg.preset == "tiny", cfg.changes.given() | cfg.joints.given()
    return start_from(cfg.model, cfg.backbone, cfg.weights or "", small, changes)


def match_data(
    cfg: Config, training: Training, backbone: nn.Module, pack: Pack, videos: Chosen
) -> Training:
    """Let a backbone know how its flow was made, and weights the frame rate of the clips.

    Returns:
        the training, with as many test views as show all of most clips where their number was left
        open; of labels for frames whole clips are scored.
    """
    record_method(backbone, pack.index)
    if cfg.backbone and not cfg.stride:
        match_rate(cfg.backbone, backbone, pack.rates())
    given = cfg.training
    if cfg.per_frame or (given.num_clips and given.num_crops):
        return training
    assert isinstance(backbone, Backbone)
    clips, crops, words = choose_views(
        pack, videos.train.samples, backbone.input_spec, given.num_clips, given.num_crops
    )
    if is_first():
        print(words)
    return replace(training, num_clips=clips, num_crops=crops)


# ---------------------------------------------------------------------------------------- the step


def train_step(model, engine, batches, accumulate, loss_of, clip_grad):
    """One optimizer step over `accumulate` micro-batches.

    The loss is the mean over everything in the step that has a target, in all micro-batches and
    processes: sums are added up, and their gradient is divided once. Returned are mean loss,
    accuracy and gradient norm; if that is not finite the weights were left alone.
    """
    sums = torch.zeros(4, device=engine.device)
    for i in range(accumulate):
        batch = next(batches)
        engine.sync(last=i == accumulate - 1)
        counted = loss_of(model, batch, i)
        engine.backward(counted[0])
        sums += torch.stack(counted).detach()
    loss, mass, correct, known = engine.accelerator.reduce(sums).tolist()
    # Processes have averaged their gradients.
    norm = engine.step(clip_grad, engine.processes / max(mass, 1e-12))
    return loss / max(mass, 1e-12), correct / max(known, 1), norm


def print_plan(
    cfg: Config, training: Training, run: TrainingRun, model: Classifier, videos: Chosen
) -> None:
    """Print what the run resolved to, so that no number is applied silently."""
    spec, plan, unit = model.input_spec, run.plan, task_of(cfg.per_frame).unit
    tested = f"{counted(len(videos.test), 'test video')} of {cfg.data}"
    tested += f", all of {cfg.leave_out}" if cfg.leave_out else ""
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    run.report.curve = Curve(
        ("loss",), ("train_top1", "val_top1"), f"{cfg.name}, fine-tuned on {cfg.data}"
    )
    run.print_plan(
        f"fine-tune {cfg.preset}",
        {
            "data": f"{counted(len(videos.train), 'training video')} "
            f"({counted(plan.num_clips, 'clip')}), {tested}",
            "validation": videos.rule,
            "model": f"{cfg.name}, {log.parameters(model.backbone)}, {learns:.2f} M learn, "
            f"{counted(len(model.classes), 'class')} of {unit}",
            "clip": spec.in_words + ", mean frame subtracted" * spec.subtracts_mean,
            "optimizer": f"{training.optimizer}, {training.base_lr:g} per 256 clips -> "
            f"{plan.peak:g}, {training.schedule}",
            **training.in_words(),
        },
    )
    if not run.first:
        return
    group, notes = run.accelerator, videos.notes
    if group.device.type == "cpu":
        num, half = plan.micro * plan.views, group.mixed_precision == "bf16"
        with torch.device("meta"):
            clip = model.input_spec.empty(1)
        notes = [*notes, *filter(None, [too_large(model, (clip,), num, half)])]
    log.print_notes(notes)


def stopped_early(state: dict) -> str:
    """That patience ended a run, in words."""
    return f"stopped early: no validation was better than that of step {state['best_step']}"


# ------------------------------------------------------------------------------------------- main


def main(cfg: Config) -> dict:
    """Train and test; returns what results.json holds."""
    # ---- what to train and how: mistakes are named before hours of packing
    backbone = build_backbone(cfg)
    cfg, training, backbone = resolve(cfg, backbone)
    engine = Engine(cfg.machine, training.optimizer, backbone, cfg.run.checkpoint_blocks)
    assert isinstance(backbone, Backbone)
    task = task_of(cfg.per_frame)
    refuse_raw(
        task, cfg.data, cfg.train_split, cfg.test_split, cfg.val, training.patience,
        backbone.input_spec, cfg.name, cfg.leave_out,
    )  # fmt: skip
    assert cfg.out  # `resolve` names it
    folder = Path(cfg.out)
    try_run(folder, cfg, set())

    # ---- data: before the process group exists, which waits for nobody so long
    side = packing_side(backbone.input_spec.size)
    pack = open_data(cfg.data, side, is_first(), cfg.machine, labels=True)
    videos = choose_videos(
        task, pack, cfg.train_split, cfg.test_split, cfg.shots, cfg.val, training.patience,
        cfg.seed, cfg.leave_out,
    )  # fmt: skip
    train, classes = videos.train, videos.classes
    pack.check_streams(videos.samples, backbone.input_spec, cfg.name)
    training = match_data(cfg, training, backbone, pack, videos)

    # ---- processes, model and optimizer
    engine.start()
    model = Classifier(backbone, classes, training.dropout, cfg.per_frame)
    model.head.weight.data *= training.head_std / 0.01  # drawn with std 0.01
    if cfg.freeze:
        freeze(model)
    learner = Learner(model, training.ema)
    plan = plan_run(training, len(train.samples), engine.processes, training.views)
    with TrainingRun(folder, cfg, pack.index["fingerprint"], plan, engine, set()) as run:
        print_plan(cfg, training, run, model, videos)
        if run.first:
            warn_of_clips(pack, train.samples, model.input_spec)
        beginning = {"loss": None, "val": None, "best": None, "best_step": 0, "since_best": 0}
        decays = (training.weight_decay, training.layer_decay, training.backbone_lr)
        make = lambda: [make_optimizer(training.optimizer, model, *decays)]
        wrapped = engine.prepare(learner, make, learner.model, learner.average)
        run.restore(beginning)

        # ---- loader and loss
        dataset = TrainClips(
            pack, train.samples, model.input_spec, cfg.seed, training.views,
            None if training.crop == "resized" else training.scales, LabelOfView(task, classes),
            training.augment,
        )  # fmt: skip
        balanced = training.class_weights == "balanced"
        weights = balanced_weights(task.counts(pack, train, classes)) if balanced else None
        loss_of = StepLoss(
            engine.accelerator, len(classes), weights, training.smoothing, training.mixup,
            training.cutmix, cfg.seed,
        )  # fmt: skip
        epoch = math.ceil(plan.num_clips / plan.decodes_per_step)
        val_every = cfg.val_every or max(epoch, plan.steps // 20)

        # ---- loop
        patient = lambda: not training.patience or run.state["since_best"] < training.patience
        run.report.remarks = lambda: [] if patient() else [stopped_early(run.state)]
        if not patient():
            run.end_early()
        with run.batches(dataset) as batches:
            while run.unfinished:
                lr = scheduled_rate(run.step, plan, training.schedule, training.drops)
                set_rate(engine.optimizers, lr)
                loss_of.step = run.step
                loss, accuracy, norm = train_step(
                    wrapped, engine, batches, plan.accumulate, loss_of, training.clip_grad
                )
                if math.isfinite(norm) and training.ema:
                    with engine.gathered():
                        learner.update_average()
                run.agree(norm)
                values = {"loss": loss, "train_top1": accuracy, "lr": lr, "grad_norm": norm}
                if videos.val is not None and run.due(val_every):
                    with engine.whole() as whole:
                        values["val_top1"] = now = validate(
                            task, whole.best_guess, pack, videos.val, training.micro_batch,
                            cfg.machine.precision, engine.accelerator,
                        )  # fmt: skip
                        if is_best(run.state, now, run.step) and run.first:
                            export(run, whole.best_guess, folder / "backbone", videos, pack.rate())
                    wrapped.train()
                    if not patient():
                        run.end_early()
                if run.log_due():
                    run.log(values, *progress(values, run.state, len(classes)))
                run.finish_step({"loss": loss})
        if not patient() and run.first:
            print(stopped_early(run.state))

        # ---- end: one process tests
        with engine.whole() as whole:
            last = whole.best_guess
            return finish(cfg, training, last, pack, videos, run) if run.end() else {}


def export(run: TrainingRun, model: nn.Module, folder: Path, videos: Chosen, fps: float) -> None:
    """Write a classifier folder; `fps` is that of the data."""
    checked = run.state["val"], videos.val and len(videos.val)
    more = {"model": run.config.name, "fps": fps, **dict(zip(CHECKED, checked, strict=True))}
    provenance = run.provenance("finetune", run.config.parts[0]) | more
    backbones.export_backbone(model, folder, provenance)


def finish(
    cfg: Config, training: Training, last: Classifier, pack: Pack, videos: Chosen, run: TrainingRun
) -> dict:
    """Export, score the test split once and write what was found; ValueError without labels."""
    folder, plan, state, task = run.folder, run.plan, run.state, task_of(cfg.per_frame)
    for name in ("last", "backbone") if videos.val is None else ("last",):
        export(run, last, folder / name, videos, pack.rate())
    model = load_classifier(str(folder / "backbone"))

    # ---- predictions
    how = Extraction(
        training.num_clips, training.num_crops, 1, training.micro_batch,
        min(loader_workers(cfg.machine, 1), 1), run.accelerator.device, cfg.machine.precision,
    )  # fmt: skip
    said = task.predict(model, pack, videos.test, how, "test videos")
    if not len(said.truth):
        raise ValueError(f"{cfg.data}: nothing of the test videos has a label")
    learned = task.counts(pack, videos.train, model.classes)
    metrics, interval, notes = accuracies(said, cfg.seed, learned)
    metrics |= {name: Metric(value, len(videos.test)) for name, value in said.more.items()}
    details: dict[str, dict] = {}
    if not cfg.per_frame:
        folds = folds_of(videos, cfg.seed)
        floor = against_floor(
            pack, folds, how, model.input_spec, said, cfg.seed, pretrained=bool(cfg.backbone)
        )
        metrics, details["floor"], notes = metrics | floor[0], floor[1], [*notes, *floor[2]]

    # ---- results
    splits = (cfg.parts[0], videos.train), (cfg.parts[1], videos.test)
    protocol = {
        "kind": task.kind, "videos": videos_digest(videos.train, videos.test),
        "train_split": cfg.parts[0], "test_split": cfg.parts[1], "leave_out": cfg.leave_out,
        "num_train": len(videos.train), "num_test": len(videos.test), "shots": cfg.shots,
        "num_clips": training.num_clips, "num_crops": training.num_crops,
        "validation": videos.rule, "preset": cfg.preset, "patience": training.patience,
        # Those that were meant, not those of an early stop, which is part of the protocol.
        "training_clips": plan.steps * plan.batch_size,
    }  # fmt: skip
    unset = flat(Config())
    details |= {
        "views": describe_views(model.input_spec, how, task.pooling),
        "training": {
            **{k: v for k, v in flat(cfg).items() if v != unset[k]},  # results.json has them all
            "weights": cfg.weights or ("of the backbone" if cfg.backbone else "from scratch"),
            "steps": run.step, "of": plan.steps, "clips": run.step * plan.batch_size,
            "minutes": state["seconds"] / 60, "best_step": state["best_step"] or run.step,
            "best_validation_accuracy": state["best"], "skipped_steps": state["skipped"],
            "bad_clips": state["bad_clips"],
        },
        "interval": interval,
    }  # fmt: skip
    results = build_results(
        "finetune", describe_data(cfg.data, pack, *splits, model.classes),
        describe_classifier(model, cfg.name, cfg.backbone), protocol, flat(cfg), metrics, cfg.seed,
        versions(how.device, how.dtype_name), [*videos.notes, *notes], details, said,
    )  # fmt: skip
    saved = b""
    if said.scores is not None:
        parts = {"test": scored(videos.test, said.scores)}
        if videos.val is not None:
            scores = task.predict(model, pack, videos.val, how, "validation videos").scores
            assert scores is not None  # as of the test videos
            parts["val"] = scored(videos.val, scores)
        saved = scores_csv(parts, model.classes, results)
    written = publish(folder, results, said, videos.notes)
    written |= write_leaks(folder, pack, dict(splits) | ({"val": videos.val} if videos.val else {}))
    if saved:
        written["scores"] = write_scores(folder, saved)
    written["classifier"] = folder / "backbone"
    predict = f"muybridge predict --backbone {for_shell(folder / 'backbone')}"
    run.print_done(written, f"{predict} --video FILE_OR_FOLDER")
    return results.as_dict()


if __name__ == "__main__":
    command(main)
