"""Runs of a recipe: their results; runs in other processes, killed as planned and started again."""

import atexit
import dataclasses
import functools
import importlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pretrain import checkpoint
from pretrain.flags import flat
from pretrain.flags import replace as change
from pretrain.sharded import Parts
from tests import forked

ROOT = Path(__file__).parents[2]

# Takes a folder for itself until its standard input ends.
BESIDE = """
import sys
from pathlib import Path
from pretrain.folders import claim
lock = claim(Path(sys.argv[1]))
print("mine", flush=True)
sys.stdin.read()
"""


def configure(kind: type[Any], *values: Any, **named: Any) -> Any:
    """A recipe's configuration from values by flag, whatever group they are in."""
    own = {f.name for f in dataclasses.fields(kind)}
    fits = {k: v for k, v in named.items() if k in own}
    return change(kind(*values, **fits), **{k: v for k, v in named.items() if k not in own})


def flags_of(name: str) -> ModuleType:
    """The module that holds a recipe's flags: of recipes/options/, or the recipe itself."""
    apart = (ROOT / "recipes" / "options" / f"{name}.py").exists()
    return importlib.import_module(f"recipes.{'options.' * apart}{name}")


def stop_in_step(
    monkeypatch: pytest.MonkeyPatch,
    recipe: ModuleType,
    nth: int,
    number: signal.Signals = signal.SIGINT,
) -> None:
    """Let a recipe that runs in this process get a signal in the `nth` of its steps."""
    real, count = recipe.train_step, 0

    def step(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == nth:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(recipe, "train_step", step)


def modes_in_steps(monkeypatch: pytest.MonkeyPatch, recipe: ModuleType) -> list[set[bool]]:
    """The modes of a model's parts (True: training) at each step of a recipe in this process."""
    real, modes = recipe.train_step, []

    def step(model: torch.nn.Module, *args: Any) -> Any:
        modes.append({part.training for part in model.modules()})
        return real(model, *args)

    monkeypatch.setattr(recipe, "train_step", step)
    return modes


def final_weights(run: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint, the optimizers' too."""
    folder = checkpoint.checkpoints(Path(run))[0]
    found = {}
    for kind in ("model", "optimizer"):
        parts = Parts(folder.glob(f"{kind}*"))
        for name, like in parts.tensors.items():
            found[name] = parts.read(name, 0, like.numel()).reshape(like.shape)
    return found


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two dicts of tensors are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def opens_data(recipe: Any) -> str:
    """The function with which a recipe opens its data, or all of them, to be replaced in tests."""
    return "open_all" if hasattr(recipe, "open_all") else "open_data"


def arguments(cfg: Any, plan: dict[str, Any]) -> list[Any]:
    """The arguments of `host.train` for the recipe with the configuration `cfg`."""
    return [type(cfg).__module__.replace(".options.", "."), flat(cfg), plan]


def program(cfg: Any) -> list[str]:
    """The interpreter's arguments that run a recipe by itself, without a plan."""
    given = json.dumps(arguments(cfg, {}))
    return ["-m", "tests.recipes.host", "tests.recipes.host", "train", given]


def wait_until(process: subprocess.Popen, happened: Callable[[], object]) -> None:
    """Wait for what a process does, or kill its process group after five minutes."""
    end = time.monotonic() + 300
    while not happened():
        if process.poll() is not None or time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(process.communicate())
        time.sleep(0.05)


@functools.cache
def host() -> subprocess.Popen:
    """The process from which others are forked; itself a fork, it ends with this one."""
    serve = importlib.import_module("tests.recipes.host").serve
    started = forked.start(
        serve, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    atexit.register(started.communicate)
    return started


def in_processes(
    folder: Path,
    processes: int,
    module: str,
    function: str,
    *given: Any,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Call a function in processes that form a group of torch.distributed; they may die.

    Args:
        folder: for their output.
        processes: how many.
        module: that of the function.
        function: its name.
        given: its arguments, which JSON can represent.
        environment: what a launcher sets besides.
    """
    files = {name: str(folder / f"{name}.txt") for name in ("stdout", "stderr")}
    for name in files.values():
        Path(name).unlink(missing_ok=True)
    about = {"module": module, "function": function, "arguments": given, "processes": processes}
    ours = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    about["environment"] = ours | (environment or {})
    asked, answers = host().stdin, host().stdout
    assert asked and answers
    print(json.dumps(about | files), file=asked, flush=True)
    status = int(answers.readline())
    said = (Path(name).read_text() for name in files.values())
    return subprocess.CompletedProcess([module, function], status, *said)


def launch(
    tmp_path: Path,
    cfg: Any,
    plan: dict[str, Any],
    processes: int = 1,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Run the recipe in processes of its own."""
    tmp_path.mkdir(exist_ok=True)
    given = arguments(cfg, plan)
    return in_processes(
        tmp_path, processes, "tests.recipes.host", "train", *given, environment=environment
    )


def run_calm_and_harried(
    tmp_path: Path, cfg: Any, plans: list[dict[str, Any]], processes: int
) -> None:
    """Run once undisturbed as tmp_path/calm, once killed as planned and restarted as /harried."""
    calm = change(cfg, out=str(tmp_path / "calm"))
    done = launch(tmp_path, calm, {}, processes)
    assert done.returncode == 0, done.stderr[-2000:]
    harried = change(cfg, out=str(tmp_path / "harried"))
    for plan in plans:
        killed = launch(tmp_path, harried, plan, processes)
        assert killed.returncode != 0, (plan, killed.stdout[-500:])
    done = launch(tmp_path, harried, {}, processes)
    assert done.returncode == 0, done.stderr[-2000:]
