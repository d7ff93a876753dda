"""report.html of recipes/fit.py: how good a classifier is, what it reads, what to label next."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from downstream.controls import Verdict
from downstream.crossval import Curve, when_to_stop
from downstream.report import interval_unit, table, title, write_csv
from downstream.results import Predictions, Results
from pretrain.data.decode import DecodeError
from pretrain.data.shards import Pack
from pretrain.files import is_file
from pretrain.html import FRAMES, Page
from pretrain.log import blank_figure, optional_figure
from pretrain.names import counted, for_csv, for_title

MOST_CONFUSED = 6  # pairs of classes that are shown
PER_PAIR = 2  # clips of each
MOST_CLASSES = 60  # of a confusion matrix that can be read
NEXT = ["path", "start", "end", "guess", "probability", "second", "second_probability"]


@dataclass(frozen=True)
class Next:
    """A clip to label next.

    Attributes:
        sample: its number in the pack.
        source: as the user named it.
        path: of its file from the results folder, or where that is not known its source.
        start: seconds, likewise `end`.
        end: see there.
        guesses: the two best classes.
        probabilities: theirs.
    """

    sample: int
    source: str
    path: str
    start: float
    end: float
    guesses: tuple[str, str]
    probabilities: tuple[float, float]


def next_clips(
    pack: Pack, samples: np.ndarray, probabilities: np.ndarray, classes: list[str], data: Path,
    out: Path,
) -> list[Next]:  # fmt: skip
    """The clips to label next, in order.

    Args:
        pack: where they are.
        samples: (M,) the proposed ones.
        probabilities: (M, C) what is thought of them.
        classes: names of the C classes.
        data: what the user gave.
        out: the results folder, from which paths start.
    """
    found = []
    folder = data.parent if is_file(data) else data
    for sample, row in zip(samples, probabilities, strict=True):
        record, best = pack.record(sample), np.argsort(-row, kind="stable")[:2]
        end = record["start"] + record["frames"] / record["fps"]
        file = folder / record["source"]
        path = os.path.relpath(file, out) if is_file(file) else record["source"]
        found.append(
            Next(
                int(sample), record["source"], path, record["start"], end,
                (classes[best[0]], classes[best[1]]), (float(row[best[0]]), float(row[best[1]])),
            )
        )  # fmt: skip
    return found


def write_next(path: Path, clips: list[Next]) -> None:
    """Write next.csv, the first to label first.

    Raises:
        ValueError: the disk does not take it.
    """
    rows = [
        [for_csv(clip.path), round(clip.start, 3), round(clip.end, 3), for_csv(clip.guesses[0]),
         round(clip.probabilities[0], 4), for_csv(clip.guesses[1]),
         round(clip.probabilities[1], 4)]
        for clip in clips
    ]  # fmt: skip
    write_csv(path, NEXT, rows)


@optional_figure
def labels_figure(path: Path, curve: Curve, chance: float, name: str) -> None:
    """Draw accuracy over the number of labels.

    Args:
        path: the .png to write.
        curve: of `learning_curve`.
        chance: accuracy of guessing.
        name: above it.
    """
    figure = blank_figure(7, 4)
    axes = figure.add_subplot()
    low, high = (100 * np.array([ends[i] for ends in curve.intervals]) for i in (0, 1))
    axes.fill_between(curve.sizes, low, high, alpha=0.2, color="C0", label="95 % interval")
    axes.plot(curve.sizes, [100 * a for a in curve.accuracies], "o-", color="C0", label="top-1")
    axes.axhline(100 * chance, color="grey", linestyle=":", label=f"chance {100 * chance:.1f} %")
    axes.set_xscale("log", base=2)
    axes.set_xticks(curve.sizes, [str(size) for size in curve.sizes])
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.set_xlabel("labels learned from, drawn at random")
    axes.set_ylabel("per cent of held-out videos recognised")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle(for_title(name, 7), fontsize=10)
    figure.savefig(path, dpi=110)


def worst_confusions(said: Predictions) -> list[tuple[str, str, list[int]]]:
    """The pairs of classes that are most often confused, and which predictions they are."""
    wrong = said.counts - np.diag(np.diag(said.counts))
    pairs = sorted(zip(*np.nonzero(wrong), strict=True), key=lambda p: (-wrong[p], p))
    assert said.scores is not None
    found = []
    for true, taken in pairs[:MOST_CONFUSED]:
        own = np.flatnonzero((said.truth == true) & (said.predicted == taken))
        sure = own[np.argsort(-said.scores[own, taken], kind="stable")]
        found.append((said.classes[true], said.classes[taken], sure.tolist()))
    return found


def picture(pack: Pack, sample: int) -> np.ndarray | None:
    """Frames of a clip (T, H, W, 3), at most `FRAMES`; None: it has none that can be decoded."""
    record = pack.record(sample)
    if "main" in record:  # poses alone
        return None
    numbers = np.unique(np.linspace(0, record["frames"] - 1, FRAMES).round().astype(int))
    try:
        return pack.frames(record, numbers).numpy()
    except DecodeError:
        return None


def write_report(
    out: Path, results: Results, said: Predictions, verdict: Verdict, curve: Curve,
    proposed: list[Next], pack: Pack, first_clips: Sequence[int], commands: list[tuple[str, str]],
) -> Path:  # fmt: skip
    """Write report.html.

    Args:
        out: the folder, in which the figures are already.
        results: what was found.
        said: the predictions of held-out videos.
        verdict: of the controls.
        curve: over the number of labels.
        proposed: clips to label next.
        pack: where all clips are.
        first_clips: of each tested video the sample to show.
        commands: what to do next, and how.

    Returns:
        the file.

    Raises:
        ValueError: the disk does not take it.
    """
    page = Page(title(results))
    top1, data = results.metrics["top1"], results.data
    low, high = top1.interval or (top1.value, top1.value)
    page.text(
        f"{100 * top1.value:.1f} % of {counted(top1.n, 'held-out video')} of {data.num_classes} "
        f"classes are recognised; 95 % interval {100 * low:.1f} to {100 * high:.1f} "
        f"({interval_unit(results.details['interval'])}); chance is "
        f"{100 * (top1.chance or 0):.1f} %. {results.protocol['rule'].capitalize()}.",
        "lead",
    )
    for note in results.notes:
        page.text(note, "note")
    heads, *rows = table(results)
    page.table(heads, rows)
    page.heading("The action or the scene?")
    page.text(f"This classifier: {verdict.sentence}.")
    page.text(
        "Each control is shown to the same backbone, and a classifier of its own is fitted and "
        "tested in the same folds."
    )
    page.heading("Do more labels pay?")
    page.text(f"{when_to_stop(curve).capitalize()}.")
    page.figure(out / "labels.png", "accuracy over the number of labels, with 95 % intervals")
    page.heading("Classes")
    of_class = sorted(results.per_class.items(), key=lambda item: (item[1].accuracy, item[0]))
    page.table(
        ["class", "recognised", "videos", "most often taken for"],
        [(n, f"{100 * s.accuracy:.1f} %", s.num, s.most_confused or "") for n, s in of_class],
    )
    if len(said.classes) <= MOST_CLASSES:
        page.figure(out / "confusion.png", "confusion matrix, per cent of the true class")
    confused = worst_confusions(said)
    if confused:
        page.heading("Worst confusions")
    assert said.sources is not None
    for true, taken, numbers in confused:
        page.text(f"{true} taken for {taken}: {counted(len(numbers), 'video')}")
        shown = [(said.sources[i], picture(pack, first_clips[i])) for i in numbers[:PER_PAIR]]
        page.clips((name, frames) for name, frames in shown if frames is not None)
    page.heading("To label next")
    if not proposed:
        page.text("Every clip has a label. Clips without one may be in the list: they are proposed "
                  "here, the most useful first.")  # fmt: skip
    else:
        page.text(f"{counted(len(proposed), 'clip')} without a label about which this classifier "
                  "is uncertain, no two alike, the first first; next.csv lists them.")  # fmt: skip
    shown = [
        (f"{clip.source}, {clip.start:.1f} to {clip.end:.1f} s: {clip.guesses[0]} "
         f"({100 * clip.probabilities[0]:.0f} %) or {clip.guesses[1]} "
         f"({100 * clip.probabilities[1]:.0f} %)?", picture(pack, clip.sample))
        for clip in proposed
    ]  # fmt: skip
    page.clips((caption, frames) for caption, frames in shown if frames is not None)
    page.heading("What to do with it")
    for what, command in commands:
        page.text(what)
        page.command(command)
    page.text("CARD.md says how all of this was measured.")
    path = out / "report.html"
    page.write(path)
    return path
