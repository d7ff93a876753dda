"""Find events in long video: what happens from when to when, also at the same time.

    python recipes/detect.py --backbone RUN/backbone --video day1.mp4 day2.mkv
    python recipes/detect.py --backbone RUN/backbone --video videos.csv
    python recipes/detect.py --backbone RUN/backbone --video folder/ --truth activity_net.json
    python recipes/detect.py --backbone runs/clip-tiny/backbone --video day1.mp4 --text "drinks"

RUN is a run of recipes/finetune.py: a classifier of frames (--per-frame), whose windows slide by
half their length, or one of clips, whose windows slide by a quarter. With --text it is a video-text
pair of recipes/clip.py or open_clip, and nothing is trained: each sentence competes with the others
and with those of --background (with a sigmoid loss each is scored by itself).

A raw video is decoded once, forward, in a process that may be killed, and nothing of it is kept:
memory does not grow with its length. Every frame gets a score for every class; scores are smoothed,
and a class's stretch of frames at or above its threshold is an event. Each class has a threshold of
its own, so events may overlap. Where a list has a column `segments`, or --truth names a file
(ActivityNet's JSON, or a table with video, start, end, label), the events of the tested split are
measured; thresholds are chosen on the videos of the split val, never on tested ones.

Written: events.csv, events.json (ActivityNet's layout), thresholds.json, refused.json and
timeline.png; with truth also results.json and CARD.md.
"""

import hashlib
import json
from pathlib import Path

import pretrain.threads  # noqa: F401 (before torch)

import numpy as np
import torch
from torch import Tensor, nn

from downstream.classifier import at_chance
from downstream.detect import (
    Detection,
    How,
    Scorer,
    Video,
    classifier_scorer,
    list_videos,
    nothing_found,
    refuse_uniform,
    with_streams,
)
from downstream.events import (
    OVERLAPS,
    KeptScores,
    VideoTruth,
    choose_thresholds,
    detection_intervals,
    detection_scores,
    find_truth,
    frame_precision,
    match_labels,
    read_thresholds,
    read_truth,
    truth_of_segments,
)
from downstream.metrics import RESAMPLES, Event, FoundEvent
from downstream.models import choose_sampling, load_classifier, load_video_text, trained_rate
from downstream.report import events_figure, print_results, write_csv, write_results
from downstream.results import (
    FEW,
    Data,
    Metric,
    Results,
    build_results,
    default_folder,
    describe_model,
    versions,
)
from downstream.zero_shot import embed_texts
from pretrain.data.methods import take_pose_weights
from pretrain.device import autocast_dtype
from pretrain.files import is_file
from pretrain.folders import claim, refuse_others, try_folder
from pretrain.log import print_notes, print_table, write_json
from pretrain.names import counted, first_of, for_csv, for_screen, nothing_usable
from pretrain.processes import start_evaluation
from pretrain.prompts import load_classes, refuse_same_words, same_words
from pretrain.spec import InputSpec
from recipes.options.detect import Config, command

THRESHOLD = 0.5  # where nothing else is known


# -------------------------------------------------------------------------------------- the model


def load_scorer(config: Config, where: torch.device) -> Scorer:
    """The model of a configuration, on its device.

    Raises:
        ValueError: there is none of the kind.
    """
    if config.text:
        pair = load_video_text(config.backbone)
        backbone: nn.Module = pair.video
    else:
        names = list(load_classes(config.classes)) if config.classes else None
        classifier = load_classifier(config.backbone, config.weights or "", names)
        backbone = classifier.backbone
    choose_sampling(backbone, None, config.stride)
    rate = None if config.stride else trained_rate(config.backbone)
    spec = backbone.input_spec
    assert isinstance(spec, InputSpec)
    if not config.text:
        return classifier_scorer(classifier, where, rate)
    refuse_uniform(spec)
    sentences = sentences_of(config)
    vectors, num_cut = embed_texts(pair, list(sentences.values()), where, config.machine.precision)
    if num_cut:
        print(f"note: cut to the text tower's context: {counted(num_cut, 'sentence')}")
    texts = torch.from_numpy(vectors).to(where)

    def compare(clips: Tensor) -> Tensor:
        similar = pair.scale() * (pair.encode_video(clips).float() @ texts.T)
        return similar.softmax(-1) if pair.bias is None else (similar + pair.bias).sigmoid()

    return Scorer(pair, spec, list(sentences), 4, compare, rate)


def sentences_of(config: Config) -> dict[str, str]:
    """Label -> sentence of what is looked for, and then of the background.

    Raises:
        ValueError: two are the same, or there is only one.
    """
    if len(config.text) == 1 and is_file(config.text[0]):
        found = load_classes(config.text[0])
    else:
        found = {text: text for text in config.text}
    all_of_them = [*found, *config.background]
    if len({same_words(name) for name in all_of_them}) < len(all_of_them) or len(found) < len(
        config.text
    ):
        raise ValueError("two of --text and --background are the same sentence")
    refuse_same_words(found, "--text")
    sentences = found | {text: text for text in config.background}
    if len(sentences) < 2:
        raise ValueError(
            "a sentence needs another one to compete with: give a second, or what else there is "
            "as --background"
        )
    return sentences


# ------------------------------------------------------------------------------------- the events


def truth_of(config: Config, videos: list[Video]) -> dict[str, tuple[str, VideoTruth]]:
    """Video -> its name in the file of truth, and what is true, where anything is known.

    Raises:
        ValueError: the truth cannot be read, or is that of other videos.
    """
    if config.truth is None:
        return {
            v.name: (v.name, VideoTruth(truth_of_segments(v.segments, v.name), v.split))
            for v in videos
            if v.segments
        }
    truth = read_truth(Path(config.truth))
    names = {v.name: find_truth(truth, v.name) for v in videos}
    found = {video: (name, truth[name]) for video, name in names.items() if name is not None}
    if not found:
        raise ValueError(
            f"--truth {config.truth} has no video of those given: it has "
            f"{for_screen(min(truth), 60)} and the like, and they are called "
            f"{for_screen(videos[0].name, 60)} and the like"
        )
    return found


def choose_parts(
    config: Config, videos: list[Video], truth: dict[str, tuple[str, VideoTruth]], notes: list[str]
) -> tuple[list[Video], list[Video]]:
    """Validation videos, on which thresholds are chosen, and those in which events are looked for.

    Raises:
        ValueError: there is no such split.
    """
    splits = {
        v.name: (truth[v.name][1].split if v.name in truth else None) or v.split for v in videos
    }
    known = {split for split in splits.values() if split}
    if not known:
        return [], videos
    tested = [v for v in videos if splits[v.name] == config.test_split]
    if not tested:
        raise ValueError(
            f"no video is of split {config.test_split!r}; there are {', '.join(sorted(known))}: "
            "name one with --test-split"
        )
    fixed = config.threshold is not None or config.thresholds is not None
    choosing = not fixed and config.test_split != "val"
    val = [v for v in videos if choosing and splits[v.name] == "val" and v.name in truth]
    if left := len(videos) - len(tested) - len(val):
        notes.append(f"left out: {counted(left, 'video')} of other splits")
    return val, tested


def measure(
    config: Config, detection: Detection, true: dict[str, list[Event]],
    found: dict[str, list[FoundEvent]], kept: dict[str, KeptScores], chosen: str, notes: list[str],
) -> Results:  # fmt: skip
    """The numbers of the tested videos of which the truth is known."""
    scorer, num = detection.scorer, sum(map(len, true.values()))
    found, kept = {v: found[v] for v in true}, {v: kept[v] for v in true}
    scores, each = detection_scores(true, found)
    of_frames = frame_precision(kept, true, detection.names)
    frames = sum(k.rows for k in kept.values())
    ends = detection_intervals(true, found, kept, detection.names)
    if ends and len(true) < FEW:
        notes.append(
            f"the 95 % intervals are rough: they rest on {counted(len(true), 'video')} only"
        )
    order = ["map_50", "map", *(f"map_{100 * o:.0f}" for o in OVERLAPS if o != 0.5)]
    of_events = lambda name: Metric(scores[name], num, ends.get(name), of="events")
    metrics = {name: of_events(name) for name in order}
    mean = float(np.mean(list(of_frames.values())))
    metrics["frame_map"] = Metric(mean, frames, ends.get("frame_map"), of="frames")
    metrics |= {name: of_events(name) for name in scores if name not in metrics}
    digest = hashlib.sha256(json.dumps(sorted(true.items())).encode()).hexdigest()
    data = Data(
        ", ".join(config.video),
        digest,
        config.test_split,
        len(true),
        len(true),
        len(detection.names),
    )
    protocol = {
        "kind": "detection", "videos": digest, "test_split": config.test_split,
        "num_test": len(true), "thresholds": chosen,
    }  # fmt: skip
    spec, how = scorer.spec, detection.how
    details: dict[str, dict] = {
        "views": {
            "frames": spec.frames, "stride": spec.stride, "trained_fps": scorer.rate,
            "size": spec.size, "overlap": 1 - 1 / scorer.overlap,
            "smooth_seconds": config.smooth, "shortest_seconds": config.shortest,
            "pooling": "mean over the windows that show a frame",
        },
        "interval": {
            "kind": "95 % percentile bootstrap", "resamples": RESAMPLES, "resampled": "videos",
            "groups": len(true),
        },
        "average_precision_at_50": each,
        "average_precision_of_frames": of_frames,
    }  # fmt: skip
    settings = {
        "smooth": config.smooth,
        "shortest": config.shortest,
        "background": list(config.background),
    }
    precision = str(autocast_dtype(how.device, how.precision) or torch.float32)
    return build_results(
        "detect", data, describe_model(config.backbone, scorer.model), protocol, settings, metrics,
        None, versions(how.device, precision.removeprefix("torch.")), notes, details,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- main


def write_events(
    out: Path,
    found: dict[str, list[FoundEvent]],
    truth: dict[str, tuple[str, VideoTruth]],
    model: str,
) -> dict:
    """Write events.csv and events.json, with the names of the truth; returns the latter."""
    rows = [[v, *e[1:3], e[0], e[3]] for v, events in found.items() for e in events]
    columns = ["video", "start", "end", "label", "score"]
    write_csv(out / "events.csv", columns, (list(map(for_csv, row)) for row in rows))
    results = {
        truth[v][0] if v in truth else v: [
            {"label": label, "score": score, "segment": [start, end]}
            for label, start, end, score in events
        ]
        for v, events in found.items()
    }
    content = {"version": "muybridge 1", "results": results, "external_data": {"model": model}}
    write_json(out / "events.json", content)
    return content


def main(config: Config) -> dict:
    """Find the events; returns what events.json holds."""
    if not all(config.video):
        raise ValueError("--video is empty: give files or folders")
    out = Path(config.out or default_folder("detect", config.backbone, " ".join(config.video)))
    if not (out / "events.json").is_file():
        refuse_others(out)
    try_folder(out)
    videos, refused = list_videos(config.video)
    notes: list[str] = []
    truth = truth_of(config, videos)
    val, tested = choose_parts(config, videos, truth, notes)
    where = start_evaluation(config.machine)
    how = How(config.smooth, config.batch_size, where, config.machine.precision)
    scorer = load_scorer(config, where)
    lock = claim(out)
    take_pose_weights(config.pose_weights, scorer.spec.streams)
    val, tested = (
        with_streams(part, scorer.spec, config.backbone, refused) for part in (val, tested)
    )
    if not tested:
        raise nothing_usable(" ".join(config.video), refused)
    if not config.text and (warning := at_chance(config.backbone, len(scorer.names))):
        notes.append(f"WARNING: {warning}")
    detection = Detection(scorer, config.background, how, config.shortest, refused)
    names = detection.names

    # ---- what is true, in the model's words
    true: dict[str, list[Event]] = {}
    unknown: set[str] = set()
    for video, (_, about) in truth.items():
        true[video], left_out = match_labels(about.events, names)
        unknown |= left_out
    hidden = {same_words(name) for name in config.background}
    if others := sorted(name for name in unknown if same_words(name) not in hidden):
        notes.append(
            f"neither looked for nor measured: {counted(len(others), 'class')} of the truth, "
            f"{first_of(others, 10)}"
        )

    # ---- thresholds, then events
    thresholds, chosen = np.full(len(names), THRESHOLD), f"{THRESHOLD:g}, as nothing else is known"
    if config.thresholds:
        thresholds, chosen = read_thresholds(Path(config.thresholds), names), "of a file"
    elif config.threshold is not None:
        thresholds, chosen = np.full(len(names), config.threshold), f"{config.threshold:g}, given"
    elif val:
        scores = detection.keep(val)
        thresholds = choose_thresholds(scores, {v: true[v] for v in scores}, names, config.shortest)
        chosen = f"chosen on {counted(len(scores), 'video')} of split val"
    found, kept = detection.find(tested, thresholds, {v.name for v in tested if v.name in true})
    if not found:
        raise nothing_usable(" ".join(config.video), refused)
    notes += detection.other_strides()
    if not any(found.values()):
        notes.append(nothing_found(detection.highest, chosen))
    content = write_events(out, found, truth, config.backbone)
    by_name = dict(zip(names, thresholds.tolist(), strict=True))
    write_json(out / "thresholds.json", {"thresholds": by_name, "chosen": chosen})
    write_json(out / "refused.json", refused)

    # ---- the truth
    measured = {v: true[v] for v in found if v in true}
    (out / "results.json").unlink(missing_ok=True)  # of an earlier run
    (out / "CARD.md").unlink(missing_ok=True)
    if any(measured.values()):
        if len(measured) < len(tested):
            notes.append(
                f"not measured: {len(tested) - len(measured)} of {len(tested)} videos, as their "
                "truth is not known or they cannot be read"
            )
        ends = {v: max((event[2] for event in events), default=0) for v, events in measured.items()}
        late = [v for v, end in ends.items() if end > detection.seconds[v] + 1]
        if late:
            notes.append(
                f"WARNING: events of the truth end after {counted(len(late), 'video')} that they "
                f"are of, such as {late[0]}: are they in seconds?"
            )
        results = measure(config, detection, measured, found, kept, chosen, notes)
        write_results(out, results)
        print_results(results)
    else:
        print_notes(notes)
    total = sum(map(len, found.values()))
    within = counted(len(found), "video")
    print(f"\n{counted(total, 'event')} in {within}, thresholds {chosen}")
    for video, reason in refused.items():
        print(f"refused {for_screen(video)}: {for_screen(reason)}")
    rows = [(v, detection.seconds[v], events, measured.get(v)) for v, events in found.items()]
    title = f"events in {within}, by {config.backbone}"
    picture = events_figure(out / "timeline.png", rows, title)
    names_of = {"events": out / "events.csv", "as ActivityNet has them": out / "events.json"}
    print_table("done", names_of | {"figure": picture})
    lock.release(force=True)
    return content


if __name__ == "__main__":
    command(main)
