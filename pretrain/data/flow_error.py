"""How far estimated optical flow is from the exact one of the synthetic dataset, and at what price.

    python -m pretrain.data.flow_error
    python -m pretrain.data.flow_error --size 224 --methods dis raft_small

The end-point error of a pixel is the distance of the estimated motion from the true one, in pixels;
of all pixels, and of those that move by more than one pixel. "stored" is what storing costs.
"""

import time
from dataclasses import dataclass

import numpy as np

from pretrain.data.flow import (
    Estimator,
    choose_bound,
    encode_levels,
    estimator,
    to_levels,
    to_pixels,
)
from pretrain.data.guard import Refused
from pretrain.data.methods import METHODS, check_method, refuse_size
from pretrain.data.synthetic import clip_specs, render
from pretrain.flags import Count
from pretrain.log import cli

MOVING = 1.0  # pixels


@dataclass(frozen=True)
class Config:
    """Configuration of the measurement."""

    methods: tuple[str, ...] = ("dis", "tvl1", "raft_small", "raft_large")
    """Which; one that cannot be used here is named with the reason."""
    num_clips: Count = 10
    """Clips of the synthetic dataset."""
    size: Count = 64
    """Their width and height, pixels."""
    frames: Count = 32
    """Of each clip."""


def measure(
    clips: list[tuple[np.ndarray, np.ndarray]], estimate: Estimator | None
) -> dict[str, float]:
    """Errors of a method, and its pairs of frames a CPU-second.

    Args:
        clips: frames uint8 (T, H, W, 3) and true flow (T - 1, 2, H, W) of each.
        estimate: the method; None: no motion anywhere.

    Returns:
        "all" and "moving", the mean end-point errors in pixels; "pairs" a CPU-second; "stored", the
        mean error that quantisation adds on moving pixels; "kib", KiB a stored pair.
    """
    errors, moves, stored, size, pairs, spent = [], [], [], 0, 0, 0.0
    for frames, true in clips:
        began = time.process_time()
        if estimate is None:
            found = np.zeros_like(true)
        else:
            found = np.stack([estimate(*frames[t : t + 2]) for t in range(len(true))])
        spent += time.process_time() - began
        pairs += len(true)
        height, width = frames.shape[1:3]
        bound = choose_bound(found, width, height)
        levels = to_levels(found, bound)
        size += len(encode_levels(levels))
        errors.append(np.linalg.norm(found - true, axis=1).ravel())
        moves.append(np.linalg.norm(true, axis=1).ravel() > MOVING)
        stored.append(np.linalg.norm(found - to_pixels(levels, bound), axis=1).ravel())
    error, moving, kept = map(np.concatenate, (errors, moves, stored))
    return {
        "all": float(error.mean()),
        "moving": float(error[moving].mean()),
        "pairs": pairs / max(spent, 1e-9),
        "stored": float(kept[moving].mean()),
        "kib": size / 1024 / pairs,
    }


def main(config: Config) -> dict[str, dict[str, float]]:
    """Measure, and print a table.

    Raises:
        ValueError: there is no such method, or no pair of frames.
    """
    if unknown := {*config.methods} - METHODS["flow"].keys():
        raise ValueError(f"--methods {min(unknown)}: give some of {', '.join(METHODS['flow'])}")
    if config.frames < 2:
        raise ValueError(f"--frames {config.frames}: flow is between two frames, give at least 2")
    specs = clip_specs(0, config.num_clips)
    drawn = [render(spec, config.size, config.frames) for spec in specs]
    clips = [(clip.frames, clip.flow.astype(np.float32)) for clip in drawn]
    print(f"{config.num_clips} clips of {config.frames} frames, {config.size} pixels")
    print(f"{'method':<12}{'error':>8}{'moving':>8}{'pairs/s':>9}{'stored':>8}{'KiB/pair':>10}")
    table = {}
    for name in ("no motion", *config.methods):
        try:
            if name in METHODS["flow"]:
                refuse_size(name, config.size, config.size)
                check_method(name)
            found = measure(clips, estimator(name) if name in METHODS["flow"] else None)
        except (Refused, ValueError) as error:
            print(f"{name:<12}{error}")
            continue
        table[name] = found
        print(
            f"{name:<12}{found['all']:8.3f}{found['moving']:8.3f}{found['pairs']:9.1f}"
            f"{found['stored']:8.3f}{found['kib']:10.2f}"
        )
    return table


if __name__ == "__main__":
    cli(main, Config)
