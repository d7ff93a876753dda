"""The parts of supervised training: how each paper trains, targets, mixing, averaging, layer-wise rates.

B clips, K classes.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from downstream.models.vivit import ViViT
from downstream.segments import NOTHING
from pretrain.optim import decays, learning_rate
from pretrain.vit import VideoTransformer


@dataclass(frozen=True)
class Training:
    """How a classifier is trained; the names are those of `recipes/finetune.py`'s flags, which explain them."""

    epochs: float
    batch_size: int
    optimizer: str = "sgd"
    base_lr: float = 0.01
    schedule: str = "step"
    warmup: float = 0.0
    weight_decay: float = 5e-4
    dropout: float = 0.5
    layer_decay: float = 1.0
    drop_path: float = 0.0
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    rand_augment: str = ""
    erase: float = 0.0
    views: int = 1
    clip_grad: float = 0.0


# As the families' papers train, where they say so. Rates are per 256 clips of batch, as everywhere here: a paper's
# 0.003 at batch 30 is 0.0256.
TRAINING = {
    # Karpathy et al.: SGD, momentum 0.9, weight decay 5e-4, batch 32, rate 1e-3 lowered when validation stalls.
    "frames": Training(epochs=30, batch_size=32, base_lr=0.008),
    # LRCN: SGD, momentum 0.9, rate 1e-3 for videos of 16 frames, gradients clipped, dropout 0.5.
    "recurrent": Training(epochs=30, batch_size=24, base_lr=0.0107, clip_grad=5.0),
    # Bai et al.: Adam, 1e-3 to 4e-3, gradients clipped, dropout inside the blocks.
    "tcn": Training(
        epochs=30, batch_size=32, optimizer="adamw", base_lr=8e-3, schedule="cosine", weight_decay=0.0, dropout=0.0,
        clip_grad=0.4,
    ),
    # C3D on UCF101 from scratch: batch 30, rate 0.003 divided by 10 every 4 epochs, 16 epochs.
    "c3d": Training(epochs=16, batch_size=30, base_lr=0.0256),
    # I3D: SGD, momentum 0.9; its rate falls tenfold when validation stalls. weight decay 1e-7, dropout 0.5.
    "i3d": Training(epochs=40, batch_size=64, base_lr=0.1, weight_decay=1e-7),
    # R(2+1)D: batch 32 a GPU, rate 0.01, divided by 10 every 10 of 45 epochs, 10 of warm-up; no dropout.
    "r3d": Training(epochs=45, batch_size=32, base_lr=0.08, warmup=10 / 45, weight_decay=1e-4, dropout=0.0),
    # ViViT: SGD, momentum 0.9, batch 64, 30 epochs, rate 0.1 (cosine), 2.5 of warm-up, gradients clipped at 1.
    "vivit": Training(
        epochs=30, batch_size=64, base_lr=0.4, schedule="cosine", warmup=2.5 / 30, weight_decay=0.0, dropout=0.0,
        clip_grad=1.0,
    ),
    # Video Swin T: AdamW, batch 64, rate 1e-3 for the head and a tenth of it below, 30 epochs, 2.5 of warm-up.
    "video_swin": Training(
        epochs=30, batch_size=64, optimizer="adamw", base_lr=4e-3, schedule="cosine", warmup=2.5 / 30,
        weight_decay=0.05, dropout=0.5,
    ),
    # VideoMAE's fine-tuning on Kinetics.
    "transformer": Training(
        epochs=75, batch_size=512, optimizer="adamw", base_lr=5e-4, schedule="cosine", warmup=5 / 75,
        weight_decay=0.05, dropout=0.0, layer_decay=0.75, drop_path=0.1, smoothing=0.1, mixup=0.8, cutmix=1.0,
        rand_augment="n4-m7", erase=0.25, views=2,
    ),
}  # fmt: skip


def scheduled_rate(step: int, num_steps: int, warmup: int, peak: float, schedule: str) -> float:
    """The learning rate of a step (0-based): linear warm-up, then "cosine" to zero or "step".

    "step" divides by ten after each quarter of the run, which is what divisions by ten "when validation stalls"
    come to; a pure function of the step, so that resuming needs no state.
    """
    if schedule == "cosine" or step < warmup:
        return learning_rate(step, num_steps, warmup, peak, 0.0)
    assert schedule == "step", schedule
    return peak * 0.1 ** int(4 * (step - warmup) / max(num_steps - warmup, 1))


# ------------------------------------------------------------------------------------------- layers


def layer_groups(module: nn.Module) -> list[list[str]]:
    """Names of a module's parameters by layer, from those next to the pixels to the last.

    The elements of a sequence (blocks of a transformer, of a residual stage) are a layer each, and so is every other
    child; a child that holds sequences deeper down is opened.
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


def make_optimizer(
    name: str, model: nn.Module, weight_decay: float, layer_decay: float
) -> torch.optim.Optimizer:
    """AdamW or SGD (momentum 0.9) with layer-wise rates; vectors (biases, norms) do not decay.

    Args:
        name: "adamw" or "sgd".
        model: a `Classifier`.
        weight_decay: of matrices and filters.
        layer_decay: a layer of the backbone has this factor on the rate of the layer after it (BEiT, Bao et al. 2021,
            https://arxiv.org/abs/2106.08254); 1: all alike.

    Returns:
        an optimizer whose groups have an "lr_scale", a factor on the scheduled rate.

    Raises:
        ValueError: another name.
    """
    if name not in ("adamw", "sgd"):
        raise ValueError(f"--optimizer {name!r} is neither adamw nor sgd")
    layers = layer_groups(model.backbone)
    scale_of = {
        f"backbone.{name}": layer_decay ** (len(layers) - 1 - depth)
        for depth, names in enumerate(layers)
        for name in names
    }
    groups: dict[tuple[float, bool], dict] = {}
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, decay = scale_of.get(path, 1.0), weight_decay if decays(parameter) else 0.0
        group = groups.setdefault(
            (scale, decays(parameter)), {"params": [], "weight_decay": decay, "lr_scale": scale}
        )
        group["params"].append(parameter)
    if name == "adamw":
        return torch.optim.AdamW(list(groups.values()), lr=0.0, fused=True)
    return torch.optim.SGD(list(groups.values()), lr=0.0, momentum=0.9)


def set_drop_path(backbone: nn.Module, rate: float) -> None:
    """Let the blocks of a video transformer or ViViT be left out in training, the last with probability `rate`.

    Raises:
        ValueError: the backbone is neither; Video Swin has its published rate built in.
    """
    if not isinstance(backbone, VideoTransformer | ViViT):
        raise ValueError(
            "--drop-path leaves out transformer blocks, of which this backbone has none: give 0"
        )
    rates = np.linspace(0, rate, len(backbone.blocks))
    for block, share in zip(backbone.blocks, rates, strict=True):
        block.drop_path = float(share)


# ------------------------------------------------------------------------------------------ targets


def make_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Class numbers (...) to target probabilities (..., K); all zero where the class is `NOTHING`."""
    known = labels != NOTHING
    hot = torch.nn.functional.one_hot(labels.clamp(min=0), num_classes).float()
    return (hot * (1 - smoothing) + smoothing / num_classes) * known.unsqueeze(-1)


def soft_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Cross entropy of logits (..., K) with target probabilities (..., K), averaged over what has a target.

    Args:
        logits: of the model.
        targets: of `make_targets`, perhaps mixed.
        weights: (K,) of the classes, as torch's cross entropy has them; None: all alike.
    """
    if weights is not None:
        targets = targets * weights
    loss = -(targets * logits.float().log_softmax(-1)).sum()
    return loss / targets.sum().clamp(min=1e-12)


def balanced_weights(counts: np.ndarray) -> Tensor:
    """Weights (K,) inversely proportional to the classes' counts, their mean over what was counted 1."""
    return torch.from_numpy(
        (counts.sum() / (len(counts) * np.maximum(counts, 1))).astype(np.float32)
    )


def mix(
    video: Tensor, targets: Tensor, mixup: float, cutmix: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mix every clip of a batch with the one at its mirrored place: mixup or cutmix, drawn for the whole batch.

    Zhang et al. 2018 (https://arxiv.org/abs/1710.09412), Yun et al. 2019 (https://arxiv.org/abs/1905.04899). A cut box
    goes through all frames of a clip. As timm does, one is drawn with equal odds where both are on.

    Args:
        video: float (B, C, T, H, W).
        targets: (B, K).
        mixup: alpha of the Beta distribution; 0: off.
        cutmix: likewise.
        rng: of the draw.
    """
    if not mixup and not cutmix:
        return video, targets
    use_cutmix = bool(cutmix) and (not mixup or rng.random() < 0.5)
    alpha = cutmix if use_cutmix else mixup
    share = float(rng.beta(alpha, alpha))  # of the clip itself
    if not use_cutmix:
        video = video * share + video.flip(0) * (1 - share)
    else:
        height, width = video.shape[-2:]
        side = (1 - share) ** 0.5
        half_h, half_w = int(height * side) // 2, int(width * side) // 2
        y, x = int(rng.integers(height)), int(rng.integers(width))
        top, bottom = max(y - half_h, 0), min(y + half_h, height)
        left, right = max(x - half_w, 0), min(x + half_w, width)
        video, other = video.clone(), video.flip(0)
        video[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    return video, targets * share + targets.flip(0) * (1 - share)


def few_shots(labels: list[str], shots: int, seed: int) -> np.ndarray:
    """Which videos (N,) are kept when every class may have `shots` of them: a seeded draw.

    Raises:
        ValueError: fewer than one.
    """
    if shots < 1:
        raise ValueError(f"--shots {shots} leaves nothing to learn from: give at least 1")
    rng = np.random.default_rng([seed, shots])
    keep = np.zeros(len(labels), dtype=bool)
    for name in sorted(set(labels)):
        members = np.array([i for i, label in enumerate(labels) if label == name])
        keep[rng.permutation(members)[:shots]] = True
    return keep


class Learner(nn.Module):
    """What a run saves: the classifier and, where asked for, the moving average of its weights.

    Args:
        model: the classifier that learns.
        ema: how much of the average stays at every step; 0: no average.
    """

    def __init__(self, model: nn.Module, ema: float):
        super().__init__()
        self.arguments = {"classifier": model.arguments, "ema": ema}
        self.model, self.ema = model, ema
        self.average = copy.deepcopy(model).requires_grad_(False) if ema else None

    @property
    def best_guess(self) -> nn.Module:
        """The weights to be judged and exported."""
        return self.model if self.average is None else self.average

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the weights; buffers, such as batch norm's, are copied."""
        if self.average is None:
            return
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        for average, current in pairs:
            average.lerp_(current, 1 - self.ema)
        for average, current in zip(self.average.buffers(), self.model.buffers(), strict=True):
            average.copy_(current)
