"""Temporary evaluation mode, the shapes of a network's outputs, and the memory that it takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pretrain.device import free_memory
from pretrain.names import counted


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


def bytes_for_gradient(module: nn.Module, *batch: Any) -> int:
    """Bytes in float32 that a forward pass keeps for the gradient, weights left out.

    Nothing is computed; 0: the module does what meta tensors cannot.

    Args:
        module: takes the batch.
        batch: its arguments, meta tensors.
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
            output = functional_call(module, state, batch)
    except (RuntimeError, NotImplementedError):
        return 0
    del output
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


KEPT = 500  # times its bytes in float32 that a clip keeps, at most: I3D 42, ViT-B 250


def too_large(module: nn.Module, batch: tuple[Any, ...], num: int, half: bool) -> str:
    """A warning where a CPU has less memory free than a forward pass keeps; "": it has enough.

    The system ends such a process without a word.

    Args:
        module: on the CPU.
        batch: what it takes of a few clips, meta tensors; the first of them, or its streams, are
            the clips (B, ...).
        num: clips in one forward pass.
        half: activations are bf16.
    """
    free = free_memory()
    clips = [batch[0]] if isinstance(batch[0], Tensor) else [*batch[0].values()]
    given = len(clips[0])
    if free is None or KEPT * num / given * 4 * sum(c.numel() for c in clips) <= free:
        return ""
    one = bytes_for_gradient(module, *batch) / given / (1 + half)
    if num * one <= free:
        return ""
    return (
        f"WARNING: a forward pass of {counted(num, 'clip')} keeps about "
        f"{num * one / 2**30:.0f} GiB for the gradient, and {free / 2**30:.0f} GiB of memory are "
        "free: the system may end this run. Give "
        f"--micro-batch {max(1, int(free / 2 / one))} or less"
    )


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
