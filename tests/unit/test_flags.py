"""What flags may say: numbers in bounds, and no flag that does nothing."""

import dataclasses
import importlib
import math
from pathlib import Path

import pytest

from pretrain import flags
from pretrain.log import cli, parse
from pretrain.presets import preset_of
from tests.recipes.runs import configure, flags_of

RECIPES = sorted(p.stem for p in (Path(__file__).parents[2] / "recipes").glob("[a-z]*.py"))


def recipe(name: str):
    return flags_of(name)


def given(name: str, **values):
    """A recipe's configuration, with something for what has no default."""
    kind = recipe(name).Config
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    return configure(kind, **dict.fromkeys(required, "x") | values)


def numbers(name: str) -> dict[str, object]:
    """Fields that hold numbers, and a value of the kind."""
    groups = flags.groups(given(name))
    kinds = [recipe(name).Config, *map(type, groups.values())]
    fields = {
        f.name: f.type for kind in kinds for f in dataclasses.fields(kind) if f.name not in groups
    }
    words = ("Count", "Whole", "Seed", "Positive", "NotNegative", "Fraction", "int", "float")
    return {n: str(t) for n, t in fields.items() if any(w in str(t) for w in words)}


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_that_mean_nothing_are_refused(name):
    found = numbers(name)
    assert found or name in ("pack", "doctor")
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
        ("videomae", "--batch-size 0"), ("videomae", "--num-workers -2"),
        ("videomae", "--save-every 0"), ("videomae", "--scales 1 0"), ("videomae", "--warmup 1.5"),
        ("videomae", "--log-seconds nan"), ("clip", "--micro-batch 0"), ("clip", "--base-lr 0"),
        ("clip", "--beta2 1"), ("clip", "--data-weights 1 -1"), ("finetune", "--layer-decay 0"),
        ("finetune", "--epochs -3"), ("finetune", "--num-clips 0"),
        ("linear_probe", "--num-crops 0 --backbone b --data d"),
        ("zero_shot", "--batch-size 0 --backbone b"),
        ("retrieval", "--top 0 --backbone b --data d"), ("compare", "--seeds 0"),
        ("benchmark", "--rounds 0"), ("benchmark", "--peak 0"),
        ("predict", "--top-k 0 --backbone b --video v"),
        ("visualize", "--enlarge 0 --backbone b --video v"),
        ("pack", "--workers 0 --data s --out o"),
        # Twice: the parser would take the last one.
        ("pack", "--flow dis --flow tvl1 --data s --out o"),
        ("detect", "--video a --backbone b --video=c"), ("clip", "--flip --no-flip"),
        ("videomae", "--threads 2 --threads 2"),
        ("convert", "--frames 0 --source s --to hf --out o"),
    ],
)  # fmt: skip
def test_a_command_is_refused_in_one_line(name, flag, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py", *flag.split()])
    config = getattr(recipe(name), "PRESETS", recipe(name).Config)
    with pytest.raises(SystemExit):
        cli(lambda _: pytest.fail("it ran"), config)
    said = capsys.readouterr().err
    assert said.startswith(f"error: {flag.split()[0]} ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "name, words",
    [
        ("clip", ["--data", "--steps", "2"]), ("clip", ["--text-model", ""]),
        ("videomae", ["--scales"]), ("videomae", ["--out="]), ("finetune", ["--network", " "]),
        ("finetune", ["--drops", "--steps", "2"]), ("compare", ["--backbones", "a", ""]),
        ("convert", ["--source", "", "--to", "hf", "--out", "o"]),
    ],
)  # fmt: skip
def test_a_flag_with_nothing_behind_it_is_refused(name, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py", *words])
    config = getattr(recipe(name), "PRESETS", recipe(name).Config)
    with pytest.raises(SystemExit):
        cli(lambda _: pytest.fail("it ran"), config)
    said = capsys.readouterr().err
    assert words[0].strip("=") in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "name, flag",
    [
        ("videomae", "--batch-size nan"),
        ("clip", "--frames 1.5"),
    ],
)
def test_what_is_no_whole_number_is_called_so(name, flag, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py", *flag.split()])
    config = getattr(recipe(name), "PRESETS", recipe(name).Config)
    with pytest.raises(SystemExit):
        cli(lambda _: pytest.fail("it ran"), config)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{flag.split()[0]}: {flag.split()[1]!r} is no whole number" in said


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


def test_values_without_effect_are_taken_away_from_groups_too():
    """--epochs stands in the group of the optimisation: given beside --steps it is refused."""
    module = recipe("videomae")
    preset = flags.replace(module.PRESETS["shrec"], depth=None)
    assert preset.form.depth is None and preset.optim.steps == 3200
    with_epochs = flags.replace(preset, epochs=3.0)
    assert flags.settle(with_epochs, {"epochs": "x"}, with_epochs).optim.epochs == 800
    with pytest.raises(ValueError, match="--epochs"):
        flags.settle(with_epochs, module.unused(with_epochs), preset)


def test_a_comparison_says_who_has_the_flags_of_its_runs(monkeypatch, capsys):
    """All those of the recipes that it runs; what it calls otherwise (--models, --seeds) is tyro's
    to suggest.
    """
    fields = lambda name: set(flags.flat(given(name)))
    runs = fields("finetune") | fields("linear_probe")
    missing = runs - fields("compare") - {"model", "backbone", "seed"}
    assert missing and missing <= set(recipe("compare").OF_RUNS)
    for typed in ("--batch-size 8", "--base_lr=0.1", "--no-per-frame"):
        monkeypatch.setattr("sys.argv", ["compare.py", "--models", "lstm", *typed.split()])
        with pytest.raises(SystemExit):
            cli(
                lambda _: pytest.fail("it ran"),
                recipe("compare").Config,
                elsewhere=recipe("compare").OF_RUNS,
            )
        said = capsys.readouterr().err
        name = typed.split()[0].split("=")[0].replace("_", "-").replace("--no-", "--")
        assert name in said and "finetune.py" in said and said.count("\n") == 1


# ----------------------------------------------------------------------------- presets, help, slips


WITH_PRESETS = [name for name in RECIPES if hasattr(recipe(name), "PRESETS")]


@pytest.mark.parametrize("name", WITH_PRESETS)
def test_help_lists_flags_and_presets(name, capsys):
    """All flags with the values of the preset at hand, and a line a preset."""
    module = recipe(name)
    assert list(module.ABOUT) == list(module.PRESETS)
    for preset in (None, list(module.PRESETS)[-1]):
        with pytest.raises(SystemExit) as stopped:
            parse([*([preset] if preset else []), "--help"], module.PRESETS, module.ABOUT)
        said = " ".join(capsys.readouterr().out.split())
        shown = module.PRESETS[preset or next(iter(module.PRESETS))]
        assert not stopped.value.code and "(required)" not in said
        for field in flags.flat(shown):
            assert flags.flag(field) in said or field in ("preset", "given", "reasons")
        assert f"default: {flags.flat(shown)['batch_size']})" in said
        assert all(f"{n} {line}" in said for n, line in module.ABOUT.items())


def test_the_first_word_is_the_preset_and_flags_change_it():
    presets = recipe("videomae").PRESETS
    assert parse([], presets) == parse(["auto"], presets) == presets["auto"]
    for words, name in (
        ([], "tiny"), (["--data", "synthetic:90"], "tiny"), (["--data=mine"], "auto"),
        (["--steps", "3", "--data", "mine"], "auto"), (["shrec", "--data", "mine"], "shrec"),
    ):  # fmt: skip
        assert parse(words, presets, preset_of=preset_of).preset == name
    changed = parse(["vit_b_ssv2", "--steps", "7", "--scales", "1", "0.5"], presets)
    assert changed == flags.replace(presets["vit_b_ssv2"], steps=7, scales=(1.0, 0.5))


@pytest.mark.parametrize(
    "command, meant",
    [
        ("videomae shrek", "shrec"), ("videomae SHREC --steps 3", "shrec"),
        ("clip vificlip_b61", "vificlip_b16"), ("videomae --encoder vit_s", "--model"),
        ("clip --video-tower i3d", "--model"), ("clip --weights 3 1", "--data-weights"),
        ("videomae shrec --moving 0.5", "--motion-tokens"), ("finetune papr --model i3d", "paper"),
        ("finetune videomae_k400_b --model i3d", "mean videomae_b_k400?"),
        ("clip b16_ViFiCLIP", "vificlip_b16"),
        ("finetune --model swin_video_t", "mean video_swin_t?"),
        ("videomae --bacth-size 3", "--batch-size"),
        ("linear_probe --backbon x --data y", "--backbone?"),
        ("linear_probe --backbone x --dta y", "did you mean --data?"),
        ("linear_probe --backbone x -data y", "--data begins with two hyphens"),
        ("linear_probe --backbone x --data a.avi b.avi", "'b.avi' is another: give the folder"),
        ("videomae --steps 3 shrec_moving", "first word"), ("compare --models i3d,lsmt", "lstm"),
        ("finetune --model Video_Swin", "video_swin_t"), ("videomae --model vivit3", "vivit_3"),
        ("clip --model frame:b", "frames:vit_b"), ("clip --text-model XS", "xs"),
        ("finetune --model lstm --network resnet81", "resnet18"),
        ("finetune --model lstm --network torchvision:resnet81", "resnet18"),
    ],
)  # fmt: skip
def test_a_slip_is_told_what_was_meant(command, meant, tiny_pack, monkeypatch, capsys, tmp_path):
    """Presets, flags and names of models."""
    name, *words = command.split()
    module, data = recipe(name), ["--data", str(tiny_pack)]
    if any(word in command for word in ("-data", "--dta", "--bacth")):
        data = []
    if hasattr(module, "PRESETS"):
        data += ["--precision", "fp32"]  # as other tests in this process: accelerate knows one only
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{name}.py", *words, *data])
    main = importlib.import_module(f"recipes.{name}").main
    with pytest.raises(SystemExit) as stopped:
        cli(main, getattr(module, "PRESETS", module.Config))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and meant in said and "Traceback" not in said
