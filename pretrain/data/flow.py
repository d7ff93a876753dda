"""Optical flow: estimated from frames, quantised and stored without loss.

Of T frames there are T - 1 flows: flow k, (2, H, W), says how many pixels to the right and down
what is seen at a pixel of frame k has moved by frame k + 1. It is stored as levels, bytes of which
128 is no motion and 127 on either side stand for a bound in pixels, x above y in the grey plane of
a lossless H.264 video. So quantisation is the only error, half of bound / 127, and nothing that
rests moves. TSN's (f + 20) * 255 / 40 has no level for zero: all that rests moves by a tenth of a
pixel.
"""

import functools
import io
from collections.abc import Callable, Iterable
from typing import Any

import av
import numpy as np

from pretrain.data.index import PRESET, X264
from pretrain.data.methods import METHODS

ZERO, LEVELS = 128, 127  # as `pretrain.spec` has them, which processes that pack do without
Estimator = Callable[[np.ndarray, np.ndarray], np.ndarray]


@functools.cache
def estimator(method: str) -> Estimator:
    """What estimates the flow (2, H, W) between two frames uint8 (H, W, 3), in float32.

    Args:
        method: of `METHODS["flow"]`, whose parameters it has.
    """
    about = METHODS["flow"][method]
    if method.startswith("raft"):
        return _raft(method, about["updates"])
    import cv2

    cv2.setNumThreads(1)  # the pool's workers are the parallelism
    if method == "dis":
        dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        dis.setVariationalRefinementIterations(about["refinement"])
        dis.setFinestScale(about["finest_scale"])
        dis.setPatchStride(about["patch_stride"])
        calculate: Any = dis.calc
    else:
        contributed: Any = cv2.optflow
        calculate = contributed.DualTVL1OpticalFlow.create().calc

    def estimate(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        one, two = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second))
        return calculate(one, two, None).transpose(2, 0, 1)

    return estimate


def _raft(method: str, updates: int) -> Estimator:
    import torch
    from torch.nn import functional as F

    from pretrain.third_party import flow_network

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = flow_network(method).to(device).eval()

    @torch.inference_mode()
    def estimate(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        height, width = first.shape[:2]
        pair = torch.from_numpy(np.stack([first, second])).to(device).permute(0, 3, 1, 2)
        pair = F.pad(pair.float() / 127.5 - 1, (0, -width % 8, 0, -height % 8), mode="replicate")
        found = network(pair[:1], pair[1:], num_flow_updates=updates)[-1]
        return found[0, :, :height, :width].float().cpu().numpy()

    return estimate


# ---- levels


def choose_bound(flow: np.ndarray, width: int, height: int) -> float:
    """The bound with which a clip's flow (T, 2, H, W) is stored.

    20 pixels in frames of 224, in proportion: what networks are shown. Faster motion has up to four
    times as much room, and coarser levels.
    """
    usual = 20 * min(width, height) / 224
    return float(min(max(usual, float(np.abs(flow).max())), 4 * usual))


def to_levels(flow: np.ndarray, bound: float) -> np.ndarray:
    """Flow in pixels as bytes; what is beyond the bound is clipped."""
    scaled = np.rint(flow.astype(np.float32) * np.float32(LEVELS / bound))
    return (np.clip(scaled, -LEVELS, LEVELS) + ZERO).astype(np.uint8)


def to_pixels(levels: np.ndarray, bound: float) -> np.ndarray:
    """Levels as flow in pixels, float32."""
    return (levels.astype(np.float32) - ZERO) * np.float32(bound / LEVELS)


def encode_levels(levels: np.ndarray) -> bytes:
    """Levels (T, 2, H, W) as an MP4 of frames (2 H, W) that decode to the same bytes."""
    times, _, height, width = levels.shape
    target = io.BytesIO()
    bitexact = {"fflags": "+bitexact"}
    with av.open(target, "w", format="mp4", container_options=bitexact) as container:
        # How long a frame is shown says nothing: frames are found by their number.
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, 2 * height, "gray"
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        stream.options = {"preset": PRESET, "qp": "0", "x264-params": X264}
        for picture in levels.reshape(times, 2 * height, width):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="gray")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target.getvalue()


def estimate_flow(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]], estimate: Estimator
) -> np.ndarray:
    """Flow float16 (T, 2, H, W) of pairs of frames; what is not finite becomes 0."""
    flows = [estimate(*pair).astype(np.float16) for pair in pairs]
    return np.nan_to_num(np.stack(flows), posinf=0.0, neginf=0.0)
