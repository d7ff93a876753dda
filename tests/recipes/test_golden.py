"""Losses and gradient norms of six steps stay as pinned, and a planted fault changes them.

`python tests/recipes/golden.py --write` renews what is pinned.
"""

import importlib
import json

import pytest

from downstream import finetune
from pretrain import optim, videomae
from pretrain.data import shards
from tests.recipes import golden

PINNED = json.loads(golden.FILE.read_text())


def test_the_data_are_those_that_were_pinned():
    """If this fails too, the losses differ because another version of the video encoder drew other
    pixels.
    """
    assert golden.pixels() == PINNED["pixels"]


@pytest.mark.parametrize("case", golden.CASES)
def test_losses_are_those_that_were_pinned(case, tmp_path):
    assert golden.differences(golden.run(case, tmp_path / "run"), PINNED[case]) == []


def a_step_later(monkeypatch, recipe):
    name = "scheduled_rate" if hasattr(recipe, "scheduled_rate") else "learning_rate"
    real = getattr(recipe, name)
    monkeypatch.setattr(recipe, name, lambda step, *rest: real(step + 1, *rest))


def everything_decays(monkeypatch, recipe):
    for module in (optim, finetune):
        monkeypatch.setattr(module, "decays", lambda parameter: True)


def other_masks(monkeypatch, recipe):
    real = videomae.draw_tokens
    monkeypatch.setattr(videomae, "draw_tokens", lambda kind, *rest: real("random", *rest))


def another_order(monkeypatch, recipe):
    real = shards.TrainClips.sample_at
    monkeypatch.setattr(
        shards.TrainClips, "sample_at", lambda self, epoch, place: real(self, epoch + 1, place)
    )


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        (a_step_later, "videomae_contrast"),
        (a_step_later, "clip"),
        (a_step_later, "finetune"),
        (everything_decays, "videomae"),
        (everything_decays, "clip"),
        (everything_decays, "finetune"),
        (other_masks, "videomae"),
        (another_order, "videomae"),
        (another_order, "clip"),
        (another_order, "finetune"),
    ],
)
def test_a_planted_fault_is_seen(fault, case, tmp_path, monkeypatch):
    fault(monkeypatch, importlib.import_module(f"recipes.{golden.CASES[case][0]}"))
    assert golden.differences(golden.run(case, tmp_path / "run"), PINNED[case])
