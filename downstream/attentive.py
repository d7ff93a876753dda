"""The attentive probe: one cross-attention with a learned query over the frozen last tokens.

As in V-JEPA (Bardes et al. 2024, https://arxiv.org/abs/2404.08471), without its MLP. It shows what
single tokens know and mean pooling may hide. Shapes: B videos of a batch, V views, N tokens, D
width, H attention heads, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.features import Extraction, extract_tokens
from downstream.probe import Folds
from pretrain.data.progress import counting
from pretrain.data.shards import Pack
from pretrain.optim import adamw, learning_rate

# (peak learning rate, weight decay) of the heads trained side by side.
CHOICES = tuple((lr, decay) for lr in (3e-3, 1e-2, 3e-2) for decay in (0.05, 0.5))
DEFAULT = (1e-2, 0.05)  # where there are no validation videos to choose on
BATCH, EPOCHS, MIN_STEPS = 64, 30, 300
# Values in a batch up to which one CPU thread does the work. Measured: two threads gain little, and
# take 20 times as long while another process has the cores.
ONE_THREAD = 2**22


class AttentiveHead(nn.Module):
    """The layers behind the attention weights: values, LayerNorm and a linear classifier.

    With one query per head, q . (W_k x) = (W_k' q) . x, so query and key projection are one learned
    vector per head, and W_v is applied after the pooling instead of to every token: the same
    functions as the textbook layer for a hundredth of its work.

    Args:
        dim: D.
        num_classes: C.
    """

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.heads = 1 if dim % 64 else dim // 64
        self.query = nn.Parameter(torch.zeros(self.heads, dim))  # zero: starts as mean pooling
        self.value = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """Tokens pooled by each head (B, H, D) to logits (B, C)."""
        weight = self.value.weight.view(self.heads, -1, pooled.shape[-1])  # (H, D/H, D)
        value = torch.einsum("bhd,hed->bhe", pooled, weight).flatten(1) + self.value.bias
        return self.classifier(self.norm(value))


def classify(heads: list[AttentiveHead], tokens: Tensor) -> Tensor:
    """Logits (K, B, C) of K probes for tokens (B, N, D), which are read once for all of them."""
    query = torch.cat([head.query for head in heads])  # (KH, D)
    attention = (tokens @ query.T).softmax(1)  # (B, N, KH)
    pooled = (attention.transpose(1, 2) @ tokens).unflatten(1, (len(heads), -1))  # (B, K, H, D)
    return torch.stack([head(pooled[:, k]) for k, head in enumerate(heads)])


@dataclass(frozen=True)
class AttentiveProbe:
    """A fitted head and how it came about.

    Attributes:
        head: on the device it was trained on.
        mean: (D,) of the training tokens; small differences between tokens are often what counts,
            so every feature is standardised, as the linear probe's are.
        std: (D,) likewise.
        lr: the peak learning rate chosen.
        weight_decay: likewise.
        sweep: validation accuracy of each choice, "lr / weight decay" -> accuracy.
    """

    head: AttentiveHead
    mean: Tensor
    std: Tensor
    lr: float
    weight_decay: float
    sweep: dict[str, float]

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """Class probabilities (K, C) of clips (K, V, N, D) float16, the mean over their views."""
        return _score([self.head], tokens, np.arange(len(tokens)), self.mean, self.std)[0]


def _load(tokens: np.ndarray, mean: Tensor, std: Tensor) -> Tensor:
    """float16 tokens (..., D) to where `mean` is, float32, standardised."""
    x = torch.from_numpy(np.array(tokens))  # a copy: the map is read-only
    return (x.to(mean.device).float() - mean) / std


def _train(
    heads: list[AttentiveHead],
    choices: list[tuple[float, float]],
    tokens: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    mean: Tensor,
    std: Tensor,
    seed: int,
) -> None:
    """Train heads side by side on the clips `rows`, one random view of each a time."""
    rng = np.random.default_rng(seed)
    optimizers = [
        adamw(h, decay, (0.9, 0.999)) for h, (_, decay) in zip(heads, choices, strict=True)
    ]
    batch = min(BATCH, len(rows))
    num_steps = max(EPOCHS * len(rows) // batch, MIN_STEPS)
    num_passes = -(-num_steps * batch // len(rows))
    order = np.concatenate([rng.permutation(rows) for _ in range(num_passes)])
    threads = torch.get_num_threads()
    if batch * tokens[0, 0].size <= ONE_THREAD:
        torch.set_num_threads(1)
    try:
        for step in counting(range(num_steps), "attentive probe", "step"):
            # Sorted, so that the file is read in order.
            clips = np.sort(order[step * batch : (step + 1) * batch])
            x = _load(tokens[clips, rng.integers(tokens.shape[1], size=len(clips))], mean, std)
            y = torch.from_numpy(labels[clips]).to(x.device).repeat(len(heads))
            # The sum of the probes' losses: none sees the gradient of another.
            loss = len(heads) * F.cross_entropy(classify(heads, x).flatten(0, 1), y)
            loss.backward()
            for optimizer, (peak, _) in zip(optimizers, choices, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, num_steps, num_steps // 10, peak, 0.0)
                optimizer.step()
                optimizer.zero_grad()
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _score(
    heads: list[AttentiveHead], tokens: np.ndarray, rows: np.ndarray, mean: Tensor, std: Tensor
) -> np.ndarray:
    """Class probabilities of the clips `rows`, the mean over views: (len(heads), len(rows), C)."""
    found = []
    for part in np.array_split(rows, -(-len(rows) // BATCH)):
        x = _load(tokens[part], mean, std)
        scores = classify(heads, x.flatten(0, 1)).softmax(-1)
        found.append(scores.unflatten(1, x.shape[:2]).mean(2).cpu())
    return torch.cat(found, 1).numpy()


def fit_attentive(
    tokens: np.ndarray,
    labels: np.ndarray,
    validation: np.ndarray,
    seed: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> AttentiveProbe:
    """Choose learning rate and weight decay on the validation split, then fit on all videos.

    Args:
        tokens: (K, V, N, D) float16, of all clips of the training videos.
        labels: (K,) class numbers, every class 0..C-1 at least once.
        validation: (K,) True = judge the choices on it; all False: nothing is chosen.
        seed: of the initial weights and of the order.
        device: where to train.
    """
    num_classes = int(labels.max()) + 1

    def fresh(count: int) -> list[AttentiveHead]:
        with torch.random.fork_rng(devices=[]):  # the same start for every choice
            made = []
            for _ in range(count):
                torch.manual_seed(seed)
                made.append(AttentiveHead(tokens.shape[-1], num_classes).to(device))
        return made

    # Mean and standard deviation of at most 256 clips, evenly spread: more would not move them.
    some = tokens[np.linspace(0, len(tokens) - 1, min(len(tokens), 256)).astype(int), 0]
    flat = some.reshape(-1, tokens.shape[-1]).astype(np.float32)
    mean = torch.from_numpy(flat.mean(0)).to(device)
    std = torch.from_numpy(np.maximum(flat.std(0), 1e-4)).to(device)
    chosen, sweep = DEFAULT, {}
    if validation.any():
        heads, rows = fresh(len(CHOICES)), np.flatnonzero(validation)
        _train(heads, list(CHOICES), tokens, labels, np.flatnonzero(~validation), mean, std, seed)
        predicted = _score(heads, tokens, rows, mean, std).argmax(2)
        correct = (predicted == labels[rows]).mean(1).tolist()
        sweep = {
            f"{lr:g} / {wd:g}": accuracy
            for (lr, wd), accuracy in zip(CHOICES, correct, strict=True)
        }
        chosen = CHOICES[int(np.argmax(correct))]
    heads = fresh(1)
    _train(heads, [chosen], tokens, labels, np.arange(len(labels)), mean, std, seed)
    return AttentiveProbe(heads[0], mean, std, *chosen, sweep)


def attentive_scores(
    encoder: nn.Module, pack: Pack, given: Folds, how: Extraction, seed: int
) -> tuple[np.ndarray, dict]:
    """The attentive probe's class scores of the test videos (M, C), and what was chosen for it.

    Args:
        encoder: the backbone.
        pack: the data.
        given: one fold from training to test videos.
        how: views of a clip.
        seed: of the head.
    """
    train, test = (
        extract_tokens(encoder, pack, part.samples, how, f"tokens, {split}")
        for part, split in zip(given.parts, ("training videos", "test videos"), strict=True)
    )
    learned, tested = given.parts
    ((_, validations, _),) = given.folds
    labels, validation = given.labels[learned.owner], validations[0][learned.owner]
    probe = fit_attentive(train, labels, validation, seed, how.device)
    chosen = {
        "lr": probe.lr, "weight_decay": probe.weight_decay, "validation_accuracy": probe.sweep
    }  # fmt: skip
    return tested.average(probe.probabilities(test)), chosen
