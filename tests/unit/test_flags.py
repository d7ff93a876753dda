"""What flags may say: numbers in bounds, and no flag that does nothing."""

import dataclasses
import importlib
import math
from pathlib import Path

import pytest

from pretrain import flags
from pretrain.log import cli

RECIPES = sorted(p.stem for p in (Path(__file__).parents[2] / "recipes").glob("*.py"))


def recipe(name: str):
    return importlib.import_module(f"recipes.{name}")


def given(name: str, **values):
    """A recipe's configuration, with something for what has no default."""
    kind = recipe(name).Config
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    return kind(**dict.fromkeys(required, "x") | values)


def numbers(name: str) -> dict[str, object]:
    """Fields that hold numbers, and a value of the kind."""
    fields = {f.name: f.type for f in dataclasses.fields(recipe(name).Config)}
    words = ("Count", "Whole", "Seed", "Positive", "NotNegative", "Share", "int", "float")
    return {n: str(t) for n, t in fields.items() if any(w in str(t) for w in words)}


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_that_mean_nothing_are_refused(name):
    found = numbers(name)
    assert found or name == "pack"
    for field, kind in found.items():
        for bad in (-2, math.nan, math.inf, -math.inf):
            value = (0.5, bad) if kind.startswith("tuple") else bad
            with pytest.raises(ValueError, match=flags.flag(field)):
                flags.refuse_numbers(given(name, **{field: value}))
    flags.refuse_numbers(given(name))
    for preset in getattr(recipe(name), "PRESETS", {}).values():
        flags.refuse_numbers(preset)


@pytest.mark.parametrize(
    "name, flag",
    [
        ("videomae", "--batch-size 0"), ("videomae", "--num-workers -2"), ("videomae", "--save-every 0"),
        ("videomae", "--scales 1 0"), ("videomae", "--warmup 1.5"), ("videomae", "--log-seconds nan"),
        ("clip", "--micro-batch 0"), ("clip", "--base-lr 0"), ("clip", "--beta2 1"), ("clip", "--weights 1 -1"),
        ("finetune", "--layer-decay 0"), ("finetune", "--epochs -3"), ("finetune", "--num-clips 0"),
        ("linear_probe", "--num-crops 0 --backbone b --data d"), ("zero_shot", "--batch-size 0 --backbone b"),
        ("retrieval", "--top 0 --backbone b --data d"), ("compare", "--seeds 0"), ("benchmark", "--rounds 0"),
        ("predict", "--top-k 0 --backbone b --video v"), ("visualize", "--enlarge 0 --backbone b --video v"),
        ("pack", "--workers 0 --source s --out o"), ("convert", "--frames 0 --source s --to hf --out o"),
    ],
)  # fmt: skip
def test_a_command_is_refused_in_one_line(name, flag, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py", *flag.split()])
    config = getattr(recipe(name), "PRESETS", recipe(name).Config)
    with pytest.raises(SystemExit):
        cli(lambda _: pytest.fail("it ran"), config)
    said = capsys.readouterr().err
    assert said.startswith(f"error: {flag.split()[0]} ") and said.count("\n") == 1


@dataclasses.dataclass(frozen=True)
class Choice:
    """A choice and what only one side of it can use."""

    tower: str = "a"
    """Which."""
    batch_depth: flags.Count = 3
    """Of a."""
    warm: bool = False
    """Of a."""


def of_b(config: Choice) -> dict[str, str]:
    why = f"with --tower {config.tower}"
    return {} if config.tower == "a" else {"batch_depth": why, "warm": why}


@pytest.mark.parametrize(
    "words", ["--batch-depth 3", "--batch_depth=4", "--warm", "--no-warm", "--batch-depth 5 --warm"]
)
def test_a_flag_without_effect_is_refused_by_name(words, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr("sys.argv", ["r.py", *words.split()])
    cli(ran.append, Choice, of_b)
    monkeypatch.setattr("sys.argv", ["r.py", "--tower", "b", *words.split()])
    with pytest.raises(SystemExit):
        cli(ran.append, Choice, of_b)
    said = capsys.readouterr().err
    assert len(ran) == 1 and "--tower b" in said
    assert all(f"--{n}" in said for n in ("batch-depth", "warm") if n in words.replace("_", "-"))


def test_a_preset_value_without_effect_is_taken_away():
    preset = Choice("b", batch_depth=5, warm=True)
    assert flags.settle(preset, of_b(preset), preset) == Choice("b")
    assert flags.settle(dataclasses.replace(preset, tower="a"), {}, preset).batch_depth == 5
    assert flags.settle(preset, of_b(preset), None) == preset
    with pytest.raises(ValueError, match="--batch-depth with --tower b"):
        flags.settle(dataclasses.replace(preset, batch_depth=4), of_b(preset), preset)
