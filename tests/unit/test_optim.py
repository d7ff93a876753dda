"""The schedule against its closed form, and which parameters decay."""

import math

from pretrain.optim import adamw, learning_rate
from pretrain.videomae import VideoMAE
from pretrain.vit import VideoTransformer


def test_schedule_closed_form():
    assert [learning_rate(s, 100, 10, 2.0, 0.5) for s in (0, 4, 9)] == [0.2, 1.0, 2.0]
    assert learning_rate(10, 100, 10, 2.0, 0.5) == 2.0
    assert math.isclose(learning_rate(55, 100, 10, 2.0, 0.5), 1.25)
    assert math.isclose(learning_rate(100, 100, 10, 2.0, 0.5), 0.5)
    assert learning_rate(0, 1, 0, 2.0, 0.5) == 2.0


def test_matrices_decay_and_nothing_else_does():
    model = VideoMAE(VideoTransformer(16, 1, 2, 4, 16, 8), 8, 1, 2)
    groups = adamw(model, 0.05, (0.9, 0.95)).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for p in groups[0]["params"]}
    free = {names[id(p)] for p in groups[1]["params"]}
    assert groups[0]["weight_decay"] == 0.05 and groups[1]["weight_decay"] == 0
    assert decayed | free == set(names.values())
    assert all(n.endswith("weight") and "norm" not in n for n in decayed)
    assert {"mask_token", "encoder.blocks.0.attn.q_bias", "head.bias"} <= free
