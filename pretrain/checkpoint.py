"""Saving and resuming a run.

    RUN/checkpoints/step-00000100/model.safetensors
                                  optimizer.safetensors
                                  state.json
                                  manifest.json

A checkpoint is written to a temporary folder, synced, hashed and renamed, and only then are older
ones removed, so there is a valid one at every moment. No pickle: tensors are safetensors, the rest
is JSON.
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from pretrain.files import read_json, sync
from pretrain.folders import remove
from pretrain.names import for_screen
from pretrain.sharded import like
from pretrain.weights import (
    CheckpointError,
    load_strict,
    read_safetensors,
    verify_folder,
    write_folder,
)

KEEP = 2  # complete checkpoints that stay

# What the optimizers remember of a parameter: `step` is a number, all others have its shape.
MOMENTS = {
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "Muon": {"momentum_buffer"},
    "SGD": {"momentum_buffer"},
}


def checkpoints(run: Path) -> list[Path]:
    """The committed checkpoints of a run, newest first, not yet verified."""
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True)


def read_state(folder: Path) -> dict:
    """The state of a checkpoint, which names the step that its folder is called after.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        state = read_json(folder / "state.json")
    except ValueError as error:
        raise CheckpointError(f"{folder} is corrupt: {error}") from error
    if type(state.get("step")) is not int or folder.name != f"step-{state['step']:08d}":
        raise CheckpointError(
            f"{folder} is corrupt: its state.json is of step {state.get('step')!r:.20}"
        )
    return state


def save_checkpoint(
    run: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict
) -> Path:
    """Write one checkpoint and remove all but the `KEEP` newest of those that verify.

    A damaged one does not count and is replaced; it is named on the screen.

    Args:
        run: the run's folder.
        model: the bare model, not its distributed wrapper.
        optimizers: those over its parameters.
        state: JSON-able; `state["step"]` counts finished optimizer steps.

    Raises:
        CheckpointError: the disk is full or not writable, or a weight is not finite; the
            checkpoints that were there are untouched.
    """
    tensors = (model.state_dict(), moments_of(model, optimizers))
    weights, moments = (
        {k: v.detach().cpu().contiguous() for k, v in part.items()} for part in tensors
    )
    return write_checkpoint(run, weights, moments, state | {"model": model.arguments})


def moments_of(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What the optimizers remember of a model's parameters, by `parameter.key`."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def write_checkpoint(
    run: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], state: dict
) -> Path:
    """What `save_checkpoint` does, from tensors on the CPU; `state` has the model's arguments."""
    broken = [k for k, v in weights.items() if not torch.isfinite(v).all()]
    if broken:
        raise CheckpointError(f"not saved: {broken[0]} holds values that are not finite")
    root = run / "checkpoints"
    final = root / f"step-{state['step']:08d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob("tmp-*"):  # of a run that was killed while saving
            remove(leftover)
    except OSError as error:
        raise CheckpointError(f"cannot write {root}: {error}") from error
    if os.path.lexists(final) and not (problem := _problem(final)):
        return final
    aside = root / f"tmp-{final.name}"
    write_folder(aside, {"model": weights, "optimizer": moments}, {"state": state})
    try:
        if os.path.lexists(final):
            print(f"warning: {for_screen(problem)}; it is replaced", file=sys.stderr, flush=True)
            remove(final)
        os.replace(aside, final)
        sync(root)
        whole = 0
        for old in checkpoints(run):
            # The new one was hashed while it was written; an older one may be damaged since.
            problem = "" if old == final or whole == KEEP else _problem(old)
            if problem:
                print(f"warning: {for_screen(problem)}; it is removed", file=sys.stderr, flush=True)
            if problem or whole == KEEP:
                remove(old)
            else:
                whole += 1
    except OSError as error:
        raise CheckpointError(
            f"cannot write {root}: {error}. What was saved before is intact: mend that and start "
            "the same command again"
        ) from error
    return final


def load_checkpoint(
    folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict:
    """Put a verified checkpoint into `model` and `optimizers`, in place, and return its state.

    Raises:
        CheckpointError: a file is missing or corrupt, or the weights are of another model.
    """
    verify_folder(folder)
    load_strict(model, read_safetensors(folder / "model.safetensors"), str(folder))
    moments = read_safetensors(folder / "optimizer.safetensors")
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        prefix = f"{name}."
        entries = {k[len(prefix) :]: moments.pop(k) for k in list(moments) if k.startswith(prefix)}
        if not entries:
            continue
        wanted = MOMENTS[type(owner[parameter]).__name__] if parameter in owner else set()
        shapes = {k: () if k == "step" else parameter.shape for k in entries}
        if entries.keys() != wanted or any(v.shape != shapes[k] for k, v in entries.items()):
            raise CheckpointError(
                f"{folder} does not fit the optimizer: {name} has {', '.join(sorted(entries))[:80]}"
            )
        owner[parameter].state[parameter] = {
            k: v.to(parameter.device) if k == "step" else like(v, parameter)
            for k, v in entries.items()
        }
    if moments:
        raise CheckpointError(
            f"{folder} does not fit the optimizer: {next(iter(moments))!r:.80} is of no parameter"
        )
    return read_state(folder)


def _problem(folder: Path) -> str:
    """The fault of a checkpoint; empty if it verifies."""
    try:
        verify_folder(folder)
        read_state(folder)
    except CheckpointError as error:
        return str(error)
    return ""


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that verifies, and what was wrong with newer ones."""
    problems: list[str] = []
    for folder in checkpoints(run):
        if not (problem := _problem(folder)):
            return folder, problems
        problems.append(problem)
    return None, problems
