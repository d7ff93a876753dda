"""Claims of the literature about the model families, checked against measured numbers."""

import csv
import math
from pathlib import Path

import numpy as np

from downstream.metrics import paired_difference
from downstream.results import FEW, Results
from pretrain.names import from_csv

POOLED = ("frame_single", "frame_mean", "frame_max")
FUSED = ("frame_late", "frame_early", "frame_slow")
ORDERED = (
    "rnn", "lstm", "bilstm", "gru", "tcn", "tcn_acausal", "ed_tcn", "c3d", "i3d", "inflated",
    "r3d_18", "mc3_18", "r2plus1d_18", "s3d",
)  # fmt: skip


def pair_videos(results: Results) -> int:
    """How many test videos are of an action that has a reversed twin in the synthetic dataset."""
    from pretrain.data.figure import REVERSED_PAIRS

    names = {name for pair in REVERSED_PAIRS for name in pair}
    return sum(entry.num for name, entry in results.per_class.items() if name in names)


def claims_about(rows: dict[str, dict], runs: dict[str, list[Results]]) -> list[dict]:
    """Claims on the reversed pairs of the synthetic dataset: each measured, and whether it held.

    An accuracy on n pairs of chance one half differs from chance where it is more than 1.96
    standard deviations from it; all seeds score the same videos, so n is that of one seed.

    Args:
        rows: name -> line of the table.
        runs: name -> results of its seeds.
    """
    num = {name: pair_videos(found[0]) for name, found in runs.items()}
    with_pairs = {
        name: row for name, row in rows.items() if row["reversed_pairs"] is not None and num[name]
    }
    margin = {name: 1.96 * 0.5 / math.sqrt(num[name]) for name in with_pairs}
    accuracy = lambda name: (
        f"{name} {100 * with_pairs[name]['reversed_pairs']:.1f} % (chance 50 ± "
        f"{100 * margin[name]:.1f})"
    )
    claims = []
    pooled = [n for n in POOLED if n in with_pairs]
    fused = [n for n in FUSED if n in with_pairs]
    ordered = [n for n in ORDERED if n in with_pairs]
    for name in pooled:
        held = abs(with_pairs[name]["reversed_pairs"] - 0.5) <= margin[name]
        claims.append(_claim(f"{name} classifies reversed actions at chance", held, accuracy(name)))
    for name in ordered:
        held = with_pairs[name]["reversed_pairs"] - 0.5 > margin[name]
        claims.append(
            _claim(f"{name} classifies reversed actions above chance", held, accuracy(name))
        )
    if pooled and ordered:
        floor = max(with_pairs[n]["reversed_pairs"] for n in pooled)
        ceiling = max(with_pairs[n]["reversed_pairs"] for n in ordered)
        for name in fused:
            value = with_pairs[name]["reversed_pairs"]
            held = floor <= value <= ceiling
            measured = (
                f"{accuracy(name)}; pooled at most {100 * floor:.1f} %, best with order "
                f"{100 * ceiling:.1f} %"
            )
            claims.append(
                _claim(f"{name} lies between pooled frames and models of order", held, measured)
            )
    return claims


def _claim(claim: str, held: bool, measured: str) -> dict:
    return {"claim": claim, "held": "yes" if held else "no", "measured": measured}


def read_predictions(folder: Path) -> dict[str, bool]:
    """Source -> whether a run's prediction is correct, from predictions.csv; empty without one.

    Raises:
        ValueError: it is not what `write_predictions` wrote.
    """
    path = folder / "predictions.csv"
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        try:
            return {
                from_csv(row["source"]): row["predicted"] == row["label"]
                for row in csv.DictReader(file)
            }
        except (csv.Error, KeyError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} holds no predictions in our format: {error}; run that model again"
            ) from error


def difference_interval(
    ours: list[dict[str, bool]],
    theirs: list[dict[str, bool]],
    people: dict[str, str],
    seed: int = 0,
) -> tuple[float, float, float, int]:
    """Mean accuracy difference on the same videos, its 95 % interval, and the number of people.

    The bootstrap draws people, then videos of each.

    Args:
        ours: predictions of each seed, as `read_predictions` gives them.
        theirs: of the other model, the same seeds.
        people: source -> who is seen in it; a source that is not there is a person of its own.
        seed: of the draws.
    """
    sources = sorted(set.intersection(*(set(a) for a in (*ours, *theirs))))
    correct = lambda runs: np.mean([[run[s] for s in sources] for run in runs], 0)
    difference = correct(ours) - correct(theirs)
    whose = [people.get(s) or s for s in sources]
    return *paired_difference(difference, whose, seed), len(set(whose))


def paired_claims(
    predictions: dict[str, list[dict[str, bool]]], people: dict[str, str]
) -> list[dict]:
    """Claims on pairs of models that differ in initial weights or in an attention block.

    Args:
        predictions: label of a model -> predictions of its seeds.
        people: source -> who is seen in it.
    """
    claims = []
    for label in predictions:
        name, _, start = label.partition(":")
        base, _, block = name.partition("_")
        if start and name in predictions:
            claim, other = f"{name} inflated from {start} beats {name} from scratch", name
        elif not start and block in ("se", "cbam", "nonlocal") and base in predictions:
            claim, other = f"{block} helps {base}", base
        else:
            continue
        mean, low, high, groups = difference_interval(
            predictions[label], predictions[other], people
        )
        held = "yes" if low > 0 else "no, it harms" if high < 0 else "not shown"
        measured = (
            f"{100 * mean:+z.1f} points, 95 % interval {100 * low:+z.1f} to {100 * high:+z.1f}"
        )
        if groups < FEW:
            measured += f" (rough: {groups} people)"
        claims.append({"claim": claim, "held": held, "measured": measured})
    return claims
