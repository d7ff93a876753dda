"""How large a model is and what one clip costs, without computing anything."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pretrain.modes import evaluating
from pretrain.spec import InputSpec


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, models are built as shapes: no memory, no time, and no values."""
    with torch.device("meta"):
        yield


def _like(value: object) -> object:
    """The dimensions that the shape of a result depends on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_like, value))
    return type(value), value  # 1 and 1.0 and True are equal


def _again(value: object) -> object:
    """The shapes of an earlier result as tensors of their own."""
    if isinstance(value, Tensor):
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
    return type(value)(map(_again, value)) if isinstance(value, list | tuple) else value


class _Counting(TorchDispatchMode):
    """Sums the FLOPs of torch's own table over the operations of a forward pass on shapes.

    What comes out of an operation is remembered: the blocks of a deep network are alike, and torch
    takes its time to work out shapes.
    """

    def __init__(self):
        super().__init__()
        self.total, self.known = 0, {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """The shapes of the operation's results."""
        kwargs = kwargs or {}
        key = (operation, _like(args), *((name, _like(value)) for name, value in kwargs.items()))
        if key not in self.known:
            out, count = operation(*args, **kwargs), flop_registry.get(operation._overloadpacket)
            self.known[key] = out, count(*args, **kwargs, out_val=out) if count else 0
        out, flops = self.known[key]
        self.total += flops
        return _again(out)


@torch.no_grad()
def count_flops(model: nn.Module) -> int:
    """Floating-point operations of one clip, a multiplication and an addition counted as two.

    Convolutions, matrix products and attention are counted, as papers do; a model may be on any
    device or built under `shapes_only`, nothing is computed.
    """
    spec = model.input_spec
    assert isinstance(spec, InputSpec)
    shapes = {n: v.to("meta") for n, v in (*model.named_parameters(), *model.named_buffers())}
    # As plain matrix products: the table does not know the CPU's fused attention.
    with evaluating(model), shapes_only(), sdpa_kernel(SDPBackend.MATH), _Counting() as counting:
        functional_call(model, shapes, (spec.empty(1),))
    return counting.total
