"""VideoMAE: pretrain a video transformer by masked reconstruction.

Tong et al. 2022, https://arxiv.org/abs/2203.12602; dual masking of VideoMAE V2,
https://arxiv.org/abs/2303.16727. Labels are never used for training; where there are any, a kNN
score on held-out subjects of the training split shows whether the features get better, and decides
whether the preset auto starts from the package's starter.

    python recipes/videomae.py                              the synthetic dataset
    python recipes/videomae.py --data my_videos/            your own clips, 20 minutes
    python recipes/videomae.py shrec --data clips.csv       small clips, 2 CPU cores
    python recipes/videomae.py shrec_apart --data clips.csv --backbone RUN/backbone    second step
    python recipes/videomae.py --target flow     optical flow from colour; --stream flow: from flow
    accelerate launch --config_file launch/gpus.yaml recipes/videomae.py vit_b_k400 --data k400.csv

The first word chooses a preset, flags change single values, `--help` lists them. Without one, data
of your own have the preset `auto`: it looks at the clips, chooses values in place of those that
`--help` shows for it, and prints them with the reasons.
Starting the same command again continues an interrupted run.
"""

import sys
from pathlib import Path
from typing import Any

import pretrain.threads  # noqa: F401 (before torch)

import numpy as np
import torch
from torch import Tensor, nn

from downstream.encoders import form_of_weights, transformer, weights_to_start_from
from downstream.finetune import record_method
from downstream.guard import Guard
from downstream.models import build_model as build_family
from downstream.monitor import KNN, learning_words, online_scores, starter_ahead
from pretrain import auto, backbones, flags, log
from pretrain.data.cache import open_data, packing_side, raw_sources
from pretrain.data.sampling import FIGURE, counter_rng
from pretrain.data.shards import Pack, TrainClips, refuse_raw_streams, warn_of_clips
from pretrain.data.transforms import Augment
from pretrain.distill import Distilled
from pretrain.engine import Engine
from pretrain.figures import reconstruction_figure
from pretrain.health import Health
from pretrain.loop import TrainingRun, plan_run
from pretrain.masked import MaskedPixels
from pretrain.modes import too_large
from pretrain.names import counted, for_shell
from pretrain.optim import learning_rate, make_optimizers, set_rate
from pretrain.presets import AUTO
from pretrain.processes import asked_processes, computes_on_gpu, is_first
from pretrain.run import try_run
from pretrain.run_report import Curve
from pretrain.settings import STARTER, VITS
from pretrain.spec import Backbone, InputSpec
from pretrain.videomae import VideoMAE, build_videomae, draw_tokens, mask_of_view, start_from
from pretrain.views import ViewObjective, refuse_batch
from recipes.options.videomae import PRESETS, Config, command, unused

# ---------------------------------------------------------------------------------------- the step


def train_step(model, engine, batches, accumulate, clip_grad, names):
    """One optimizer step over `accumulate` micro-batches.

    `names` are those of a batch that the model takes, in its order.

    Returns:
        means of this process: the loss, `loss_beside_mean` and, of `ViewObjective`, view-retrieval
        accuracy; and the gradient norm over all processes: not finite, the weights were left alone.
    """
    means = torch.zeros(3, device=engine.device)
    for i in range(accumulate):
        batch = next(batches)
        tensors = [batch[name].to(engine.device, non_blocking=True) for name in names]
        engine.sync(last=i == accumulate - 1)
        loss, second = model(*tensors)
        engine.backward(loss / accumulate)
        watched = bare(engine.model).watched.to(engine.device)
        means += torch.cat([loss.detach().view(1), watched]) / accumulate
    # A prediction is freed: kept, it would lie beside the next step's.
    found = [second.detach()] if "clips" in names else []
    return [*means, *found], engine.step(clip_grad)


# ------------------------------------------------------------------------------------- the pieces


def build_model(cfg: Config) -> VideoMAE | MaskedPixels | ViewObjective | Distilled:
    """What is trained, fresh from its seed or with the weights it names; ValueError: none such."""
    torch.manual_seed(cfg.seed)
    model: VideoMAE | MaskedPixels
    if cfg.model in VITS:
        encoder = transformer(
            cfg.model, cfg.form, cfg.frames, cfg.stride, cfg.size, cfg.pool, cfg.stream
        )
        decoder = (cfg.decoder_dim, cfg.decoder_depth)
        model = build_videomae(VITS[cfg.model], encoder, *decoder, cfg.target_eps, cfg.target or "")
        if cfg.backbone:
            start_from(model, weights_to_start_from(cfg.backbone), cfg.backbone)
    elif cfg.form.motion_tokens != 1 or cfg.dual_mask:
        raise ValueError(
            f"--model {cfg.model} sees the whole grid: give --motion-tokens 1 --no-dual-mask"
        )
    else:
        clip: dict[str, Any] = {"stride": cfg.stride, "size": cfg.size, "subtract_mean": False}
        clip |= {"frames": cfg.frames} if cfg.frames else {}
        try:
            family = build_family(cfg.model, small=cfg.small, weights=cfg.backbone or "", **clip)
        except ValueError as error:  # other recipes call that flag so
            raise ValueError(str(error).replace("--weights", "--backbone")) from error
        assert isinstance(family, Backbone)
        if [*family.input_spec.streams] != [cfg.stream]:
            takes = " and ".join(family.input_spec.streams)
            raise ValueError(f"--model {cfg.model} takes {takes}, not --stream {cfg.stream} alone")
        form = cfg.form
        model = MaskedPixels(family, form.tubelet, form.patch, cfg.target_eps, cfg.target or "")
    if cfg.distill:
        assert cfg.reconstruct and not compares(cfg)  # `unused` refuses it
        return Distilled(model, cfg.distill, cfg.trained_share)
    if cfg.reconstruct and not compares(cfg):
        return model
    return ViewObjective(model, cfg.views, cfg.contrast, cfg.sigreg, cfg.reconstruct)


def start(cfg: Config, pack: Pack, ids: np.ndarray) -> tuple[str | None, str]:
    """Where `auto` starts: the package's starter, where labels say so, or None; and why."""
    decided = {"backbone", "frames", "size", "model", "pool", "contrast", "sigreg", "reconstruct"}
    decided |= {*vars(cfg.form)}
    ahead, why = False, ""
    if cfg.stream == "rgb" and not computes_on_gpu() and not {*cfg.given} & decided:
        ahead, why = starter_ahead(pack, ids, cfg.seed)
    typed = {"--distill": cfg.distill, "--trained-share": cfg.trained_share % 1}  # 1 is all
    if (named := [name for name, value in typed.items() if value]) and not (ahead or cfg.backbone):
        raise ValueError(
            f"{named[0]} {typed[named[0]]:g}: this run starts from fresh weights, and there are "
            f"none to hold to: give --backbone, such as starter, or leave {named[0]} out"
        )
    return STARTER if ahead else None, why


def compares(cfg: Config) -> str:
    """The flag by which views of clips are compared; "": none is."""
    return "contrast" if cfg.contrast else "sigreg" * bool(cfg.sigreg)


def takes_streams(cfg: Config) -> str:
    """What needs the data's streams, for messages."""
    return f"--model {cfg.model}" + f" --target {cfg.target}" * bool(cfg.target)


def bare(model: nn.Module) -> VideoMAE | MaskedPixels:
    """What reconstructs, without what compares views or distils around it."""
    masked = model.masked if isinstance(model, ViewObjective | Distilled) else model
    assert isinstance(masked, VideoMAE | MaskedPixels)
    return masked


def kept(model: nn.Module) -> nn.Module:
    """The encoder that is scored and exported."""
    return model.between() if isinstance(model, Distilled) else bare(model).encoder


def training_clips(cfg: Config, pack: Pack, ids: np.ndarray, masked) -> TrainClips:
    """The augmented, masked views that are trained on."""
    draw_mask = mask_of_view(cfg.mask, masked.mask_grid, cfg.mask_ratio, cfg.dual_mask)
    return TrainClips(
        pack, ids, masked.clip, cfg.seed, cfg.views, cfg.scales, draw_mask,
        Augment(colour=cfg.colour), spread=bool(compares(cfg)),
    )  # fmt: skip


def batch_names(cfg: Config) -> tuple[str, ...]:
    """What the model takes of a batch, in its order."""
    more = (("clips",) if compares(cfg) else ()) + ((cfg.target,) if cfg.target else ())
    return (cfg.stream, "visible", "masked", *more)


def refuse_early(cfg: Config, grid: tuple[int, int, int], spec: InputSpec) -> None:
    """Raise ValueError for what contradicts itself; masks are drawn over `grid`, clips `spec`."""
    if cfg.form.motion_tokens < 1 and cfg.mask != "random":
        raise ValueError(
            f"a {cfg.mask} mask needs the whole grid and --motion-tokens {cfg.form.motion_tokens} "
            "leaves some tokens out: give --mask random"
        )
    draw_tokens(cfg.mask, grid, cfg.mask_ratio, cfg.dual_mask, counter_rng(0, 0))
    refuse_raw_streams(raw_sources(cfg.data, cfg.split), spec, cfg.data, takes_streams(cfg))
    plan = plan_run(cfg.optim, 1, asked_processes(), cfg.views)
    if name := compares(cfg):
        refuse_batch(name, plan, cfg.optim.micro_batch)


def prepare(cfg: Config) -> tuple[VideoMAE | MaskedPixels | ViewObjective | Distilled, Engine]:
    """What is trained, and how processes train it; ValueError: what contradicts itself."""
    model = build_model(cfg)
    engine = Engine(cfg.machine, cfg.optim.optimizer, model, cfg.run.checkpoint_blocks, cfg.compile)
    masked = bare(model)
    refuse_early(cfg, masked.mask_grid, masked.clip)
    return model, engine


def dry_batch(cfg: Config, masked: VideoMAE | MaskedPixels) -> tuple[Tensor, ...]:
    """What reconstructs takes of one clip, or else what compares its views, as meta tensors."""
    drawn = mask_of_view(cfg.mask, masked.mask_grid, cfg.mask_ratio, cfg.dual_mask)
    tokens = drawn(counter_rng(0, 0), {}, np.empty(0))
    with torch.device("meta"):
        named = {
            name: torch.empty(cfg.views, *stream.shape(masked.clip.frames, masked.clip.size),
                              dtype=torch.uint8)
            for name, stream in masked.clip.streams.items()
        }  # fmt: skip
        named |= {n: torch.empty(cfg.views, len(t), dtype=t.dtype) for n, t in tokens.items()}
        named["clips"] = torch.empty(cfg.views, dtype=torch.int64)
    return tuple(named[n] for n in batch_names(cfg) if n != "clips" or not cfg.reconstruct)


def print_plan(cfg: Config, run: TrainingRun, pack: Pack, model: nn.Module) -> None:
    """Print what the run resolved to; on a CPU warn where its memory is too small for it."""
    encoder = bare(model).encoder
    spec, moving = encoder.input_spec, cfg.form.motion_tokens
    mask = f"{cfg.mask} {cfg.mask_ratio:.0%}"
    mask += ", half of it predicted (dual masking)" * cfg.dual_mask
    seen = ", optical flow" * (cfg.stream == "flow") + ", predicts flow" * (cfg.target == "flow")
    largest = "motion" if cfg.stream == "flow" else "frame difference"
    mask += f", of the {moving:.0%} with the largest {largest}" * (moving < 1)
    if cfg.contrast or cfg.sigreg:
        told = "contrasted with other clips" if cfg.contrast else "drawn together, SIGReg"
        mask += f"; {cfg.views} views {told}, weight {cfg.contrast or cfg.sigreg:g}"
        mask += ", nothing reconstructed" * (not cfg.reconstruct)
    mask += f"; tokens held to {cfg.backbone}'s, weight {cfg.distill:g}" * bool(cfg.distill)
    if cfg.distill and cfg.trained_share < 1:
        mask += f"; exported with {100 * (1 - cfg.trained_share):g} % of its weights"
    rows = {
        "data": f"{counted(run.plan.num_clips, 'clip')} of {pack.address} ({cfg.split})",
        "model": f"{cfg.model}, {log.parameters(encoder)}, {spec.in_words}{seen}",
        "mask": mask,
        "optimizer": f"{cfg.optim.optimizer}, learning rate {run.plan.rates}, cosine",
    }
    run.report.curve = Curve(
        ("loss", "contrast"), ("explained", "knn", "view_retrieval", "teacher_cosine"),
        f"{'masked reconstruction' if cfg.reconstruct else compares(cfg)}, {cfg.model} on "
        f"{cfg.data}, {counted(run.plan.num_clips, 'clip')}",
    )  # fmt: skip
    run.print_plan(f"VideoMAE {cfg.preset}", rows)
    if run.first and run.accelerator.device.type == "cpu":
        num, half = run.plan.micro * cfg.views, run.accelerator.mixed_precision == "bf16"
        most = bare(model) if cfg.reconstruct else model
        if warning := too_large(most, dry_batch(cfg, bare(model)), num, half):
            print(warning, flush=True)


# ------------------------------------------------------------------------------------------- main


def main(cfg: Config) -> dict:
    """Pretrain; returns the final step, loss, kNN score and counts."""
    cfg = flags.settle(cfg, unused(cfg), PRESETS.get(cfg.preset))
    if cfg.target == cfg.stream:
        cfg = flags.replace(cfg, target=None)  # the same run
    flow = "-flow" * (cfg.stream == "flow") + "-to-flow" * (cfg.target == "flow")
    folder = Path(cfg.out or f"runs/videomae-{cfg.preset}{flow}")
    pack = None
    if cfg.preset == AUTO:
        cfg, pack = auto.choose_by_data(cfg, folder, unused, form_of_weights, prepare, start)
    if cfg.guard is None:
        cfg = flags.replace(cfg, guard=bool(cfg.backbone))
    # ---- model and folder: what contradicts is refused before hours of packing
    model, engine = prepare(cfg)
    masked = bare(model)
    try_run(folder, cfg, {"knn_every"})

    # ---- data: before the process group exists, which does not wait so long
    if pack is None:
        pack = open_data(cfg.data, packing_side(cfg.size), is_first(), cfg.machine)
    ids = pack.split_if_any(cfg.split)
    pack.check_streams(ids, masked.clip, takes_streams(cfg))
    record_method(masked.encoder, pack.index)

    # ---- processes and plan
    engine.start()
    dataset = training_clips(cfg, pack, ids, masked)
    if cfg.preset == AUTO:
        loss_of = lambda twin, batch: twin(*[batch[name] for name in batch_names(cfg)])[0]
        cfg = auto.choose_steps(cfg, engine, model, dataset, cfg.views, loss_of)
    plan = plan_run(cfg.optim, len(ids), engine.processes, cfg.views)
    with TrainingRun(folder, cfg, pack.index["fingerprint"], plan, engine, {"knn_every"}) as run:
        print_plan(cfg, run, pack, model)
        if run.first:
            warn_of_clips(pack, ids, masked.encoder.input_spec)
            if cfg.contrast and cfg.reconstruct and not cfg.backbone:
                note = "from scratch it learned worse than from a backbone that reconstructs"
                print(f"note: --contrast without --backbone: {note}", file=sys.stderr)

        # ---- optimizer, wrapper and loader
        optim = cfg.optim
        how = (optim.optimizer, model, optim.weight_decay, optim.betas, optim.layer_decay)
        wrapped = engine.prepare(model, lambda: make_optimizers(*how))
        run.restore({"loss": None, "best": None, "guard": None, **dict.fromkeys(KNN)})
        if isinstance(model, Distilled):
            model.refuse_other_weights(str(cfg.backbone))
        health = Health(plan.steps, run.state["best"])
        guard = Guard(folder, bool(cfg.guard), run.state["guard"])
        run.report.health, run.report.remarks = health, guard.words
        names = batch_names(cfg)

        def score() -> dict[str, float]:
            with engine.whole() as whole:  # each process embeds a share
                encoder, how = kept(whole), (engine.accelerator, cfg.machine.precision)
                scores = online_scores(encoder, pack, ids, cfg.seed, *how, views=guard.on)
                health.scored(scores)
                about = run.provenance("videomae", cfg.split) | scores | {"fps": pack.rate()}
                guard.judge(scores, health.word, run.step, encoder if run.first else None, about)
                if run.first and run.report.due and cfg.reconstruct:
                    draw_reconstruction(cfg, bare(whole), pack, int(ids[0]), run)
            return scores

        # ---- loop
        if not run.step and (guard.on or cfg.knn_every != 0):
            score()  # of the starting weights, with which later ones are compared
        if guard.stopped:
            run.end_early()
        with run.batches(dataset) as batches:
            while run.unfinished:
                lr = learning_rate(run.step, plan.steps, plan.warmup, plan.peak, plan.final)
                set_rate(engine.optimizers, lr)
                means, norm = train_step(
                    wrapped, engine, batches, plan.accumulate, optim.clip_grad, names
                )
                loss, error, mean_costs, *found = run.agree(norm, means)
                values = {"loss": loss, "lr": lr, "grad_norm": norm}
                values |= health.rebuilt(error, mean_costs)
                values |= {"view_retrieval_accuracy": found[0]} if found else {}
                if cfg.distill:
                    values["teacher_cosine"] = 1 - (loss - error) / cfg.distill
                if cfg.contrast:
                    contrast, others = (loss - error) / cfg.contrast, plan.batch_size - 1
                    values |= health.contrasted("contrast", contrast, "infonce", others)
                if run.due(cfg.knn_every):
                    scores = score()
                    run.state |= {name: scores.get(name) for name in KNN}
                    values |= scores
                    if guard.stopped:
                        run.end_early()
                if run.log_due():
                    values |= engine.gradient_norms() | health.values
                    run.log(values, *learning_words(values, run.state, health.word))
                    health.say()
                run.finish_step({"loss": loss, "best": health.best, "guard": guard.kept})

        # ---- end
        with engine.whole() as whole:
            if run.end():
                finish(cfg, whole, pack, ids, run, guard)
        return run.state


def draw_reconstruction(cfg: Config, model, pack: Pack, sample: int, run: TrainingRun) -> str:
    """Draw what is made of a clip, for the report too; returns what to print of the figure."""
    rng = counter_rng(cfg.seed, 0, purpose=FIGURE)
    tokens = draw_tokens(cfg.mask, model.mask_grid, cfg.mask_ratio, False, rng)
    name, title = pack.record(sample)["source"], "reconstruction.png"
    about = f"{cfg.mask} mask, {cfg.mask_ratio:.0%} hidden"
    run.report.pictures[title] = f"{name}, {about}, rebuilt after {counted(run.step, 'step')}"
    return reconstruction_figure(
        run.folder / title, model, pack, sample, tokens, f"VideoMAE {cfg.model} on {name}", about
    )


def finish(cfg: Config, model, pack: Pack, ids: np.ndarray, run: TrainingRun, guard: Guard) -> None:
    """Export the backbone, draw a reconstruction and say where everything is."""
    exported = run.folder / "backbone"
    scores = {"loss": run.state["loss"], "online_knn": run.state["knn"], "fps": pack.rate()}
    about = run.provenance("videomae", cfg.split) | scores | guard.about
    backbones.export_backbone(guard.restored(kept(model)), exported, about)
    guard.say()
    made: dict[str, object] = {"backbone": exported}
    if cfg.reconstruct:
        made["figure"] = draw_reconstruction(cfg, bare(model), pack, int(ids[0]), run)
    then = "linear-probe" if pack.classes else "look"  # without labels nothing can be measured
    run.print_done(
        made, f"muybridge {then} --backbone {for_shell(exported)} --data {for_shell(cfg.data)}"
    )


if __name__ == "__main__":
    command(main)
