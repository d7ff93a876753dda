"""What is left of a measurement: the protocol card, the confusion matrix, every single answer."""

import csv
import json
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from filelock import FileLock

from pretrain.files import is_file, is_folder, is_there, read_json
from pretrain.folders import claim, holds_nothing, try_folder, writing
from pretrain.log import optional_figure
from pretrain.names import file_name, for_csv, for_figure, for_markdown, for_title

PACKAGES = ("torch", "numpy", "scikit-learn", "av", "safetensors")


def default_folder(kind: str, backbone: str, data: str) -> Path:
    """Where results go unless told: beside an exported backbone, else in runs/; named after the data.

    Args:
        kind: what was measured, such as "probe".
        backbone: as the user named it.
        data: likewise.
    """
    source = Path(data)
    if is_file(source):  # a list's own name is often just clips.csv
        name = f"{source.resolve().parent.name}-{source.stem}"
    else:
        name = source.resolve().name if is_there(source) else data
    if is_folder(backbone):
        return Path(backbone).resolve().parent / f"{kind}-{file_name(name)}"
    return Path("runs") / f"{kind}-{file_name(backbone)}-{file_name(name)}"


def try_results(out: Path) -> None:
    """Find out early whether a folder may hold results; see `claim_results`, which knows more and comes after the data.

    Raises:
        ValueError: it holds something else, or cannot be written to.
    """
    try_folder(out)
    if not holds_nothing(out) and not (out / "results.json").is_file():
        raise ValueError(f"{out} holds other files: give another folder with --out, or remove it")


def claim_results(out: Path, settings: dict) -> FileLock:
    """Take `out` for results, unless it holds some of other settings or anything else.

    Args:
        out: where results are to go.
        settings: what decides the numbers, as results.json will have it in its card.

    Returns:
        the lock that keeps others from writing there, to be released when all is written.

    Raises:
        ValueError: the folder holds something else, cannot be written to, or another process has it.
    """
    _refuse_other_results(out, settings)
    lock = claim(out)
    _refuse_other_results(out, settings)  # it may have changed before it was ours
    return lock


def _refuse_other_results(out: Path, settings: dict) -> None:
    if holds_nothing(out):
        return
    try:
        old = dict(read_json(out / "results.json")["card"]["settings"])
    except (ValueError, KeyError, TypeError):
        old = {}
    new = json.loads(json.dumps(settings))
    differences = [f"{k} was {old.get(k)!r}, is {v!r}" for k, v in new.items() if old.get(k) != v]
    if differences:
        what = f"results of other settings ({'; '.join(differences)})" if old else "other files"
        raise ValueError(f"{out} holds {what}: give another folder with --out, or remove it")


FEW = 10  # people, or videos, below which a bootstrap's interval is called rough


def cautions(
    truth: np.ndarray, predicted: np.ndarray, classes: list[str], subjects: list[str | None], drawn: str, unit: str,
) -> list[str]:  # fmt: skip
    """Sentences that a reader must see beside accuracies: few people, or one answer to everything.

    Args:
        truth: (N,) class numbers.
        predicted: (N,) likewise.
        classes: their names.
        subjects: (N,) who is seen.
        drawn: "subjects" or "videos", as `bootstrap_intervals` says what it drew.
        unit: what was classified: "videos" or "frames".
    """
    said = []
    groups = len(set(subjects)) if drawn == "subjects" else len(truth)
    if groups < FEW:
        who = {"subjects": "people"}.get(drawn, unit)
        said.append(f"the 95 % intervals are rough: they rest on {groups} {who} only")
    if len(set(truth)) > 1 and len(set(predicted)) == 1:
        said.append(
            f"all {len(truth)} {unit} were taken for one class, {classes[predicted[0]]!r}: this model does not tell "
            "these classes apart"
        )
    return said


def seen_in_training(provenance: dict | str, name: str, index: dict) -> str | None:
    """Which split of these very data a backbone was trained on, as its export says; None if it says of none.

    Args:
        provenance: of the backbone.
        name: of the data, as the user gave it.
        index: of their pack; one without splits was trained on whole, whatever split was asked for.
    """
    if not isinstance(provenance, dict):
        return None
    data = provenance.get("data")
    named = name in ([data] if isinstance(data, str) else data if isinstance(data, list) else [])
    if not named and provenance.get("data_fingerprint") != index["fingerprint"]:
        return None
    return str(provenance.get("split") or "all") if index["splits"] else "all"


def software() -> dict[str, str | None]:
    """Versions of what computed a number, and the commit of this project if it runs from a checkout."""
    root = Path(__file__).resolve().parents[1]
    commit = None
    if (root / ".git").exists():
        try:
            git = ["git", "-C", str(root)]
            run = {"capture_output": True, "text": True, "check": True, "timeout": 20}
            commit = subprocess.run([*git, "rev-parse", "HEAD"], **run).stdout.strip()
            if subprocess.run(
                [*git, "status", "--porcelain", "--untracked-files=no"], **run
            ).stdout.strip():
                commit += " with uncommitted changes"
        except (OSError, subprocess.SubprocessError):
            commit = None  # no git here, or a repository without a commit
    return {
        "commit": commit,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def write_card(path: Path, title: str, notes: list[str], card: dict[str, dict]) -> None:
    """Write a card as Markdown: the notes, then one section for each entry.

    Args:
        path: the .md to write.
        title: the heading.
        notes: sentences a reader must see first.
        card: section -> name -> value; a nested dict becomes a line of `name=value`.
    """
    lines = [f"# {for_markdown(title)}", ""]
    lines += [f"> {for_markdown(note)}\n" for note in notes]
    for section, entries in card.items():
        lines += [f"## {section.replace('_', ' ').capitalize()}", ""]
        for name, value in entries.items():
            if isinstance(value, dict):
                value = ", ".join(f"{k}={v}" for k, v in value.items())
            elif isinstance(value, list):
                value = ", ".join(map(str, value))
            value = "unknown" if value is None else for_markdown(value)
            lines.append(f"- {for_markdown(name.replace('_', ' '))}: {value}")
        lines.append("")
    with writing(path):
        path.write_text("\n".join(lines), encoding="utf-8")


def write_predictions(
    path: Path, sources: list[str], labels: list[str], scores: np.ndarray, classes: list[str]
) -> None:
    r"""Write a csv line for each video: source, label, predicted, and the five best with their scores.

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
        "|".join(for_csv(name).replace("|", "\\x7c") for name in names),
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num = len(classes)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(max(4.0, 2.5 + 0.42 * num), 24.0)  # inches; past 50 classes the cells shrink instead
    font = 8 if num <= 50 else max(2.0, 8 * 50 / num)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
    names = [for_figure(name, 24) for name in classes]
    totals = counts.sum(1)
    axes.set_xticks(range(num), names, rotation=90, fontsize=font)
    axes.set_yticks(
        range(num), [f"{n} ({t})" for n, t in zip(names, totals, strict=True)], fontsize=font
    )
    axes.set_xlabel("predicted")
    axes.set_ylabel(f"true (number of {unit})")
    figure.suptitle(for_title(f"{title}, {counts.sum()} {unit}", side + 1), fontsize=10)
    if num <= 50:
        for row, column in zip(*np.nonzero(counts), strict=True):
            value = share[row, column]
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num = len(frames)
    height, width = frames[0][1].shape[:2]
    figure = Figure(
        figsize=(1.5 * num, 1.5 * height / width + 0.35 * len(classes) + 1.0), layout="constrained"
    )
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(
        2, 1, height_ratios=[1.5 * height / width + 0.5, 0.35 * len(classes) + 0.5]
    )
    for axis, (second, image) in zip(above.subplots(1, num, squeeze=False)[0], frames, strict=True):
        axis.imshow(image)
        axis.set_axis_off()
        axis.set_title(f"{second:.1f} s", fontsize=8)
    above.suptitle(for_title(title, 1.5 * num), fontsize=10)
    bars = below.subplots()
    places = np.arange(len(classes))[::-1]
    bars.barh(places, 100 * probabilities, color="C0")
    bars.set_yticks(places, [for_figure(c, 40) for c in classes], fontsize=9)
    bars.set_xlim(0, 110)  # room for a number beside the longest bar
    bars.set_xticks(range(0, 101, 20))
    bars.set_xlabel("probability among the classes given, per cent", fontsize=8)
    for place, value in zip(places, probabilities, strict=True):
        bars.text(100 * value + 1, place, f"{100 * value:.0f} %", va="center", fontsize=8)
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(4.6 * columns, 1.9 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = rows[:most]
    if len(rows) > most:
        title += f" ({len(rows) - most} more videos not drawn)"
    present = [c for c in classes if any(s["label"] == c for _, parts in shown for s in parts)]
    colours = colormaps["tab20" if len(classes) <= 20 else "hsv"]
    colour = {
        c: colours(i % 20 if len(classes) <= 20 else i / len(classes))
        for i, c in enumerate(classes)
    }
    figure = Figure(
        figsize=(9, 1.6 + 0.45 * len(shown) + 0.12 * len(present)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (_, parts) in enumerate(shown):
        for part in parts:
            length = part["end"] - part["start"]
            axes.barh(place, length, left=part["start"], height=0.8, color=colour[part["label"]])
    names = [for_figure(Path(name).name, 32) for name, _ in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(for_title(title, 7), fontsize=10)
    handles = [Patch(color=colour[c], label=for_figure(c, 40)) for c in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


@optional_figure
def cost_figure(
    path: Path, points: list[tuple[str, float, float, float, float]], chance: float, title: str
) -> None:
    """Draw accuracy against cost.

    Args:
        path: the .png to write.
        points: name, operations of a clip, accuracy and the ends of its interval (shares) of each model.
        chance: accuracy of guessing.
        title: above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, cost, value, low, high) in enumerate(points):
        whiskers = [[100 * (value - low)], [100 * (high - value)]]
        axes.errorbar(
            cost / 1e9, 100 * value, whiskers, fmt="os^Dv"[i // 10 % 5], color=f"C{i % 10}", capsize=2, linewidth=0.8,
            label=for_figure(name, 40),
        )  # fmt: skip
    axes.axhline(100 * chance, color="grey", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"chance\n{100 * chance:.1f} %", (1.01, 100 * chance), xycoords=("axes fraction", "data"), va="center",
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
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
