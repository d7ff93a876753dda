"""`muybridge demo`: from nothing to numbers, and the words beside them."""

import shlex

import pytest

from pretrain.flags import flat, refuse_numbers
from pretrain.log import parse
from recipes import demo, linear_probe, pack, videomae
from tests.recipes.runs import configure

RECIPES = {"videomae": videomae, "linear-probe": linear_probe, "pack": pack}


def results(low, high, differences) -> dict:
    metric = {"value": (low + high) / 2, "interval": [low, high], "chance": 0.1}
    floor = {f"difference to {name}": ends for name, ends in differences.items()}
    return {"metrics": {"top1": metric}, "details": {"floor": floor}, "data": {"num_classes": 10}}


def test_verdicts_follow_the_intervals():
    above = demo.verdicts(results(0.3, 0.5, {"a": [0.2, 0.1, 0.3], "b": [0.2, 0.05, 0.4]}))
    assert len(above) == 2 and "above guessing" in above[0] and "not" not in above[0]
    assert "better than a and b" in above[1]
    mixed = demo.verdicts(results(0.05, 0.3, {"a": [-0.2, -0.3, -0.1], "b": [0.0, -0.1, 0.1]}))
    assert "not shown to be above guessing" in mixed[0]
    assert "worse than a" in mixed[1] and "b" in mixed[2] and len(mixed) == 3
    assert "not shown" in demo.verdicts(results(0.1, 0.3, {}))[0]  # chance is the end of it


def check_words(said: str, found: dict) -> None:
    """Every number is explained, and every command can be typed as it stands."""
    explained = said.split("3 of 3")[1]
    for words in ("guessing", "one grey frame", "frame differences", "random weights", "interval"):
        assert words in explained, words
    for name in ("random_init_top1", "floor_motion", "top1"):
        assert f"{100 * found['metrics'][name]['value']:.1f} %" in explained
    commands = [shlex.split(x) for x in said.splitlines() if x.strip().startswith("muybridge ")]
    assert [words[1] for words in commands] == [
        "videomae", "linear-probe", "pack", "videomae", "linear-probe"
    ]  # fmt: skip
    for _, name, *words in commands:
        kind = RECIPES[name]
        refuse_numbers(parse(words, getattr(kind, "PRESETS", kind.Config)))


def test_the_commands_that_it_shows_are_those_that_it_runs(tmp_path, monkeypatch, capsys):
    given = {}
    found = results(0.05, 0.3, {"its own random weights": [0.0, -0.1, 0.1]})
    names = ("random_init_top1", "floor_frame", "floor_motion")
    found["metrics"] |= {name: {"value": 0.123} for name in names}
    found["data"] |= {"num_train": 30, "num_test": 10}

    def train(config):
        (tmp_path / "a run").mkdir()
        (tmp_path / "a run" / "log.jsonl").write_text('{"step": 3, "explained": 0.25}\n')
        given["videomae"] = config
        return {"step": 3}

    def probe(config):
        given["linear-probe"] = config
        return found

    monkeypatch.setattr(videomae, "main", train)
    monkeypatch.setattr(linear_probe, "main", probe)
    demo.main(demo.Config(clips=54, steps=3, out=str(tmp_path / "a run"), seed=5))
    said = capsys.readouterr().out
    check_words(said, found)
    assert "25%" in said
    typed = [shlex.split(x)[1:] for x in said.splitlines() if x.startswith("muybridge ")]
    for name, *words in typed:
        kind = RECIPES[name]
        shown = flat(parse(words, getattr(kind, "PRESETS", kind.Config)))
        free = {"micro_batch"}  # the same numbers
        ran = flat(given[name])
        assert {k for k in ran if ran[k] != shown[k]} <= free


@pytest.mark.slow
def test_it_goes_from_nothing_to_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = configure(demo.Config, clips=54, steps=2, num_workers=0, precision="fp32", threads=1)
    found = demo.main(config)
    assert (tmp_path / "runs/demo/backbone/model.safetensors").exists()
    assert found["data"]["name"] == "synthetic:54"
    check_words(capsys.readouterr().out, found)
    again = demo.main(config)  # continues: nothing is left to do
    assert again["metrics"] == found["metrics"]


def test_a_typed_number_is_checked():
    with pytest.raises(ValueError, match="--steps 0"):
        refuse_numbers(demo.Config(steps=0))
