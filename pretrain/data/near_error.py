"""How many planted copies of clips are found as near-duplicates, and how many others are.

    python -m pretrain.data.near_error --data clips.csv --subjects 1 2 3 --clips 100 --seeds 1 2

Of every clip a copy is made, changed at random and encoded by one of four codecs; originals and
copies are packed together, a pack for each kind and seed. Each clip should be the near-duplicate of
its own copy alone. Of halves, the first and the last 70 % of a recording, no original is packed.
"""

import csv
import io
import random
import tempfile
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from PIL import Image

from pretrain.data.index import NEAR
from pretrain.data.pack import pack
from pretrain.data.sources import Source, list_sources
from pretrain.flags import Count, Seed, Whole
from pretrain.log import cli

Kind = Literal["recode", "resize", "crop", "trim", "rate", "mirror", "halves", "all"]
KINDS: tuple[Kind, ...] = ("recode", "resize", "crop", "trim", "rate", "mirror", "halves", "all")
# Codec: options of good and of bad quality.
CODECS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "libx264": ({"crf": "26"}, {"crf": "36"}),
    "mpeg4": ({"qmin": "6", "qmax": "6"}, {"qmin": "14", "qmax": "14"}),
    "mjpeg": ({"qmin": "8", "qmax": "8"}, {"qmin": "20", "qmax": "20"}),
    "libvpx-vp9": ({"crf": "36", "b:v": "0"}, {"crf": "52", "b:v": "0"}),
}
Frames = list[np.ndarray]


@dataclass(frozen=True)
class Config:
    """Configuration of the measurement."""

    data: str
    """A folder of videos or a list."""
    kinds: tuple[Kind, ...] = KINDS
    """What is done to copies; all: trim, crop, rate and low quality together."""
    subjects: tuple[str, ...] = ()
    """Take clips of these subjects only; by default all."""
    clips: Whole = 0
    """Take so many clips, drawn anew by each seed; 0: all."""
    seeds: tuple[Seed, ...] = (1, 2)
    """Of the draws."""
    workers: Count = 1
    """Decoding processes."""


def read_video(path: Path) -> tuple[Frames, float]:
    """The frames (H, W, 3) of a video, and how many a second has."""
    with av.open(str(path)) as file:
        rate = file.streams.video[0].average_rate
        assert rate is not None  # it was packed
        return [f.to_ndarray(format="rgb24") for f in file.decode(video=0)], float(rate)


def changed(
    frames: Frames, fps: float, kind: str, rng: random.Random
) -> tuple[list[tuple[Frames, float]], bool]:
    """The copies of a video with their frame rates, and whether their quality is to be low."""
    every = kind == "all"
    if kind == "halves":
        most = int(np.ceil(0.7 * len(frames)))
        return [(frames[:most], fps), (frames[len(frames) - most :], fps)], False
    if kind == "trim" or every:
        count = int(np.ceil(len(frames) * rng.uniform(0.5, 0.9)))
        first = rng.randint(0, len(frames) - count)
        frames = frames[first : first + count]
    if kind == "crop" or every:
        high, wide = frames[0].shape[:2]
        low = [int(rng.uniform(0, 0.15) * side) for side in (high, wide, high, wide)]
        frames = [f[low[0] : high - low[2], low[1] : wide - low[3]] for f in frames]
    if kind == "rate" or every:
        times = rng.choice([0.5, 0.6, 0.8, 1.2, 2.0])
        numbers = np.arange(max(2, int(len(frames) * times))) / times
        frames = [frames[min(int(n + 1e-6), len(frames) - 1)] for n in numbers]
        fps *= times
    if kind == "resize":
        times = rng.choice([0.4, 0.5, 0.65, 1.5])
        size = [max(16, round(side * times)) for side in frames[0].shape[1::-1]]
        frames = [np.asarray(Image.fromarray(f).resize((size[0], size[1]))) for f in frames]
    if kind == "mirror":
        frames = [f[:, ::-1] for f in frames]
    return [(frames, fps)], kind == "recode" or every


def encoded(frames: Frames, fps: float, bad: bool, rng: random.Random) -> bytes:
    """A Matroska file of frames, by a codec drawn."""
    codec = rng.choice(sorted(CODECS))
    high, wide = (side // 2 * 2 for side in frames[0].shape[:2])
    data = io.BytesIO()
    with av.open(data, "w", format="matroska") as file:
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = wide, high
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = CODECS[codec][bad]
        for frame in frames:
            pixels = np.ascontiguousarray(frame[:high, :wide])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
    return data.getvalue()


def measure(
    sources: list[Source], kind: str, seed: int, workers: int
) -> tuple[int, int, int, float, float]:
    """Plant copies, pack and count.

    Args:
        sources: the videos.
        kind: of copy.
        seed: of what is drawn.
        workers: decoding processes.

    Returns:
        copies found, clips in false pairs, clips, and seconds to pack without and to look.
    """
    rng = random.Random(f"{kind} {seed}")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        origin: dict[str, int] = {}
        for number, source in enumerate(sources):
            copies, bad = changed(*read_video(source.path), kind, rng)
            names = [place / f"{number}-{i}.mkv" for i in range(len(copies))]
            for name, (frames, fps) in zip(names, copies, strict=True):
                name.write_bytes(encoded(frames, fps, bad, rng))
            origin |= {str(p): number for p in (names if len(names) > 1 else [*names, source.path])}
        with open(place / "all.csv", "w", newline="") as file:
            csv.writer(file).writerows([["path"], *([path] for path in origin)])
        started = time.monotonic()
        pack(place / "all.csv", place / "pack", workers=workers, progress=False, near=False)
        packed = time.monotonic() - started
        pack(place / "all.csv", place / "pack", workers=workers, progress=False)
        looked = time.monotonic() - started - packed
        with open(place / "pack" / NEAR, newline="") as file:
            rows = list(csv.DictReader(file))
    pairs = [(row["source"], row["other_source"]) for row in rows]
    found = {origin[a] for a, b in pairs if origin[a] == origin[b]}
    false = {path for pair in pairs if origin[pair[0]] != origin[pair[1]] for path in pair}
    return len(found), len(false), len(origin), packed, looked


def main(config: Config) -> None:
    """Print a line for each kind of copy."""
    everything = list_sources(config.data).sources
    known = [s for s in everything if not config.subjects or s.subject in config.subjects]
    if not known:
        raise ValueError(f"{config.data}: no video of --subjects {' '.join(config.subjects)}")
    print(
        "| copies | found | clips in false pairs | packing s | looking s |\n|---|---|---|---|---|"
    )
    for kind in config.kinds:
        sums = np.zeros(6)
        for seed in config.seeds:
            some = known
            if config.clips:
                some = random.Random(seed).sample(known, min(config.clips, len(known)))
            sums += (*measure(some, kind, seed, config.workers), len(some))
        found, false, clips, packed, looked, copies = sums
        print(
            f"| {kind} | {found:.0f} of {copies:.0f} | {false:.0f} of {clips:.0f} | {packed:.0f} | "
            f"{looked:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    cli(main, Config)
