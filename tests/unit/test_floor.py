"""The floor: what recordings give away without a network, and what a model below it is told."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from downstream import floor
from downstream.features import Extraction
from downstream.floor import GreyFrames, OrderedJoints, against_floor, floor_scores, folds_of
from downstream.probe import choose_folds
from downstream.results import Predictions
from downstream.tasks import choose_videos, task_of
from pretrain.data.shards import Pack
from pretrain.spec import Backbone, InputSpec, Joints

HOW, RGB = Extraction(), InputSpec(8, 2, 32)


@pytest.fixture(scope="module")
def given(tiny_pack):
    """Four directions of motion, and the folds of a probe."""
    pack = Pack(tiny_pack)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("downstream.probe.GRID", (0.01, 0.1, 1.0))
        folds = choose_folds(pack, "train", "test", False, 0)
        yield pack, folds, floor_scores(pack, folds, HOW, RGB)


def test_grey_frames_are_a_backbone_without_weights():
    encoder = GreyFrames()
    assert isinstance(encoder, Backbone) and not list(encoder.parameters())
    video = torch.rand(2, 3, 18, 16, 16)
    grey = video.numpy().mean(1)
    changes = np.abs(np.diff(grey, axis=1))
    found = encoder(video).numpy()
    slices = {"frame": grey[:, 9], "order": np.sqrt(changes), "mean": changes.mean(1)}
    forms = [*encoder.kinds["frame"], *encoder.kinds["motion"]]
    for expected, chosen in zip(slices.values(), forms, strict=True):
        np.testing.assert_allclose(found[:, chosen], expected.reshape(2, -1), atol=1e-6)
    joints = OrderedJoints(Joints("msr20", 20))
    assert isinstance(joints, Backbone)
    assert joints(joints.input_spec.empty(3)).shape == (3, joints.embed_dim)


def test_floors_are_far_above_chance_where_directions_differ(given):
    _, folds, scores = given
    truth = folds.labels[folds.tested]
    right = {kind: (values.argmax(1) == truth).mean() for kind, values in scores.items()}
    assert set(right) == {"frame", "motion"} and min(right.values()) > 0.7, right
    assert all(np.allclose(values.sum(1), 1, atol=1e-5) for values in scores.values())


def test_labels_of_tested_videos_change_nothing(given, monkeypatch):
    pack, folds, _ = given
    labels = folds.labels.copy()
    labels[folds.tested] = (labels[folds.tested] + 1) % 4
    monkeypatch.setattr("downstream.floor.keep_computed", lambda identity, shape, make: make())
    # Of strengths that are so strong that all classes are nearly alike, rounding may choose.
    monkeypatch.setattr("downstream.probe.GRID", (1.0, 10.0))
    scores = floor_scores(pack, folds, HOW, RGB)
    again = floor_scores(pack, dataclasses.replace(folds, labels=labels), HOW, RGB)
    for kind, before in scores.items():  # several threads round otherwise
        np.testing.assert_allclose(again[kind], before, atol=1e-3)


@pytest.mark.parametrize("right, word", [(1.0, "above"), (0.0, "BELOW"), (0.5, "NOT shown")])
def test_a_model_is_told_where_it_stands(given, monkeypatch, right, word):
    pack, folds, _ = given
    tested = folds.tested
    truth, subjects = folds.labels[tested], [folds.subjects[i] for i in tested]
    place = np.arange(len(truth))
    half = np.eye(4)[np.where(place % 2, truth, (truth + 1) % 4)]
    floors = {"frame": np.eye(4)[(truth + 1) % 4], "motion": half}  # none right, every other one
    monkeypatch.setattr("downstream.floor.floor_scores", lambda *given: floors)
    predicted = np.where(place < right * len(truth), truth, (truth + 2) % 4)
    said = Predictions(folds.classes, truth, predicted, subjects)
    metrics, details, notes = against_floor(pack, folds, HOW, RGB, said, 0, half)
    assert (metrics["floor_motion"].value, metrics["floor_frame"].value) == (0.5, 0)
    frame, *others = notes[:3]  # against none right; against every other one
    assert frame.startswith("above" if right else "NOT shown") and "one grey frame" in frame
    assert len(notes) == 3 + (word != "above") and all(note.startswith(word) for note in others)
    assert "frame differences" in others[0] and "random weights" in others[1]
    found = [value for name, value in details.items() if name.startswith("difference")]
    assert [round(mean, 6) for mean, _, _ in found] == [right, right - 0.5, right - 0.5]
    assert all(low <= mean <= high for mean, low, high in found)


def test_the_advice_names_a_stride_that_spans_the_clips(given):
    pack, folds, _ = given
    tested = folds.tested
    truth, subjects = folds.labels[tested], [folds.subjects[i] for i in tested]
    said = Predictions(folds.classes, truth, (truth + 1) % 4, subjects)
    short, whole = InputSpec(4, 1, 32), InputSpec(4, 4, 32)
    notes = {
        spec.stride: against_floor(pack, folds, HOW, spec, said, 0)[2] for spec in (short, whole)
    }
    assert "--stride 4" in notes[1][-1] and "--stride" not in notes[4][-1]
    assert "start from a pretrained backbone" in notes[4][-1]
    for about in ({"pretrained": True}, {"frozen": True}):
        told = against_floor(pack, folds, HOW, whole, said, 0, **about)[2][-1]
        assert "to try next" in told and "start from" not in told


def test_a_floor_is_computed_once(given, monkeypatch, capsys):
    pack, folds, scores = given
    monkeypatch.setattr("downstream.floor.cached_features", None)  # nothing is extracted again
    again = floor_scores(pack, folds, HOW, RGB)
    assert all((again[kind] == scores[kind]).all() for kind in scores)
    assert "damaged" not in capsys.readouterr().out


def test_a_clip_that_cannot_be_decoded_costs_no_score(given, monkeypatch):
    pack, folds, _ = given
    truth = folds.labels[folds.tested]
    said = Predictions(folds.classes, truth, truth, [folds.subjects[i] for i in folds.tested])

    def broken(*_: object) -> None:
        raise ValueError("clip 7 cannot be decoded")

    monkeypatch.setattr("downstream.floor.floor_scores", broken)
    metrics, _, notes = against_floor(pack, folds, HOW, RGB, said, 0)
    assert not metrics and "clip 7 cannot be decoded" in notes[0] and len(notes) == 1


def test_a_baseline_in_which_nothing_differs_is_left_out(given, monkeypatch):
    pack, folds, _ = given
    real = floor.cached_features

    def still(*arguments: object) -> np.ndarray:
        return real(*arguments) * (np.arange(19 * 256) < 256)

    monkeypatch.setattr(floor, "cached_features", still)
    monkeypatch.setattr(floor, "keep_computed", lambda identity, shape, make: make())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert [*floor_scores(pack, folds, HOW, RGB)] == ["frame"]


def test_a_class_that_a_fold_does_not_learn_costs_no_floor(given, monkeypatch):
    pack, folds, _ = given
    train, validations, test = folds.folds[0]
    known, asked = (folds.labels[part] < 3 for part in (train, test))
    fewer = dataclasses.replace(folds, folds=[(train[known], validations[:, known], test[asked])])
    monkeypatch.setattr("downstream.probe.GRID", (1.0,))
    scores = floor_scores(pack, fewer, HOW, RGB)
    for values in scores.values():
        assert (values[:, 3] == 0).all() and np.allclose(values.sum(1), 1, atol=1e-5)


def test_a_fine_tuning_is_one_fold(tiny_pack):
    pack = Pack(tiny_pack)
    videos = choose_videos(task_of(False), pack, "train", "test", None, "hold-out", None, 0)
    folds = folds_of(videos, 0)
    ((learned, held, tested),) = folds.folds
    assert held.sum() == len(videos.val) and len(learned) == len(videos.train) + len(videos.val)
    assert [folds.sources[i] for i in tested] == videos.test.sources
    without = folds_of(dataclasses.replace(videos, val=None), 0).folds[0]
    assert 0 < without[1].sum() < len(without[0]) == len(videos.train)
