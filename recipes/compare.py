"""Compare models on your clips: train or probe each under one protocol, and write one table.

    python recipes/compare.py --data clips.csv --models frame_mean,lstm,tcn,i3d
    python recipes/compare.py --data clips.csv --models i3d --backbones runs/videomae-tiny/backbone --seeds 3
    python recipes/compare.py --data clips.csv --protocol probe --models vit_xs --backbones runs/videomae-tiny/backbone
    python recipes/compare.py --results runs/finetune-i3d runs/finetune-lstm       what there is already

Every model is a run of recipes/finetune.py (or recipes/linear_probe.py) of its own, with its own folder, log and
protocol card; a run that is finished is not repeated, one that was interrupted continues, so the same command goes on
where it stopped. `inflated:frame_mean` starts the 3-D network `inflated` from the 2-D weights that this comparison's
`frame_mean` of the same seed has learned.

Written: compare.md, compare.html, compare.png (accuracy against cost) and compare.json. Numbers whose protocol cards
differ are not put in one table.
"""

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from downstream.compare import claims_about, paired_claims, read_predictions
from downstream.models import check_name, load_backbone
from downstream.report import RANDOM, cost_figure
from downstream.results import OldResultsError, Results, read_results
from downstream.training import Training
from pretrain.data.cache import open_data, packing_side
from pretrain.data.progress import Bar
from pretrain.files import read_json
from pretrain.flags import Count, OptionalCount, Positive, flat
from pretrain.folders import claim, holds_nothing, writing
from pretrain.log import cli, config_differences, write_json
from pretrain.names import file_name, for_html, for_markdown, for_screen
from pretrain.processes import start_evaluation
from pretrain.settings import MACHINE, MachineFlags


@dataclass(frozen=True)
class Config:
    """Configuration of the comparison."""

    data: str = "synthetic:3600"
    """The data that new runs train on and are scored on; as recipes/finetune.py takes it, with labels."""
    models: str | None = None
    """Names of python -m downstream.models, separated by commas; `inflated:frame_mean` starts from another's weights."""
    backbones: tuple[str, ...] = ()
    """Trained backbones to fine-tune or probe beside them."""
    results: tuple[str, ...] = ()
    """Folders with results.json to put into the table as they are."""
    protocol: Literal["finetune", "probe"] = "finetune"
    """Train everything, or leave it frozen and fit a linear probe."""
    preset: Literal["tiny", "paper"] = "tiny"
    """Of recipes/finetune.py."""
    seeds: Count = 1
    """Runs of each model: seeds 0, 1, ..."""
    epochs: Positive | None = None
    """Passes over the training videos, the same for all; 0: the preset's."""
    steps: OptionalCount = None
    """Optimizer steps instead, the same for all."""
    size: OptionalCount = None
    """Height and width of the models' clips, pixels; 0: the preset's."""
    train_split: str = "train"
    """The training split."""
    test_split: str = "test"
    """The split that is scored."""
    flip: bool = True
    """Mirror half of the training clips; --no-flip where classes differ by left and right."""
    num_clips: Count = 2
    """Test views spread over the time of each clip."""
    num_crops: Count = 1
    """Test views spread over the longer side of each."""
    machine: MachineFlags = MACHINE
    out: str = "runs/compare"
    """Where runs and tables go."""


@dataclass(frozen=True)
class Entry:
    """A line of the table: a model or a backbone."""

    name: str
    kind: Literal["model", "backbone"]
    start: str = ""  # another model's name, whose 2-D weights it starts from

    @property
    def label(self) -> str:
        """Its name in the table."""
        return f"{self.name}:{self.start}" if self.start else self.name

    @property
    def slug(self) -> str:
        """A name for its folders."""
        return file_name(self.label)


# Flags that the recipes of the runs have and a comparison has not: it would have to be the same for all models.
OF_RUNS = dict.fromkeys(
    (
        *(field.name for field in fields(Training)), "weights", "network", "attention", "frames", "stride", "width",
        "subtract_mean", "freeze", "per_frame", "val", "shots", "micro_batch", "class_weights", "ema", "patience",
        "resume", "save_every", "val_every", "log_seconds", "max_bad_clips", "tensorboard", "leave_one_out",
        "time_segments", "classifier", "attentive",
    ),
    "each run takes it from --preset of recipes/finetune.py, or has recipes/linear_probe.py's default. To set it, run these "
    "recipes yourself and show their folders with --results",
)  # fmt: skip


def unused(config: Config) -> dict[str, str]:
    """Flags that the others leave without effect, and why; see `pretrain.flags`."""
    run = ("data", "protocol", "preset", "seeds", "epochs", "steps", "size", "train_split", "test_split", "flip",
           "num_clips", "num_crops", *flat(config.machine))  # fmt: skip
    if not config.models and not config.backbones:
        return dict.fromkeys(run, "where only --results are shown, as they are")
    if config.protocol == "probe":
        training = ("preset", "epochs", "steps", "size", "flip")
        return dict.fromkeys(training, "with --protocol probe, which trains nothing")
    why = {}
    if not config.models:
        why["size"] = "without --models: a backbone has its own"
    if config.steps:
        why["epochs"] = f"with --steps {config.steps}"
    return why


def entries_of(config: Config) -> list[Entry]:
    """The models to compare.

    Raises:
        ValueError: nothing, twice the same, or a name that there is not.
    """
    entries: list[Entry] = []
    for word in filter(None, (w.strip() for w in (config.models or "").split(","))):
        name, _, start = word.partition(":")
        check_name(name)
        if start:
            check_name(start)
            if start not in [e.name for e in entries if not e.start]:
                raise ValueError(
                    f"{word} starts from {start}, which has to come before it in --models"
                )
            if config.protocol == "probe":
                raise ValueError(
                    f"{word}: nothing is trained in the protocol probe, so there is nothing to start from"
                )
        entries.append(Entry(name, "model", start))
    entries += [Entry(name, "backbone") for name in config.backbones]
    slugs = [e.slug for e in entries]
    twice = {s for s in slugs if slugs.count(s) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} would be compared with itself: name it once")
    if not entries and not config.results:
        raise ValueError("nothing to compare: give --models, --backbones or --results")
    return entries


def command_of(config: Config, entry: Entry, seed: int, out: Path, runs: Path) -> list[str]:
    """The command of one run."""
    here = Path(__file__).resolve().parent
    common = [
        "--data", config.data, "--seed", str(seed), "--out", str(out), "--num-clips", str(config.num_clips),
        "--num-crops", str(config.num_crops), "--train-split", config.train_split, "--test-split", config.test_split,
        "--num-workers", str(config.machine.num_workers), "--precision", config.machine.precision,
        "--threads", str(config.machine.threads),
    ]  # fmt: skip
    if config.protocol == "probe":
        return [
            sys.executable, str(here / "linear_probe.py"), "--backbone", entry.name, "--attentive", "off", *common
        ]  # fmt: skip
    command = [
        sys.executable,
        str(here / "finetune.py"),
        config.preset,
        f"--{entry.kind}",
        entry.name,
        *common,
    ]
    command += ["--flip" if config.flip else "--no-flip"]
    for flag in ("epochs", "steps"):
        if getattr(config, flag):
            command += [f"--{flag}", str(getattr(config, flag))]
    if config.size and entry.kind == "model":
        command += ["--size", str(config.size)]
    if entry.start:
        command += [
            "--weights",
            str(runs / f"{Entry(entry.start, 'model').slug}-seed{seed}" / "backbone"),
        ]
    return command


def run_one(command: list[str], log_file: Path, bar: Bar) -> str | None:
    """Run a command with its output in a log, its progress behind the bar; None if it went well, else why not."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    }
    last = ""
    with open(log_file, "a", encoding="utf-8", errors="backslashreplace") as file, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="backslashreplace",
        env=environment,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None  # a pipe
            for line in process.stdout:
                file.write(line)
                file.flush()
                if line.strip():
                    last = line.strip()
                if match := re.match(r"(step \d+/\d+).*?([\d:]+ left)", line):
                    bar.say(about=f"{match[1]}, {match[2]}")
        except BaseException:  # Ctrl-C: the run saves at the end of its step
            process.terminate()
            process.wait()
            raise
    return (
        None
        if process.returncode == 0
        else f"{last} (exit status {process.returncode}; {log_file})"
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
                f"{first_name} and {name} were measured under different protocols ({'; '.join(differences)}): they are not ranked. Run "
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
    """The warnings on the runs' cards, such as a random test split; with the run's name where not all have them.

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


def people_of(data: str, size: int) -> dict[str, str]:
    """Source -> who is seen in it, where the data say so; from the pack for models of `size` pixels, which is there."""
    pack = open_data(data, packing_side(size), say=False)
    return {r["source"]: r["subject"] for r in pack.records() if r["subject"] is not None}


@torch.no_grad()
def measure_speed(
    folders: dict[str, str], where: torch.device, rounds: int = 3, batch: int = 8
) -> dict[str, float]:
    """Clips a second of each backbone's forward pass, models taken in turns, the median of the rounds."""
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

    told = [r.details.get("training", {}).get("minutes") for r in runs]
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
    ("M parameters", _cell("parameters", 1e-6, 2)),
    ("GFLOPs", _cell("flops", 1e-9, 2)),
    ("clips/s", _cell("clips_per_s", 1, 0)),
    ("minutes", _cell("minutes", 1, 1)),
)


def write_tables(
    out: Path, rows: list[dict], claims: list[dict], notes: list[str], title: str, picture: bool
) -> str:
    """Write compare.md and compare.html; returns the Markdown."""
    rows = sorted(rows, key=lambda r: -r["top1"])
    columns = [c for c in COLUMNS if any(c[1](row) not in ("-", "") for row in rows)]
    cells = [[cell(row) for _, cell in columns] for row in rows]
    heads = [name for name, _ in columns]
    lines = [
        f"# {for_markdown(title)}",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "|".join("---" for _ in heads) + "|",
    ]
    lines += ["| " + " | ".join(map(for_markdown, row)) + " |" for row in cells]
    lines += ["", *[f"- {for_markdown(note)}" for note in notes]]
    if claims:
        lines += [
            "",
            "## Claims of the literature",
            "",
            "| claim | held | measured |",
            "|---|---|---|",
        ]
        lines += [
            "| " + " | ".join(for_markdown(c[k]) for k in ("claim", "held", "measured")) + " |"
            for c in claims
        ]
    if picture:
        lines += ["", "![accuracy against cost](compare.png)"]
    text = "\n".join(lines) + "\n"
    with writing(out / "compare.md"):
        (out / "compare.md").write_text(text, encoding="utf-8")
    row_html = lambda row, tag: (
        "<tr>" + "".join(f"<{tag}>{for_html(c)}</{tag}>" for c in row) + "</tr>"
    )
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{for_html(title)}</title>",
        "<style>body{font:15px/1.5 sans-serif;margin:2em;max-width:75em}table{border-collapse:collapse;margin:1em 0}"
        "td,th{padding:.25em .7em;border-bottom:1px solid #ccc;text-align:right}td:first-child,th:first-child{text-align:left}"
        "img{max-width:100%}</style>",
        f"<h1>{for_html(title)}</h1><table>{row_html(heads, 'th')}{''.join(row_html(r, 'td') for r in cells)}</table>",
        "<ul>" + "".join(f"<li>{for_html(n)}</li>" for n in notes) + "</ul>",
    ]
    if claims:
        body = "".join(row_html([c["claim"], c["held"], c["measured"]], "td") for c in claims)
        parts.append(
            f"<h2>Claims of the literature</h2><table>{row_html(['claim', 'held', 'measured'], 'th')}{body}</table>"
        )
    if picture:
        parts.append('<img src="compare.png" alt="accuracy against cost">')
    with writing(out / "compare.html"):
        (out / "compare.html").write_text("\n".join(parts) + "</html>\n", encoding="utf-8")
    return text


# ------------------------------------------------------------------------------------------- main


# What else is in the folder of a comparison.
CONTENTS = (
    "config.json",
    "runs",
    "logs",
    "compare.md",
    "compare.html",
    "compare.png",
    "compare.json",
)


def _refuse_other_comparison(out: Path, config: Config) -> str:
    """Raise ValueError if a folder holds a comparison under other settings, or something else.

    Returns:
        what is amiss with the comparison in it, if anything.
    """
    free = {"models", "backbones", "results", "seeds", "threads", "num_workers", "out"}
    occupied = f"{out} holds something that is not a comparison: give another --out"
    if not os.path.lexists(out / "config.json"):
        if not holds_nothing(out):
            raise ValueError(occupied)
        return ""
    try:
        old = read_json(out / "config.json")
    except ValueError as error:
        # Every run in it has a config.json of its own, and a table only takes those measured alike.
        if not holds_nothing(out, CONTENTS):
            raise ValueError(occupied) from error
        return f"{error}; it is written again"
    if "models" not in old or "protocol" not in old:
        raise ValueError(occupied)
    differences = config_differences(old, config, free)
    runs = out / "runs"
    if differences and not [*runs.glob("*/results.json"), *runs.glob("*/checkpoints/*")]:
        return f"{out} holds a comparison that came to nothing; this one takes its place"
    if differences:
        raise ValueError(
            f"{out} holds a comparison under other settings ({'; '.join(differences)}): give another --out"
        )
    return ""


def main(config: Config) -> dict:
    """Run what is missing and write the tables; returns what compare.json holds."""
    if config.seeds < 1:
        raise ValueError(f"--seeds {config.seeds}: give at least 1")
    entries = entries_of(config)
    given = [(folder, read_accuracies(Path(folder))) for folder in config.results]
    if len(given) > 1:
        refuse_different(given)  # before hours of training
    out = Path(config.out)
    _refuse_other_comparison(out, config)
    lock = claim(out)
    note = _refuse_other_comparison(out, config)  # it may have changed before it was ours
    if note:
        print(f"warning: {for_screen(note)}", file=sys.stderr, flush=True)
    write_json(out / "config.json", flat(config))

    # ---- the runs
    runs_folder, failed = out / "runs", []
    runs: dict[str, list[Results]] = {}
    todo = [(entry, seed) for seed in range(config.seeds) for entry in entries]
    with Bar(len(todo), "runs", "run") as bar:
        for entry, seed in todo:
            run = runs_folder / f"{entry.slug}-seed{seed}"
            bar.say(for_screen(f"{entry.label}, seed {seed}"))
            if not (run / "results.json").exists():
                command = command_of(config, entry, seed, run, runs_folder)
                reason = run_one(command, out / "logs" / f"{run.name}.log", bar)
                if reason:
                    failed.append(f"{entry.label}, seed {seed}: {reason}")
                    bar.write(for_screen(f"failed: {failed[-1]}"))
            if (run / "results.json").exists():
                runs.setdefault(entry.label, []).append(read_accuracies(run))
            bar.update()
    starts = {
        e.label: e.start or ("pretrained" if e.kind == "backbone" else "scratch") for e in entries
    }
    for folder, results in given:
        label = results.model.name
        if label in runs:
            label = f"{label} ({folder})"
        runs.setdefault(label, []).append(results)
        starts.setdefault(label, "as it was")
    if not runs:
        raise ValueError(f"every run failed, the first: {failed[0]}")
    refuse_different([(label, results) for label, found in runs.items() for results in found])

    # ---- speed, one model after the other, round by round
    folders = {}
    for entry in entries:
        if entry.label in runs:
            trained = runs_folder / f"{entry.slug}-seed0" / "backbone"
            folders[entry.label] = str(trained) if trained.exists() else entry.name
    speeds = measure_speed(folders, start_evaluation(config.machine)) if folders else {}

    # ---- tables
    rows = [
        summarise(label, starts[label], found, speeds.get(label)) for label, found in runs.items()
    ]
    first_run = next(iter(runs.values()))[0]
    first = first_run.protocol
    claims = (
        claims_about({r["name"]: r for r in rows}, runs) if first["kind"] == "fine-tune" else []
    )
    every = [results for found in runs.values() for results in found]
    # By the cards: --data says nothing about results that were there already.
    data = " and ".join(dict.fromkeys(results.data.name for results in every))
    predictions = {
        e.label: [
            read_predictions(runs_folder / f"{e.slug}-seed{seed}") for seed in range(config.seeds)
        ]
        for e in entries
    }
    predictions = {label: found for label, found in predictions.items() if all(found)}
    people = people_of(config.data, first_run.details["views"]["size"]) if predictions else {}
    claims += paired_claims(predictions, people)
    notes = [
        f"{rows[0]['num_test']} test videos of {data}, chance {100 * rows[0]['chance']:.1f} %; intervals are over "
        f"{first_run.details.get('interval', {}).get('resampled', 'videos')}, the mean of the seeds' ends",
        *notes_of(runs),
        "protocol: " + ", ".join(f"{k} {v}" for k, v in first.items() if k != "videos"),
        "accuracies and intervals in per cent; clips/s: forward pass, batches of 8, models in turns on this machine; "
        "minutes: one seed's training",
        *[f"not in the table: {reason}" for reason in failed],
    ]
    points = [(r["name"], r["flops"], r["top1"], *r["top1_interval"]) for r in rows if r["flops"]]
    on = f"{first['kind']} on {data}, {rows[0]['num_test']} test videos"
    title = f"{on}: {len(rows)} models, {max(map(len, runs.values()))} seed(s)"
    found = {"rows": rows, "claims": claims, "notes": notes, "protocol": first}
    write_json(out / "compare.json", found)
    text = write_tables(out, rows, claims, notes, title, False)
    print("\n" + text)
    print(f"tables   {for_screen(out)}/compare.md, {for_screen(out)}/compare.html")
    if points:  # after the numbers, since a picture may fail
        print(f"figure   {cost_figure(out / 'compare.png', points, rows[0]['chance'], on)}")
        write_tables(out, rows, claims, notes, title, (out / "compare.png").exists())
    lock.release(force=True)
    if failed:
        raise ValueError(
            f"{len(failed)} runs failed and are not in the table; the first: {failed[0]}"
        )
    return found


if __name__ == "__main__":
    cli(main, Config, unused, elsewhere=OF_RUNS)
