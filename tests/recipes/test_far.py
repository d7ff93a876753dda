"""Recipes on a pack far away: resumed to the bit, alike for two processes, scored as from here."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pretrain import checkpoint
from pretrain.data import remote
from pretrain.flags import replace as change
from recipes import linear_probe, videomae
from tests.recipes.runs import configure, equal, final_weights, launch, stop_in_step
from tests.unit.far import Store, serve


def config(store: Store, out: Path, **changes) -> videomae.Config:
    small = configure(
        videomae.Config, preset="test", data=store.url, out=str(out), depth=1, decoder_dim=32,
        decoder_depth=1, frames=4, stride=2, size=32, patch=8, mask_ratio=0.75, steps=8,
        batch_size=8, micro_batch=4, base_lr=0.05, precision="fp32", num_workers=0, threads=1,
        save_every=100, log_seconds=0.0, knn_every=0,
    )  # fmt: skip
    return change(small, **changes)


@pytest.fixture
def store(make_pack, tmp_path, monkeypatch) -> Iterator[Store]:
    """A pack of 48 clips in shards of a few."""
    from tests.conftest import motion_rows

    rows = motion_rows(range(4), 3, None)
    packed = make_pack(rows, shard_bytes=8000)
    assert len(json.loads((packed / "index.json").read_text())["shards"]) > 4
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))
    with serve(packed) as served:
        yield served


def test_a_streamed_run_that_is_interrupted_ends_in_the_same_bits(store, tmp_path, monkeypatch):
    """In the middle of an epoch, on a slow server, and on a machine that has nothing yet."""
    store.delay = 0.02
    calm, cut = tmp_path / "calm", tmp_path / "cut"
    videomae.main(config(store, calm))
    with monkeypatch.context() as patch:
        stop_in_step(patch, videomae, 4)
        with pytest.raises(SystemExit):
            videomae.main(config(store, cut))
    assert checkpoint.checkpoints(cut)[0].name == "step-00000004"
    shutil.rmtree(tmp_path / "cache")
    videomae.main(config(store, cut, resume=True, num_workers=1, cache_gib=0.5))
    assert equal(final_weights(cut), final_weights(calm))
    about = (cut / "config.json").read_text() + (cut / "log.jsonl").read_text()
    assert store.url in about


def test_an_outage_ends_a_run_that_has_saved(store, tmp_path, monkeypatch):
    """What comes last in the epoch is not there: the steps before it are kept, to the bit."""
    monkeypatch.setattr(remote, "WINDOW_BYTES", 1)  # one shard at a time
    monkeypatch.setattr(remote, "WAITS", (0.01,))
    monkeypatch.setattr(remote, "AT_ONCE", 1)
    calm, cut = tmp_path / "calm", tmp_path / "cut"
    videomae.main(config(store, calm))
    last = [path for path in store.paths if "shard" in path][-1].rpartition("/")[2]
    shutil.rmtree(tmp_path / "cache")
    store.faults[last] = ["503"] * 99
    with pytest.raises(ValueError, match=rf"{last}.*503"):
        videomae.main(config(store, cut))
    step = int(checkpoint.checkpoints(cut)[0].name.rpartition("-")[2])
    assert step > 1
    store.faults.clear()
    videomae.main(config(store, cut, resume=True))
    assert equal(final_weights(cut), final_weights(calm))
    steps = [json.loads(line)["step"] for line in (cut / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))  # none was lost


@pytest.mark.slow
def test_two_processes_stream_the_same_batches(store, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    videomae.main(config(store, alone))
    done = launch(tmp_path, config(store, both, micro_batch=2), {}, 2)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = (final_weights(run) for run in (alone, both))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    shards = {n for name, n in store.asked.items() if name.startswith("shard")}
    assert shards == {1}  # both runs and processes share the cache


@pytest.mark.slow
def test_a_probe_of_data_far_away_scores_as_of_data_here(store, tiny_backbone, tmp_path):
    scored = []
    for data in (store.url, str(store.folder)):
        out = tmp_path / f"probe{len(scored)}"
        cfg = configure(
            linear_probe.Config, backbone=str(tiny_backbone), data=data, out=str(out),
            num_workers=0, precision="fp32", num_clips=1, attentive="off",
        )  # fmt: skip
        linear_probe.main(cfg)
        found = json.loads((out / "results.json").read_text())
        scored.append((found["metrics"], found["data"]["fingerprint"]))
    assert scored[0] == scored[1]
