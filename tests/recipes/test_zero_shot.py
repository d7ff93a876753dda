"""Zero-shot classification and retrieval as a person meets them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from downstream.metrics import reversed_pairs_accuracy
from downstream.models import load_video_text
from downstream.zero_shot import embed_texts, ensemble, template_sensitivity, unit
from pretrain.backbones import export_backbone
from pretrain.data.figure import REVERSED_PAIRS
from pretrain.data.shards import Pack
from recipes import clip, finetune, linear_probe, retrieval, zero_shot
from tests.conftest import draw_motion, write_video
from tests.recipes.runs import change, configure, in_processes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quick(tiny_pair, captioned_pack, tmp_path) -> zero_shot.Config:
    return configure(zero_shot.Config,
        str(tiny_pair), str(captioned_pack), out=str(tmp_path / "out"), num_clips=1, num_workers=0,
        precision="fp32",
    )  # fmt: skip


@pytest.fixture
def video(tmp_path) -> Path:
    path = tmp_path / "clip one.mp4"
    write_video(path, draw_motion("left", 3, 1, 40, 48))
    return path


def test_what_training_saw_is_told_without_contradiction():
    about = {"config": {"text": "label"}}
    for seen, asked in (("train", "train"), ("all", "test"), ("train", "all")):
        notes = " ".join(zero_shot.on_training(about, seen, asked))
        assert "WARNING: these very videos" in notes and "only these videos" not in notes
    notes = " ".join(zero_shot.on_training(about, "train", "test"))
    assert "WARNING" not in notes and "only these videos are" in notes


def test_a_data_set(quick, capsys):
    results = zero_shot.main(quick)
    out = Path(quick.out)
    stored = json.loads((out / "results.json").read_text())
    assert (
        stored["metrics"]["top1"]["value"] == results["metrics"]["top1"]["value"]
        and stored["data"]["num_test"] == 16
    )
    assert (
        not {"top5", "mean_top1_top5"} & stored["metrics"].keys()
    )  # four classes: the five best hold every one
    assert (
        stored["metrics"]["top1"]["chance"] == 0.25
        and stored["details"]["prompts"]["template_set"] == "third_person"
    )
    assert list(stored["details"]["accuracy_of_each_template"]) == list(
        zero_shot.load_templates("third_person")
    )
    assert "a person {}" in stored["details"]["accuracy_of_each_template"]
    assert stored["settings"]["classes"]["up"] == "moves up"
    words = stored["details"]["accuracy_over_templates"]
    values = list(stored["details"]["accuracy_of_each_template"].values())
    assert words["best"] == max(values) and words["worst"] == min(values)
    assert words["gain"] == pytest.approx(words["ensemble"] - np.mean(values))
    assert words["ensemble"] == pytest.approx(stored["metrics"]["top1"]["value"])
    assert sum(entry["num"] for entry in stored["per_class"].values()) == 16
    for name in ("CARD.md", "confusion.png", "predictions.csv"):
        assert (out / name).is_file(), name
    printed = capsys.readouterr().out
    assert " % of 4" in printed and " % of 16" not in printed
    assert "prompt sensitivity over 6 templates" in printed and "worst first" in printed
    assert "2 people" in printed  # of which the intervals are
    assert [note for note in stored["notes"] if "rough" in note and "2 people" in note]
    assert "top-5" not in printed and "top-1" in printed


def test_numbers_against_a_literal_computation(quick, tiny_pair):
    import torch

    from pretrain.data.shards import EvalClips

    results = zero_shot.main(change(quick, templates="openai_ucf101"))
    model = load_video_text(quick.backbone).eval()
    packed = Pack(quick.data)
    classes = packed.classes
    heads = []
    with torch.no_grad():
        for name in classes:
            vectors = []
            for template in zero_shot.load_templates("openai_ucf101"):
                tokens, _ = model.text.tokenizer([template.format(f"moves {name}")])
                vectors.append(model.encode_text(tokens)[0])
            mean = torch.stack(vectors).mean(0)
            heads.append(mean / mean.norm())
        right = total = 0
        for sample, views in EvalClips(packed, packed.split("test"), model.video.input_spec, 1, 1):
            clip = model.encode_video(model.video.input_spec.normalise(views["rgb"][:1]))[0]
            answer = max(range(len(classes)), key=lambda i: float(clip @ heads[i]))
            right += classes[answer] == packed.record(sample)["label"]
            total += 1
    assert results["metrics"]["top1"]["value"] == pytest.approx(right / total)


def test_classes_of_the_user(quick, tmp_path):
    """Further classes may be named; all labels must be; words are matched as words."""
    listing = tmp_path / "classes.csv"
    listing.write_text(
        "label,text\nup,rises\ndown,falls\nleft,goes left\nright,goes right\nstill,rests\n"
    )
    results = zero_shot.main(change(quick, classes=str(listing)))
    assert results["data"]["num_classes"] == 5 and results["metrics"]["top1"]["chance"] == 0.2
    assert results["details"]["prompts"]["template_set"] == "openai_kinetics"
    with pytest.raises(ValueError, match=r"lacks 2 of the 4 labels of the videos: left, right"):
        zero_shot.main(change(quick, classes="up, down"))


@pytest.mark.parametrize("labels", [("sit down", "Sit_Down"), ("SitDown", "sit-down")])
def test_classes_that_differ_in_spelling_only_are_refused(quick, make_pack, labels, tmp_path):
    """In zero-shot with and without --classes, training on labels, probes, fine-tuning, and labels
    of frames.
    """
    rows = [
        {"motion": m, "person": p, "take": 0, "label": label, "split": s, "subject": f"{p}"}
        for m, label in zip(("up", "down", "left"), (*labels, "walk"), strict=True)
        for p, s in ((0, "train"), (1, "test"))
    ]
    data, out = str(make_pack(rows)), str(tmp_path / "run")
    both = f"(?s){labels[0]}.*{labels[1]}|{labels[1]}.*{labels[0]}"
    listed = change(quick, data=data, classes="sit down, walk")
    model = {"out": out, "num_workers": 0, "threads": 1}
    for recipe, config in (
        (zero_shot, change(quick, data=data)),
        (zero_shot, listed),
        (linear_probe, configure(linear_probe.Config, quick.backbone, data, out=out)),
        (
            linear_probe,
            configure(linear_probe.Config, quick.backbone, data, out=out, leave_one_out=True),
        ),
        (finetune, configure(finetune.Config, model="frame_mean", data=data, **model)),
        (
            clip,
            configure(
                clip.Config,
                data=(data,),
                text="label",
                model="vit_xs",
                size=32,
                text_model="xxs",
                **model,
            ),
        ),
    ):
        with pytest.raises(ValueError, match=both):
            recipe.main(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "either --data"),
        ({"video": "x.mp4"}, "either --data"),
        ({"data": "", "video": "x.mp4"}, "--video needs --classes"),
        ({"data": "", "video": "x.mp4", "classes": "a,b"}, "there is no such file"),
        ({"classes": "up,,down"}, "empty name"),
        ({"templates": "nothing"}, "neither a file nor one of"),
        ({"test_split": "holiday"}, "no clip of split 'holiday'"),
        ({"num_clips": 0}, "num_clips is 0"),
    ],
)
def test_mistakes_are_refused(quick, changes, message):
    with pytest.raises(ValueError, match=message):
        zero_shot.main(change(quick, **changes))
    assert not Path(quick.out).exists()


def test_a_backbone_without_text(quick, tiny_backbone):
    with pytest.raises(ValueError, match=r"no text tower.*muybridge clip"):
        zero_shot.main(change(quick, backbone=str(tiny_backbone)))


def test_results_of_other_settings_are_not_overwritten(quick):
    zero_shot.main(quick)
    before = (Path(quick.out) / "results.json").read_text()
    with pytest.raises(ValueError, match="other settings"):
        zero_shot.main(change(quick, templates="plain"))
    assert (Path(quick.out) / "results.json").read_text() == before
    zero_shot.main(quick)


def test_one_video(quick, video, capsys):
    config = change(
        quick, data="", video=str(video), classes="moves left, moves right, sits", templates="plain"
    )
    result = zero_shot.main(config)
    assert {entry["class"] for entry in result["ranking"]} == {"moves left", "moves right", "sits"}
    values = [entry["probability"] for entry in result["ranking"]]
    assert sum(values) == pytest.approx(1) and values == sorted(values, reverse=True)
    assert (Path(quick.out) / "filmstrip.png").is_file()
    printed = capsys.readouterr().out
    assert "clip one.mp4: 2.5 s in 1 clip," in printed and "%" in printed
    with pytest.raises(ValueError, match="names only"):
        zero_shot.main(change(config, classes="sits"))


def test_starter_sees_one_fast_video_at_the_rate_it_learned_from(quick, tmp_path, monkeypatch):
    path, seen = tmp_path / "fast.mp4", []
    write_video(path, draw_motion("left", 3, 1, 40, 48), fps=40)
    embed = zero_shot.embed_now
    monkeypatch.setattr(
        zero_shot, "embed_now", lambda *a: [seen.append(a[0].video.input_spec.stride), embed(*a)][1]
    )
    zero_shot.main(change(quick, backbone="starter", data="", video=str(path), classes="walk,run"))
    assert seen == [2]


def test_one_video_of_two_frames(quick, tmp_path):
    path = tmp_path / "short.mp4"
    write_video(path, draw_motion("left", 3, 1, 2, 48))
    config = change(quick, data="", video=str(path), classes="moves left, sits")
    assert len(zero_shot.main(config)["ranking"]) == 2


def test_a_text_file_named_mp4(quick, tmp_path):
    path = tmp_path / "notes.mp4"
    path.write_text("buy milk")
    with pytest.raises(ValueError, match=r"notes\.mp4 cannot be used: not a video") as caught:
        zero_shot.main(change(quick, data="", video=str(path), classes="a,b"))
    assert "refused.jsonl" not in str(caught.value)  # a folder that is gone


def test_the_command_shows_a_mistake_in_one_line(tiny_backbone, tiny_pack, tmp_path):
    words = ["recipes/zero_shot.py", "--backbone", str(tiny_backbone), "--data", str(tiny_pack)]
    run = in_processes(tmp_path, 1, "tests.recipes.host", "command", words)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


def test_sensitivity_by_hand():
    videos = unit(np.array([[1.0, 0.1], [0.2, 1.0], [1.0, 0.3]]))
    good, swapped = np.eye(2), np.eye(2)[::-1]
    labels = np.array([0, 1, 0])
    found = template_sensitivity(
        videos, np.stack([good, good * 0.99 + 0.01, swapped]), labels, ("a{}", "b{}", "c{}")
    )
    assert found["per_template"] == {"a{}": 1.0, "b{}": 1.0, "c{}": 0.0}
    assert found["worst"] == 0 and found["best"] == 1 and found["ensemble"] == 1
    assert found["gain"] == pytest.approx(1 - 2 / 3)
    assert np.allclose(np.linalg.norm(ensemble(np.stack([good, swapped])), axis=1), 1)


def test_reversed_pairs_are_chance_for_whoever_knows_no_order():
    classes = sorted(name for pair in REVERSED_PAIRS for name in pair)
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 200)
    guess, exact = rng.normal(size=(1600, 8)), np.eye(8)[labels]
    assert reversed_pairs_accuracy(guess, labels, classes) == pytest.approx(0.5, abs=0.04)
    assert reversed_pairs_accuracy(exact, labels, classes) == 1.0
    one_sided = np.tile(np.arange(8.0), (1600, 1))
    assert reversed_pairs_accuracy(one_sided, labels, classes) == 0.5
    swapped = exact.copy()
    a, b = classes.index("open"), classes.index("close")
    swapped[:, [a, b]] = exact[:, [b, a]]
    assert reversed_pairs_accuracy(swapped, labels, classes) == 0.75
    assert reversed_pairs_accuracy(exact, labels, [*classes[1:], "x"]) is None


def test_an_empty_text_is_refused(tiny_pair):
    import torch

    with pytest.raises(ValueError, match="2 of 2"):
        embed_texts(load_video_text(str(tiny_pair)), ["a", " "], torch.device("cpu"))


# ------------------------------------------------------------------------------ retrieval


@pytest.fixture
def quick_retrieval(tiny_pair, captioned_pack, tmp_path) -> retrieval.Config:
    return configure(retrieval.Config,
        str(tiny_pair), str(captioned_pack), out=str(tmp_path / "out"), num_clips=1, num_workers=0,
        precision="fp32",
    )  # fmt: skip


def test_retrieval_scores(quick_retrieval, monkeypatch, tmp_path, capsys):
    results = retrieval.main(quick_retrieval)
    with monkeypatch.context() as patch:
        real = Pack.record

        def twice(pack, i):
            record = real(pack, i)
            said = record["captions"]
            return record | {"captions": [*said, *(s.upper() for s in said)]}

        patch.setattr(Pack, "record", twice)
        said_again = retrieval.main(change(quick_retrieval, out=str(tmp_path / "b")))
    stored = json.loads((Path(quick_retrieval.out) / "results.json").read_text())
    names = {"t2v_r1", "t2v_r5", "t2v_r10", "v2t_r1", "v2t_r10", "t2v_median_rank"}
    assert names <= stored["metrics"].keys() and stored["data"]["num_test"] == 16
    assert (
        stored["metrics"]["t2v_r1"]["n"] == 32 and stored["metrics"]["t2v_r1"]["of"] == "captions"
    )
    chance = {name: metric["chance"] for name, metric in stored["metrics"].items()}
    assert chance["t2v_r1"] == 1 / 16 and chance["t2v_mean_rank"] == 8.5
    assert 1 / 32 < chance["v2t_r1"] < chance["v2t_r5"] < 1 and chance["v2t_median_rank"] > 5
    assert any("24 captions given before" in note for note in stored["notes"])  # eight sentences
    # Written twice, once in capitals: a video's own are no rivals, those of the others are there
    # twice.
    assert said_again["metrics"]["v2t_mean_rank"]["value"] == pytest.approx(
        2 * results["metrics"]["v2t_mean_rank"]["value"] - 1
    )
    assert (
        said_again["metrics"]["t2v_mean_rank"]["value"]
        == results["metrics"]["t2v_mean_rank"]["value"]
    )
    assert said_again["metrics"]["t2v_r1"]["n"] == 64
    assert said_again["notes"] == stored["notes"]
    said = capsys.readouterr().out
    assert "text to video" in said and re.search(r"mean rank +[\d.]+ +[\d.]+ to [\d.]+ +8.5", said)
    assert results["details"]["interval"]["resampled"] == "subjects"
    for name, metric in results["metrics"].items():
        low, high = metric["interval"]
        assert low <= high and (name.endswith("median_rank") or low <= metric["value"] <= high)
    assert (
        0
        <= results["metrics"]["t2v_r1"]["value"]
        <= results["metrics"]["t2v_r5"]["value"]
        <= results["metrics"]["t2v_r10"]["value"]
        <= 1
    )
    with pytest.raises(ValueError, match="other settings"):
        retrieval.main(change(quick_retrieval, num_clips=2))


def test_a_photograph_is_drawn_once(quick_retrieval, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(2):
        shade = np.full((64, 64, 3), 60 * number, np.uint8)
        Image.fromarray(shade).save(folder / f"{number}.png")
    drawn: list = []
    sheet = lambda path, pictures, title: drawn.extend(pictures)
    monkeypatch.setattr("recipes.retrieval.contact_sheet_figure", sheet)
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))
    config = change(quick_retrieval, query="a square", data=str(folder), out=str(tmp_path / "o"))
    retrieval.main(config)
    assert [len(frames) for _, frames, _ in drawn] == [1, 1]


def test_search(quick_retrieval, capsys):
    config = change(quick_retrieval, query="a square moves up", top=5)
    found = retrieval.main(config)
    assert found["num_videos"] == 56 and len(found["best"]) == 5
    values = [entry["similarity"] for entry in found["best"]]
    assert values == sorted(values, reverse=True)
    assert (Path(config.out) / "contact_sheet.png").is_file()
    printed = capsys.readouterr().out
    assert found["best"][0]["video"] in printed and "mean of 56 videos" in printed
    assert found["mean_similarity"] <= values[0] and "training" not in printed
    with pytest.raises(ValueError, match="--query is empty"):
        retrieval.main(change(config, query=" "))
    with pytest.raises(ValueError, match="at least one"):
        retrieval.main(change(config, top=0))


def test_a_search_says_flat_scores_and_training_videos(
    quick_retrieval, monkeypatch, tmp_path, capsys
):
    """Where the best is hardly above the mean, nothing was found; and training videos are found too
    easily.
    """
    similar = {"flat": np.linspace(0.2, 0.24, 56), "steep": np.r_[np.full(55, 0.1), 0.4]}
    data = Pack(quick_retrieval.data)
    for name, values in similar.items():
        notes = retrieval.search_notes(quick_retrieval, data, values)
        assert [n for n in notes if "flat" in n] == (notes if name == "flat" else [])
    model = load_video_text(quick_retrieval.backbone)
    for number, about in enumerate(
        ({"data": [quick_retrieval.data]}, {"data_fingerprint": data.index["fingerprint"]})
    ):
        folder = tmp_path / f"run{number}" / "backbone"
        export_backbone(model, folder, {"split": "train", **about})
        trained = change(quick_retrieval, backbone=str(folder), out=str(tmp_path / f"out{number}"))
        found = retrieval.main(change(trained, query="up"))
        assert [n for n in found["notes"] if "32 of the 56 clips" in n and "training" in n]
        assert "training clips" in capsys.readouterr().out
    monkeypatch.setattr(data, "index", dict(data.index, splits={}))  # all of which was trained on
    notes = retrieval.search_notes(trained, data, similar["steep"])
    assert [n for n in notes if "56 of the 56 clips" in n]
    scored = retrieval.main(change(trained, test_split="train", out=str(tmp_path / "train")))
    assert [n for n in scored["notes"] if "WARNING" in n and "trained on these" in n]


def test_data_without_captions_can_only_be_searched(quick_retrieval, tiny_pack):
    config = change(quick_retrieval, data=str(tiny_pack))
    with pytest.raises(ValueError, match=r"no clip .*16 in all.* has a caption.*--query"):
        retrieval.main(config)
    assert len(retrieval.main(change(config, query="up", top=100))["best"]) == 48


def test_a_probe_of_the_video_tower(tiny_pair, captioned_pack, tmp_path):
    from recipes import linear_probe

    results = linear_probe.main(
        configure(linear_probe.Config,
            str(tiny_pair), str(captioned_pack), out=str(tmp_path / "probe"), num_workers=0,
            num_clips=1, attentive="off",
        )
    )  # fmt: skip
    assert results["details"]["views"]["time_segments"] == 2
