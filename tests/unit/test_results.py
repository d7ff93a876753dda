"""The one form in which recipes leave what they measured: read strictly, drawn as a card, those of
older versions recognised.
"""

import dataclasses
import json
import subprocess

import numpy as np
import pytest
import torch

from downstream import results as results_module
from downstream.report import interval_unit, table, title, write_results
from downstream.results import (
    ClassScore,
    Data,
    Metric,
    Model,
    OldResultsError,
    Predictions,
    Results,
    accuracies,
    claim_results,
    default_folder,
    read_results,
    seen_in_training,
    versions,
)
from recipes import compare


def some(**changes) -> Results:
    """Results of a probe, such as a recipe writes."""
    about = Results(
        "linear_probe",
        Data("clips.csv", "f00d", "test", 16, 20, 4, "train", 32, 4, 2),
        Model("runs/a/backbone", "beef", 1234567, {"depth": 2, "mean": [0.5, 0.5, 0.5]}, "hf:a/b"),
        {"kind": "probe", "shots": 0},
        {"seed": 0},
        {
            "top1": Metric(1 / 3, 16, (0.25, 0.5), 0.25),
            "random_init_top1": Metric(0.2, 16, chance=0.25),
            "t2v_mean_rank": Metric(3.25, 7, of="captions", unit="rank"),
        },
        0,
        "probe.py --data clips.csv",
        {"torch": "2.10", "commit": None},
        ["mind this"],
        {
            "linear": {"C": 0.123456789, "validation_accuracy": {"1": 1 / 3}, "rejected": {},
                       "l": [1, 2]},
            "training": {"minutes": 12.3456789, "flip": True, "weights": ""},
        },
        {"walk": ClassScore(0.5, 4, None)},
    )  # fmt: skip
    return dataclasses.replace(about, **changes)


def test_results_are_read_as_they_were_written(tmp_path):
    write_results(tmp_path, some())
    assert read_results(tmp_path) == some()
    assert json.loads((tmp_path / "results.json").read_text()) == some().as_dict()


def test_names_at_the_top_stay(tmp_path):
    """Other programs read `top1`, `chance`, ... there, as fractions; a file that says two things is
    refused.
    """
    write_results(tmp_path, some())
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    assert content["top1"] == 1 / 3 and content["chance"] == 0.25 and content["num_test"] == 16
    assert content["random_init_top1"] == 0.2 and content["top5"] is None
    for change in ({"top1": 0.9}, {"more": 1}):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=next(iter(change))):
            read_results(tmp_path)


def test_a_card_says_what_says_something(tmp_path):
    """Notes first; rounded, in per cent where it is one, nothing that is empty or was not given."""
    write_results(tmp_path, some())
    text = (tmp_path / "CARD.md").read_text()
    lines = [line for line in text.replace("\\", "").splitlines() if line]
    assert lines[1] == "> mind this"
    for words in (
        "| top-1 | 33.3 % | 25.0 to 50.0 % | 25.0 % | 20.0 % | 16 videos |",
        "- C: 0.1235", "- validation accuracy: 1=33.3 %", "- minutes: 12.35", "- flip: yes",
        "- l: 1, 2", "- command: probe.py --data clips.csv", "- num clips: 20",
        "- weights sha256: beef",
    ):  # fmt: skip
        assert words in lines, words
    assert not [
        w
        for w in ("3333", "rejected", "shots", "weights:", "commit", "None", "unknown")
        if w in text
    ]
    assert "random" not in lines[0] and "33.3 %" in lines[0]


def test_a_group_on_a_card_is_a_list(tmp_path):
    """What a model is made of and where its weights come from: an entry a line, however deep."""
    arguments = {"depth": 2, "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    config = {"lr": 0.1, "out": "runs/a", "flip": False, "epochs": 800, "steps": 3}
    weights = {"recipe": "videomae", "config": config}
    about = dataclasses.replace(some().model, provenance=weights)
    write_results(tmp_path, some(model=about))
    text = (tmp_path / "CARD.md").read_text()
    assert "    - out: runs/a" in text and "steps: 3" in text and "epochs" not in text
    for _ in range(20):
        weights = {"from": weights, "step": 3}
    about = dataclasses.replace(some().model, arguments=arguments, provenance=weights)
    write_results(tmp_path, some(model=about))
    lines = (tmp_path / "CARD.md").read_text().replace("\\", "").splitlines()
    place = lines.index("- arguments:")
    assert lines[place + 1 : place + 4] == [
        "  - depth: 2", "  - mean: 0.5, 0.4, 0.3", "  - std: 0.1, 0.2, 0.3"
    ]  # fmt: skip
    assert "- provenance:" in lines and "  - step: 3" in lines and "    - step: 3" in lines
    assert max(len(line) - len(line.lstrip()) for line in lines) == 6


def test_columns_of_nothing_are_left_out():
    (heads, row) = table(some(metrics={"top1": Metric(0.5, 3)}))
    assert heads == ("", "value", "scored on") and row == ("top-1", "50.0 %", "3 videos")
    ranks = {"t2v_r1": Metric(0.5, 3, chance=0.1), "t2v_mean_rank": Metric(3.25, 3, unit="rank")}
    assert title(some(recipe="retrieval", metrics=ranks)).endswith("text to video R@1 50.0 %")
    assert [r[1] for r in table(some(metrics=ranks))] == ["value", "50.0 %", "3.2"]


def damaged(change) -> str:
    content = some().as_dict()
    change(content)
    return json.dumps(content)


BROKEN = {
    "no metric": lambda c: c["metrics"]["top1"].pop("n"),
    "one too many": lambda c: c.update(extra=1),
    "a text": lambda c: c["metrics"]["top1"].update(value="0.5"),
    "truth": lambda c: c["metrics"]["top1"].update(n=True),
    "nan": lambda c: c["metrics"]["top1"].update(value=float("nan")),
    "upside down": lambda c: c["metrics"]["top1"].update(interval=[0.5, 0.1]),
    "half an interval": lambda c: c["metrics"]["top1"].update(interval=[0.5]),
    "of nothing": lambda c: c["metrics"]["top1"].update(n=0),
    "unit": lambda c: c["metrics"]["top1"].update(unit="per cent"),
    "no data": lambda c: c.update(data=None),
    "a list": lambda c: c.update(metrics=[]),
    "notes": lambda c: c.update(notes=[1]),
    "format": lambda c: c.update(format="muybridge-results-9"),
    "parameters": lambda c: c["model"].update(parameters=-5),
    "operations": lambda c: c["model"].update(flops=-1),
    "recipe": lambda c: c.update(recipe="bogus"),
    "seed": lambda c: c.update(seed=-1),
    "kind": lambda c: c["protocol"].update(kind=3),
    "videos": lambda c: (c["data"].update(num_test=0), c.update(num_test=0)),
    "subjects": lambda c: c["data"].update(subjects_in_both=-1),
    "above one": lambda c: (c["metrics"]["top1"].update(value=1.5), c.update(top1=1.5)),
    "interval above one": lambda c: c["metrics"]["top1"].update(interval=[0.5, 2]),
    "chance below zero": lambda c: (c["metrics"]["top1"].update(chance=-1), c.update(chance=-1)),
    "rank below one": lambda c: (c["metrics"]["t2v_mean_rank"].update(value=0.5),
                                 c.update(t2v_mean_rank=0.5)),
    "a class": lambda c: c["per_class"]["walk"].update(accuracy=2),
    "a class of none": lambda c: c["per_class"]["walk"].update(num=0),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_results_is_refused_in_words(name, tmp_path):
    (tmp_path / "results.json").write_text(damaged(BROKEN[name]))
    with pytest.raises(ValueError, match=r"results\.json"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match="holds other files"):
        claim_results(tmp_path, {"seed": 0})


def test_older_results_are_called_so_and_not_overwritten(tmp_path):
    old = {
        "top1": 0.5,
        "card": {"settings": {"seed": 0}, "software": {"command": "linear_probe.py --data x"}},
    }
    (tmp_path / "results.json").write_text(json.dumps(old))
    with pytest.raises(OldResultsError, match=r"older version.*linear_probe\.py --data x"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match=r"older version.*--out"):
        claim_results(tmp_path, {"seed": 0})
    assert json.loads((tmp_path / "results.json").read_text()) == old


def test_results_of_the_same_settings_are_renewed(tmp_path):
    write_results(tmp_path, some())
    claim_results(tmp_path, {"seed": 0}).release(force=True)
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        claim_results(tmp_path, {"seed": 1})


def test_of_other_settings_only_what_differs_is_named(tmp_path):
    model = {"depth": 4, "mean": [0.5, 0.5, 0.5]}
    write_results(tmp_path, some(settings={"seed": 0, "arguments": {**model, "depth": 6}}))
    with pytest.raises(ValueError, match="depth was 6, is 4") as refused:
        claim_results(tmp_path, {"seed": 0, "arguments": model})
    assert "mean" not in str(refused.value) and "seed" not in str(refused.value)


@pytest.mark.parametrize(
    "predicted, subjects, words",
    [
        ([0, 1, 0, 1], ["a", "a", "b", "b"], ["rough", "2 people"]),
        ([0, 1, 0, 1], [None] * 4, ["rough", "4 videos"]),
        ([1, 1, 1, 1] * 5, list("abcdefghij") * 2, ["one class, 'run'"]),
        ([0, 1, 0, 1] * 5, list("abcdefghij") * 2, []),
    ],
)
def test_few_people_and_one_answer_are_said(predicted, subjects, words):
    truth = np.array([0, 1, 1, 0] * (len(predicted) // 4))
    said = Predictions(["walk", "run"], truth, np.array(predicted), subjects)
    metrics, _, notes = accuracies(said, 0)
    told = "; ".join(notes)
    assert bool(told) == bool(words) and not [w for w in words if w not in told]
    assert metrics["top1"].value == 0.5 and metrics["top1"].chance == 0.5
    assert metrics["top1"].interval[0] <= 0.5 <= metrics["top1"].interval[1]


@pytest.mark.parametrize(
    ("people", "words"),
    [(["a", "b"] * 6, "over 2 people"), (["a"] * 12, "over 12 videos, as all are of one person"),
     (["a", None] * 6, "over 12 videos, as not all have a `subject`")],
)  # fmt: skip
def test_what_intervals_are_over(people, words):
    said = Predictions(["a", "b"], np.arange(12) % 2, np.arange(12) % 2, people)
    assert interval_unit(accuracies(said, 0)[1]) == words


def test_source_files_stand_for_people_without_a_word():
    six = [f"{i // 2}.mp4" for i in range(12)]
    said = Predictions(["a", "b"], np.arange(12) % 2, np.arange(12) % 2, six, named="source files")
    assert interval_unit(accuracies(said, 0)[1]) == "over 6 source files"


def test_frames_of_unknown_people_are_drawn_by_video():
    twelve = np.arange(12) % 2
    said = Predictions(["a", "b"], twelve, twelve, ["v.mp4", "w.mp4"] * 6, unit="frames",
                       named="videos")  # fmt: skip
    _, about, notes = accuracies(said, 0)
    assert interval_unit(about) == "over 2 videos, as not all have a `subject`"
    assert any("2 videos" in note for note in notes) and about["resampled"] == "videos"
    said = dataclasses.replace(said, subjects=["v.mp4"] * 12)
    assert interval_unit(accuracies(said, 0)[1]).startswith("over 12 frames")


def test_one_class_alone_may_be_all_the_answers():
    zeros = np.zeros(12, int)
    said = Predictions(["a", "b"], zeros, zeros, list("abcdefghijkl"))
    assert accuracies(said, 0)[2] == []


def test_top5_is_a_number_where_there_are_more_classes():
    scores = np.random.default_rng(0).random((12, 6))
    truth = np.arange(12) % 6
    for num in (5, 6):
        names = [str(i) for i in range(num)]
        some_scores = scores[:, :num]
        predicted = some_scores.argmax(1)
        said = Predictions(names, truth % num, predicted, [None] * 12, some_scores)
        metrics, _, _ = accuracies(said, 0)
        assert ("top5" in metrics) == (num == 6)
    assert metrics["top5"].chance == pytest.approx(5 / 6)
    assert metrics["top5"].interval[0] <= metrics["top5"].value <= metrics["top5"].interval[1]


def test_results_go_beside_a_backbone_by_the_path_that_was_given(tmp_path, monkeypatch):
    (tmp_path / "run" / "backbone").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(default_folder("probe", "run/backbone", "synthetic")) == "run/probe-synthetic"
    assert default_folder("probe", f"{tmp_path}/run/backbone", "d") == tmp_path / "run/probe-d"
    monkeypatch.chdir("run/backbone")
    for here in (".", "../backbone", "./"):
        assert default_folder("probe", here, "d").resolve() == tmp_path / "run/probe-d"


def test_data_are_known_again_by_name_or_fingerprint():
    index = {"fingerprint": "f", "splits": {"train": 3}}
    for about in ({"data": "x.csv"}, {"data": ["y", "x.csv"]}, {"data_fingerprint": "f"}):
        trained = {"split": "train", **about}
        assert seen_in_training(trained, "x.csv", index) == "train"
        assert seen_in_training(trained, "x.csv", {**index, "splits": {}}) == "all"
    assert seen_in_training({"data": "x.csv"}, "x.csv", index) == "all"
    for about in ("x.csv", {}, {"data": "xx.csv", "data_fingerprint": "g"}, {"data": 3}):
        assert seen_in_training(about, "x.csv", index) is None


def test_only_files_that_git_keeps_count_as_uncommitted(tmp_path, monkeypatch):
    """Not results and notes that lie beside them."""
    assert {"commit", "python", "torch", "scikit-learn"} <= versions(
        torch.device("cpu"), "fp32"
    ).keys()
    (tmp_path / "downstream").mkdir()
    monkeypatch.setattr(results_module, "__file__", str(tmp_path / "downstream" / "results.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    kept = tmp_path / "kept.txt"
    kept.write_text("one")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "results.json").write_text("{}")
    commit = versions(torch.device("cpu"), "fp32")["commit"]
    assert len(commit) == 40
    kept.write_text("two")
    assert versions(torch.device("cpu"), "fp32")["commit"] == f"{commit} with uncommitted changes"


def test_a_comparison_reads_results_of_any_recipe_with_an_accuracy(tmp_path, capsys):
    """Also zero-shot's; not retrieval's, which has none, nor an older version's."""
    ranks = {"t2v_r1": Metric(0.5, 16, chance=0.1)}
    older = {"card": {"settings": {}}, "top1": 0.5}
    for name, found in {
        "zero": some(recipe="zero_shot"),
        "other": some(recipe="zero_shot", model=dataclasses.replace(some().model, name="b")),
        "retrieval": some(recipe="retrieval", metrics=ranks),
        "unlike": some(protocol={"kind": "probe", "shots": 3}),
    }.items():
        (tmp_path / name).mkdir()
        write_results(tmp_path / name, found)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text(json.dumps(older))
    show = lambda *names: compare.main(
        compare.Config(
            results=tuple(str(tmp_path / name) for name in names),
            out=str(tmp_path / "-".join(names)),
        )
    )
    rows = show("zero", "other")["rows"]
    assert [row["top1"] for row in rows] == [1 / 3, 1 / 3] and rows[0]["clips_per_s"] is None
    assert "mind this" in capsys.readouterr().out  # the notes
    for name, said in (
        ("retrieval", "no top-1"), ("unlike", "shots: 0 and 3"), ("old", "older version"),
        ("none", "holds no results"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            show("zero", name)


def test_results_nested_beyond_all_bounds_are_refused(tmp_path):
    """What could be read and not be written again: a folder of weights has its words on a card."""
    deep = "0"
    for _ in range(900):
        deep = f'{{"a": {deep}}}'
    whole = json.dumps(some().as_dict())
    (tmp_path / "results.json").write_text(whole.replace('"hf:a/b"', deep))
    with pytest.raises(ValueError, match="nested too deeply"):
        read_results(tmp_path)
    inner = '{"a": [0, {"b": 1}]}'
    (tmp_path / "results.json").write_text(whole.replace('"hf:a/b"', inner))
    assert read_results(tmp_path).model.provenance == json.loads(inner)
