"""`starter`, the pair that comes with the package: what it knows, and that it says what not."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream.models import load_backbone, load_video_text, match_rate
from downstream.starter import compact
from downstream.zero_shot import embed_texts, ensemble, unit
from pretrain.backbones import folder_of, provenance_of, read_backbone_config
from pretrain.data.shards import Pack
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


def test_a_pair_of_ones_own_has_seen_all_words(tiny_pair):
    assert unseen_words(load_video_text(str(tiny_pair)).text, ["a giraffe"]) == []


def test_what_is_kept_of_a_pair(tiny_pair):
    whole = load_video_text(str(tiny_pair))
    small = compact(copy.deepcopy(whole), ["somebody walks"])
    assert unseen_words(small.text, ["somebody walks and runs"]) == ["and", "runs"]
    for before, after in zip(whole.video.parameters(), small.video.parameters(), strict=True):
        assert torch.allclose(before, after, rtol=2**-8, atol=0)


@pytest.mark.parametrize(("fps", "stride"), [(5, 1), (16, 1), (25, 1), (32, 2), (60, 3)])
def test_its_frames_are_at_most_as_far_apart_as_those_it_learned_from(pair, fps, stride):
    class Clips(Pack):
        def __init__(self):
            """Three clips of a rate."""

        def __len__(self):
            return 3

        def record(self, index):
            return {"fps": fps}

    video = copy.deepcopy(pair.video)
    match_rate(STARTER, video, Clips())
    assert video.input_spec.stride == video.arguments["stride"] == stride
    other = copy.deepcopy(pair.video)  # weights of one's own keep what they record
    match_rate("runs/mine/backbone", other, Clips())
    assert other.input_spec.stride == 1


def test_its_export_says_where_it_comes_from():
    assert provenance_of(STARTER)["data"].startswith("synthetic")
    assert read_backbone_config(HOME)["builder"] == "VideoText"
    assert (HOME / "CARD.md").is_file()


def test_recipes_that_need_no_other_backbone(monkeypatch):
    assert fit.Config(data="clips.csv").backbone == STARTER
    monkeypatch.setattr(look, "open_clip_at_hand", lambda *_: False)
    assert look.load_model(None)[0] == STARTER
    assert type(load_backbone(STARTER)).__name__ == "VideoTransformer"
