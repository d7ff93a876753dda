"""Runs of a recipe: what came of them, and in processes of their own, killed as planned and started again."""

import dataclasses
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

DRIVER = """
import importlib, json, multiprocessing, os, signal, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from pretrain import log, weights
recipe = importlib.import_module({recipe!r})
given = json.loads(sys.argv[1])
cfg = recipe.Config(**{{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}})
plan = json.loads(sys.argv[2])
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
real_step, real_save, count, hashes = recipe.train_step, weights.save_file, [0], []
rank = os.environ.get("RANK", "0")
def step(model, *args):
    count[0] += 1
    mine = rank == plan.get("rank", "0")
    if count[0] == plan.get("die_in_step") and mine:
        die()
    if count[0] == plan.get("kill_worker_in_step") and mine:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    spoil = None
    if count[0] == plan.get("nan_in_step") and mine:
        spoil = next(model.parameters()).register_hook(lambda g: g * float("nan"))
    result = real_step(model, *args)
    if spoil:
        spoil.remove()
    if plan.get("hashes"):
        hashes.append(weights.weights_hash(model))
        with open(plan["hashes"] + "/hashes-" + rank + ".json", "w") as file:
            json.dump(hashes, file)
    return result
def save_file(tensors, path):
    real_save(tensors, path)
    if plan.get("die_in_save") and count[0] >= plan["die_in_save"] and "optimizer" in str(path):
        with open(path, "r+b") as file:
            file.truncate(100)
        die()
recipe.train_step, weights.save_file = step, save_file
recipe.draw_figure = log.curve_figure = lambda *_: ""  # which take longer than such runs
recipe.main(cfg)
"""


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
    """Let a recipe that runs in this process note at each step in which modes its model's parts are (True: training)."""
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


def write_driver(tmp_path: Path, cfg) -> Path:
    """A script that runs the recipe whose configuration `cfg` is."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER.format(root=str(ROOT), recipe=type(cfg).__module__))
    return script


def torchrun(processes: int) -> list[str]:
    """How a script is started in several processes, on a port that is free."""
    alone = ["--standalone", "--local-addr", "localhost"]
    return ["-m", "torch.distributed.run", *alone, "--nproc-per-node", str(processes)]


def wait_until(process: subprocess.Popen, happened: Callable[[], object]) -> None:
    """Wait for what a process does, however busy the machine; started in a group of its own, which ends if it does not."""
    end = time.monotonic() + 300
    while not happened():
        if process.poll() is not None or time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(process.communicate())
        time.sleep(0.05)


def launch(tmp_path: Path, cfg, plan: dict, processes: int = 1) -> subprocess.CompletedProcess:
    """Run the recipe in processes of its own."""
    script = write_driver(tmp_path, cfg)
    start = [sys.executable, *(torchrun(processes) if processes > 1 else [])]
    command = [*start, str(script), json.dumps(dataclasses.asdict(cfg)), json.dumps(plan)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=environment, check=False
    )


def run_calm_and_harried(tmp_path: Path, cfg, plans: list[dict], processes: int) -> None:
    """Run once undisturbed as tmp_path/calm, and once killed as planned and started again as /harried."""
    calm = dataclasses.replace(cfg, out=str(tmp_path / "calm"))
    done = launch(tmp_path, calm, {}, processes)
    assert done.returncode == 0, done.stderr[-2000:]
    harried = dataclasses.replace(cfg, out=str(tmp_path / "harried"))
    for plan in plans:
        killed = launch(tmp_path, harried, plan, processes)
        assert killed.returncode != 0, (plan, killed.stdout[-500:])
    done = launch(tmp_path, harried, {}, processes)
    assert done.returncode == 0, done.stderr[-2000:]
