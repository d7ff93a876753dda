"""`starter`, the pair that comes with the package: what it knows, and that it says what not."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream.models import choose_sampling, load_backbone, load_video_text, match_rate
from downstream.starter import compact
from downstream.zero_shot import class_vectors, embed_texts, ensemble, unit, warn_of_unseen
from pretrain.backbones import (
    export_backbone,
    folder_of,
    provenance_of,
    read_backbone_config,
)
from pretrain.data.synthetic import ACTIONS, VERBS, ClipSpec, render
from pretrain.settings import STARTER
from pretrain.text import unseen_words
from recipes import fit, look

CPU = torch.device("cpu")
HOME = Path(folder_of(STARTER))


@pytest.fixture(scope="module")
def pair():
    return load_video_text(STARTER)


def test_it_tells_actions_of_people_and_places_that_it_never_saw(pair):
    """Two clips of each of six actions; a guess has 6 %, and a pair that learned nothing too."""
    some = list(ACTIONS)[::3]
    spec, rng = pair.video.input_spec, np.random.default_rng(5)
    clips = [
        render(ClipSpec(name, int(rng.integers(2**31)), int(rng.integers(42)), take, "test")).frames
        for name in some for take in (7, 8)
    ]  # fmt: skip
    assert (spec.frames, spec.size, spec.stride) == (32, 64, 1)
    frames = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)
    with torch.inference_mode():
        videos = unit(pair.encode_video(spec.normalise(frames)).numpy())
    words = [f"a person {VERBS[name][0]}" for name in ACTIONS]
    vectors, _ = embed_texts(pair, words, CPU)
    found = (videos @ ensemble(vectors[None]).T).argmax(1)
    truth = np.repeat([list(ACTIONS).index(name) for name in some], 2)
    assert (found == truth).sum() >= 6


def test_words_that_it_never_saw_are_named(pair, capsys):
    assert unseen_words(pair.text, ["somebody walks", "A giraffe walks"]) == ["giraffe"]
    embed_texts(pair, ["a giraffe walks"], CPU)
    assert "giraffe" in capsys.readouterr().err
    class_vectors(pair, ["a giraffe"], ("an elephant and {}",), CPU, "fp32")
    told = capsys.readouterr().err  # of a template nobody who names classes has said a word
    assert "giraffe" in told and "elephant" not in told
    (told,) = warn_of_unseen(pair, ["walks", "waving", "a giraffe"])
    assert told.startswith("WARNING: 1 of 3 classes") and told.endswith(": waving")
    assert warn_of_unseen(pair, ["walks", "!"]) == []


def test_a_pair_of_ones_own_has_seen_all_words(tiny_pair):
    assert unseen_words(load_video_text(str(tiny_pair)).text, ["a giraffe"]) == []


def test_what_is_kept_of_a_pair(tiny_pair):
    whole = load_video_text(str(tiny_pair))
    small = compact(copy.deepcopy(whole), ["somebody walks"])
    assert unseen_words(small.text, ["somebody walks and runs"]) == ["and", "runs"]
    for before, after in zip(whole.video.parameters(), small.video.parameters(), strict=True):
        assert torch.allclose(before, after, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("fps", "stride"), [(5, 1), (16, 1), (25, 1), (29.97, 2), (32, 2), (50, 3), (60, 4)]
)
def test_its_frames_are_at_most_a_tenth_further_apart_than_those_it_learned_from(pair, fps, stride):
    video = copy.deepcopy(pair.video)
    match_rate(STARTER, video, np.full(3, fps))
    assert video.input_spec.stride == video.arguments["stride"] == stride


@pytest.mark.parametrize(
    ("fps", "stride"), [(25, 2), (23.976, 2), (24, 2), (30, 2), (50, 4), (12.5, 1), (6, 1)]
)
def test_weights_of_ones_own_see_frames_as_far_apart_as_they_learned_from(
    pair, tmp_path, capsys, fps, stride
):
    video = copy.deepcopy(pair.video)
    choose_sampling(video, None, 2)
    for known, expected in ((25.0, stride), (None, 2), (True, 2), (-1, 2), ("25", 2)):
        home = tmp_path / str(known)
        export_backbone(video, home, {"fps": known})
        seen = load_backbone(str(home))
        match_rate(str(home), seen, np.array([fps] * 4))
        assert seen.input_spec.stride == seen.arguments["stride"] == expected
        said = capsys.readouterr().out
        assert (f"stride {expected} instead of 2" in said) == (expected != 2)
        assert "median" not in said
    match_rate(
        str(tmp_path / "25.0"), load_backbone(str(tmp_path / "25.0")), np.array([25, 25, 60])
    )
    assert "25 to 60 frames a second: stride 2 fits their median" in capsys.readouterr().out


def test_uniform_sampling_has_no_stride_at_any_rate(pair, tmp_path):
    video = copy.deepcopy(pair.video)
    choose_sampling(video, "uniform", None)
    export_backbone(video, tmp_path / "b", {"fps": 25.0})
    match_rate(str(tmp_path / "b"), video, np.array([50.0]))
    assert video.input_spec.stride == 0


def test_its_export_says_where_it_comes_from():
    assert provenance_of(STARTER)["data"].startswith("synthetic")
    assert read_backbone_config(HOME)["builder"] == "VideoText"
    assert (HOME / "CARD.md").is_file()


def test_recipes_that_need_no_other_backbone(monkeypatch):
    assert fit.Config(data="clips.csv").backbone == STARTER
    monkeypatch.setattr(look, "open_clip_at_hand", lambda *_: False)
    assert look.load_model(None)[0] == STARTER
    assert type(load_backbone(STARTER)).__name__ == "VideoTransformer"
