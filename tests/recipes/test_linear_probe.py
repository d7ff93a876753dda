"""The whole probe on small packed videos: what it writes, what it leaves alone, what it refuses."""

import csv
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from downstream import features as features_module
from downstream import probe
from downstream.features import Extraction, cached_features, covering_views, extract, extract_tokens
from downstream.models import load_backbone
from downstream.probe import fit_linear
from downstream.results import read_results
from downstream.splits import choose_validation
from pretrain.backbones import export_backbone
from pretrain.data.shards import Pack
from pretrain.files import cache_folder
from pretrain.spec import InputSpec, Stream
from pretrain.weights import weights_hash
from recipes import linear_probe
from recipes.linear_probe import Config, main
from tests.conftest import motion_rows
from tests.recipes.runs import change, configure, in_processes

FP32 = Extraction(num_clips=2, precision="fp32")


@pytest.fixture(scope="module")
def config(tiny_pack, tiny_backbone, tmp_path_factory) -> Config:
    out = tmp_path_factory.mktemp("probe") / "out"
    return configure(
        Config, str(tiny_backbone), str(tiny_pack), str(out), num_workers=0, precision="fp32",
        num_clips=2, num_crops=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(config) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("downstream.attentive.MIN_STEPS", 20)
        return main(config)


@pytest.fixture
def quick(config, tmp_path) -> Config:
    """The same features, out of the cache, and no attentive probe."""
    return change(config, out=str(tmp_path / "out"), attentive="off")


# ------------------------------------------------------------------------------------- what it says


def test_results_hold_what_is_promised(results, config):
    out = Path(config.out)
    stored = json.loads((out / "results.json").read_text())
    assert stored == json.loads(json.dumps(results))
    names = [
        "top1",
        "knn_top1",
        "mean_class_accuracy",
        "attentive_top1",
        "mean_token_top1",
        "majority",
    ]
    names += [
        f"random_init_{name}"
        for name in ("top1", "knn_top1", "mean_token_top1", "mean_class_accuracy")
    ]
    assert {*names} <= stored["metrics"].keys()
    assert "top5" not in stored["metrics"]  # with four classes the five best hold every one
    assert (
        stored["data"]["num_test"],
        stored["data"]["num_train"],
        stored["data"]["num_classes"],
    ) == (16, 32, 4)
    assert [note for note in stored["notes"] if "rough" in note and "2 people" in note]
    assert stored["metrics"]["top1"]["chance"] == stored["metrics"]["majority"]["value"] == 0.25
    for name in names[:5]:
        metric = stored["metrics"][name]
        assert metric["interval"][0] <= metric["value"] <= metric["interval"][1]
    assert read_results(out).as_dict() == stored


def test_predictions_and_figure_agree_with_the_numbers(results, config):
    out = Path(config.out)
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == results["data"]["num_test"]
    assert sum(r["label"] == r["predicted"] for r in rows) == round(
        16 * results["metrics"]["top1"]["value"]
    )
    assert all(
        r["top5"].split("|")[0] == r["predicted"] and len(r["top5"].split("|")) == 4 for r in rows
    )
    assert (out / "confusion.png").is_file()
    probe = load_file(out / "linear.safetensors")
    assert probe["weight"].shape == (4, 4 * 32) and probe["mean"].shape == (4 * 32,)


@pytest.mark.parametrize(
    "frames, stride, size, views",
    [
        (32, 2, (50, 50), (1, 1)), (60, 2, (180, 144), (4, 3)), (40, 2, (144, 180), (3, 3)),
        (33, 2, (54, 50), (1, 1)), (300, 4, (340, 256), (4, 3)), (300, 0, (64, 64), (2, 1)),
    ],
)  # fmt: skip
def test_views_cover_most_clips_and_wide_pictures(frames, stride, size, views):
    class Clips:
        def column(self, name):
            return np.full(5, {"frames": frames, "width": size[0], "height": size[1]}[name])

    spec = InputSpec(16, stride, 48, {"rgb": Stream((0.0,) * 3, (1.0,) * 3)})
    assert covering_views(Clips(), np.arange(5), spec)[:2] == views


def test_the_card_says_what_comparing_needs(results, config, tiny_backbone, tiny_pack):
    views = {"frames": 8, "stride": 2, "size": 32, "num_clips": 2, "num_crops": 1}
    details, data, model = results["details"], results["data"], results["model"]
    assert views.items() <= details["views"].items()
    assert data["fingerprint"] == Pack(tiny_pack).index["fingerprint"] and data["num_clips"] == 16
    assert (data["train_subjects"], data["test_subjects"], data["subjects_in_both"]) == (4, 2, 0)
    assert model["weights_sha256"] == weights_hash(load_backbone(str(tiny_backbone)))
    assert model["provenance"] == {"recipe": "random, for tests"}
    assert details["interval"]["resampled"] == "subjects" and details["interval"]["groups"] == 2
    assert "whole subjects" in details["linear"]["validation"]
    assert {"commit", "torch", "scikit-learn", "device", "precision"} <= results["versions"].keys()
    text = (Path(config.out) / "CARD.md").read_text()
    for needed in (data["fingerprint"], model["weights_sha256"], "stride: 2", "num clips: 2"):
        assert needed in text


def test_the_random_backbone_is_another_one_of_the_same_shape(results, quick):
    # The exported one is random too, so what tells them apart is that the numbers are not copies.
    other = main(change(quick, seed=1))
    names = ["random_init_top1", "random_init_knn_top1", "random_init_mean_class_accuracy"]
    assert [results["metrics"][n] for n in names] != [other["metrics"][n] for n in names]
    assert (
        results["details"]["random_init"]["validation_accuracy"]
        != results["details"]["linear"]["validation_accuracy"]
    )


def test_test_labels_choose_nothing(quick, results, monkeypatch):
    def shuffled(*arguments):
        train, test, notes = choose(*arguments)
        order = np.random.default_rng(0).permutation(len(test))
        return train, dataclasses.replace(test, labels=[test.labels[i] for i in order]), notes

    choose = probe.choose_splits
    monkeypatch.setattr(probe, "choose_splits", shuffled)
    other = main(quick)
    for part in ("linear", "random_init"):
        assert other["details"][part] == results["details"][part]


def test_motion_is_found_where_features_hold_it(tiny_pack, tiny_backbone, quick, monkeypatch):
    # A stand-in for a good backbone: every token says where the bright square is in its first
    # frame.
    def forward_features(encoder, video):
        bright = (video.mean(1) > 0.4).float()[:, ::2]  # (B, 4, H, W)
        rows, columns = bright.mean(3)[..., ::2], bright.mean(2)[..., ::2]
        return torch.cat([rows, columns], 2).repeat_interleave(16, dim=1)

    monkeypatch.setattr("pretrain.vit.VideoTransformer.forward_features", forward_features)
    monkeypatch.setattr(features_module, "CODE_VERSION", -1)  # keep out of the others' cache
    answer = main(quick)
    assert answer["metrics"]["top1"]["value"] > 0.9 and answer["metrics"]["knn_top1"]["value"] > 0.9
    # Two of the classes are each other played backwards: their mean tokens are alike.
    assert answer["metrics"]["mean_token_knn_top1"]["value"] < 0.9


# ---------------------------------------------------------------------------------- feature cache


def test_cached_features_equal_fresh_ones(tiny_pack, tiny_backbone, monkeypatch):
    encoder, pack = load_backbone(str(tiny_backbone)), Pack(tiny_pack)
    samples = np.arange(5, 14)
    first = cached_features(encoder, pack, samples, FP32)
    fresh = extract(encoder, pack, samples, dataclasses.replace(FP32, batch_size=3))
    np.testing.assert_allclose(first, fresh, rtol=1e-4, atol=1e-5)
    assert first.dtype == np.float32 and first.shape == (9, 4, 32)
    monkeypatch.setattr(features_module, "extract", None)  # from here on only the cache can answer
    assert np.array_equal(cached_features(encoder, pack, samples, FP32), first)


def test_the_encoder_is_untouched(tiny_pack, tiny_backbone):
    encoder = load_backbone(str(tiny_backbone)).train()
    encoder.blocks[0].eval()
    encoder.extra = torch.nn.BatchNorm1d(32)  # something whose buffers move in training mode
    original = encoder.forward_features
    encoder.forward_features = lambda video: encoder.extra(original(video).mT).mT
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    extract(encoder, Pack(tiny_pack), np.arange(4), FP32)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())
    assert encoder.training and encoder.extra.training and not encoder.blocks[0].training


def test_views_are_averaged(tiny_pack, tiny_backbone):
    encoder, pack = load_backbone(str(tiny_backbone)), Pack(tiny_pack)
    # 8 of the 16 frames of a clip, so that there are two places for them.
    encoder.input_spec = dataclasses.replace(encoder.input_spec, stride=1)
    samples = np.array([3, 0])
    tokens = extract_tokens(encoder, pack, samples, FP32)
    assert tokens.shape == (2, 2, 64, 32) and tokens.dtype == np.float16
    assert np.abs(tokens[:, 0] - tokens[:, 1]).max() > 0.01  # two views that differ
    pooled = extract(encoder, pack, samples, FP32)
    assert pooled.shape == (2, 4, 32)
    in_time = tokens.astype(np.float32).reshape(2, 2, 4, 16, 32)  # a grid of 4x4x4 tokens
    np.testing.assert_allclose(in_time.mean((1, 3)), pooled, atol=2e-3)
    for wanted, got in ((1, 1), (3, 2), (9, 4)):  # the most equal parts of four slots
        fewer = extract(encoder, pack, samples, dataclasses.replace(FP32, time_segments=wanted))
        assert fewer.shape == (2, got, 32)
        np.testing.assert_allclose(fewer.mean(1), pooled.mean(1), atol=1e-5)
    assert not list(cache_folder().glob("tmp*"))


def test_anything_that_changes_the_numbers_changes_the_cache_entry(
    tiny_pack, tiny_backbone, monkeypatch
):
    encoder, pack = load_backbone(str(tiny_backbone)), Pack(tiny_pack)
    calls = []
    monkeypatch.setattr(
        features_module,
        "extract",
        lambda e, p, s, h, t: (
            calls.append(1) or np.zeros((len(s), h.time_segments, 32), np.float32)
        ),
    )
    monkeypatch.setattr(features_module, "CODE_VERSION", 1000)

    def ask(samples=(1, 2), how=FP32):
        before = len(calls)
        cached_features(encoder, pack, np.array(samples), how)
        return len(calls) > before

    assert ask() and not ask()
    assert not ask(how=dataclasses.replace(FP32, batch_size=1, num_workers=1))  # only speed
    assert ask(samples=(2, 1))
    assert ask(how=dataclasses.replace(FP32, num_clips=3))
    assert ask(how=dataclasses.replace(FP32, num_crops=2))
    assert ask(how=dataclasses.replace(FP32, time_segments=2))
    assert not ask(how=dataclasses.replace(FP32, time_segments=5))  # four slots: no more than 4
    assert ask(how=dataclasses.replace(FP32, precision="bf16"))
    monkeypatch.setattr(encoder, "input_spec", dataclasses.replace(encoder.input_spec, stride=1))
    assert ask()
    with torch.no_grad():
        encoder.norm.bias[0] += 1
    assert ask()
    monkeypatch.setitem(pack.index, "fingerprint", "other")
    assert not ask()  # as after other labels
    real = pack.record
    monkeypatch.setattr(pack, "record", lambda sample: real(sample) | {"sha256": "another clip"})
    assert ask()
    monkeypatch.setattr(features_module, "CODE_VERSION", 1001)
    assert ask()


@pytest.mark.parametrize("damage", ["flip a byte", "cut short", "empty", "no hash", "a pipe"])
def test_a_damaged_cache_file_is_computed_again(
    damage, tiny_pack, tiny_backbone, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path))
    encoder, pack, samples = load_backbone(str(tiny_backbone)), Pack(tiny_pack), np.arange(4)
    first = cached_features(encoder, pack, samples, FP32)
    (path,) = (tmp_path / "features").iterdir()
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    if damage == "no hash":
        save_file({"features": first}, path)
    elif damage == "a pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_bytes({"flip a byte": content, "cut short": content[:-9], "empty": b""}[damage])
    assert np.array_equal(cached_features(encoder, pack, samples, FP32), first)
    assert "damaged" in capsys.readouterr().out
    assert np.array_equal(cached_features(encoder, pack, samples, FP32), first)
    assert "damaged" not in capsys.readouterr().out


def test_damaged_weights_are_named(tiny_pack, tiny_backbone):
    encoder = load_backbone(str(tiny_backbone))
    with torch.no_grad():
        encoder.norm.bias[0] = float("nan")
    with pytest.raises(ValueError, match="is not finite"):
        extract(encoder, Pack(tiny_pack), np.arange(2), FP32)
    with pytest.raises(ValueError, match="--attentive off"):
        extract_tokens(encoder, Pack(tiny_pack), np.arange(2), FP32)


def test_tokens_that_do_not_fit_name_the_bytes(tiny_pack, tiny_backbone, monkeypatch):
    monkeypatch.setattr(
        features_module.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 1000})
    )
    with pytest.raises(ValueError, match=r"32,768 bytes.*1,000 free.*--attentive off"):
        extract_tokens(load_backbone(str(tiny_backbone)), Pack(tiny_pack), np.arange(4), FP32)


# ----------------------------------------------------------------------------------- kinds of data


def test_cut_videos_and_data_without_splits(make_pack, quick, capsys):
    rows = motion_rows(range(4), 1, None)
    pack = make_pack(rows, frames=32, clip_seconds=1)  # 2 s at 16 frames a second: two clips each
    assert len(Pack(pack)) == 32
    answer = main(change(quick, data=str(pack)))
    assert (answer["data"]["num_train"], answer["data"]["num_test"]) == (12, 4)
    assert "held out for testing" in answer["notes"][0]
    assert answer["data"]["subjects_in_both"] == 0
    assert "held out for testing" in capsys.readouterr().out
    assert "held out for testing" in (Path(quick.out) / "CARD.md").read_text()


def test_every_subject_is_left_out_in_turn(tiny_pack, tiny_backbone, quick):
    answer = main(change(quick, leave_one_out=True, attentive="auto", also_random_split=True))
    drawn = answer["details"]["random_split"]
    assert 0 <= drawn["top1"] <= 1 and "not an estimate for new people" in drawn["meaning"]
    said = [note for note in answer["notes"] if "random split" in note]
    assert len(said) == 1 and f"{100 * drawn['top1']:.1f}, beside" in said[0]
    assert (
        answer["data"]["num_test"] == answer["data"]["num_train"] == 48
        and "attentive_top1" not in answer["metrics"]
    )
    assert "6 subjects" in answer["notes"][0]
    assert len(answer["details"]["linear"]["C"]) == len(answer["details"]["random_init"]["C"]) == 6
    assert not (Path(quick.out) / "linear.safetensors").exists()
    with open(Path(quick.out) / "predictions.csv", newline="") as file:
        rows = {r["source"]: r["predicted"] for r in csv.DictReader(file)}
    # Person 4's answers are those of a probe that learned from the five others.
    encoder, pack = load_backbone(str(tiny_backbone)), Pack(tiny_pack)
    records = list(pack.records())
    x = cached_features(encoder, pack, np.arange(48), FP32).reshape(48, -1)
    names = sorted({r["label"] for r in records})
    y = np.array([names.index(r["label"]) for r in records])
    left_out = np.array([r["subject"] == "p4" for r in records])
    others = [r for r in records if r["subject"] != "p4"]
    labels, subjects = [r["label"] for r in others], [r["subject"] for r in others]
    validation, _ = choose_validation(labels, subjects, 0)
    probe = fit_linear(x[~left_out], y[~left_out], validation[None])
    expected = probe.probabilities(x[left_out]).argmax(1)
    tested = [r for r in records if r["subject"] == "p4"]
    assert [rows[r["source"]] for r in tested] == [names[i] for i in expected]
    assert answer["metrics"]["top1"]["value"] == np.mean(
        [rows[r["source"]] == r["label"] for r in records]
    )


def test_leaving_one_out_says_when_the_backbone_has_seen_them(tiny_pack, tiny_backbone, quick):
    folder = Path(quick.out).parent / "backbone"
    fingerprint = Pack(tiny_pack).index["fingerprint"]
    export_backbone(load_backbone(str(tiny_backbone)), folder, {"data_fingerprint": fingerprint})
    answer = main(change(quick, backbone=str(folder), leave_one_out=True))
    assert any("tested subjects" in note for note in answer["notes"])


def test_leaving_one_out_needs_subjects(make_pack, quick):
    rows = motion_rows(range(3), 1, None)
    rows[0]["subject"] = None
    with pytest.raises(
        ValueError, match=r"1 of 12 labelled videos name no subject.*subject column"
    ):
        main(change(quick, data=str(make_pack(rows)), leave_one_out=True))
    alone = [r for r in motion_rows(range(3), 1, None) if r["motion"] != "up" or r["person"] == 2]
    with pytest.raises(ValueError, match="p2"):
        main(change(quick, data=str(make_pack(alone)), leave_one_out=True))
    unlabelled = make_pack(motion_rows(range(3), 1, None, label=None))
    with pytest.raises(ValueError, match="label"):
        main(change(quick, data=str(unlabelled), leave_one_out=True))
    one_class = make_pack([r for r in motion_rows(range(3), 1, None) if r["motion"] == "up"])
    with pytest.raises(ValueError, match="'up'"):
        main(change(quick, data=str(one_class), leave_one_out=True))
    with pytest.raises(ValueError, match="--attentive"):
        main(change(quick, leave_one_out=True, attentive="on"))


def test_attentive_is_skipped_with_a_sentence_when_tokens_are_many(quick, monkeypatch, capsys):
    monkeypatch.setattr(linear_probe, "TOKEN_LIMIT", 1000)
    answer = main(change(quick, attentive="auto"))
    assert (
        "attentive_top1" not in answer["metrics"]
        and "--attentive on" in answer["details"]["attentive"]["skipped"]
    )
    assert "--attentive on" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- what it refuses


def test_results_of_other_settings_are_not_replaced(quick):
    main(quick)
    before = (Path(quick.out) / "results.json").read_text()
    with pytest.raises(ValueError, match=r"num_crops was 1, is 2.*--out"):
        main(change(quick, num_crops=2))
    assert (Path(quick.out) / "results.json").read_text() == before
    main(quick)  # the same settings again are fine


def test_a_folder_of_other_files_is_not_used(quick):
    Path(quick.out).mkdir()
    (Path(quick.out) / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"thesis.txt.*--out"):
        main(quick)


def test_default_folder_is_beside_the_backbone(quick, tiny_backbone):
    main(change(quick, out=None))
    assert (tiny_backbone.parent / "probe-pack" / "results.json").exists()


def test_default_folder_of_somebody_elses_weights(tmp_path):
    (tmp_path / "clips.csv").touch()
    name = f"probe-hf-MCG-NJU-videomae-base-{tmp_path.name}-clips"
    given = ("probe", "hf:MCG-NJU/videomae-base", str(tmp_path / "clips.csv"))
    assert linear_probe.default_folder(*given) == Path("runs") / name


def test_several_processes_are_refused(quick, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        main(quick)


def test_the_command_shows_a_mistake_in_one_line(tiny_pack, tmp_path):
    words = ["recipes/linear_probe.py", "--backbone", str(tmp_path), "--data", str(tiny_pack)]
    run = in_processes(tmp_path, 1, "tests.recipes.host", "command", words)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


def test_frame_descriptors_and_a_linear_svm(tiny_pack, tmp_path):
    """The classic: descriptors of a frame network, their maximum over the frames, a linear SVM."""
    from downstream.models import build_model

    torch.manual_seed(0)
    model = build_model("frame_max", network="test_resnet", size=32, frames=4)
    export_backbone(model, tmp_path / "backbone", {})
    results = main(
        configure(Config, 
            str(tmp_path / "backbone"), str(tiny_pack), str(tmp_path / "out"), classifier="svm",
            time_segments=0, attentive="off", num_workers=0, precision="fp32",
        )
    )  # fmt: skip
    assert (
        results["metrics"]["top1"]["value"] == results["metrics"]["mean_token_top1"]["value"]
    )  # one token: its own embedding
    assert (
        "SVM" in results["details"]["linear"]["fit"]
        and "own embedding" in results["details"]["views"]["pooling"]
    )
    how = Extraction(num_clips=2, time_segments=0, precision="fp32")
    pack = Pack(tiny_pack)
    ids = np.arange(3)
    ours = extract(model, pack, ids, how)
    assert ours.shape == (3, 1, model.embed_dim)
    tokens = extract(model, pack, ids, dataclasses.replace(how, time_segments=1))
    assert (ours >= tokens).all() and (ours > tokens).any()  # a maximum is at least the mean
    flow = build_model("i3d_flow", width=0.1, frames=8, size=32)
    with pytest.raises(ValueError, match="takes flow"):
        extract(flow, pack, ids, how)
