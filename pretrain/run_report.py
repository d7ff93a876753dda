"""report.html of a training run: its state, what it learned from, its course, and what comes next.

    report = RunReport(folder, steps, processes, reasons)
    report.title, report.rows = "what is learned", {"model": name}     # the recipe, once
    report.curve = Curve(("loss",), ("knn",), "loss and kNN accuracy")
    report.write("finished", run.state, "muybridge linear-probe ...")

It is written at the end, when the run is interrupted, and in between when `due`, so that a run that
was killed has one too. All of it comes from the run's folder and from what the recipe says.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain import log
from pretrain.health import Health
from pretrain.html import Page
from pretrain.names import counted, for_screen, for_shell

SECONDS = 30.0  # at least between two reports of a run that goes on
# Scores that a log may have, and what they are called; of those with a chance, that stands beside.
SCORES = {
    "knn": "online kNN", "view_retrieval": "view retrieval", "effective_rank": "effective rank",
    "feature_std": "features' std", "val_t2v_r1": "text to video R@1",
    "val_t2v_r10": "text to video R@10", "val_top1": "validation accuracy",
}  # fmt: skip
NUMBERS = ("effective_rank", "feature_std")  # that are no fractions
MOST_SCORES = 40  # rows of them
WORDS = {
    "healthy": "It is healthy: the loss falls and features of different clips differ.",
    "starting": "Too little is learned so far to judge it.",
    "collapsing": "Its features have collapsed.",
    "not learning": "It has not learned.",
    "": "",
}


@dataclass(frozen=True)
class Curve:
    """What the curve of a run shows, by names of its log.

    Attributes:
        losses: on the left axis.
        fractions: on the right one.
        title: above it.
    """

    losses: tuple[str, ...] = ("loss",)
    fractions: tuple[str, ...] = ()
    title: str = "loss"


@dataclass
class RunReport:
    """What is known of a run, to be written as report.html.

    Attributes:
        folder: of the run.
        steps: of its plan.
        processes: that train it.
        reasons: "what: why" of what was chosen by the data.
        title: what is learned.
        rows: what the run resolved to.
        curve: what its curve shows.
        health: of the features, where it is watched.
        remarks: gives sentences of a guard or an early stop.
        pictures: figures beside the curve, and what they show.
    """

    folder: Path
    steps: int
    processes: int = 1
    reasons: Sequence[str] = ()
    title: str = "training"
    rows: Mapping[str, object] = field(default_factory=dict)
    curve: Curve = field(default_factory=Curve)
    health: Health | None = None
    remarks: Callable[[], list[str]] = list
    pictures: dict[str, str] = field(default_factory=dict)
    _written: float = field(default_factory=time.monotonic)

    @property
    def due(self) -> bool:
        """Whether the last report, or the beginning, is a while ago."""
        return time.monotonic() - self._written >= SECONDS

    def write(
        self, how: str, state: Mapping[str, Any], then: str = "", problem: str = ""
    ) -> dict[str, object]:
        """Draw the curve and write the page; what cannot be written is warned of, no more.

        Args:
            how: finished, interrupted, stopped (by an error) or under way.
            state: of the run, with `step`, `seconds`, `skipped` and `bad_clips`.
            then: the command that comes next.
            problem: the error.

        Returns:
            what to print of both, by name.
        """
        self._written = time.monotonic()
        curve, path = self.curve, self.folder / "report.html"
        drawn = log.curve_figure(
            self.folder / "curve.png", self.folder / "log.jsonl", curve.losses, curve.fractions,
            curve.title,
        )  # fmt: skip
        try:
            self._page(how, state, then, problem).write(path)
        except Exception as error:  # of the disk, of a figure: no reason to lose a training
            reason = for_screen(f"{type(error).__name__}: {error}", 300)
            print(f"warning: no report {for_screen(path)}: {reason}", file=sys.stderr, flush=True)
            return {"curve": drawn}
        return {"curve": drawn, "report": path}

    def _page(self, how: str, state: Mapping[str, Any], then: str, problem: str) -> Page:
        lines, _ = log.read_log(self.folder / "log.jsonl")
        page = Page(f"{self.title}: {self.folder}")
        page.text(self._lead(how, state, lines), "lead")
        for note in ([problem] if problem else []) + self._notes(state):
            page.text(note, "note")
        if how != "finished":
            launched = f", of {self.processes} processes under their launcher,"
            page.text(f"The same command{launched * (self.processes > 1)} continues it:")
            page.command(_command())
        if then:
            page.text("Next:")
            page.command(then)
        page.text("Beside other runs, and the settings in which two of them differ:")
        page.command(f"muybridge runs {for_shell(self.folder.parent)}")
        page.heading("What is learned, and from what")
        page.table([], self.rows.items())
        if self.reasons:
            page.heading("What the data decided")
            page.table(["chosen", "why"], [r.partition(": ")[::2] for r in self.reasons])
        page.heading("Course")
        page.figure(self.folder / "curve.png", self.curve.title)
        _scores(page, lines)
        for name, about in self.pictures.items():
            page.figure(self.folder / name, about)
        page.heading("Speed")
        _speed(page, lines, state)
        page.text("config.json has all settings, and log.jsonl all numbers.")
        return page

    def _lead(self, how: str, state: Mapping[str, Any], lines: list[dict]) -> str:
        step = state["step"]
        text = f"{how.capitalize()} after {step} of {counted(self.steps, 'step')}"
        text += f", {log.duration(state['seconds'])} of training"
        if how == "under way":
            when = time.strftime("%Y-%m-%d %H:%M")
            text += f", when this was written ({when}); if nothing runs any more, it was ended"
        word = self.health.word if self.health and self.health.judged else _last_word(lines)
        return f"{text}. {WORDS[word]}".rstrip()

    def _notes(self, state: Mapping[str, Any]) -> list[str]:
        notes = self.remarks()
        if self.health and self.health.advice:
            notes = [f"{self.health.word}: {self.health.advice}", *notes]
        if state["bad_clips"]:
            clips = counted(state["bad_clips"], "clip")
            notes.append(f"{clips} could not be decoded and were replaced: data_errors.jsonl")
        if state["skipped"]:
            steps = counted(state["skipped"], "step")
            notes.append(f"{steps} skipped: the gradient was not finite")
        return notes


def _last_word(lines: list[dict]) -> str:
    """The word of a run's health in its log, as far as that has it; empty: none."""
    last = lines[-1] if lines else {}
    found = [word for word in ("collapsing", "not learning") if last.get(word.replace(" ", "_"))]
    return found[0] if found else ""


def _command() -> str:
    """The command that started this process, to be copied."""
    first, *words = sys.argv
    if first.endswith(".py"):
        first = f"python {for_shell(first)}"
    return " ".join([first, *map(for_shell, words)])


def _scores(page: Page, lines: list[dict]) -> None:
    """The course of the scores: a row a measurement."""
    names = [name for name in SCORES if any(line.get(name) is not None for line in lines)]
    measured = [line for line in lines if any(line.get(name) is not None for name in names)]

    def cell(line: dict, name: str) -> str:
        value, chance = line.get(name), line.get(f"{name}_chance")
        if value is None:
            return ""
        if name in NUMBERS:
            return f"{value:.3g}"
        clips = line.get(f"{name}_clips")
        beside = [f"chance {100 * chance:.1f}"] if chance is not None else []
        beside += [counted(int(clips), "clip")] if clips else []
        return f"{100 * value:.1f} %" + f" ({', '.join(beside)})" * bool(beside)

    if measured:
        measured = measured[::-1][:: math.ceil(len(measured) / MOST_SCORES)][::-1]
        rows = [[line["step"], *(cell(line, name) for name in names)] for line in measured]
        page.table(["step", *(SCORES[name] for name in names)], rows)


def _speed(page: Page, lines: list[dict], state: Mapping[str, Any]) -> None:
    """How fast it went."""
    speeds = [line["clips_per_s"] for line in lines if line.get("clips_per_s")]
    rows = [("training", f"{log.duration(state['seconds'])} for {counted(state['step'], 'step')}")]
    if speeds:
        rows.append(("clips a second", f"{statistics.median(speeds):.1f}, the median"))
    page.table([], rows)
