"""Long videos with known events: clips of the synthetic dataset, one after the other.

    python -m pretrain.data.untrimmed --out untrimmed

Written: NNN.mp4 and videos.csv, a list with the columns path, split and segments ("2-4 sit_down;
4-6 other; ..."). A third of the actions is called `other`, what happens between events. A cut of
the picture lies between two clips, so starts and ends are easier to find than in life. Nobody is
in two splits.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.progress import Bar
from pretrain.data.synthetic import ClipSpec, clip_specs, encode_video, render
from pretrain.files import replacing
from pretrain.flags import Count, Seed
from pretrain.folders import claim, writing
from pretrain.log import cli

OTHER = "other"
OTHERS = ("walk", "jog", "jump", "clap", "stir", "wave")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Config:
    """Configuration of the videos."""

    out: str
    """A new folder."""
    clips: Count = 900
    """Of all splits; a tenth of them, which are for composition, is left out."""
    per_video: Count = 10
    """Clips in a video."""
    size: Count = 64
    """Height and width, pixels, even."""
    frames: Count = 32
    """Of a clip."""
    fps: Count = 16
    """Frames a second."""
    seed: Seed = 0
    """Of people, places, performances and order."""


def in_order(specs: list[ClipSpec], rng: np.random.Generator) -> list[ClipSpec]:
    """Clips in a random order in which two of one label rarely follow each other."""
    left = [specs[i] for i in rng.permutation(len(specs))]
    order: list[ClipSpec] = []
    while left:
        last = label_of(order[-1]) if order else None
        order.append(left.pop(next((i for i, s in enumerate(left) if label_of(s) != last), 0)))
    return order


def label_of(spec: ClipSpec) -> str:
    """What the list calls a clip."""
    return OTHER if spec.action in OTHERS else spec.action


def segments_of(specs: list[ClipSpec], seconds: float) -> str:
    """The column `segments` of a video; neighbours of one label are one segment."""
    parts: list[list] = []
    for i, spec in enumerate(specs):
        if parts and parts[-1][2] == label_of(spec):
            parts[-1][1] = (i + 1) * seconds
        else:
            parts.append([i * seconds, (i + 1) * seconds, label_of(spec)])
    return "; ".join(f"{start:g}-{end:g} {label}" for start, end, label in parts)


def main(config: Config) -> Path:
    """Write the videos; returns the path of their list."""
    out, rng = Path(config.out), np.random.default_rng(config.seed)
    lock = claim(out, ())
    specs = clip_specs(config.seed, config.clips)
    videos: list[tuple[str, list[ClipSpec]]] = []
    for split in SPLITS:
        order = in_order([spec for spec in specs if spec.split == split], rng)
        starts = range(0, len(order), config.per_video)
        videos += [(split, order[start : start + config.per_video]) for start in starts]
    rows = []
    with Bar(len(videos), "drawing", "video") as bar:
        for number, (split, parts) in enumerate(videos):
            name = f"{number:03d}.mp4"
            drawn = [render(spec, config.size, config.frames, config.fps).frames for spec in parts]
            with writing(out / name):
                (out / name).write_bytes(encode_video(np.concatenate(drawn), config.fps))
            rows.append([name, split, segments_of(parts, config.frames / config.fps)])
            bar.update()
    listing = out / "videos.csv"
    with (
        writing(listing),
        replacing(listing) as aside,
        open(aside, "w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file).writerows([["path", "split", "segments"], *rows])
    lock.release(force=True)
    print(f"videos   {listing}: {len(rows)}, {config.clips} clips")
    return listing


if __name__ == "__main__":
    cli(main, Config)
