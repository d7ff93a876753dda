"""Small packed videos and a small backbone, shared by all tests."""

import csv
import gc
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file

from pretrain.text import TEXT_SIZES
from tests import forked

# Imports make objects by the million and no garbage, tests little: with Python's own threshold
# collecting it takes a quarter of the time of the imports, and a thirtieth of that of the tests.
gc.set_threshold(100_000, 20, 20)

# Models here are tiny: one thread is faster than two that wait for each other, and repeatable.
torch.set_num_threads(1)

# The same examples in every run, however long they take on a busy machine: new ones are fuzzing's.
settings.register_profile(
    "house", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("house")


@pytest.fixture(scope="session", autouse=True)
def no_near_duplicates() -> Iterator[None]:
    """Of raw data that recipes pack: the tests' clips of other people are near-duplicates."""
    from pretrain.data import cache
    from pretrain.data.pack import pack

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "pack", partial(pack, near=False))
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU unless its tests were asked for (`-m gpu`): all others are bit-exact on CPU."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# Of "xs" most is the vocabulary: 3.2 M parameters, which are trained, saved and hashed; here 0.8 M.
TEXT_SIZES["xxs"] = (16, 2, 2)

# A test cannot cut the power, and a disk takes milliseconds for each of thousands of syncs.
SYNC = os.fsync

MOTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}


def pytest_collection_finish() -> None:
    """Exclude what was imported and collected from garbage collection, which saves time.

    And start the host of other processes: torch computes no gradients in a fork of a process that
    has computed some.
    """
    gc.freeze()
    if runs := sys.modules.get("tests.recipes.runs"):
        runs.host()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests cache out of the user's home, and apart from other test runs."""
    before = os.environ.get("MUYBRIDGE_CACHE")
    os.environ["MUYBRIDGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["MUYBRIDGE_CACHE"]
    if before is not None:
        os.environ["MUYBRIDGE_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Syncs look at what they are given and return; unit/test_folders.py does them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session", autouse=True)
def forked_decoders() -> Iterator[None]:
    """Decoding processes are forked from this one, which saves each the time of its imports.

    Programs that tests start have real ones, and so has what is given a command of its own.
    """
    from pretrain.data import acquire, ingest, pool, stream  # noqa: F401

    def start(command: tuple[str, ...], **given: Any) -> subprocess.Popen:
        if command not in (pool.INGEST, pool.ACQUIRE, stream.WORKER):
            return subprocess.Popen(command, **given)
        return forked.start(partial(runpy.run_module, command[-1], run_name="__main__"), **given)

    names = SimpleNamespace(**vars(subprocess) | {"Popen": start})
    with pytest.MonkeyPatch.context() as patch:
        for module in (pool, stream):
            patch.setattr(module, "subprocess", names)
        yield


def save_open_clip(folder: Path, model: torch.nn.Module, config: dict, preprocess: dict) -> str:
    """Write a model in open_clip's folder layout; return the name that loads it."""
    about = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return f"open_clip:local-dir:{folder}"


def draw_motion(motion: str, person: int, take: int, frames: int, side: int) -> np.ndarray:
    """A square that crosses the picture: uint8 (T, H, W, 3).

    Its colour, size and background are the person's, whom a model can recognise; only the motion
    gives the label.
    """
    rng = np.random.default_rng([person, take, *motion.encode()])
    look = np.random.default_rng(person)
    size = int(look.integers(side // 5, side // 3))
    ground, colour = look.integers(0, 120, 3), look.integers(140, 255, 3)
    dx, dy = MOTIONS[motion]
    room, across = side - size, int(rng.integers(side - size + 1))
    video = np.empty((frames, side, side, 3), np.uint8)
    video[:] = ground
    for t in range(frames):
        step = round(t / (frames - 1) * room)
        x = {1: step, -1: room - step, 0: across}[dx]
        y = {1: step, -1: room - step, 0: across}[dy]
        video[t, y : y + size, x : x + size] = colour
    return video


def write_video(path: Path, video: np.ndarray, fps: int = 16) -> None:
    """Write uint8 frames (T, H, W, 3) as H.264 .mp4."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=fps, options={"preset": "ultrafast", "crf": "20"}
        )
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        for picture in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))


def write_videos(folder: Path, rows: list[dict], frames: int = 16, side: int = 32) -> Path:
    """Draw videos as `make_pack` does; return their list, folder/list.csv."""
    drawn = {"motion", "person", "take"}
    columns = [c for c in dict.fromkeys(c for row in rows for c in row) if c not in drawn]
    with open(folder / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", *columns])
        for row in rows:
            name = "{motion}-{person}-{take}.mp4".format(**row)
            video = draw_motion(row["motion"], row["person"], row["take"], frames, side)
            write_video(folder / name, video)
            writer.writerow([name, *(row.get(c) or "" for c in columns)])
    return folder / "list.csv"


@pytest.fixture(scope="session")
def make_pack(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function rows -> folder of a pack.

    A row has `motion`, `person`, `take` and columns of the list. Further arguments: frames, side
    (pixels), and those of `pretrain.data.pack.pack`.
    """
    from pretrain.data.pack import pack

    def make(rows: list[dict], frames: int = 16, side: int = 32, **options: Any) -> Path:
        source = write_videos(tmp_path_factory.mktemp("videos"), rows, frames, side)
        out = tmp_path_factory.mktemp("packs") / "pack"
        options = {"near": False} | options  # their clips are alike but for what is counted
        pack(source, out, short_side=side, workers=1, progress=False, **options)
        return out

    return make


def motion_rows(people: range, takes: int, split: str | None, **more: object) -> list[dict]:
    """Rows for `make_pack`: every motion by every person, labelled by the motion."""
    return [
        {"motion": m, "person": p, "take": t, "label": m, "subject": f"p{p}"}
        | ({"split": split} if split else {})
        | more
        for m in MOTIONS
        for p in people
        for t in range(takes)
    ]


@pytest.fixture(scope="session")
def tiny_pack(make_pack: Callable[..., Path]) -> Path:
    """48 clips of 16 frames of 32x32: 4 motions, 4 people train, 2 others test, 2 takes each."""
    return make_pack(motion_rows(range(4), 2, "train") + motion_rows(range(4, 6), 2, "test"))


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported encoder with random weights that sees 8 frames, 2 apart, of 32x32."""
    from pretrain.backbones import export_backbone
    from pretrain.vit import VideoTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        encoder = VideoTransformer(dim=32, depth=2, heads=2, frames=8, size=32, patch=8, stride=2)
    folder = tmp_path_factory.mktemp("run") / "backbone"
    export_backbone(encoder, folder, {"recipe": "random, for tests"})
    return folder


@pytest.fixture(scope="session")
def captioned_pack(make_pack: Callable[..., Path]) -> Path:
    """56 clips as in `tiny_pack` with two captions each: 4 people train, 1 val, 2 test."""

    def said(people: range, takes: int, split: str) -> list[dict]:
        rows = motion_rows(people, takes, split)
        words = ("a square moves {}", "something goes {}")
        return [
            row | {"caption": w.format(row["label"]), "class_text": f"moves {row['label']}"}
            for row in rows
            for w in words
        ]

    return make_pack(
        said(range(4), 2, "train") + said(range(4, 5), 2, "val") + said(range(5, 7), 2, "test")
    )


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported pair of towers with random weights that sees 4 frames, 4 apart, of 32x32."""
    from pretrain.backbones import export_backbone
    from pretrain.clip import VideoText
    from pretrain.text import fresh_text
    from pretrain.vit import VideoTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        video = VideoTransformer(dim=32, depth=1, heads=2, frames=4, size=32, patch=8, stride=4)
        model = VideoText(video, fresh_text("xxs", 16, 32), 16, project=True, loss="infonce")
    folder = tmp_path_factory.mktemp("pair") / "backbone"
    export_backbone(model, folder, {"recipe": "random, for tests"})
    return folder
