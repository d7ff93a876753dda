"""Views of one clip brought together, and all clips kept apart by the shape of their cloud.

LeJEPA (Balestriero and LeCun 2025, https://arxiv.org/abs/2511.08544): the views of a clip are drawn
to their mean, and SIGReg, sketched isotropic Gaussian regularisation, keeps the embeddings from
falling together: seen along any direction they are to be standard normal. There are no negatives,
no teacher and no stopped gradient, and small batches do. Written from the paper's description.
Shapes: n clips of one process, N of all; V views; D width; M directions.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.data.sampling import SKETCH, counter_rng

SHARE = 0.05  # of SIGReg in the sum, the rest is of the views; the paper's lambda
DIRECTIONS = 256  # drawn anew at every step
# Quadrature by the trapezoidal rule, whose error falls exponentially where the integrand is smooth
# and ends flat: below 1e-6 of samples that are less than 16 apart. The integrand is even, and 0 at
# 0, so points above 0 say all.
SPACING, POINTS = 0.25, 17


class _Sum(torch.autograd.Function):
    """The sum over all processes, with gradients: those of every process's loss come back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def epps_pulley(samples: Tensor) -> Tensor:
    """The distance of samples from a standard normal distribution, by characteristic functions.

    N times the integral over t of |mean of exp(i t x) - exp(-t^2 / 2)|^2 exp(-t^2) (Epps and Pulley
    1983, with the paper's weight): about 1 for a normal sample of whatever size, 0.65 N for one
    that has fallen into its mean. The mean over the samples of all processes is found by one sum
    over them, so the result is that of the global batch; the mean over the processes of its
    gradients is that of the global batch, too.

    Args:
        samples: (n, ...) of this process, as many on every one.

    Returns:
        (...) for each column.
    """
    t = SPACING * torch.arange(1, POINTS + 1, dtype=samples.dtype, device=samples.device)
    angles = samples.unsqueeze(-1) * t  # (n, ..., points)
    sums = torch.stack([angles.cos().sum(0), angles.sin().sum(0)])
    count = len(samples)
    if dist.is_initialized() and dist.get_world_size() > 1:
        sums, count = _Sum.apply(sums), count * dist.get_world_size()
    normal = torch.exp(-t.square() / 2)
    real, imaginary = sums / count
    error = (real - normal).square() + imaginary.square()
    return 2 * SPACING * count * (error * torch.exp(-t.square())).sum(-1)


@torch.compiler.disable  # numpy draws
def directions(step: int | Tensor, width: int) -> Tensor:
    """Unit vectors (D, M), float64: the same ones on all processes, others at every step."""
    drawn = counter_rng(0, int(step), purpose=SKETCH).standard_normal((width, DIRECTIONS))
    return torch.nn.functional.normalize(torch.from_numpy(drawn), dim=0)


def lejepa(embeddings: Tensor, step: int | Tensor) -> Tensor:
    """The loss of views that are to be alike, of clips that are not.

    Args:
        embeddings: (n, V, D) of this process, not normalised.
        step: its number, from which the directions are drawn.

    Returns:
        SHARE times SIGReg, the mean over directions and views of `epps_pulley`, plus (1 - SHARE)
        times the mean squared difference of a view from the mean of its clip's, per dimension.
        Averaged over the processes it is the loss of the global batch, gradients included.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        # Angles of bfloat16 would have two digits.
        x = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        apart = (x - x.mean(1, keepdim=True)).square().mean()
        shape = epps_pulley(x @ directions(step, x.shape[-1]).to(x)).mean()
    return SHARE * shape + (1 - SHARE) * apart
