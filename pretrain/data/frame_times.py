"""The worker that tells when the frames of a video are shown, with the guards of `ingest.py`.

`python -m pretrain.data.frame_times` reads packets and decodes nothing; see
`pretrain/data/annotations/clock.py`.
"""

import numpy as np

from pretrain.data.guard import Refused, check_container
from pretrain.data.ingest import demuxer, packets_of, payload, serve


def _times(path: str, beat) -> dict:
    with payload(path, None) as file:
        name = check_container(file)
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
        if not count:
            raise Refused("holds no frame")
        times = np.unique(np.array(stamps, float)) * base
        if len(times) < count:  # frames without a time of their own are counted
            times = np.arange(count) / rate
        step = float(np.median(np.diff(times))) if count > 1 else 1 / rate
        shown = (times - times[0]).tolist()
        return {"times": [*shown, shown[-1] + step], "size": size}


if __name__ == "__main__":
    serve(_times)
