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


def make_optimizers(
    name: str, model: nn.Module, weight_decay: float, betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    """The optimizers that together train every parameter of `model` once.

    Args:
        name: "adamw", or "muon": Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)
            for the matrices of the transformer blocks, AdamW for everything else. Muon's steps are
            scaled to AdamW's size (Liu et al. 2025, https://arxiv.org/abs/2502.16982).
        model: its blocks are in module lists named `blocks` or `..._blocks`.
        weight_decay: of matrices.
        betas: AdamW's.

    Returns:
        optimizers whose groups may have an "lr_scale", a factor on the scheduled rate: Muon stands, and
        wants, a rate some five times AdamW's.

    Raises:
        ValueError: another name.
    """
    if name == "adamw":
        return [adamw(model, weight_decay, betas)]
    if name != "muon":
        raise ValueError(f"--optimizer {name!r} is neither adamw nor muon")
    in_blocks = {id(p) for n, p in model.named_parameters() if "blocks." in n}
    decay, no_decay = param_groups(model, weight_decay)
    matrices = [p for p in decay["params"] if id(p) in in_blocks]
    decay["params"] = [p for p in decay["params"] if id(p) not in in_blocks]
    groups = [group | {"lr_scale": 0.2} for group in (decay, no_decay)]
    return [
        torch.optim.Muon(
            matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True),
    ]


def learning_rate(step: int, num_steps: int, warmup: int, peak: float, final: float) -> float:
    """Linear warm-up from zero, then half a cosine from `peak` to `final`.

    A pure function of the step (0-based), so resuming needs no scheduler state.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(num_steps - warmup, 1)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(progress, 1.0)))
