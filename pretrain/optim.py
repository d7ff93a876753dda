"""Parameter groups, optimizers, their step, and the learning-rate schedules."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pretrain.device import has_bf16
from pretrain.spec import Backbone


def decays(parameter: Tensor) -> bool:
    """Whether a parameter decays: matrices and filters, not vectors or the (1, 1, D) mask token."""
    return sum(length > 1 for length in parameter.shape) > 1


def layer_groups(module: nn.Module) -> list[list[str]]:
    """Names of a module's parameters by layer, from those next to the pixels to the last.

    The elements of a sequence (blocks of a transformer, of a residual stage) are a layer each, and
    so is every other child; a child that holds sequences deeper down is opened.
    """
    groups: list[list[str]] = []

    def walk(part: nn.Module, prefix: str) -> None:
        is_stack = isinstance(part, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        own = [prefix + name for name, _ in part.named_parameters(recurse=False)]
        if own:  # positions, class tokens: next to the pixels
            groups.append(own)
        for name, child in part.named_children():
            stacks = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
            nested = any(isinstance(m, stacks) for m in child.modules())
            if isinstance(child, stacks) or (nested and not is_stack):
                walk(child, f"{prefix}{name}.")
            else:
                names = [f"{prefix}{name}.{n}" for n, _ in child.named_parameters()]
                if names:
                    groups.append(names)

    walk(module, "")
    return groups


def layer_scales(module: nn.Module, layer_decay: float) -> dict[str, float]:
    """Factors on the rates of a backbone's parameters: from layer to layer towards its input.

    Args:
        module: the backbone.
        layer_decay: a layer has this factor on the rate of the layer after it (BEiT, Bao et al.
            2021, https://arxiv.org/abs/2106.08254); 1: all the same rate.

    Returns:
        by a parameter's name, 1 for the last layer.
    """
    layers = layer_groups(module)
    return {
        name: layer_decay ** (len(layers) - 1 - depth)
        for depth, names in enumerate(layers)
        for name in names
    }


def param_groups(
    model: nn.Module,
    weight_decay: float,
    scales: Mapping[str, float] | None = None,
    decaying: Callable[[str, Tensor], bool] = lambda _, parameter: decays(parameter),
) -> list[dict]:
    """Groups by rate and decay: matrices decay, vectors and the (1, 1, D) mask token do not.

    Args:
        model: of which all that learns is grouped.
        weight_decay: of what decays.
        scales: factors on the scheduled rate, by name; 1 for all others.
        decaying: whether a parameter decays, by its name and itself.

    Returns:
        first the two groups of factor 1, that which decays before the other; each has its factor,
        "lr_scale".
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = ((scales or {}).get(name, 1.0), bool(decaying(name, parameter)))
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "weight_decay": weight_decay if decay else 0.0, "lr_scale": scale}
        for (scale, decay), params in groups.items()
    ]


def _scales_of_backbones(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """`layer_scales` of the backbones in a model, by the model's names."""
    scales: dict[str, float] = {}
    found: list[str] = []
    for prefix, part in model.named_modules() if layer_decay != 1 else ():
        inside = any(prefix.startswith(outer) for outer in found)
        if isinstance(part, Backbone) and isinstance(part, nn.Module) and not inside:
            found.append(f"{prefix}." if prefix else "")
            own = layer_scales(part, layer_decay).items()
            scales |= {f"{found[-1]}{name}": scale for name, scale in own}
    return scales


def adamw(
    model: nn.Module, weight_decay: float, betas: tuple[float, float], layer_decay: float = 1.0
) -> torch.optim.AdamW:
    """Fused AdamW over `param_groups`; its learning rate is set at every step by the schedule.

    For `layer_decay` see `make_optimizers`.
    """
    groups = param_groups(model, weight_decay, _scales_of_backbones(model, layer_decay))
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.775, 2.0315  # of a Newton-Schulz step (Jordan et al. 2024)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Set all singular values of a matrix (M, N) to about 1 (0.5 to 1.5), and keep its vectors.

    Five Newton-Schulz steps of the odd quintic 3.4445 x - 4.775 x^3 + 2.0315 x^5 (Jordan et al.
    2024), in bfloat16 where the device has it, else in float32.
    """
    x = matrix.bfloat16() if has_bf16(matrix.device) else matrix.float()
    if matrix.shape[0] > matrix.shape[1]:
        x = x.T  # the smaller Gram matrix
    x = x / x.norm().clamp(min=1e-7)
    if x.dtype == torch.bfloat16 or 2 * x.shape[0] > x.shape[1]:
        for _ in range(5):
            x = torch.addmm(x, _higher_powers(x @ x.T), x, beta=_LINEAR)
    else:
        x = _steps_of_gram(x @ x.T) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


def _steps_of_gram(gram: Tensor) -> Tensor:
    """The five steps' product, of the Gram matrix (M, M) alone: each multiplies by a polynomial.

    For matrices two or more times as long as wide that is less work. Squared singular values need
    float32: in bfloat16 the rounding errors of small ones would grow.
    """
    product = factor = _factor(gram)
    for _ in range(4):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    return product


def _higher_powers(gram: Tensor) -> Tensor:
    return torch.addmm(gram, gram, gram, beta=_CUBIC, alpha=_QUINTIC)


def _factor(gram: Tensor) -> Tensor:
    factor = _higher_powers(gram)
    factor.diagonal().add_(_LINEAR)
    return factor


class Muon(torch.optim.Optimizer):
    """Momentum steps of orthogonalised matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    Nesterov momentum 0.95, decoupled weight decay, steps scaled to the size of AdamW's (Liu et al.
    2025, https://arxiv.org/abs/2502.16982). torch.optim.Muon does the same but always in bfloat16,
    which takes 26 times as long on a CPU without it (24 matrices of width 192 on Zen 3). Of several
    processes, which hold the same gradients, each orthogonalises its part of the matrices and sends
    it to the others.

    Args:
        params: matrices, or groups of them.
        weight_decay: per unit of learning rate.
    """

    def __init__(self, params: list[nn.Parameter] | list[dict], weight_decay: float):
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: nothing here evaluates twice
        """Update every matrix that has a gradient; the gradients are used up."""
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            for p in matrices:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].lerp_(p.grad, 0.05)
                p.grad.lerp_(state["momentum_buffer"], 0.95)
            for p, update in orthogonalised(matrices):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def orthogonalised(matrices: list[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Every matrix with its orthogonalised gradient, the same bits for any number of processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield from ((p, orthogonalise(_gradient(p))) for p in matrices)
        return
    rank, world = dist.get_rank(), dist.get_world_size()
    if any(isinstance(p, DTensor) for p in matrices):
        for first in range(0, len(matrices), world):
            yield from _orthogonalised_rows(matrices[first : first + world])
        return
    matrices = sorted(matrices, key=lambda p: -p.numel())  # dealt out, the largest first
    mine = [orthogonalise(_gradient(p)).flatten() for p in matrices[rank::world]]
    for owner in range(world):
        owned = matrices[owner::world]
        if not owned:
            return  # more processes than matrices
        sizes = [p.numel() for p in owned]
        flat = torch.cat(mine) if owner == rank else owned[0].new_empty(sum(sizes))
        dist.broadcast(flat, owner)
        for p, update in zip(owned, flat.split(sizes), strict=True):
            yield p, update.view_as(p)


def _orthogonalised_rows(matrices: list[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Of sharded matrices, at most as many as processes: each is gathered by one, and shared again.

    Every process holds as many rows as the first, but for the last ones that have any.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mine: Tensor | None = None
    for owner, p in enumerate(matrices):
        gradient = _gradient(p)
        assert isinstance(gradient, DTensor)
        rows = gradient.to_local()
        padded = rows.new_zeros(math.ceil(p.shape[0] / world), p.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(world)] if rank == owner else None
        dist.gather(padded, parts, owner)
        if parts:
            mine = torch.cat(parts)  # with padding at its end
            mine[: p.shape[0]] = orthogonalise(mine[: p.shape[0]])
    for owner, p in enumerate(matrices):
        gradient = _gradient(p)
        assert isinstance(gradient, DTensor)
        rows = gradient.to_local()
        padded = rows.new_empty(math.ceil(p.shape[0] / world), p.shape[1])
        whole = list(mine.chunk(world)) if mine is not None and rank == owner else None
        dist.scatter(padded, whole, owner)
        rows.copy_(padded[: len(rows)])  # the gradients are used up
        yield p, gradient


def make_optimizers(
    name: str, model: nn.Module, weight_decay: float, betas: tuple[float, float],
    layer_decay: float = 1.0,
) -> list[torch.optim.Optimizer]:  # fmt: skip
    """The optimizers that together train every parameter of `model` once.

    Args:
        name: "adamw", or "muon": Muon for the matrices of the transformer blocks, AdamW for
            everything else (convolutions are all of that kind).
        model: its blocks are in module lists named `blocks` or `..._blocks`, or their parts are
            named `attn` and `mlp`.
        weight_decay: of matrices.
        betas: AdamW's.
        layer_decay: of each `Backbone` in the model, see `layer_scales`; what is not of one, such
            as a decoder, has the whole rate.

    Returns:
        optimizers whose groups may have an "lr_scale", a factor on the scheduled rate: Muon stands,
        and wants, a rate some five times AdamW's.

    Raises:
        ValueError: another name.
    """
    if name == "adamw":
        return [adamw(model, weight_decay, betas, layer_decay)]
    if name != "muon":
        raise ValueError(f"--optimizer {name!r} is neither adamw nor muon")
    in_blocks = {id(p) for n, p in model.named_parameters() if "blocks." in n and p.ndim == 2}
    in_blocks |= {  # Swin's stages; its tables of relative positions are no such matrices
        id(m.weight) for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and (".attn." in n or ".mlp." in n)
    }  # fmt: skip
    matrices: list[dict] = []
    others: list[dict] = []
    for group in param_groups(model, weight_decay, _scales_of_backbones(model, layer_decay)):
        own = [p for p in group["params"] if id(p) in in_blocks and decays(p)]
        other = [p for p in group["params"] if not (id(p) in in_blocks and decays(p))]
        matrices += [group | {"params": own}] if own else []
        others.append(group | {"params": other, "lr_scale": 0.2 * group["lr_scale"]})
    rest = torch.optim.AdamW(others, lr=0.0, betas=betas, fused=True)
    return [Muon(matrices, weight_decay), rest] if matrices else [rest]


def learning_rate(step: int, num_steps: int, warmup: int, peak: float, final: float) -> float:
    """Linear warm-up from zero to `peak`, then half a cosine to `final`: VideoMAE's, step for step.

    The first step of a warm-up has rate 0, its last one the peak rate. A pure function of the step
    (0-based), so resuming needs no scheduler state.
    """
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    progress = (step - warmup) / max(num_steps - warmup, 1)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(progress, 1.0)))


def counting_rate(step: int, num_steps: int, warmup: int, peak: float, final: float) -> float:
    """Linear warm-up from zero, then a cosine that counted all along (timm's; ViFi-CLIP's).

    After half of the steps the warm-up has reached `peak`, and the cosine goes on from its middle,
    (peak + final) / 2.
    """
    if step < warmup:
        return peak * step / warmup
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(step / num_steps, 1.0)))


def set_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Give every group of parameters its rate: `rate`, times its "lr_scale" if it has one."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = rate * group.get("lr_scale", 1.0)


def update(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Iterable[Tensor], clip_grad: float
) -> tuple[float, Tensor]:
    """Clip the gradient, take one step and free the gradient.

    Args:
        optimizers: over the parameters.
        parameters: with gradients that are averaged over the processes, so that every process
            decides alike.
        clip_grad: the largest gradient norm; 0: no clipping.

    Returns:
        the gradient's norm; if it is not finite the weights were left alone. And the norms of the
        parameters that have a gradient, in their order, before clipping.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm([_gradient(p) for p in parameters]))
    norm = torch.linalg.vector_norm(norms)
    torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad or math.inf, norm)
    for optimizer in optimizers:
        if torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
    return norm.item(), norms
