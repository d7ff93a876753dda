"""Exact poses made worse, as an estimator of poses would have found them.

    python -m pretrain.data.pose_errors --source synthetic:3600 --out worse
    python recipes/finetune.py --model stgcn --data worse/clips.csv

For measuring how much a model of joints depends on their quality. Written: a .npy for every file of
poses, and clips.csv, the list with these in their place; videos and flow stay where they are.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.cache import draw_synthetic, synthetic_clips
from pretrain.data.lists import roles_of
from pretrain.data.pose_files import read_poses
from pretrain.data.poses import SKELETONS, write_array
from pretrain.data.progress import Bar
from pretrain.files import is_file, no_file, replacing
from pretrain.flags import FractionBelowOne, NotNegative, Positive, Seed
from pretrain.folders import claim, writing
from pretrain.log import cli

COLUMNS = ("x", "y", "z", "confidence")  # of what is written, as `read_poses` reads it


@dataclass(frozen=True)
class Errors:
    """What an estimator does wrong; the defaults are about what one camera allows.

    In the synthetic dataset joints are then 7 cm off, which is what published estimators of 3-D
    poses from one picture come to.
    """

    noise: NotNegative = 0.1
    """Standard deviation of every coordinate, in sizes of the body: the root mean square of the
    joints' distances from their mean."""
    missing: FractionBelowOne = 0.1
    """Fraction of the joints that are not seen, each for a stretch of time."""
    swapped: FractionBelowOne = 0.1
    """Fraction of the time in which left and right are taken for one another, likewise."""
    stretch: Positive = 8.0
    """Frames of such a stretch, on average; at least 1."""


@dataclass(frozen=True)
class Config:
    """Configuration of the poses."""

    out: str
    """A new folder."""
    source: str = "synthetic"
    """A list (.csv) with a column of poses in metres, or synthetic:3600."""
    noise: NotNegative = Errors.noise
    """Standard deviation of every coordinate, in sizes of the body."""
    missing: FractionBelowOne = Errors.missing
    """Fraction of the joints that are not seen."""
    swapped: FractionBelowOne = Errors.swapped
    """Fraction of the time in which left and right are swapped."""
    stretch: Positive = Errors.stretch
    """Frames for which a joint is missing, or sides are swapped, on average."""
    seed: Seed = 0
    """Of all errors."""


def worsen(
    values: np.ndarray, skeleton: str, errors: Errors, rng: np.random.Generator
) -> np.ndarray:
    """Poses with an estimator's errors: sides swapped, then noise, then joints missing.

    Args:
        values: (T, P, J, K) coordinates and a confidence, which is 0 where a joint is not seen.
        skeleton: a name in `SKELETONS`, which says what is left and right.
        errors: how large they are.
        rng: of all of them.

    Raises:
        ValueError: stretches under one frame, or too short for so large a fraction.
    """
    swapped = stretches(values.shape[:2], errors.swapped, errors.stretch, rng)
    missing = stretches(values.shape[:3], errors.missing, errors.stretch, rng)
    order = list(range(values.shape[2]))
    for left, right in SKELETONS[skeleton].pairs:
        order[left], order[right] = right, left
    out = np.where(swapped[..., None, None], values[:, :, order], values)
    seen = out[..., -1:] > 0
    people = seen.sum(2, keepdims=True).clip(1)
    around = (out[..., :-1] - (out[..., :-1] * seen).sum(2, keepdims=True) / people) * seen
    body = np.sqrt(np.square(around).sum() / max(seen.sum(), 1))
    out[..., :-1] += errors.noise * body * rng.standard_normal(around.shape)
    return (out * (seen & ~missing[..., None])).astype(np.float32)


def stretches(
    shape: tuple[int, ...], fraction: float, length: float, rng: np.random.Generator
) -> np.ndarray:
    """Stretches of time, True in a fraction of it: a chain that starts and ends them at random.

    Args:
        shape: (T, ...); everything behind T by itself.
        fraction: that is True on average.
        length: frames of a stretch, on average.
        rng: of all of it.

    Raises:
        ValueError: there is no such chain.
    """
    start = fraction / (1 - fraction) / length
    if length < 1 or start > 1:
        raise ValueError(
            f"stretches of {length:g} frames cannot cover {fraction:.0%} of the time: give "
            "--stretch 1 or more, and smaller fractions"
        )
    found = np.empty(shape, bool)
    found[0] = rng.random(shape[1:]) < fraction
    for t in range(1, len(found)):
        drawn = rng.random(shape[1:])
        found[t] = np.where(found[t - 1], drawn >= 1 / length, drawn < start)
    return found


def read_rows(source: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and the rows of a .csv file.

    Raises:
        ValueError: it is none, or its lines have different numbers of fields.
    """
    try:
        with open(source, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file, strict=True)
            rows = list(table)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is no list in .csv: {error}") from error
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"{source}: row {number + 1} has more or fewer fields than columns")
    return list(table.fieldnames or ()), rows


def main(config: Config) -> Path:
    """Write the poses; returns the path of their list."""
    num = synthetic_clips(config.source)
    source = draw_synthetic(num, say=True) if num else Path(config.source)
    if not is_file(source):
        raise ValueError(f"--source {config.source}: {no_file(config.source)}")
    names, rows = read_rows(source)
    roles = {role: name for name, role in roles_of(tuple(names))[0].items()}
    if "pose" not in roles:
        raise ValueError(f"--source {source}: there is no column of poses")
    skeleton = roles.setdefault("skeleton", "skeleton")
    errors = Errors(config.noise, config.missing, config.swapped, config.stretch)
    out = Path(config.out)
    lock = claim(out, ())
    written: dict[str, tuple[str, str]] = {}
    with Bar(len(rows), "making poses worse", "row") as bar:
        for row in rows:
            for role in {"path", "flow"} & roles.keys():
                if row[roles[role]]:
                    row[roles[role]] = str((source.parent / row[roles[role]]).resolve())
            if given := row[roles["pose"]]:
                if given not in written:
                    name = f"{len(written):05d}.npy"
                    poses = read_poses(source.parent / given, row.get(skeleton) or "")
                    if not {*COLUMNS} <= {*poses.columns}:
                        raise ValueError(f"{given}: no poses in metres, which become worse here")
                    rng = np.random.default_rng([config.seed, len(written)])
                    kept = [poses.columns.index(name) for name in COLUMNS]
                    worse = worsen(poses.values[..., kept], poses.skeleton, errors, rng)
                    with writing(out / name):
                        (out / name).write_bytes(write_array(worse))
                    written[given] = (name, poses.skeleton)
                row[roles["pose"]], row[skeleton] = written[given]
            bar.update()
    listing = out / "clips.csv"
    with (
        writing(listing),
        replacing(listing) as aside,
        open(aside, "w", newline="", encoding="utf-8") as file,
    ):
        lines = csv.DictWriter(file, dict.fromkeys([*names, skeleton]))
        lines.writeheader()
        lines.writerows(rows)
    lock.release(force=True)
    print(f"poses    {listing}: {len(written)} files")
    return listing


if __name__ == "__main__":
    cli(main, Config)
