"""Scores of every frame of videos, raw or packed: decoded once, forward, at flat memory."""

import contextlib
import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from downstream.classifier import Classifier
from downstream.events import KeptScores, cut_events, smooth
from downstream.metrics import FoundEvent
from downstream.models import another_stride, matched_stride
from downstream.windows import window_scores
from pretrain.data import flow, methods
from pretrain.data.blazepose import Networks, estimate_poses, load_networks
from pretrain.data.cache import methods_for, open_data, packing_side, refusals
from pretrain.data.decode import DecodeError, crop_resize
from pretrain.data.encode import LONGER, cut_places
from pretrain.data.guard import Refused
from pretrain.data.ingest import clip_frames
from pretrain.data.poses import COLUMNS, most_seen_first
from pretrain.data.progress import Bar
from pretrain.data.sampling import test_boxes
from pretrain.data.shards import Pack, crop_clip, refuse_missing_streams
from pretrain.data.sources import Source, list_sources
from pretrain.data.stream import Frames
from pretrain.device import autocast_dtype
from pretrain.files import is_there
from pretrain.modes import evaluating
from pretrain.names import first_of, for_screen
from pretrain.prompts import same_words
from pretrain.spec import InputSpec

PART_SECONDS = 10.0  # of a raw video, in which people are followed: a clip as it would be packed

# ---- videos


def nothing_found(highest: float, chosen: str) -> str:
    """What a reader must know where there is no event.

    Args:
        highest: of all scores of frames.
        chosen: the thresholds, in words.
    """
    return (
        f"no event: the highest score of a frame is {highest:.2f}, thresholds are {chosen}; a "
        "lower --threshold or --shortest finds more"
    )


@dataclass(frozen=True)
class Video:
    """One video, raw or packed.

    Attributes:
        name: what the results call it.
        split: of the list, if any.
        segments: its column `segments`, empty without.
        source: where its file is; None if it is packed.
        pack: where its clips are.
        ids: their numbers, in order of time.
        given: the file, folder, list or pack with which the user gave it.
    """

    name: str
    split: str | None
    segments: str
    source: Source | None = None
    pack: Pack | None = None
    ids: tuple[int, ...] = ()
    given: str = ""


def list_videos(given: tuple[str, ...]) -> tuple[list[Video], dict[str, str]]:
    """The videos of files, folders, lists, tars and packs, and why some cannot be used.

    Raises:
        ValueError: there is nothing at a path.
    """
    videos: list[Video] = []
    refused: dict[str, str] = {}
    for name in given:
        if not is_there(name):
            raise ValueError(f"--video {name}: there is no such file or folder")
        if os.path.lexists(Path(name) / "index.json"):
            videos += _packed_videos(Pack(name), name)
            continue
        listing = list_sources(name)
        refused |= dict(listing.refused)
        for found in listing.sources:
            if found.kind == "image":
                refused[found.name] = "is a picture, in which nothing happens"
                continue
            text = found.extra.get("segments", "")
            videos.append(Video(found.name, found.split, text, found, given=name))
    names = [video.name for video in videos]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(
            f"two videos are called {twice}: give them by a list, or one folder above both"
        )
    return videos, refused


def _packed_videos(pack: Pack, given: str) -> list[Video]:
    """The videos of a pack, each with its clips.

    Raises:
        ValueError: these are of several people at once.
    """
    groups: dict[str, list[int]] = {}
    for number, record in enumerate(pack.records()):
        if "subject" in record.get("follow", {}):
            raise ValueError(
                f"{given} was packed with --follow, clips of people and not of all the time: give "
                "the videos themselves, or a pack made without it"
            )
        groups.setdefault(record["source"], []).append(number)
    videos = []
    for source, ids in groups.items():
        ids.sort(key=lambda i: pack.record(i)["start"])
        about = pack.record(ids[0])
        text = about["extra"].get("segments", "")
        videos.append(Video(source, about["split"], text, None, pack, tuple(ids), given))
    return videos


def with_streams(
    videos: list[Video], spec: InputSpec, who: str, refused: dict[str, str]
) -> list[Video]:
    """The videos that have the streams that a model takes, or whose streams can be estimated.

    Those of a list that brings streams, and recordings of poses alone, are packed first.

    Args:
        videos: of `list_videos`.
        spec: the clip that the model takes.
        who: what it is called.
        refused: video -> why it cannot be used; more are added.

    Raises:
        ValueError: a pack has none of a stream, or nothing estimates one of raw videos.
    """
    wanted = spec.streams.keys() - {"rgb"}
    brings = lambda source: source.kind == "pose" or source.beside.keys() & wanted
    lists = {v.given for v in videos if wanted and v.source and brings(v.source)}
    for given in sorted(lists):
        pack = open_data(given, packing_side(spec.size))
        packed = {video.name: video for video in _packed_videos(pack, given)}
        why = refusals(pack.folder, spec)
        listed = [v for v in videos if v.given == given]
        refused |= {v.name: why[v.name] for v in listed if v.name in why}
        videos = [packed.get(v.name, v) for v in videos if v.given != given or v.name in packed]
    if raw := [v.source for v in videos if v.source]:
        methods_for(spec, raw, who)
    for pack in {id(v.pack): v.pack for v in videos if v.pack}.values():
        refuse_missing_streams(spec, pack.streams, pack.name, who)
    good = []
    for video in videos:
        try:
            if video.pack:
                video.pack.check_streams(np.array(video.ids), spec, who)
            elif video.source and video.source.kind == "pose":
                raise ValueError(f"is of poses alone, and {who} takes {' and '.join(spec.streams)}")
            good.append(video)
        except ValueError as error:
            refused.setdefault(video.name, str(error))
    return good


@dataclass(frozen=True)
class Opened:
    """A video that is being read.

    Attributes:
        fps: frames a second.
        chunks: its frames, the streams that a model takes at its size.
        reason: says afterwards why they end too early; nothing if they do not.
    """

    fps: float
    chunks: Iterator[dict[str, Tensor]]
    reason: Callable[[], str]


@contextlib.contextmanager
def opened(video: Video, spec: InputSpec) -> Iterator[Opened]:
    """A video, decoded from front to back while it is read.

    Raises:
        Refused: it cannot be used.
    """
    reasons: list[str] = []
    if video.pack is not None:
        yield Opened(
            float(video.pack.record(video.ids[0])["fps"]),
            _packed(video, spec, reasons),
            lambda: "".join(reasons),
        )
        return
    source = video.source
    assert source is not None
    with Frames(os.fspath(source.path), source.member, packing_side(spec.size)) as frames:
        if spec.streams.keys() == {"rgb"}:
            clips: Iterator[dict[str, Tensor]] = (
                centre(torch.from_numpy(chunk), spec) for chunk in frames.chunks()
            )
        else:
            clips = _estimated(frames, spec, reasons)
        yield Opened(float(frames.fps), clips, lambda: frames.reason or "".join(reasons))


def centre(frames: Tensor, spec: InputSpec) -> dict[str, Tensor]:
    """The centre of frames (n, H, W, 3) at a model's size, (3, n, S, S)."""
    box = test_boxes(frames.shape[2], frames.shape[1], 1)[0]
    return {"rgb": crop_resize(frames, box, spec.size, spec.pictures["rgb"].interpolation)}


def _estimated(frames: Frames, spec: InputSpec, reasons: list[str]) -> Iterator[dict[str, Tensor]]:
    """The parts of a raw video as packing would cut it, with the streams that it would estimate.

    Where a stream cannot be had they end, and the reason is added.
    """
    for part in _parts(frames):
        height, width = part.shape[1:3]
        parts = {"rgb": torch.from_numpy(part)}
        streams: dict[str, dict] = {}
        if "flow" in spec.streams:
            method = spec.pictures["flow"].method or "dis"
            if len(part) == 1:
                reasons.append("of one frame there is no flow")
                return
            methods.refuse_size(method, width, height)
            flows = flow.estimate_flow(itertools.pairwise(part), flow.estimator(method))
            bound = flow.choose_bound(flows, width, height)
            levels = torch.from_numpy(flow.to_levels(flows, bound))
            parts["flow"], streams["flow"] = torch.cat([levels, levels[-1:]]), {"bound": bound}
        if "pose" in spec.streams:
            found, _ = estimate_poses(part, float(frames.fps), _networks())
            parts["pose"] = torch.from_numpy(most_seen_first(found))
            streams["pose"] = {"columns": COLUMNS}
        yield crop_clip(parts, {"streams": streams}, test_boxes(width, height, 1)[0], spec)


def _parts(frames: Frames) -> Iterator[np.ndarray]:
    """All frames in order, uint8 (n, H, W, 3), in the parts into which packing cuts a video."""
    most = clip_frames(frames.fps, PART_SECONDS)
    cuts = cut_places(frames.ticks, most)
    waiting: list[np.ndarray] = []
    for number, picture in enumerate(itertools.chain.from_iterable(frames.chunks())):
        # There may be more frames than the file promised.
        if waiting and (number in cuts or len(waiting) > math.ceil(most * (1 + LONGER))):
            yield np.stack(waiting)
            waiting = []
        waiting.append(picture)
    if waiting:
        yield np.stack(waiting)


@functools.cache
def _networks() -> Networks:
    """The networks of BlazePose, which are loaded once."""
    return load_networks(methods.pose_weights())


def _packed(video: Video, spec: InputSpec, reasons: list[str]) -> Iterator[dict[str, Tensor]]:
    """The clips of a packed video; where one is damaged they end, and the reason is added."""
    assert video.pack is not None
    for record in map(video.pack.record, video.ids):
        try:
            parts = video.pack.clip(record, np.arange(record["frames"]), spec)
        except DecodeError as error:
            reasons.append(str(error))
            return
        box = test_boxes(record["width"], record["height"], 1)[0]
        yield crop_clip(parts, record, box, spec)


# ---- scores


@dataclass(frozen=True)
class Scorer:
    """A model that scores windows.

    Attributes:
        model: the network.
        spec: the clip that it takes.
        names: of the K classes.
        overlap: windows that begin within one of them.
        score: clips to scores of the classes, (B, T, K) or (B, K).
        rate: frames a second of the videos that it learned from; None: not known, or the stride
            holds whatever they are.
    """

    model: nn.Module
    spec: InputSpec
    names: list[str]
    overlap: int
    score: Callable[[Any], Tensor]
    rate: float | None = None

    def pace(self, fps: float) -> tuple[int, int]:
        """Frames from one that a window shows to the next, and from a window to the next."""
        stride = matched_stride(self.spec.stride, fps, self.rate)
        return stride, max(self.spec.frames * stride // self.overlap, 1)


def refuse_uniform(spec: InputSpec) -> None:
    """Refuse a model that takes frames of the whole of a clip, which a long video has not.

    Raises:
        ValueError: it is one.
    """
    if not spec.stride:
        raise ValueError(
            "this model takes frames of the whole of a clip, which a long video has not: give "
            "--stride, source frames between two that it sees"
        )


def classifier_scorer(
    classifier: Classifier, where: torch.device, rate: float | None = None
) -> Scorer:
    """A classifier as what scores windows: of frames they overlap by half, of clips by 3/4.

    Args:
        classifier: moved to the device.
        where: the device.
        rate: as `Scorer` has it.

    Raises:
        ValueError: it takes frames of the whole of a clip.
    """
    spec = classifier.input_spec
    refuse_uniform(spec)
    classifier.to(where)
    score = lambda clips: classifier(clips).float().softmax(-1)
    overlap = 2 if classifier.per_frame else 4
    return Scorer(classifier, spec, classifier.classes, overlap, score, rate)


@dataclass(frozen=True)
class How:
    """How videos are scored.

    Attributes:
        smooth: seconds over which scores are averaged.
        batch_size: windows in one forward pass.
        device: where to compute.
        precision: "auto", "bf16" or "fp32".
    """

    smooth: float
    batch_size: int
    device: torch.device
    precision: str


def score_windows(scorer: Scorer, how: How, windows: dict[str, Tensor]) -> Tensor:
    """Scores of windows, streams (B, C, T, ...): (B, T, K), or of whole clips (B, K)."""
    spec, dtype = scorer.spec, autocast_dtype(how.device, how.precision)
    with (
        evaluating(scorer.model),
        torch.inference_mode(),
        torch.autocast(how.device.type, dtype, enabled=dtype is not None),
    ):
        return scorer.score(spec.normalise(spec.take(windows, how.device)))


def video_scores(
    video: Video, scorer: Scorer, shown: list[int], how: How,
    use: Callable[[Iterator[np.ndarray], float], None],
) -> tuple[float, str]:  # fmt: skip
    """Score the frames of a video once.

    Args:
        video: raw or packed.
        scorer: the model.
        shown: numbers of the classes that are wanted.
        how: smoothing, batch size, device and precision.
        use: takes the smoothed scores (n, len(shown)), in parts, and the frames a second.

    Returns:
        its seconds, and why it could not be read any further; nothing if it was read to its end.

    Raises:
        Refused: nothing of it can be read.
        ValueError: a prediction is not finite.
    """
    spec, rows = scorer.spec, 0

    def predict(window: dict[str, Tensor]) -> Tensor:
        return score_windows(scorer, how, window)[..., shown]

    def tallied(parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        nonlocal rows
        for part in parts:
            rows += len(part)
            yield part

    with opened(video, spec) as stream:
        pace = scorer.pace(stream.fps)
        windows = window_scores(stream.chunks, spec.frames, *pace, how.batch_size, predict)
        use(smooth(tallied(windows), round(how.smooth * stream.fps / 2)), stream.fps)
        reason = stream.reason()
    if not rows:
        raise Refused(reason or "holds no frame that can be decoded")
    return rows / stream.fps, reason


class Detection:
    """Finds the events of videos, one after the other.

    Args:
        scorer: the model.
        background: names of classes that are no events.
        how: how frames are scored.
        shortest: seconds; shorter events are left out.
        refused: video -> why it cannot be used, or from when on; more are added.

    Attributes:
        names: of the classes that are looked for.
        seconds: how long each video is that was read.
        highest: of the scores of frames in which `find` looked.

    Raises:
        ValueError: a class of the background is not there, or nothing is left.
    """

    def __init__(
        self, scorer: Scorer, background: tuple[str, ...], how: How, shortest: float,
        refused: dict[str, str],
    ):  # fmt: skip
        hidden = {same_words(name) for name in background}
        if missing := hidden - {same_words(name) for name in scorer.names}:
            raise ValueError(
                f"--background {min(missing)!r} is no class of this model: it has "
                f"{first_of(scorer.names, 10)}"
            )
        self.shown = [k for k, name in enumerate(scorer.names) if same_words(name) not in hidden]
        if not self.shown:
            raise ValueError("every class is --background: nothing is looked for")
        self.names = [scorer.names[k] for k in self.shown]
        self.scorer, self.how, self.shortest, self.refused = scorer, how, shortest, refused
        self.seconds: dict[str, float] = {}
        self._strides: Counter[int] = Counter()
        self.highest = 0.0

    def _score(
        self, videos: list[Video], title: str,
        use: Callable[[Video, Iterator[np.ndarray], float], None],
    ) -> set[str]:  # fmt: skip
        """Hands the scores of each video to `use`; returns the names of those that were read."""
        done = set()
        with Bar(len(videos), title, "video") as bar:
            for video in videos:
                one = lambda parts, fps, video=video: use(video, parts, fps)
                try:
                    seconds, reason = video_scores(video, self.scorer, self.shown, self.how, one)
                except Refused as error:
                    self.refused[video.name] = str(error)
                else:
                    done.add(video.name)
                    self.seconds[video.name] = seconds
                    if reason:
                        self.refused[video.name] = f"read to {seconds:.1f} s: {reason}"
                bar.update(about=for_screen(video.name, 60))
        return done

    def keep(self, videos: list[Video]) -> dict[str, KeptScores]:
        """The scores of videos, on which thresholds are to be chosen."""
        kept: dict[str, KeptScores] = {}

        def use(video: Video, parts: Iterator[np.ndarray], fps: float) -> None:
            kept[video.name] = KeptScores(fps)
            for _ in kept[video.name].record(parts):
                pass

        done = self._score(videos, "validation", use)
        return {name: scores for name, scores in kept.items() if name in done}

    def _watched(self, parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for part in parts:
            self.highest = max(self.highest, float(part.max(initial=0)))
            yield part

    def other_strides(self) -> list[str]:
        """In which videos `find` took another stride than the model records, and why."""
        own = self.scorer.spec.stride
        return [
            another_stride(stride, own, number, self.scorer.rate)
            for stride, number in sorted(self._strides.items())
            if stride != own
        ]

    def find(
        self, videos: list[Video], thresholds: np.ndarray, measured: set[str]
    ) -> tuple[dict[str, list[FoundEvent]], dict[str, KeptScores]]:
        """The events of the videos that can be read, and the scores of those that are measured."""
        found: dict[str, list[FoundEvent]] = {}
        kept: dict[str, KeptScores] = {}

        def use(video: Video, parts: Iterator[np.ndarray], fps: float) -> None:
            self._strides[self.scorer.pace(fps)[0]] += 1
            if video.name in measured:
                kept[video.name] = KeptScores(fps)
                parts = kept[video.name].record(parts)
            parts = self._watched(parts)
            found[video.name] = cut_events(parts, self.names, thresholds, fps, self.shortest)

        done = self._score(videos, "detection", use)
        for name in found.keys() - done:
            del found[name]
            kept.pop(name, None)
        return found, kept
