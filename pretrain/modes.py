"""Temporary evaluation mode, and the shapes of a network's outputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, a module is in evaluation mode; afterwards each submodule is in its former mode.

    Some may be frozen in evaluation mode while the rest trains.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def bytes_for_gradient(module: nn.Module, batch: Any) -> int:
    """Bytes in float32 that a forward pass keeps for the gradient, weights left out.

    Nothing is computed; 0: the module does what meta tensors cannot.

    Args:
        module: takes the batch.
        batch: meta tensors.
    """
    state = dict((*module.named_parameters(), *module.named_buffers()))
    state = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    own = {value.untyped_storage()._cdata for value in state.values()}
    for name, value in module.named_parameters():
        state[name].requires_grad_(value.requires_grad)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    try:
        with evaluating(module), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            output = functional_call(module, state, (batch,))
    except (RuntimeError, NotImplementedError):
        return 0
    del output
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


def dry_output(module: nn.Module, *shape: int) -> Tensor:
    """A module's output for a batch of this shape, as a meta tensor: nothing is computed.

    Args:
        module: takes one tensor; its weights stay where they are.
        shape: of the batch.
    """
    state = dict((*module.named_parameters(), *module.named_buffers()))
    state = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    with torch.no_grad(), evaluating(module):
        return functional_call(module, state, (torch.empty(shape, device="meta"),))
