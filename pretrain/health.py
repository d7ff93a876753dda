"""Whether a training learns, from its loss and from the features of some of its clips.

    health = Health(steps)
    health.scored(feature_health(features))           # of the starting weights
    values |= health.rebuilt(loss, mean_costs)        # every step, or `contrasted`
    health.scored(feature_health(features))           # sometimes, (N, D) of the same clips
    values |= health.values                           # for log.jsonl, as all of these
    run.log(values, f"... {health.word}")             # one word for the progress line
    health.say()                                      # what to do, once when the word changes

Nothing here draws a random number, nor changes one of the run. The bands are measured: the table
"Health" in recipes/RESULTS.md has the runs behind them.
"""

import math
from collections import deque

import numpy as np

PATIENCE = 0.15  # of a run, before its loss is judged, and over which
FEW = 8  # clips: N of them have a rank of at most N - 1
LEAST = 8  # steps behind a judgement of the loss
BAND = 0.02  # of the loss of who knows nothing: less than that is not learned
# Features have collapsed where one of these is below its first number, or below its second times
# the largest in the run, that of the starting weights among them.
COLLAPSED = {"effective_rank": (2.0, 0.2), "feature_std": (0.01, 0.25)}


def effective_rank(features: np.ndarray) -> float:
    """How many directions features use: exp of the entropy of their singular values.

    Roy & Vetterli 2007, "The effective rank", of the features minus their mean; between 1, all on a
    line (or in a point), and the smaller of N - 1 and D, the same spread in all directions.

    Args:
        features: (N, D).
    """
    x = features.astype(np.float64)
    size = np.linalg.norm(x)
    x -= x.mean(0)
    # Of the smaller Gram matrix: as exact as entropy needs, and much sooner.
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    values = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0))
    values = values[values > 1e-6 * size]  # the rest is rounding
    if not len(values):
        return 1.0
    shares = values / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def feature_std(features: np.ndarray) -> float:
    """Mean standard deviation of features scaled to unit length, times the root of their width.

    0: all point the same way; 1: all ways alike (Chen & He 2021, https://arxiv.org/abs/2011.10566).

    Args:
        features: (N, D).
    """
    lengths = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    unit = features / lengths.clip(min=1e-12)
    return float(unit.std(0).mean() * unit.shape[1] ** 0.5)


def feature_health(features: np.ndarray) -> dict[str, float]:
    """Both, as a run's log has them; nothing of fewer than `FEW` clips, whose rank says nothing."""
    if len(features) < FEW:
        return {}
    return {"effective_rank": effective_rank(features), "feature_std": feature_std(features)}


def share_learned(loss: float, chance: float) -> float:
    """How much of the loss of who knows nothing is gone: 0, nothing; 1, all.

    Args:
        loss: of a step.
        chance: of reconstruction the mean square of the same targets, which is what predicting
            their mean costs (`pretrain.videomae.loss_beside_mean`); of a contrast `chance_loss`.
    """
    return 1 - loss / chance if chance else 0.0


def chance_loss(loss: str, count: int) -> float:
    """What telling nothing apart costs a contrast, however its positives are spread.

    Args:
        loss: "infonce" or "classes": all logits are equal; "siglip": they are equal and as low as
            one positive in a row of `count` makes best.
        count: of the texts, views or classes with which each clip is compared.
    """
    rest = (count - 1) * math.log(count / (count - 1)) if loss == "siglip" and count > 1 else 0.0
    return math.log(count) + rest


class Learned:
    """Whether a loss leaves that of who knows nothing.

    Args:
        steps: of the run.
    """

    def __init__(self, steps: int):
        self._window = max(LEAST, round(PATIENCE * steps))
        self._shares: deque[float] = deque(maxlen=self._window)
        self._stuck = False

    def saw(self, share: float) -> None:
        """Note the `share_learned` of a step."""
        self._shares.append(max(share, -1.0) if math.isfinite(share) else -1.0)

    @property
    def share(self) -> float:
        """The mean of the latest."""
        shares = np.array(self._shares)
        return float(shares[len(shares) // 2 :].mean())

    @property
    def starting(self) -> bool:
        """Whether less than `BAND` is learned so far."""
        return self.share < BAND

    def nothing(self) -> bool:
        """Whether so many steps learned nothing, and as many more would not.

        By a line through the steps: it does not rise (by three standard errors), and going on like
        that it would not come to `BAND` (by two). A few steps, or noisy ones, do not show that.
        Once it was so, it is until the share rises, or has come to `BAND`.
        """
        if len(self._shares) < self._window:
            return False
        shares, time = np.array(self._shares), np.linspace(-0.5, 0.5, self._window)
        rise = time @ shares / (time @ time)
        rest = shares - shares.mean() - rise * time
        error = math.sqrt(rest @ rest / (self._window - 2) / (time @ time))
        if self.share >= BAND or rise > max(3 * error, BAND / 100):
            self._stuck = False
        elif self.share + max(rise, 0.0) + 2 * error < BAND:
            self._stuck = True
        return self._stuck


class Health:
    """One word for a run, and what to do about it.

    Args:
        steps: of the run.
        best: the largest values of `feature_health` so far, of a run that is continued.

    Attributes:
        best: the same now; None: there were no features yet.
    """

    def __init__(self, steps: int, best: dict[str, float] | None = None):
        self.best, self._steps, self._said = best, steps, ""
        self._features: dict[str, float] = {}
        self._losses: dict[str, tuple[Learned, str]] = {}

    def rebuilt(self, loss: float, mean_costs: float) -> dict[str, float]:
        """Note a step's reconstruction; the fraction of the target that it explains, for the log.

        Args:
            loss: mean squared error.
            mean_costs: that of the mean of the same targets; 0: nothing is reconstructed, or there
                is nothing to.
        """
        if not mean_costs:
            return {}
        share = share_learned(loss, mean_costs)
        self._note("explained", share, "what predicting the mean of its targets costs")
        return {"explained": share}

    def contrasted(self, name: str, loss: float, kind: str, count: int) -> dict[str, float]:
        """Note a step's contrastive loss; it and that of chance, for the log.

        Args:
            name: its name there.
            loss: of the step.
            kind: see `chance_loss`, likewise `count`.
            count: see there.
        """
        chance = chance_loss(kind, count)
        words = "" if kind == "siglip" else f"ln({count}) = "
        words += f"{chance:.2f}, what telling nothing apart costs"
        self._note(name, share_learned(loss, chance), words)
        return {name: loss, f"{name}_chance": chance}

    def _note(self, name: str, share: float, costs: str) -> None:
        learned, _ = self._losses.get(name, (Learned(self._steps), ""))
        learned.saw(share)
        self._losses[name] = learned, costs

    def scored(self, scores: dict[str, float]) -> None:
        """Note a `feature_health`; nothing where a broken clip, or too few, left none."""
        if COLLAPSED.keys() <= scores.keys():
            self._features = {name: scores[name] for name in COLLAPSED}
            best = self.best or {}
            self.best = {n: max(v, best.get(n) or 0.0) for n, v in self._features.items()}

    @property
    def word(self) -> str:
        """Collapsing, not learning, healthy; or starting, while too little is learned to tell."""
        best = self.best or {}
        for name, value in self._features.items():
            least, part = COLLAPSED[name]
            if value < max(least, part * best[name]):
                return "collapsing"
        losses = [learned for learned, _ in self._losses.values()]
        if any(learned.nothing() for learned in losses):
            return "not learning"
        return "starting" if any(learned.starting for learned in losses) else "healthy"

    @property
    def judged(self) -> bool:
        """Whether there was a step; else only the log of a run that goes on knows its word."""
        return bool(self._losses)

    @property
    def values(self) -> dict[str, int]:
        """The word as a run's log has it; healthy is neither of these."""
        words = ("collapsing", "not learning")
        return {word.replace(" ", "_"): int(self.word == word) for word in words}

    @property
    def advice(self) -> str:
        """What to do about the word; empty where nothing is to be done."""
        if self.word == "collapsing":
            now, best = self._features, self.best or {}
            rank, std = (f"{now[n]:.3g}, at best {best[n]:.3g}" for n in COLLAPSED)
            return (
                f"the features of different clips become alike (effective rank {rank}; standard "
                f"deviation {std}): start again with a lower --base-lr, and where views are only "
                "drawn together, with reconstruction or with something that keeps clips apart"
            )
        if self.word == "not learning":
            name, costs = next((n, c) for n, (x, c) in self._losses.items() if x.nothing())
            what = {"explained": "reconstruction loss"}.get(name, name)
            return (
                f"the {what} stays at {costs}, or above: train longer if these are few "
                "steps; try another --base-lr, lower if the loss jumps, higher if it hardly moves; "
                "check the data: captions that belong to their clips, clips that show something"
            )
        return ""

    def say(self) -> None:
        """Print what to do, once when the word has become one that asks for it."""
        word, said = self.word, self._said
        self._said = word
        if word != said and self.advice:
            print(f"  {word}: {self.advice}", flush=True)
