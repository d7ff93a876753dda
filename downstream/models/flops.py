"""How large a model is and what one clip costs, without computing anything."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.modes import evaluating


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, models are built as shapes: no memory, no time, and no values."""
    real = nn.init.trunc_normal_
    nn.init.trunc_normal_ = lambda tensor, *_, **__: tensor  # torch's looks at the values it drew
    try:
        with FakeTensorMode():
            yield
    finally:
        nn.init.trunc_normal_ = real


@torch.no_grad()
def count_flops(model: nn.Module) -> int:
    """Floating-point operations of one clip, a multiplication and an addition counted as two.

    Convolutions, matrix products and attention are counted, as papers do; a model may be on any device or built under
    `shapes_only`, nothing is computed.
    """
    spec = model.input_spec
    first = next(model.parameters())
    fake = getattr(first, "fake_mode", None) or FakeTensorMode(allow_non_fake_inputs=True)
    # As plain matrix products: the counter does not know the CPU's fused attention.
    counting = FlopCounterMode(display=False)
    with evaluating(model), fake, sdpa_kernel(SDPBackend.MATH), counting as counter:
        model(torch.empty(1, spec.channels, spec.frames, spec.size, spec.size, device=first.device))
    total, counts = counter.get_total_flops(), counter.get_flop_counts()
    # Some recurrent kernels are one operation that the counter does not know, others fall apart into products that it
    # does; what it found there is replaced by the products that there are.
    for path, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            total -= sum(counts.get(f"{type(model).__name__}.{path}", {}).values())
            gates = sum(p.numel() for n, p in module.named_parameters() if n.startswith("weight"))
            total += spec.frames * 2 * gates
    return total
