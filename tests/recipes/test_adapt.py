"""Going on from weights: a planted collapse is caught and the best weights come back."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from downstream.guard import KEPT, Guard, has_fallen
from downstream.models import load_backbone
from downstream.monitor import online_scores
from pretrain import views
from pretrain.backbones import export_backbone, load_pretrained_videomae
from pretrain.data.shards import Pack
from pretrain.vit import VideoTransformer
from pretrain.weights import CheckpointError
from recipes import videomae
from tests.conftest import motion_rows
from tests.recipes.runs import equal, final_weights, stop_in_step
from tests.recipes.test_health_of_runs import lines, only_together
from tests.recipes.test_videomae import config

STEPS = {"steps": 12, "knn_every": 4, "batch_size": 16, "micro_batch": 16, "log_seconds": 600.0}
# A rate far too high, an invariance without anything that keeps clips apart.
PLANTED: dict[str, dict[str, Any]] = {
    "rate": {"base_lr": 5.0},
    "together": {"contrast": 1e3, "views": 2, "base_lr": 0.1, "clip_grad": 1.0},
}


def ten_times(cases: list[tuple[str, ...]], *fast: tuple[str, ...]) -> list:
    """Each case with ten seeds; the first seed of some cases is always run."""
    every = [(*case, seed) for case in cases for seed in range(10)]
    slow = [case for case in every if case not in [(*case, 0) for case in fast]]
    return [pytest.param(*c, marks=[pytest.mark.slow] if c in slow else []) for c in every]


@pytest.fixture(scope="module")
def packs(make_pack) -> dict[str, Path]:
    """With labels, and without."""
    rows = motion_rows(range(4), 2, "train")
    return {"labels": make_pack(rows), "none": make_pack([row | {"label": None} for row in rows])}


@pytest.fixture(scope="module")
def weights(packs, tmp_path_factory) -> Path:
    """A run that learned something."""
    run = tmp_path_factory.mktemp("start") / "run"
    more = {"steps": 30, "knn_every": 0, "contrast": 1.0, "views": 2, "base_lr": 0.02}
    videomae.main(config(packs["labels"], run, **STEPS | more))
    return run


def adapt(pack: Path, weights: Path, out: Path, **changes: Any) -> dict:
    given = STEPS | {"backbone": str(weights), "base_lr": 0.01, "save_every": 4} | changes
    return videomae.main(config(pack, out, **given))


@pytest.mark.parametrize(
    ("labels", "kind", "seed"),
    ten_times(
        [(labels, kind) for labels in ("labels", "none") for kind in PLANTED],
        ("labels", "rate"), ("none", "together"),
    ),
)  # fmt: skip
def test_a_planted_collapse_is_caught(
    labels, kind, seed, packs, weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(views, "match_views", only_together)
    out = tmp_path / "run"
    state = adapt(packs[labels], weights, out, seed=seed, **PLANTED[kind])
    assert state["guard"]["stopped"] and state["step"] < 12
    best = int(state["guard"]["best_step"])
    out_of_it, said = capsys.readouterr()
    assert out_of_it.count("starting weights: ") == 1
    assert f"stopped at step {state['step']}" in said and f"weights of step {best}" in said
    exported = load_backbone(str(out / "backbone")).state_dict()
    assert equal(exported, load_backbone(str(out / "best")).state_dict())
    if best == 0:
        assert equal(exported, load_backbone(str(weights / "backbone")).state_dict())


@pytest.mark.parametrize(("labels", "seed"), ten_times([("labels",), ("none",)], ("none",)))
def test_a_healthy_adaptation_is_left_alone(labels, seed, packs, weights, tmp_path):
    state = adapt(packs[labels], weights, tmp_path, seed=seed)
    assert state["step"] == 12 and not state["guard"]["stopped"]
    last = {n: w for n, w in final_weights(tmp_path).items() if n.startswith("encoder.")}
    exported = load_backbone(str(tmp_path / "backbone")).state_dict()
    assert all(torch.equal(last[f"encoder.{n}"], w) for n, w in exported.items())
    measured = {n for line in lines(tmp_path) for n in line}
    assert ("knn" in measured, "view_retrieval" in measured) == (
        labels == "labels", labels == "none",
    )  # fmt: skip


def test_a_stopped_run_stays_stopped_and_one_that_was_killed_stops_alike(
    packs, weights, tmp_path, monkeypatch, capsys
):
    given = (packs["labels"], weights)
    state = adapt(*given, tmp_path / "calm", **PLANTED["rate"])
    exported = load_backbone(str(tmp_path / "calm" / "backbone")).state_dict()
    assert equal(exported, load_pretrained_videomae(tmp_path / "calm").encoder.state_dict())
    shutil.rmtree(tmp_path / "calm" / "backbone")
    again = adapt(*given, tmp_path / "calm", **PLANTED["rate"])
    assert again["step"] == state["step"] and again["guard"] == state["guard"]
    assert equal(exported, load_backbone(str(tmp_path / "calm" / "backbone")).state_dict())
    assert capsys.readouterr().err.count("stopped at step") == 2
    with monkeypatch.context() as patch:
        stop_in_step(patch, videomae, 2)
        with pytest.raises(SystemExit):
            adapt(*given, tmp_path / "killed", **PLANTED["rate"])
    killed = adapt(*given, tmp_path / "killed", **PLANTED["rate"])
    assert killed["guard"] == state["guard"]
    assert equal(final_weights(tmp_path / "calm"), final_weights(tmp_path / "killed"))


def test_a_run_that_holds_to_its_start_continues_exactly_and_not_from_another_start(
    packs, weights, tmp_path, monkeypatch
):
    start, held = tmp_path / "start", {"distill": 5.0, "base_lr": 0.02, "steps": 6}
    held["trained_share"] = 0.25
    shutil.copytree(weights / "backbone", start)
    adapt(packs["none"], start, tmp_path / "calm", **held)
    with monkeypatch.context() as patch:
        stop_in_step(patch, videomae, 3)
        with pytest.raises(SystemExit):
            adapt(packs["none"], start, tmp_path / "killed", **held)
    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    adapt(packs["none"], start, tmp_path / "killed", **held)
    assert equal(final_weights(tmp_path / "calm"), final_weights(tmp_path / "killed"))
    assert all(0 < line["teacher_cosine"] <= 1 for line in lines(tmp_path / "killed"))
    was, trained = load_backbone(str(start)), final_weights(tmp_path / "killed")
    exported = load_backbone(str(tmp_path / "killed" / "backbone")).state_dict()
    for name, value in was.state_dict().items():
        wanted = value + 0.25 * (trained[f"masked.encoder.{name}"] - value)
        assert torch.allclose(exported[name], wanted, atol=1e-6), name
    assert not equal(exported, was.state_dict())
    run = tmp_path / "killed"
    assert equal(exported, load_pretrained_videomae(run).encoder.state_dict())
    (run / "backbone").rename(run / "kept")
    with pytest.raises(CheckpointError, match="has not ended"):
        load_pretrained_videomae(run)
    (run / "kept").rename(run / "backbone")
    next(was.parameters()).data.view(-1)[0] += 1
    shutil.rmtree(start)
    export_backbone(was, start, {})
    with pytest.raises(ValueError, match="another --out"):
        adapt(packs["none"], start, tmp_path / "other", **held)


def test_the_guard_is_on_with_a_backbone_only_and_changes_no_number(packs, weights, tmp_path):
    alone = videomae.main(config(packs["labels"], tmp_path / "alone", **STEPS | {"steps": 1}))
    assert not alone["guard"] and not (tmp_path / "alone" / "best").exists()
    for on in (True, False):
        adapt(packs["none"], weights, tmp_path / str(on), steps=2, guard=on)
    assert equal(final_weights(tmp_path / "True"), final_weights(tmp_path / "False"))


def test_labels_of_some_clips_are_enough_for_a_score(make_pack):
    rows = motion_rows(range(4), 2, "train")
    rows = [row if i % 3 else row | {"label": None} for i, row in enumerate(rows)]
    pack, how = Pack(make_pack(rows)), (0, Accelerator(cpu=True), "fp32", True)
    scores = online_scores(encoder(), pack, pack.split("train"), *how)
    labelled = sum(record["label"] is not None for record in pack.records())
    assert 0 < scores["knn_clips"] < labelled < len(pack) and "view_retrieval" not in scores


# ------------------------------------------------------------------------------ the guard alone


def encoder(seed: int = 0) -> VideoTransformer:
    torch.manual_seed(seed)
    return VideoTransformer(dim=16, depth=1, heads=1, frames=2, size=16, patch=8)


def follow(guard: Guard, name: str, clips: int, scores: list[float]) -> int:
    """The first of some scores at which a guard stops; -1: at none."""
    for step, score in enumerate(scores):
        guard.judge({name: score, f"{name}_clips": clips}, "healthy", step, None, {})
        if guard.stopped:
            return step
    return -1


@pytest.mark.parametrize(
    ("name", "clips", "scores", "stops"),
    [
        ("knn", 120, [0.5, 0.55, 0.5, 0.45, 0.5], -1),
        ("knn", 120, [0.5, 0.7, 0.65, 0.3, 0.2], 3),
        ("knn", 20, [0.9, 0.8, 0.9, 0.1], 3),
        ("knn", 4, [1.0, 0.5], -1),  # so few clips say nothing
        ("view_retrieval", 128, [0.95, 0.8, 0.7, 0.6], -1),
        ("view_retrieval", 128, [0.95, 0.9, 0.02], 2),
        ("view_retrieval", 128, [0.01, 0.0, 0.01], -1),  # nothing to lose
    ],
)
def test_what_a_fall_is(name, clips, scores, stops, tmp_path):
    assert follow(Guard(tmp_path, True, None), name, clips, scores) == stops
    assert follow(Guard(tmp_path, False, None), name, clips, scores) == -1


@pytest.mark.parametrize("clips", [60, 120, 480])
def test_noise_is_no_fall_and_a_fall_to_chance_is_one(clips):
    """The same clips: a few of them change sides from score to score."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        right = rng.random(clips) < 0.8
        scores = [np.where(rng.random(clips) < 0.05, ~right, right).mean() for _ in range(10)]
        best = max(scores)
        assert not any(has_fallen(score, best, clips) for score in scores)
        assert has_fallen(0.1, best, clips)


def test_the_best_weights_lie_on_the_disk_and_come_back(tmp_path):
    guard, first, second = Guard(tmp_path, True, None), encoder(0), encoder(1)
    scores = [(0.5, "healthy", first), (0.4, "healthy", second), (0.4, "collapsing", second)]
    for step, (score, word, now) in enumerate(scores):
        guard.judge({"knn": score, "knn_clips": 50}, word, step, now, {"recipe": "test"})
    assert guard.stopped and guard.about == {"step": 0, "stopped_at": 2}
    again = Guard(tmp_path, True, guard.kept)
    assert again.stopped
    assert equal(again.restored(second).state_dict(), first.state_dict())
    shutil.rmtree(tmp_path / "best")
    with pytest.raises(ValueError, match="best"):
        again.restored(second)


def test_weights_that_were_alike_from_the_start_are_not_stopped_for_it(tmp_path):
    guard = Guard(tmp_path, True, None)
    for step in range(3):
        guard.judge({"knn": 0.5, "knn_clips": 50}, "collapsing", step, None, {})
    assert not guard.stopped and guard.kept["best_step"] == 2


@pytest.mark.parametrize("kept", [{"best": 1}, {"stopped": 1}, dict.fromkeys(KEPT, None)])
def test_a_state_that_is_not_a_guards_begins_anew(kept, tmp_path):
    assert Guard(tmp_path, True, kept).kept == {}


def test_a_broken_clip_stops_nothing(tmp_path):
    guard = Guard(tmp_path, True, None)
    guard.judge({"knn": 0.9, "knn_clips": 50}, "healthy", 0, None, {})
    guard.judge({}, "healthy", 1, None, {})
    assert guard.kept["last_step"] == 0 and not guard.stopped


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_first_layers_are_moved_least(optimizer, packs, weights, tmp_path):
    adapt(packs["labels"], weights, tmp_path, steps=3, layer_decay=0.1, optimizer=optimizer)
    before = load_backbone(str(weights / "backbone")).state_dict()
    after = load_backbone(str(tmp_path / "backbone")).state_dict()
    names = ("blocks.0.fc1.weight", "blocks.1.fc1.weight")
    first, second = (float((after[n] - before[n]).norm() / before[n].norm()) for n in names)
    assert 0 < first < second / 3
