"""The lowest versions that pyproject.toml admits: each dependency has one, and the recipes run with
them all.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DATASET = (
    "from pretrain.data.synthetic import make_dataset as make;"
    "make('dataset', 180, size=48, frames=20)"
)
# Each decodes, trains, or calls another library in a way of its own.
COMMANDS = (
    "pack.py --data dataset/clips.csv --out pack",
    "videomae.py --data pack --steps 2 --batch-size 8 --micro-batch 8 --positions flat "
    "--motion-tokens 1 --out run",
    "linear_probe.py --backbone run/backbone --data pack",
    "convert.py --source run --to hf --out hf",
    "finetune.py --model lstm --data pack --steps 2 --out tuned",
    "predict.py --backbone tuned/backbone --video dataset/clips --out answers",
    "clip.py --data pack --steps 2 --batch-size 16 --micro-batch 16 --out pair",
)


def lowest() -> dict[str, str]:
    """Package -> the lowest version that is admitted."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = map(Requirement, about["project"]["dependencies"])
    return {
        r.name: next((s.version for s in r.specifier if s.operator == ">="), "")
        for r in wanted
        if not r.marker or r.marker.evaluate()
    }


def smoke(python: Path, folder: Path) -> None:
    """Pack, train, probe, convert, fine-tune and predict in two steps each."""
    given = {
        "PYTHONPATH": str(ROOT),
        "MUYBRIDGE_CACHE": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    for words in (["-c", DATASET], *(f"{ROOT}/recipes/{command}".split() for command in COMMANDS)):
        run = subprocess.run(
            [python, *words], cwd=folder, env=os.environ | given, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert run.returncode == 0, (words, run.stderr[-2000:])


def test_every_dependency_has_a_lower_bound():
    assert not [name for name, version in lowest().items() if not version]


@pytest.mark.slow
def test_the_lowest_versions_run(tmp_path):
    """Installs some 6 GB from the registry, and removes them."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pins = [f"{name}=={version}" for name, version in lowest().items()]
    try:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pins], check=True)
        smoke(python, tmp_path)
    finally:
        shutil.rmtree(tmp_path / "venv")
