"""Does it pay to label what is proposed? Labelling simulated on data that have all labels.

    python -m downstream.simulate_labelling --backbone RUN/backbone --data LIST

The labels are hidden, and shown batch by batch in two orders: as `downstream.proposals` proposes,
which recipes/fit.py does, and at random, from the same first batch. After each batch a classifier
is fitted on what is labelled (logistic regression, C 1) and scored on people who are not among the
candidates. Every seed holds out other people, about a quarter. What is printed is the number of
labels with which each order first reaches 80 % of the accuracy that all labels give, and the mean
over the seeds of the difference, with its interval: below 0, the proposed order needs fewer.
"""

import dataclasses
from dataclasses import dataclass

import pretrain.threads  # noqa: F401 (before torch)

import numpy as np
from torch import nn

from downstream.crossval import grouped_folds
from downstream.features import cached_features, covering_views, start_extraction
from downstream.metrics import bootstrap
from downstream.models import load_backbone, match_rate
from downstream.probe import fit_some
from downstream.proposals import propose
from downstream.splits import hold_out, labelled_videos
from pretrain.data.cache import open_data, packing_side
from pretrain.flags import Count, PositiveFraction, Seed, Whole
from pretrain.log import cli
from pretrain.names import counted
from pretrain.settings import MACHINE, MachineFlags
from pretrain.spec import Backbone


@dataclass(frozen=True)
class Config:
    """Configuration of the simulation."""

    backbone: str
    """As recipes/fit.py takes it."""
    data: str
    """Likewise, with a label of every clip."""
    split: str = "all"
    """The split that is used; all: every clip."""
    batch: Count = 20
    """Labels that are given at a time."""
    seeds: Count = 20
    """Other people are held out, and the first batch is another, in each."""
    first_seed: Seed = 0
    """The seeds count from here."""
    fraction: PositiveFraction = 0.8
    """Of the accuracy with all labels that is to be reached."""
    time_segments: Whole = 4
    """As recipes/fit.py takes it."""
    batch_size: Count = 64
    """Views in one forward pass; changes speed and memory only."""
    machine: MachineFlags = MACHINE


def labels_needed(
    features: np.ndarray, labels: np.ndarray, test: np.ndarray, batch: int, aim: float,
    proposed: bool, seed: int,
) -> int:  # fmt: skip
    """How many labels it takes until a classifier reaches an accuracy.

    Args:
        features: (N, D).
        labels: (N,) class numbers, shown batch by batch.
        test: (N,) True = scored on, and never shown.
        batch: labels shown at a time.
        aim: the accuracy.
        proposed: whether the classifier proposes, or chance.
        seed: of the first batch, and of chance.

    Returns:
        a multiple of `batch`, or the number of all candidates.
    """
    num, rng = int(labels.max()) + 1, np.random.default_rng(seed)
    waiting = rng.permutation(np.flatnonzero(~test))
    known, waiting = waiting[:batch], waiting[batch:]
    while len(waiting):
        probe = fit_some(features[known], labels[known], np.empty((0, len(known))), num)
        said = probe.probabilities(features[test]).argmax(1)
        if (said == labels[test]).mean() >= aim:
            break
        chosen = np.arange(min(batch, len(waiting)))
        if proposed:
            chosen = propose(probe, features[waiting], features[known], batch, seed)
        known = np.concatenate([known, waiting[chosen]])
        waiting = np.delete(waiting, chosen)
    return len(known)


def simulate(
    features: np.ndarray, labels: np.ndarray, tests: list[np.ndarray], batch: int, fraction: float,
    first_seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Labels needed in the proposed and in a random order, and the accuracies with all labels.

    Args:
        features: (N, D).
        labels: (N,) class numbers.
        tests: of each seed the mask (N,) of what is scored.
        batch: labels shown at a time.
        fraction: of the accuracy with all labels that is to be reached.
        first_seed: the seeds count from here.

    Returns:
        (seeds, 2): proposed, random; and (seeds,).
    """
    needed, reached = [], []
    for seed, test in enumerate(tests, first_seed):
        rest, num = np.flatnonzero(~test), int(labels.max()) + 1
        probe = fit_some(features[rest], labels[rest], np.empty((0, len(rest))), num)
        said = probe.probabilities(features[test]).argmax(1)
        reached.append(float((said == labels[test]).mean()))
        about = features, labels, test, batch, fraction * reached[-1]
        needed.append([labels_needed(*about, proposed, seed) for proposed in (True, False)])
    return np.array(needed), np.array(reached)


def told(needed: np.ndarray, fraction: float) -> list[str]:
    """What labels needed (seeds, 2) say, a line each; the last says whether it pays."""

    def mean(values: np.ndarray) -> tuple[float, float, float]:
        low, high = bootstrap(lambda times: times @ values / times.sum(), np.arange(len(values)), 0)
        return float(values.mean()), low[0], high[0]

    lines = []
    for name, values in zip(("proposed", "random"), needed.T, strict=True):
        middle, low, high = mean(values)
        lines.append(f"{name:10}{middle:6.1f} labels, 95 % interval {low:.1f} to {high:.1f}")
    middle, low, high = mean(needed[:, 0] - needed[:, 1])
    pays = "pays" if high < 0 else "COSTS labels" if low > 0 else "is not shown to pay"
    lines.append(
        f"the proposed order {pays} for {100 * fraction:.0f} % of the accuracy with all labels: "
        f"{middle:+z.1f} labels, 95 % interval {low:+z.1f} to {high:+z.1f}, over "
        f"{counted(len(needed), 'seed')}"
    )
    return lines


def main(config: Config) -> np.ndarray:
    """Simulate and print; returns the labels needed (seeds, 2)."""
    how = start_extraction(config.machine, 1, 1, config.batch_size, config.time_segments)
    encoder = load_backbone(config.backbone)
    assert isinstance(encoder, nn.Module) and isinstance(encoder, Backbone)
    pack = open_data(
        config.data, packing_side(encoder.input_spec.size), machine=config.machine, labels=True
    )
    match_rate(config.backbone, encoder, pack.rates())
    videos, _ = labelled_videos(pack, config.split)
    labels = grouped_folds(pack.name, videos, 0).folds.labels  # refuses what cannot be tested
    clips, crops, _ = covering_views(pack, videos.samples, encoder.input_spec)
    how = dataclasses.replace(how, num_clips=clips, num_crops=crops)
    embedded = cached_features(encoder, pack, videos.samples, how, "clips")
    features = videos.average(embedded.reshape(len(embedded), -1)).astype(np.float64)
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    held = [hold_out(videos, seed) for seed in seeds]
    if not all(mask.any() for mask, _ in held):
        raise ValueError(f"{pack.name}: nobody can be held out: {held[0][1]}")
    tests = [mask for mask, _ in held]
    needed, reached = simulate(
        features, labels, tests, config.batch, config.fraction, config.first_seed
    )
    print(
        f"{counted(len(videos), 'video')}, {counted(len(set(labels.tolist())), 'class')}; scored "
        f"on {min(t.sum() for t in tests)} to {max(t.sum() for t in tests)}: {held[0][1]}; "
        f"top-1 with all labels {100 * reached.mean():.1f} %"
    )
    print("\n".join(told(needed, config.fraction)))
    return needed


if __name__ == "__main__":
    cli(main, Config)
