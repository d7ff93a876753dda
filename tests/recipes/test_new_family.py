"""A model family from outside the repository: a file of its own, one row in MODELS, and every
recipe takes it.
"""

import importlib

import torch

from downstream.models import MODELS, Family, build_model, load_backbone, load_classifier
from recipes import clip, finetune, videomae
from tests.recipes import test_clip, test_finetune, test_videomae
from tests.recipes.runs import change

FILE = '''
"""Means of boxes of pixels, and a linear layer on them."""

from torch import nn

from pretrain.spec import InputSpec


class Boxes(nn.Module):
    def __init__(
        self,
        dim: int = 32,
        frames: int = 8,
        stride: int = 2,
        size: int = 64,
        subtract_mean: bool = False,
    ):
        super().__init__()
        self.arguments = {"dim": dim, "frames": frames, "stride": stride, "size": size}
        self.arguments["subtract_mean"] = subtract_mean
        self.input_spec = InputSpec(frames, stride, size)
        self.grid, self.embed_dim = (frames // 2, 2, 2), dim
        self.boxes, self.layer = nn.AdaptiveAvgPool3d(self.grid), nn.Linear(3, dim)

    def forward_features(self, video):
        self.input_spec.expect(video)
        return self.layer(self.boxes(video).flatten(2).transpose(1, 2))

    def forward(self, video):
        return self.forward_features(video).mean(1)
'''


def test_a_family_is_one_file_and_one_row(tmp_path, monkeypatch, tiny_pack, captioned_pack):
    (tmp_path / "boxes.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    boxes = importlib.import_module("boxes")
    # This is the row; nothing else is touched.
    monkeypatch.setitem(MODELS, "boxes", Family(boxes.Boxes, "nobody 2026", {}, {"size": 32}))

    assert build_model("boxes", small=True).input_spec.size == 32
    pretrained, tuned, paired = (tmp_path / name for name in ("pretrained", "tuned", "paired"))
    videomae.main(
        test_videomae.config(
            tiny_pack,
            pretrained,
            model="boxes",
            depth=None,
            decoder_dim=None,
            decoder_depth=None,
            frames=8,
            size=32,
            steps=1,
        )
    )
    again = load_backbone(str(pretrained / "backbone"))
    assert type(again) is boxes.Boxes and again(torch.zeros(1, 3, 8, 32, 32)).shape == (1, 32)
    cfg = test_finetune.config(
        tiny_pack, tuned, preset="tiny", network=None, frames=None, stride=None, size=None, steps=1
    )
    trained = str(pretrained / "backbone")
    finetune.main(change(cfg, model="", backbone=trained))
    assert load_classifier(str(tuned / "backbone")).classes == ["down", "left", "right", "up"]
    finetune.main(change(cfg, model="boxes", out=str(tmp_path / "fresh")))
    clip.main(
        test_clip.config(
            captioned_pack,
            paired,
            model="boxes",
            small=True,
            frames=8,
            steps=1,
            drop_tokens=0.0,
        )
    )
    assert type(load_backbone(str(paired / "backbone"))) is boxes.Boxes
