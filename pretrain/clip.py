"""Video-text contrast: two towers, their losses, and exact large batches on small devices.

CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020), SigLIP (Zhai et al. 2023,
https://arxiv.org/abs/2303.15343), several positives as in SupCon (Khosla et al. 2020,
https://arxiv.org/abs/2004.11362, "out") and ActionCLIP, cached gradients (Gao et al. 2021,
https://arxiv.org/abs/2101.06983); all class prompts as ViFi-CLIP has them (Rasheed et al. 2022,
https://arxiv.org/abs/2212.03640). Shapes: b clips of one process, G of all, D width of the joint
space, K classes.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.engine import Engine
from pretrain.spec import Backbone, Selective
from pretrain.text import TextTower

MAX_LOG_SCALE = math.log(100)  # as published: the scale never passes 100
LOSSES = ("infonce", "siglip", "classes")
# Logarithm of the scale, and bias, at the start: CLIP 1/0.07; SigLIP 10 and -10.
STARTS = {
    "infonce": (math.log(1 / 0.07), None),
    "siglip": (math.log(10), -10.0),
    "classes": (math.log(1 / 0.07), None),
}


class VideoText(nn.Module):
    """A video tower and a text tower with one embedding space.

    Args:
        video: a `Backbone`.
        text: a tower of `pretrain/text.py`.
        dim: width of the joint space.
        project: a linear layer after each tower; without one both must already have `dim` outputs.
        loss: "infonce", "siglip" or "classes", which decides how scale and bias start and whether
            the scale is kept below `MAX_LOG_SCALE`: ViFi-CLIP ("classes") does not clamp it.

    Raises:
        ValueError: the towers' outputs differ in width without a projection, or the loss is
            unknown.
    """

    parts = ("video", "text")  # arguments that are models, see `pretrain.backbones`

    def __init__(self, video: nn.Module, text: TextTower, dim: int, project: bool, loss: str):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"--loss {loss!r} is not one of {', '.join(LOSSES)}")
        assert isinstance(video, Backbone)
        if not project and not video.embed_dim == text.embed_dim == dim:
            raise ValueError(
                f"towers of {video.embed_dim} and {text.embed_dim} outputs need a projection: give "
                "project=True"
            )
        self.arguments: dict[str, Any] = {"dim": dim, "project": project, "loss": loss}
        self.video, self.text = video, text
        self.video_proj: nn.Module = nn.Identity()
        self.text_proj: nn.Module = nn.Identity()
        if project:
            widths = (video.embed_dim, text.embed_dim)
            layers = [nn.Linear(width, dim, bias=False) for width in widths]
            self.video_proj, self.text_proj = layers
            for layer in layers:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        scale, bias = STARTS[loss]
        self.log_scale = nn.Parameter(torch.tensor(scale))
        self.bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def encode_video(self, video: Tensor, visible: Tensor | None = None) -> Tensor:
        """Normalised clips (B, C, T, H, W) to unit vectors (B, D).

        Args:
            video: the clips.
            visible: (B, K), of a tower with `forward_visible`: indices of the tokens to use, of
                those it selects; None: all.
        """
        if visible is None:
            pooled = self.video(video)
        else:
            assert isinstance(self.video, Selective)  # recipes ask before
            pooled = self.video.forward_visible(video, visible)
        return _unit(self.video_proj(pooled))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) to unit vectors (B, D)."""
        return _unit(self.text_proj(self.text(tokens)))

    def forward(
        self, video: Tensor, tokens: Tensor, visible: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clips (B, C, T, H, W) and tokens to the arguments of `contrast` or `against_classes`.

        Args:
            video: uint8; or floats that are normalised already, because they were mixed.
            tokens: of the captions (B, L), or of all class prompts (K, L).
            visible: see `encode_video`.

        Returns:
            unit vectors of the clips (B, D) and of the texts (B or K, D), scale and bias (scalars;
            the bias is 0 for InfoNCE and classes, which have none).
        """
        clips = video if video.is_floating_point() else self.video.input_spec.normalise(video)
        if self.log_scale.dtype == torch.float64:
            clips = clips.double()
        bias = self.log_scale.new_zeros(()) if self.bias is None else self.bias.reshape(())
        return self.encode_video(clips, visible), self.encode_text(tokens), self.scale(), bias

    def scale(self) -> Tensor:
        """The factor on similarities (inverse temperature)."""
        return self.log_scale.exp().reshape(())  # some engines have it as a vector of one

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the scale within 1 and 100, after each step, as CLIP is published."""
        if self.arguments["loss"] != "classes":
            self.log_scale.clamp_(0, MAX_LOG_SCALE)


def _unit(x: Tensor) -> Tensor:
    """Unit vectors, in float32 at least: bfloat16 would round similarities to two digits."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a part of the model mixes the clips of a batch while it trains."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


# ------------------------------------------------------------------------------- the loss


class _Gather(torch.autograd.Function):
    """Rows of all processes, with gradients: those of every process's loss come back to the owner.

    Not `torch.distributed.nn.functional.all_gather`: newer versions of torch warn at every call of
    it and point to a private module.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        first = dist.get_rank() * ctx.rows
        return grad[first : first + ctx.rows]


def gather(x: Tensor) -> Tensor:
    """Rows of all processes (b, ...) -> (G, ...), in the order of their ranks, with gradients."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _Gather.apply(x)


@dataclass(frozen=True)
class Contrast:
    """A loss and what a person watches; numbers of this process's rows against the whole batch.

    Attributes:
        loss: whose mean over the processes is the loss of the global batch, gradients included.
        video_to_text: fraction of clips whose best caption is theirs (or an equal one).
        text_to_video: fraction of captions whose best clip is theirs (or that of an equal caption).
        gap: mean similarity of pairs minus that of the rest.
        duplicates: clips of the global batch whose group occurred before in it.
    """

    loss: Tensor
    video_to_text: Tensor
    text_to_video: Tensor
    gap: Tensor
    duplicates: Tensor


def contrast(
    video: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    groups: Tensor,
    loss: str,
    several_positives: bool,
) -> Contrast:
    """Score every clip of this process against all captions of the batch, and the other way round.

    Each process computes its own rows against the gathered other side. Averaged over the processes,
    as DDP averages gradients, that is exactly the loss of the global batch.

    Args:
        video: (b, D) unit vectors.
        text: (b, D) unit vectors, row i belonging to clip i.
        scale: factor on similarities.
        bias: added to the logits, of SigLIP.
        groups: (b,) integers, equal where two captions (or labels) are.
        loss: "infonce": mean of both directions' cross-entropies; "siglip": sum over all pairs of
            -log sigmoid(+-logit), over the number of clips.
        several_positives: every pair of a group counts as a positive: in InfoNCE the target is
            spread evenly over them.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    all_video, all_text = gather(video), gather(text)
    with torch.no_grad():
        all_groups = gather(groups)
    rows = torch.arange(len(video), device=video.device)
    own = rank * len(video) + rows
    same = groups[:, None] == all_groups  # (b, G)
    to_text = scale * video @ all_text.T
    to_video = scale * text @ all_video.T
    if loss == "siglip":
        positive = same
        if not several_positives:
            positive = torch.zeros_like(same)
            positive[rows, own] = True
        signs = 2 * positive.to(to_text.dtype) - 1
        value = -F.logsigmoid(signs * (to_text + bias)).sum() / len(video)
    else:
        target = own
        if several_positives:
            target = same.to(to_text.dtype)
            target = target / target.sum(1, keepdim=True)
        value = (F.cross_entropy(to_text, target) + F.cross_entropy(to_video, target)) / 2
    with torch.no_grad():
        pairs = to_text[rows, own].mean() / scale
        others = (to_text * ~same).sum() / (~same).sum().clamp(min=1) / scale
        found, found_back = (
            same[rows, logits.argmax(1)].to(value.dtype).mean() for logits in (to_text, to_video)
        )
        duplicates = torch.as_tensor(len(all_groups) - len(all_groups.unique()))
    return Contrast(value, found, found_back, pairs - others, duplicates.to(value.device))


def against_classes(video: Tensor, text: Tensor, scale: Tensor, targets: Tensor) -> Contrast:
    """Score every clip of this process against the prompts of all classes, as ViFi-CLIP is trained.

    The mean over clips of the cross entropy with their targets; nothing depends on which clips
    share a batch.

    Args:
        video: (b, D) unit vectors.
        text: (K, D) unit vectors of the prompts, one a class.
        scale: factor on similarities.
        targets: (b, K) probabilities: smoothed, perhaps mixed. The class of a clip is its largest.
    """
    logits = scale * video @ text.T
    value = F.cross_entropy(logits, targets.to(logits.dtype))
    with torch.no_grad():
        own = targets.argmax(1)
        hits = (logits.argmax(1) == own).to(value.dtype).mean()
        found = (own[logits[:, own].argmax(0)] == own).to(value.dtype).mean()
        at_own = F.one_hot(own, logits.shape[1]).bool()
        gap = (logits[at_own].mean() - logits[~at_own].mean()) / scale
        everybody = gather(own)
        duplicates = torch.as_tensor(len(everybody) - len(everybody.unique()), device=value.device)
    return Contrast(value, hits, found, gap, duplicates)


def backward_classes(
    model: nn.Module, micro_batches: Iterable[dict], count: int, engine: Engine
) -> Contrast:
    """Gradients of `against_classes` over a whole batch, by plain accumulation.

    That is exact, since no term depends on two clips.

    Args:
        model: `VideoText`, or its distributed wrapper.
        micro_batches: each with `video`, `tokens` of all prompts, `targets` and maybe `visible`.
        count: how many they are.
        engine: for its device, `sync` and `backward`.
    """
    parts = []
    for i, given in enumerate(micro_batches):
        batch = {k: v.to(engine.device, non_blocking=True) for k, v in given.items()}
        targets = batch.pop("targets")
        engine.sync(last=i == count - 1)
        video, text, scale, _ = model(**batch)
        part = against_classes(video, text, scale, targets)
        engine.backward(part.loss / count)
        parts.append(
            [t.detach() for t in (part.loss, part.video_to_text, part.text_to_video, part.gap)]
        )
    means = torch.stack([torch.stack(values) for values in parts]).mean(0)
    value, found, found_back, gap = means
    return Contrast(value, found, found_back, gap, part.duplicates)


LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Contrast]


def backward_step(
    model: nn.Module, micro_batches: Iterable[dict], loss: LossFunction, engine: Engine
) -> Contrast:
    """Gradients of the loss of the whole batch, however small the micro-batches.

    One micro-batch: plainly. Several: all are embedded without gradients, the loss over all
    embeddings gives the gradient of each, and every micro-batch is embedded again to carry it back.
    Two forward passes for one, the same loss and gradients as with all in one, and the memory of a
    micro-batch. Random numbers drawn in a forward pass (dropout) are the same in both.

    Args:
        model: `VideoText`, or its distributed wrapper.
        micro_batches: each with `video`, `tokens`, `groups` and maybe `visible`, of equal length.
        loss: (video, text, scale, bias, groups) -> Contrast.
        engine: for its device, `sync` and `backward`.
    """
    batches = [
        {k: v.to(engine.device, non_blocking=True) for k, v in b.items()} for b in micro_batches
    ]
    groups = torch.cat([b.pop("groups") for b in batches])
    if len(batches) == 1:
        engine.sync(last=True)
        video, text, scale, bias = model(**batches[0])
        result = loss(video, text, scale, bias, groups)
        engine.backward(result.loss)
        return result

    device = engine.device
    # ---- embed everything, remembering the generators
    states, outputs = [], []
    engine.sync(last=False)
    with torch.no_grad():
        for batch in batches:
            states.append(_random_state(device))
            outputs.append(model(**batch))
    # ---- the loss, and its gradient at every embedding
    video, text = (torch.cat([o[i] for o in outputs]).requires_grad_() for i in (0, 1))
    scale, bias = scalars = [outputs[0][i].detach().clone().requires_grad_() for i in (2, 3)]
    result = loss(video, text, scale, bias, groups)
    wanted = torch.autograd.grad(result.loss, [video, text, scale, bias], allow_unused=True)
    sizes = [len(o[0]) for o in outputs]
    video_grads, text_grads = (g.split(sizes) for g in wanted[:2])
    scalar_grads = [
        torch.zeros_like(s) if g is None else g for s, g in zip(scalars, wanted[2:], strict=True)
    ]
    # ---- carry it back, micro-batch by micro-batch
    after = _random_state(device)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        _set_random_state(device, states[i])
        engine.sync(last)
        video, text, *own = model(**batch)
        carried = (video * video_grads[i]).sum() + (text * text_grads[i]).sum()
        if last:  # scale and bias act once
            carried = carried + sum(s * g for s, g in zip(own, scalar_grads, strict=True))
        engine.backward(carried)
    _set_random_state(device, after)
    return result


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def video_encoder(model: nn.Module) -> nn.Module:
    """What sees the clips: of a pair of towers its video tower, else the model itself.

    Other models have parts called `video`, too.
    """
    return model.video if isinstance(model, VideoText) else model
