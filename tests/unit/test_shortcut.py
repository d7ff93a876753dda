"""Shortcuts planted in the synthetic dataset: the controls tell a scene from an action.

The encoders have random weights or none: what they give away of a clip, any does.
"""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from downstream import probe
from downstream.controls import CONTROLS, Verdict, judge
from downstream.crossval import cross_validate, grouped_folds
from downstream.features import Extraction, extract
from downstream.splits import labelled_videos
from pretrain.data.pack import pack
from pretrain.data.shards import Pack
from pretrain.data.synthetic import ClipSpec, encode_video, render
from pretrain.spec import InputSpec, Stream
from pretrain.vit import VideoTransformer

SIZE, FRAMES = 48, 16


def world(
    folder: Path, actions: list[str], people: int, takes: int,
    place: Callable[[str, np.random.Generator], int], patch: bool = False,
) -> Pack:  # fmt: skip
    """Clips of these actions, each by all people, in places of choice.

    `patch`: with a square in a corner, whose colour is that of the action.
    """
    rng, rows = np.random.default_rng(0), []
    for number, action in enumerate(actions):
        for person in range(people):
            for take in range(takes):
                # A pair of actions in two orders is one performance, forwards and backwards.
                seed = person * takes + take
                spec = ClipSpec(action, person, place(action, rng), seed, "all")
                frames = render(spec, SIZE, FRAMES, 8).frames
                if patch:
                    frames[:, 2:14, 2:14] = 255 * np.eye(3)[number]
                name = f"{action}-{person}-{take}.mp4"
                (folder / name).write_bytes(encode_video(frames, 8))
                rows.append((name, action, f"p{person}"))
    with open(folder / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "subject"), *rows])
    pack(folder / "list.csv", folder / "pack", short_side=SIZE, workers=1, progress=False)
    return Pack(folder / "pack")


class Moved(nn.Module):
    """How far each row of 16 small grey frames is from their mean: (B, 16, 12), in order."""

    def __init__(self) -> None:
        super().__init__()
        rgb = Stream((0.0,) * 3, (1.0,) * 3)
        self.input_spec = InputSpec(FRAMES, 1, SIZE, {"rgb": rgb})
        self.embed_dim, self.grid, self.arguments = 12, (FRAMES, 1, 1), {}

    def forward_features(self, clip: Tensor) -> Tensor:
        grey = clip.mean(1)
        moved = (grey - grey.mean(1, keepdim=True)).abs()
        return F.adaptive_avg_pool2d(moved, (12, 1)).flatten(2)

    def forward(self, clip: Tensor) -> Tensor:
        return self.forward_features(clip).mean(1)


def verdict(
    clips: Pack, encoder: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> tuple[Verdict, dict[str, float]]:
    """What is said of an encoder, and the accuracies; "": of whole clips."""
    monkeypatch.setattr(probe, "GRID", (0.01, 1.0))  # for speed
    videos, _ = labelled_videos(clips, "all")
    grouped, hits = grouped_folds("world", videos, 0), {}
    truth = grouped.folds.labels[grouped.folds.tested]
    for name in ("", *CONTROLS):
        how = replace(Extraction(precision="fp32"), control=name)
        features = extract(encoder, clips, videos.samples, how)
        scores, _ = cross_validate(features.reshape(len(features), -1), grouped.folds)
        hits[name] = (scores.argmax(1) == truth).astype(float)
    accuracies = {name: float(values.mean()) for name, values in hits.items()}
    chance = 1 / len(grouped.folds.classes)
    return judge(hits.pop(""), hits, grouped.tested, chance, 0), accuracies


@pytest.mark.parametrize("patch", [False, True])
def test_a_scene_that_gives_the_class_away_is_flagged(patch, tmp_path, monkeypatch):
    places = {"wave": 2, "walk": 11, "jump": 23}
    place = (lambda _, rng: int(rng.integers(42))) if patch else (lambda name, _: places[name])
    clips = world(tmp_path, list(places), 4, 2, place, patch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = VideoTransformer(
            dim=64, depth=1, heads=2, frames=FRAMES, size=SIZE, patch=8, stride=1
        )
    found, reached = verdict(clips, encoder, monkeypatch)
    assert found.word == "scene" and "background" in found.sentence
    assert reached["background"] > 0.6


def test_what_differs_in_order_only_is_told_as_needing_it(tmp_path, monkeypatch):
    """The two actions hold the same frames, one of them played backwards."""
    clips = world(tmp_path, ["sit_down", "stand_up"], 8, 3, lambda *_: 5)
    found, reached = verdict(clips, Moved(), monkeypatch)
    assert found.word == "order" and "scene" not in found.word
    assert reached[""] > 0.65 and all(reached[name] < 0.6 for name in CONTROLS)
