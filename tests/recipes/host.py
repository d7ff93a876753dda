"""Functions in processes forked from one that has imported everything, to save the imports.

`serve` serves jobs, a line of JSON each, until standard input ends. `python -m tests.recipes.host
MODULE FUNCTION JSON` calls one function in this process, as torchrun starts it.
"""

import importlib
import json
import math
import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.distributed import TCPStore

from tests.recipes.runs import configure

# What recipes import late, and takes seconds.
LATE = ("open_clip", "torch._dynamo", "transformers.models.videomae.modeling_videomae")
SECONDS = 900.0  # for a job
GRACE = 60.0  # for the others once one has failed, before they are killed as torchrun does


def train(recipe: str, given: dict[str, Any], plan: dict[str, Any]) -> None:
    """Run a recipe and let planned things happen to it.

    Args:
        recipe: its module.
        given: the fields of its configuration.
        plan: what happens, and to which `rank` (0): `die_in_step`, `kill_worker_in_step`,
            `nan_in_step`, `die_in_save`: the number of the step; `die_in_operation`: of the
            operation on the disk, with the names of all of them written to `operations` at the end;
            `die_at_moment`: of its saves (`die_at`); `hashes`: a folder, to which those of the
            weights after each step go; `group`: a file for the number of its process group, which
            is its own; `sizes`: a folder, for the bytes of the largest file that
            each process wrote, and of what it read of checkpoints.
    """
    from pretrain import log, weights
    from pretrain.sharded import Parts

    module = importlib.import_module(recipe)
    rank, count = os.environ.get("RANK", "0"), 0
    hashes: list[str] = []
    mine = rank == plan.get("rank", "0")
    real_step, real_save = module.train_step, weights.save_file

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def step(model: torch.nn.Module, *args: Any) -> Any:
        nonlocal count
        count += 1
        if mine and count == plan.get("die_in_step"):
            die()
        if mine and count == plan.get("kill_worker_in_step"):
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        spoil = None
        if mine and count == plan.get("nan_in_step"):
            spoil = model.register_forward_hook(lambda _, __, out: (out[0] * math.nan, *out[1:]))
        result = real_step(model, *args)
        if spoil:
            spoil.remove()
        if "hashes" in plan:
            hashes.append(weights.weights_hash(model))
            Path(plan["hashes"], f"hashes-{rank}.json").write_text(json.dumps(hashes))
        return result

    def save_file(tensors: dict[str, torch.Tensor], path: Path, *about: dict[str, str]) -> None:
        real_save(tensors, path, *about)
        if plan.get("die_in_save", count + 1) <= count and "optimizer" in str(path):
            os.truncate(path, 100)
            die()

    if "group" in plan:
        os.setsid()
        Path(plan["group"]).write_text(str(os.getpid()))
    if mine and "die_at_moment" in plan:
        die_at(plan["die_at_moment"])
    if "sizes" in plan:
        count_bytes(Path(plan["sizes"], f"{rank}.json"), Parts, weights)
    operations: list[str] = []

    def counted(
        name: str, real: Callable, before: Callable[..., None] = lambda *_: None
    ) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            operations.append(name)
            if len(operations) == plan.get("die_in_operation"):
                before(*args)
                die()
            return real(*args, **kwargs)

        return call

    def half_a_line(run_log: log.RunLog, step: int, _: object) -> None:
        with open(run_log.path, "a") as file:
            file.write(f'{{"step": {step}, "lo')

    changes: dict[ModuleType, dict[str, Any]] = {
        module: {"train_step": step, "reconstruction_figure": lambda *_: ""},
        weights: {"save_file": save_file} if "die_in_save" in plan else {},
        log: {"curve_figure": lambda *_: ""},  # figures take longer than such runs
    }
    for place, replaced in changes.items():
        for name, value in replaced.items():
            setattr(place, name, value)
    if "operations" in plan:
        for name in ("replace", "fsync", "mkdir"):
            setattr(os, name, counted(name, getattr(os, name)))
        setattr(log.RunLog, "write", counted("log", log.RunLog.write, half_a_line))  # noqa: B010
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    module.main(configure(module.Config, **values))
    if "operations" in plan:
        Path(plan["operations"]).write_text(json.dumps(operations))


def die_at(moment: int) -> None:
    """Let this process die at the n-th moment of its saves.

    These are the ones before and after it writes, syncs, renames or removes something, or hears of
    the others, and the one when it has written half a file.
    """
    from pretrain import saving, weights

    seen = 0

    def pass_moment(half: Path | None = None) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            if half:
                os.truncate(half, half.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(real: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            pass_moment()
            result = real(*args, **kwargs)
            if real.__name__ == "save_file":
                pass_moment(args[1])
            pass_moment()
            return result

        return call

    for place, name in (
        (weights, "save_file"), (weights, "sync"), (saving, "sync"), (saving, "remove"),
        (os, "replace"),
    ):  # fmt: skip
        setattr(place, name, watched(getattr(place, name)))
    changed: Any = torch.distributed
    real = changed.all_gather
    asked = watched(real)

    def all_gather(*args: Any, group: Any = None, **more: Any) -> Any:
        return (asked if group else real)(*args, group=group, **more)

    changed.all_gather = all_gather


def count_bytes(path: Path, parts: Any, weights: Any) -> None:
    """Note how much of checkpoints this process writes at once, and reads, to a file."""
    sizes = {"wrote": 0, "read": 0}
    real_save, real_read = weights.save_file, parts.read

    def save_file(tensors: dict[str, torch.Tensor], file: Path, *about: Any) -> None:
        if "checkpoints" in file.parts:  # and no export
            sizes["wrote"] = max(sizes["wrote"], weights.size_of(tensors.values()))
            path.write_text(json.dumps(sizes))
        real_save(tensors, file, *about)

    def read(*given: Any) -> torch.Tensor:
        found = real_read(*given)
        sizes["read"] += weights.size_of([found])
        return found

    weights.save_file, parts.read = save_file, read


def command(words: list[str]) -> None:
    """Run a recipe as `python recipes/NAME.py ...` does, without another import of everything."""
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def call(module: str, function: str, arguments: list[Any]) -> int:
    """Call a function; returns the exit status of a program that does so."""
    try:
        getattr(importlib.import_module(module), function)(*arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def child(job: dict[str, Any], rank: int, port: int) -> int:
    """One process of a job; its output goes to the job's files."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(job["environment"])
    if job["processes"] > 1:
        # As under torchrun: the store is the launcher's.
        about = {
            "WORLD_SIZE": job["processes"], "LOCAL_WORLD_SIZE": job["processes"], "RANK": rank,
            "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
        }  # fmt: skip
        os.environ.update({key: str(value) for key, value in about.items()})
    status = call(job["module"], job["function"], job["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def run(job: dict[str, Any]) -> int:
    """Run a job in its processes; returns the first exit status that is not 0."""
    importlib.import_module(job["module"])
    if job["function"] == "train":
        importlib.import_module(job["arguments"][0])
    several = job["processes"] > 1
    reading, writing = os.pipe()
    running = set()
    for rank in range(job["processes"]):
        if (pid := os.fork()) == 0:
            os._exit(child(job, rank, int(os.read(reading, 8)) if several else 0))
        running.add(pid)
    # After the forks: its thread may hold a lock, for which a process forked meanwhile would wait.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if several else None
    if store:
        os.write(writing, b"%8d" % store.port * job["processes"])
    os.close(reading)
    os.close(writing)
    first, end = 0, time.monotonic() + SECONDS
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                first = first or os.waitstatus_to_exitcode(status)
                if first:
                    end = min(end, time.monotonic() + GRACE)
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return first


def serve() -> None:
    """Serve jobs until standard input ends."""
    setattr(os, "fsync", os.fstat)  # noqa: B010  # as in tests/conftest.py
    for line in sys.stdin:
        for name in LATE:
            importlib.import_module(name)
        print(run(json.loads(line)), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    module, function, arguments = sys.argv[1:]
    sys.exit(call(module, function, json.loads(arguments)))
