"""Measure a frozen backbone with linear, nearest-neighbour and attentive probes.

    python recipes/linear_probe.py --backbone RUN/backbone --data SRC

The backbone is never trained. Every video is embedded once: its last tokens averaged over space and over
each quarter of time (the mean over everything forgets what came first), then over its views and over the
clips it was cut into. Simple classifiers learn from the embeddings of the training split: a multinomial
logistic regression fitted by L-BFGS (the linear probe of Radford et al. 2021,
https://arxiv.org/abs/2103.00020) of features whitened where that helps, a vote of the 20 nearest
neighbours, and one layer of attention over the last tokens. The linear probe of the mean over all tokens,
which most papers quote, is printed beside it. Hyperparameters are chosen on validation folds of the
training split, four for the linear probe, each of which shares no person with the rest; the test split
is scored once. The same protocol is then run on the same architecture with random weights: what a probe
reaches there was not learned in pretraining.

Written to the results folder: results.json, CARD.md (everything needed to compare the number with
another one), confusion.png, predictions.csv, scores.csv (of every class, and of the first validation fold
from a probe that did not see it) and linear.safetensors (the fitted probe).
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from downstream.attentive import fit_attentive
from downstream.features import Extraction, cached_features, extract_tokens, token_bytes
from downstream.fusion import Scored, write_scores
from downstream.metrics import (
    confusion_matrix,
    mean_class_accuracy,
    topk_accuracy,
)
from downstream.models import load_backbone
from downstream.probe import LinearProbe, fit_linear, held_out_probabilities, knn_scores
from downstream.report import (
    RANDOM,
    confusion_figure,
    print_results,
    title,
    write_predictions,
    write_results,
)
from downstream.results import (
    Metric,
    Results,
    accuracies,
    claim_results,
    command,
    default_folder,
    describe_data,
    describe_model,
    seen_in_training,
    try_results,
    versions,
)
from downstream.splits import (
    Videos,
    choose_splits,
    choose_validation,
    leave_one_subject_out,
    videos_digest,
)
from pretrain.backbones import fresh_like
from pretrain.data.cache import open_data, packing_side
from pretrain.data.shards import Pack, warn_of_clips
from pretrain.files import share
from pretrain.flags import Count, Seed, Whole
from pretrain.folders import writing
from pretrain.log import cli
from pretrain.names import for_screen
from pretrain.processes import loader_workers, start_evaluation
from pretrain.settings import MACHINE, MachineFlags
from pretrain.weights import weights_hash

TOKEN_LIMIT = 4 * 2**30  # bytes of tokens up to which the attentive probe runs unasked


@dataclass(frozen=True)
class Config:
    """Configuration of the probe."""

    backbone: str
    """RUN/backbone, hf:OWNER/NAME of a VideoMAE, an official VideoMAE .pth, open_clip:MODEL/WEIGHTS, i3d_k400, or a name
    of python -m downstream.models."""
    data: str
    """A packed folder, a folder of videos, a list file, tars, or `synthetic`: with labels."""
    out: str | None = None
    """Results folder; by default probe-DATA beside the backbone."""
    weights: str | None = None
    """Weights of a named model: imagenet, kinetics or a file; of i3d_k400: its file."""
    train_split: str = "train"
    """The split that the classifiers are fitted on."""
    test_split: str = "test"
    """The split that is scored, once."""
    leave_one_out: bool = False
    """Leave one subject out: test each with probes fitted on all others and pool the predictions; splits are ignored."""
    num_clips: Count = 2
    """Views spread over the time of each clip."""
    num_crops: Count = 1
    """Views spread over the longer side of each."""
    time_segments: Whole = 4
    """Segments of a view's time that are averaged separately; 1: the mean token; 0: the backbone's own embedding."""
    classifier: Literal["logistic", "svm"] = "logistic"
    """Multinomial logistic regression, or a linear support vector machine, the classic on frame descriptors."""
    attentive: Literal["auto", "on", "off"] = "auto"
    """The attentive probe; auto: if the tokens take no more than 4 GiB of disk."""
    seed: Seed = 0
    """Of the random backbone, the validation folds and the bootstrap."""
    batch_size: Count = 64
    """Views in one forward pass; changes speed and memory only."""
    machine: MachineFlags = MACHINE


def unused(config: Config) -> dict[str, str]:
    """Values without effect under --leave-one-out, and why."""
    flags = ("train_split", "test_split")
    return dict.fromkeys(flags, "with --leave-one-out") if config.leave_one_out else {}


# ------------------------------------------------------------------------------------ the protocol

# Folds of the training videos on which the linear probe's regularisation strength is chosen. One where subjects are left out in turn:
# every subject has a fit of its own there, over which the chance in the choice evens out.
VALIDATIONS = 4

# Numbers of the training videos, which of them are for validation (masks, one a row), numbers of the test videos.
Fold = tuple[np.ndarray, np.ndarray, np.ndarray]


def probe_features(
    features: np.ndarray, labels: np.ndarray, folds: list[Fold], svm: bool
) -> tuple[dict, list[LinearProbe], np.ndarray]:
    """Fit on the training videos of every fold and score its test videos.

    The segments of a video (S, D) are one long feature for the linear probe and for kNN; `mean_token`
    numbers are of their mean.

    Args:
        features: (N, S, D) of all videos.
        labels: (N,) class numbers.
        folds: whose tested videos differ.
        svm: fit a linear support vector machine instead.

    Returns:
        the numbers over all tested videos, the linear probe of each fold, and the linear probes' class
        probabilities (N, C), zero for videos that no fold tests.
    """
    num_classes = int(labels.max()) + 1
    scores, mean_scores, votes, mean_votes = (
        np.zeros((len(labels), num_classes)) for _ in range(4)
    )
    long, means, probes = features.reshape(len(features), -1), features.mean(1), []
    for train, validations, test in folds:
        probes.append(fit_linear(long[train], labels[train], validations, svm))
        scores[test] = probes[-1].probabilities(long[test])
        mean_probe = probes[-1]
        if features.shape[1] > 1:  # else the mean is all there is
            mean_probe = fit_linear(means[train], labels[train], validations, svm)
        mean_scores[test] = mean_probe.probabilities(means[test])
        votes[test] = knn_scores(long[train], labels[train], long[test], num_classes)
        mean_votes[test] = knn_scores(means[train], labels[train], means[test], num_classes)
    tested = np.concatenate([test for _, _, test in folds])
    truth = labels[tested]
    numbers = {
        "top1": topk_accuracy(scores[tested], truth, 1),
        "top5": topk_accuracy(scores[tested], truth, 5),
        "mean_class_accuracy": mean_class_accuracy(truth, scores[tested].argmax(1)),
        "knn_top1": topk_accuracy(votes[tested], truth, 1),
        "mean_token_top1": topk_accuracy(mean_scores[tested], truth, 1),
        "mean_token_knn_top1": topk_accuracy(mean_votes[tested], truth, 1),
    }
    return numbers, probes, scores


def embed(
    encoder: nn.Module, pack: Pack, parts: tuple[Videos, ...], how: Extraction, name: str
) -> np.ndarray:
    """Frozen features (N, S, D) of the videos of all parts, in their order."""
    splits = ("training videos", "test videos") if len(parts) == 2 else ("all videos",)
    features = [
        part.average(cached_features(encoder, pack, part.samples, how, f"{name}, {split}"))
        for part, split in zip(parts, splits, strict=True)
    ]
    return np.concatenate(features)


def in_words(validations: np.ndarray) -> str:
    """How many videos the validation folds (P, N) have, such as "490" or "4 times 490"."""
    sizes = " or ".join(map(str, sorted(set(validations.sum(1).tolist()))))
    return sizes if len(validations) == 1 else f"{len(validations)} times {sizes}"


def fit_card(probes: list[LinearProbe]) -> dict:
    """The chosen hyperparameters of a linear probe; a list for those of several folds."""
    card: dict[str, Any] = {
        "C": [p.c for p in probes] if len(probes) > 1 else probes[0].c,
        "whitened": [p.whitened for p in probes] if len(probes) > 1 else probes[0].whitened,
        "C_at_edge": any(p.at_edge for p in probes),
        "converged": all(p.converged for p in probes),
    }
    if len(probes) == 1:
        sweeps = {"validation_accuracy": probes[0].sweep, "rejected_accuracy": probes[0].rejected}
        for name, sweep in sweeps.items():
            card[name] = {f"{c:g}": round(a, 4) for c, a in sweep.items()}
    return card


def attend(
    encoder: nn.Module,
    pack: Pack,
    parts: tuple[Videos, ...],
    labels: np.ndarray,
    validation: np.ndarray,
    how: Extraction,
    seed: int,
) -> tuple[float, dict]:
    """The attentive probe's top-1 and what was chosen for it; `labels` (N,) as in `probe_features`."""
    train, test = (
        extract_tokens(encoder, pack, part.samples, how, f"tokens, {split}")
        for part, split in zip(parts, ("training videos", "test videos"), strict=True)
    )
    owner = parts[0].owner
    probe = fit_attentive(train, labels[owner], validation[owner], seed, how.device)
    scores = parts[1].average(probe.probabilities(test))
    chosen = {
        "lr": probe.lr,
        "weight_decay": probe.weight_decay,
        "validation_accuracy": probe.sweep,
    }
    return topk_accuracy(scores, labels[len(parts[0]) :], 1), chosen


def attentive_wanted(
    config: Config, encoder: nn.Module, num_clips: int, how: Extraction
) -> str | None:
    """None if the attentive probe is to run, else the sentence why not."""
    if config.attentive == "off":
        return "switched off"
    if config.leave_one_out:
        return "it would be fitted once for every subject, so it is not offered with --leave-one-out: give --attentive off"
    needed = token_bytes(encoder, num_clips, how)
    if config.attentive == "auto" and needed > TOKEN_LIMIT:
        return f"its tokens take {needed / 2**30:.1f} GiB of disk: give --attentive on to run it"
    return None


# --------------------------------------------------------------------------------------------- main


def main(config: Config) -> dict:
    """Run the protocol; returns what results.json holds."""
    if config.leave_one_out and config.attentive == "on":
        raise ValueError(
            "--leave-one-out does not offer the attentive probe: leave --attentive on out"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("the probe runs in one process: start it with python, not with a launcher")
    device = start_evaluation(config.machine)
    how = Extraction(
        config.num_clips,
        config.num_crops,
        config.time_segments,
        config.batch_size,
        loader_workers(config.machine, 1),
        device,
        config.machine.precision,
    )

    # ------------------------------------------------------------------------- backbone and data
    torch.manual_seed(config.seed)  # of a named model's fresh weights
    encoder = load_backbone(config.backbone, config.weights or "")
    assert isinstance(encoder, nn.Module)
    kind = "probe-leave-one-out" if config.leave_one_out else "probe"
    out = Path(config.out) if config.out else default_folder(kind, config.backbone, config.data)
    try_results(out)
    # As recipes/videomae.py packs raw data, so that one pack serves both; a test crop is the whole
    # short side, scaled to `size`.
    pack = open_data(config.data, packing_side(encoder.input_spec.size))
    if config.leave_one_out:
        everybody, held, notes = leave_one_subject_out(pack)
        parts: tuple[Videos, ...] = (everybody,)
    else:
        train, test, notes = choose_splits(pack, config.train_split, config.test_split, config.seed)
        parts = (train, test)
        held = [np.arange(len(train) + len(test)) >= len(train)]
    settings = {
        "weights_sha256": weights_hash(encoder),
        "arguments": encoder.arguments,
        "data_fingerprint": pack.index["fingerprint"],
        "train_split": config.train_split,
        "test_split": config.test_split,
        "leave_one_out": config.leave_one_out,
        "num_clips": config.num_clips,
        "num_crops": config.num_crops,
        "time_segments": config.time_segments,
        "classifier": config.classifier,
        "attentive": config.attentive,
        "precision": how.dtype_name,
        "seed": config.seed,
    }
    lock = claim_results(out, settings)
    names = [label for part in parts for label in part.known_labels]
    subjects = [subject for part in parts for subject in part.subjects]
    sources = [source for part in parts for source in part.sources]
    classes = sorted(set(names))
    labels = np.concatenate([part.numbers(classes) for part in parts])
    folds = []
    for mask in held:
        train_numbers = np.flatnonzero(~mask)
        choices = [
            choose_validation(
                [names[i] for i in train_numbers],
                [subjects[i] for i in train_numbers],
                config.seed * VALIDATIONS + i,
            )
            for i in range(1 if config.leave_one_out else VALIDATIONS)
        ]
        rule = choices[0][1]
        validations = np.stack([held_out for held_out, _ in choices])
        folds.append((train_numbers, validations, np.flatnonzero(mask)))
    tested = np.concatenate([test for _, _, test in folds])
    num_train = len(folds[0][0]) if len(folds) == 1 else len(names)
    print(
        f"{num_train} training videos ({in_words(folds[0][1])} for validation: {rule}), {len(tested)} test "
        f"videos" + (f", {len(folds)} subjects left out in turn" if len(folds) > 1 else "")
    )
    model = describe_model(config.backbone, encoder)
    if config.leave_one_out and seen_in_training(model.provenance, config.data, pack.index):
        notes.append("the backbone saw clips of tested subjects in pretraining, without labels")
    told = list(notes)
    for note in told:
        print(for_screen(note), flush=True)
    warn_of_clips(pack, np.concatenate([part.samples for part in parts]), encoder.input_spec)

    # ------------------------------------------------------------- the backbone, then random weights
    features = embed(encoder, pack, parts, how, "backbone")
    numbers, probes, scores = probe_features(features, labels, folds, config.classifier == "svm")
    random_encoder = fresh_like(encoder, config.seed)
    random_features = embed(random_encoder, pack, parts, how, "random weights")
    random_numbers, random_probes, _ = probe_features(
        random_features, labels, folds, config.classifier == "svm"
    )
    if any(probe.at_edge for probe in probes):
        notes.append("a chosen C is at the end of the range that was tried: see `linear`")
    if not all(probe.converged for probe in probes):
        notes.append("WARNING: the fit did not converge at the chosen C: see `linear`")
    attentive_top1, attentive_card = None, None
    num_clips = sum(len(part.samples) for part in parts)
    skipped = attentive_wanted(config, encoder, num_clips, how)
    if skipped is None:
        attentive_top1, attentive_card = attend(
            encoder, pack, parts, labels, folds[0][1][0], how, config.seed
        )
    else:
        print(f"no attentive probe: {skipped}", flush=True)

    # ------------------------------------------------------------------------------------- results
    truth, scores = labels[tested], scores[tested]
    predicted = scores.argmax(1)
    metrics, interval, more = accuracies(
        truth, predicted, scores, classes, [subjects[i] for i in tested], config.seed
    )
    fraction = lambda value: Metric(value, len(tested), chance=1 / len(classes))
    metrics |= {
        name: fraction(v) for name, v in numbers.items() if not name.startswith("top")
    } | metrics
    if attentive_top1 is not None:
        metrics["attentive_top1"] = fraction(attentive_top1)
    most_frequent = np.bincount(labels[folds[0][0]]).argmax()
    metrics["majority"] = Metric(float((truth == most_frequent).mean()), len(tested))
    metrics |= {
        f"{RANDOM}{name}": fraction(v) for name, v in random_numbers.items() if name in metrics
    }
    about = (config.test_split, parts[-1])
    data = describe_data(config.data, pack, (config.train_split, parts[0]), about, classes)
    if config.leave_one_out:  # everybody is in both parts and never at the same time
        data = dataclasses.replace(
            data, train_split="all subjects but one", test_split="each subject in turn", subjects_in_both=0,
            videos_in_both=0,
        )  # fmt: skip
    spec = encoder.input_spec
    protocol = {
        "kind": "probe",
        "videos": videos_digest(*parts),
        "num_train": num_train,
        "num_test": len(tested),
    }
    protocol |= {
        name: settings[name]
        for name in (
            "train_split",
            "test_split",
            "leave_one_out",
            "num_clips",
            "num_crops",
            "time_segments",
        )
    }
    details = {
        "views": {
            "frames": spec.frames, "stride": spec.stride, "size": spec.size, "num_clips": config.num_clips,
            "num_crops": config.num_crops, "time_segments": features.shape[1],
            "short_side": min(pack.record(0)["width"], pack.record(0)["height"]),
            "pooling": (
                "mean of the last tokens over space and over each time segment" if config.time_segments else
                "the backbone's own embedding"
            ) + ", then over views and over the clips of a video",
        },
        "linear": {
            "fit": ("linear SVM, one against the rest, L2" if config.classifier == "svm" else "L-BFGS, multinomial, L2")
            + ", features standardised by the training videos, and whitened if that "
            "is better on the validation videos of all parts",
            "validation": f"{in_words(folds[0][1])} videos, {rule}",
            **fit_card(probes),
        },
        "random_init": {"seed": config.seed, **fit_card(random_probes)},
        "knn": {"k": min(20, len(folds[0][0])), "similarity": "cosine", "temperature": 0.07},
        "attentive": attentive_card or {"skipped": skipped},
        "interval": interval,
    }  # fmt: skip
    results = Results(
        "linear_probe", data, model, protocol, settings, metrics, config.seed, command(),
        versions(device, how.dtype_name), [*notes, *more], details,
    )  # fmt: skip
    write_results(out, results)
    counts = confusion_matrix(truth, predicted, len(classes))
    write_predictions(
        out / "predictions.csv",
        [sources[i] for i in tested],
        [names[i] for i in tested],
        scores,
        classes,
    )
    listed = lambda values, chosen: [values[i] for i in chosen]
    scored = lambda chosen, values: Scored(
        listed(sources, chosen), listed(subjects, chosen), listed(names, chosen), values
    )
    saved = {"test": scored(tested, scores)}
    fitted, (validation, *_), _ = folds[0]
    if len(probes) == 1 and validation.any():
        long = features[fitted].reshape(len(fitted), -1)
        svm = config.classifier == "svm"
        values = held_out_probabilities(probes[0], long, labels[fitted], validation, svm)
        saved["val"] = scored(fitted[validation], values)
    write_scores(out, saved, classes)
    if len(probes) == 1:
        (probe,) = probes
        tensors = {"mean": probe.mean, "std": probe.std, "weight": probe.weight, "bias": probe.bias}
        tensors = {
            name: np.ascontiguousarray(value, dtype=np.float32) for name, value in tensors.items()
        }
        with writing(out / "linear.safetensors"):
            save_file(tensors, out / "linear.safetensors", {"classes": json.dumps(classes)})
            share(out / "linear.safetensors")
    picture = confusion_figure(out / "confusion.png", counts, classes, title(results))
    print_results(results, told)
    folder = for_screen(out)
    print(f"\nresults  {folder}/results.json\nprotocol {folder}/CARD.md\nfigure   {picture}")
    print(f"predictions  {folder}/predictions.csv", flush=True)
    lock.release(force=True)
    return results.as_dict()


if __name__ == "__main__":
    cli(main, Config, unused)
