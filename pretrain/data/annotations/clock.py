"""When the frames of videos are shown, for annotations that count frames.

`python -m pretrain.data.annotations.clock` is the worker that reads the packets, with the guards of
`pretrain/data/ingest.py`.
"""

import io
import sys
from collections.abc import Iterable

import numpy as np

from pretrain.data.guard import Refused, check_container
from pretrain.data.ingest import demuxer, packets_of, payload, serve
from pretrain.data.pool import run_jobs

WORKER = (sys.executable, "-P", "-m", "pretrain.data.annotations.clock")
TIMEOUT = 60.0  # seconds without a sign of progress


def frame_times(paths: Iterable[str]) -> dict[str, tuple[np.ndarray, tuple[int, int]]]:
    """Of each video the seconds at which its frames are shown, from the first, and its size.

    One more time than frames: that at which the last one ends.

    Raises:
        ValueError: one cannot be read.
    """
    files = list(dict.fromkeys(paths))
    jobs = [{"path": path} for path in files]
    found = {}
    for order, answer in run_jobs(jobs, 1, TIMEOUT, WORKER):
        if "times" not in answer:
            raise ValueError(f"{files[order]}: {answer.get('refused') or answer.get('disk')}")
        found[files[order]] = np.array(answer["times"], float), tuple(answer["size"])
    return found


def _times(path: str, beat) -> dict:
    with payload(path, None) as file:
        name = check_container(file)
        file.seek(0, io.SEEK_END)
        stamps, count = [], 0
        with demuxer(file, name) as (container, stream, logs):
            base = float(stream.time_base or 1)
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            size = [stream.codec_context.width, stream.codec_context.height]
            for packet in packets_of(container, stream, logs, beat):
                if packet.size and not packet.is_discard:
                    count += 1
                    stamp = packet.dts if name == "avi" else packet.pts
                    if stamp is not None:
                        stamps.append(stamp)
        times = np.unique(np.array(stamps, float)) * base
        if len(times) < count or not count:  # frames without a time of their own are counted
            times = np.arange(count) / rate
        if not count:
            raise Refused("holds no frame")
        step = float(np.median(np.diff(times))) if count > 1 else 1 / rate
        return {"times": [*(times - times[0]).tolist(), float(times[-1] - times[0]) + step],
                "size": size}  # fmt: skip


if __name__ == "__main__":
    serve(_times)
