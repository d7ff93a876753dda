"""VideoMAE: pretrain a video transformer by masked reconstruction.

Tong et al. 2022, https://arxiv.org/abs/2203.12602; dual masking of VideoMAE V2,
https://arxiv.org/abs/2303.16727. Labels are never used for training; where there are any, a kNN
score on held-out subjects of the training split shows whether the features get better.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pretrain.threads  # noqa: F401 (before torch)

import numpy as np
import torch
import tyro
from torch import nn

from downstream.encoders import form_of_weights, transformer, weights_to_start_from
from downstream.finetune import record_method
from downstream.guard import Guard
from downstream.models import build_model as build_family
from downstream.monitor import KNN, learning_words, online_scores
from pretrain import auto, backbones, flags, log, settings
from pretrain.data.cache import open_data, packing_side, raw_sources, synthetic_clips
from pretrain.data.sampling import FIGURE, counter_rng
from pretrain.data.shards import Pack, TrainClips, refuse_raw_streams, warn_of_clips
from pretrain.data.transforms import Augment
from pretrain.engine import Engine
from pretrain.figures import reconstruction_figure
from pretrain.health import Health
from pretrain.loop import TrainingRun, plan_run
from pretrain.masked import MaskedPixels
from pretrain.names import counted, for_shell
from pretrain.optim import learning_rate, make_optimizers, set_rate
from pretrain.processes import asked_processes, is_first
from pretrain.run import try_run
from pretrain.spec import Backbone, InputSpec
from pretrain.videomae import VideoMAE, build_videomae, draw_tokens, mask_of_view, start_from
from pretrain.views import ViewObjective, refuse_batch
from pretrain.vit import VITS


@dataclass(frozen=True)
class Config:
    """Pretrain by masked reconstruction."""

    preset: Annotated[str, tyro.conf.Suppress] = "tiny"
    given: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()  # flags that were typed
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
    """Weights to start from: a backbone folder, a run, hf:OWNER/NAME or an official .pth."""
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
    auto.AUTO: flags.replace(SHREC, preset=auto.AUTO, steps=None, dual_mask=False),
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
    auto.AUTO: "your own clips: chosen by what they are like, and printed (the default for --data)",
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
OFF = {"small": False, "motion_tokens": 1.0, "dual_mask": False, "colour": 0.0}


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
    if cfg.optim.steps:
        why["epochs"] = f"with --steps {cfg.optim.steps}"
    why |= auto.idle_minutes(cfg)
    given = flags.flat(cfg)
    return {name: w for name, w in why.items() if given[name] != OFF.get(name)}


def build_model(cfg: Config) -> VideoMAE | MaskedPixels | ViewObjective:
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
        family = build_family(cfg.model, small=cfg.small, weights=cfg.backbone or "", **clip)
        assert isinstance(family, Backbone)
        if [*family.input_spec.streams] != [cfg.stream]:
            takes = " and ".join(family.input_spec.streams)
            raise ValueError(f"--model {cfg.model} takes {takes}, not --stream {cfg.stream} alone")
        form = cfg.form
        model = MaskedPixels(family, form.tubelet, form.patch, cfg.target_eps, cfg.target or "")
    if cfg.reconstruct and not compares(cfg):
        return model
    return ViewObjective(model, cfg.views, cfg.contrast, cfg.sigreg, cfg.reconstruct)


def compares(cfg: Config) -> str:
    """The flag by which views of clips are compared; "": none is."""
    return "contrast" if cfg.contrast else "sigreg" * bool(cfg.sigreg)


def takes_streams(cfg: Config) -> str:
    """What needs the data's streams, for messages."""
    return f"--model {cfg.model}" + f" --target {cfg.target}" * bool(cfg.target)


def bare(model: nn.Module) -> VideoMAE | MaskedPixels:
    """What reconstructs, without what compares views around it."""
    masked = model.masked if isinstance(model, ViewObjective) else model
    assert isinstance(masked, VideoMAE | MaskedPixels)
    return masked


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


def prepare(cfg: Config) -> tuple[VideoMAE | MaskedPixels | ViewObjective, Engine]:
    """What is trained, and how processes train it; ValueError: what contradicts itself."""
    model = build_model(cfg)
    engine = Engine(cfg.machine, cfg.optim.optimizer, model, cfg.run.checkpoint_blocks, cfg.compile)
    masked = bare(model)
    refuse_early(cfg, masked.mask_grid, masked.clip)
    return model, engine


def print_plan(cfg: Config, run: TrainingRun, pack: Pack, encoder) -> None:
    """Print what the run resolved to."""
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
    rows = {
        "data": f"{counted(run.plan.num_clips, 'clip')} of {pack.address} ({cfg.split})",
        "model": f"{cfg.model}, {log.parameters(encoder)}, {spec.in_words}{seen}",
        "mask": mask,
        "optimizer": f"{cfg.optim.optimizer}, learning rate {run.plan.rates}, cosine",
    }
    run.print_plan(f"VideoMAE {cfg.preset}", rows)


# ------------------------------------------------------------------------------------------- main


def main(cfg: Config) -> dict:
    """Pretrain; returns the final step, loss, kNN score and counts."""
    cfg = flags.settle(cfg, unused(cfg), PRESETS.get(cfg.preset))
    if cfg.target == cfg.stream:
        cfg = flags.replace(cfg, target=None)  # the same run
    if cfg.guard is None:
        cfg = flags.replace(cfg, guard=bool(cfg.backbone))
    flow = "-flow" * (cfg.stream == "flow") + "-to-flow" * (cfg.target == "flow")
    folder = Path(cfg.out or f"runs/videomae-{cfg.preset}{flow}")
    pack = None
    if cfg.preset == auto.AUTO:
        form = form_of_weights(cfg.backbone) if cfg.backbone else {}
        cfg, pack = auto.choose_by_data(cfg, folder, unused, form, prepare)
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
    if cfg.preset == auto.AUTO:
        loss_of = lambda twin, batch: twin(*[batch[name] for name in batch_names(cfg)])[0]
        cfg = auto.choose_steps(cfg, engine, model, dataset, cfg.views, loss_of)
    plan = plan_run(cfg.optim, len(ids), engine.processes, cfg.views)
    with TrainingRun(folder, cfg, pack.index["fingerprint"], plan, engine, {"knn_every"}) as run:
        print_plan(cfg, run, pack, masked.encoder)
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
        health = Health(plan.steps, run.state["best"])
        guard = Guard(folder, bool(cfg.guard), run.state["guard"])
        names = batch_names(cfg)

        def score() -> dict[str, float]:
            with engine.whole() as whole:  # each process embeds a share
                encoder, how = bare(whole).encoder, (engine.accelerator, cfg.machine.precision)
                scores = online_scores(encoder, pack, ids, cfg.seed, *how, views=guard.on)
                health.scored(scores)
                about = run.provenance("videomae", cfg.split) | scores
                guard.judge(scores, health.word, run.step, encoder if run.first else None, about)
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
                finish(cfg, bare(whole), pack, ids, run, guard)
        return run.state


def finish(cfg: Config, model, pack: Pack, ids: np.ndarray, run: TrainingRun, guard: Guard) -> None:
    """Export the backbone, draw the figures and say where everything is."""
    folder, exported = run.folder, run.folder / "backbone"
    scores = {"loss": run.state["loss"], "online_knn": run.state["knn"]}
    about = run.provenance("videomae", cfg.split) | scores | guard.about
    backbones.export_backbone(guard.restored(model.encoder), exported, about)
    guard.say()
    made: dict[str, object] = {"backbone": exported}
    if cfg.reconstruct:
        rng = counter_rng(cfg.seed, 0, purpose=FIGURE)
        tokens = draw_tokens(cfg.mask, model.mask_grid, cfg.mask_ratio, False, rng)
        sample = int(ids[0])
        made["figure"] = reconstruction_figure(
            folder / "reconstruction.png", model, pack, sample, tokens,
            f"VideoMAE {cfg.model} on {pack.record(sample)['source']}",
            f"{cfg.mask} mask, {cfg.mask_ratio:.0%} hidden",
        )  # fmt: skip
    made["curve"] = log.curve_figure(
        folder / "curve.png", folder / "log.jsonl", ("loss", "contrast"),
        ("explained", "knn", "view_retrieval"),
        f"{'masked reconstruction' if cfg.reconstruct else compares(cfg)}, {cfg.model} on "
        f"{cfg.data}, {counted(len(ids), 'clip')}",
    )  # fmt: skip
    data = for_shell(cfg.data if synthetic_clips(cfg.data) else pack.address)
    run.print_done(made, f"muybridge linear-probe --backbone {for_shell(exported)} --data {data}")


if __name__ == "__main__":
    log.cli(main, PRESETS, unused, ABOUT, preset_of=auto.preset_of(synthetic_clips, "tiny"))
