"""Scores of every frame of a video of any length, by a window that slides over its frames.

T frames of a clip, K classes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

Streams = Mapping[str, Tensor]


def window_scores(
    chunks: Iterable[Streams], frames: int, stride: int, hop: int, batch: int,
    predict: Callable[[dict[str, Tensor]], Tensor],
) -> Iterator[np.ndarray]:  # fmt: skip
    """Scores (n, K) of the frames of a video, in parts; the same whatever the chunks.

    Where windows overlap they are averaged; a frame that the stride leaves out has the prediction
    of the last one before it. The last window ends with the video; of a shorter video the last
    frame is repeated. At most a window and `batch` times `hop` frames are kept, and a chunk.

    Args:
        chunks: the next frames of every stream, (C, n, ...) as `InputSpec` has them, time second.
        frames: T of the model.
        stride: frames of the video from one that the model sees to the next.
        hop: frames of the video from a window to the next.
        batch: windows in one forward pass; which are together depends on their place alone.
        predict: streams (B, C, T, ...) to scores (B, T, K), or of whole clips (B, K).

    Raises:
        ValueError: a prediction is not finite.
    """
    span = frames * stride
    buffer: dict[str, Tensor] = {}
    # First frame in the buffer, frames that came, first frame of the next window.
    first = number = start = 0
    done, sums, counts = 0, np.empty((0, 0)), np.empty((0, 1))  # of the frames from `done` on
    waiting: list[int] = []

    def run(last: bool) -> np.ndarray:
        """Scores the waiting windows; returns those of frames that no later one shows."""
        nonlocal sums, counts, done, waiting, buffer, first
        places = [np.minimum(s + stride * np.arange(frames), number - 1) - first for s in waiting]
        clips = {
            name: torch.stack([stream[:, torch.from_numpy(p)] for p in places])
            for name, stream in buffer.items()
        }
        scores = predict(clips).float().cpu().numpy()
        if not np.isfinite(scores).all():
            raise ValueError("a prediction of the model is not finite: its weights are damaged")
        more = np.zeros((min(waiting[-1] + span, number) - done - len(sums), scores.shape[-1]))
        sums = np.concatenate([sums.reshape(-1, scores.shape[-1]), more])
        counts = np.concatenate([counts, np.zeros((len(more), 1))])
        for s, score in zip(waiting, scores, strict=True):
            covered = np.arange(s, min(s + span, number))
            sums[covered - done] += score[(covered - s) // stride] if score.ndim > 1 else score
            counts[covered - done] += 1
        # The window at the video's end may begin right behind the last one's beginning.
        ready = len(sums) if last else waiting[-1] + 1 - done
        out, sums = sums[:ready] / counts[:ready], sums[ready:]
        counts, done, waiting = counts[ready:], done + ready, []
        buffer = {name: stream[:, done - first :] for name, stream in buffer.items()}
        first = done
        return out

    for chunk in chunks:
        buffer = {
            n: torch.cat([buffer[n], part], 1) if buffer else part for n, part in chunk.items()
        }
        number += next(iter(chunk.values())).shape[1]
        while start + span <= number:
            waiting.append(start)
            start += hop
            if len(waiting) == batch:
                yield run(last=False)
    final = max(number - span, 0)
    if number and (waiting[-1] if waiting else start - hop) != final:
        waiting.append(final)
    if waiting:
        yield run(last=True)
    elif len(sums):
        yield sums / counts
