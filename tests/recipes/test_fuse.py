"""Late fusion of saved scores: as computed by hand, learned on validation videos alone."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.optimize import minimize

from downstream.claims import difference_interval
from downstream.fusion import (
    Scored,
    fit_weights,
    in_order,
    mean_of_logits,
    mean_of_probabilities,
    read_folds,
    read_run,
    scores_csv,
    svm_scores,
    write_scores,
)
from downstream.metrics import softmax
from downstream.report import write_results
from downstream.results import Data, Metric, Model, Results, read_results
from recipes import finetune, linear_probe
from recipes.fuse import Config, main
from tests.recipes import test_finetune
from tests.recipes.runs import configure

CLASSES = ["walk", "=sit|down", "stand, up"]


def made(rng, num: int, good: tuple[int, ...], part: str) -> Scored:
    """Scores that tell the classes `good` from the others and nothing else."""
    labels = np.arange(num) % len(CLASSES)
    logits = rng.normal(0, 1, (num, len(CLASSES)))
    for k in good:
        logits[labels == k, k] += 3
    names = [CLASSES[k] for k in labels]
    people = [f"p{i % 5}" for i in range(num)]
    return Scored([f"{part}/{i}.mp4" for i in range(num)], people, names, softmax(logits))


def save(folder: Path, parts: dict[str, Scored], classes=CLASSES, **changes) -> str:
    """A run's folder with these scores, and with a results.json that says so."""
    folder.mkdir(exist_ok=True)
    test = parts["test"]
    truth = np.array([classes.index(name) for name in test.labels])
    top1 = float((test.probabilities.argmax(1) == truth).mean())
    protocol = {
        "kind": "fine-tune",
        "videos": "beef",
        "train_split": "train",
        "test_split": "test",
        "shots": None,
    }
    num = len(test.labels)
    results = Results(
        "finetune", Data("clips.csv", "f00d", "test", num, num, len(classes)),
        Model(folder.name, "beef", 10, {}, "from scratch"), protocol | changes, {},
        {"top1": Metric(top1, num)}, 0, "", {},
    )  # fmt: skip
    write_scores(folder, scores_csv(parts, classes, results))
    write_results(folder, results)
    return str(folder)


@pytest.fixture
def runs(tmp_path) -> list[str]:
    rng = np.random.default_rng(0)
    return [
        save(
            tmp_path / name,
            {part: made(rng, num, good, part) for part, num in (("test", 60), ("val", 30))},
        )
        for name, good in (("rgb", (0, 1)), ("flow", (1, 2)), ("pose", ()))
    ]


def config(runs, tmp_path, **values) -> Config:
    return Config(tuple(runs), str(tmp_path / "out"), **values)


def test_scores_are_read_as_they_were_written(runs):
    rng = np.random.default_rng(0)
    parts = {part: made(rng, num, (0, 1), part) for part, num in (("test", 60), ("val", 30))}
    run = read_run(Path(runs[0]))
    assert run.classes == CLASSES
    for part, about in parts.items():
        found = run.parts[part]
        assert (found.sources, found.subjects, found.labels) == (
            about.sources,
            about.subjects,
            about.labels,
        )
        assert np.allclose(found.probabilities, about.probabilities, rtol=1e-8)


def test_every_combination_equals_a_direct_computation(runs, tmp_path):
    found = main(config(runs, tmp_path))["details"]["fusion"]
    read = read_folds([Path(run) for run in runs])[0]
    test, val = ([run.parts[part] for run in read] for part in ("test", "val"))
    truth = np.arange(60) % 3
    sets = {(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)}
    assert len(found) == 3 + 4 * 4
    names = ("rgb", "flow", "pose")
    accuracy = {}
    for chosen in sets:
        label = " + ".join(names[i] for i in chosen)
        p = [test[i].probabilities for i in chosen]
        if len(chosen) == 1:
            accuracy[f"{label}, alone"] = p[0].argmax(1) == truth
            continue
        v = [val[i].probabilities for i in chosen]
        weights = fit_weights(v, np.arange(30) % 3)
        direct = {
            "mean of probabilities": sum(p),
            "mean of logits": np.prod(p, axis=0),
            "learned weights": sum(w * s for w, s in zip(weights, p, strict=True)),
            "linear SVM": svm_scores(v, np.arange(30) % 3, p),
        }
        accuracy |= {f"{label}, {k}": s.argmax(1) == truth for k, s in direct.items()}
    assert found.keys() == accuracy.keys()
    for name, right in accuracy.items():
        assert found[name]["top1_accuracy"] == pytest.approx(right.mean()), name
    both, alone = accuracy["rgb + flow, mean of probabilities"], accuracy["rgb, alone"]
    assert accuracy["flow, alone"].mean() <= alone.mean() < both.mean()
    as_runs = lambda right: [dict(zip(test[0].sources, right.tolist(), strict=True))]
    people = dict(zip(test[0].sources, test[0].subjects, strict=True))
    mean, low, high, groups = difference_interval(as_runs(both), as_runs(alone), people)
    entry = found["rgb + flow, mean of probabilities"]
    assert groups == 5 and entry["gain"] == [mean] and entry["gain_interval"] == [low, high]


def test_what_is_written(runs, tmp_path):
    found = main(config(runs, tmp_path))
    out = tmp_path / "out"
    results = read_results(out)
    assert (
        results.as_dict() == found and (out / "CARD.md").exists() and (out / "fusion.png").exists()
    )
    assert results.data.num_test == 60 and next(iter(results.metrics)) == "top1"
    assert (
        results.value("top1")
        == results.details["fusion"]["rgb + flow + pose, mean of probabilities"]["top1_accuracy"]
    )
    won = results.details["best_alone"]
    assert "walk" in won["rgb"] and "stand, up" in won["flow"]
    assert sum(results.details["learned"]["weights"].values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="other settings"):
        main(dataclasses.replace(config(runs, tmp_path), seed=1))


def test_weights_are_the_likeliest():
    rng = np.random.default_rng(1)
    scores = [made(rng, 90, good, "val").probabilities for good in ((0, 1), (2,), ())]
    labels = np.arange(90) % 3
    right = np.stack([s[np.arange(90), labels] for s in scores])
    loss = lambda z: -np.log(softmax(z) @ right).mean()
    best = softmax(
        minimize(
            loss,
            np.zeros(3),
            method="Nelder-Mead",
            options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 9999},
        ).x
    )
    assert np.allclose(fit_weights(scores, labels), best, atol=2e-3)


def test_logits_of_two_networks_are_added():
    """The softmax of summed logits ranks as the sum of the saved logarithms, as published."""
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 4, (2, 50, 7))
    fused = mean_of_logits([softmax(logits[0]), softmax(logits[1])])
    assert (np.argsort(fused) == np.argsort(logits.sum(0))).all()
    assert np.allclose(mean_of_probabilities(list(softmax(logits))), softmax(logits).mean(0))
    assert np.isfinite(mean_of_logits([np.eye(3), np.eye(3)])).all()


def test_order_of_videos_and_classes_does_not_matter(runs, tmp_path):
    before = main(config(runs[:2], tmp_path))["details"]["fusion"]
    run = read_run(Path(runs[1]))
    turned = {
        part: Scored(a.sources[::-1], a.subjects[::-1], a.labels[::-1], a.probabilities[::-1, ::-1])
        for part, a in run.parts.items()
    }
    shutil.rmtree(tmp_path / "out")
    save(Path(runs[1]), turned, CLASSES[::-1])
    assert main(config(runs[:2], tmp_path))["details"]["fusion"] == before


def test_test_videos_are_never_learned_from(runs, tmp_path):
    """Weights and SVM stay the same whatever the test videos' labels and scores are."""
    one = read_folds([Path(run) for run in runs])[0]
    _, _, labels, scores = in_order(one, "val")
    for name in runs:
        run = read_run(Path(name))
        test = run.parts["test"]
        shuffled = dataclasses.replace(test, labels=test.labels[1:] + test.labels[:1])
        save(Path(name), run.parts | {"test": shuffled})
    learned = main(config(runs, tmp_path))["details"]["learned"]
    assert list(learned["weights"].values()) == pytest.approx(fit_weights(scores, labels).tolist())
    assert learned["validation_videos"] == 30


def test_without_validation_videos_nothing_is_learned(runs, tmp_path):
    run = read_run(Path(runs[1]))
    save(Path(runs[1]), {"test": run.parts["test"]})
    found = main(config(runs, tmp_path))
    assert any("left out" in note and "flow" in note for note in found["notes"])
    names = set(found["details"]["fusion"])
    assert "rgb + pose, linear SVM" in names and "rgb + flow + pose, mean of logits" in names
    assert not {n for n in names if "flow" in n and ("SVM" in n or "learned" in n)}


def test_the_figure_shows_chance_and_what_intervals_are_over(runs, tmp_path, monkeypatch, capsys):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k)
    )
    found = main(config(runs, tmp_path))
    said = "\n".join(text.get_text() for text in figures[0].findobj(Text))
    assert "chance 33.3 %" in said and "over 5 people" in said
    left, right = figures[0].axes
    for axes in (left, right):
        assert any(set(line.get_xdata()) == {100 / 3} for line in axes.lines)
        assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())
    printed = capsys.readouterr().out
    assert "intervals are over 5 people" in printed and "top-1, mean of logits" in printed
    assert any("differences too" in note for note in found["notes"])


def test_a_class_without_validation_videos(runs, tmp_path):
    run = read_run(Path(runs[0]))
    val = run.parts["val"]
    keep = [i for i, name in enumerate(val.labels) if name != "walk"]
    few = Scored(
        *([x[i] for i in keep] for x in (val.sources, val.subjects, val.labels)),
        val.probabilities[keep],
    )
    save(Path(runs[0]), run.parts | {"val": few})
    found = main(config(runs[:2], tmp_path))
    assert any("of 3 classes 2 are in" in note for note in found["notes"])


def test_a_copy_of_a_run_is_no_second_run(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "copy")
    with pytest.raises(ValueError, match="same scores"):
        main(config([runs[0], str(tmp_path / "copy")], tmp_path))


def test_a_run_that_does_not_say_what_it_learned_from_is_refused(runs, tmp_path):
    path = Path(runs[1]) / "results.json"
    about = json.loads(path.read_text())
    del about["protocol"]["videos"]
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="learned from different"):
        main(config(runs[:2], tmp_path))


def test_two_classes_and_one_person(tmp_path):
    rng = np.random.default_rng(3)
    runs = []
    for name in ("a", "b"):
        labels = np.arange(20) % 2
        p = softmax(rng.normal(0, 1, (20, 2)) + 3 * np.eye(2)[labels])
        about = lambda part, p=p, labels=labels: Scored(
            [f"{part}{i}" for i in range(20)], [None] * 20, [("no", "yes")[k] for k in labels], p
        )
        runs.append(save(tmp_path / name, {p: about(p) for p in ("test", "val")}, ["no", "yes"]))
    found = main(config(runs, tmp_path))["details"]["fusion"]
    assert found["a + b, linear SVM"]["top1_accuracy"] > 0.8


# ------------------------------------------------------------------------------------------- folds

PEOPLE = ("ann", "bo", "cy", "di")


def in_folds(tmp_path, name: str, good: tuple[int, ...], seed: int, val: bool = True) -> str:
    """A run of one fold for each person, whose validation videos are those of the one before."""
    rng = np.random.default_rng(seed)
    (tmp_path / name).mkdir()
    of = {who: made(rng, 30, good, who) for who in PEOPLE}
    of = {who: dataclasses.replace(about, subjects=[who] * 30) for who, about in of.items()}
    for i, who in enumerate(PEOPLE):
        parts = {"test": of[who]} | ({"val": of[PEOPLE[i - 1]]} if val else {})
        save(tmp_path / name / who, parts, leave_out=who, videos=f"without {who}")
        change_results(tmp_path / name / who, "model", name=name)
        change_results(tmp_path / name / who, "data", num_train=60, test_subjects=1)
    return str(tmp_path / name)


def change_results(folder: Path, section: str, **changes) -> None:
    path = folder / "results.json"
    content = json.loads(path.read_text())
    content[section] |= changes
    path.write_text(json.dumps(content))


@pytest.fixture
def folds(tmp_path) -> list[str]:
    return [in_folds(tmp_path, name, good, i) for i, (name, good) in enumerate(
        (("rgb", (0, 1)), ("flow", (1, 2)))
    )]  # fmt: skip


def test_folds_are_fused_one_by_one_and_their_test_videos_pooled(folds, tmp_path):
    found = main(config(folds, tmp_path))
    by_fold = []
    for who in PEOPLE:
        one = main(config([f"{run}/{who}" for run in folds], tmp_path / who))
        by_fold.append(one["details"])
    lines = found["details"]["fusion"]
    assert lines.keys() == by_fold[0]["fusion"].keys() and len(lines) == 2 + 4
    for name, line in lines.items():
        each = [own["fusion"][name]["top1_accuracy"] for own in by_fold]
        assert line["top1_accuracy"] == pytest.approx(np.mean(each)), name
    weights = [own["learned"]["weights"]["rgb"] for own in by_fold]
    assert len(set(weights)) == 4
    learned = found["details"]["learned"]
    assert learned["weights"]["rgb"] == pytest.approx(np.mean(weights))
    assert found["data"]["num_test"] == 120 and found["data"]["test_subjects"] == 4
    assert found["details"]["interval"]["groups"] == 4
    assert found["protocol"]["folds"] == 4 and found["protocol"]["leave_out"] is None
    assert read_results(tmp_path / "out").as_dict() == found
    assert not [note for note in found["notes"] if "missing" in note]


def test_each_fold_learns_from_its_own_validation_videos(folds, tmp_path):
    """What one fold validated on changes nothing in another."""
    before = main(config(folds, tmp_path))["details"]["fusion"]
    other = read_run(Path(folds[0]) / "ann").parts["val"]
    for run in folds:
        fold = read_run(Path(run) / "ann")
        val = dataclasses.replace(other, probabilities=np.roll(other.probabilities, 1, 1))
        data = scores_csv(fold.parts | {"val": val}, CLASSES, fold.results)
        write_scores(fold.folder, data)
        write_results(fold.folder, fold.results)
    shutil.rmtree(tmp_path / "out")
    after = main(config(folds, tmp_path))["details"]["fusion"]
    alone = "rgb + flow, linear SVM"
    changed = main(config([f"{run}/ann" for run in folds], tmp_path / "a"))["details"]["fusion"]
    same = [
        main(config([f"{run}/{who}" for run in folds], tmp_path / who))["details"]["fusion"]
        for who in PEOPLE[1:]
    ]
    each = [one[alone]["top1_accuracy"] for one in (changed, *same)]
    assert after[alone]["top1_accuracy"] == pytest.approx(np.mean(each))
    assert after[alone]["top1_accuracy"] < before[alone]["top1_accuracy"]


def test_folds_that_do_not_belong_together_are_refused(folds, tmp_path):
    flow = Path(folds[1])
    kept = tmp_path / "kept"
    shutil.copytree(flow, kept)

    def refused(words: str) -> None:
        with pytest.raises(ValueError, match=words):
            main(config(folds, tmp_path))
        assert not (tmp_path / "out").exists()
        shutil.rmtree(flow)
        shutil.copytree(kept, flow)

    (flow / "cy" / "results.json").unlink()
    refused("cy in it has no results.json")
    shutil.rmtree(flow / "cy")
    refused("no fold of flow tests cy/0.mp4")
    change_results(flow / "cy", "settings", base_lr=0.1)
    refused("not folds of one run: base_lr is .*0.1")
    change_results(flow / "cy", "model", name="i3d")
    refused("not folds of one run: model is")
    shutil.copytree(flow / "bo", flow / "twice")
    refused("bo and .*twice both test bo/0.mp4")
    change_results(flow / "cy", "protocol", train_split="all")
    refused("protocols differ .train_split")
    # Where the data are, and the machine, are a fold's own.
    change_results(flow / "cy", "settings", out="elsewhere", leave_out="cy", num_workers=3)
    main(config(folds, tmp_path))


def test_a_run_with_more_folds_than_another_is_refused_in_either_order(folds, tmp_path):
    shutil.rmtree(Path(folds[1]) / "bo")
    for order in (folds, folds[::-1]):
        with pytest.raises(ValueError, match="cannot be fused"):
            main(config(order, tmp_path))


def test_missing_folds_and_notes_are_named(folds, tmp_path):
    for run in folds:
        shutil.rmtree(Path(run) / "di")
        content = json.loads((Path(run) / "bo" / "results.json").read_text())
        content["notes"] = ["both", "the 95 % intervals are rough: they rest on 1 person only"]
        (Path(run) / "bo" / "results.json").write_text(json.dumps(content))
    for who in PEOPLE[:3]:
        path = Path(folds[1]) / who / "results.json"
        content = json.loads(path.read_text())
        content["notes"] = [*content.get("notes", []), "flow only"]
        path.write_text(json.dumps(content))
    notes = main(config(folds, tmp_path))["notes"]
    assert "rgb (bo), flow (bo): both" in notes and "flow: flow only" in notes
    assert any("test 90 of 120 videos" in note for note in notes)
    assert [note for note in notes if "rough" in note and "3 people" in note]
    assert not [note for note in notes if "1 p" in note]


def test_folds_without_validation_videos(tmp_path):
    runs = [in_folds(tmp_path, name, (0, 1), i, val=False) for i, name in enumerate("ab")]
    found = main(config(runs, tmp_path))
    assert len(found["details"]["fusion"]) == 2 + 2 and found["details"]["learned"] == {}
    assert sum("saved no scores of validation videos" in note for note in found["notes"]) == 1


# ---------------------------------------------------------------------------------- what is refused


def change_scores(folder: str, old: str, new: str) -> None:
    path = Path(folder) / "scores.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_runs_that_differ_are_refused_by_name(runs, tmp_path):
    run = read_run(Path(runs[1]))
    test = run.parts["test"]
    renamed = ["fall" if name == "walk" else name for name in test.labels]
    few = Scored(test.sources[:-1], test.subjects[:-1], test.labels[:-1], test.probabilities[:-1])
    other = dataclasses.replace(test, labels=[test.labels[1], *test.labels[1:]])
    bad = {
        "only rgb has 1, such as test/59.mp4": ({"test": few}, CLASSES, {}),
        "labels of 1 test video differ .test/0.mp4": ({"test": other}, CLASSES, {}),
        "classes differ .*fall": ({"test": dataclasses.replace(test, labels=renamed)},
                                  ["fall", *CLASSES[1:]], {}),
        "train_split: 'train' and 'more'": (run.parts, CLASSES, {"train_split": "more"}),
        "test_split": (run.parts, CLASSES, {"test_split": "val"}),
        "shots": (run.parts, CLASSES, {"shots": 5}),
        "leave_one_out": (run.parts, CLASSES, {"leave_one_out": True}),
        "learned from different": (run.parts, CLASSES, {"videos": "other"}),
    }  # fmt: skip
    for words, (parts, classes, protocol) in bad.items():
        folder = save(Path(runs[1]), parts, classes, **protocol)
        with pytest.raises(ValueError, match=words):
            main(config([runs[0], folder], tmp_path))
    # A probe beside a fine-tuned network, and zero-shot classification, which learns from nothing.
    zero_shot = {"kind": "zero-shot", "videos": "x", "train_split": None}
    for protocol in ({"kind": "probe", "videos": "x"}, zero_shot):
        save(Path(runs[1]), run.parts, CLASSES, **protocol)
        main(config(runs[:2], tmp_path))
        shutil.rmtree(tmp_path / "out")


def test_people_are_those_that_any_run_knows_and_no_others(runs, tmp_path):
    """A run that knows nobody, such as one of an older list, takes no interval's people away."""
    whole = main(config(runs[:2], tmp_path))
    run = read_run(Path(runs[0]))
    nobody = dataclasses.replace(run.parts["test"], subjects=[None] * 60)
    save(Path(runs[0]), run.parts | {"test": nobody})
    assert main(config(runs[:2], tmp_path / "a"))["metrics"] == whole["metrics"]
    renamed = dataclasses.replace(nobody, subjects=["someone else"] * 60)
    save(Path(runs[0]), run.parts | {"test": renamed})
    with pytest.raises(ValueError, match=r"test/0.mp4 is of 'someone else' in one and of 'p0'"):
        main(config(runs[:2], tmp_path / "b"))


def test_wrong_numbers_of_runs(runs, tmp_path):
    for given in (runs[:1], runs * 3, [runs[0], runs[0]], [runs[0], f"{runs[0]}/."]):
        with pytest.raises(ValueError, match=r"two to|twice"):
            main(config(given, tmp_path))


@pytest.mark.parametrize(
    "old, new",
    [
        ("part,", "\0,"), ("part,source", "source,part"), ("test,test/0", "train,test/0"),
        ("test/1.mp4", "test/0.mp4"), (",walk", ",wälk"), ("p0,walk,0.", "p0,walk,nan0."),
        ("p0,walk,0.", "p0,walk,-0."), ("p0,walk,0.", "p0,walk,1."), ("p0,walk,", "p0,walk,inf,"),
        ("p0,walk,0.", "p0,walk,0x"), ("p0,walk", '"p0,walk'), ("test/2.mp4,", ""),
    ],
)  # fmt: skip
def test_damaged_scores_are_a_sentence(runs, tmp_path, old, new):
    change_scores(runs[1], old, new)
    with pytest.raises(ValueError, match=r"scores\.csv"):
        main(config(runs, tmp_path))
    assert not (tmp_path / "out" / "results.json").exists()


def test_other_damage_is_a_sentence(runs, tmp_path):
    path = Path(runs[1]) / "scores.csv"
    good = path.read_bytes()
    for data in (
        b"",
        b"\xff\xfe",
        good[: len(good) // 2],
        b"part,source,subject,label\n",
        b"a" * 200_000,
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"scores\.csv"):
            main(config(runs, tmp_path))
    path.unlink()
    with pytest.raises(ValueError, match=r"has no scores.csv.*again"):
        main(config(runs, tmp_path))
    path.mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        main(config(runs, tmp_path))
    (Path(runs[1]) / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json"):
        main(config(runs, tmp_path))


def test_scores_of_another_run_are_noticed(runs, tmp_path):
    path = Path(runs[0]) / "scores.csv"
    rows = list(csv.reader(path.open(newline="")))
    for row in rows[1:]:  # surer of the same classes
        best = max(row[4:], key=float)
        rest = f"{0.01 / (len(row) - 5):.9g}"
        row[4:] = ["0.99" if cell is best else rest for cell in row[4:]]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(ValueError, match=r"not of the run of its results.json"):
        main(config(runs, tmp_path))
    shutil.copy(Path(runs[2]) / "scores.csv", path)
    with pytest.raises(ValueError, match=r"not of the run of its results.json"):
        main(config(runs, tmp_path))


# --------------------------------------------------------------------------------------- of recipes


def test_runs_of_the_recipes_are_fused(tiny_pack, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("downstream.probe.GRID", (0.1, 1.0, 10.0))
    monkeypatch.setattr("downstream.probe.LIMITS", (0.1, 10.0))
    data = str(tiny_pack)
    finetune.main(test_finetune.config(data, tmp_path / "tuned", steps=2, val="hold-out"))
    machine = {"num_workers": 0, "precision": "fp32", "attentive": "off"}
    out = str(tmp_path / "probed")
    linear_probe.main(configure(linear_probe.Config, str(tiny_backbone), data, out, **machine))
    runs = [str(tmp_path / name) for name in ("tuned", "probed")]
    found = main(config(runs, tmp_path))
    read = read_folds([Path(run) for run in runs])[0]
    for run in read:
        assert run.parts["val"].probabilities.shape[1] == len(run.classes)
        trained = set(run.parts["val"].sources) & set(run.parts["test"].sources)
        assert not trained
        top1 = json.loads((run.folder / "results.json").read_text())["top1"]
        assert found["details"]["fusion"][f"{run.name}, alone"]["top1_accuracy"] == top1
