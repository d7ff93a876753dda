"""Fit a classifier on what is labelled so far, and say how good it is and what to label next.

    python recipes/fit.py --data clips.csv
    python recipes/fit.py --backbone RUN/backbone --data clips.csv --out FIT
    python recipes/predict.py --backbone FIT/backbone --video folder/

The backbone is frozen, as in recipes/linear_probe.py, and every video is embedded once, whatever is
labelled later. A list may label only some of its clips: the others are candidates to label next.
Accuracy is cross-validated in folds that never divide a person or, where people are not known, a
source file; what is kept, and what recipes/predict.py takes, is a classifier of all labels.

Whether it reads the action or the scene is measured by three controls, each through the same
backbone and the same folds: one frame repeated, frames in another order, and the static background
alone. Beside them stands the floor of downstream/floor.py. A learning curve over the number of
labels says whether more pay.

Written to the results folder: report.html (all of it, with clips that play; one file that loads
nothing), results.json, CARD.md, backbone/ (the classifier), next.csv (clips to label next),
predictions.csv, scores.csv, confusion.png and labels.png. The same command again, with more labels,
replaces them.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pretrain.threads  # noqa: F401 (before torch)

import numpy as np
import torch
from torch import nn

from downstream.classifier import CHECKED, Classifier
from downstream.controls import CONTROL, CONTROLS, Verdict, controls_of, judge
from downstream.crossval import (
    Curve,
    Grouped,
    cross_validate,
    fit_all,
    grouped_folds,
    learning_curve,
    when_to_stop,
)
from downstream.features import Extraction, cached_features, choose_views, start_extraction
from downstream.fit_report import labels_figure, next_clips, write_next, write_report
from downstream.floor import against_floor
from downstream.fusion import Scored, scores_csv, write_scores
from downstream.models import load_backbone, match_rate
from downstream.probe import Folds, LinearProbe, fit_card, random_split
from downstream.proposals import MOST, propose
from downstream.report import publish
from downstream.results import (
    Data,
    Metric,
    Predictions,
    accuracies,
    build_results,
    default_folder,
    describe_data,
    describe_model,
    describe_views,
    read_results,
    seen_in_training,
    top1_of,
    versions,
)
from downstream.splits import Videos, labelled_videos, subset, videos_digest
from pretrain.backbones import export_backbone, provenance_of, read_backbone_config
from pretrain.data.cache import open_data, packing_side
from pretrain.data.shards import Pack, warn_of_clips
from pretrain.folders import claim, holds_nothing, refuse_others, try_folder
from pretrain.log import print_notes, print_table
from pretrain.names import counted, for_screen, for_shell
from pretrain.spec import Backbone, InputSpec
from pretrain.weights import weights_hash
from recipes.options.fit import Config, command

FIRST = ("backbone", "next.csv")  # what is written before the results
# How a clip becomes one vector, for the card.
POOLING = "mean of the last tokens over space and each time segment, then over views and clips"


# ------------------------------------------------------------------------------------ the pieces


def refuse_other_fits(out: Path) -> None:
    """Raise ValueError if a folder holds anything but an earlier fit, which is replaced.

    One that was stopped has no results as yet, but the classifier that it exported first.
    """
    if holds_nothing(out):
        return
    stopped = not (out / "results.json").is_file()
    if stopped:
        refuse_others(out, FIRST)
    try:
        if stopped:
            recipe = read_backbone_config(out / "backbone")["provenance"].get("recipe")
        else:
            recipe = read_results(out).recipe
    except ValueError as error:
        raise ValueError(
            f"{out} holds other files: give another folder with --out, or remove it ({error})"
        ) from error
    if recipe != "fit":
        raise ValueError(f"{out} holds other files, of {recipe}: give another folder with --out")


def candidates_of(pack: Pack, split: str, seed: int) -> np.ndarray:
    """Samples without a label, at most `MOST`, drawn at random of more."""
    ids = pack.split_if_any(split)
    unlabelled = ids[pack.column("label")[ids] < 0]
    timed = [bool(pack.record(i)["extra"].get("segments")) for i in unlabelled]
    if any(timed):
        print(
            f"note: {counted(sum(timed), 'clip')} with several labels over time left out: they are "
            "for recipes of frames (finetune --per-frame)"
        )
    unlabelled = unlabelled[~np.array(timed, dtype=bool)]
    if len(unlabelled) <= MOST:
        return unlabelled
    print(f"{MOST:,} of {len(unlabelled):,} clips without a label are looked at, drawn at random")
    return np.sort(np.random.default_rng(seed).choice(unlabelled, MOST, replace=False))


@dataclass(frozen=True)
class Shown:
    """All clips as the backbone sees them.

    Attributes:
        pack: where they are.
        encoder: the backbone.
        spec: the clip that it takes.
        videos: that have a label.
        candidates: (K,) samples that have none.
        how: views, device and precision.
    """

    pack: Pack
    encoder: nn.Module
    spec: InputSpec
    videos: Videos
    candidates: np.ndarray
    how: Extraction

    def features(self) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, S * D) of the videos, and (K, S * D) of the candidates."""
        # Together and in one order, so that they are known again when more are labelled.
        every = np.union1d(self.videos.samples, self.candidates)
        values = cached_features(self.encoder, self.pack, every, self.how, "clips")
        flat = values.reshape(len(every), -1)
        labelled = flat[np.searchsorted(every, self.videos.samples)]
        return self.videos.average(labelled), flat[np.searchsorted(every, self.candidates)]

    def control(self, name: str) -> np.ndarray:
        """Features of the videos as a control shows them; "": as they are."""
        how = dataclasses.replace(self.how, control=name)
        samples = self.videos.samples
        values = cached_features(self.encoder, self.pack, samples, how, CONTROLS[name])
        return self.videos.average(values.reshape(len(samples), -1))


def measure_controls(
    shown: Shown, grouped: Grouped, said: Predictions, seed: int
) -> tuple[dict[str, Metric], Verdict]:
    """What the controls reach, and what that says."""
    hits, metrics = {}, {}
    for name in controls_of(shown.spec):
        predicted = cross_validate(shown.control(name), grouped.folds)[0].argmax(1)
        hits[name] = (predicted == said.truth).astype(float)
        metrics[f"{CONTROL}{name}"] = top1_of(said, predicted, seed)
    ours = (said.predicted == said.truth).astype(float)
    return metrics, judge(ours, hits, said.subjects, 1 / len(said.classes), seed)


def export(
    folder: Path, config: Config, shown: Shown, classes: list[str], probe: LinearProbe,
    top1: Metric,
) -> None:  # fmt: skip
    """Write the backbone with the probe as its head, for recipes/predict.py.

    Args:
        folder: where to.
        config: what was asked for.
        shown: the clips that were learned from.
        classes: names of the classes.
        probe: of all of their labels.
        top1: cross-validated.
    """
    model = Classifier(shown.encoder, classes, time_segments=config.time_segments)
    weight, bias = probe.plain
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weight))
        model.head.bias.copy_(torch.from_numpy(bias))
    about = {
        "recipe": "fit", "model": config.backbone, "backbone": provenance_of(config.backbone),
        "data": config.data, "data_fingerprint": shown.pack.index["fingerprint"],
        "fps": shown.pack.rate(), "split": config.split, "labels": len(shown.videos),
        "views": [shown.how.num_clips, shown.how.num_crops],
        **dict(zip(CHECKED, (top1.value, top1.n), strict=True)),
    }  # fmt: skip
    export_backbone(model.eval(), folder, about)


def drawn_split(
    config: Config, features: np.ndarray, given: Folds, honest: float
) -> tuple[list[str], dict[str, dict]]:
    """What a random split of the same videos would show, as a note and for the card, if asked."""
    if not config.also_random_split:
        return [], {}
    note, drawn = random_split(features[:, None], given, False, honest, config.seed)
    return [note], {"random_split": drawn}


def details_of(verdict: Verdict, curve: Curve) -> dict[str, dict]:
    """Controls and learning curve, for the card."""
    low, high = zip(*curve.intervals, strict=True)
    return {
        "controls": {
            "verdict": verdict.word,
            "differences": {CONTROLS[n]: list(d) for n, d in verdict.differences.items()},
        },
        "learning_curve": {
            "labels": curve.sizes, "top1": curve.accuracies, "low": list(low), "high": list(high),
            "last_doubling": list(curve.gain),
        },
    }  # fmt: skip


def protocol_of(config: Config, grouped: Grouped, how: Extraction) -> dict:
    """What has to be equal before two numbers may stand side by side."""
    (videos,) = grouped.folds.parts
    return {
        "kind": "fit", "videos": videos_digest(videos), "split": config.split,
        "rule": grouped.rule, "grouped_by": grouped.named, "num_labelled": len(videos),
        "num_test": len(grouped.tested), "num_clips": how.num_clips, "num_crops": how.num_crops,
        "time_segments": config.time_segments,
    }  # fmt: skip


def data_of(config: Config, pack: Pack, grouped: Grouped, tested: Videos) -> Data:
    """The data, for the results: everything is learned from and tested, never at once."""
    (videos,) = grouped.folds.parts
    parts = (config.split, videos), (config.split, tested)
    data = describe_data(config.data, pack, *parts, grouped.folds.classes)
    return dataclasses.replace(
        data, train_split=f"{config.split}, but the fold that is tested",
        test_split=grouped.rule, subjects_in_both=0, videos_in_both=0,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- main


def main(config: Config) -> dict:
    """Fit, cross-validate and report; returns what results.json holds."""
    how = start_extraction(config.machine, 1, 1, config.batch_size, config.time_segments)

    # ---- backbone and data
    torch.manual_seed(config.seed)  # of a named model's fresh weights
    encoder = load_backbone(config.backbone, config.weights or "")
    assert isinstance(encoder, nn.Module) and isinstance(encoder, Backbone)
    out = Path(config.out or default_folder("fit", config.backbone, config.data))
    try_folder(out)
    refuse_other_fits(out)
    pack = open_data(
        config.data, packing_side(encoder.input_spec.size), machine=config.machine, labels=True
    )
    match_rate(config.backbone, encoder, pack.rates())
    spec = encoder.input_spec
    videos, _ = labelled_videos(pack, config.split)
    grouped = grouped_folds(pack.name, videos, config.seed)
    given = grouped.folds
    candidates = candidates_of(pack, config.split, config.seed)
    views = config.num_clips, config.num_crops
    clips, crops, words = choose_views(pack, videos.samples, spec, *views)
    how = dataclasses.replace(how, num_clips=clips, num_crops=crops)
    lock = claim(out)
    print(
        f"{counted(len(videos), 'labelled video')} of {counted(len(given.classes), 'class')}, "
        f"{counted(len(candidates), 'clip')} without a label\n"
        f"cross-validated: {grouped.rule}\n{words}"
    )
    model, notes = describe_model(config.backbone, encoder), given.notes
    if seen_in_training(model.provenance, config.data, pack.index):
        notes.append("the backbone saw these clips in pretraining, without labels")
    print_notes(notes)
    warn_of_clips(pack, videos.samples, spec)

    # ---- accuracy, controls, learning curve
    shown = Shown(pack, encoder, spec, videos, candidates, how)
    features, unlabelled = shown.features()
    scores, probes = cross_validate(features, given)
    truth, tested = given.labels[given.tested], given.tested
    said = Predictions(
        given.classes, truth, scores.argmax(1), grouped.tested, scores,
        [given.sources[i] for i in tested], named=grouped.named,
    )  # fmt: skip
    metrics, interval, more = accuracies(said, config.seed, np.bincount(given.labels))
    controls, verdict = measure_controls(shown, grouped, said, config.seed)
    floor, about_floor, stands = against_floor(
        pack, given, how, spec, said, config.seed, frozen=True
    )
    metrics |= controls | floor
    stands += more
    curve = learning_curve(features, grouped, config.seed)
    drawn, about_drawn = drawn_split(config, features, given, metrics["top1"].value)

    # ---- the classifier of all labels, and what to label next
    probe = fit_all(features, grouped, config.seed)
    export(out / "backbone", config, shown, given.classes, probe, metrics["top1"])
    chosen = propose(probe, unlabelled, features, config.propose, config.seed)
    guesses = probe.probabilities(unlabelled[chosen]), given.classes
    proposed = next_clips(pack, candidates[chosen], *guesses, Path(config.data), out)
    write_next(out / "next.csv", proposed)

    # ---- results
    part = subset(videos, np.isin(np.arange(len(videos)), tested))
    protocol = protocol_of(config, grouped, how)
    settings = protocol | {
        "weights_sha256": weights_hash(encoder), "data_fingerprint": pack.index["fingerprint"],
        "arguments": encoder.arguments, "seed": config.seed, "precision": how.dtype_name,
    }  # fmt: skip
    details = {
        "interval": interval,
        "linear": {"validation": given.validation, **fit_card(probes)},
        **details_of(verdict, curve), **about_drawn,
        "floor": about_floor, "views": describe_views(spec, how, POOLING),
        "proposed": {"clips": len(proposed), "of": len(candidates)},
    }  # fmt: skip
    results = build_results(
        "fit", data_of(config, pack, grouped, part), model, protocol, settings, metrics,
        config.seed, versions(how.device, how.dtype_name), [*notes, *stands, *drawn], details, said,
    )  # fmt: skip
    people, labels = [given.subjects[i] for i in tested], [given.classes[i] for i in truth]
    about = Scored([given.sources[i] for i in tested], people, labels, scores)
    saved = scores_csv({"test": about}, given.classes, results)
    written = publish(out, results, said, notes) | {"scores": write_scores(out, saved)}
    print(f"\nthis classifier: {for_screen(verdict.sentence)}\n{when_to_stop(curve)}")
    labels_figure(out / "labels.png", curve, 1 / len(given.classes), config.data)
    written |= {"classifier": out / "backbone"}
    written |= {"to label next": out / "next.csv"} if proposed else {}
    predict = f"muybridge predict --backbone {for_shell(out / 'backbone')}"
    first = videos.samples[np.unique(videos.owner, return_index=True)[1]][tested].tolist()
    written["report"] = write_report(
        out, results, said, verdict, curve, proposed, pack, first,
        [("Label new files:", f"{predict} --video FILE_OR_FOLDER"),
         ("With more labels, the same command again:", results.command)],
    )  # fmt: skip
    written["next"] = f"{predict} --video FILE_OR_FOLDER"
    print()
    print_table("done", written)
    lock.release(force=True)
    return results.as_dict()


if __name__ == "__main__":
    command(main)
