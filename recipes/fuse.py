"""Late fusion: combine the class scores that several runs saved for the same videos.

    python recipes/fuse.py --results runs/rgb runs/flow
    python recipes/fuse.py --results runs/rgb runs/flow runs/pose --out runs/fused
    python recipes/fuse.py --results rgb flow     with a run of each fold in their subfolders

The runs are those of recipes/finetune.py (a label a video), linear_probe.py and zero_shot.py:
folders with results.json and scores.csv. They have to classify the same test videos into the same
classes under one protocol. Every run by itself, every pair, and all are scored, in four ways:

- the mean of the probabilities (the headline: chosen before anything was measured);
- the mean of the logits, as two-stream networks add them. What is saved are probabilities; their
  logarithms are the logits up to a constant that decides nothing where a video was scored in one
  view, else those of the views' mean;
- the mean of the probabilities with the weights that maximise the likelihood of the labels of the
  validation videos;
- a linear support vector machine on the probabilities of the validation videos (Simonyan and
  Zisserman 2014, https://arxiv.org/abs/1406.2199).

The last two learn from validation videos that no run was fitted on, never from test videos, and are
left out where the runs share none. Differences to the best single run come with intervals over
people: both are drawn together.

A folder with a run in each subfolder is one run in folds, such as those of finetune.py --leave-out:
every fold is fused by itself (what learns, learns from its validation videos), and the test videos
of all folds are pooled.

Written: results.json, CARD.md, fusion.png.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pretrain.threads  # noqa: F401 (before torch)

import numpy as np
import torch

from downstream.claims import difference_interval
from downstream.fusion import (
    Run,
    fit_weights,
    in_order,
    mean_of_logits,
    mean_of_probabilities,
    notes_of,
    pooled,
    pooled_card,
    read_folds,
    svm_scores,
    weighted_mean,
)
from downstream.metrics import confusion_matrix, mean_class_accuracy
from downstream.report import interval_unit, publish, title
from downstream.results import (
    ROUGH,
    Model,
    Predictions,
    accuracies,
    build_results,
    claim_results,
    try_results,
    versions,
)
from pretrain.log import blank_figure, optional_figure, print_table
from pretrain.names import counted, file_name, first_of, for_figure, for_screen, for_title
from recipes.options.fuse import Config, command

MOST = 6  # runs: 15 pairs


# ------------------------------------------------------------------------------------ the methods

# Of the test videos' scores, each run's (N, C), their fusion (N, C).
Fusion = Callable[[list[np.ndarray]], np.ndarray]
PROBABILITIES, LOGITS = "mean of probabilities", "mean of logits"
WEIGHTS, SVM = "learned weights", "linear SVM"


def methods_of(runs: list[Run], notes: list[str]) -> tuple[dict[str, Fusion], dict]:
    """The methods that these runs allow, fitted where they learn, and what was learned.

    Args:
        runs: all alike, of one fold.
        notes: for the reader; sentences are added.
    """
    found: dict[str, Fusion] = {PROBABILITIES: mean_of_probabilities, LOGITS: mean_of_logits}
    left_out = f"{WEIGHTS} and {SVM} are left out: "
    without = [run.name for run in runs if "val" not in run.parts]
    if without:
        notes.append(
            f"{left_out}{', '.join(without)} saved no scores of validation videos (a split val, or "
            "finetune.py's --val hold-out, gives them), and test videos are not learned from"
        )
        return found, {}
    sources, _, labels, scores = in_order(runs, "val")
    shown, known = len(set(labels.tolist())), len(runs[0].classes)
    if shown < known:
        videos = counted(len(sources), "validation video")
        notes.append(f"{left_out}of {known} classes {shown} are in the {videos} that all runs have")
        return found, {}
    weights = fit_weights(scores, labels)
    found[WEIGHTS] = lambda test: weighted_mean(test, weights)
    found[SVM] = lambda test: svm_scores(scores, labels, test)
    names = [run.name for run in runs]
    learned = {
        "validation_videos": len(sources),
        "weights": {name: float(w) for name, w in zip(names, weights, strict=True)},
    }
    return found, learned


# ----------------------------------------------------------------------------------- the numbers


@dataclass(frozen=True)
class Line:
    """A row of the table: what some runs reach together, in one way.

    Attributes:
        names: of the runs.
        method: how they were fused; empty: one run by itself.
        scores: (N, C).
        top1: accuracy.
        interval: its 95 % interval.
        mean_class: mean class accuracy.
        gain: to the best of the runs by itself: mean and the ends of its paired interval; None for
            one run.
    """

    names: tuple[str, ...]
    method: str
    scores: np.ndarray
    top1: float
    interval: tuple[float, float]
    mean_class: float
    gain: tuple[float, float, float] | None = None


def fuse_folds(
    folds: list[list[Run]], chosen: tuple[int, ...], notes: list[str]
) -> tuple[dict[str, np.ndarray], dict]:
    """Some runs' scores (N, C) fused by each method, fold by fold, and what was learned.

    Args:
        folds: see `read_folds`.
        chosen: numbers of the runs.
        notes: for the reader; sentences are added.
    """
    sentences: list[str] = []
    fitted = [methods_of([fold[i] for i in chosen], sentences) for fold in folds]
    notes += dict.fromkeys(sentences)
    tested = [[in_order(fold, "test")[3][i] for i in chosen] for fold in folds]
    fused = {
        name: np.concatenate([own[name](s) for (own, _), s in zip(fitted, tested, strict=True)])
        for name in fitted[0][0]
        if all(name in own for own, _ in fitted)
    }
    learned = [what for _, what in fitted]
    if WEIGHTS not in fused or len(folds) == 1:
        return fused, learned[0] if WEIGHTS in fused else {}
    mean = {
        name: float(np.mean([what["weights"][name] for what in learned]))
        for name in learned[0]["weights"]
    }
    fewest = min(what["validation_videos"] for what in learned)
    return fused, {"validation_videos": fewest, "weights": mean, "of": "each fold; mean weights"}


def measure(folds: list[list[Run]], seed: int, notes: list[str]) -> tuple[list[Line], dict]:
    """Every run alone, every pair and all, by every method; and what was learned on all runs.

    Args:
        folds: see `read_folds`.
        seed: of the bootstrap.
        notes: for the reader; sentences are added.
    """
    runs = folds[0]
    sources, people, labels, scores = pooled(folds)
    known = {s: who for s, who in zip(sources, people, strict=True) if who is not None}

    def line(chosen: tuple[int, ...], method: str, fused: np.ndarray) -> Line:
        predicted = fused.argmax(1)
        predictions = Predictions(runs[0].classes, labels, predicted, people, fused)
        metrics, _, _ = accuracies(predictions, seed)
        correct = dict(zip(sources, (predicted == labels).tolist(), strict=True))
        gain = None
        if method:
            alone = [dict(zip(sources, scores[i].argmax(1) == labels, strict=True)) for i in chosen]
            best = max(alone, key=lambda one: sum(one.values()))
            gain = difference_interval([correct], [best], known, seed)[:3]
        interval = metrics["top1"].interval
        assert interval is not None
        names = tuple(runs[i].name for i in chosen)
        mean_class = mean_class_accuracy(labels, predicted)
        return Line(names, method, fused, metrics["top1"].value, interval, mean_class, gain)

    lines = [line((i,), "", own) for i, own in enumerate(scores)]
    learned: dict = {}
    for size in sorted({2, len(runs)}):
        for chosen in combinations(range(len(runs)), size):
            # What is left out of one pair and why is said of all runs; a pair may have more
            # validation videos.
            sentences = notes if size == len(runs) else []
            fused, learned = fuse_folds(folds, chosen, sentences)
            lines += [line(chosen, name, values) for name, values in fused.items()]
    return lines, learned


def wins(runs: list[Run], lines: list[Line], labels: np.ndarray) -> dict[str, list[str]]:
    """Run -> the classes that it recognises better than every other run by itself."""
    counts = [confusion_matrix(labels, own.scores.argmax(1), len(runs[0].classes)) for own in lines]
    rates = np.stack([np.diag(c) / np.maximum(c.sum(1), 1) for c in counts[: len(runs)]])
    best = rates == rates.max(0)
    alone = best.sum(0) == 1
    return {
        run.name: [runs[0].classes[k] for k in np.flatnonzero(best[i] & alone)]
        for i, run in enumerate(runs)
    }


# ------------------------------------------------------------------------------------- in words


def print_lines(lines: list[Line], won: dict[str, list[str]]) -> None:
    """Print the table, and the classes on which each run is the best."""
    cell = lambda name: for_screen(name, 40)
    heads = [(" + ".join(map(cell, line.names)), line.method or "alone") for line in lines]
    widths = [max(len(head[i]) for head in heads) for i in (0, 1)]
    print(f"\n{'':<{widths[0]}}  {'':<{widths[1]}}  top-1  95 % interval  to the best single run")
    for line, (names, method) in zip(lines, heads, strict=True):
        low, high = (100 * end for end in line.interval)
        gain = ""
        if line.gain:
            gain = "{:+z5.1f}  ({:+z.1f} to {:+z.1f})".format(*(100 * g for g in line.gain))
        print(
            f"{names:<{widths[0]}}  {method:<{widths[1]}}  {100 * line.top1:5.1f}  "
            f"{f'{low:.1f} to {high:.1f}':>13}  {gain}"
        )
    print()
    for name, classes in won.items():
        shown = first_of([for_screen(c, 40) for c in classes], 12)
        of = f"{counted(len(classes), 'class')}: " if classes else "no class"
        print(f"{cell(name)}: better than the others on {of}{shown}")


@optional_figure
def fusion_figure(
    path: Path,
    lines: list[Line],
    rates: dict[str, np.ndarray],
    classes: list[str],
    unit: str,
    text: str,
) -> None:
    """Draw the accuracy of every combination, and that of each class by each run and by all.

    Args:
        path: the .png to write.
        lines: of the table.
        rates: name -> accuracy of each class, NaN where it has no videos.
        classes: their names; of more than 40 those on which the runs differ most are drawn.
        unit: of the intervals, in words.
        text: the title.
    """
    groups = list(dict.fromkeys(line.names for line in lines))
    methods = list(dict.fromkeys(line.method for line in lines))
    values = np.stack(list(rates.values()))
    spread = np.nan_to_num(np.ptp(values[:-1], axis=0), nan=-1)
    drawn = np.sort(np.argsort(-spread, kind="stable")[:40])
    row = min(0.08 * len(rates), 0.4)
    height = 1.8 + max(0.16 * len(lines) + 0.3 * len(groups), row * len(drawn))
    figure = blank_figure(13, height)
    left, right = figure.subplots(1, 2)
    for place, names in enumerate(groups):
        own = [line for line in lines if line.names == names]
        for i, line in enumerate(own):
            at = place + 0.16 * (i - (len(own) - 1) / 2)
            low, high = line.interval
            left.errorbar(
                100 * line.top1, at,
                xerr=[[100 * max(line.top1 - low, 0)], [100 * max(high - line.top1, 0)]],
                fmt="o", color=f"C{methods.index(line.method)}", capsize=2, markersize=4,
                linewidth=1,
            )  # fmt: skip
    for i, method in enumerate(methods):
        left.plot([], [], "o", color=f"C{i}", label=method or "alone")
    shown = [
        "\n+ ".join(for_figure(name, 34) for name in names) if len(names) < 4 else "all"
        for names in groups
    ]
    left.set_yticks(range(len(groups)), shown, fontsize=8)
    left.invert_yaxis()
    left.grid(axis="x", linewidth=0.4)
    chance = 100 / len(classes)
    left.axvline(chance, color="grey", linestyle=":", label=f"chance {chance:.1f} %")
    right.axvline(chance, color="grey", linestyle=":")
    left.set_xlabel(f"top-1, per cent; 95 % intervals {unit}", fontsize=8)
    below = {"fontsize": 8, "loc": "upper center", "bbox_to_anchor": (0.5, -0.9 / height)}
    left.legend(ncols=3, **below)
    for i, (name, rate) in enumerate(rates.items()):
        # Side by side: equal ones would hide each other.
        rows = np.arange(len(drawn)) + 0.8 * ((i + 0.5) / len(rates) - 0.5)
        right.plot(
            100 * rate[drawn], rows, "D" if i == len(rates) - 1 else "o",
            color="black" if i == len(rates) - 1 else f"C{i + 5}", markersize=4,
            label=for_figure(name, 34), fillstyle="none" if i == len(rates) - 1 else "full",
        )  # fmt: skip
    right.set_yticks(range(len(drawn)), [for_figure(classes[k], 24) for k in drawn], fontsize=8)
    right.set_ylim(len(drawn) - 0.5, -0.5)
    right.set_xlim(-3, 103)
    right.set_yticks(np.arange(len(drawn)) + 0.5, minor=True)
    right.tick_params(which="both", axis="y", length=0)
    right.grid(axis="x", linewidth=0.4)
    right.grid(axis="y", which="minor", linewidth=0.8)
    more = f", the {len(drawn)} on which runs differ most" if len(drawn) < len(classes) else ""
    right.set_xlabel(f"accuracy of each class, per cent{more}", fontsize=8)
    right.legend(ncols=2, **below)
    figure.suptitle(for_title(text, 13), fontsize=10)
    figure.savefig(path, dpi=110)


# --------------------------------------------------------------------------------------------- main


def main(config: Config) -> dict:
    """Fuse the runs; returns what results.json holds."""
    if not 2 <= len(config.results) <= MOST:
        raise ValueError(f"--results names {len(config.results)}: give two to {MOST} runs")
    folders = [Path(folder) for folder in config.results]
    named = "-".join(folder.resolve().name for folder in folders)
    out = Path(config.out or f"runs/fuse-{file_name(named)}")
    try_results(out)
    folds = read_folds(folders)
    runs = folds[0]
    # What decides the numbers: the saved scores themselves, in order.
    hashes = lambda of: [" ".join(of(fold[i]) for fold in folds) for i in range(len(runs))]
    scores_hashes = dict(zip([r.name for r in runs], hashes(lambda r: r.sha256), strict=True))
    settings = {"scores_sha256": scores_hashes, "seed": config.seed}
    lock = claim_results(out, settings)

    # ---- the numbers
    classes, notes = runs[0].classes, notes_of(folds)
    lines, learned = measure(folds, config.seed, notes)
    _, people, labels, _ = pooled(folds)
    fused = next(x for x in lines if len(x.names) == len(runs) and x.method == PROBABILITIES)
    predicted = fused.scores.argmax(1)
    predictions = Predictions(classes, labels, predicted, people, fused.scores)
    metrics, interval, more = accuracies(predictions, config.seed)
    for line in lines:
        if len(line.names) == len(runs) and line.method != PROBABILITIES:
            other = Predictions(classes, labels, line.scores.argmax(1), people, line.scores)
            reached, _, _ = accuracies(other, config.seed)
            metrics[f"top1_{file_name(line.method).replace('-', '_')}"] = reached["top1"]
    more = [note.replace(ROUGH, f"{ROUGH}, those of differences too") for note in more]
    won = wins(runs, lines, labels)

    # ---- results
    models = [run.results.model for run in runs]
    weights = " ".join(hashes(lambda run: run.results.model.weights_sha256))
    flops = [model.flops for model in models if model.flops is not None]
    described = Model(
        " + ".join(run.name for run in runs), hashlib.sha256(weights.encode()).hexdigest(),
        sum(model.parameters for model in models), {"results": list(config.results)},
        {run.name: run.results.recipe for run in runs},
        sum(flops) if len(flops) == len(runs) else None,
    )  # fmt: skip
    data, protocol = pooled_card(folds)
    protocol = protocol | {"kind": "late fusion of " + ", ".join(
        sorted({str(run.results.protocol.get("kind")) for run in runs})
    )}  # fmt: skip
    details: dict[str, dict] = {
        "fusion": {
            f"{' + '.join(line.names)}, {line.method or 'alone'}": {
                "top1_accuracy": line.top1, "top1_interval": list(line.interval),
                "mean_class_accuracy": line.mean_class,
                "gain": line.gain and list(line.gain[:1]),
                "gain_interval": line.gain and list(line.gain[1:]),
            }
            for line in lines
        },
        "methods": {
            "headline": PROBABILITIES,
            LOGITS: "of the logarithms of the probabilities that were saved",
            WEIGHTS: "likeliest labels of validation videos",
            SVM: "C = 1, each run's probabilities of length 1",
        },
        "learned": learned,
        "best_alone": {name: ", ".join(own) for name, own in won.items()},
        "interval": interval,
    }  # fmt: skip
    results = build_results(
        "fuse", data, described, protocol, settings, metrics, config.seed,
        versions(torch.device("cpu"), "fp64"), [*notes, *more], details, predictions,
    )  # fmt: skip
    written = publish(out, results)
    print_lines(lines, won)
    rates = {}
    alone = [(line.names[0], line.scores) for line in lines[: len(runs)]]
    for name, scores in [*alone, ("all", fused.scores)]:
        own = confusion_matrix(labels, scores.argmax(1), len(classes))
        with np.errstate(invalid="ignore"):
            rates[name] = np.diag(own) / own.sum(1)
    picture = fusion_figure(
        out / "fusion.png", lines, rates, classes, interval_unit(interval), title(results)
    )
    print()
    print_table("done", written | {"figure": picture})
    lock.release(force=True)
    return results.as_dict()


if __name__ == "__main__":
    command(main)
