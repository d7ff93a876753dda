"""A training run on the disk: its folder, its plan, how it continues and when it must not go on."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from pretrain import checkpoint, log
from pretrain.names import for_screen

MAX_SKIPPED = 5  # non-finite steps in a row that stop the run


@dataclass(frozen=True)
class Plan:
    """What a schedule resolved to.

    Attributes:
        steps: optimizer steps.
        warmup: of them, those that warm up.
        micro: decodes in one micro-batch of one process.
        accumulate: micro-batches of one process in a step.
        decodes_per_step: over all processes.
    """

    steps: int
    warmup: int
    micro: int
    accumulate: int
    decodes_per_step: int


def plan_run(
    num_clips: int,
    processes: int,
    batch_size: int,
    micro_batch: int,
    views: int,
    steps: int,
    epochs: float,
    warmup: float,
) -> Plan:
    """Steps, accumulation and the sizes between them.

    Args:
        num_clips: of one epoch.
        processes: that share a batch.
        batch_size: effective batch, counted in views.
        micro_batch: most views that a process handles at once.
        views: crops taken from one decode.
        steps: optimizer steps; 0: as `epochs` gives them.
        epochs: passes over the data.
        warmup: share of the steps.

    Raises:
        ValueError: the effective batch cannot be divided as asked, or the schedule is empty.
    """
    if batch_size < 1 or batch_size % (processes * views):
        raise ValueError(
            f"--batch-size {batch_size} cannot be shared evenly by {processes} processes with "
            f"{views} views of each clip: choose a multiple of {processes * views}"
        )
    per_process = batch_size // views // processes  # decodes in a step
    most = max(micro_batch // views, 1)
    micro = next(m for m in range(min(most, per_process), 0, -1) if per_process % m == 0)
    per_step = batch_size // views
    num_steps = steps or math.ceil(epochs * num_clips / per_step)
    if num_steps < 1:
        raise ValueError(f"--steps {steps} and --epochs {epochs} make no step at all")
    return Plan(num_steps, round(warmup * num_steps), micro, per_process // micro, per_step)


def open_run(run: Path, config: object, data: dict, may_change: set[str], resume: bool) -> None:
    """Refuse a run's folder that holds other work.

    Args:
        run: the folder.
        config: the resolved configuration, a dataclass.
        data: what identifies the data: `data_fingerprint` and `num_clips`.
        may_change: names of values that do not decide the numbers.
        resume: there has to be something to continue.

    Raises:
        ValueError: the folder holds something else, a run of another configuration or of other data,
            or nothing to continue though that was asked for.
    """
    described = run / "config.json"
    if described.exists():
        old = json.loads(described.read_text())
        if "config" not in old:
            raise ValueError(f"{run} holds something that is not a run: give another --out")
        differences = log.config_differences(old["config"], config, may_change)
        if old["data_fingerprint"] != data["data_fingerprint"]:
            differences.append(
                f"data: {old['num_clips']} clips, fingerprint {old['data_fingerprint'][:12]} -> "
                f"{data['num_clips']} clips, fingerprint {data['data_fingerprint'][:12]}"
            )
        if differences:
            raise ValueError(
                f"{run} holds a run that differs ({'; '.join(differences)}): give the same values to "
                "continue it, or another --out to start anew; nothing was changed"
            )
    elif run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ValueError(f"{run} holds something that is not a run: give another --out")
    if resume and not checkpoint.checkpoints(run):
        raise ValueError(f"--resume: {run} holds no checkpoint to continue from")


def restore(
    run: Path, model: nn.Module, optimizers: list[Optimizer], state: dict, say: bool
) -> dict:
    """Put the newest valid checkpoint of a run, if there is one, into model and optimizers.

    Args:
        run: the run's folder.
        model: the bare model.
        optimizers: over its parameters.
        state: that of a run which begins.
        say: whether to print what was found.

    Returns:
        the state to go on from.

    Raises:
        ValueError: there are checkpoints and none of them verifies.
    """
    found, problems = checkpoint.newest_valid(run)
    for problem in problems if say else []:
        print(f"warning: {for_screen(problem)}; going back to an older one", file=sys.stderr)
    if found:
        state = state | checkpoint.load_checkpoint(found, model, optimizers)
        if say:
            print(f"continuing from {found}\n", flush=True)
    elif problems:
        raise ValueError(f"{run} has no checkpoint that verifies; move its checkpoints folder away")
    return state


def record_bad_clips(run: Path, errors: list[dict]) -> None:
    """Append clips that could not be decoded to the run's ledger and name them on the screen."""
    for error in errors:
        print(
            for_screen(f"bad clip replaced: {error['source']}: {error['reason']}"),
            file=sys.stderr,
            flush=True,
        )
        with open(run / "data_errors.jsonl", "a") as file:
            file.write(json.dumps(error) + "\n")


def refuse_to_go_on(run: Path, state: dict, decodes_per_step: int, max_bad_clips: float) -> None:
    """Stop a run that no longer learns from the data it was given.

    Args:
        run: the run's folder, for the sentence.
        state: with `step`, `skipped_in_row` and `bad_clips`.
        decodes_per_step: clips of a step.
        max_bad_clips: share of the clips seen that may be undecodable.

    Raises:
        ValueError: too many steps in a row without a finite gradient, or too many bad clips.
    """
    if state["skipped_in_row"] >= MAX_SKIPPED:
        raise ValueError(
            f"the gradient was not finite in {MAX_SKIPPED} steps in a row, the last one {state['step']}: "
            f"lower --base-lr or try --precision fp32; {run}/checkpoints still holds the last good state"
        )
    seen = state["step"] * decodes_per_step
    # At least 10, so that one bad clip does not end a short run.
    if state["bad_clips"] > max(max_bad_clips * seen, 10):
        raise ValueError(
            f"{state['bad_clips']} of {seen} clips could not be decoded, more than --max-bad-clips "
            f"{max_bad_clips:g}; they are listed in {run}/data_errors.jsonl: pack the data again"
        )
