"""The parts of supervised training: its start, rates, optimizers, targets, losses, averaging.

B clips, K classes.
"""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from downstream.classifier import Classifier
from downstream.models import build_model, load_backbone
from downstream.models.flops import count_flops
from downstream.results import Model
from downstream.segments import UNLABELLED
from pretrain.backbones import provenance_of
from pretrain.data.sampling import STEP, counter_rng
from pretrain.ema import start_average, update_average
from pretrain.flags import flag
from pretrain.loop import Plan
from pretrain.optim import decays, layer_scales, learning_rate, param_groups
from pretrain.spec import Backbone, Clip
from pretrain.weights import weights_hash

# ------------------------------------------------------------------------------------- the backbone


def start_from(
    model: str | None, trained: str | None, weights: str, small: bool, changes: dict[str, Any]
) -> nn.Module:
    """What is trained: a model of a family, or a trained backbone.

    Args:
        model: a name in `MODELS`, see `build_model`; likewise `weights` and `small`.
        trained: or a backbone, see `load_backbone`.
        weights: of either.
        small: the model's form for a CPU.
        changes: arguments that are to differ, by name; of a backbone only "frames" and "size" can,
            of a video transformer.

    Raises:
        ValueError: neither or both of the names; nothing of the kind is there, or it cannot be so.
    """
    if model and not trained:
        return build_model(model, small, weights, **changes)
    if model or not trained:
        raise ValueError(
            "give either --model, a name of python -m downstream.models, or --backbone"
        )
    backbone = load_backbone(trained, weights)
    resized = getattr(backbone, "resized", None)
    if resized and changes and changes.keys() <= {"frames", "size"}:
        backbone = resized(changes.get("frames", 0), changes.get("size", 0))
    elif changes:
        raise ValueError(
            f"{flag(next(iter(changes)))} belongs to --model: this trained backbone has its own"
        )
    assert isinstance(backbone, nn.Module)
    return backbone


def record_method(backbone: nn.Module, *indices: dict[str, Any]) -> None:
    """Let a backbone refuse flow of another method than the one it learns from, in place.

    Args:
        backbone: with the backbones that it is made of; those that take no flow are left alone, and
            so are those that name a method already.
        indices: of the training data's packs; of flow by several methods none is recorded.
    """
    flows = [index.get("streams", {}).get("flow", {}) for index in indices]
    methods = {method for flow in flows for method in flow.get("methods", {})}
    (method,) = methods if len(methods) == 1 else ("",)
    for part in backbone.modules():
        if not isinstance(part, Backbone) or "flow" not in part.input_spec.pictures:
            continue
        spec, flow = part.input_spec, part.input_spec.pictures["flow"]
        if method and not flow.method:
            streams = {**spec.streams, "flow": replace(flow, method=method)}
            part.input_spec = replace(spec, streams=streams)
            if "method" in part.arguments:  # a model of others has it from them
                part.arguments["method"] = method


def adapt(backbone: nn.Module, pool: str | None, drop_path: float) -> nn.Module:
    """A backbone with the pooling and the stochastic depth of a training.

    Args:
        backbone: what is trained; changed in place or replaced.
        pool: "fc_norm": a fresh norm behind the mean of the tokens; None: its own.
        drop_path: largest probability of leaving out a block.

    Raises:
        ValueError: it cannot be trained so.
    """
    assert isinstance(backbone, Backbone)
    own = backbone.arguments.get("pool")
    if pool and pool != own:
        with_fc_norm = getattr(backbone, "with_fc_norm", None)
        if pool != "fc_norm" or own != "mean" or not with_fc_norm:
            raise ValueError(
                f"--pool {pool}: only the norm of a video transformer whose tokens are averaged "
                "can move behind the mean, with --pool fc_norm"
            )
        backbone = with_fc_norm()
    if set_drop_path := getattr(backbone, "set_drop_path", None):
        set_drop_path(drop_path)
    elif drop_path:
        raise ValueError(
            "--drop-path leaves out transformer blocks, of which this backbone has none: give 0"
        )
    assert isinstance(backbone, nn.Module)
    return backbone


# -------------------------------------------------------------------------------------------- rates


def scheduled_rate(step: int, plan: Plan, schedule: str, drops: tuple[float, ...]) -> float:
    """The learning rate of a step (0-based), a pure function, so that resuming needs no state.

    Args:
        step: of the plan.
        plan: its steps, those that warm up, and the highest and the last rate.
        schedule: "cosine", to the last rate; or "step", a tenth after each of `drops`.
        drops: fractions of the run; quarters are what divisions by ten "when validation stalls"
            come to.
    """
    if schedule == "cosine" or step < plan.warmup:
        return learning_rate(step, plan.steps, plan.warmup, plan.peak, plan.final)
    assert schedule == "step", schedule
    return plan.peak * 0.1 ** sum(step >= round(drop * plan.steps) for drop in drops)


# --------------------------------------------------------------------------------------- optimizers


def make_optimizer(
    name: str, model: Classifier, weight_decay: float, layer_decay: float, backbone_lr: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW or SGD (momentum 0.9) with layer-wise rates.

    Vectors (biases, norms) and tables of positions do not decay.

    Args:
        name: "adamw" or "sgd".
        model: the classifier.
        weight_decay: of matrices and filters.
        layer_decay: a layer of the backbone has this factor on the rate of the layer after it
            (BEiT, Bao et al. 2021, https://arxiv.org/abs/2106.08254); 1: the same rate.
        backbone_lr: factor on the rate of the whole backbone; 1: as the classifier's.

    Returns:
        an optimizer whose groups have an "lr_scale", a factor on the scheduled rate.
    """
    assert name in ("adamw", "sgd"), name
    scales = {
        f"backbone.{name}": backbone_lr * scale
        for name, scale in layer_scales(model.backbone, layer_decay).items()
    }
    groups = param_groups(
        model, weight_decay, scales, lambda path, p: decays(p) and not POSITIONS.search(path)
    )
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


# Learned positions, of all families and of open_clip, timm and torchvision: VideoMAE skips
# pos_embed, Video Swin absolute_pos_embed and relative_position_bias_table.
POSITIONS = re.compile(r"(pos(itional)?_embed(ding)?|relative_position_bias_table)$")


def freeze(model: Classifier) -> None:
    """Let only the classifier learn and, in the frame families, what follows the 2-D network."""
    frozen: nn.Module = getattr(model.backbone, "images", model.backbone)
    frozen.requires_grad_(False)
    # Batch norm would go on adapting to the data in training mode.
    frozen.train = lambda mode=True: frozen  # type: ignore[method-assign, assignment]
    for module in frozen.modules():
        module.training = False


# ------------------------------------------------------------------------------------------ targets


def make_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Class numbers (...) to target probabilities (..., K); zeros where it is `UNLABELLED`."""
    known = labels != UNLABELLED
    hot = torch.nn.functional.one_hot(labels.clamp(min=0), num_classes).float()
    return (hot * (1 - smoothing) + smoothing / num_classes) * known.unsqueeze(-1)


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cross entropy of logits (..., K) with target probabilities (..., K).

    The mean of a step is the sum of all its passes and processes over that of their targets: each
    pass has other frames without a label, and other classes' weights.

    Args:
        logits: of the model.
        targets: of `make_targets`, perhaps mixed.
        weights: (K,) of the classes, as torch's cross entropy has them; None: equal.

    Returns:
        its sum, and the sum of the targets.
    """
    if weights is not None:
        targets = targets * weights
    return -(targets * logits.float().log_softmax(-1)).sum(), targets.sum()


def balanced_weights(counts: np.ndarray) -> Tensor:
    """Weights (K,) inversely proportional to the classes' counts; their mean over these is 1."""
    return torch.from_numpy(
        (counts.sum() / (len(counts) * np.maximum(counts, 1))).astype(np.float32)
    )


def mix(
    clip: Clip, targets: Tensor, mixup: float, cutmix: float, rng: np.random.Generator
) -> tuple[Clip, Tensor]:
    """Mix every clip of a batch with the one at its mirrored place, by mixup or cutmix.

    Zhang et al. 2018 (https://arxiv.org/abs/1710.09412), Yun et al. 2019
    (https://arxiv.org/abs/1905.04899). A cut box goes through all frames and streams of a clip. As
    timm does, one is drawn for the whole batch, with equal odds, where both are on.

    Args:
        clip: float (B, C, T, H, W), of every stream.
        targets: (B, K).
        mixup: alpha of the Beta distribution; 0: off.
        cutmix: likewise.
        rng: of the draw.
    """
    if not mixup and not cutmix:
        return clip, targets
    parts = {"": clip} if isinstance(clip, Tensor) else dict(clip)
    use_cutmix = bool(cutmix) and (not mixup or rng.random() < 0.5)
    alpha = cutmix if use_cutmix else mixup
    fraction = float(rng.beta(alpha, alpha))  # of the clip itself
    if not use_cutmix:
        parts = {n: p * fraction + p.flip(0) * (1 - fraction) for n, p in parts.items()}
    else:
        height, width = next(iter(parts.values())).shape[-2:]  # those of all streams
        side = (1 - fraction) ** 0.5
        half_h, half_w = int(height * side) // 2, int(width * side) // 2
        y, x = int(rng.integers(height)), int(rng.integers(width))
        top, bottom = max(y - half_h, 0), min(y + half_h, height)
        left, right = max(x - half_w, 0), min(x + half_w, width)
        for name, part in parts.items():
            parts[name] = mixed = part.clone()
            mixed[..., top:bottom, left:right] = part.flip(0)[..., top:bottom, left:right]
        fraction = 1 - (bottom - top) * (right - left) / (height * width)
    targets = targets * fraction + targets.flip(0) * (1 - fraction)
    return parts[""] if isinstance(clip, Tensor) else parts, targets


class Learner(nn.Module):
    """The classifier and, if asked for, the moving average of its weights, as a run saves them.

    Args:
        model: the classifier that learns.
        ema: how much of the average stays at every step; 0: no average.
    """

    def __init__(self, model: Classifier, ema: float):
        super().__init__()
        self.arguments = {"classifier": model.arguments, "ema": ema}
        self.model, self.ema = model, ema
        self.average = start_average(model) if ema else None

    @property
    def best_guess(self) -> Classifier:
        """The weights to be judged and exported."""
        return self.model if self.average is None else self.average

    def update_average(self) -> None:
        """Move the average, if there is one, towards the weights."""
        if self.average is not None:
            update_average(self.average, self.model, self.ema)


class StepLoss:
    """The loss of a micro-batch: clips normalised and mixed, soft targets, class weights.

    Args:
        accelerator: device, precision and processes.
        num_classes: K.
        weights: (K,) of the classes; None: equal.
        smoothing: fraction of every target spread over all classes.
        mixup: alpha of mixup; 0: off.
        cutmix: alpha of cutmix; 0: off.
        seed: of mixing, dropout and drop path.

    Attributes:
        step: the step at hand, to be set before each.
    """

    def __init__(
        self, accelerator: Accelerator, num_classes: int, weights: Tensor | None, smoothing: float,
        mixup: float, cutmix: float, seed: int,
    ):  # fmt: skip
        self.accelerator, self.num_classes = accelerator, num_classes
        self.weights = None if weights is None else weights.to(accelerator.device)
        self.smoothing, self.mixup, self.cutmix, self.seed = smoothing, mixup, cutmix, seed
        self.step = 0

    def __call__(self, model: nn.Module, batch: dict, micro: int) -> list[Tensor]:
        """Sums of the loss, of the targets, of correct predictions and of all predictions.

        With mixing, a prediction is correct if it is the larger part.
        """
        where = self.accelerator.device
        bare: Any = getattr(model, "module", model)  # without DDP around it
        spec = bare.input_spec
        clip = spec.normalise(spec.take(batch, where))
        labels = batch["labels"].to(where, non_blocking=True)
        targets = make_targets(labels, self.num_classes, self.smoothing)
        place = self.accelerator.process_index
        # The global generators too are set from (seed, step, process): resuming needs no generator
        # state.
        rng = counter_rng(self.seed, self.step, place, micro, purpose=STEP)
        torch.manual_seed(int(rng.integers(2**62)))
        clip, targets = mix(clip, targets, self.mixup, self.cutmix, rng)
        with self.accelerator.autocast():
            logits = model(clip)
        loss, mass = soft_cross_entropy(logits, targets, self.weights)
        # What a paper adds to the loss of its network, a mean over the clips; the network may be a
        # part of another.
        for part in bare.modules():
            if (added := getattr(part, "regulariser", None)) is not None:
                loss = loss + added * mass
        known = targets.sum(-1) > 0
        hits = (logits.argmax(-1) == targets.argmax(-1)) & known
        return [loss, mass, hits.sum().float(), known.sum().float()]


def describe_classifier(model: Classifier, name: str, trained: str | None) -> Model:
    """A fine-tuned classifier, for its results.

    Numbers of parameters and operations are its backbone's.

    Args:
        model: moved to the CPU.
        name: of what was trained, as the user gave it.
        trained: the backbone that it started from; None: from a fresh one.
    """
    backbone = model.backbone.cpu()
    parameters = sum(p.numel() for p in backbone.parameters())
    provenance = provenance_of(trained) if trained else "from scratch"
    return Model(
        name, weights_hash(model), parameters, backbone.arguments, provenance, count_flops(backbone)
    )


def is_best(state: dict, now: float, step: int) -> bool:
    """Note a validation accuracy in the state of a run; whether it is the best so far."""
    state |= {"val": now, "since_best": state["since_best"] + 1}
    if state["best"] is not None and now <= state["best"]:
        return False
    state |= {"best": now, "best_step": step, "since_best": 0}
    return True


def progress(values: dict, state: dict, num_classes: int) -> tuple[str, str]:
    """Text of the progress line: the step's loss and accuracy, and the last validation."""
    text = f"loss {values['loss']:.3f}  accuracy {values['train_top1']:.0%}"
    if state["val"] is None:
        return text, ""
    val, best = 100 * state["val"], 100 * state["best"]
    return text, f"val {val:.1f} % (best {best:.1f} %, chance {100 / num_classes:.1f} %)"
