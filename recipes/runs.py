"""What lies in a folder of runs: their data, state and scores; and how two of them differ.

    python recipes/runs.py                                   those in runs/
    python recipes/runs.py experiments/ --json
    python recipes/runs.py --compare runs/mine runs/longer

A training run is a folder with config.json, an evaluation one with results.json; the evaluations in
a run's folder are listed with it. The score is that of the best linear probe, fine-tuning or
zero-shot evaluation, with its 95 % interval, and of a run without any the best online kNN accuracy.
Numbers of other data or under another protocol may stand in one list; they are no contest.

--compare shows the settings in which two folders differ, their scores, and, where both have kept
predictions of the same videos (scores.csv), the difference with its interval: people are drawn,
then videos of each, and of both models the same.

Nothing is written. Folders may be anybody's: what cannot be read is named with the reason, links
are not followed, and only so many folders and so much of a log are looked at.
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pretrain.threads  # noqa: F401 (before torch)

import tyro

from pretrain.files import (
    is_folder,
    no_folder,
    open_regular,
    parse_json,
    read_json,
    reading,
)
from pretrain.flags import Count
from pretrain.log import cli
from pretrain.names import counted, for_screen

if TYPE_CHECKING:  # its torch takes seconds to load
    from downstream.results import Results

MOST_DEPTH = 4  # folders below the one that is named
MOST_LOG = 2**25  # bytes at the end of a log that are read
MOST_LINE = 2**20
INSIDE = (
    "checkpoints",
    "backbone",
    "best",
    "tensorboard",
    "wandb",
)  # of a run, and no runs themselves
# What differs between any two runs and decides no number.
OWN = (
    "given",
    "reasons",
    "out",
    "resume",
    "log_seconds",
    "num_workers",
    "threads",
    "save_every",
    "track",
)


@dataclass(frozen=True)
class Config:
    """Which runs are shown."""

    folder: Annotated[str, tyro.conf.Positional] = "runs"
    """The folder in which runs are looked for."""
    compare: tuple[str, str] | None = None
    """Two folders of runs or of results, instead."""
    most: Count = 10_000
    """Folders that are looked into at most."""
    json: bool = False
    """Print JSON."""


@dataclass
class Run:
    """A folder of a training run, of an evaluation, or of both.

    Attributes:
        folder: where it is.
        config: the settings of the training run; empty: there was none.
        fingerprint: of its data.
        results: those of its evaluations that could be read, by folder.
        state: "finished", "interrupted", "running" or "evaluated"; "unknown": the file system does
            not tell whether it still runs.
        step: the last that was logged.
        steps: that there are to be; 0: not known.
        loss: the last that was logged.
        knn: the best online kNN accuracy, and of how many clips; (0, 0): none was measured.
        problems: what could not be read, and why.
    """

    folder: Path
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""
    results: "dict[Path, Results]" = dataclasses.field(default_factory=dict)
    state: str = "evaluated"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    knn: tuple[float, int] = (0.0, 0)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def best(self) -> "Results | None":
        """Of the results that are an accuracy the one with the highest."""
        found = [r for r in self.results.values() if "top1" in r.metrics]
        return max(found, key=lambda r: r.metrics["top1"].value, default=None)


# ------------------------------------------------------------------------------------ reading


def find_folders(top: Path, most: int) -> tuple[list[Path], list[str]]:
    """The folders of runs and results below one, itself included, in the order of their names.

    Args:
        top: where to look.
        most: folders that are looked into.

    Returns:
        the folders, and what was left out, in words.
    """
    found, left, waiting, seen = [], [], [(top, 0)], 0
    while waiting:
        folder, depth = waiting.pop()
        if seen == most:
            left.append(f"only {counted(most, 'folder')} were looked into: give a larger --most")
            break
        seen += 1
        try:
            with os.scandir(folder) as entries:
                listed = [(e.name, e.is_dir(follow_symlinks=False)) for e in entries]
        except OSError as error:
            left.append(f"{folder}: {error.strerror or error}")
            continue
        names = {name for name, is_dir in listed if not is_dir}
        if names & {"config.json", "results.json"} and "model.safetensors" not in names:
            found.append(folder)
        inner = sorted(name for name, is_dir in listed if is_dir and name not in INSIDE)
        if depth < MOST_DEPTH:
            waiting += [(folder / name, depth + 1) for name in reversed(inner)]
    return sorted(found), left


def log_lines(path: Path) -> list[dict]:
    """The lines at the end of a log, as far as they can be read.

    Raises:
        ValueError: the file cannot be read.
    """
    lines = []
    with reading(path), open_regular(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - MOST_LOG))
        for raw in file.read(MOST_LOG).splitlines():
            try:
                line = parse_json(raw, lax=True) if len(raw) < MOST_LINE else None
            except ValueError:
                continue
            if isinstance(line, dict) and type(line.get("step")) is int:
                lines.append(line)
    return lines


def number(value: object) -> float | None:
    """A finite number out of a file, or None."""
    good = type(value) in (int, float) and abs(value) < 2**63  # type: ignore[arg-type]
    return float(value) if good and math.isfinite(value) else None  # type: ignore[arg-type]


def planned_steps(config: dict, num_clips: object) -> int:
    """The optimizer steps that a run's settings come to (as `plan_run` has it); 0: not known."""
    if steps := number(config.get("steps")):
        return max(int(steps), 0)
    found = [number(x) for x in (config.get("epochs"), num_clips, config.get("batch_size"))]
    epochs, clips, batch = (x or 0 for x in found)
    views = number(config.get("views")) or 1
    return math.ceil(epochs * clips / (batch // views)) if batch >= views >= 1 else 0


def in_use(folder: Path) -> bool | None:
    """Whether a process has claimed a folder; its lock is only looked at, and never made.

    None: the file system does not tell; NFS, for instance, refuses locks of files that are read.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


def read_run(folder: Path) -> Run:
    """What a folder says of its training run, if it holds one; results are added by `read_runs`."""
    run = Run(folder)
    if not os.path.lexists(folder / "config.json"):
        return run
    try:
        about = read_json(folder / "config.json")
    except ValueError as error:
        run.problems.append(str(error))
        return run
    if not isinstance(about.get("config"), dict):  # of a comparison, or of something else
        return run
    run.config, run.fingerprint = about["config"], str(about.get("data_fingerprint", ""))[:64]
    run.steps = planned_steps(run.config, about.get("num_clips"))
    run.state = "interrupted"
    try:
        lines = log_lines(folder / "log.jsonl")
    except ValueError as error:
        run.problems.append(str(error))
        lines = []
    if lines:
        run.step, run.loss = lines[-1]["step"], number(lines[-1].get("loss"))
        scores = [(number(x.get("knn")) or 0.0, number(x.get("knn_clips")) or 0.0) for x in lines]
        run.knn = max((value, int(clips)) for value, clips in scores)
    exported = folder / "backbone" / "config.json"
    claimed = in_use(folder)
    if claimed:
        run.state = "running"
    elif exported.is_file() and (run.step >= run.steps or (folder / "best").exists()):
        run.state = "finished"  # one with a guard may end early
    elif claimed is None:
        run.state = "unknown"
    return run


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs in these folders, each with the results in its folder and below."""
    from downstream.results import read_results

    runs: list[Run] = []
    trained: dict[Path, Run] = {}
    for folder in folders:  # in the order of names: a run comes before what is below it
        run = read_run(folder)
        scored = os.path.lexists(folder / "results.json")
        above = next((trained[p] for p in folder.parents if p in trained), None)
        if run.config:
            trained[folder] = run
        if above and not run.config:
            above.problems += run.problems
            run = above
        elif run.config or run.problems or scored:
            runs.append(run)
        if scored:
            try:
                run.results[folder] = read_results(folder)
            except ValueError as error:
                run.problems.append(str(error))
    return runs


# ------------------------------------------------------------------------------------- showing


def score_in_words(results: "Results") -> str:
    """The first number of an evaluation, with its interval."""
    name, metric = next(iter(results.metrics.items()))
    if metric.unit != "fraction":
        return f"{results.recipe} {name} {metric.value:.1f}"
    ends = metric.interval
    about = f" ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})" if ends else ""
    return f"{results.recipe} {name} {100 * metric.value:.1f} %{about}"


def row_of(run: Run, top: Path) -> dict[str, Any]:
    """What is listed of a run, by column."""
    first = next(iter(run.results.values()), None)
    best = run.best or first
    value, clips = run.knn
    knn = f"kNN {100 * value:.1f} % of {counted(clips, 'clip')}" if clips else ""
    data = run.config.get("data", first.data.name if first else "")
    preset, model = run.config.get("preset"), run.config.get("model")
    shown = [str(x) for x in (preset, model) if x] or [first.model.name if first else ""]
    name = run.folder.relative_to(top) if run.folder != top else run.folder
    return {
        "run": str(name),
        "data": ", ".join(map(str, data)) if isinstance(data, list) else str(data),
        "preset, model": ", ".join(shown),
        "steps": f"{run.step}/{run.steps or '?'}" if run.config else "",
        "state": run.state,
        "loss": "" if run.loss is None else f"{run.loss:.4g}",
        "score": score_in_words(best) if best else knn,
        "report": ", ".join(reports_of(run)),
    }


def reports_of(run: Run) -> list[str]:
    """The reports in its folders, from the run's folder on."""
    found = [folder / "report.html" for folder in dict.fromkeys((run.folder, *run.results))]
    return [os.path.relpath(path, run.folder) for path in found if os.path.isfile(path)]


def print_rows(rows: list[dict[str, str]]) -> None:
    """Print a table, every cell cut to a length that a screen can hold."""
    cells = [[for_screen(value, 44) for value in row.values()] for row in rows]
    table = [list(rows[0]), *cells]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())


def differences(ours: dict, theirs: dict) -> list[dict[str, str]]:
    """The settings in which two runs differ, as rows."""
    names = sorted((ours.keys() | theirs.keys()) - set(OWN))
    show = lambda values, name: repr(values[name]) if name in values else "-"
    return [
        {"setting": name, "first": show(ours, name), "second": show(theirs, name)}
        for name in names
        if show(ours, name) != show(theirs, name)
    ]


def paired(ours: Path, theirs: Path) -> str:
    """The difference in accuracy of two evaluations on the same videos, in words.

    Args:
        ours: a folder of results with scores.csv.
        theirs: another one.

    Raises:
        ValueError: one has no scores, or they are of different videos or classes.
    """
    import numpy as np

    from downstream.fusion import read_scores
    from downstream.metrics import paired_difference

    hits: list[dict[str, bool]] = []
    labels: list[dict[str, str]] = []
    people: dict[str, str | None] = {}
    for folder in (ours, theirs):
        classes, parts, _ = read_scores(folder)
        if "test" not in parts:
            raise ValueError(f"no paired difference: {folder} has no scores of a test split")
        test = parts["test"]
        best = [classes[i] for i in test.probabilities.argmax(1)]
        hits.append({s: b == t for s, b, t in zip(test.sources, best, test.labels, strict=True)})
        labels.append(dict(zip(test.sources, test.labels, strict=True)))
        people |= dict(zip(test.sources, test.subjects, strict=True))
    if labels[0] != labels[1]:
        both = len(labels[0].items() & labels[1].items())
        raise ValueError(
            f"no paired difference: they scored {len(labels[0])} and {len(labels[1])} videos, of "
            f"which {both} are the same with the same label"
        )
    sources = sorted(hits[0])
    difference = np.array([float(hits[0][s]) - float(hits[1][s]) for s in sources])
    mean, low, high = paired_difference(difference, [people[s] for s in sources], seed=0)
    stands = "the first is better" if low > 0 else "the second is better" if high < 0 else ""
    return (
        f"first minus second: {100 * mean:+z.1f} points, 95 % interval {100 * low:+z.1f} to "
        f"{100 * high:+z.1f}, on the same {counted(len(sources), 'video')}: "
        f"{stands or 'not shown which is better'}"
    )


# --------------------------------------------------------------------------------------- main


def run_below(name: str, most: int) -> Run:
    """The run, or the results, in a folder that was named.

    Raises:
        ValueError: there is no such folder, or neither in it.
    """
    folder = Path(name)
    if not is_folder(name):
        raise ValueError(f"no run at {name!r} ({no_folder(name)})")
    runs = [r for r in read_runs(find_folders(folder, most)[0]) if r.folder == folder]
    if not runs:
        raise ValueError(f"{name} holds neither a run (config.json) nor results (results.json)")
    return runs[0]


def pairs_of(first: Run, second: Run) -> list[str]:
    """The paired differences of all evaluations of two runs under the same protocol, in words."""
    pairs = []
    for ours, results in first.results.items():
        for theirs, others in second.results.items():
            if results.recipe == others.recipe and results.protocol == others.protocol:
                try:
                    words = paired(ours, theirs)
                except ValueError as error:
                    words = str(error)
                pairs.append(f"{results.recipe}, {ours.name} and {theirs.name}: {words}")
    return pairs


def compare(names: tuple[str, str], most: int, as_json: bool) -> list[dict]:
    """Print in what two runs differ and how they score; returns the settings that differ."""
    first, second = (run_below(name, most) for name in names)
    rows, pairs = differences(first.config, second.config), pairs_of(first, second)
    if as_json:
        about = [row_of(run, run.folder) for run in (first, second)]
        print(json.dumps({"runs": about, "settings": rows, "pairs": pairs}, indent=1))
        return rows
    for run, which in ((first, "first "), (second, "second")):
        print(for_screen(f"{which}  {run.folder}"))
        for problem in run.problems:
            print(for_screen(f"        {problem}"))
    print()
    if rows:
        print_rows(rows)
    elif first.config and second.config:
        print("the settings are the same")
    if first.fingerprint != second.fingerprint and first.fingerprint and second.fingerprint:
        print("they were trained on different data (other fingerprints)")
    print_rows([row_of(run, run.folder) for run in (first, second)])
    for words in pairs or ["no evaluations under the same protocol: nothing to pair"]:
        print(for_screen(words))
    return rows


def main(config: Config) -> list[dict]:
    """List runs, or compare two."""
    if config.compare:
        return compare(config.compare, config.most, config.json)
    top = Path(config.folder)
    if not is_folder(config.folder):
        raise ValueError(f"no folder of runs at {config.folder!r} ({no_folder(config.folder)})")
    folders, left = find_folders(top, config.most)
    runs = read_runs(folders)
    rows = [row_of(run, top) for run in runs]
    problems = [p for run in runs for p in run.problems] + left
    if config.json:
        print(json.dumps({"runs": rows, "problems": problems}, indent=1))
        return rows
    if rows:
        print_rows(rows)
    else:
        print(for_screen(f"no runs in {top}; muybridge demo makes one"))
    for problem in problems:
        print(for_screen(f"note: {problem}", 400))
    return rows


if __name__ == "__main__":
    cli(main, Config)
