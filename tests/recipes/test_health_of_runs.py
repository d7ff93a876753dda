"""What a training run says of its health: in the log, on the screen, in the curve."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pretrain import views
from pretrain.flags import replace as change
from recipes import clip, videomae
from tests.recipes.runs import equal, final_weights
from tests.recipes.test_clip import config as clip_config
from tests.recipes.test_videomae import config


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def norms(line: dict) -> dict[str, float]:
    return {n.removeprefix("grad_norm/"): v for n, v in line.items() if n.startswith("grad_norm/")}


def only_together(embeddings: torch.Tensor, clips: torch.Tensor) -> tuple:
    """Invariance without anything that keeps clips apart; a clip's views are neighbours."""
    one, other = embeddings[0::2], embeddings[1::2]
    return (1 - F.cosine_similarity(one, other)).mean(), torch.zeros(())


PLANTED = {"steps": 20, "batch_size": 16, "micro_batch": 16, "knn_every": 10, "save_every": 100}


@pytest.mark.slow
@pytest.mark.parametrize("contrast", [0.0, 0.3])
def test_a_run_that_learns_is_healthy(contrast, tmp_path, capsys):
    more = {"contrast": contrast, "views": 2} if contrast else {}
    tiny = change(videomae.PRESETS["tiny"], data="synthetic:180", steps=60, out=str(tmp_path))
    videomae.main(change(tiny, log_seconds=0.0, threads=1, **more))
    said, logged = capsys.readouterr().out, lines(tmp_path)
    assert "  healthy  " in said and "collapsing: " not in said and "not learning" not in said
    assert not any(line["collapsing"] or line["not_learning"] for line in logged)
    assert logged[-1]["explained"] > 0.02 > logged[0]["explained"]
    assert ("contrast" in logged[0]) == bool(contrast)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"base_lr": 1e-9, "final_lr": 0.0}, "not_learning"),
        ({"base_lr": 20.0}, "collapsing"),
        ({"contrast": 1e3, "views": 2, "base_lr": 0.1, "clip_grad": 1.0}, "collapsing"),
    ],
)
def test_what_goes_wrong_gets_its_word(changes, word, tiny_pack, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(views, "match_views", only_together)
    videomae.main(config(tiny_pack, tmp_path, **PLANTED | changes))
    out = capsys.readouterr().out
    assert lines(tmp_path)[-1][word] == 1
    words = word.replace("_", " ")
    assert out.count(f"  {words}: ") == 1 and "--base-lr" in out  # what to do, once
    assert f" % of {lines(tmp_path)[-1]['knn_clips']} clips (chance 25.0 %)" in out


def test_norms_by_block_add_up_to_the_gradients(tiny_pack, tmp_path):
    videomae.main(config(tiny_pack, tmp_path, steps=2, clip_grad=0.01, knn_every=0))
    for line in lines(tmp_path):
        parts = norms(line)
        assert {"encoder.blocks.0", "encoder.blocks.1", "decoder_blocks.0", "head"} <= parts.keys()
        total = sum(v**2 for v in parts.values()) ** 0.5
        assert total == pytest.approx(line["grad_norm"], rel=1e-5)


def test_clips_without_labels_have_a_health_too(make_pack, tmp_path):
    rows = [{"motion": "up", "person": p, "take": t} for p in range(3) for t in range(3)]
    for row in rows:
        row["label"] = None
    videomae.main(config(make_pack(rows), tmp_path, steps=2))
    assert lines(tmp_path)[-1]["effective_rank"] >= 1 and "knn" not in lines(tmp_path)[-1]


def test_looking_changes_no_number(tiny_pack, tmp_path):
    for every in (0, 1):
        videomae.main(config(tiny_pack, tmp_path / str(every), steps=2, knn_every=every))
    assert equal(final_weights(tmp_path / "0"), final_weights(tmp_path / "1"))


def test_two_towers_that_learn_nothing(captioned_pack, tmp_path, capsys):
    cfg = clip_config(captioned_pack, tmp_path, steps=12, batch_size=16, micro_batch=16)
    clip.main(change(cfg, base_lr=1e-9, val_every=0))
    last = lines(tmp_path)[-1]
    assert last["not_learning"] and not last["collapsing"] and last["effective_rank"] > 1
    assert last["loss_chance"] == pytest.approx(2.7726, abs=1e-4)
    assert {"video.blocks.0", "text_proj", "log_scale"} <= norms(last).keys()
    assert capsys.readouterr().out.count("ln(16) = 2.77") == 1
