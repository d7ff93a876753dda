"""Parameter groups and the learning-rate schedule."""

import math

import torch
from torch import nn


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices decay, vectors (biases, norms) and the (1, 1, D) mask token do not."""
    decay, no_decay = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decay if parameter.squeeze().ndim > 1 else no_decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW over `param_groups`; its learning rate is set at every step by the schedule."""
    return torch.optim.AdamW(param_groups(model, weight_decay), lr=0.0, betas=betas, fused=True)


def learning_rate(step: int, num_steps: int, warmup: int, peak: float, final: float) -> float:
    """Linear warm-up from zero, then half a cosine from `peak` to `final`.

    A pure function of the step (0-based), so resuming needs no scheduler state.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(num_steps - warmup, 1)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(progress, 1.0)))
