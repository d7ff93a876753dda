"""Every family that takes another stream than colour is trained by finetune.py."""

from pathlib import Path

import pytest
import torch

from downstream.models import MODELS, build_model, load_classifier
from pretrain.data.pack import pack
from pretrain.data.synthetic import make_dataset
from pretrain.spec import Backbone
from recipes import finetune
from tests.recipes.runs import configure


def streams_of(name: str) -> set[str]:
    with torch.device("meta"):
        backbone = build_model(name, small=True)
    assert isinstance(backbone, Backbone)
    return set(backbone.input_spec.streams)


FAMILIES = [name for name in MODELS if streams_of(name) != {"rgb"}]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A synthetic dataset with its exact flow and joints."""
    folder = tmp_path_factory.mktemp("streams")
    make_dataset(folder / "data", 20, size=32, frames=16, workers=1, progress=False)
    pack(folder / "data" / "clips.csv", folder / "pack", workers=1, progress=False)
    return folder / "pack"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_of_streams_is_trained(name, packed, tmp_path):
    """As a user types it, the preset's own augmentation included; what it leaves is read again."""
    config = configure(
        finetune.Config, model=name, preset="tiny", data=str(packed), out=str(tmp_path / "run"),
        steps=2, batch_size=4, micro_batch=4, num_workers=0, threads=1, precision="fp32",
        num_clips=1, val="off", log_seconds=0.0,
    )  # fmt: skip
    results = finetune.main(config)
    assert 0 <= results["metrics"]["top1"]["value"] <= 1
    trained = load_classifier(str(tmp_path / "run" / "backbone"))
    assert set(trained.input_spec.streams) == streams_of(name)
    assert all(p.isfinite().all() for p in trained.parameters())


def test_families_of_streams_are_found():
    assert {"stgcn", "skeleton_lstm", "two_stream", "pose_attention", "i3d_early"} <= {*FAMILIES}
