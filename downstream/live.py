"""Bouts of a camera: what happens from when to when, found while it is shown.

T frames of a window, K classes, n ticks of a part of a stretch (`pretrain/data/live.py`).
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from downstream.detect import How, Scorer, centre, score_windows
from downstream.events import Cutter, smooth
from downstream.metrics import FoundEvent
from pretrain.data.cache import packing_side
from pretrain.data.live import AGAIN, Camera, Newest, Source

Predict = Callable[[np.ndarray], np.ndarray]


@dataclass
class Watched:
    """How much was seen.

    Attributes:
        ticks: of all stretches.
        dropped: ticks that no window shows, since the model was too slow for the camera.
        windows: that were scored.
        highest: of the scores of frames.
    """

    ticks: int = 0
    dropped: int = 0
    windows: int = 0
    highest: float = 0.0


def stretch_scores(
    newest: Newest, stretch: int, begin: int, frames: int, stride: int, hop: int,
    predict: Predict, watched: Watched,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Scores (n, K) of the ticks of a stretch, in parts, as `window_scores` gives those of a video.

    The next window is the newest one at a whole number of hops: a model that is too slow leaves
    some out, and never works on what is old. A tick that no window shows has the scores of the one
    before.

    Args:
        newest: the frames of a camera; `frames` times `stride` and `hop` ticks are kept.
        stretch: its number.
        begin: its first tick.
        frames: T of the model.
        stride: ticks from one frame that the model sees to the next.
        hop: ticks from a window to the next, if the model is fast enough.
        predict: frames (T, H, W, 3) to scores (T, K), or of the whole window (K,).
        watched: how much was seen; it is added to.
    """
    span = frames * stride
    start = done = begin  # the next window, and the first tick whose scores were not given
    scored, over = begin, False  # the last window's end
    sums, counts = np.zeros((0, 0)), np.zeros((0, 1))  # of the ticks from `done` on
    row: np.ndarray | None = None  # the scores of the tick before `done`
    while not over:
        first, pictures, over = newest.up_to(start + span, stretch)
        end = first + len(pictures)
        if not pictures:  # it ended long ago
            break
        if start + span <= end:
            start += (end - span - start) // hop * hop
            over = False  # there may be another one behind
        elif end <= scored:
            break
        else:
            start = max(first, end - span)
        places = np.minimum(start + stride * np.arange(frames), end - 1) - first
        scores = predict(np.stack([pictures[place] for place in places]))
        covered = np.arange(start, min(start + span, end))
        more = max(int(covered[-1]) + 1 - done - len(sums), 0)
        sums = np.concatenate(
            [sums.reshape(-1, scores.shape[-1]), np.zeros((more, scores.shape[-1]))]
        )
        counts = np.concatenate([counts, np.zeros((more, 1))])
        sums[covered - done] += scores[(covered - start) // stride] if scores.ndim > 1 else scores
        counts[covered - done] += 1
        scored, watched.windows = int(covered[-1]) + 1, watched.windows + 1
        # The last window of all may begin right behind the beginning of this one.
        ready = len(sums) if over else start + 1 - done
        rows = _filled(sums[:ready], counts[:ready], row)
        watched.ticks += ready
        watched.dropped += int((counts[:ready] == 0).sum())
        sums, counts, done, row = sums[ready:], counts[ready:], done + ready, rows[-1]
        start += hop
        yield rows
    if len(sums):
        watched.ticks += len(sums)
        watched.dropped += int((counts == 0).sum())
        yield _filled(sums, counts, row)


def _filled(sums: np.ndarray, counts: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """Means (n, K); where nothing was added the mean before."""
    rows = sums / np.maximum(counts, 1)
    for i in np.flatnonzero(counts[:, 0] == 0):
        last = rows[i - 1] if i else before
        rows[i] = rows[i] if last is None else last
    return rows


def open_camera(source: Source, scorer: Scorer, again: tuple[float, ...] = AGAIN) -> Camera:
    """A camera that keeps as many frames as a model needs; `again` as of `Camera`."""
    spec = scorer.spec

    def room(fps: float) -> int:
        stride, hop = scorer.pace(fps)
        return spec.frames * stride + hop

    return Camera(source, packing_side(spec.size), room, again=again)


def watch(
    camera: Camera, scorer: Scorer, how: How, thresholds: np.ndarray, shortest: float,
    use: Callable[[FoundEvent], None],
) -> Watched:  # fmt: skip
    """Find bouts until the camera is stopped or given up.

    Args:
        camera: of `open_camera`.
        scorer: the model.
        how: smoothing, device and precision.
        thresholds: of the classes (K,).
        shortest: seconds; shorter bouts are left out.
        use: takes each bout when it has ended, with seconds since the camera was opened.

    Raises:
        ValueError: a prediction is not finite.
    """
    spec, watched = scorer.spec, Watched()
    fps, radius = float(camera.newest.fps), round(how.smooth * float(camera.newest.fps) / 2)
    stride, hop = scorer.pace(fps)

    def predict(pictures: np.ndarray) -> np.ndarray:
        window = centre(torch.from_numpy(pictures), spec)["rgb"][None]
        scores = score_windows(scorer, how, {"rgb": window})[0].float().cpu().numpy()
        if not np.isfinite(scores).all():
            raise ValueError("a prediction of the model is not finite: its weights are damaged")
        return scores

    stretch = -1
    while (found := camera.newest.stretch(stretch)) is not None:
        stretch = found
        begin = camera.newest.up_to(0, stretch)[0]
        cutter = Cutter(scorer.names, thresholds, fps, shortest)
        parts = stretch_scores(
            camera.newest, stretch, begin, spec.frames, stride, hop, predict, watched
        )
        for part in smooth(parts, radius):
            watched.highest = max(watched.highest, float(part.max(initial=0)))
            for event in cutter.push(part):
                use(_later(event, begin / fps))
        for event in cutter.finish():
            use(_later(event, begin / fps))
    return watched


def _later(event: FoundEvent, seconds: float) -> FoundEvent:
    label, start, end, score = event
    return label, round(start + seconds, 3), round(end + seconds, 3), score


@contextlib.contextmanager
def until_interrupted(camera: Camera, seconds: float | None) -> Iterator[None]:
    """Stop the camera at Ctrl-C, at a request to end, or after so many seconds.

    A second Ctrl-C is an interrupt as ever.
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    before: dict[signal.Signals, Any] = {}

    def stop(number: int, _: object) -> None:
        camera.stop()
        signal.signal(number, before[signal.Signals(number)])

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop) for number in signals}
    timer = threading.Timer(seconds, camera.stop) if seconds else None
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
        camera.close()
