"""Runs of a recipe: what came of them, and in processes of their own, killed as planned and started
again.
"""

import atexit
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from pretrain import checkpoint
from pretrain.flags import flat
from pretrain.flags import replace as change

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


def configure(kind, *values, **named):
    """A recipe's configuration from values by flag, whatever group they are in."""
    own = {f.name for f in dataclasses.fields(kind)}
    fits = {k: v for k, v in named.items() if k in own}
    return change(kind(*values, **fits), **{k: v for k, v in named.items() if k not in own})


def stop_in_step(monkeypatch, recipe, nth: int, number: signal.Signals = signal.SIGINT) -> None:
    """Let a recipe that runs in this process get a signal in the `nth` of its steps."""
    real, count = recipe.train_step, 0

    def step(*args):
        nonlocal count
        count += 1
        if count == nth:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(recipe, "train_step", step)


def modes_in_steps(monkeypatch, recipe) -> list[set[bool]]:
    """Let a recipe that runs in this process note at each step in which modes its model's parts are
    (True: training).
    """
    real, modes = recipe.train_step, []

    def step(model, *args):
        modes.append({part.training for part in model.modules()})
        return real(model, *args)

    monkeypatch.setattr(recipe, "train_step", step)
    return modes


def final_weights(run: str | Path) -> dict:
    """All tensors of a run's last checkpoint, the optimizers' too."""
    folder = checkpoint.checkpoints(Path(run))[0]
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def equal(a: dict, b: dict) -> bool:
    """Whether two dicts of tensors are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def arguments(cfg, plan: dict) -> list:
    """Those of `host.train` for the recipe whose configuration `cfg` is."""
    return [type(cfg).__module__, flat(cfg), plan]


def program(cfg) -> list[str]:
    """The command that runs a recipe by itself, without a plan, behind the interpreter's name."""
    given = json.dumps(arguments(cfg, {}))
    return ["-m", "tests.recipes.host", "tests.recipes.host", "train", given]


def wait_until(process: subprocess.Popen, happened: Callable[[], object]) -> None:
    """Wait for what a process does, however busy the machine; started in a group of its own, which
    ends if it does not.
    """
    end = time.monotonic() + 300
    while not happened():
        if process.poll() is not None or time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(process.communicate())
        time.sleep(0.05)


@functools.cache
def host() -> subprocess.Popen:
    """The process from which others are forked; it ends with this one."""
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.recipes.host"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    atexit.register(started.communicate)
    return started


def in_processes(
    folder: Path, processes: int, module: str, function: str, *given
) -> subprocess.CompletedProcess:
    """Call a function in processes that form a group of torch.distributed; they may die.

    Args:
        folder: for what they say.
        processes: how many.
        module: that of the function.
        function: its name.
        given: its arguments, as JSON can hold them.
    """
    files = {name: str(folder / f"{name}.txt") for name in ("stdout", "stderr")}
    for name in files.values():
        Path(name).unlink(missing_ok=True)
    about = {"module": module, "function": function, "arguments": given, "processes": processes}
    print(json.dumps(about | files), file=host().stdin, flush=True)
    status = int(host().stdout.readline())
    said = (Path(name).read_text() for name in files.values())
    return subprocess.CompletedProcess([module, function], status, *said)


def launch(tmp_path: Path, cfg, plan: dict, processes: int = 1) -> subprocess.CompletedProcess:
    """Run the recipe in processes of its own."""
    tmp_path.mkdir(exist_ok=True)
    return in_processes(tmp_path, processes, "tests.recipes.host", "train", *arguments(cfg, plan))


def run_calm_and_harried(tmp_path: Path, cfg, plans: list[dict], processes: int) -> None:
    """Run once undisturbed as tmp_path/calm, and once killed as planned and started again as
    /harried.
    """
    calm = change(cfg, out=str(tmp_path / "calm"))
    done = launch(tmp_path, calm, {}, processes)
    assert done.returncode == 0, done.stderr[-2000:]
    harried = change(cfg, out=str(tmp_path / "harried"))
    for plan in plans:
        killed = launch(tmp_path, harried, plan, processes)
        assert killed.returncode != 0, (plan, killed.stdout[-500:])
    done = launch(tmp_path, harried, {}, processes)
    assert done.returncode == 0, done.stderr[-2000:]
