"""Measure a frozen backbone with linear, nearest-neighbour and attentive probes.

    python recipes/linear_probe.py --backbone RUN/backbone --data SRC

The backbone is never trained. Every video is embedded once: its last tokens averaged over space and
over each quarter of time (the mean over everything forgets what came first), then over its views
and over the clips it was cut into. Simple classifiers learn from the embeddings of the training
split: a multinomial logistic regression fitted by L-BFGS (the linear probe of Radford et al. 2021,
https://arxiv.org/abs/2103.00020) of features whitened where that helps, a vote of the 20 nearest
neighbours, and one layer of attention over the last tokens. The linear probe of the mean over all
tokens, which most papers quote, is printed beside it. Hyperparameters are chosen on validation
folds of the training split, four for the linear probe, each of which shares no person with the
rest; the test split is scored once. The same protocol is then run on the same architecture with
random weights: what a probe reaches there was not learned in pretraining. So are two baselines
without any network, one grey frame and frame differences (downstream/floor.py): a backbone that is
not above all of these, by the interval of the paired difference, is told so.

Written to the results folder: results.json, CARD.md (everything needed to compare the number with
another one), confusion.png, predictions.csv, scores.csv (of every class, and of the first
validation fold from a probe that did not see it), linear.safetensors (the fitted probe) and, where
the splits share people, recordings or near-duplicates, leaks.csv.
"""

import dataclasses
from pathlib import Path

import pretrain.threads  # noqa: F401 (before torch)

import numpy as np
import torch
from torch import nn

from downstream.attentive import attentive_scores
from downstream.features import (
    Extraction,
    cached_features,
    choose_views,
    start_extraction,
    token_bytes,
)
from downstream.floor import against_floor
from downstream.fusion import Scored, scores_csv, write_scores
from downstream.metrics import mean_class_accuracy, topk_accuracy, topk_hits
from downstream.models import load_backbone, match_rate
from downstream.probe import (
    Folds,
    LinearProbe,
    choose_folds,
    fit_card,
    held_out_probabilities,
    probe_features,
    random_split,
    save_probe,
)
from downstream.report import RANDOM, publish
from downstream.results import (
    Data,
    Metric,
    Predictions,
    accuracies,
    build_results,
    claim_results,
    default_folder,
    describe_data,
    describe_model,
    describe_views,
    seen_in_training,
    try_results,
    versions,
)
from downstream.splits import videos_digest, write_leaks
from pretrain.backbones import fresh_like
from pretrain.data.cache import open_data, packing_side
from pretrain.data.shards import Pack, warn_of_clips
from pretrain.log import print_table
from pretrain.names import counted, for_screen
from pretrain.spec import InputSpec
from pretrain.weights import weights_hash
from recipes.options.linear_probe import Config, command

# How a view becomes one vector, for the card: by --time-segments.
MEANS = "mean of the last tokens over space and over each time segment"
OWN = "the backbone's own embedding"
TOKEN_LIMIT = 4 * 2**30  # bytes of tokens up to which the attentive probe runs unasked


# ------------------------------------------------------------------------------------ the pieces


def embed(encoder: nn.Module, pack: Pack, given: Folds, how: Extraction, name: str) -> np.ndarray:
    """Frozen features (N, S, D) of the videos of all parts, in their order."""
    parts = given.parts
    splits = ("training videos", "test videos") if len(parts) == 2 else ("all videos",)
    features = [
        part.average(cached_features(encoder, pack, part.samples, how, f"{name}, {split}"))
        for part, split in zip(parts, splits, strict=True)
    ]
    return np.concatenate(features)


def with_views(
    config: Config, how: Extraction, pack: Pack, samples: np.ndarray, spec: InputSpec
) -> tuple[Config, Extraction]:
    """Both with as many views as were asked for, or as cover the clips."""
    views = config.num_clips, config.num_crops
    clips, crops, words = choose_views(pack, samples, spec, *views)
    print(words)
    return (
        dataclasses.replace(config, num_clips=clips, num_crops=crops),
        dataclasses.replace(how, num_clips=clips, num_crops=crops),
    )


def attentive_wanted(
    config: Config, encoder: nn.Module, num_clips: int, how: Extraction
) -> str | None:
    """None if the attentive probe is to run, else the sentence why not."""
    if config.attentive == "off":
        return "switched off"
    if config.leave_one_out:
        return "it would be fitted once for every subject, so --leave-one-out does not offer it"
    needed = token_bytes(encoder, num_clips, how)
    if config.attentive == "auto" and needed > TOKEN_LIMIT:
        return f"its tokens take {needed / 2**30:.1f} GiB of disk: give --attentive on to run it"
    return None


def settings_of(config: Config, encoder: nn.Module, pack: Pack, how: Extraction) -> dict:
    """What decides the numbers; results of other settings are not overwritten."""
    return {
        "weights_sha256": weights_hash(encoder), "arguments": encoder.arguments,
        "data_fingerprint": pack.index["fingerprint"], **protocol_of(config),
        "classifier": config.classifier, "attentive": config.attentive,
        "precision": how.dtype_name, "seed": config.seed,
    }  # fmt: skip


def protocol_of(config: Config) -> dict:
    """What of a configuration has to be equal before two numbers may stand side by side."""
    names = (
        "train_split",
        "test_split",
        "leave_one_out",
        "num_clips",
        "num_crops",
        "time_segments",
    )
    return {name: getattr(config, name) for name in names}


def data_of(config: Config, pack: Pack, given: Folds) -> Data:
    """The data, for the results."""
    learned, tested = (config.train_split, given.parts[0]), (config.test_split, given.parts[-1])
    data = describe_data(config.data, pack, learned, tested, given.classes)
    if not config.leave_one_out:
        return data
    return dataclasses.replace(  # everybody is in both parts and never at the same time
        data, train_split="all subjects but one", test_split="each subject in turn",
        subjects_in_both=0, videos_in_both=0,
    )  # fmt: skip


def details_of(
    config: Config, given: Folds, probes: list[LinearProbe], random_probes: list[LinearProbe]
) -> dict[str, dict]:
    """How the classifiers were fitted, for the card."""
    svm = "linear SVM, one against the rest, L2"
    return {
        "linear": {
            "fit": (svm if config.classifier == "svm" else "L-BFGS, multinomial, L2")
            + ", features standardised by the training videos, and whitened if that is better on "
            "the validation videos of all parts",
            "validation": given.validation,
            **fit_card(probes),
        },
        "random_init": {"seed": config.seed, **fit_card(random_probes)},
        "knn": {"k": min(20, len(given.folds[0][0])), "similarity": "cosine", "temperature": 0.07},
    }


def notes_of(probes: list[LinearProbe]) -> list[str]:
    """What a reader of the result must see of how the linear probes were fitted."""
    notes = []
    if any(probe.at_edge for probe in probes):
        notes.append("a chosen C is at the end of the range that was tried: see `linear`")
    if not all(probe.converged for probe in probes):
        notes.append("WARNING: the fit did not converge at the chosen C: see `linear`")
    return notes


def random_metrics(
    scores: dict[str, np.ndarray], truth: np.ndarray, metrics: dict[str, Metric]
) -> dict[str, Metric]:
    """What random weights reach, of the scores (M, C) by name, in the measures that are shown."""
    values = {name: topk_accuracy(own, truth, 1) for name, own in scores.items()}
    values["mean_class_accuracy"] = mean_class_accuracy(truth, scores["top1"].argmax(1))
    if "top5" in metrics:
        values["top5"] = topk_accuracy(scores["top1"], truth, 5)
    alike = lambda name: dataclasses.replace(metrics[name], interval=None)
    return {
        f"{RANDOM}{name}": dataclasses.replace(alike(name), value=value)
        for name, value in values.items()
    }


def saved_scores(
    given: Folds, features: np.ndarray, probes: list[LinearProbe], scores: np.ndarray, svm: bool
) -> dict[str, Scored]:
    """The class probabilities to save, of the tested videos and of the first validation videos.

    Args:
        given: the folds.
        features: (N, S, D) of all videos.
        probes: fitted ones, one a fold.
        scores: (M, C) of the tested videos.
        svm: whether they are support vector machines.
    """

    def scored(chosen: np.ndarray, values: np.ndarray) -> Scored:
        sources, people = ([of[i] for i in chosen] for of in (given.sources, given.subjects))
        return Scored(sources, people, [given.classes[i] for i in given.labels[chosen]], values)

    saved = {"test": scored(given.tested, scores)}
    fitted, (validation, *_), _ = given.folds[0]
    if len(probes) == 1 and validation.any():
        long, labels = features[fitted].reshape(len(fitted), -1), given.labels[fitted]
        values = held_out_probabilities(probes[0], long, labels, validation, svm)
        saved["val"] = scored(fitted[validation], values)
    return saved


# --------------------------------------------------------------------------------------------- main


def main(config: Config) -> dict:
    """Run the protocol; returns what results.json holds."""
    if config.leave_one_out and config.attentive == "on":
        raise ValueError(
            "--leave-one-out does not offer the attentive probe: leave --attentive on out"
        )
    how = start_extraction(config.machine, 1, 1, config.batch_size, config.time_segments)

    # ---- backbone and data
    torch.manual_seed(config.seed)  # of a named model's fresh weights
    encoder = load_backbone(config.backbone, config.weights or "")
    assert isinstance(encoder, nn.Module)
    kind = "probe-leave-one-out" if config.leave_one_out else "probe"
    out = Path(config.out) if config.out else default_folder(kind, config.backbone, config.data)
    try_results(out)
    side = packing_side(encoder.input_spec.size)  # as recipes/videomae.py: one pack serves both
    pack = open_data(config.data, side, machine=config.machine, labels=True)
    match_rate(config.backbone, encoder, pack.rates())
    given = choose_folds(
        pack, config.train_split, config.test_split, config.leave_one_out, config.seed
    )
    samples = np.concatenate([p.samples for p in given.parts])
    config, how = with_views(config, how, pack, samples, encoder.input_spec)
    settings = settings_of(config, encoder, pack, how)
    lock = claim_results(out, settings)
    model, tested = describe_model(config.backbone, encoder), given.tested
    turns = f", {counted(len(given.folds), 'subject')} left out in turn" * config.leave_one_out
    print(
        f"{counted(given.num_train, 'training video')} (for validation {given.validation}), "
        f"{counted(len(tested), 'test video')}{turns}"
    )
    notes = list(given.notes)
    if config.leave_one_out and seen_in_training(model.provenance, config.data, pack.index):
        notes.append("the backbone saw clips of tested subjects in pretraining, without labels")
    for note in (told := list(notes)):
        print(for_screen(note), flush=True)
    warn_of_clips(pack, samples, encoder.input_spec)

    # ---- the backbone, then random weights
    svm = config.classifier == "svm"
    features = embed(encoder, pack, given, how, "backbone")
    scores, probes = probe_features(features, given, svm)
    random_features = embed(fresh_like(encoder, config.seed), pack, given, how, "random weights")
    random_scores, random_probes = probe_features(random_features, given, svm)
    notes += notes_of(probes)
    details = details_of(config, given, probes, random_probes)
    skipped = attentive_wanted(config, encoder, sum(len(p.samples) for p in given.parts), how)
    if skipped is None:
        scores["attentive_top1"], details["attentive"] = attentive_scores(
            encoder, pack, given, how, config.seed
        )
    else:
        details["attentive"] = {"skipped": skipped}
        print(f"no attentive probe: {skipped}", flush=True)
    if config.also_random_split:
        honest = topk_accuracy(scores["top1"], given.labels[tested], 1)
        note, details["random_split"] = random_split(features, given, svm, honest, config.seed)
        notes.append(note)

    # ---- results
    truth, linear = given.labels[tested], scores.pop("top1")
    said = Predictions(
        given.classes, truth, linear.argmax(1), [given.subjects[i] for i in tested], linear,
        [given.sources[i] for i in tested],
    )  # fmt: skip
    learned = np.bincount(given.labels[given.folds[0][0]], minlength=len(given.classes))
    others = {name: topk_hits(values, truth, 1) for name, values in scores.items()}
    metrics, details["interval"], more = accuracies(said, config.seed, learned, others)
    metrics |= random_metrics(random_scores, truth, metrics)
    floor, details["floor"], stands = against_floor(
        pack, given, how, encoder.input_spec, said, config.seed, random_scores["top1"]
    )
    metrics |= floor
    pooling = (
        f"{MEANS if config.time_segments else OWN}, then over views and over the clips of a video"
    )
    details["views"] = describe_views(encoder.input_spec, how, pooling) | {
        "time_segments": features.shape[1],
        "short_side": min(pack.record(0)["width"], pack.record(0)["height"]),
    }
    about = {"kind": "probe", "videos": videos_digest(*given.parts), "num_train": given.num_train}
    results = build_results(
        "linear_probe", data_of(config, pack, given), model,
        {**about, "num_test": len(tested), **protocol_of(config)}, settings, metrics, config.seed,
        versions(how.device, how.dtype_name), [*notes, *more, *stands], details, said,
    )  # fmt: skip
    parts = saved_scores(given, features, probes, linear, svm)
    saved = scores_csv(parts, given.classes, results)
    written = publish(out, results, said, told) | {"scores": write_scores(out, saved)}
    if len(given.parts) > 1:
        splits = dict(zip((config.train_split, config.test_split), given.parts, strict=True))
        written |= write_leaks(out, pack, splits)
    if len(probes) == 1:
        written["classifier"] = out / "linear.safetensors"
        save_probe(out / "linear.safetensors", probes[0], given.classes)
    print()
    print_table("done", written)
    lock.release(force=True)
    return results.as_dict()


if __name__ == "__main__":
    command(main)
