"""The table of a comparison: results of several runs, read, checked to be alike, and written."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from downstream.floor import FLOOR, WORDS
from downstream.models import load_backbone
from downstream.report import RANDOM, markdown_table
from downstream.results import OldResultsError, Results, read_results
from pretrain.folders import writing
from pretrain.names import for_html, for_markdown

STYLE = (
    "body{font:15px/1.5 sans-serif;margin:2em;max-width:75em}"
    "table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.25em .7em;border-bottom:1px solid #ccc;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


def refuse_different(named: list[tuple[str, Results]]) -> None:
    """Refuse to rank results of different protocols.

    Raises:
        ValueError: they differ; the message says in what.
    """
    first_name, first = named[0][0], named[0][1].protocol
    for name, results in named[1:]:
        other = results.protocol
        differences = [
            f"{k}: {first.get(k)!r} and {other.get(k)!r}"
            for k in sorted(first.keys() | other.keys())
            if first.get(k) != other.get(k)
        ]
        if differences:
            raise ValueError(
                f"{first_name} and {name} were measured under different protocols "
                f"({'; '.join(differences)}): they are not ranked. Run "
                "both under one protocol"
            )


def read_accuracies(folder: Path) -> Results:
    """The results of a folder that have an accuracy with an interval.

    Raises:
        ValueError: there are none.
    """
    try:
        results = read_results(folder)
    except OldResultsError:
        raise
    except ValueError as error:
        hint = "; spaces separate folders, not commas" if "," in str(folder) else ""
        raise ValueError(f"{folder} holds no results: {error}{hint}") from error
    top1 = results.metrics.get("top1")
    if top1 is None or top1.interval is None or top1.chance is None:
        raise ValueError(
            f"{folder} holds results of {results.recipe}, which have no top-1 to compare"
        )
    return results


def notes_of(runs: dict[str, list[Results]]) -> list[str]:
    """The warnings on the runs' cards; with the run's name where not all have them.

    Args:
        runs: label -> the results of its seeds.
    """
    said: dict[str, list[str]] = {}
    for label, found in runs.items():
        for note in dict.fromkeys(note for results in found for note in results.notes):
            said.setdefault(note, []).append(label)
    return [
        note if len(labels) == len(runs) else f"{', '.join(labels)}: {note}"
        for note, labels in said.items()
    ]


@torch.no_grad()
def measure_speed(
    folders: dict[str, str], where: torch.device, rounds: int = 3, batch: int = 8
) -> dict[str, float]:
    """Clips a second of each forward pass, models taken in turns, the median of the rounds."""
    times: dict[str, list[float]] = {label: [] for label in folders}
    for round_ in range(rounds + 1):
        for label, folder in folders.items():
            model = load_backbone(folder)  # one in memory at a time
            assert isinstance(model, torch.nn.Module)
            model.to(where)
            clips = model.input_spec.empty(batch)
            assert isinstance(clips, torch.Tensor)  # of one stream
            clips = torch.randn_like(clips, device=where)
            for _ in range(2):  # the first pass allocates
                began = time.perf_counter()
                model(clips).sum().item()
            if round_:
                times[label].append(time.perf_counter() - began)
    return {label: batch / statistics.median(t) for label, t in times.items()}


def summarise(label: str, start: str, runs: list[Results], speed: float | None) -> dict:
    """One line of the table from the runs of a model, one a seed."""
    first = runs[0]

    def mean(name: str) -> float | None:
        values = [v for r in runs if (v := r.value(name)) is not None]
        return float(np.mean(values)) if len(values) == len(runs) else None

    floors = [value for kind in WORDS if (value := mean(f"{FLOOR}{kind}")) is not None]
    told = [r.detail("training", "minutes") for r in runs]
    minutes = [m for m in told if m is not None]
    intervals = [r.metrics["top1"].interval for r in runs]
    low, high = np.mean([i for i in intervals if i is not None], 0).tolist()
    return {
        "name": label,
        "starts_from": start,
        "top1": mean("top1"),
        "top1_interval": [low, high],
        "top1_seeds": [r.value("top1") for r in runs],
        "mean_class_accuracy": mean("mean_class_accuracy"),
        "reversed_pairs": mean("reversed_pairs"),
        "random_init_top1": mean(f"{RANDOM}top1"),
        "floor_top1": max(floors) if floors else None,
        "parameters": first.model.parameters,
        "flops": first.model.flops,
        "clips_per_s": speed,
        "minutes": float(np.mean(minutes)) if len(minutes) == len(runs) else None,
        "chance": first.metrics["top1"].chance,
        "num_test": first.data.num_test,
    }


def _cell(name: str, factor: float, digits: int) -> Callable[[dict], str]:
    """The cell of a number times a factor; a dash where it was not measured."""
    return lambda row: "-" if row[name] is None else f"{factor * row[name]:.{digits}f}"


COLUMNS: tuple[tuple[str, Callable[[dict], str]], ...] = (
    ("model", lambda r: r["name"]),
    ("starts from", lambda r: r["starts_from"]),
    ("top-1", _cell("top1", 100, 1)),
    ("95 % interval", lambda r: "{:.1f} to {:.1f}".format(*(100 * v for v in r["top1_interval"]))),
    ("seeds", lambda r: " ".join(f"{100 * v:.1f}" for v in r["top1_seeds"])),
    ("mean class", _cell("mean_class_accuracy", 100, 1)),
    ("reversed pairs", _cell("reversed_pairs", 100, 1)),
    ("random weights", _cell("random_init_top1", 100, 1)),
    ("floor", _cell("floor_top1", 100, 1)),
    ("M parameters", _cell("parameters", 1e-6, 2)),
    ("GFLOPs", _cell("flops", 1e-9, 2)),
    ("clips/s", _cell("clips_per_s", 1, 0)),
    ("minutes", _cell("minutes", 1, 1)),
)


def write_tables(
    out: Path, rows: list[dict], claims: list[dict], notes: list[str], title: str, picture: bool
) -> str:
    """Write compare.md and compare.html.

    Args:
        out: the folder.
        rows: of `summarise`.
        claims: each with `claim`, `held` and `measured`.
        notes: sentences for the reader.
        title: above all.
        picture: whether there is a compare.png.

    Returns:
        the Markdown.
    """
    rows = sorted(rows, key=lambda r: -r["top1"])
    columns = [c for c in COLUMNS if any(c[1](row) not in ("-", "") for row in rows)]
    heads = [name for name, _ in columns]
    cells = [[cell(row) for _, cell in columns] for row in rows]
    about = ["claim", "held", "measured"]
    measured = [[claim[name] for name in about] for claim in claims]
    heading, caption = "Claims of the literature", "accuracy against cost"

    lines = [f"# {for_markdown(title)}", "", *markdown_table(heads, cells)]
    lines += ["", *[f"- {for_markdown(note)}" for note in notes]]
    if claims:
        lines += ["", f"## {heading}", "", *markdown_table(about, measured)]
    if picture:
        lines += ["", f"![{caption}](compare.png)"]
    text = "\n".join(lines) + "\n"

    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{for_html(title)}</title>",
        f"<style>{STYLE}</style>",
        f"<h1>{for_html(title)}</h1>{_html_table(heads, cells)}",
        "<ul>" + "".join(f"<li>{for_html(n)}</li>" for n in notes) + "</ul>",
    ]
    if claims:
        parts.append(f"<h2>{heading}</h2>{_html_table(about, measured)}")
    if picture:
        parts.append(f'<img src="compare.png" alt="{caption}">')
    for name, content in (("compare.md", text), ("compare.html", "\n".join(parts) + "</html>\n")):
        with writing(out / name):
            (out / name).write_text(content, encoding="utf-8")
    return text


def _html_table(heads: list[str], rows: list[list[str]]) -> str:
    def line(row: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{for_html(c)}</{tag}>" for c in row) + "</tr>"

    return f"<table>{line(heads, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
