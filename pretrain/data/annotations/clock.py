"""When the frames of videos are shown, for annotations that count frames."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pretrain.data.pool import run_jobs

if TYPE_CHECKING:
    import numpy as np

WORKER = (sys.executable, "-P", "-m", "pretrain.data.frame_times")
TIMEOUT = 60.0  # seconds without a sign of progress


def frame_times(paths: Iterable[str]) -> dict[str, tuple["np.ndarray", tuple[int, int]]]:
    """Of each video the seconds at which its frames are shown, from the first, and its size.

    One more time than frames: that at which the last one ends.

    Raises:
        ValueError: one cannot be read.
    """
    import numpy as np  # packing without annotations does without

    files = list(dict.fromkeys(paths))
    found = {}
    for order, answer in run_jobs([{"path": path} for path in files], 1, TIMEOUT, WORKER):
        if "times" not in answer:
            raise ValueError(f"{files[order]}: {answer.get('refused') or answer.get('disk')}")
        width, height = answer["size"]
        found[files[order]] = np.array(answer["times"], float), (width, height)
    return found
