"""Fitting on what is labelled: folds, the classifier for predict, the report, what comes next."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from downstream.controls import CONTROLS
from downstream.crossval import Curve, grouped_folds, learning_curve, when_to_stop
from downstream.groups import join_subjects
from downstream.results import read_results
from downstream.simulate_labelling import Config as Simulation
from downstream.simulate_labelling import main as simulate_main
from downstream.simulate_labelling import simulate, told
from downstream.splits import Videos
from pretrain.data.shards import Pack
from recipes import fit, predict
from tests.conftest import MOTIONS, motion_rows
from tests.recipes.runs import configure

HOSTILE = "<b>&=up"


def config(data, out, backbone, **more):
    about = {"out": str(out), "num_workers": 0, "precision": "fp32", **more}
    return configure(fit.Config, str(data), str(backbone), **about)


@pytest.fixture(scope="module")
def partly(make_pack) -> Path:
    """24 labelled clips of 3 people, 16 clips of 2 others without a label; a hostile class name."""
    rows = motion_rows(range(3), 2, None)
    rows = [row | {"label": HOSTILE if row["label"] == "up" else row["label"]} for row in rows]
    rest = [row | {"label": ""} for row in motion_rows(range(3, 5), 2, None)]
    return make_pack(rows + rest)


@pytest.fixture(scope="module")
def fitted(partly, tiny_backbone, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("fit") / "fit"
    about = {"num_clips": 2, "propose": 5, "also_random_split": True}
    return out, fit.main(config(partly, out, tiny_backbone, **about))


def test_everything_is_written(fitted):
    out, found = fitted
    names = {
        "results.json", "CARD.md", "report.html", "next.csv", "predictions.csv", "scores.csv",
        "confusion.png", "labels.png", "backbone",
    }  # fmt: skip
    assert names == {path.name for path in out.iterdir()} - {".lock"}
    results = read_results(out)
    assert results.as_dict() == found and results.recipe == "fit"
    assert results.data.num_test == 24 and results.details["interval"]["resampled"] == "subjects"
    assert {f"control_{name}" for name in CONTROLS} | {"floor_frame"} <= results.metrics.keys()
    assert results.details["controls"]["differences"].keys() == set(CONTROLS.values())
    drawn, honest = results.details["random_split"]["top1"], results.metrics["top1"].value
    said = [note for note in results.notes if "random split" in note]
    assert len(said) == 1 and f"{100 * drawn:.1f}, beside {100 * honest:.1f} as" in said[0]
    assert said[0] in (out / "report.html").read_text()


def test_predict_says_what_fit_says(fitted, partly, tmp_path):
    """Of clips that were not learned from, to the digits that next.csv has, views included."""
    out, _ = fitted
    about = {"out": str(tmp_path / "p"), "num_workers": 0, "precision": "fp32"}
    said = predict.main(configure(predict.Config, str(out / "backbone"), (str(partly),), **about))
    with open(out / "next.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    for row in rows:
        best = said[row["path"]][0]
        assert row["guess"].lstrip("'") == best["label"]
        assert float(row["probability"]) == pytest.approx(best["probability"], abs=2e-4)
    provenance = json.loads((out / "backbone" / "config.json").read_text())["provenance"]
    assert provenance["views"] == [2, 1] and provenance["val_videos"] == 24
    assert provenance["fps"] == 16


def test_next_are_the_unlabelled(fitted, partly):
    with open(fitted[0] / "next.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    unlabelled = {r["source"] for r in Pack(partly).records() if r["label"] is None}
    assert {row["path"] for row in rows} <= unlabelled
    assert all(float(row["end"]) > float(row["start"]) for row in rows)


def test_the_report_loads_nothing(fitted):
    text = (fitted[0] / "report.html").read_text()
    assert HOSTILE not in text and "&lt;b&gt;" in text and "<script" not in text
    sources = re.findall(r'(?:src|href)="([^"]{0,20})', text)
    assert len(sources) >= 7 and all(source.startswith("data:image/") for source in sources)


def test_an_earlier_fit_is_replaced_and_nothing_else(fitted, partly, tiny_backbone, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds something else \(chapter.txt\)"):
        fit.main(config(partly, tmp_path / "thesis", tiny_backbone))
    out = shutil.copytree(fitted[0], tmp_path / "out")
    again = fit.main(config(partly, out, tiny_backbone, num_clips=2, seed=1))
    assert fitted[1]["seed"] == 0 and again == read_results(out).as_dict()


def test_a_fit_that_was_stopped_is_done_again(fitted, partly, tiny_backbone, tmp_path, monkeypatch):
    """Between its first files and its results; a folder with another's backbone stays as it is."""
    stopped = config(partly, tmp_path / "out", tiny_backbone, num_clips=2)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        fit.main(stopped)
    monkeypatch.undo()
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {*fit.FIRST}
    monkeypatch.setattr(fit, "open_data", killed)  # which comes after the folder was looked at
    with pytest.raises(KeyboardInterrupt):
        fit.main(stopped)
    shutil.copytree(tiny_backbone, tmp_path / "run" / "backbone")
    with pytest.raises(ValueError, match="other files"):
        fit.refuse_other_fits(tmp_path / "run")


# ---- folds


def videos_of(labels: list[str], subjects: list[str | None]) -> Videos:
    ids = np.arange(len(labels))
    groups = join_subjects(subjects, ids).tolist()
    sources = [f"{i}.mp4" for i in ids]
    return Videos(sources, list(labels), subjects, ids, ids, groups, ids.tolist())


@pytest.mark.parametrize("people", [3, 10, 11, 40])
def test_folds_never_divide_a_person(people):
    rng = np.random.default_rng(people)
    subjects = [f"p{i % people}" for i in range(5 * people)]
    labels = [str(c) for c in rng.permutation([i % 4 for i in range(5 * people)])]
    grouped = grouped_folds("data", videos_of(labels, subjects), 0)
    folds = grouped.folds
    for train, validations, test in folds.folds:
        of = lambda chosen: {subjects[i] for i in chosen}
        assert not of(train) & of(test)
        assert validations.shape[1] == len(train) and validations.any()
    assert len(set(folds.tested)) == len(folds.tested) and grouped.named == "subjects"


@pytest.mark.parametrize("each", [2, 3, 4])
def test_few_videos_of_each_class_make_fewer_folds(each):
    grouped = grouped_folds("data", videos_of([*"abcdef"] * each, [None] * (6 * each)), 0)
    assert len(grouped.folds.folds) == each and grouped.rule.startswith(f"{each} folds")
    assert len(grouped.tested) == 6 * each
    curve = learning_curve(np.random.default_rng(0).normal(size=(6 * each, 3)), grouped, 0)
    assert curve.sizes[-1] <= 6 * (each - 1)


def test_without_people_by_source_file_which_is_said():
    grouped = grouped_folds("data", videos_of(["a", "b"] * 15, [None] * 30), 0)
    assert grouped.named == "source files" and "source file" in grouped.rule
    assert any("column subject" in note for note in grouped.folds.notes)
    one = grouped_folds("data", videos_of(["a", "b"] * 15, ["eva"] * 30), 0)
    assert one.named == "source files" and any("one person" in note for note in one.folds.notes)
    assert not any("column" in note for note in one.folds.notes)
    some = grouped_folds("data", videos_of(["a", "b"] * 3, ["x", "x", "y", "y", None, None]), 0)
    assert some.named == "subjects" and len(set(some.groups)) == 4


def test_near_duplicates_are_not_divided():
    """Nor what joins two people: they count as one."""
    videos = videos_of(["a", "b"] * 12, [f"p{i // 4}" for i in range(24)])
    joined = replace(videos, groups=[group // 2 for group in videos.groups])
    grouped = grouped_folds("data", joined, 0)
    assert len(grouped.folds.folds) == 3 and len(set(grouped.groups)) == 3
    nobody = replace(videos, subjects=[None] * 24, recordings=[i // 2 for i in range(24)])
    for train, _, test in grouped_folds("data", nobody, 0).folds.folds:
        assert not {i // 2 for i in train} & {i // 2 for i in test}


def test_a_class_of_one_person_is_kept_and_not_tested():
    labels, people = ["a", "b"] * 4 + ["c"], [f"p{i // 2}" for i in range(8)] + ["p0"]
    grouped = grouped_folds("data", videos_of(labels, people), 0)
    assert grouped.folds.classes == ["a", "b", "c"] and 8 not in grouped.folds.tested
    assert any("1 video of c" in note for note in grouped.folds.notes)


@pytest.mark.parametrize(
    ("labels", "people", "named"),
    [
        (["a"] * 6, ["x", "y", "z"] * 2, "the only label is 'a'"),
        (["a", "b"], [None, None], "another source file"),
        (["a", "b"], ["x", "y"], "another person"),
        (["a", "a", "b"], ["x", "y", "x"], "only 'a' is seen of two people"),
        ([f"clip {i}" for i in range(3000)], [None] * 3000, "3,000 different labels"),
    ],
)
def test_labels_that_cannot_be_tested_are_refused(labels, people, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        grouped_folds("data", videos_of(labels, people), 0)


@pytest.mark.parametrize(
    ("names", "said"),
    [({"up": "Right"}, "'Right' and 'right'"), (dict.fromkeys(MOTIONS, ""), "label")],
)
def test_bad_labels_are_named(make_pack, tiny_backbone, tmp_path, names, said):
    rows = motion_rows(range(2), 1, None)
    rows = [r | {"label": names.get(r["label"], r["label"])} for r in rows]
    with pytest.raises(ValueError, match=said):
        fit.main(config(make_pack(rows), tmp_path / "out", tiny_backbone))
    assert not (tmp_path / "out").exists()


# ---- how many labels


def test_a_curve_grows_with_the_labels():
    rng, people = np.random.default_rng(0), [f"p{i // 12}" for i in range(48)]
    grouped = grouped_folds("d", videos_of([str(i % 3) for i in range(48)], people), 0)
    values = rng.normal(size=(48, 12)).astype(np.float32)
    values[:, :3] += 2.5 * np.eye(3)[grouped.folds.labels]
    curve = learning_curve(values, grouped, 0)
    assert curve.sizes == [4, 9, 18, 36] and curve.accuracies[-1] > curve.accuracies[0] + 0.1
    ends = zip(curve.accuracies, curve.intervals, strict=True)
    assert all(low <= value <= high for value, (low, high) in ends)


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        ((0.08, 0.02, 0.14), "still pay"),
        ((0.002, -0.01, 0.012), "pay little"),
        ((0.03, -0.02, 0.09), "not certain"),
        ((0.0, -0.05, 0.05), "not certain"),
    ],
)
def test_when_more_labels_pay(gain, said):
    curve = Curve([10, 20], [0.5, 0.5 + gain[0]], [(0.4, 0.7)] * 2, gain)
    assert said in when_to_stop(curve)
    assert "-0.0" not in when_to_stop(replace(curve, gain=(0.1, -0.0001, 0.2)))
    assert "too few" in when_to_stop(replace(curve, sizes=[20]))


# ---- labelling, simulated


def test_simulated_labelling_counts_labels():
    """A rare class far away: chance finds it late, and the proposed order among its first."""
    rng = np.random.default_rng(0)
    labels = np.array([0] * 90 + [1] * 6)
    values = rng.normal(size=(96, 4)) + 12 * labels[:, None] * np.array([0, 1, 0, 0])
    test = np.zeros(96, dtype=bool)
    test[[*range(4), 90, 91, 92]] = True
    needed, reached = simulate(values, labels, [test] * 6, 3, 0.95)
    assert (reached == 1).all() and (needed % 3 == 0).all() and (needed <= 89).all()
    assert needed[:, 0].mean() < needed[:, 1].mean()
    assert "pays" in told(np.array([[10, 30], [12, 31], [9, 28]]), 0.8)[-1]
    assert "COSTS" in told(np.array([[30, 10], [31, 12]]), 0.8)[-1]
    assert "not shown" in told(np.array([[30, 10], [10, 31], [20, 19]]), 0.8)[-1]


def test_simulated_labelling_of_data(partly, tiny_backbone, capsys):
    about = {"batch": 4, "seeds": 2, "num_workers": 0}
    assert simulate_main(configure(Simulation, str(tiny_backbone), str(partly), **about)).shape == (
        2, 2,
    )  # fmt: skip
    assert "over 2 seeds" in capsys.readouterr().out
