"""Reports: the table, the protocol card, predictions and figures."""

import csv
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from downstream.controls import CONTROL, CONTROLS
from downstream.floor import FLOOR
from downstream.floor import WORDS as FLOORS
from downstream.results import RECIPES, Metric, Predictions, Results
from pretrain.folders import writing
from pretrain.log import blank_figure, optional_figure, print_notes, write_json
from pretrain.names import counted, for_csv, for_figure, for_markdown, for_screen, for_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORDS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_top1_top5": "mean of top-1 and top-5",
    "knn_top1": "kNN top-1",
    "mean_token_top1": "mean token, linear",
    "mean_token_knn_top1": "mean token, kNN",
    "attentive_top1": "attentive probe top-1",
    "majority": "most frequent class",
    **{f"{FLOOR}{kind}": f"floor: {words}" for kind, words in FLOORS.items()},
    **{f"{CONTROL}{kind}": f"control: {words}" for kind, words in CONTROLS.items()},
    "reversed_pairs": "pairs that differ in order only",
    "edit": "edit score of segments",
    **{f"f1_{k}": f"F1 of segments at {k} % overlap" for k in (10, 25, 50)},
    "map": "mAP, mean over the overlaps",
    "frame_map": "mAP of frames",
    **{f"map_{k}0": f"mAP of events at {k}0 % overlap" for k in range(1, 8)},
    **{f"t2v_r{k}": f"text to video R@{k}" for k in (1, 5, 10)},
    **{f"v2t_r{k}": f"video to text R@{k}" for k in (1, 5, 10)},
}
MOST_INDENT = 6  # spaces before an entry of a card: lists in lists
RANDOM = "random_init_"  # before the names of what random weights reach


def _range(low: float, high: float, unit: str) -> str:
    return f"{_number(low, unit).removesuffix(' %')} to {_number(high, unit)}"


def title(results: Results) -> str:
    """Title of a card: model, data and the first metric."""
    name, metric = next(iter(results.metrics.items()))
    recipe = RECIPES.get(results.recipe, results.recipe)
    head = f"{recipe}, {results.model.name} on {results.data.name}"
    return f"{head}: {_words(name)} {_value(metric)}"


def table(results: Results) -> list[tuple[str, ...]]:
    """The metrics as rows of words, the heads first; empty columns are left out."""
    rows = [("", "value", "95 % interval", "chance", "random weights", "scored on")]
    for name, metric in results.metrics.items():
        if name.startswith(RANDOM):
            continue
        low, high = metric.interval or (0, 0)
        random = results.metrics.get(f"{RANDOM}{name}")
        rows.append(
            (
                _words(name), _value(metric),
                _range(low, high, metric.unit) if metric.interval else "",
                "" if metric.chance is None else _number(metric.chance, metric.unit),
                _value(random) if random else "", f"{metric.n} {metric.of}",
            )
        )  # fmt: skip
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [tuple(row[i] for i in kept) for row in rows]


def interval_unit(about: Mapping[str, object]) -> str:
    """What 95 % intervals are over, in words, of a section `interval`: "over 5 people"."""
    who = "person" if about["resampled"] == "subjects" else str(about["resampled"])[:-1]
    why = f", as {about['people']}" if "people" in about else ""
    return f"over {counted(int(str(about['groups'])), who)}{why}"


def _words(name: str) -> str:
    if name.startswith("top1_"):
        return "top-1, " + name.removeprefix("top1_").replace("_", " ")
    words = name.replace("_", " ").replace("t2v", "text to video").replace("v2t", "video to text")
    return WORDS.get(name, words)


def _value(metric: Metric) -> str:
    return _number(metric.value, metric.unit)


def _number(value: float, unit: str) -> str:
    return f"{value:.1f}" if unit == "rank" else f"{100 * value:.1f} %"


def print_results(results: Results, printed: Collection[str] = ()) -> None:
    """Print the table of metrics, and the notes that were not printed before."""
    rows = table(results)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"\n{for_screen(title(results))}")
    for first, *rest in rows:
        cells = "  ".join(f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        print(f"  {first:<{widths[0]}}  {cells}")
    about = results.details.get("interval")
    if about and any(metric.interval for metric in results.metrics.values()):
        print(f"  95 % intervals are {interval_unit(about)}")
    print_notes(note for note in results.notes if note not in printed)


def write_results(out: Path, results: Results) -> None:
    """Write results.json, which says whose the other files are, and CARD.md.

    Raises:
        ValueError: the disk does not take them.
    """
    write_json(out / "results.json", results.as_dict())
    with writing(out / "CARD.md"):
        (out / "CARD.md").write_text(card(results), encoding="utf-8")


def publish(
    out: Path, results: Results, said: Predictions | None = None, printed: Collection[str] = ()
) -> dict[str, object]:
    """Write all that a score leaves in a folder, and print its table.

    Args:
        out: the folder.
        results: of `build_results`.
        said: the predictions of a classifier, for predictions.csv (of videos) and confusion.png.
        printed: notes that were printed before.

    Returns:
        what was written, name -> path, to be printed at the end.

    Raises:
        ValueError: the disk does not take it.
    """
    write_results(out, results)
    written: dict[str, object] = {"results": out / "results.json", "protocol": out / "CARD.md"}
    if said is not None and said.scores is not None and said.sources is not None:
        written["predictions"] = path = out / "predictions.csv"
        labels = [said.classes[i] for i in said.truth]
        write_predictions(path, said.sources, labels, said.scores, said.classes)
    if said is not None:
        about = (said.counts, said.classes, title(results), said.unit)
        written["figure"] = confusion_figure(out / "confusion.png", *about)
    print_results(results, printed)
    return written


def card(results: Results) -> str:
    """The protocol card, in Markdown: what a reader needs to compare a number with another one.

    What was not given, not known or not there is left out.
    """
    heads, *rows = table(results)
    lines = [f"# {for_markdown(title(results))}", ""]
    lines += [f"> {for_markdown(note)}\n" for note in results.notes]
    lines += markdown_table(heads, rows)
    about = {"recipe": results.recipe, "seed": results.seed, "command": results.command}
    sections = {
        "data": vars(results.data), "model": vars(results.model), "protocol": results.protocol,
        **results.details,
        "run": about | results.versions,
    }  # fmt: skip
    for section, entries in sections.items():
        if listed := for_card(section, entries, ""):
            lines += ["", f"## {for_markdown(section.replace('_', ' ').capitalize())}", "", *listed]
    return "\n".join(lines) + "\n"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    line = lambda row: "| " + " | ".join(map(for_markdown, row)) + " |"
    return [line(heads), "|" + "---|" * len(heads), *map(line, rows)]


def for_card(section: str, entries: Mapping[str, object], indent: str) -> list[str]:
    """The lines of entries of a card, of which a group of more than numbers is a list again.

    Args:
        section: what they are of.
        entries: by name.
        indent: before each line.
    """
    lines = []
    for name, value in entries.items():
        if name == "epochs" and entries.get("steps"):
            continue  # overruled
        about = f"{section} {name}"
        head = f"{indent}- {for_markdown(name.replace('_', ' '))}:"
        numbers = isinstance(value, dict) and {type(v) for v in value.values()} <= {int, float}
        if isinstance(value, dict) and not numbers and len(indent) < MOST_INDENT:
            if inner := for_card(about, value, indent + "  "):
                lines += [head, *inner]
        elif text := _said(about, value):
            lines.append(f"{head} {for_markdown(text)}")
    return lines


def _said(name: str, value: object) -> str:
    """A value of a card in words; nothing for None, what is empty, and counts of zero."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (
        isinstance(value, int) and value == 0 and name.startswith(("data ", "protocol "))
    ):
        return ""
    if isinstance(value, float):
        return f"{100 * value:.1f} %" if "accuracy" in name else f"{value:.4g}"
    if isinstance(value, dict):
        parts = {k: _said(f"{name} {k}", v) for k, v in value.items()}
        return ", ".join(f"{k}={text}" for k, text in parts.items() if text)
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, (_said(name, v) for v in value)))
    return str(value)


def write_predictions(
    path: Path, sources: list[str], labels: list[str], scores: np.ndarray, classes: list[str]
) -> None:
    r"""Write a csv line for each video: source, label, predicted, the five best and their scores.

    Names are written as `for_csv` makes them safe; among the five best, a `|` in a name is `\x7c`.

    Args:
        path: the .csv to write.
        sources: names of the N videos.
        labels: their class names.
        scores: (N, C).
        classes: names of the C columns.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    rows = []
    for source, label, best, row in zip(sources, labels, order, scores, strict=True):
        names, values = joined([classes[i] for i in best], [row[i] for i in best])
        rows.append([*map(for_csv, (source, label, classes[best[0]])), names, values])
    write_csv(path, ["source", "label", "predicted", "top5", "top5_scores"], rows)


def joined(names: list[str], values: list[float]) -> tuple[str, str]:
    r"""Ranked names and their numbers as two cells of a csv; a `|` in a name is `\x7c`."""
    return (
        "|".join(str(for_csv(name)).replace("|", "\\x7c") for name in names),
        "|".join(f"{value:.4f}" for value in values),
    )


def write_csv(path: Path, header: list[str], rows: Iterable[list]) -> None:
    """Write a csv file of cells that are safe already (`for_csv`).

    Raises:
        ValueError: the disk does not take it.
    """
    with writing(path), open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


@optional_figure
def confusion_figure(
    path: Path, counts: np.ndarray, classes: list[str], title: str, unit: str = "videos"
) -> None:
    """Draw a confusion matrix; colours and numbers are per cent of the true class.

    Args:
        path: the .png to write.
        counts: (C, C), row = true class, column = predicted class.
        classes: names of the classes.
        title: above it.
        unit: what was counted, "videos" or "frames".
    """
    num = len(classes)
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(max(4.0, 2.5 + 0.42 * num), 24.0)  # inches; past 50 classes the cells shrink instead
    font = 8 if num <= 50 else max(2.0, 8 * 50 / num)
    figure = blank_figure(side + 1, side)
    axes = figure.add_subplot()
    image = axes.imshow(100 * fractions, cmap="Blues", vmin=0, vmax=100)
    names = [for_figure(name, 24) for name in classes]
    totals = counts.sum(1)
    axes.set_xticks(range(num), names, rotation=90, fontsize=font)
    axes.set_yticks(
        range(num), [f"{n} ({t})" for n, t in zip(names, totals, strict=True)], fontsize=font
    )
    axes.set_xlabel("predicted")
    axes.set_ylabel(f"true (number of {unit})")
    figure.suptitle(
        for_title(f"{title}, {counted(counts.sum(), unit.removesuffix('s'))}", side + 1),
        fontsize=10,
    )
    if num <= 50:
        for row, column in zip(*np.nonzero(counts), strict=True):
            value = fractions[row, column]
            colour = "white" if value > 0.5 else "black"
            axes.text(
                column,
                row,
                f"{100 * value:.0f} %",
                ha="center",
                va="center",
                fontsize=6,
                color=colour,
            )
    figure.colorbar(image, ax=axes, shrink=0.7, label="per cent of the true class")
    figure.savefig(path, dpi=110)


@optional_figure
def filmstrip_figure(
    path: Path,
    frames: list[tuple[float, np.ndarray]],
    classes: list[str],
    probabilities: np.ndarray,
    title: str,
) -> None:
    """Draw frames of a video in a row, and under them bars of its best classes.

    Args:
        path: the .png to write.
        frames: second and uint8 image (H, W, 3) of each.
        classes: the best ones, best first.
        probabilities: theirs.
        title: above it.
    """
    num = len(frames)
    height, width = frames[0][1].shape[:2]
    figure = blank_figure(1.5 * num, 1.5 * height / width + 0.35 * len(classes) + 1.0)
    ratios = [1.5 * height / width + 0.5, 0.35 * len(classes) + 0.5]
    above, below = figure.subfigures(2, 1, height_ratios=ratios, squeeze=False)[:, 0]
    for axis, (second, image) in zip(above.subplots(1, num, squeeze=False)[0], frames, strict=True):
        axis.imshow(image)
        axis.set_axis_off()
        axis.set_title(f"{second:.1f} s", fontsize=8)
    above.suptitle(for_title(title, 1.5 * num), fontsize=10)
    bars = below.subplots()
    rows = np.arange(len(classes))[::-1]
    bars.barh(rows, 100 * probabilities, color="C0")
    bars.set_yticks(rows, [for_figure(c, 40) for c in classes], fontsize=9)
    bars.set_xlim(0, 110)  # room for a number beside the longest bar
    bars.set_xticks(range(0, 101, 20))
    bars.set_xlabel("probability among the classes given, per cent", fontsize=8)
    for row, value in zip(rows, probabilities, strict=True):
        bars.text(100 * value + 1, row, f"{100 * value:.0f} %", va="center", fontsize=8)
    figure.savefig(path, dpi=110)


@optional_figure
def contact_sheet_figure(
    path: Path, pictures: list[tuple[str, np.ndarray, np.ndarray]], title: str, columns: int = 3
) -> None:
    """Draw videos as short strips on a sheet, best first.

    Args:
        path: the .png to write.
        pictures: caption, uint8 frames (T, H, W, 3) and their seconds (T,) of each.
        title: above all.
        columns: strips in a row.
    """
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = blank_figure(4.6 * columns, 1.9 * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(pictures) :]:
        axis.set_axis_off()
    for axis, (caption, frames, seconds) in zip(axes, pictures, strict=False):
        axis.imshow(np.concatenate(list(frames), axis=1))
        axis.set_title(for_figure(caption, 60), fontsize=8)
        width = frames.shape[2]
        middles = width * (np.arange(len(frames)) + 0.5)
        axis.set_xticks(middles, [f"{second:.1f} s" for second in seconds], fontsize=7)
        axis.set_yticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.suptitle(for_title(title, 4.6 * columns, 11), fontsize=11)
    figure.savefig(path, dpi=110)


def _time_axis(axis: "Axes", seconds: float) -> None:
    """Let the horizontal axis be a time from 0 to `seconds`: in seconds, minutes or hours."""
    steps = [n * 10**k for k in range(-3, 1) for n in (1, 2, 5)]
    steps += [10, 15, 30, *(60 * n for n in (1, 2, 5, 10, 15, 30))]
    steps += [3600 * n * 10**k for k in range(5) for n in (1, 2, 5)]
    step = next(step for step in steps if seconds <= 10 * step or step is steps[-1])
    places = np.arange(0, seconds + step / 1000, step)

    def clock(place: float) -> str:
        minutes, rest = divmod(round(place), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{rest:02d}" if seconds >= 3600 else f"{minutes}:{rest:02d}"

    axis.set_xlim(0, seconds)
    axis.set_xticks(places, [clock(p) if seconds > 120 else f"{p:g}" for p in places])


def _time_unit(seconds: float) -> str:
    """What the numbers of `_time_axis` are."""
    return "seconds" if seconds <= 120 else "minutes" if seconds < 3600 else "hours"


@optional_figure
def timeline_figure(
    path: Path, rows: list[tuple[str, list[dict]]], classes: list[str], title: str, most: int = 24
) -> None:
    """Draw what happens when: a row a video, a coloured piece a segment.

    Args:
        path: the .png to write.
        rows: name of a video and its segments, each with `start` and `end` (seconds) and `label`.
        classes: names of all classes, which fix the colours.
        title: above it.
        most: rows drawn; the title says how many were left out.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    shown = rows[:most]
    if len(rows) > most:
        title += f" ({counted(len(rows) - most, 'more video')} not drawn)"
    present = [c for c in classes if any(s["label"] == c for _, parts in shown for s in parts)]
    colours = colormaps["tab20" if len(classes) <= 20 else "hsv"]
    colour = {
        c: colours(i % 20 if len(classes) <= 20 else i / len(classes))
        for i, c in enumerate(classes)
    }
    figure = blank_figure(9, 1.6 + 0.45 * len(shown) + 0.12 * len(present))
    axes = figure.add_subplot()
    for place, (_, parts) in enumerate(shown):
        for part in parts:
            length = part["end"] - part["start"]
            axes.barh(place, length, left=part["start"], height=0.8, color=colour[part["label"]])
    names = [for_figure(Path(name).name, 32) for name, _ in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    longest = max(part["end"] for _, parts in shown for part in parts)
    _time_axis(axes, longest)
    axes.set_xlabel(_time_unit(longest))
    axes.set_title(for_title(title, 7), fontsize=10)
    handles = [Patch(color=colour[c], label=for_figure(c, 40)) for c in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


@optional_figure
def events_figure(
    path: Path,
    rows: list[tuple[str, float, list[tuple], list[tuple] | None]],
    title: str,
    most: int = 6,
    lanes: int = 16,
) -> None:
    """Draw the events of videos, a lane a label, since they may overlap; below them what is true.

    Args:
        path: the .png to write.
        rows: name of a video, its seconds, (label, start, end, score) of what was found, (label,
            start, end) of what is true or None.
        title: above it.
        most: videos drawn; the title says how many were left out.
        lanes: labels drawn of a video, those that take most of its time.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgba
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = rows[:most]
    if len(rows) > most:
        title += f" ({counted(len(rows) - most, 'more video')} not drawn)"
    chosen, dropped = [], 0
    for *_, found, true in shown:
        time: dict[str, float] = {}
        for event in [*found, *(true or [])]:
            time[event[0]] = time.get(event[0], 0.0) + event[2] - event[1]
        names = sorted(time, key=lambda name: (-time[name], name))
        dropped += max(len(names) - lanes, 0)
        chosen.append(sorted(names[:lanes]))
    if dropped:
        title += f" ({counted(dropped, 'lane')} not drawn)"
    heights = [max(len(names), 1) for names in chosen]
    height = 1.3 + 0.7 * len(shown) + 0.28 * sum(heights)
    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, names, (video, seconds, found, true) in zip(axes, chosen, shown, strict=True):
        for lane, label in enumerate(names):
            ours = [e for e in found if e[0] == label]
            colours = [to_rgba("C0", 0.25 + 0.75 * min(max(e[3], 0), 1)) for e in ours]
            # With an edge, so that a second is seen in an hour.
            axis.broken_barh([(e[1], e[2] - e[1]) for e in ours], (lane - 0.35, 0.34),
                             facecolors=colours, edgecolors=colours, linewidth=0.5)  # fmt: skip
            theirs = [(e[1], e[2] - e[1]) for e in true or [] if e[0] == label]
            axis.broken_barh(theirs, (lane + 0.1, 0.2), facecolors="0.35", edgecolors="0.35",
                             linewidth=0.5)  # fmt: skip
        axis.set_yticks(range(len(names)), [for_figure(n, 32) for n in names], fontsize=8)
        axis.set_ylim(len(names) - 0.4, -0.6)
        _time_axis(axis, seconds)
        axis.set_xlabel(_time_unit(seconds), fontsize=8, loc="right", labelpad=0)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", linewidth=0.4)
        axis.set_axisbelow(True)
        axis.set_title(for_figure(Path(video).name, 60), fontsize=8, loc="left")
    handles = [Patch(color="C0", label="found, the darker the higher its score")]
    if any(true is not None for *_, true in shown):
        handles.append(Patch(color="0.35", label="true"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(for_title(title, 11), fontsize=10)
    figure.savefig(path, dpi=110)


@optional_figure
def cost_figure(
    path: Path, points: list[tuple[str, float, float, float, float]], chance: float, title: str
) -> None:
    """Draw accuracy against cost.

    Args:
        path: the .png to write.
        points: name, operations of a clip, accuracy and the ends of its interval (fractions) of
            each model.
        chance: accuracy of guessing.
        title: above it.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = blank_figure(9, 5)
    axes = figure.add_subplot()
    for i, (name, cost, value, low, high) in enumerate(points):
        whiskers = [[100 * (value - low)], [100 * (high - value)]]
        axes.errorbar(
            cost / 1e9, 100 * value, whiskers, fmt="os^Dv"[i // 10 % 5], color=f"C{i % 10}",
            capsize=2, linewidth=0.8,
            label=for_figure(name, 40),
        )  # fmt: skip
    axes.axhline(100 * chance, color="grey", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"chance\n{100 * chance:.1f} %", (1.01, 100 * chance), xycoords=("axes fraction", "data"),
        va="center",
        fontsize=8, color="grey", annotation_clip=False,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("GFLOPs of one clip (a multiplication and an addition are two)")
    axes.set_ylabel("test top-1, per cent, with 95 % interval")
    figure.legend(fontsize=8, loc="outside right upper")
    figure.suptitle(for_title(title, 9), fontsize=10)
    figure.savefig(path, dpi=110)


@optional_figure
def growth_figure(
    path: Path, frames: tuple[int, ...], found: dict[str, dict[str, list[float]]], title: str
) -> None:
    """Draw cost over the number of frames, a line a model: operations, memory, speed.

    Args:
        path: the .png to write.
        frames: the numbers of frames.
        found: name -> "gflops", "mib" and "clips_per_s", a value for each number of frames.
        title: above it.
    """
    figure = blank_figure(12, 4)
    names = {
        "gflops": "GFLOPs, forward",
        "mib": "MiB kept for the backward pass",
        "clips_per_s": "clips a second",
    }
    for axis, (key, label) in zip(figure.subplots(1, 3), names.items(), strict=True):
        for name, values in found.items():
            axis.plot(frames, values[key], marker="o", markersize=3, label=for_figure(name, 40))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(frames, [str(n) for n in frames])
        axis.set_xlabel("frames of a clip")
        axis.set_ylabel(label)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=min(len(found), 6))
    figure.suptitle(for_title(title, 12), fontsize=10)
    figure.savefig(path, dpi=110)
