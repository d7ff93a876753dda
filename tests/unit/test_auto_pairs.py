"""The preset `auto` of clip.py: what texts are like, what follows, and how a run goes on."""

import itertools
import json

import pytest
import torch

from downstream import auto_pairs
from downstream.auto_pairs import TextFacts, choose, measure_texts, together
from downstream.pairs import Texts, positives_in_words
from pretrain import auto, flags
from pretrain.auto import Facts
from pretrain.data.shards import Pack
from pretrain.vit import without_init
from recipes import clip
from tests.conftest import motion_rows

FACE = Facts(1000, 75, 25.0, 128, 0.1)
CAPTIONS = TextFacts("caption", 1000, 1000, 9, 0.0, 0.0)


def values(chosen: dict) -> dict:
    return {name: value for name, (value, _) in chosen.items()}


def test_texts_are_measured(captioned_pack, tiny_pack, make_pack):
    said = measure_texts([Pack(captioned_pack)], "train", "", "plain")
    assert (said.kind, said.clips, said.different) == ("caption", 32, 8)
    assert said.sided == 0.5 and said.cut == 0  # two of four motions are left and right
    names = measure_texts([Pack(tiny_pack)], "train", "", "plain")
    assert (names.kind, names.different) == ("label", 4) and names.classes
    long = "A dog runs. " * 40 + "It stops!"
    rows = [
        row | {"caption": long + f" {i}"} for i, row in enumerate(motion_rows(range(1), 1, None))
    ]
    cut = measure_texts([Pack(make_pack(rows))], "all", "", "plain")
    assert cut.cut == 1 and not cut.classes
    # Captions of the same words are one, whatever their case; a kind that was asked for is read.
    assert measure_texts([Pack(captioned_pack)], "train", "label", "plain").kind == "label"


def test_rules_follow_the_texts():
    chosen = values(choose(FACE, CAPTIONS, {}, False))
    assert chosen["positives"] == "caption" and chosen["flip"] and not chosen["sentences"]
    long = TextFacts("caption", 1000, 1000, 90, 0.6, 0.3)
    chosen = choose(FACE, long, {}, False)
    assert chosen["sentences"][0] and not chosen["flip"][0] and "60%" in chosen["sentences"][1]
    few = choose(FACE, TextFacts("label", 1000, 10, 4, 0.0, 0.0), {}, False)
    assert few["text"][0] == "label" and "classes" in few["positives"][1]
    assert "sentences" not in few


def test_the_tower_follows_the_clips():
    pictures, moved = Facts(800, 1, 1.0, 200, 0.0, 800), Facts(800, 64, 25.0, 200, 0.9)
    assert values(choose(FACE, CAPTIONS, {}, False))["model"] == "frame_slow"
    assert values(choose(pictures, CAPTIONS, {}, False))["frames"] == 1
    assert values(choose(moved, CAPTIONS, {}, False))["model"] == "vit_xs"
    # Stills among videos would be nothing less their mean.
    assert values(choose(together([FACE, pictures]), CAPTIONS, {}, False))["model"] == "vit_xs"
    resting = Facts(800, 64, 25.0, 200, 0.0)
    assert values(choose(resting, CAPTIONS, {}, False))["model"] == "vit_xs"
    assert values(choose(FACE, CAPTIONS, {"optimizer": "adamw"}, False))["base_lr"] < 0.01
    assert values(choose(FACE, CAPTIONS, {"patch": 16}, False))["model"] == "vit_xs"
    assert values(choose(FACE, CAPTIONS, {"frames": 16}, False))["model"] == "vit_xs"
    assert values(choose(FACE, CAPTIONS, {"frames": 10}, False))["model"] == "frame_slow"
    assert values(choose(FACE, CAPTIONS, {"model": "vit_s"}, False))["weight_decay"] < 1


WORLD = [
    Facts(clips, frames, fps, side, moving)
    for clips, (frames, fps), side, moving in itertools.product(
        (1, 30, 200_000), ((1, 1.0), (2, 25.0), (11, 5.0), (300, 29.97)), (24, 144), (0.0, 0.9)
    )
]  # fmt: skip


@pytest.mark.parametrize("typed", [{}, {"patch": 16}, {"frames": 8, "model": "vit_ti"}])
@pytest.mark.parametrize("gpu", [False, True])
def test_whatever_clips_are_like_a_run_can_begin(gpu, typed):
    for facts in WORLD if not typed else WORLD[::5]:
        chosen = choose(facts, CAPTIONS, typed, gpu)
        assert not chosen.keys() & typed.keys() and all(why for _, why in chosen.values())
        cfg = flags.replace(clip.PRESETS["auto"], given=tuple(typed), **values(chosen) | typed)
        cfg = flags.settle(cfg, clip.unused(cfg), None)
        assert cfg.optim.batch_size >= 2
        if facts.frames > 1 or "frames" not in typed:
            with torch.device("meta"), without_init():
                clip.build_model(cfg)


def run(data, out, **changes) -> dict:
    changes |= {"data": (str(data),), "out": str(out), "precision": "fp32", "val_every": 0}
    changes |= {} if "steps" in changes else {"minutes": 1e-4}
    cfg = flags.replace(clip.PRESETS["auto"], **changes, given=tuple(changes))
    return clip.main(cfg)


def test_a_run_chooses_says_why_and_continues_as_it_began(
    captioned_pack, tmp_path, capsys, monkeypatch
):
    few = {"batch_size": 4, "micro_batch": 4, "model": "vit_xs", "depth": 1}
    state = run(captioned_pack, tmp_path / "run", **few)
    said = capsys.readouterr().out
    kept = json.loads((tmp_path / "run/config.json").read_text())["config"]
    for name in ("stride", "size", "text-model", "positives", "no-flip"):
        assert f"--{name} " in said and name.removeprefix("no-").replace("-", "_") in kept
    assert kept["steps"] == state["step"] == 20 and not kept["flip"]

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(auto_pairs, "measure", never)
    monkeypatch.setattr(auto, "seconds_a_step", never)
    again = run(captioned_pack, tmp_path / "run", **few)
    assert again["step"] == 20 and again["loss"] == state["loss"]
    with pytest.raises(ValueError, match=r"size: .* -> 48"):
        run(captioned_pack, tmp_path / "run", size=48, **few)


def test_class_names_are_texts_where_there_are_no_captions(tiny_pack, tmp_path, capsys):
    run(tiny_pack, tmp_path / "run", steps=1, batch_size=4, frames=6)
    kept = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert kept["text"] == "label" and kept["model"] == "frame_slow" and kept["small"]
    assert "they are classes" in capsys.readouterr().out


def test_clips_of_one_text_are_refused(make_pack, tmp_path):
    rows = [row | {"caption": "it moves"} for row in motion_rows(range(1), 1, None)]
    with pytest.raises(ValueError, match="the same caption"):
        run(make_pack(rows), tmp_path / "run", split="all", steps=1)


def test_one_sentence_is_drawn():
    record = {"captions": ["A dog runs. It stops!  Why? 3.5 m away.", "犬が走る。止まる。", "..."]}
    texts = Texts("caption", "plain", "caption", sentences=True)
    assert texts.of(record) == [
        "A dog runs.", "It stops!", "Why?", "3.5 m away.", "犬が走る。", "止まる。", "..."
    ]  # fmt: skip


def test_positives_are_said_as_the_data_have_them(captioned_pack, make_pack):
    labelled = Pack(captioned_pack)
    rows = [{k: v for k, v in row.items() if k != "label"} | {"caption": "it moves"}
            for row in motion_rows(range(1), 1, None)]  # fmt: skip
    bare = Pack(make_pack(rows))
    said = lambda pack: positives_in_words(
        Texts("caption", "plain", "label"), [pack], [pack.split("all")]
    )
    assert "class" in said(labelled) and "class" not in said(bare)
