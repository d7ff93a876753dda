"""Scores while a run trains: by every process a share, the same for any number of processes."""

import json
import os
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from downstream import monitor, pairs, tasks
from downstream.classifier import Classifier
from downstream.features import Extraction, extract, rows_by_all
from downstream.models import build_model
from downstream.splits import subset
from pretrain.clip import VideoText
from pretrain.data.shards import Pack
from pretrain.flags import flat
from pretrain.processes import start_accelerator, sum_of_shares
from pretrain.settings import Machine
from pretrain.text import fresh_text
from pretrain.vit import VideoTransformer
from tests.recipes.runs import configure, in_processes
from tests.recipes.test_videomae import config as videomae_config

HERE = "tests.recipes.test_scoring"
MACHINE = Machine(precision="fp32", threads=1)


def start(processes: int, folder: Path, function: str, *given: object) -> list[dict]:
    """What each process wrote of a function of this file."""
    done = in_processes(folder, processes, HERE, function, str(folder), *given)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}").read_text()) for rank in range(processes)]


def write(folder: str, found: dict) -> None:
    Path(folder, os.environ.get("RANK", "0")).write_text(json.dumps(found))


def score(folder: str, packed: str) -> None:
    """Everything that is scored, and how much is embedded here.

    Scoring draws no random numbers, or the later networks had other weights elsewhere.
    """
    accelerator = start_accelerator(MACHINE)
    torch.manual_seed(0)
    encoder = build_model("lstm", network="test_resnet", frames=4, size=32)
    pack, seen = Pack(packed), []
    how = Extraction(time_segments=0, batch_size=8)

    def embed(count: int) -> list:
        def some(places: np.ndarray) -> np.ndarray:
            seen.append(len(places))
            return extract(encoder, pack, np.arange(count)[places], how)[:, 0]

        return rows_by_all(accelerator, count, encoder.embed_dim, some).tolist()

    rows, own, few = embed(len(pack)), sum(seen), embed(2)
    everyone = np.arange(len(pack))
    knn = monitor.online_scores(encoder, pack, everyone, 0, accelerator, "fp32")
    task = tasks.task_of(False)
    videos = tasks.choose_videos(task, pack, "train", "test", None, "hold-out", None, 0)
    model = Classifier(encoder, videos.classes, 0.0, False)
    accuracy = tasks.validate(task, model, pack, videos.train, 64, "fp32", accelerator)
    frames = Classifier(
        build_model("tcn", small=True, frames=8, size=32), videos.classes, 0.0, True
    )
    by_frame = tasks.validate(
        tasks.task_of(True), frames, pack, subset(videos.train, np.arange(len(videos.train)) < 5),
        64, "fp32", accelerator,
    )  # fmt: skip
    video = VideoTransformer(dim=32, depth=1, heads=2, frames=4, size=32, patch=8, stride=4)
    pair = VideoText(video, fresh_text("xxs", 16, 32), 16, project=True, loss="infonce")
    texts = pairs.Texts("caption", "plain", "pair")
    val = monitor.online_retrieval(pair, [pack, pack], texts, 0, accelerator, "fp32")
    found = {
        "rows": rows,
        "val": val,
        "few": few,
        "knn": knn,
        "accuracy": accuracy,
        "frames": by_frame,
    }
    write(folder, {"found": found, "own": own, "modes": encoder.training})


def test_every_process_scores_a_share_and_all_find_the_same(captioned_pack, tmp_path):
    one, two, three = (start(n, tmp_path, "score", str(captioned_pack)) for n in (1, 2, 3))
    expected = one[0]["found"]
    assert 0 < expected["accuracy"] < 1 and expected["knn"]["knn"] > 0
    for processes in (two, three):
        assert all(process["found"] == expected for process in processes)
        shares = [process["own"] for process in processes]
        assert sum(shares) == one[0]["own"] == len(expected["rows"])
        assert min(shares) > 0 and max(shares) - min(shares) <= 8


def fail(folder: str, packed: str) -> None:
    """Scores with a clip of the last process that is broken, and with another error there."""
    accelerator = start_accelerator(MACHINE)
    last = accelerator.process_index == accelerator.num_processes - 1
    pack, said = Pack(packed), {}
    torch.manual_seed(0)
    encoder = build_model("lstm", network="test_resnet", frames=4, size=32)
    if last:
        pack.read = lambda _: b"no video"  # type: ignore[method-assign]

    def work(_: list) -> np.ndarray:
        if last:
            raise OSError("the disk is gone")
        return np.zeros(1)

    said["knn"] = monitor.online_scores(encoder, pack, np.arange(len(pack)), 0, accelerator, "fp32")
    task = tasks.task_of(False)
    videos = tasks.choose_videos(task, pack, "train", "test", None, "off", None, 0)
    model = Classifier(encoder, videos.classes, 0.0, False)
    for name, call in (
        ("validation", lambda: tasks.validate(
            task, model, pack, videos.train, 64, "fp32", accelerator
        )),
        ("disk", lambda: sum_of_shares(accelerator, 99, work)),
    ):  # fmt: skip
        try:
            call()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    write(folder, said)


def end_slowly(folder: str, given: dict) -> None:
    """A run whose main process draws longer at the end than the processes wait for one another."""
    from recipes import videomae

    begin, finish = dist.init_process_group, videomae.finish
    dist.init_process_group = lambda *a, **k: begin(*a, **k | {"timeout": timedelta(seconds=4)})

    def slow(*args: object) -> None:
        time.sleep(7)
        finish(*args)

    videomae.finish = slow
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    write(folder, videomae.main(configure(videomae.Config, **values)))


@pytest.mark.slow
def test_no_process_waits_while_the_main_one_exports_and_draws(tiny_pack, tmp_path):
    cfg = videomae_config(tiny_pack, tmp_path / "run", steps=2)
    start(2, tmp_path, "end_slowly", flat(cfg))
    assert (tmp_path / "run" / "backbone").is_dir()


def test_what_fails_in_one_process_fails_in_all(tiny_pack, tmp_path):
    first, second = start(2, tmp_path, "fail", str(tiny_pack))
    assert first["knn"] == second["knn"] == {}
    assert first["validation"] == second["validation"]
    assert "ValueError" in first["validation"] and "cannot be decoded" in first["validation"]
    assert second["disk"] == "OSError: the disk is gone"
    assert first["disk"] == "RuntimeError: process 1: the disk is gone"
    assert (tmp_path / "stderr.txt").read_text().count("no score of the features") == 1
