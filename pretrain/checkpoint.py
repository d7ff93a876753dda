"""A run's checkpoints: what lies in their folders, which one is whole, and how it is read.

    RUN/checkpoints/step-00000100/model.safetensors
                                  optimizer.safetensors
                                  state.json
                                  manifest.json

Where the model is sharded, each process has files of its own there (pretrain/sharded.py):

                                  model-00001-of-00002.safetensors
                                  model-00002-of-00002.safetensors
                                  optimizer-00001-of-00002.safetensors ...

The names of the tensors are the same and each engine reads either. pretrain/saving.py writes them.
No pickle: tensors are safetensors, the rest is JSON.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pretrain.files import read_json
from pretrain.sharded import Part, Parts, part_of
from pretrain.weights import CheckpointError, refuse_misfit, verify_folder

# What the optimizers remember of a parameter: `step` is a number, all others have its shape.
MOMENTS = {
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "Muon": ("momentum_buffer",),
    "SGD": ("momentum_buffer",),
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


def weights_of(model: nn.Module) -> dict[str, Part]:
    """What this process holds of a model's weights and buffers, by name."""
    return {name: part_of(value) for name, value in model.state_dict().items()}


def moments_of(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Part]:
    """What this process holds of what the optimizers remember, by `parameter.key`."""
    return {
        f"{name}.{key}": part_of(value)
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def moments_to_fill(
    model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> Callable[[str], dict[str, Part]]:
    """How `load_checkpoint` gets at the moments of a model's parameters."""
    named = dict(model.named_parameters())
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}

    def begin(name: str) -> dict[str, Part]:
        parameter = named.get(name)
        if parameter is None or parameter not in owner:
            return {}
        optimizer = owner[parameter]
        state = optimizer.state[parameter] = {
            key: torch.zeros((), device=parameter.device)
            if key == "step"
            else torch.zeros_like(parameter)
            for key in MOMENTS[type(optimizer).__name__]
        }
        return {key: part_of(value) for key, value in state.items()}

    return begin


@torch.no_grad()
def load_checkpoint(
    folder: Path, weights: dict[str, Part], begin: Callable[[str], dict[str, Part]]
) -> dict:
    """Put a checkpoint that verifies into weights and moments, in place, and return its state.

    Each process reads the parts that it holds.

    Args:
        folder: of the checkpoint.
        weights: of the model, by name.
        begin: makes what the optimizer will remember of a parameter, given by its name, and returns
            it by key; nothing if there is no such parameter or no optimizer has it.

    Raises:
        CheckpointError: a file is missing or corrupt, or the weights are of another model.
    """
    files = verify_folder(folder)
    saved, moments = (_parts(folder, files, kind) for kind in ("model", "optimizer"))
    saved.refuse_misfit(weights, str(folder))
    for name, part in weights.items():
        saved.fill(name, part)
    remembered: dict[str, dict[str, Tensor]] = {}
    for entry, like in moments.tensors.items():
        name, _, key = entry.rpartition(".")
        remembered.setdefault(name, {})[key] = like
    for name, entries in remembered.items():
        own = begin(name)
        if entries.keys() != own.keys() or any(entries[k].shape != own[k].shape for k in own):
            keys = ", ".join(sorted(entries))
            raise CheckpointError(
                f"{folder} does not fit the optimizer: {name!r:.80} has {keys!r:.80}"
            )
        for key, part in own.items():
            moments.fill(f"{name}.{key}", part)
    return read_state(folder)


def read_weights(folder: Path, expected: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of a checkpoint, whole.

    Args:
        folder: of the checkpoint.
        expected: as `pretrain.weights.read_safetensors` takes it.

    Raises:
        ValueError: it is damaged, or does not hold what is expected.
    """
    saved = _parts(folder, verify_folder(folder), "model")
    if expected is not None:
        refuse_misfit(expected, saved.tensors, str(folder))
    return {
        name: saved.read(name, 0, like.numel()).reshape(like.shape)
        for name, like in saved.tensors.items()
    }


def _parts(folder: Path, files: list[str], kind: str) -> Parts:
    """The weights ("model") or the moments ("optimizer") among the files of a checkpoint."""
    return Parts(folder / name for name in files if name.startswith(kind))


def problem_of(folder: Path) -> str:
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
        if not (problem := problem_of(folder)):
            return folder, problems
        problems.append(problem)
    return None, problems
