"""Controls: what is taken from a clip, and what is said of a classifier."""

import numpy as np
import pytest
import torch

from downstream.controls import CONTROLS, controlled, controls_of, judge
from downstream.probe import fit_linear
from downstream.proposals import propose
from pretrain.spec import IMAGENET_MEAN, IMAGENET_STD, InputSpec, Stream, flow_stream


def clips() -> torch.Tensor:
    """(B, V, C, T, H, W) of two times of two crops: a white square crosses a picture of its own."""
    rng = np.random.default_rng(0)
    views = rng.integers(0, 100, (2, 1, 2, 3, 1, 6, 6), dtype=np.uint8)
    views = np.ascontiguousarray(np.broadcast_to(views, (2, 2, 2, 3, 8, 6, 6)))
    for time in range(2):
        for t in range(8):
            views[:, time, :, :, t, 2:4, (8 * time + t) % 5] = 255
    return torch.from_numpy(views).flatten(1, 2)


def test_a_control_takes_away_what_it_says():
    given = clips()
    made = {c: controlled({"rgb": given}, c, [5, 6], 2)["rgb"] for c in CONTROLS}
    assert all(clip.shape == given.shape for clip in made.values())
    assert (made["frame"] == given[:, :, :, 4:5]).all()
    for b in range(2):
        for frame in made["shuffled"][b].unbind(2):
            assert any(torch.equal(frame, other) for other in given[b].unbind(2))
    assert not torch.equal(made["shuffled"], given)
    assert torch.equal(made["shuffled"].sum(3), given.sum(3))
    background = made["background"]
    assert (background < 100).all() and (background == background[:, :, :, :1]).all()
    assert torch.equal(background[:, :2], background[:, 2:])  # of both times together
    assert not torch.equal(background[:, 0], background[:, 1])  # but of each crop by itself
    again = controlled({"rgb": given[1:]}, "shuffled", [6], 2)["rgb"]
    assert torch.equal(again[0], made["shuffled"][1])  # whatever is in the batch


def test_a_background_is_of_pictures_in_colour():
    rgb, flow = Stream(IMAGENET_MEAN, IMAGENET_STD), flow_stream(16)
    assert controls_of(InputSpec(8, 1, 16, {"rgb": rgb})) == list(CONTROLS)
    assert controls_of(InputSpec(8, 1, 16, {"flow": flow})) == ["frame", "shuffled"]


@pytest.mark.parametrize(
    ("accuracy", "controls", "word"),
    [
        (0.3, {"frame": 0.3, "shuffled": 0.3, "background": 0.3}, "unclear"),
        (0.9, {"frame": 0.9, "shuffled": 0.9, "background": 0.9}, "scene"),
        (0.3, {"frame": 0.3, "shuffled": 0.3, "background": 0.9}, "scene"),
        (0.9, {"frame": 0.8, "shuffled": 0.85, "background": 0.7}, "partly scene"),
        (0.9, {"frame": 0.9, "shuffled": 0.9, "background": 0.3}, "frame"),
        (0.9, {"frame": 0.4, "shuffled": 0.9, "background": 0.3}, "frames"),
        (0.9, {"frame": 0.4, "shuffled": 0.5, "background": 0.3}, "order"),
        (0.9, {"frame": 0.4, "shuffled": 0.5}, "order"),
    ],
)
def test_what_is_said(accuracy, controls, word):
    hits = lambda share: np.tile((np.arange(20) < round(20 * share)).astype(float), 10)
    groups = [f"p{i // 20}" for i in range(200)]
    found = judge(hits(accuracy), {n: hits(v) for n, v in controls.items()}, groups, 0.25, 0)
    assert found.word == word and found.differences.keys() == controls.keys()


# ---- what to label next


def blobs(counts: list[int]) -> np.ndarray:
    """Points around as many centres, in order."""
    rng = np.random.default_rng(0)
    centres = 10 * np.eye(5)[: len(counts)]
    pairs = zip(centres, counts, strict=True)
    return np.concatenate([c + 0.3 * rng.normal(size=(n, 5)) for c, n in pairs])


def test_proposals_are_new_and_not_alike():
    """The classifier is uncertain of all in between; most of these are one clip again and again."""
    known = blobs([3, 3])
    probe = fit_linear(known, np.repeat([0, 1], 3), np.empty((0, 6)))
    middle = known.mean(0)
    others = middle + np.array([[0, 0, 9.0, 0, 0], [0, 0, 0, 9, 0], [0, 0, 0, 0, 9]])
    candidates = np.concatenate([np.repeat(middle[None], 40, 0), others, known + 0.01])
    chosen = propose(probe, candidates, known, 4, 0)
    assert {40, 41, 42} <= set(chosen.tolist()) and min(chosen) < 40
    assert not len(set(np.argsort(np.ptp(probe.probabilities(candidates), axis=1))[:4]) & {40, 41})


@pytest.mark.parametrize(("num", "number"), [(0, 5), (3, 5), (50, 5), (50, 0), (50, 50)])
def test_as_many_are_proposed_as_there_are(num, number):
    known = blobs([3, 3])
    probe = fit_linear(known, np.repeat([0, 1], 3), np.empty((0, 6)))
    same = np.zeros((num, known.shape[1]))
    chosen = propose(probe, same, known, number, 0)
    assert len(chosen) == len(set(chosen.tolist())) == min(num, number)
