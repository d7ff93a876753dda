"""How large a model is and what one clip costs, without computing anything."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def count_flops(model: nn.Module) -> int:
    """Floating-point operations of one clip, a multiplication and an addition counted as two.

    Convolutions, matrix products and attention are counted, as papers do; a model may be on any device or built under
    `FakeTensorMode`, nothing is computed.
    """
    spec = model.input_spec
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    first = next(model.parameters())
    fake = getattr(first, "fake_mode", None) or FakeTensorMode(allow_non_fake_inputs=True)
    with fake, FlopCounterMode(display=False) as counter:
        model(torch.empty(1, spec.channels, spec.frames, spec.size, spec.size, device=first.device))
    for module, mode in modes:
        module.training = mode
    total, counts = counter.get_total_flops(), counter.get_flop_counts()
    # Some recurrent kernels are one operation that the counter does not know, others fall apart into products that it
    # does; what it found there is replaced by the products that there are.
    for path, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            total -= sum(counts.get(f"{type(model).__name__}.{path}", {}).values())
            gates = sum(p.numel() for n, p in module.named_parameters() if n.startswith("weight"))
            total += spec.frames * 2 * gates
    return total
