"""Some seconds of fuzzing, and that it would notice: see run.py for more of it."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.run import fuzz
from tests.fuzz.targets import PLANTED, TARGETS

ROOT = Path(__file__).resolve().parents[2]


def told(findings: list[dict]) -> str:
    return "\n".join(
        f"{f['problem']}\n  again: python tests/fuzz/run.py --target {f['target']} --input "
        f"{f['kept']}"
        for f in findings
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("crash", "crash: exit status -11"),
        ("hang", "hang"),
        ("eat", "memory"),
        ("wrong_exception", "Error"),
        ("write_outside", "writes"),
        ("read_outside", "outside/secret"),
        ("run_something", "os.system"),
    ],
)
def test_a_planted_fault_is_found(tmp_path, name, words):
    assert name in PLANTED
    hang = 2 if name == "hang" else 60  # seconds
    _, (finding, *_) = fuzz([name], 60, 0, tmp_path, most=1, hang=hang)
    assert words in finding["problem"] and finding["target"] == name
    assert "a.json" in os.listdir(finding["kept"]) and not list(tmp_path.rglob("escaped"))
    # And the kept input shows it again.
    given = Path(finding["kept"])
    _, again = fuzz([name], 60, 0, tmp_path / "again", given=given, hang=hang)
    assert [words in f["problem"] for f in again] == [True]


def digests() -> list[str]:
    """What the first cases of some targets hold."""
    found = []
    for name in ("lists", "tars", "packs", "classes", "segments"):
        seeds = TARGETS[name].seeds()
        for number in range(50):
            case = TARGETS[name].case(seeds, random.Random(f"{name} 0 {number}"))
            written = repr(sorted(case.items())).encode()
            found.append(hashlib.sha256(written).hexdigest())
    return found


def test_a_case_is_a_function_of_target_seed_and_number():
    """And not of how Python hashes: in another process by another salt."""
    salt = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    other = subprocess.run(
        [sys.executable, "-c", "from tests.fuzz.test_fuzz import digests; print(*digests())"],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": salt},
    ).stdout.split()  # fmt: skip
    assert other == digests()
    assert len({*other}) > 200  # and they differ


@pytest.mark.parametrize("name", ["lists", "tars", "packs", "classes"])
def test_most_cases_are_not_what_they_came_from(name):
    seeds = TARGETS[name].seeds()
    cases = [TARGETS[name].case(seeds, random.Random(i)) for i in range(100)]
    assert sum(case in seeds for case in cases) < 20


def test_some_seconds(tmp_path):
    """All kept inputs, then new ones of every target, more of those that are quick."""
    counts, findings = fuzz([*TARGETS], 1, 0, tmp_path, least=3)
    assert not findings, told(findings)
    assert min(counts.values()) >= 3, counts


@pytest.mark.slow
def test_an_hour(tmp_path):
    seconds, seed = (
        float(os.environ.get(n, d)) for n, d in (("FUZZ_SECONDS", 3600), ("FUZZ_SEED", 1))
    )
    _, findings = fuzz([*TARGETS], seconds, int(seed), tmp_path)
    assert not findings, told(findings)
