"""How fast clips of a pack far away come, against the same pack here.

`benchmark.py --what stream` calls `measure`. As a program this is a web server of a folder at
loopback, which lets every request wait: `python -m pretrain.data.stream_speed FOLDER SECONDS`.
"""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from pretrain.data.cache import open_data
from pretrain.data.pack import pack
from pretrain.data.remote import MOST_LANES
from pretrain.data.shards import Pack, Positions, TrainClips, train_batches
from pretrain.spec import InputSpec
from pretrain.videomae import mask_of_view

BATCH, COPIES = 8, 60
SHARD = 2**21  # bytes: of its many shards, as of a large pack's, a few are in the window
FILLED = MOST_LANES // BATCH + 1  # batches until it is there
WAIT = 0.02  # seconds, of every request


@contextlib.contextmanager
def serving(folder: Path, seconds: float) -> Iterator[str]:
    """Serve a folder from a process of its own, as an address."""
    command = [sys.executable, "-m", "pretrain.data.stream_speed", str(folder), str(seconds)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None  # a pipe
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.wait()


def epoch(packed: Pack, spec: InputSpec, seed: int) -> tuple[float, float]:
    """Load an epoch of training views: seconds to the first batch, and clips/s with the window."""
    draw = mask_of_view("tube", (spec.frames // 2, 14, 14), 0.9, False)
    clips = TrainClips(
        packed, np.arange(len(packed)), spec, seed, 1, (1.0, 0.875, 0.75, 0.66), draw
    )
    lane = clips.lane if clips.streamed else None
    steps = len(packed) // BATCH
    began = time.monotonic()
    with train_batches(clips, Positions(0, steps, BATCH, 1, 1, 0, lane), 0) as batches:
        next(batches)
        first = time.monotonic()
        for _ in range(FILLED - 1):
            next(batches)
        filled = time.monotonic()
        for _ in batches:
            pass
    return first - began, (steps - FILLED) * BATCH / (time.monotonic() - filled)


def measure(
    raw: Path, spec: InputSpec, rounds: int, seed: int
) -> dict[str, list[tuple[float, float]]]:
    """`epoch` in turn from here, from far away into an empty cache, and again from that cache.

    Args:
        raw: a folder of videos, each of which is packed `COPIES` times.
        spec: the clip.
        rounds: how often each.
        seed: of everything random.
    """
    found: dict[str, list[tuple[float, float]]] = {"local": [], "streamed": [], "cached": []}
    before = os.environ.get("MUYBRIDGE_CACHE")
    for path in list(raw.iterdir()):
        for copy in range(1, COPIES):
            shutil.copy(path, path.with_stem(f"{path.stem}-{copy}"))
    pack(raw, raw.with_name("pack"), shard_bytes=SHARD, progress=False)
    here = raw.with_name("pack")
    with tempfile.TemporaryDirectory() as cache, serving(here, WAIT) as address:
        os.environ["MUYBRIDGE_CACHE"] = cache
        try:
            for _ in range(rounds):
                found["local"].append(epoch(Pack(here), spec, seed))
                shutil.rmtree(Path(cache) / "remote", ignore_errors=True)
                for name in ("streamed", "cached"):
                    found[name].append(epoch(open_data(address, spec.size, False), spec, seed))
        finally:
            del os.environ["MUYBRIDGE_CACHE"]
            if before is not None:
                os.environ["MUYBRIDGE_CACHE"] = before
    return found


def rows_of(found: dict[str, list[tuple[float, float]]]) -> dict[str, str]:
    """What `measure` found, in words: speeds, and their ratios to local of the same round."""
    speeds = {name: np.array([speed for _, speed in each]) for name, each in found.items()}
    first = {name: np.median([seconds for seconds, _ in each]) for name, each in found.items()}
    return {
        name: f"{np.median(speed):6.1f} clips/s  {np.median(speed / speeds['local']):5.2f}x  first "
        f"batch after {first[name]:.2f} s"
        for name, speed in speeds.items()
    }


def main(folder: str, seconds: float) -> None:
    """Serve a folder until the process is ended."""

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(seconds)
            super().do_GET()

    handler = functools.partial(Handler, directory=folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
