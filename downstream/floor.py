"""What recordings give away without a network: the floor that a model has to be above.

Small grey frames, spread over each whole clip, give two baselines: the frame in the middle, which
holds no motion, and how much neighbours differ, which holds little else. Poses give a third: the
joints in order. Of each the principal components of the training videos, and on them the classifier
of downstream/probe.py, with the videos and validation folds of the score beside which it stands.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from downstream.features import Extraction, cached_features, keep_computed
from downstream.metrics import paired_difference
from downstream.probe import Folds, fit_some
from downstream.results import Metric, Predictions, top1_of
from downstream.splits import hold_out, videos_digest
from downstream.tasks import Chosen
from pretrain.data.shards import Pack
from pretrain.spec import InputSpec, Joints, Stream

FRAMES = 18  # 17 differences
SIDE = 16  # pixels
COMPONENTS = 100
FITTED = 4000  # videos of which the principal components are taken
VERSION = 1  # raise it whenever a floor would be another
FLOOR = "floor_"  # before the names of its metrics
WORDS = {"frame": "one grey frame", "motion": "frame differences", "joints": "joints in order"}
SPANNED = 0.6  # of the clip that a model sees: below it, a larger stride is recommended


class GreyFrames(nn.Module):
    """The middle one of 18 grey frames of 16 x 16 pixels and the differences of neighbours.

    It learns nothing. Clips (B, 3, 18, 16, 16) become (B, 19 * 256): the frame; the roots of the
    absolute differences, in order; and the mean of the absolute differences over time.

    Attributes:
        kinds: baseline -> the forms of it, one of which is chosen on validation videos.
    """

    def __init__(self) -> None:
        super().__init__()
        self.input_spec = InputSpec(FRAMES, 0, SIDE, {"rgb": Stream((0.0,) * 3, (1.0,) * 3)})
        self.embed_dim, self.grid = (FRAMES + 1) * SIDE**2, (1, 1, 1)
        self.arguments: dict[str, Any] = {}
        ends = SIDE**2, FRAMES * SIDE**2
        self.kinds = {
            "frame": (slice(ends[0]),),
            "motion": (slice(*ends), slice(ends[1], None)),
        }

    def forward_features(self, clip: Tensor) -> Tensor:
        """(B, 1, D)."""
        return self(clip)[:, None]

    def forward(self, clip: Tensor) -> Tensor:
        """(B, D)."""
        grey = clip.mean(1)
        changes = (grey[:, 1:] - grey[:, :-1]).abs()
        parts = grey[:, FRAMES // 2], changes.sqrt(), changes.mean(1)
        return torch.cat([part.flatten(1) for part in parts], 1)


class OrderedJoints(nn.Module):
    """The normalised joints of 18 times, one after the other.

    It learns nothing. Clips (B, K, 18, P, J) become (B, 18 * K * P * J).

    Args:
        joints: as the backbone takes them.
    """

    def __init__(self, joints: Joints) -> None:
        super().__init__()
        self.input_spec = InputSpec(FRAMES, 0, SIDE, {"pose": joints})
        self.embed_dim, self.grid = math.prod(joints.shape(FRAMES, SIDE)), (1, 1, 1)
        self.arguments: dict[str, Any] = dataclasses.asdict(joints)
        self.kinds = {"joints": (slice(None),)}

    def forward_features(self, clip: Tensor) -> Tensor:
        """(B, 1, D)."""
        return self(clip)[:, None]

    def forward(self, clip: Tensor) -> Tensor:
        """(B, D)."""
        return clip.flatten(1)


def floor_scores(
    pack: Pack, given: Folds, how: Extraction, spec: InputSpec
) -> dict[str, np.ndarray]:
    """Class probabilities (M, C) of the tested videos by each baseline: a name in `WORDS`.

    A baseline is left out where not all videos have what it looks at, or none differs in it, as
    pictures do in motion.

    Args:
        pack: the data.
        given: their folds.
        how: workers and device; every clip is shown once, whole.
        spec: of the model that is scored: joints are a baseline where it takes them.

    Raises:
        ValueError: a clip cannot be decoded.
    """
    joints = spec.streams.get("pose")
    baselines: list[GreyFrames | OrderedJoints] = [GreyFrames()]
    if isinstance(joints, Joints):
        baselines.append(OrderedJoints(joints))
    once = dataclasses.replace(how, num_clips=1, num_crops=1, time_segments=0, precision="fp32")
    scores: dict[str, np.ndarray] = {}
    samples = np.concatenate([part.samples for part in given.parts])
    for encoder in baselines:
        try:
            pack.check_streams(samples, encoder.input_spec)
        except ValueError:  # clips are of poses alone, all or some
            continue
        identity = {
            "floor": VERSION, "arguments": encoder.arguments,
            "data": pack.index["fingerprint"], "folds": _digest(given),
        }  # fmt: skip
        shape = (len(encoder.kinds), len(given.tested), len(given.classes))
        found = keep_computed(identity, shape, partial(_fit_all, encoder, pack, given, once))
        known = zip(encoder.kinds, found, strict=True)
        scores |= {kind: of_kind for kind, of_kind in known if np.isfinite(of_kind).all()}
    return scores


def folds_of(chosen: Chosen, seed: int) -> Folds:
    """The videos of a fine-tuning as one fold: trained and validated on, and tested.

    Args:
        chosen: they; every one has a label.
        seed: of validation videos, drawn from the training ones if there are none.
    """
    learned = [chosen.train, *([chosen.val] if chosen.val else [])]
    parts = (*learned, chosen.test)
    subjects = [subject for part in parts for subject in part.subjects]
    labels = np.concatenate([part.numbers(chosen.classes) for part in parts])
    known, num = len(chosen.train), sum(map(len, learned))
    held = np.arange(num) >= known
    if chosen.val is None:
        held, _ = hold_out(chosen.train, seed, divide_people=True)
    fold = np.arange(num), held[None], np.arange(num, len(labels))
    sources = [source for part in parts for source in part.sources]
    return Folds(
        parts, [fold], chosen.classes, labels, subjects, sources, chosen.rule, chosen.notes
    )


def _fit_all(
    encoder: GreyFrames | OrderedJoints, pack: Pack, given: Folds, how: Extraction
) -> np.ndarray:
    """Probabilities (kinds, M, C) of the tested videos, fold by fold; NaN without differences."""
    parts = [
        part.average(cached_features(encoder, pack, part.samples, how, "floor"))
        for part in given.parts
    ]
    values = np.concatenate(parts)[:, 0]
    scores = np.full((len(encoder.kinds), len(values), len(given.classes)), np.nan, np.float32)
    for of_kind, forms in zip(scores, encoder.kinds.values(), strict=True):
        for train, validations, test in given.folds:
            best = -1.0
            for chosen in forms:
                if not np.ptp(values[train, chosen], axis=0).any():
                    continue
                reduce = _components(values[train, chosen])
                reduced = reduce(values[:, chosen])
                about = reduced[train], given.labels[train], validations, len(given.classes)
                probe = fit_some(*about, alike=True)
                if (found := max(probe.sweep.values(), default=0.0)) > best:
                    best, of_kind[test] = found, probe.probabilities(reduced[test])
    return scores[:, given.tested]


def _components(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What maps features (N, D) to the principal components of these (T, D)."""
    from sklearn.decomposition import PCA  # here, for it takes a second

    some = values[:: max(1, math.ceil(len(values) / FITTED))]
    few = min(COMPONENTS, *some.shape)
    return PCA(few, svd_solver="randomized", random_state=0).fit(some).transform


def _digest(given: Folds) -> str:
    """A hash of which videos are learned from, validated and tested, with which labels."""
    state = hashlib.sha256(videos_digest(*given.parts).encode())
    for array in itertools.chain(*given.folds):
        state.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    return state.hexdigest()


def against_floor(
    pack: Pack, given: Folds, how: Extraction, spec: InputSpec, said: Predictions, seed: int,
    random: np.ndarray | None = None, frozen: bool = False, pretrained: bool = False,
) -> tuple[dict[str, Metric], dict[str, Any], list[str]]:  # fmt: skip
    """The floor, and whether a model is above it and above its own random weights.

    Args:
        pack: the data.
        given: the folds; their tested videos are those of `said`.
        how: workers and device.
        spec: the clip of the model.
        said: what the model predicted.
        seed: of the bootstrap.
        random: (M, C) scores of the same architecture with random weights; None: not measured.
        frozen: the backbone was not trained on these labels; so it is where `random` is given.
        pretrained: it was trained on them, from weights of an earlier training.

    Returns:
        metrics, named `FLOOR` and a name in `WORDS`; a section for the card; and a sentence for
        each comparison, with the interval of the paired difference, and what to try next.
    """
    metrics: dict[str, Metric] = {}
    rivals: dict[str, np.ndarray] = {}
    notes, above = [], True
    try:
        floors = floor_scores(pack, given, how, spec)
    except ValueError as error:  # of a clip that training replaced: no score is lost for it
        floors = {}
        notes.append(f"the floor was not measured: {error}")
    for kind, scores in floors.items():
        predicted = scores.argmax(1)
        metrics[f"{FLOOR}{kind}"] = top1_of(said, predicted, seed)
        rivals[f"{WORDS[kind]}, without a network"] = predicted
    if random is not None:
        rivals["its own random weights"] = random.argmax(1)
    details: dict[str, Any] = {
        "frames": FRAMES, "size": SIDE, "components": COMPONENTS,
        "fit": "principal components, logistic regression, L2, on the videos that the model "
        "learned from and was validated on",
    }  # fmt: skip
    for name, predicted in rivals.items():
        hits = predicted == said.truth
        ours = (said.predicted == said.truth).astype(float)
        mean, low, high = paired_difference(ours - hits, said.subjects, seed)
        details[f"difference to {name}"] = [mean, low, high]
        where = "above" if low > 0 else "BELOW" if high < 0 else "NOT shown to be above"
        notes.append(
            f"{where} {name} ({100 * hits.mean():.1f} %): {100 * mean:+z.1f} points, 95 % interval "
            f"{100 * low:+z.1f} to {100 * high:+z.1f}" + ", which contains 0" * (low <= 0 <= high)
        )
        above &= low > 0
    if not above:
        frozen |= random is not None
        notes.append(f"to try next: {_advice(pack, given, spec, frozen, pretrained)}")
    return metrics, details, notes


def _advice(pack: Pack, given: Folds, spec: InputSpec, frozen: bool, pretrained: bool) -> str:
    """What may bring a model above the floor, trained as `against_floor` is told."""
    samples = np.concatenate([part.samples for part in given.parts])
    frames = float(np.median(pack.column("frames")[samples]))
    shown = spec.frames * spec.stride
    train = "pretrain" if frozen else "train"
    tries = []
    if spec.stride and shown < SPANNED * frames:
        stride = math.ceil(frames / spec.frames)
        tries.append(
            f"{train} with --stride {stride}: the model sees {shown} frames at a time and half of "
            f"the clips have {frames:.0f} or more, so much of the action is never seen at once"
        )
    longer = "on these clips, or for more --minutes or --steps" if frozen else "for more --steps"
    tries.append(f"{train} {longer}, in a new --out")
    if not frozen and not pretrained:
        tries.append("start from a pretrained backbone")
    return "; ".join(tries)
