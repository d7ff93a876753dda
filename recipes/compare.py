"""Compare models on your clips: train or probe each under one protocol, and write one table.

    python recipes/compare.py --data clips.csv --models frame_mean,lstm,tcn,i3d
    python recipes/compare.py --data clips.csv --models i3d --backbones RUN/backbone --seeds 3
    python recipes/compare.py --data clips.csv --protocol probe --backbones RUN/backbone
    python recipes/compare.py --results runs/finetune-i3d runs/finetune-lstm

Every model is a run of recipes/finetune.py (or recipes/linear_probe.py) of its own, with its own
folder, log and protocol card; a run that is finished is not repeated, one that was interrupted
continues, so the same command goes on where it stopped. `inflated:frame_mean` starts the 3-D
network `inflated` from the 2-D weights that this comparison's `frame_mean` of the same seed has
learned.

Written: compare.md, compare.html, compare.png (accuracy against cost) and compare.json. Numbers
whose protocol cards differ are not put in one table.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from downstream.claims import claims_about, paired_claims, read_predictions
from downstream.compare import (
    measure_speed,
    notes_of,
    read_accuracies,
    refuse_different,
    summarise,
    write_tables,
)
from downstream.models import check_name
from downstream.report import cost_figure
from downstream.results import Results
from pretrain.data.cache import open_data, packing_side
from pretrain.data.progress import Bar
from pretrain.files import read_json
from pretrain.flags import flat
from pretrain.folders import claim, holds_nothing
from pretrain.log import config_differences, write_json
from pretrain.names import counted, file_name, for_screen
from pretrain.processes import start_evaluation
from recipes.options.compare import Config, command


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
                    f"{word}: nothing is trained in the protocol probe, so there is nothing to "
                    "start from"
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


def command_of(config: Config, entry: Entry, seed: int, out: Path) -> list[str]:
    """The command of one run of the comparison in `out`."""
    here = Path(__file__).resolve().parent
    common = [
        "--data", config.data, "--seed", str(seed), "--out", str(run_folder(out, entry, seed)),
        "--num-clips", str(config.num_clips),
        "--num-crops", str(config.num_crops), "--train-split", config.train_split, "--test-split",
        config.test_split,
        "--num-workers", str(config.machine.num_workers), "--precision", config.machine.precision,
        "--threads", str(config.machine.threads), "--cache-gib", str(config.machine.cache_gib),
        "--decoder", str(config.machine.decoder),
    ]  # fmt: skip
    if config.protocol == "probe":
        return [
            sys.executable, str(here / "linear_probe.py"), "--backbone", entry.name, "--attentive",
            "off", *common
        ]  # fmt: skip
    command = [
        sys.executable, str(here / "finetune.py"), config.preset, f"--{entry.kind}", entry.name,
        *common,
    ]  # fmt: skip
    if config.flip is not None:
        command += ["--flip" if config.flip else "--no-flip"]
    for flag in ("epochs", "steps"):
        if getattr(config, flag):
            command += [f"--{flag}", str(getattr(config, flag))]
    if config.size and entry.kind == "model":
        command += ["--size", str(config.size)]
    if entry.start:
        other = run_folder(out, Entry(entry.start, "model"), seed)
        command += ["--weights", str(other / "backbone")]
    return command


def run_one(command: list[str], log_file: Path, bar: Bar) -> str | None:
    """Run a command, its output in a log, its progress behind the bar; None, or why it failed."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    }
    last = ""
    with open(log_file, "a", encoding="utf-8", errors="backslashreplace") as file, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        errors="backslashreplace",
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


def run_folder(out: Path, entry: Entry, seed: int) -> Path:
    """Where a run of the comparison in `out` lies."""
    return out / "runs" / f"{entry.slug}-seed{seed}"


def run_all(
    config: Config, entries: list[Entry], out: Path
) -> tuple[dict[str, list[Results]], list[str]]:
    """Do the runs that are missing.

    Returns:
        label -> results of its seeds, and why runs failed.
    """
    runs: dict[str, list[Results]] = {}
    failed: list[str] = []
    todo = [(entry, seed) for seed in range(config.seeds) for entry in entries]
    with Bar(len(todo), "runs", "run") as bar:
        for entry, seed in todo:
            run = run_folder(out, entry, seed)
            bar.say(for_screen(f"{entry.label}, seed {seed}"))
            if not (run / "results.json").exists():
                command = command_of(config, entry, seed, out)
                reason = run_one(command, out / "logs" / f"{run.name}.log", bar)
                if reason:
                    failed.append(f"{entry.label}, seed {seed}: {reason}")
                    bar.write(for_screen(f"failed: {failed[-1]}"))
            if (run / "results.json").exists():
                runs.setdefault(entry.label, []).append(read_accuracies(run))
            bar.update()
    return runs, failed


def claims_of(
    config: Config,
    entries: list[Entry],
    out: Path,
    rows: list[dict],
    runs: dict[str, list[Results]],
) -> list[dict]:
    """The claims of the literature that these runs can check."""
    first, claims = next(iter(runs.values()))[0], []
    if first.protocol["kind"] == "fine-tune":
        claims = claims_about({row["name"]: row for row in rows}, runs)
    predictions = {
        e.label: [read_predictions(run_folder(out, e, seed)) for seed in range(config.seeds)]
        for e in entries
    }
    predictions = {label: found for label, found in predictions.items() if all(found)}
    size = first.detail("views", "size")
    if not predictions or not size:
        return claims
    # Who is seen in a video, where the data say so; from the pack for models of this size, which
    # is there.
    pack = open_data(config.data, packing_side(int(size)), False, config.machine)
    people = {r["source"]: r["subject"] for r in pack.records() if r["subject"] is not None}
    return claims + paired_claims(predictions, people)


def notes_for(
    rows: list[dict], runs: dict[str, list[Results]], data: str, failed: list[str]
) -> list[str]:
    """What a reader of the table must know."""
    first = next(iter(runs.values()))[0]
    resampled = first.details.get("interval", {}).get("resampled", "videos")
    shared = ", ".join(f"{k} {v}" for k, v in first.protocol.items() if k != "videos")
    return [
        f"{counted(rows[0]['num_test'], 'test video')} of {data}, chance "
        f"{100 * rows[0]['chance']:.1f} %; "
        f"intervals are over {resampled}, the mean of the seeds' ends",
        *notes_of(runs),
        f"protocol: {shared}",
        "accuracies and intervals in per cent; clips/s: forward pass, batches of 8, models in "
        "turns on this machine; minutes: one seed's training",
        *[f"not in the table: {reason}" for reason in failed],
    ]


# ------------------------------------------------------------------------------------------- main


# What else is in the folder of a comparison.
CONTENTS = (
    "config.json", "runs", "logs", "compare.md", "compare.html", "compare.png", "compare.json",
)  # fmt: skip


def _refuse_other_comparison(out: Path, config: Config) -> str:
    """Raise ValueError if a folder holds a comparison under other settings, or something else.

    Returns:
        what is amiss with the comparison in it, if anything.
    """
    free = {"models", "backbones", "results", "seeds", "threads", "num_workers", "out", "cache_gib"}
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
            f"{out} holds a comparison under other settings ({'; '.join(differences)}): give "
            "another --out"
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
    runs, failed = run_all(config, entries, out)
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
            trained = run_folder(out, entry, 0) / "backbone"
            folders[entry.label] = str(trained) if trained.exists() else entry.name
    speeds = measure_speed(folders, start_evaluation(config.machine)) if folders else {}

    # ---- tables
    rows = [
        summarise(label, starts[label], found, speeds.get(label)) for label, found in runs.items()
    ]
    claims = claims_of(config, entries, out, rows, runs)
    protocol = next(iter(runs.values()))[0].protocol
    # By the cards: --data says nothing about results that were there already.
    data = " and ".join(dict.fromkeys(r.data.name for found in runs.values() for r in found))
    notes = notes_for(rows, runs, data, failed)
    on = f"{protocol['kind']} on {data}, {counted(rows[0]['num_test'], 'test video')}"
    seeds = counted(max(map(len, runs.values())), "seed")
    title = f"{on}: {counted(len(rows), 'model')}, {seeds}"
    found = {"rows": rows, "claims": claims, "notes": notes, "protocol": protocol}
    write_json(out / "compare.json", found)
    text = write_tables(out, rows, claims, notes, title, False)
    print("\n" + text)
    print(f"tables   {for_screen(out)}/compare.md, {for_screen(out)}/compare.html")
    points = [(r["name"], r["flops"], r["top1"], *r["top1_interval"]) for r in rows if r["flops"]]
    if points:  # after the numbers, since a picture may fail
        print(f"figure   {cost_figure(out / 'compare.png', points, rows[0]['chance'], on)}")
        write_tables(out, rows, claims, notes, title, (out / "compare.png").exists())
    lock.release(force=True)
    if failed:
        raise ValueError(
            f"{counted(len(failed), 'run')} failed, which the table lacks; the first: {failed[0]}"
        )
    return found


if __name__ == "__main__":
    command(main)
