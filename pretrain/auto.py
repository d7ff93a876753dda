"""The preset `auto`: what a pretraining run takes from the data, by rules.

Published settings belong to one data set. Here the clips are looked at once, `measure`; rules make
settings of what was seen, each with its reason, `choose`; and the number of steps follows from the
minutes there are, `choose_steps`. recipes/RESULTS.md says which rules were measured, and on what.
"""

import copy
import math
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pretrain.checkpoint import newest_valid, read_state
from pretrain.data.cache import open_data, raw_sources
from pretrain.data.decode import DecodeError
from pretrain.data.sampling import MEASURED, some_clips, test_boxes, test_indices
from pretrain.data.shards import (
    Mixture,
    Pack,
    TrainClips,
    collate_views,
    crop_clip,
    refuse_raw_streams,
)
from pretrain.engine import Engine
from pretrain.files import read_json
from pretrain.flags import flag, flat, refuse_numbers, replace
from pretrain.log import print_table
from pretrain.loop import plan_run
from pretrain.names import counted
from pretrain.optim import make_optimizers, set_rate, update
from pretrain.presets import AUTO
from pretrain.processes import asked_processes, computes_on_gpu, is_first, loader_workers
from pretrain.run import try_place
from pretrain.settings import VITS
from pretrain.spec import FLOW_ZERO, InputSpec, Stream

LOOKED_AT = 48  # clips
CELLS = 12  # across and down a picture, in which motion is looked for
FRAMES = 16  # of a clip, or twice as many where these would lie too far apart:
STEP = 0.13  # seconds between two of them, at most if that can be
WINDOW = 2 * FRAMES * STEP  # seconds that a clip spans at most
# Of a clip that are used at most; on a GPU: True. Of selected tokens, of which fewer are hidden and
# all decoded, half as many.
MOST_TOKENS = {False: 288, True: 1568}
SIZES = {False: (112, 96, 80, 64, 48, 32), True: (224, 160, 128, 112, 96, 64, 48, 32)}
SIDE = {False: 128, True: 256}  # to which raw data are packed, pixels
NOTHING = 0.002  # of picture and time: where less of it moves, motion cannot be selected
SPARSE = 0.03  # of picture and time: where less of it moves, people may be small
LEAST_PART, LEAST_TOKENS = 0.05, 16  # that are used
STILL = 0.5  # of the picture: where more of it moves, all tokens are used
DISTILL = 10.0  # weight of holding tokens to those of the starting weights
TRAINED_SHARE = 0.25  # of the trained weights, in what is exported then
USABLE = 0.92  # of the time is training: the rest goes to scores and checkpoints

Choice = tuple[Any, str]  # of a flag: its value, and why
T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """What clips are like.

    Attributes:
        clips: how many there are.
        frames: of a clip, the median; like the rest, of videos, if there are any.
        fps: their frames a second, the median.
        side: the short side that nine in ten clips have at least, pixels.
        moving: the part of picture and time in which something moves, in three of four clips at
            most; 0 of stills.
        pictures: how many of the clips are.
    """

    clips: int
    frames: int
    fps: float
    side: int
    moving: float
    pictures: int = 0

    def in_words(self) -> str:
        """For a person."""
        if self.frames == 1:
            return f"{counted(self.clips, 'picture')}, {self.side} pixels"
        among = f", {counted(self.pictures, 'picture')} among them," * bool(self.pictures)
        return (
            f"{counted(self.clips, 'clip')}{among} of {self.frames / self.fps:.1f} s at "
            f"{self.fps:g} frames a second, {self.side} pixels as packed; {self.moving:.1%} of "
            "picture and time move"
        )


def measure(pack: Pack, ids: np.ndarray, stream: str = "rgb") -> Facts:
    """Look at the clips of a pack; the same clips give the same facts on every machine.

    Args:
        pack: the data.
        ids: the samples to train on. `LOOKED_AT` of them are decoded.
        stream: in which motion is looked for.

    Raises:
        ValueError: none of those can be decoded.
    """
    every = ids
    if (lasting := pack.column("frames")[ids] > 1).any():
        ids = ids[lasting]  # pictures among videos say nothing of these
    frames, width, height = (pack.column(name)[ids] for name in ("frames", "width", "height"))
    length, side = int(np.median(frames)), int(np.percentile(np.minimum(width, height), 10))
    some = some_clips(ids, LOOKED_AT, 0, MEASURED, in_order=pack.remote is not None)
    records = [pack.record(int(i)) for i in some]
    fps = float(np.median([record["fps"] for record in records]))
    pictures = int(len(every) - lasting.sum())
    if length == 1:
        return Facts(len(every), 1, fps, side, 0.0, pictures)
    moving: list[float] = []
    for record in records:
        try:
            moving.append(moving_part(pack, record, stream, _stride(length, fps)))
        except (DecodeError, OSError) as error:
            reason = error
    if not moving:
        raise ValueError(f"{pack.name}: no clip of {len(records)} can be decoded: {reason}")
    return Facts(len(every), length, fps, side, float(np.percentile(moving, 75)), pictures)


def moving_part(pack: Pack, record: dict, stream: str, stride: int) -> float:
    """The fraction of picture and time of a clip in which something moves.

    The centre of the picture is cut into `CELLS` x `CELLS` cells. One moves between two frames
    where its grey values change by more than 4 of 255 levels, in the mean, and by more than four
    times what the stillest quarter of all cells do: that is noise and compression, up to 4 levels,
    or else a camera that moves. Of optical flow, a cell moves if it does by more than an eighth of
    the bound.

    Raises:
        DecodeError: the clip is broken.
    """
    if record["frames"] == 1:
        return 0.0
    stand_for = Stream((0.0,) * 3, (1.0,) * 3)
    spec = InputSpec(FRAMES, stride, 8 * CELLS, {"rgb": stand_for})
    (indices,) = test_indices(record["frames"], FRAMES, stride, 1)
    (box,) = test_boxes(record["width"], record["height"], 1)
    if stream == "flow":
        left, top, width, height = box
        levels = pack.levels(record, indices)[:, :, top : top + height, left : left + width]
        change = (levels.float() - FLOW_ZERO).abs().amax(1)
        return (_cells(change) > 16).float().mean().item()
    grey = crop_clip({"rgb": pack.frames(record, indices)}, record, box, spec)["rgb"].float()
    change = grey.mean(0).diff(dim=0)
    light = change.flatten(1).median(1).values  # which flickers in the whole picture
    cells = _cells((change - light[:, None, None]).abs())
    noise = min(cells.flatten().quantile(0.25).item(), 4.0)
    return (cells > max(4 * noise, 4)).float().mean().item()


def _cells(change: Tensor) -> Tensor:
    """(T, H, W) as the means of cells, (T, CELLS, CELLS)."""
    return torch.nn.functional.adaptive_avg_pool2d(change[None], (CELLS, CELLS))[0]


def _stride(frames: int, fps: float) -> int:
    """Source frames between two of a clip that spans a video of so many frames, or `WINDOW`."""
    return max(1, round(min(frames, WINDOW * fps) / FRAMES))


def choose(facts: Facts, typed: Mapping[str, Any], gpu: bool) -> dict[str, Choice]:
    """The settings of masked reconstruction for clips like these, each with its reason.

    Args:
        facts: of the clips.
        typed: values that the user gave, by flag: what follows from another value follows from
            these.
        gpu: whether it is computed on one. None of these rules was measured there.
    """
    chosen: dict[str, Choice] = {}

    def put(name: str, value: T, why: str) -> T:
        if name in typed:
            return typed[name]
        chosen[name] = (value, why)
        return value

    long, still = facts.frames / facts.fps, 1 in (facts.frames, typed.get("frames"))
    # The whole grid is needed by masks of whole places or times, and by networks of other families.
    needs = ""
    if typed.get("mask", "random") != "random":
        needs = f"a {typed['mask']} mask needs them all"
    elif typed.get("model", "vit_ti") not in VITS:
        needs = f"{typed['model']} takes them all"
    whole = still or bool(needs) or facts.moving > STILL or facts.moving < NOTHING
    span = min(long, WINDOW)
    frames = FRAMES if span / FRAMES <= STEP else 2 * FRAMES
    stride_of = lambda frames: max(1, round(span * facts.fps / frames))
    step = f"{stride_of(frames) / facts.fps:.2f} s apart"
    if facts.frames < frames:
        step = f"a clip has {facts.frames}, fewer than {frames}"
        frames = FRAMES if facts.frames >= FRAMES else max(2, facts.frames - facts.frames % 2)
    frames = max(frames - frames % typed.get("tubelet", 1), typed.get("tubelet", 1))
    frames = put("frames", 1 if still else frames, "pictures" if still else step)
    if frames > 1:
        stride = stride_of(frames)
        spans = f"a view spans {frames * stride / facts.fps:.1f} s"
        put("stride", stride, f"{spans}, half of the clips have {long:.1f} s or more")
    fours = frames % 4 == 0 and (frames > FRAMES or not whole)
    tubelet = put(
        "tubelet", 4 if fours else 2 if frames % 2 == 0 else 1,
        "a single frame" if frames == 1 else f"{frames} is odd" if frames % 2
        else "as published" if not fours
        else f"{frames // 4} tokens in time",
    )  # fmt: skip
    part = typed.get("motion_tokens", 1.0 if whole else max(facts.moving, LEAST_PART))
    size, patch = _size(facts.side, part * frames / tubelet, part < 1, typed, gpu)
    tokens = max(frames // tubelet * (size // patch) ** 2, 1)
    least = math.ceil(100 * LEAST_TOKENS / tokens)
    moves = f"in three of four clips at most {facts.moving:.1%} of picture and time move"
    moves = "nothing moves, so none can be selected" if facts.moving < NOTHING else moves
    moves = f"at least {LEAST_TOKENS} tokens" if math.ceil(100 * part) < least else moves
    part = min(max(math.ceil(100 * part), least), 100) / 100
    part = put("motion_tokens", part, "pictures have no motion" if still else needs or moves)
    used = f"{counted(round(part * tokens), 'token')} of a clip are used"
    small = " and are enlarged" * (size > facts.side)
    put("size", size, f"clips have {facts.side} pixels{small}, and {used}")
    put("patch", patch, f"{size // patch} x {size // patch} of them make a picture")
    dense = part == 1 and frames > 1  # all tokens of a video
    put("mask_ratio", 0.9 if dense else 0.75, "as published: video is redundant in time" if dense
        else "as published for images" if frames == 1
        else "motion-selected tokens are less redundant")  # fmt: skip
    dual = dense and size // patch % 2 == 0
    put("dual_mask", dual, "half of the hidden tokens are predicted" if dual
        else "few tokens are hidden: all are predicted")  # fmt: skip
    put("model", "vit_ti" if not gpu else "vit_s" if facts.clips < 50_000 else "vit_b",
        f"{counted(facts.clips, 'clip')} on a {'GPU' if gpu else 'CPU'}")  # fmt: skip
    put("small", not gpu, f"on a {'GPU' if gpu else 'CPU'}")
    if not gpu and typed.get("model", "vit_ti") == "vit_ti":
        put("depth", 6, "half the blocks of ViT-Ti, so that twice the steps fit")
    # No more than there are clips, so that few clips make many steps.
    usual = 256 if gpu else 32 if part == 1 else 64
    fewer = max(8, 2 ** int(math.log2(facts.clips)))
    shared = asked_processes() * typed.get("views", 1)
    batch = shared * math.ceil(min(usual, fewer) / shared)
    why = f"there are {counted(facts.clips, 'clip')}" if fewer < usual else (
        "clips with all tokens" if part == 1 else "clips with few tokens each"
    )  # fmt: skip
    batch = put("batch_size", batch, why)
    put("micro_batch", batch if batch <= 64 else 64, "at once, 64 at most")
    muon = typed.get("optimizer", "muon") == "muon"
    rate = (0.024 if part == 1 else 0.016) * (1 if muon else 0.2)
    words = "for Muon" if muon else "for AdamW, a fifth of Muon's"
    if typed.get("backbone"):
        alone = typed.get("reconstruct", True) and not (
            typed.get("contrast") or typed.get("sigreg")
        )
        held = alone and put("distill", DISTILL, "so that what the weights know is not forgotten")
        if held:
            put("trained_share", TRAINED_SHARE, "with more, what the weights know may be lost")
        else:
            rate, words = rate / 10, f"a tenth of the rate {words}: the weights are trained"
    rate = put("base_lr", rate, words)
    put("final_lr", rate / 100, "a hundredth of --base-lr")
    return chosen


def _size(
    side: int, used: float, selected: bool, typed: Mapping[str, Any], gpu: bool
) -> tuple[int, int]:
    """Size and patch, pixels: as sharp as the clips and the number of tokens allow.

    Args:
        side: of the clips.
        used: tokens of a clip that are used, for each place of the picture.
        selected: they are not all.
        typed: see `choose`.
        gpu: see there.
    """
    for patch in (typed["patch"],) if "patch" in typed else (8, 16):
        sizes = (typed["size"],) if "size" in typed else SIZES[gpu]
        sizes = tuple(s for s in sizes if s <= side and s % patch == 0) or sizes[-1:]
        most = MOST_TOKENS[gpu] / (2 if selected else 1)
        fit = [s for s in sizes if used * (s // patch) ** 2 <= most]
        # Coarse patches where fine ones would leave a picture of few pixels.
        if fit and fit[0] >= min(96, sizes[0]):
            return fit[0], patch
    return (fit or sizes[-1:])[0], patch


def choose_by_data(
    config: Any, folder: Path, unused: Callable[[Any], Collection[str]],
    form_of: Callable[[str, float], Mapping[str, Any]], check: Callable[[Any], object],
    start: Callable[[Any, Pack, np.ndarray], Choice],
) -> tuple[Any, Pack]:  # fmt: skip
    """What `auto` makes of the data, all but the steps; or made, of a run that goes on.

    Args:
        config: of masked reconstruction, as typed: `data`, `split`, `stream`, `machine`, `given`.
        folder: of the run.
        unused: of a configuration, the flags without effect.
        form_of: values by flag that weights decide from which it starts, by their name and the
            frames a second of the clips.
        check: raises ValueError for a configuration that contradicts itself.
        start: of a configuration without weights, the data and the samples: the name of weights to
            start from, None for fresh ones; and why, "" where there was no choice.

    Returns:
        the configuration; and the data, opened.

    Raises:
        ValueError: as `try_place`, `open_data`, `recorded`, `measure` and `choose`.
    """
    try_place(folder, config.run)
    gpu, typed = computes_on_gpu(), {n: v for n, v in flat(config).items() if n in config.given}

    def chosen_for(facts: Facts, begin: dict[str, Choice]) -> tuple[Any, dict[str, Choice]]:
        given = {name: value for name, (value, _) in begin.items()} | typed
        form = form_of(given["backbone"], facts.fps) if given.get("backbone") else {}
        chosen = {n: (v, "as the weights have it") for n, v in form.items() if n not in typed}
        rest = choose(facts, {n: v for n, (v, _) in chosen.items()} | given, gpu)
        return with_choices(config, begin | chosen | rest, unused)

    if raw := raw_sources(config.data, config.split):  # packing takes long: what can be said is
        check(chosen_for(Facts(len(raw), 32, 16.0, 256, 1.0), {})[0])
        wanted = {config.stream, config.target} - {None}
        spec = InputSpec(1, 1, 8, dict.fromkeys(wanted, Stream((0.0,) * 3, (1.0,) * 3)))
        refuse_raw_streams(raw, spec, config.data, "this run")
    pack = open_data(config.data, SIDE[gpu], is_first(), config.machine)
    if known := recorded(folder, config, pack.index["fingerprint"]):
        return known, pack
    ids = pack.split_if_any(config.split)
    facts, begin = measure(pack, ids, config.stream), start(config, pack, ids)
    config, chosen = chosen_for(facts, {"backbone": begin} if begin[1] else {})
    config = explain(config, {"the clips": facts.in_words()}, chosen)
    if is_first() and facts.frames > 1 and facts.moving < SPARSE:
        what = "nothing moves in these clips" if facts.moving < NOTHING else (
            f"only {facts.moving:.1%} of picture and time move"
        )  # fmt: skip
        cut = "if people are small in them, pack.py --follow cuts them out"
        print(f"note: {what}: {cut}\n", file=sys.stderr)
    return config, pack


def with_choices(
    config: Any, chosen: Mapping[str, Choice], unused: Callable[[Any], Collection[str]]
) -> tuple[Any, dict[str, Choice]]:
    """A configuration with those of the choices that have an effect in it, and these."""
    without = unused(replace(config, **{name: value for name, (value, _) in chosen.items()}))
    effective = {name: choice for name, choice in chosen.items() if name not in without}
    return replace(config, **{name: value for name, (value, _) in effective.items()}), effective


def explain(config: Any, about: Mapping[str, str], chosen: Mapping[str, Choice]) -> Any:
    """A configuration that knows what was seen, what was chosen, as typed, and why; it is printed.

    Args:
        config: with a field `reasons`.
        about: what was seen, by name.
        chosen: of `with_choices`.
    """
    rows = dict(about)
    reasons = [f"{name}: {words}" for name, words in about.items()]
    for name, (value, why) in chosen.items():
        if isinstance(value, bool):
            typed = flag(name if value else f"no_{name}")
            rows[typed] = why
        else:
            typed = f"{flag(name)} {value}"
            rows[flag(name)] = f"{value}: {why}"
        reasons.append(f"{typed}: {why}")
    if is_first():
        print_table("auto (a flag overrides it)", rows)
    return replace(config, reasons=tuple(reasons))


def recorded(folder: Path, config: Any, fingerprint: str) -> Any:
    """What a run of this folder and of these data chose when it began; None: none has begun.

    Args:
        folder: of the run.
        config: as typed, with `preset` and `given`: what was typed stays.
        fingerprint: of the data.

    Raises:
        ValueError: the folder's config.json has a value that cannot be.
    """
    found, _ = newest_valid(folder)
    try:
        described = read_state(found).get("run") if found else read_json(folder / "config.json")
    except ValueError:  # none is there, or `open_run` says what to do
        return None
    if not isinstance(described, dict) or described.get("data_fingerprint") != fingerprint:
        return None
    old = described.get("config")
    if not isinstance(old, dict) or old.get("preset") != AUTO:
        return None
    now = flat(config)
    values = {name: old[name] for name in now if name in old and name not in config.given}
    damaged = ValueError(f"{folder}/config.json is damaged: put it back, or give another --out")
    for name, value in values.items():
        is_now = now[name]
        if isinstance(value, list) and isinstance(is_now, tuple):
            if {type(part) for part in value} - {float, int, str}:
                raise damaged
            values[name] = tuple(value)
        elif (value is None and is_now is not None) or (
            None not in (value, is_now) and not isinstance(value, type(is_now) | int)
        ):
            raise damaged
    config = replace(config, **values)
    try:
        refuse_numbers(config)
    except (ValueError, TypeError) as error:
        raise damaged from error
    return config


def seconds_a_step(
    load: Callable[[], Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    model: nn.Module,
    make: Callable[[nn.Module], list[torch.optim.Optimizer]],
    accumulate: int,
    apart: bool,
    accelerator: Accelerator,
) -> float:
    """How long an optimizer step takes here, on the slowest process.

    A copy of the model is trained for three steps; neither the model nor a generator changes.

    Args:
        load: a micro-batch.
        loss_of: of a model and a micro-batch.
        model: what is trained.
        make: its optimizers.
        accumulate: micro-batches of a step.
        apart: other processes load.
        accelerator: the processes.
    """
    twin = copy.deepcopy(model).to(accelerator.device).train()
    optimizers = make(twin)
    set_rate(optimizers, 1e-6)
    load()
    began = time.perf_counter()
    batch = load()
    loading = time.perf_counter() - began
    times = []
    with torch.random.fork_rng():
        for _ in range(3):
            began = time.perf_counter()
            with accelerator.autocast():
                loss = loss_of(twin, batch)
            loss.backward()
            passed = time.perf_counter()
            update(optimizers, list(twin.parameters()), 0.0)  # waits for the device
            ended = time.perf_counter()
            training = (passed - began) * accumulate + ended - passed
            times.append(max(training, loading * accumulate) if apart
                         else training + loading * accumulate)  # fmt: skip
    shared = torch.tensor([min(times)], device=accelerator.device)
    return float(accelerator.gather(shared).max())


def choose_steps(
    config: Any, engine: Engine, model: nn.Module, dataset: TrainClips | Mixture, views: int,
    loss_of: Callable[[nn.Module, dict[str, Tensor]], Tensor],
) -> Any:  # fmt: skip
    """As many steps as fit into the minutes of a configuration, unless it says how many.

    Args:
        config: with `minutes`, `optim`, `machine` and `given`.
        engine: started.
        model: what is trained.
        dataset: what it is trained on.
        views: of a clip.
        loss_of: of a model and a micro-batch.
    """
    if config.optim.steps or "epochs" in config.given:
        return config
    plan, optim = plan_run(config.optim, 1, engine.processes, views), config.optim
    seconds = seconds_a_step(
        lambda: collate_views([dataset[place] for place in range(plan.micro)]),
        lambda twin, batch: loss_of(twin, {
            name: value.to(engine.device) for name, value in batch.items()
            if isinstance(value, Tensor)
        }),
        model,
        lambda twin: make_optimizers(
            optim.optimizer, twin, optim.weight_decay, optim.betas, optim.layer_decay
        ),
        plan.accumulate, loader_workers(config.machine, on_cpu=0) > 0, engine.accelerator,
    )  # fmt: skip
    steps = max(20, int(config.minutes * 60 * USABLE / seconds) // 10 * 10)
    takes = f"{seconds:.2f} s each, for --minutes {config.minutes:g}"
    if steps * seconds > 60 * config.minutes:
        takes += f"; fewer are none: it will be {steps * seconds / 60:.1f}"
    chosen = f"--steps {steps}: {takes}"
    if is_first():
        print(chosen, flush=True)
    return replace(config, steps=steps, reasons=(*config.reasons, chosen))
