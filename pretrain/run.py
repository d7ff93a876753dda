"""A training run on the disk: whose folder it is, and how it continues."""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeGuard

import torch
from accelerate import Accelerator
from filelock import FileLock

from pretrain import checkpoint, log
from pretrain.files import read_json
from pretrain.flags import flag, flat
from pretrain.folders import claim, holds_nothing, try_folder
from pretrain.names import counted, for_screen
from pretrain.processes import is_first
from pretrain.settings import RunSettings
from pretrain.tracking import refuse_missing

# What a run has in its folder before its first checkpoint.
BEGINNINGS = (
    "config.json", "log.jsonl", "data_errors.jsonl", "tensorboard", "wandb", "track.json",
    "checkpoints", "best", "report.html", "curve.png", "reconstruction.png",
)  # fmt: skip
# What may change when a run is continued, since it decides no number.
FREE = {
    "out",
    "given",
    "reasons",
    "num_workers",
    "cache_gib",
    *(field.name for field in fields(RunSettings)),
}


def try_run(run: Path, config: Any, may_change: set[str]) -> None:
    """Find out early, in the main process, whether a folder may hold a run as it is asked for.

    `open_run`, after the data, knows these too.

    Args:
        run: the folder.
        config: the resolved configuration, a dataclass with `run`, its `RunSettings`.
        may_change: see `open_run`.

    Raises:
        ValueError: it holds something else, a run of another configuration, or nothing to continue
            though that is asked for; it cannot be written to; or the package of --track is not
            installed.
    """
    try_place(run, config.run)
    if is_first():
        _refuse_other_work(run, config, None, may_change)


def try_place(run: Path, settings: RunSettings) -> None:
    """Find out what `try_run` does that needs no resolved configuration.

    Args:
        run: the folder.
        settings: of the run.

    Raises:
        ValueError: the folder holds something that is not a run, or nothing to continue though that
            is asked for; it cannot be written to; or the package of --track is not installed.
    """
    if not is_first():
        return
    if settings.track:
        refuse_missing(settings.track)
    try_folder(run)
    _describe_run(run)
    _refuse_no_checkpoint(run, settings)


def _refuse_no_checkpoint(run: Path, settings: RunSettings) -> None:
    if settings.resume and not checkpoint.checkpoints(run):
        raise ValueError(f"--resume: {run} holds no checkpoint to continue from")


def open_run(
    run: Path,
    config: Any,
    data: dict,
    may_change: set[str],
    accelerator: Accelerator,
) -> tuple[FileLock | None, dict]:
    """Take a folder for a run: nothing else may be in it, nor run in it until this ends.

    The main process does so for all; the others wait for its word and end without one of their own
    where the folder is refused.

    Args:
        run: the folder.
        config: the resolved configuration, a dataclass with `run`, its `RunSettings`.
        data: what identifies the data: `data_fingerprint` and `num_clips`.
        may_change: names of further values that do not decide the numbers, beside `FREE`.
        accelerator: the processes of this launch.

    Returns:
        the lock, which the main process releases at the end; and what config.json is to say, see
        `begin_run`, to be kept in the state of the run, from which a damaged config.json is written
        again.

    Raises:
        ValueError: the folder holds something else, a run of another configuration or of other
            data, or nothing to continue though that was asked for; it cannot be written to, or
            another process trains there.
    """
    lock: FileLock | None = None
    described: dict[str, Any] = {}
    refusal: ValueError | None = None
    if accelerator.is_main_process:
        try:
            _refuse_other_work(run, config, data, may_change)
            lock = claim(run)
            # Again, for it may have changed before it was ours.
            described, note = _refuse_other_work(run, config, data, may_change)
            if note:
                print(f"warning: {for_screen(note)}", file=sys.stderr, flush=True)
            if not described:
                described = {"config": flat(config), **data, "command": sys.argv}
        except ValueError as error:
            refusal = error
    refused = torch.tensor(float(refusal is not None), device=accelerator.device)
    if accelerator.reduce(refused).item():
        if refusal:
            raise refusal
        sys.exit(2)  # the main process says why
    return lock, described


def begin_run(run: Path, described: dict, step: int) -> log.RunLog:
    """Open the log of a run and write its config.json, when nothing could refuse it any more.

    Args:
        run: the folder.
        described: as `open_run` gave it.
        step: steps already done.

    Raises:
        ValueError: see `RunLog`; or the disk does not take it.
    """
    run_log = log.RunLog(run, step)
    try:
        same = read_json(run / "config.json") == described
    except ValueError:  # missing, or damaged
        same = False
    if not same:
        log.write_json(run / "config.json", described)
    return run_log


def _refuse_other_work(
    run: Path, config: Any, data: dict | None, may_change: set[str]
) -> tuple[dict, str]:
    """The description of a run to continue, empty for a new one; and a note of what is damaged.

    `data` as `open_run` has them; None: not known yet.
    """
    old, note = _describe_run(run)
    differences = log.config_differences(old["config"], config, FREE | may_change) if old else []
    if old and data and old["data_fingerprint"] != data["data_fingerprint"]:
        differences.append(
            f"data: {counted(old['num_clips'], 'clip')}, fingerprint "
            f"{old['data_fingerprint'][:12]} -> {counted(data['num_clips'], 'clip')}, fingerprint "
            f"{data['data_fingerprint'][:12]}"
        )
    if differences and not checkpoint.checkpoints(run) and not _logged(run):
        return {}, f"{run} holds a run that came to no step; this one takes its place"
    if old and (gone := sorted(old["config"].keys() - flat(config).keys())):
        raise ValueError(
            f"{run} holds a run of another version of this recipe, which had "
            f"{', '.join(map(flag, gone))}: only that version continues it; give another --out to "
            "start anew, from its weights with --backbone if you like"
        )
    if differences:
        raise ValueError(
            f"{run} holds a run that differs ({'; '.join(differences)}): give the same values to "
            "continue it, or another --out to start anew; nothing was changed"
        )
    _refuse_no_checkpoint(run, config.run)
    return old, note


def _logged(run: Path) -> bool:
    """Whether a run here has logged a step, or has more than a run begins with."""
    path = run / "log.jsonl"
    return not holds_nothing(run, BEGINNINGS) or (path.exists() and bool(log.read_log(path)[0]))


def _describe_run(run: Path) -> tuple[dict, str]:
    """The description of a folder's run, empty where none has begun; and what is damaged of it.

    Raises:
        ValueError: the folder holds something else, or a run that nothing describes.
    """
    path = run / "config.json"
    occupied = ValueError(f"{run} holds something that is not a run: give another --out")
    note = ""
    if os.path.lexists(path):
        try:
            old = read_json(path)
        except ValueError as error:
            note = str(error)
        else:
            if _is_description(old):
                return old, ""
            if "config" not in old:
                raise occupied
            note = f"{path} is damaged: it does not describe a run"
    elif checkpoint.checkpoints(run):
        note = f"{path} is missing"
    found, _ = checkpoint.newest_valid(run)
    kept = checkpoint.read_state(found).get("run") if found else None
    if _is_description(kept):
        return kept, f"{note}; it is written again from what {found} says"
    if checkpoint.checkpoints(run):
        raise ValueError(
            f"{note}, and no checkpoint beside it says of what run: put the file back, or give "
            "another --out"
        )
    if not holds_nothing(run, BEGINNINGS):
        raise ValueError(f"{note}: put it back, or give another --out") if note else occupied
    return {}, f"{note}; there is no checkpoint yet: the run starts anew" if note else ""


def _is_description(content: object) -> TypeGuard[dict[str, Any]]:
    """Whether this is what `open_run` writes into config.json."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("config"), dict)
        and isinstance(content.get("data_fingerprint"), str)
        and type(content.get("num_clips")) is int
    )


def restore(run: Path, load: Callable[[Path], dict], state: dict, say: bool) -> dict:
    """Load the newest valid checkpoint of a run, if there is one.

    Args:
        run: the run's folder.
        load: puts a checkpoint into model and optimizers and returns its state: `Engine.load`.
        state: that of a run which begins.
        say: whether to print what was found.

    Returns:
        the state to go on from.

    Raises:
        ValueError: there are checkpoints and none of them verifies, or the state of the newest is
            of other kinds than a run's.
    """
    found, problems = checkpoint.newest_valid(run)
    for problem in problems if say else []:
        print(f"warning: {for_screen(problem)}; going back to an older one", file=sys.stderr)
    if found:
        loaded = load(found)
        for name, fresh in state.items():
            if name in loaded and not _same_kind(fresh, loaded[name]):
                raise ValueError(
                    f"{found}/state.json is damaged: {name} is {loaded[name]!r:.40}; remove that "
                    "folder, and the same command continues from an older checkpoint"
                )
        state = state | loaded
        if say:
            print(f"continuing from {found}\n", flush=True)
    elif problems:
        raise ValueError(f"{run} has no checkpoint that verifies; move its checkpoints folder away")
    return state


def _same_kind(fresh: object, found: object) -> bool:
    """Whether a value may replace `fresh` of a new run: a count, seconds, or nothing yet."""
    if type(fresh) is int:
        return type(found) is int and 0 <= found < 2**63
    if isinstance(fresh, dict):
        return isinstance(found, dict)
    if fresh is None:  # a loss, a score or several; a loss of a skipped step may be NaN
        numbers = list(found.values()) if isinstance(found, dict) else [found]
        return all(v is None or type(v) in (int, float) for v in numbers)
    return (type(found) is int or type(found) is float) and 0 <= found < math.inf
