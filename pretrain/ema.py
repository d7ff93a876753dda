"""A moving average of a model's weights, by torch's own update.

Not `torch.optim.swa_utils.AveragedModel`: its first update copies the weights, so the average would
not begin where the model did, and it saves a counter and longer names.
"""

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Model = TypeVar("Model", bound=nn.Module)


def start_average(model: Model) -> Model:
    """A copy of a model that takes no gradients, to be moved by `update_average`."""
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average towards the weights; buffers, such as batch norm's, are copied.

    Args:
        average: what `start_average` made of this model.
        model: with the weights of now.
        decay: fraction of the average that stays, 0 to 1.
    """
    get_ema_multi_avg_fn(decay)(list(average.parameters()), list(model.parameters()), None)
    for old, new in zip(average.buffers(), model.buffers(), strict=True):
        old.copy_(new)
