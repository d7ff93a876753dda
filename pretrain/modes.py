"""Temporary evaluation mode, and the shapes of a network's outputs."""

from collections.abc import Iterator
from contextlib import contextmanager

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
