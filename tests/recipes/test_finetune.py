"""Fine-tuning, prediction and comparison end to end, at tiny size."""

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from downstream.classifier import Classifier, class_probabilities, frame_probabilities
from downstream.features import Extraction
from downstream.fusion import read_run
from downstream.models import build_model, load_backbone, load_classifier
from downstream.results import read_results
from downstream.splits import choose_splits, videos_digest
from downstream.tasks import Clips
from pretrain import checkpoint, modes
from pretrain.data.pack import pack
from pretrain.data.shards import Pack
from pretrain.flags import flat
from pretrain.names import from_csv
from pretrain.spec import InputSpec, Joints, Stream, flow_stream
from recipes import compare, convert, finetune, predict
from tests.conftest import draw_motion, motion_rows, write_video
from tests.recipes.runs import (
    ROOT,
    change,
    configure,
    equal,
    final_weights,
    flags_of,
    in_processes,
    launch,
    modes_in_steps,
    program,
    run_calm_and_harried,
    stop_in_step,
)


def config(data, out, **changes) -> finetune.Config:
    small = configure(finetune.Config,
        preset="test", model="frame_early", network="test_resnet", frames=3, stride=4, size=32,
        data=str(data), out=str(out), steps=6, batch_size=8, micro_batch=4, precision="fp32",
        num_workers=0, threads=1, save_every=2, log_seconds=0.0, num_clips=1,
    )  # fmt: skip
    return change(small, **changes)


@pytest.fixture(scope="module")
def undisturbed(tiny_pack, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    finetune.main(
        config(tiny_pack, run, ema=0.5, mixup=0.8, cutmix=1.0, erase=0.5, rand_augment="n2-m5")
    )
    return run


def test_a_forward_pass_larger_than_the_memory_is_warned_of(monkeypatch):
    model = Classifier(build_model("i3d", width=0.1, frames=8, size=32), ["run", "walk"], 0.0)
    clip = (torch.empty(1, 3, 8, 32, 32, device="meta"),)
    assert modes.too_large(model, clip, 2, half=False) == ""
    monkeypatch.setattr(modes, "free_memory", lambda: 2**20)
    told = modes.too_large(model, clip, 64, half=False)
    assert told.startswith("WARNING") and "--micro-batch 1 or less" in told
    model.requires_grad_(False)  # nothing is kept
    assert modes.too_large(model, clip, 64, half=False) == ""


def test_whole_run(undisturbed, tiny_pack):
    log = [json.loads(line) for line in (undisturbed / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 7))
    results = json.loads((undisturbed / "results.json").read_text())
    assert (
        results["metrics"]["top1"]["chance"] == 0.25
        and results["data"]["num_test"] == 16
        and results["metrics"]["top1"]["of"] == "videos"
    )
    assert not {"top5", "reversed_pairs"} & results["metrics"].keys()
    assert read_results(undisturbed).as_dict() == results
    assert [note for note in results["notes"] if "rough" in note and "2 people" in note]
    low, high = results["metrics"]["top1"]["interval"]
    assert low <= results["metrics"]["top1"]["value"] <= high
    protocol = results["protocol"]
    assert protocol["num_train"] == 32 and protocol["training_clips"] == 48
    assert results["data"]["fingerprint"] == Pack(tiny_pack).index["fingerprint"]
    assert results["data"]["subjects_in_both"] == 0
    for name in ("CARD.md", "confusion.png", "predictions.csv"):
        assert (undisturbed / name).is_file()
    model = load_classifier(str(undisturbed / "backbone"))
    assert model.classes == ["down", "left", "right", "up"]
    learner = load_file(checkpoint.checkpoints(undisturbed)[0] / "model.safetensors")
    average = {
        k.removeprefix("average."): v for k, v in learner.items() if k.startswith("average.")
    }
    assert equal(dict(model.state_dict()), average)  # the average is what is exported
    assert not torch.equal(average["head.weight"], learner["model.head.weight"])
    assert equal(dict(load_classifier(str(undisturbed / "last")).state_dict()), average)


def test_it_learns_what_moves_where(tiny_pack, tmp_path):
    results = finetune.main(
        config(tiny_pack, tmp_path / "run", steps=60, save_every=60, batch_size=16, micro_batch=16,
               base_lr=0.05, flip=False, colour=0.0, smoothing=0.0, stride=5)
    )  # fmt: skip
    assert results["metrics"]["top1"]["value"] > 0.6  # chance 25 %


def test_numbers_are_those_of_the_exported_classifier(undisturbed, tiny_pack):
    model = load_classifier(str(undisturbed / "backbone"))
    pack_ = Pack(tiny_pack)
    ids = pack_.split("test")
    how = Extraction(1, 1, 1, precision="fp32")
    scores = class_probabilities(model, pack_, ids, how)
    right = [
        model.classes[s.argmax()] == pack_.record(i)["label"]
        for s, i in zip(scores, ids, strict=True)
    ]
    assert json.loads((undisturbed / "results.json").read_text())["metrics"]["top1"][
        "value"
    ] == pytest.approx(np.mean(right))
    with open(undisturbed / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert np.mean([row["label"] == row["predicted"] for row in rows]) == pytest.approx(
        np.mean(right)
    )


@pytest.mark.parametrize("stop_after", [1, 2, 5])
def test_interrupted_and_resumed_equals_undisturbed(
    undisturbed, tiny_pack, tmp_path, monkeypatch, stop_after
):
    """Dropout, mixing, erasing and the average included."""
    stop_in_step(monkeypatch, finetune, stop_after)
    cfg = config(
        tiny_pack, tmp_path / "run", ema=0.5, mixup=0.8, cutmix=1.0, erase=0.5, rand_augment="n2-m5"
    )
    with pytest.raises(SystemExit) as stopped:
        finetune.main(cfg)
    assert stopped.value.code == 130
    finetune.main(change(cfg, resume=True))
    assert equal(final_weights(tmp_path / "run"), final_weights(undisturbed))


def test_workers_do_not_change_a_bit(undisturbed, tiny_pack, tmp_path):
    cfg = config(
        tiny_pack,
        tmp_path / "run",
        ema=0.5,
        mixup=0.8,
        cutmix=1.0,
        erase=0.5,
        rand_augment="n2-m5",
        num_workers=2,
    )
    finetune.main(cfg)
    assert equal(final_weights(tmp_path / "run"), final_weights(undisturbed))


def test_killed_and_started_again(tiny_pack, tmp_path):
    cfg = config(tiny_pack, tmp_path, mixup=0.8, val="hold-out", val_every=2)
    run_calm_and_harried(tmp_path, cfg, [{"die_in_save": 3}], 1)
    calm, harried = final_weights(tmp_path / "calm"), final_weights(tmp_path / "harried")
    assert equal(calm, harried)
    best = [load_file(tmp_path / n / "backbone" / "model.safetensors") for n in ("calm", "harried")]
    assert equal(*best)


def test_two_processes(tiny_pack, tmp_path):
    """Started by torchrun itself, as by a user; other tests start theirs in less time."""
    cfg = config(tiny_pack, tmp_path / "run", val="hold-out", val_every=3, micro_batch=2)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "--local-addr", "localhost", *program(cfg)], cwd=ROOT,
        capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (
        results["data"]["num_train"] == 24
        and "2 processes x 2 micro-batches x 2 clips" in done.stdout
    )


def test_the_best_validated_weights_are_exported(tiny_pack, tmp_path, monkeypatch):
    scores = iter([0.5, 0.75, 0.25, 0.7, 0.7])
    monkeypatch.setattr(finetune, "validate", lambda *_: next(scores))
    cfg = config(
        tiny_pack, tmp_path / "run", val="hold-out", val_every=1, patience=3, steps=20, save_every=1
    )
    results = finetune.main(cfg)
    training = results["details"]["training"]
    assert (training["steps"], training["best_step"]) == (5, 2) and "epochs" not in training
    assert (
        "people" in results["protocol"]["validation"]
        or "subjects" in results["protocol"]["validation"]
    )
    provenance = json.loads((tmp_path / "run" / "backbone" / "config.json").read_text())[
        "provenance"
    ]
    assert provenance["step"] == 2 and provenance["fps"] == 16
    best, last = (
        load_file(tmp_path / "run" / n / "model.safetensors") for n in ("backbone", "last")
    )
    assert not equal(best, last)
    again = finetune.main(cfg)  # the same command again: nothing is trained, the same numbers
    assert (
        again["metrics"]["top1"]["value"] == results["metrics"]["top1"]["value"]
        and again["details"]["training"]["steps"] == 5
    )


def test_from_a_backbone_and_frozen(tiny_pack, tiny_backbone, tmp_path, monkeypatch):
    given = {
        "model": "",
        "network": None,
        "frames": None,
        "stride": None,
        "size": None,
        "backbone": str(tiny_backbone),
    }
    before = load_backbone(str(tiny_backbone)).state_dict()
    finetune.main(config(tiny_pack, tmp_path / "frozen", **given, freeze=True, layer_decay=1.0))
    after = load_backbone(str(tmp_path / "frozen" / "backbone")).state_dict()
    assert equal(dict(before), dict(after))
    for rate in ("layer_decay", "backbone_lr"):
        with pytest.raises(ValueError, match="freeze"):
            useless = config(tiny_pack, tmp_path, **given, freeze=True, **{rate: 0.5})
            finetune.resolve(useless, finetune.build_backbone(useless))
    of_frames = config(tiny_pack, tmp_path, model="lstm", freeze=True, layer_decay=0.5)
    assert finetune.resolve(of_frames, finetune.build_backbone(of_frames))
    modes = modes_in_steps(monkeypatch, finetune)
    results = finetune.main(
        config(
            tiny_pack,
            tmp_path / "tuned",
            **given,
            drop_path=0.2,
            layer_decay=0.5,
            optimizer="sgd",
            views=2,
        )
    )
    after = load_backbone(str(tmp_path / "tuned" / "backbone")).state_dict()
    assert not torch.equal(before["blocks.0.fc1.weight"], after["blocks.0.fc1.weight"])
    assert modes == [{True}] * 6
    assert results["details"]["training"]["weights"] == "of the backbone"
    longer = finetune.main(
        config(tiny_pack, tmp_path / "longer", **given | {"frames": 4, "size": 16}, steps=1)
    )
    assert longer["details"]["views"]["frames"] == 4 and longer["details"]["views"]["size"] == 16
    assert longer["model"]["arguments"]["trained_grid"] == [4, 4, 4]
    with pytest.raises(ValueError, match="--network"):
        finetune.main(config(tiny_pack, tmp_path / "no", **given | {"network": "resnet18"}))


def test_frozen_frame_networks_train_what_stands_on_them(tiny_pack, tmp_path):
    cfg = config(tiny_pack, tmp_path / "run", model="lstm", freeze=True)
    fresh = finetune.build_backbone(cfg).state_dict()
    finetune.main(cfg)
    after = load_backbone(str(tmp_path / "run" / "backbone")).state_dict()
    images = {k for k in fresh if k.startswith("images.")}
    assert all(torch.equal(fresh[k], after[k]) for k in images)  # batch statistics included
    assert not torch.equal(fresh["rnn.weight_hh_l0"], after["rnn.weight_hh_l0"])


@pytest.mark.parametrize("weighted", [False, True], ids=["unlabelled", "weights"])
def test_accumulation_is_exact(two_things, tmp_path, weighted):
    """One pass, four passes and two processes with two each give the same gradient.

    Frozen below, since batch norm sees single passes only.
    """
    cfg = config(
        two_things, tmp_path / "run", model="gru", freeze=True, frames=8, stride=2, per_frame=True,
        steps=1, batch_size=8, micro_batch=8, dropout=0.0, smoothing=0.0,
        class_weights="balanced" if weighted else "none", clip_grad=0.0,
    )  # fmt: skip
    norms = {}
    for micro in (8, 2):
        out = tmp_path / str(micro)
        finetune.main(change(cfg, micro_batch=micro, out=str(out)))
        norms[micro] = json.loads((out / "log.jsonl").read_text())
    assert norms[8]["grad_norm"] == pytest.approx(norms[2]["grad_norm"], rel=1e-4)
    assert norms[8]["loss"] == pytest.approx(norms[2]["loss"], rel=1e-5)
    if weighted:
        cfg = change(cfg, micro_batch=2, out=str(tmp_path / "two"))
        done = launch(tmp_path, cfg, {}, processes=2)
        assert done.returncode == 0, done.stderr[-2000:]
        both = json.loads((tmp_path / "two" / "log.jsonl").read_text())
        assert both["grad_norm"] == pytest.approx(norms[8]["grad_norm"], rel=1e-4)
        assert both["loss"] == pytest.approx(norms[8]["loss"], rel=1e-5)


def test_a_published_recipe_from_a_backbone_to_labels(tiny_pack, tiny_backbone, tmp_path):
    """fc_norm, its classifier, uniform sampling and test views arrive in the exported classifier,
    in files, and stay there.
    """
    recipe = finetune.PRESETS["videomae_b_ssv2"]
    cfg = change(
        recipe, backbone=str(tiny_backbone), data=str(tiny_pack), out=str(tmp_path / "run"),
        steps=2, batch_size=8, micro_batch=4, precision="fp32", num_workers=0, threads=1,
        log_seconds=0.0,
    )  # fmt: skip
    results = finetune.main(cfg)
    assert results["protocol"]["num_clips"] == 2 and results["protocol"]["num_crops"] == 3
    model = load_classifier(str(tmp_path / "run" / "backbone"))
    assert model.backbone.fc_norm and model.input_spec.stride == 0
    assert model.head.weight.std() < 1e-3  # it started at 2e-5
    again = finetune.main(
        change(
            cfg, backbone=str(tmp_path / "run" / "backbone"), out=str(tmp_path / "more"), steps=1
        )
    )
    assert again["model"]["arguments"]["pool"] == "fc_norm"

    convert.main(convert.Config(str(tmp_path / "run" / "backbone"), "hf", str(tmp_path / "hf")))
    write_video(tmp_path / "up.mp4", draw_motion("up", 7, 0, 16, 32))
    answers = [
        predict.main(
            configure(predict.Config, source, (str(tmp_path / "up.mp4"),), num_workers=0,
                      precision="fp32", out=str(tmp_path / out), **more)
        )["up.mp4"]
        for source, out, more in (
            (str(tmp_path / "run" / "backbone"), "ours", {}),
            (f"hf:{tmp_path / 'hf'}", "theirs", {"sampling": "uniform"}),
            (f"hf:{tmp_path / 'hf'}", "named", {"classes": "u, v, w, x"}),
        )
    ]  # fmt: skip
    assert [e["label"] for e in answers[0]] == [e["label"] for e in answers[1]]
    assert [e["probability"] for e in answers[0]] == pytest.approx(
        [e["probability"] for e in answers[1]], abs=1e-5
    )
    assert {e["label"] for e in answers[2]} == {"u", "v", "w", "x"}
    named = configure(
        predict.Config,
        f"hf:{tmp_path / 'hf'}",
        (str(tmp_path / "up.mp4"),),
        classes="u, v",
        out=str(tmp_path / "no"),
    )
    with pytest.raises(ValueError, match="2 names"):
        predict.main(named)


def test_paper_resolves_for_any_family():
    """Also for those that ended with an error: frame_swin, and a trained I3D, which are no video
    transformers.
    """
    for name in ("frame_swin", "i3d", "lstm", "vit_b", "vivit_1", "video_swin_t"):
        with torch.device("meta"):
            backbone = build_model(name, small=not name.startswith("vi"))
            paper = configure(finetune.Config, preset="paper", model=name)
            cfg, training, backbone = finetune.resolve(paper, backbone)
        assert training.epochs and training.batch_size and training.num_clips > 1
        assert training.crop and training.scales
        known = flat(cfg)  # nothing but these is left to be filled in
        optional = {"steps", "patience", "pool", "sampling", "rand_augment"}
        for flag, value in vars(training).items():
            assert flag in ("about", "fits") or known[flag] == value
            assert value is not None or flag in optional
        assert bool(backbone.input_spec.stride) == (training.sampling != "uniform")
    with pytest.raises(ValueError, match=r"videomae_l_k400.*vit_b"), torch.device("meta"):
        finetune.resolve(
            configure(finetune.Config, preset="videomae_l_k400", model="vit_b"),
            build_model("vit_b"),
        )


class OfStreams(torch.nn.Module):
    """A backbone of which only its clip is asked for."""

    embed_dim, grid, arguments = 1, (1, 1, 1), {}

    def __init__(self, **streams):
        super().__init__()
        self.input_spec = InputSpec(8, 1, 32, streams)

    def forward_features(self, clip): ...

    def forward(self, clip): ...


def test_what_changes_colours_or_mixes_pixels_is_for_pixels():
    resolved = lambda backbone, **given: finetune.resolve(
        configure(finetune.Config, model="m", **given), backbone
    )[1]
    flow, pose = OfStreams(flow=flow_stream(32)), OfStreams(pose=Joints("coco17", 17))
    assert (
        resolved(flow).colour
        == resolved(pose).colour
        == 0
        < resolved(OfStreams(rgb=Stream())).colour
    )
    assert resolved(flow, mixup=0.8).mixup == 0.8
    for given in ({"mixup": 0.8}, {"cutmix": 1.0}):
        with pytest.raises(ValueError, match="takes pose"):
            resolved(pose, **given)


def test_few_shots(tiny_pack, tmp_path):
    results = finetune.main(config(tiny_pack, tmp_path / "run", shots=2, steps=2))
    assert results["data"]["num_train"] == 8
    assert any("2 training videos" in note for note in results["notes"])


# ---------------------------------------------------------------------------------------- per frame


@pytest.fixture(scope="module")
def two_things(tmp_path_factory) -> Path:
    """Videos in which a square goes right or left, then up or down, with `segments` and without a
    label.
    """
    folder = tmp_path_factory.mktemp("two")
    rows = []
    for person in range(6):
        for first in ("right", "left"):
            for second in ("up", "down"):
                name = f"p{person}-{first}-{second}.mp4"
                parts = [draw_motion(m, person, 0, 16, 32) for m in (first, second)]
                write_video(folder / name, np.concatenate(parts))
                segments = f"0-1 {first}; 1.25-2 {second}"
                rows.append([name, f"p{person}", "train" if person < 4 else "test", segments])
    with open(folder / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "subject", "split", "segments"], *rows])
    out = tmp_path_factory.mktemp("packs") / "pack"
    pack(folder / "list.csv", out, short_side=32, workers=1, progress=False)
    return out


def test_one_person_is_left_out(tiny_pack, tmp_path, capsys):
    """Nothing of that person is learned from or validated on; the data's own splits do not count,
    and the plan, the results and the exported classifier say so."""
    records = list(Pack(tiny_pack).records())
    who = next(r["subject"] for r in records if r["split"] == "train")
    results = finetune.main(
        config(tiny_pack, tmp_path / "run", steps=2, leave_out=who, val="hold-out")
    )
    said = capsys.readouterr().out
    assert re.search(rf"data .* test videos? of .*all of {who}\n", said)
    assert not re.search(r"\b1 ([a-z]+ )?(videos|clips|classes|threads|frames|people)\b", said)
    run = read_run(tmp_path / "run")
    of = {r["source"]: r["subject"] for r in records}
    assert sorted(run.parts["test"].sources) == sorted(s for s in of if of[s] == who)
    assert who not in run.parts["val"].subjects
    data = results["data"]
    rest = data["num_train"] + len(run.parts["val"].sources)
    assert data["num_test"] + rest == len(of) and data["subjects_in_both"] == 0
    assert (data["train_split"], data["test_split"]) == (f"all but {who}", who)
    assert results["protocol"]["leave_out"] == results["settings"]["leave_out"] == who
    exported = json.loads((tmp_path / "run" / "backbone" / "config.json").read_text())
    assert exported["provenance"]["split"] == f"all but {who}"


def test_a_label_for_every_frame(two_things, tmp_path, capsys):
    cfg = config(
        two_things, tmp_path / "run", model="tcn", frames=8, stride=2, per_frame=True, steps=40,
        save_every=40, batch_size=8, micro_batch=8, base_lr=0.1, flip=False, colour=0.0,
        subtract_mean=False,
    )  # fmt: skip
    results = finetune.main(cfg)
    assert results["metrics"]["top1"]["of"] == "frames" and results["data"]["num_classes"] == 4
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10]), losses
    assert sum(entry["num"] for entry in results["per_class"].values()) == 8 * (16 + 12)
    assert all(
        0 < results["metrics"][name]["value"] <= 1 for name in ("edit", "f1_10", "f1_25", "f1_50")
    )
    assert (
        results["metrics"]["f1_10"]["value"]
        >= results["metrics"]["f1_25"]["value"]
        >= results["metrics"]["f1_50"]["value"]
    )
    assert "edit score of segments" in capsys.readouterr().out
    model = load_classifier(str(tmp_path / "run" / "backbone"))
    pack_ = Pack(two_things)
    probabilities = frame_probabilities(model, pack_, pack_.record(0), torch.device("cpu"), "fp32")
    assert probabilities.shape == (32, 4) and np.allclose(probabilities.sum(1), 1, atol=1e-5)

    folder = tmp_path / "videos"
    folder.mkdir()
    both = np.concatenate([draw_motion(m, 9, 0, 16, 32) for m in ("left", "up")])
    write_video(folder / "left then up.mp4", both)
    (folder / "text.mp4").write_text("not a video")
    out = tmp_path / "answers"
    answers = predict.main(
        configure(
            predict.Config,
            str(tmp_path / "run" / "backbone"),
            (str(folder),),
            out=str(out),
            num_workers=0,
            precision="fp32",
        )
    )
    assert list(answers) == ["left then up.mp4"] and len(answers["left then up.mp4"]) == 4
    (segments,) = json.loads((out / "segments.json").read_text()).values()
    assert segments[0]["start"] == 0 and segments[-1]["end"] == pytest.approx(2.0)
    assert all(a["end"] == b["start"] for a, b in pairwise(segments))
    assert (out / "timeline.png").is_file()
    assert list(json.loads((out / "refused.json").read_text())) == ["text.mp4"]


class Axis(Clips):
    """Along which axis something moves: a task from outside, of two classes out of four labels."""

    kind = "axis"

    def split(self, pack, train, test, seed, leave_out=None):
        along = lambda videos: dataclasses.replace(
            videos, labels=[self.of(n) for n in videos.labels]
        )
        learned, tested, _, notes = super().split(pack, train, test, seed, leave_out)
        return along(learned), along(tested), ["x", "y"], notes

    def label(self, record, frames, numbers):
        return super().label(record | {"label": self.of(record["label"])}, frames, numbers)

    def of(self, label):
        return "y" if label in ("up", "down") else "x"


def test_a_task_from_outside_is_fine_tuned(tiny_pack, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "task_of", lambda per_frame: Axis())
    results = finetune.main(config(tiny_pack, tmp_path / "run", steps=2))
    assert results["protocol"]["kind"] == "axis" and set(results["per_class"]) == {"x", "y"}
    assert results["metrics"]["top1"]["chance"] == 0.5 and results["data"]["num_test"] == 16


def test_without_segments_every_frame_has_the_clips_label(tiny_pack, tmp_path):
    results = finetune.main(
        config(tiny_pack, tmp_path / "run", model="gru", per_frame=True, steps=2)
    )
    assert any("every frame" in note for note in results["notes"])
    assert sum(entry["num"] for entry in results["per_class"].values()) == 16 * 16


# --------------------------------------------------------------------------------------- predicting


def test_predictions_of_a_file_and_a_folder(undisturbed, tmp_path, capsys):
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    write_video(folder / "eins zwei.mp4", draw_motion("up", 7, 0, 16, 32))
    write_video(folder / "=b.mp4", draw_motion("down", 7, 0, 16, 32))
    write_video(
        folder / "sub" / "ä.mp4", draw_motion("left", 7, 0, 3, 32)
    )  # shorter than the model wants
    (folder / "text.mp4").write_text("not a video")
    base = configure(
        predict.Config,
        str(undisturbed / "backbone"),
        (str(folder),),
        top_k=2,
        num_workers=0,
        out=str(tmp_path / "a"),
    )
    answers = predict.main(base)
    firsts = {ranking[0]["label"] for ranking in answers.values()}
    said = capsys.readouterr()
    assert (len(firsts) == 1) == ("taken for one class" in said.out)
    assert "near-duplicates" not in said.err  # of which a prediction knows nothing
    stored = json.loads((tmp_path / "a" / "predictions.json").read_text())
    assert stored == answers and list(stored) == sorted(stored)
    assert [Path(n).name for n in answers] == ["=b.mp4", "eins zwei.mp4", "ä.mp4"]
    with open(tmp_path / "a" / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [from_csv(row["source"]) for row in rows] == list(answers)
    for row, ranking in zip(rows, answers.values(), strict=True):
        assert row["predicted"] == ranking[0]["label"]
        assert float(row["probability"]) == ranking[0]["probability"]
        assert row["top2"] == "|".join(entry["label"] for entry in ranking)
    for ranking in answers.values():
        assert len(ranking) == 2 and ranking[0]["probability"] >= ranking[1]["probability"] > 0
    names = ("eins zwei.mp4", "sub/ä.mp4")
    files = tuple(str(folder / name) for name in names)
    two = predict.main(change(base, video=files, out=str(tmp_path / "b")))
    assert list(two) == ["eins zwei.mp4", "ä.mp4"]
    for ranking, name in zip(two.values(), names, strict=True):
        assert [e["label"] for e in ranking] == [e["label"] for e in answers[name]]
    assert json.loads((tmp_path / "b" / "predictions.json").read_text()) == two
    with pytest.raises(ValueError, match="two videos are called"):
        predict.main(change(base, video=(files[0], str(folder))))
    with pytest.raises(ValueError, match=r"nothing at .* can be used"):
        predict.main(change(base, video=(str(folder / "text.mp4"),)))
    with pytest.raises(ValueError, match="no such"):
        predict.main(change(base, video=(str(folder / "none.mp4"),)))
    with pytest.raises(ValueError, match="holds something else"):
        predict.main(change(base, out=str(folder)))
    with pytest.raises(ValueError, match="--top-k 0"):
        predict.main(change(base, top_k=0))


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "give either --model"),
        ({"backbone": "x"}, "give either --model"),
        ({"model": "lstn"}, "did you mean lstm"),
        ({"model": "i3d_flow", "network": None, "frames": 8}, "takes flow"),
        ({"patience": 2}, "--patience needs validation videos"),
        ({"patience": 2, "val": "off"}, "without effect.*--patience with --val off"),
        ({"model": "lstm", "per_frame": True, "views": 2}, "mix whole clips"),
        ({"shots": -1}, "--shots -1"),
        ({"model": "lstm", "per_frame": True, "mixup": 0.5}, "mix whole clips"),
        ({"per_frame": True}, "every frame"),
        ({"drop_path": 0.1}, "this backbone has none"),
        ({"optimizer": "lion"}, "neither adamw nor sgd"),
        ({"rand_augment": "hard"}, "not of the form"),
        (
            {"preset": "videomae_b_k400"},
            "videomae_b_k400 is not for frame_early.*karpathy_sports1m or tiny",
        ),
        ({"pool": "fc_norm"}, "only the norm of a video transformer"),
        ({"drops": (0.5,)}, "without effect.*--drops with --schedule cosine"),
        ({"crop": "resized", "scales": (0.5,)}, "without effect.*--scales with --crop resized"),
        ({"epochs": 3.0}, "without effect.*--epochs with --steps 6"),
        ({"val": "off", "val_every": 2}, "without effect.*--val-every with --val off"),
        ({"freeze": True, "drop_path": 0.1}, "without effect.*--drop-path with --freeze"),
        (
            {"model": "lstm", "per_frame": True, "num_clips": 3},
            "without effect.*--num-clips with --per-frame",
        ),
        ({"sampling": "uniform"}, "leave out --stride 4"),
        (
            {"model": "lstm", "per_frame": True, "sampling": "uniform", "stride": None},
            "give --sampling dense",
        ),
        ({"erase": 2.0}, "not between 0 and 1"),
        ({"batch_size": 8, "views": 3}, "cannot be shared evenly"),
        ({"test_split": "exam"}, "no split 'exam'"),
        ({"resume": True}, "holds no checkpoint"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tiny_pack, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune.main(config(tiny_pack, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "lstm", "per_frame": True, "mixup": 0.5}, "--mixup"),
        ({"model": "lstm", "per_frame": True, "views": 2}, "--views"),
        ({"per_frame": True}, "for every frame"),
        ({"patience": 2, "val": "off"}, "--patience"),
        ({"patience": 2}, "--patience"),
        ({"rand_augment": "hard"}, "rand_augment"),
        ({"erase": 2.0}, "erase"),
        ({"drop_path": 0.1}, "--drop-path"),
        ({"pool": "fc_norm"}, "--pool"),
        ({"sampling": "uniform"}, "--stride"),
        ({"batch_size": 9, "views": 2}, "--batch-size 9"),
        ({"test_split": "exam"}, "exam"),
        ({"train_split": "trian"}, "trian"),
        ({"leave_out": "p9", "train_split": "more"}, "--train-split with --leave-out"),
        ({"leave_out": "p9"}, "name no subject"),
        ({"data": "people.csv", "leave_out": "p9"}, "'p9'.*p1, p2"),
        ({"data": "people.csv", "leave_out": "p1", "patience": 2}, "--patience"),
        ({"data": "unlabelled.csv"}, "label"),
        ({"data": "nowhere.csv"}, "nowhere.csv"),
        ({"model": "i3d_flow", "network": None, "frames": 8, "colour": 0.0}, "no flow.* pack "),
        ({"model": "i3d_flow", "network": None, "frames": 8, "colour": 0.4}, "colour"),
        ({"resume": True}, "--resume"),
    ],
    ids=str,
)
def test_mistakes_are_named_before_the_data_are_packed(tmp_path, monkeypatch, changes, named):
    """Also those that a list shows, whose files here are not even videos."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"not a video")
    (tmp_path / "list.csv").write_text("path,label,split\na.mp4,run,train\nb.mp4,run,test\n")
    (tmp_path / "unlabelled.csv").write_text("path,split\na.mp4,train\nb.mp4,test\n")
    (tmp_path / "people.csv").write_text(
        "path,label,split,subject\na.mp4,run,val,p1\nb.mp4,run,val,p2\n"
    )
    monkeypatch.setattr(finetune, "open_data", lambda *_, **__: pytest.fail("packed"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=named):
        finetune.main(change(config("list.csv", tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_hard_data(make_pack, tmp_path):
    """One clip a class, classes with spaces and unicode; a class that is only tested; a single
    class.
    """
    names = {"up": "Äpfel pflücken", "down": "sit down", "left": "a,b", "right": 'c"d'}
    rows = [
        r | {"label": names[r["label"]]}
        for r in motion_rows(range(1), 1, "train") + motion_rows(range(1, 2), 1, "test")
    ]
    by_data = config(make_pack(rows), tmp_path / "run", steps=2, preset="tiny", num_clips=None)
    results = finetune.main(by_data)
    # 3 frames, 4 apart, of 16: twice as many views as fit behind one another.
    assert results["protocol"]["num_clips"] == 3 and results["protocol"]["num_crops"] == 1
    assert results["data"]["num_train"] == 4 and set(results["per_class"]) == set(names.values())
    unknown = [r | ({"label": "new"} if r["split"] == "test" else {}) for r in rows]
    with pytest.raises(ValueError, match="never trained: new"):
        finetune.main(config(make_pack(unknown), tmp_path / "unknown"))
    with pytest.raises(ValueError, match="the only label"):
        finetune.main(config(make_pack([r | {"label": "same"} for r in rows]), tmp_path / "one"))
    with pytest.raises(ValueError, match="held out"):
        finetune.main(config(make_pack(rows), tmp_path / "val", val="hold-out"))


def test_another_run_is_not_overwritten(undisturbed, tiny_pack):
    before = {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="differs"):
        finetune.main(config(tiny_pack, undisturbed, base_lr=0.5))
    assert before == {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()}


# ---------------------------------------------------------------------------------------- comparing


def run_forked(command: list[str], log_file: Path, _: object) -> str | None:
    """For `compare.run_one`: a forked process, which need not import everything again."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    done = in_processes(log_file.parent, 1, "tests.recipes.host", "command", command[1:])
    return None if done.returncode == 0 else done.stderr


@pytest.fixture(scope="module")
def compared(tiny_pack, tiny_backbone, tmp_path_factory) -> compare.Config:
    cfg = configure(compare.Config,
        str(tiny_pack), "frame_single,inflated,inflated:frame_single", (str(tiny_backbone),),
        steps=2, seeds=1, size=32, threads=1, num_workers=0, num_clips=1,
        out=str(tmp_path_factory.mktemp("compare") / "out"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "run_one", run_forked)
        compare.main(cfg)
    return cfg


def test_a_comparison(compared, capsys):
    out = Path(compared.out)
    found = json.loads((out / "compare.json").read_text())
    names = [row["name"] for row in found["rows"]]
    assert names == ["frame_single", "inflated", "inflated:frame_single", compared.backbones[0]]
    assert found["protocol"]["training_clips"] == 64 and found["protocol"]["num_test"] == 16
    for row in found["rows"]:
        assert row["flops"] > 0 and row["clips_per_s"] > 0 and row["minutes"] > 0
    (claim,) = found["claims"]
    assert claim["claim"].startswith("inflated inflated from frame_single beats")
    for name in ("compare.md", "compare.html", "compare.png"):
        assert (out / name).is_file()
    # Started from what frame_single had learned, filters repeated.
    first = json.loads((out / "runs" / "inflated-frame_single-seed0" / "config.json").read_text())[
        "config"
    ]
    assert first["weights"].endswith("frame_single-seed0/backbone")
    # Nothing is trained again.
    before = {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*") if p.is_file()}
    compare.main(compared)
    assert before == {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*") if p.is_file()}
    assert "| model | starts from | top-1 |" in capsys.readouterr().out


def test_the_size_of_a_pack_is_no_other_protocol(make_pack):
    """Models of other sizes have other packs of the same videos; other labels are other data."""
    rows = motion_rows(range(2), 1, "train") + motion_rows(range(2, 3), 1, "test")
    packs = [Pack(make_pack(rows, side=32)), Pack(make_pack(rows, side=48))]
    assert packs[0].index["fingerprint"] != packs[1].index["fingerprint"]
    digests = [videos_digest(*choose_splits(p, "train", "test", 0)[:2]) for p in packs]
    assert digests[0] == digests[1]
    swapped = [
        r
        | {
            "label": "left"
            if r["label"] == "right"
            else "right"
            if r["label"] == "left"
            else r["label"]
        }
        for r in rows
    ]
    assert (
        videos_digest(*choose_splits(Pack(make_pack(swapped)), "train", "test", 0)[:2])
        != digests[0]
    )


def test_numbers_of_other_protocols_are_not_ranked(compared, undisturbed, tmp_path):
    run = str(Path(compared.out) / "runs" / "inflated-seed0")
    both = compare.main(
        configure(compare.Config, results=(run, run + "/"), out=str(tmp_path / "same"))
    )
    assert len(both["rows"]) == 2
    for table in ("compare.md", "compare.html"):
        said = (tmp_path / "same" / table).read_text().replace("\\", "")
        assert compared.data in said and "synthetic" not in said and "16 test videos" in said
    with pytest.raises(ValueError, match=r"different protocols \(.*training_clips: 64 and 48"):
        compare.main(
            configure(compare.Config, results=(run, str(undisturbed)), out=str(tmp_path / "other"))
        )
    assert not (tmp_path / "other").exists()


def test_what_the_cards_warn_of_stands_under_the_table(compared, tmp_path):
    """A test part that was held out by chance, above all."""
    by_chance = "the data name no splits: 6 of 20 videos were held out for testing, seed 0"
    folders = []
    for name, more in (("frame_single", []), ("inflated", ["WARNING: b"])):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        source = Path(compared.out) / "runs" / f"{name}-seed0" / "results.json"
        results = json.loads(source.read_text())
        results["notes"] = [by_chance, *more]
        (folders[-1] / "results.json").write_text(json.dumps(results))
    compare.main(
        configure(compare.Config, results=tuple(map(str, folders)), out=str(tmp_path / "out"))
    )
    for table in ("compare.md", "compare.html"):
        said = (tmp_path / "out" / table).read_text()
        assert said.count(by_chance) == 1 and "inflated: WARNING: b" in said
    with pytest.raises(ValueError, match="spaces separate"):
        compare.main(configure(compare.Config, results=("a,b",), out=str(tmp_path / "new")))


def test_a_comparison_knows_which_flags_do_nothing():
    shown = flags_of("compare").unused(configure(compare.Config, results=("runs/a",)))
    assert {"data", "epochs", "protocol"} <= shown.keys()
    probed = flags_of("compare").unused(configure(compare.Config, models="lstm", protocol="probe"))
    assert {"epochs", "flip"} <= probed.keys() and not {"data", "seeds"} & probed.keys()
    assert not flags_of("compare").unused(configure(compare.Config, models="lstm"))


def test_a_failed_run_is_named_and_the_rest_is_shown(tiny_pack, tmp_path, monkeypatch, capsys):
    """The run that fails is started as by a user; the other one is forked, in less time."""
    real = compare.run_one

    def run(command, *rest):
        return (real if "c3d" in command else run_forked)(command, *rest)

    monkeypatch.setattr(compare, "run_one", run)
    cfg = configure(
        compare.Config,
        str(tiny_pack),
        "frame_single,c3d",
        steps=1,
        size=8,
        threads=1,
        num_workers=0,
        out=str(tmp_path / "out"),
    )
    with pytest.raises(ValueError, match=r"1 run failed.*c3d"):
        compare.main(cfg)
    assert "at least 16 of 16" in (tmp_path / "out" / "compare.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ""}, "nothing to compare"),
        ({"models": "lstm,lstm"}, "compared with itself"),
        ({"models": "inflated:frame_mean"}, "has to come before it"),
        ({"models": "lstm,lsdm"}, "there is no model 'lsdm'"),
        ({"models": "lstm", "seeds": 0}, "--seeds 0"),
        ({"models": "lstm", "results": ("nowhere",)}, "holds no results"),
    ],
)
def test_wrong_comparisons(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        compare.main(configure(compare.Config, out=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


def test_probing_side_by_side(tiny_pack, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "run_one", run_forked)
    cfg = configure(
        compare.Config,
        str(tiny_pack),
        "",
        (str(tiny_backbone),),
        protocol="probe",
        num_workers=0,
        out=str(tmp_path / "out"),
    )
    (row,) = compare.main(cfg)["rows"]
    assert row["random_init_top1"] is not None and row["minutes"] is None
