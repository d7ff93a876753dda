"""Events in long video: scores of frames, smoothed, cut into (start, end, label, score).

And how good they are. K classes, n frames of a part of a video. A class is judged by itself, so
events of several may overlap.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np

from downstream.metrics import Event, FoundEvent, draws, interval, precision_draws
from downstream.segments import frame_at, parse_segments, piece_draws, piece_scores
from pretrain.data.annotations import read_rows
from pretrain.data.lists import Problems
from pretrain.files import decimal, read_json, reading
from pretrain.names import for_screen
from pretrain.prompts import same_words

OVERLAPS = tuple(i / 10 for i in range(1, 8))  # intersections over union in time
THRESHOLDS = tuple(i / 20 for i in range(1, 20))  # that are tried
UNIT = 2**24  # scores are summed as whole multiples of 1 / UNIT
LONGEST = 1e7  # seconds; no video is longer


# ---- from scores to events


def smooth(parts: Iterable[np.ndarray], radius: int) -> Iterator[np.ndarray]:
    """Scores (n, K), float32, averaged over `radius` frames before and after each.

    At the ends the mean is over those there are. Sums are taken in one order: the same frames give
    the same numbers however they come.
    """
    kept, before = np.empty((0, 0)), 0  # rows, and how many of them were given out

    def mean(rows: np.ndarray, start: int, end: int) -> np.ndarray:
        total, count = np.zeros((end - start, rows.shape[1])), np.zeros((end - start, 1))
        for shift in range(-radius, radius + 1):
            low, high = max(start + shift, 0), min(end + shift, len(rows))
            if low < high:
                total[low - shift - start : high - shift - start] += rows[low:high]
                count[low - shift - start : high - shift - start] += 1
        return (total / count).astype(np.float32)

    for part in parts:
        kept = np.concatenate([kept, part]) if len(kept) else part
        if len(kept) - radius > before:
            yield mean(kept, before, len(kept) - radius)
            drop = max(len(kept) - 2 * radius, 0)
            kept, before = kept[drop:], len(kept) - radius - drop
    if len(kept) > before:
        yield mean(kept, before, len(kept))


class Cutter:
    """Cuts scores into events: stretches of frames with a class at or above its threshold.

    Args:
        classes: names of the K classes.
        thresholds: (K,).
        fps: frames a second.
        shortest: seconds; shorter events are left out.
    """

    def __init__(self, classes: list[str], thresholds: np.ndarray, fps: float, shortest: float):
        self.classes, self.thresholds, self.fps = classes, thresholds, fps
        self.least = shortest * fps - 1e-6
        self.number = 0  # of the next frame
        self.open: list[int | None] = [None] * len(classes)  # first frame of an event under way
        self.sums = [0] * len(classes)

    def push(self, scores: np.ndarray) -> list[FoundEvent]:
        """Events that end in the next frames (n, K)."""
        events = []
        high = scores >= self.thresholds
        # Sums of whole numbers are exact, whatever parts the scores come in.
        units = np.round(scores * UNIT).astype(np.int64)
        under_way = np.array([start is not None for start in self.open])
        for k in np.flatnonzero(np.logical_or(high.any(0), under_way)).tolist():
            now = bool(under_way[k])
            edges = np.flatnonzero(np.diff(high[:, k].astype(int), prepend=int(now))).tolist()
            for a, b in pairwise([0, *edges, len(scores)]):
                if now:
                    self.sums[k] += int(units[a:b, k].sum())
                if b < len(scores) and now:
                    events += self._end(k, self.number + b)
                elif b < len(scores):
                    self.open[k] = self.number + b
                now = not now
        self.number += len(scores)
        return events

    def finish(self) -> list[FoundEvent]:
        """Events that end with the video."""
        return [
            e for k, s in enumerate(self.open) if s is not None for e in self._end(k, self.number)
        ]

    def _end(self, k: int, end: int) -> list[FoundEvent]:
        start, total = self.open[k], self.sums[k]
        assert start is not None
        self.open[k], self.sums[k] = None, 0
        if end - start < self.least:
            return []
        score = round(total / UNIT / (end - start), 6)
        return [(self.classes[k], round(start / self.fps, 3), round(end / self.fps, 3), score)]


def cut_events(
    parts: Iterable[np.ndarray], classes: list[str], thresholds: np.ndarray, fps: float,
    shortest: float,
) -> list[FoundEvent]:  # fmt: skip
    """The events of smoothed scores (n, K), in order of time; see `Cutter`."""
    cutter = Cutter(classes, thresholds, fps, shortest)
    events = [event for part in parts for event in cutter.push(part)]
    return sorted(events + cutter.finish(), key=lambda e: (e[1], e[2], e[0]))


class KeptScores:
    """Smoothed scores of a video, kept on the disk: they are compared with the truth later."""

    def __init__(self, fps: float):
        self.fps, self.rows, self.width = fps, 0, 0
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115

    def record(self, parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Hands the scores (n, K) on, and keeps them."""
        for part in parts:
            self._file.write(np.ascontiguousarray(part, np.float32).tobytes())
            self.rows, self.width = self.rows + len(part), part.shape[1]
            yield part

    def parts(self, most: int = 4096) -> Iterator[np.ndarray]:
        """The scores (n, K) again."""
        self._file.seek(0)
        row = 4 * self.width
        while row and (data := self._file.read(most * row)):
            yield np.frombuffer(data, np.float32).reshape(-1, self.width)

    def column(self, k: int) -> np.ndarray:
        """The scores of a class (frames,)."""
        return np.concatenate([np.zeros(0, np.float32), *(part[:, k] for part in self.parts())])


# ---- what is true


@dataclass(frozen=True)
class VideoTruth:
    """What is true of a video.

    Attributes:
        events: (label, start, end), seconds.
        split: of the list or the subset of the file; None where none is named.
    """

    events: list[Event] = field(default_factory=list)
    split: str | None = None


_SUBSETS = {"training": "train", "validation": "val", "valid": "val", "testing": "test"}
_COLUMNS = {
    "video": ("video", "path", "file", "source", "name", "video_name", "video_id", "filename"),
    "start": ("start", "t-start", "t_start", "begin", "start_time"),
    "end": ("end", "t-end", "t_end", "stop", "end_time"),
    "label": ("label", "class", "action", "label_name"),
    "split": ("split", "subset"),
}


def read_truth(path: Path) -> dict[str, VideoTruth]:
    """The events of videos from a file: ActivityNet's JSON, or a table with a line an event.

    A table has the columns video, start, end (seconds) and label, and perhaps split; a line with
    neither start nor label says that nothing happens in its video.

    Raises:
        ValueError: the file is neither, or holds something that cannot be.
    """
    if path.suffix.lower() == ".json":
        return _from_activitynet(path)
    found: dict[str, VideoTruth] = {}
    problems = Problems(path)
    with reading(path):
        rows = list(read_rows(path, problems))
    problems.stop(len(rows))
    for line, row in rows:
        where = f"{path}:{line}"
        plain = {str(name).strip().lower(): value for name, value in row.items()}
        get = lambda role, plain=plain: next(
            (str(plain[n]).strip() for n in _COLUMNS[role] if plain.get(n) not in (None, "")), ""
        )
        if not (video := get("video")):
            raise ValueError(
                f"{where}: no video in this line; columns are video, start, end, label"
            )
        split = get("split").lower() or None
        about = found.setdefault(video, VideoTruth(split=_SUBSETS.get(split or "", split)))
        if get("start") or get("end") or get("label"):
            about.events.append(_event(get("label"), get("start"), get("end"), where))
    if not found:
        raise ValueError(f"{path} names no video")
    return found


def _from_activitynet(path: Path) -> dict[str, VideoTruth]:
    videos = read_json(path).get("database")
    if not isinstance(videos, dict) or not videos:
        raise ValueError(f'{path} has no "database" of videos, as ActivityNet\'s files have')
    found = {}
    for name, about in videos.items():
        if not name.strip():
            raise ValueError(f"{path}: a video has no name")
        where = f"{path}: {for_screen(name, 60)}"
        marks = about.get("annotations", []) if isinstance(about, dict) else None
        if not isinstance(marks, list) or not all(isinstance(mark, dict) for mark in marks):
            raise ValueError(f"{where} has no list of annotations")
        subset = about.get("subset")
        if subset is not None and not isinstance(subset, str):
            raise ValueError(f"{where} has the subset {str(subset)[:60]!r}")
        events = []
        for mark in marks:
            times = mark.get("segment")
            if not isinstance(times, list) or len(times) != 2:
                raise ValueError(f"{where}: a segment is {str(times)[:60]!r}, not [start, end]")
            events.append(_event(mark.get("label"), times[0], times[1], where))
        split = subset.lower() if subset else None
        found[name] = VideoTruth(events, _SUBSETS.get(split or "", split))
    return found


def _event(label: object, start: object, end: object, where: str) -> Event:
    if not isinstance(label, str) or not label.strip():
        raise ValueError(f"{where}: an event has no label")
    times = []
    for value in (start, end):
        try:
            if isinstance(value, bool):
                raise ValueError
            times.append(decimal(value))  # type: ignore[arg-type]  # of anything else it says so
        except (TypeError, ValueError):
            raise ValueError(f"{where}: {str(value)[:60]!r} is no time in seconds") from None
    if not 0 <= times[0] < times[1] <= LONGEST:  # NaN neither
        raise ValueError(f"{where}: an event from {times[0]:g} to {times[1]:g} s cannot be")
    return label.strip(), times[0], times[1]


def truth_of_segments(text: str, where: str) -> list[Event]:
    """The events in a list's column `segments`; see `parse_segments`."""
    return [(label, start, end) for start, end, label in parse_segments(text, where)]


def find_truth(truth: dict[str, VideoTruth], video: str) -> str | None:
    """The name of a video in a file of truth, perhaps without folder, ending or v_."""
    base = video.replace("\\", "/").rpartition("/")[2]
    stem = base.rpartition(".")[0] or base
    names = (video, base, stem, stem.removeprefix("v_"), f"v_{stem}")
    return next((name for name in names if name in truth), None)


def match_labels(events: list[Event], classes: list[str]) -> tuple[list[Event], set[str]]:
    """Events with labels as `classes` spells them; and the labels that are left out, being none."""
    names = {same_words(name): name for name in classes}
    known = [(names[same_words(e[0])], *e[1:]) for e in events if same_words(e[0]) in names]
    return known, {e[0] for e in events if same_words(e[0]) not in names}


# ---- how good it is


def choose_thresholds(
    kept: dict[str, KeptScores], true: dict[str, list[Event]], classes: list[str], shortest: float
) -> np.ndarray:
    """Thresholds (K,) with the largest segment F1 at half overlap on validation videos.

    Of equally good ones the middle. A class that does not occur there has the median of the others.

    Args:
        kept: smoothed scores of the videos.
        true: their events.
        classes: names of the K classes.
        shortest: seconds, as events are cut.

    Raises:
        ValueError: no class occurs.
    """
    present = {event[0] for events in true.values() for event in events}
    chosen = np.full(len(classes), np.nan)
    results: dict[str, list[float]] = {name: [] for name in classes}
    for value in THRESHOLDS:
        videos = {
            v: cut_events(k.parts(), classes, np.full(len(classes), value), k.fps, shortest)
            for v, k in kept.items()
        }
        for name in present:
            of_class = lambda events, name=name: [e[:3] for e in events if e[0] == name]
            pairs = [(of_class(true[v]), of_class(found)) for v, found in videos.items()]
            results[name].append(piece_scores(pairs)["f1_50"])
    for k, name in enumerate(classes):
        if name in present:
            best = np.flatnonzero(np.array(results[name]) == max(results[name]))
            chosen[k] = THRESHOLDS[int(best[len(best) // 2])]
    if not present:
        raise ValueError("no event of the validation videos is of a class that is looked for")
    return np.where(np.isnan(chosen), np.nanmedian(chosen), chosen)


def read_thresholds(path: Path, names: list[str]) -> np.ndarray:
    """Thresholds (K,) of these classes from thresholds.json.

    Raises:
        ValueError: it is none, or lacks a class.
    """
    values = read_json(path).get("thresholds")
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no thresholds")
    for name in names:
        value = values.get(name)
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{path} has no threshold between 0 and 1 for {name!r:.60}")
    return np.array([values[name] for name in names], dtype=float)


def frames_of(events: list[Event], name: str, fps: float, num: int) -> np.ndarray:
    """Which of the frames (num,) of a video an event of a class covers."""
    inside = np.zeros(num, bool)
    for label, start, end in events:
        if label == name:
            first, last = (frame_at(t, fps) for t in (start, end))
            inside[first:last] = True
    return inside


def frame_precision(
    kept: dict[str, KeptScores], true: dict[str, list[Event]], classes: list[str]
) -> dict[str, float]:
    """Average precision of the frames' scores by class, of those that occur."""
    from sklearn.metrics import average_precision_score

    found = {}
    for name, inside, scores, _ in _frames(kept, true, classes):
        found[name] = float(average_precision_score(inside, scores))
    return found


def frame_draws(
    kept: dict[str, KeptScores], true: dict[str, list[Event]], classes: list[str], times: np.ndarray
) -> np.ndarray:
    """Mean over the classes of `frame_precision` in each of R draws of the videos (R,).

    Scores are divided into 1,000 levels of as many frames each, which takes far less time.

    Args:
        kept: scores of the V videos.
        true: their events.
        classes: names of the K classes.
        times: how often each video, in the order of `kept`, was drawn (R, V).
    """
    drawn = []
    for _, inside, scores, owners in _frames(kept, true, classes):
        edges = np.unique(np.quantile(scores, np.arange(1, 1000) / 1000))
        level = len(edges) - np.searchsorted(edges, scores, "right")  # the highest scores first
        place, num = owners * (len(edges) + 1) + level, len(edges) + 1
        counts = [
            np.bincount(place, weight, len(kept) * num).reshape(-1, num)
            for weight in (inside.astype(float), None)
        ]
        hits, shown = (times @ count for count in counts)
        precision = hits.cumsum(1) / np.maximum(shown.cumsum(1), 1)
        with np.errstate(invalid="ignore"):  # none of the class was drawn: not a number
            drawn.append((hits * precision).sum(1) / hits.sum(1))
    return _mean_known(drawn)


def _frames(
    kept: dict[str, KeptScores], true: dict[str, list[Event]], classes: list[str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Of each class that occurs: its name; of all frames whether it is true, score and video."""
    owners = np.repeat(np.arange(len(kept)), [scores.rows for scores in kept.values()])
    for k, name in enumerate(classes):
        pairs = [(frames_of(true[v], name, s.fps, s.rows), s.column(k)) for v, s in kept.items()]
        inside, scores = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
        if inside.any():
            yield name, inside, scores, owners


def detection_scores(
    true: dict[str, list[Event]], found: dict[str, list[FoundEvent]]
) -> tuple[dict[str, float], dict[str, float]]:
    """MAP at each overlap and over all, segment F1, edit score; and the precision at .5 by class.

    Args:
        true: video -> its events, at least one in all.
        found: video -> what was found; the same videos.
    """
    once = np.ones((1, len(true)))
    each = precision_draws(true, found, (0.5,), once)
    scores = {name: float(values[0]) for name, values in detection_draws(true, found, once).items()}
    return scores, {name: float(values[0, 0]) for name, values in each.items()}


def detection_draws(
    true: dict[str, list[Event]], found: dict[str, list[FoundEvent]], times: np.ndarray
) -> dict[str, np.ndarray]:
    """The scores of `detection_scores` in each of R draws of the V videos (R,).

    Args:
        true: video -> its events, at least one in all.
        found: video -> what was found; the same videos.
        times: how often each video, in the order of `true`, was drawn (R, V).
    """
    mean = _mean_known(list(precision_draws(true, found, OVERLAPS, times).values()))  # (R, O)
    scores = {f"map_{100 * overlap:.0f}": mean[:, i] for i, overlap in enumerate(OVERLAPS)}
    scores["map"] = mean.mean(1)
    return scores | piece_draws([(true[v], [e[:3] for e in found[v]]) for v in true], times)


def detection_intervals(
    true: dict[str, list[Event]],
    found: dict[str, list[FoundEvent]],
    kept: dict[str, KeptScores],
    classes: list[str],
) -> dict[str, tuple[float, float]]:
    """95 % intervals over the videos of all scores and of "frame_map"; none of a single video.

    Args:
        true: video -> its events, at least one in all.
        found: video -> what was found; the same videos.
        kept: smoothed scores, in the order of `true`.
        classes: names of the K classes.
    """
    if len(true) < 2:
        return {}
    times = np.stack(list(draws(np.arange(len(true)), seed=0)))
    drawn = detection_draws(true, found, times)
    drawn["frame_map"] = frame_draws(kept, true, classes, times)
    low, high = interval(np.stack(list(drawn.values()), 1))
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(drawn)}


def _mean_known(values: list[np.ndarray]) -> np.ndarray:
    """The mean of those that are numbers, place by place; no number where none is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(0) / known.sum(0)
