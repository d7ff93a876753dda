"""The same run by every engine: losses, gradient norms, checkpoints, skipped steps."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from downstream.models import load_backbone
from pretrain import checkpoint
from tests.recipes.golden import CASES, DATA
from tests.recipes.runs import change, configure, equal, final_weights, launch

# Processes, and what `accelerate launch` tells them.
ENGINES: dict[str, tuple[int, dict[str, str]]] = {
    "one": (1, {}),
    "ddp": (2, {}),
    "fsdp2": (2, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
}
FSDP2_OF_4 = (4, ENGINES["fsdp2"][1])
# No chance but that of clips and crops, whose order is one for any processes.
CALM: dict[str, dict[str, Any]] = {
    "videomae": {"optimizer": "muon", "mask": "random", "base_lr": 0.01, "clip_grad": 0.1},
    "clip": {"base_lr": 0.001, "loss": "siglip"},
    "finetune": {
        "mixup": 0.0, "dropout": 0.0, "rand_augment": None, "base_lr": 0.003, "val": "hold-out",
        "val_every": 6,
    },
}  # fmt: skip
STEPS = 12


def config(case: str, out: Path, **more: Any) -> Any:
    recipe, values = CASES[case]
    module = importlib.import_module(f"recipes.{recipe}")
    data = (DATA,) if recipe == "clip" else "synthetic:216" if recipe == "finetune" else DATA
    base = module.Config() if recipe == "finetune" else configure(module.Config, preset="golden")
    own = {"steps": STEPS, "warmup": 2 / STEPS, "save_every": 4}
    return change(base, data=data, out=str(out), **(values | CALM[case] | own | more))


def train(
    case: str, out: Path, engine: tuple[int, dict[str, str]], plan: dict | None = None, **more: Any
) -> list[dict]:
    """The lines of the log of a run by an engine; a run that was to die has them too."""
    processes, environment = engine
    done = launch(out.parent, config(case, out, **more), plan or {}, processes, environment)
    dies = plan and "die_in_step" in plan
    assert (done.returncode != 0) == bool(dies), done.stdout[-1000:] + done.stderr[-3000:]
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def far(found: list[dict], expected: list[dict]) -> float:
    """The largest difference of losses, and of gradient norms above 1 in proportion to them."""
    assert len(found) == len(expected) == STEPS
    return max(
        abs(a[name] - b[name]) / max(1, abs(b[name]))
        for a, b in zip(found, expected, strict=True)
        for name in ("loss", "grad_norm")
    )


@pytest.mark.parametrize(
    "case", ["videomae", "clip", pytest.param("finetune", marks=pytest.mark.slow)]
)
def test_every_engine_trains_alike(case, tmp_path):
    one = train(case, tmp_path / "one", ENGINES["one"])
    assert max(line["grad_norm"] for line in one) > 1e-3
    for name in ("ddp", "fsdp2") if case == "finetune" else ("fsdp2",):
        lines = train(case, tmp_path / name, ENGINES[name])
        assert far(lines, one) < 1e-6
        assert "2 x" in (tmp_path / "stdout.txt").read_text()
        assert final_weights(tmp_path / name).keys() == final_weights(tmp_path / "one").keys()
        if case != "finetune":  # which loads and tests its own
            backbone = load_backbone(str(tmp_path / name / "backbone"))
            assert all(p.isfinite().all() for p in backbone.parameters())


def test_a_sharded_run_that_is_killed_continues_to_the_bit_and_on_other_processes(tmp_path):
    fsdp2 = ENGINES["fsdp2"]
    calm = train("videomae", tmp_path / "calm", fsdp2)
    train("videomae", tmp_path / "harried", fsdp2, {"die_in_step": 7, "rank": "1"})
    harried = train("videomae", tmp_path / "harried", fsdp2)
    assert equal(final_weights(tmp_path / "harried"), final_weights(tmp_path / "calm"))
    assert far(harried, calm) == 0
    # On two, then on one, then on four.
    train("videomae", tmp_path / "moved", fsdp2, {"die_in_step": 6, "rank": "1"})
    train("videomae", tmp_path / "moved", ENGINES["one"], {"die_in_step": 6})
    moved = train("videomae", tmp_path / "moved", FSDP2_OF_4)
    assert far(moved, calm) < 1e-6


def test_a_gradient_not_finite_on_one_process_of_two_skips_the_step_on_both(tmp_path):
    plan = {"nan_in_step": 3, "rank": "1"}
    ddp, fsdp2 = (train("videomae", tmp_path / n, ENGINES[n], plan) for n in ("ddp", "fsdp2"))
    for name, lines in (("ddp", ddp), ("fsdp2", fsdp2)):
        assert [n for n, line in enumerate(lines, 1) if math.isnan(line["loss"] or math.nan)] == [3]
        found, _ = checkpoint.newest_valid(tmp_path / name)
        assert checkpoint.read_state(found)["skipped"] == 1
    finite = [[line for i, line in enumerate(run) if i != 2] for run in (ddp, fsdp2)]
    for a, b in zip(*finite, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
