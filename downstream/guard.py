"""Going on from weights without losing what they had: scores are watched, the best weights kept.

    guard = Guard(folder, on, run.state["guard"])
    guard.judge(scores, health.word, step, encoder, about)    # of the starting weights, then of
    if guard.stopped:                                         # every score
        run.end_early()
    run.finish_step({"guard": guard.kept})
    export(guard.restored(encoder))                           # the best where it was stopped

What is watched is the online kNN accuracy or, without labels, view retrieval; and with both whether
the features collapse (pretrain/health.py). The best weights lie in RUN/best, so that a continued
run has them, and one that was stopped stays so.
"""

import math
import sys
from pathlib import Path

from torch import nn

from downstream.models import load_backbone
from pretrain import backbones
from pretrain.names import counted, for_screen

ERRORS = 4  # standard errors below the best, before a score has fallen
WATCHED = {"knn": "online kNN accuracy", "view_retrieval": "view retrieval"}
KEPT = ("best", "best_step", "last", "last_step", "clips", "labels", "low", "collapsed", "stopped")


def has_fallen(score: float, best: float, clips: int) -> bool:
    """Whether an accuracy is below the best by more than so many clips leave to chance.

    The standard error is that of the best one, with two clips added to either side (Agresti & Coull
    1998), so that 100 % of a few clips is not certain. The same clips are asked each time, so that
    two scores differ by less than independent ones.
    """
    share = (best * clips + 2) / (clips + 4)
    return score < best - ERRORS * math.sqrt(share * (1 - share) / clips)


class Guard:
    """Stops a run whose features become worse than they were, and keeps the best weights.

    Args:
        folder: of the run.
        on: whether to; else nothing is done.
        kept: of the run's state; None or empty of a run that begins.

    Attributes:
        on: see above.
        kept: numbers for the run's state.
    """

    def __init__(self, folder: Path, on: bool, kept: dict | None):
        self._best, self.on = folder / "best", on
        whole = kept and all(type(kept.get(name)) in (int, float) for name in KEPT)
        self.kept: dict[str, float] = dict(kept) if kept and whole else {}

    @property
    def stopped(self) -> bool:
        """Whether the run is to end."""
        return self.on and bool(self.kept.get("stopped"))

    def judge(
        self, scores: dict[str, float], word: str, step: int, encoder: nn.Module | None,
        about: dict,
    ) -> None:  # fmt: skip
        """Note scores of the same clips as before, and keep the weights if they are the best.

        Args:
            scores: of `downstream.monitor.online_scores`; without them (a broken clip) nothing is
                judged.
            word: of `pretrain.health.Health`.
            step: steps done; the first call is of the starting weights.
            encoder: what has these scores, to be kept; None in all but the main process.
            about: its provenance.

        Raises:
            ValueError: the weights cannot be written.
        """
        name = next((name for name in WATCHED if name in scores), None)
        if not self.on or name is None:
            return
        score, clips, low = scores[name], int(scores[f"{name}_clips"]), word == "collapsing"
        kept = self.kept or {"best": -1.0, "best_step": 0, "low": int(low)}
        if not self.kept and encoder is not None:
            asked = counted(clips, "clip")
            print(f"starting weights: {WATCHED[name]} {100 * score:.1f} % of {asked}", flush=True)
        collapsed = low and not kept["low"]  # some weights are so from the start
        better = score >= kept["best"] and not collapsed
        fallen = not better and has_fallen(score, kept["best"], clips)
        if name == "view_retrieval":  # what clips look like may matter less, and need not be lost
            fallen = fallen and score < kept["best"] / 2
        self.kept = kept | {
            "last": score, "last_step": step, "clips": clips, "labels": int(name == "knn"),
            "collapsed": int(collapsed), "stopped": int(fallen or collapsed),
        }  # fmt: skip
        if better:
            self.kept |= {"best": score, "best_step": step}
            if encoder is not None:
                backbones.export_backbone(encoder, self._best, about)

    def restored(self, encoder: nn.Module) -> nn.Module:
        """The best weights of a run that was stopped, else those that it has.

        Raises:
            ValueError: RUN/best is missing or damaged.
        """
        if not self.stopped:
            return encoder
        best = load_backbone(str(self._best))
        assert isinstance(best, nn.Module)
        return best

    @property
    def about(self) -> dict[str, float]:
        """What the provenance of a stopped run's weights says: of which step they are."""
        if not self.stopped:
            return {}
        return {"step": self.kept["best_step"], "stopped_at": self.kept["last_step"]}

    def words(self) -> list[str]:
        """Sentences for a report: that it was stopped, why, and what to do; or what is kept."""
        if not self.kept or not self.on:
            return []
        if not self.stopped:
            what = WATCHED["knn" if self.kept["labels"] else "view_retrieval"]
            return [
                f"the guard has seen the best {what}, {100 * self.kept['best']:.1f} %, at step "
                f"{self.kept['best_step']:.0f}; those weights are in {self._best}"
            ]
        kept = self.kept
        what = WATCHED["knn" if kept["labels"] else "view_retrieval"]
        why = (
            f"{what} is {100 * kept['last']:.1f} % of {counted(int(kept['clips']), 'clip')}, after "
            f"{100 * kept['best']:.1f} %"
        )
        why += ", and the features of different clips become alike" * bool(kept["collapsed"])
        return [
            f"stopped at step {kept['last_step']:.0f}: {why}. The weights of step "
            f"{kept['best_step']:.0f} ({self._best}) are restored. Give another --out and a lower "
            "--base-lr or --layer-decay 0.75, or --guard False to go on regardless"
        ]

    def say(self) -> None:
        """Print that a run was stopped, why, and what to do."""
        for line in self.words() if self.stopped else ():
            print(for_screen(line), file=sys.stderr, flush=True)
