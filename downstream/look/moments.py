"""The moments of a pack: parts of a few seconds of every clip, and a vector for each.

M moments, D width.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from downstream.features import (
    CODE_VERSION,
    Extraction,
    finish_means,
    keep_computed,
    segment_means,
    show,
    spec_of,
)
from downstream.splits import group_by_source
from downstream.zero_shot import unit
from pretrain.clip import VideoText, video_encoder
from pretrain.data.progress import Bar
from pretrain.data.sampling import test_indices
from pretrain.data.shards import EvalClips, Pack
from pretrain.names import counted
from pretrain.spec import Backbone, InputSpec
from pretrain.weights import weights_hash

LEAST_FRAMES = 4  # of a moment: parts of a slow series of pictures are as long as they have to be
BLOCK = 64  # clips whose vectors are kept in one file, about


@dataclass(frozen=True)
class Moments:
    """Parts of clips, by the name of their video and by time.

    Attributes:
        sample: (M,) the clip in the pack.
        first: (M,) its first frame in the clip.
        stop: (M,) the frame behind its last.
        start: (M,) seconds of the source.
        end: (M,) likewise.
        videos: what the user called each video.
        video: (M,) the number of its video.
    """

    sample: np.ndarray
    first: np.ndarray
    stop: np.ndarray
    start: np.ndarray
    end: np.ndarray
    videos: list[str]
    video: np.ndarray

    def __len__(self) -> int:
        return len(self.sample)

    def only(self, kept: np.ndarray) -> "Moments":
        """Those where `kept` (M,) is True; videos keep their numbers."""
        arrays = ("sample", "first", "stop", "start", "end", "video")
        return replace(self, **{name: getattr(self, name)[kept] for name in arrays})

    def duration(self) -> np.ndarray:
        """The second at which each video's last moment ends, (len(videos),)."""
        last = np.zeros(len(self.videos))
        np.maximum.at(last, self.video, self.end)
        return last


def find_moments(pack: Pack, every: float) -> Moments:
    """Cut every clip into equal parts of about so many seconds.

    Raises:
        ValueError: there are recordings of poses without frames, of which nothing can be shown.
    """
    rows: list[tuple[str, float, int, int, int, float]] = []
    for sample, record in enumerate(pack.records()):
        if "main" in record:
            raise ValueError(
                f"{record['source']} is a recording of poses without frames: nothing of it can be "
                "shown; leave such files out"
            )
        frames, fps = record["frames"], record["fps"]
        parts = min(round(frames / fps / every), frames // LEAST_FRAMES)
        edges = np.linspace(0, frames, max(parts, 1) + 1).round().astype(int).tolist()
        about = record["source"], record["start"], sample
        rows += [(*about, a, b, fps) for a, b in itertools.pairwise(edges)]
    rows.sort()
    sources, *columns = zip(*rows, strict=True)
    begins, samples, first, stop, rates = (np.array(column) for column in columns)
    start, end = (begins + edge / rates for edge in (first, stop))
    videos, video = group_by_source(list(sources))
    return Moments(samples, first, stop, start, end, videos, video)


class MomentClips(EvalClips):
    """One view in time of each of some moments.

    A backbone with a stride sees the frames around the middle of a moment, of a moment that is a
    whole clip as every evaluation does; one without a stride frames spread over the moment.
    """

    def __init__(
        self, pack: Pack, moments: Moments, numbers: np.ndarray, spec: InputSpec, crops: int
    ):
        super().__init__(pack, moments.sample[numbers], spec, 1, crops)
        self.first, self.stop = moments.first[numbers], moments.stop[numbers]

    def __getitem__(self, place: int) -> tuple[int, dict[str, Tensor]]:
        self.window = int(self.first[place]), int(self.stop[place])
        return super().__getitem__(place)

    def _views(self, record: dict) -> list[np.ndarray]:
        first, stop = self.window
        frames, stride, total = self.spec.frames, self.spec.stride, record["frames"]
        if not stride:
            return [first + test_indices(stop - first, frames, 0, 1)[0]]
        if (first, stop) == (0, total):
            return test_indices(total, frames, stride, 1)
        # As wide as the backbone's view, or the moment where that is longer.
        room = max(total - max(frames * stride, stop - first), 0)
        start = min(max((first + stop - frames * stride) // 2, 0), room)
        return [np.minimum(start + stride * np.arange(frames), total - 1)]


def embed_moments(
    model: nn.Module, pack: Pack, moments: Moments, how: Extraction, bar: bool = True
) -> np.ndarray:
    """Unit vectors (M, D) float32 of the moments.

    Of a video-text pair these are places in the joint space. Of another backbone it is the mean
    token, less the mean of all moments: what all have in common makes none like another.

    What was computed is kept block by block by the content of the clips, so an interrupted run goes
    on where it was, and clips that are added leave the vectors of the others as they are.

    Args:
        model: a `Backbone` or a `VideoText`.
        pack: the data.
        moments: of it.
        how: spatial views, batch, precision, and where; `MomentClips` has one view in time.
        bar: show progress.

    Raises:
        ValueError: a clip lacks a stream that the backbone takes, cannot be decoded, or a vector is
            not finite.
    """
    text = isinstance(model, VideoText)
    width = model.arguments["dim"] if isinstance(model, VideoText) else model.embed_dim
    assert isinstance(width, int)
    about = {
        "version": CODE_VERSION,
        "kind": "moments",
        "weights": weights_hash(model),
        "arguments": video_encoder(model).arguments,
        "spec": repr(spec_of(model)),
        "crops": how.num_crops,
        "precision": how.dtype_name,
    }
    rows = []
    with Bar(len(moments), "moments", "moment", bar) as progress:
        for numbers, content in _blocks(pack, moments):
            dataset = MomentClips(pack, moments, numbers, spec_of(model), how.num_crops)
            compute = lambda dataset=dataset: np.concatenate(
                [views.mean(1) for views in show(model, _function(model), dataset, how, None)]
            )
            rows.append(keep_computed(about | {"clips": content}, (len(numbers), width), compute))
            progress.update(len(numbers))
    vectors = np.concatenate(rows)
    finite = np.isfinite(vectors).all(1)
    if not finite.all():
        raise ValueError(
            f"the embeddings of {counted(int((~finite).sum()), 'moment')} are not finite: the "
            "backbone's weights are damaged, or its values overflow in this precision (try "
            "--precision fp32)"
        )
    return unit(vectors if text else vectors - vectors.mean(0)).astype(np.float32)


def _function(model: nn.Module):
    if isinstance(model, VideoText):
        return model.encode_video
    assert isinstance(model, Backbone)
    encoder, grid = model, model.grid
    mean = lambda video: segment_means(encoder.forward_features(video), grid, 1)[:, 0]
    return lambda video: finish_means(model, mean(video))


def _blocks(pack: Pack, moments: Moments) -> Iterator[tuple[np.ndarray, str]]:
    """The numbers of neighbouring moments, and a hash of what they show.

    A block ends behind a clip whose hash says so: a clip more or less changes one block.
    """
    edges = [0, *(np.flatnonzero(np.diff(moments.sample)) + 1).tolist(), len(moments)]
    begin, digest = 0, hashlib.sha256()
    for a, b in itertools.pairwise(edges):
        record = pack.record(int(moments.sample[a]))
        made = {name: entry["sha256"] for name, entry in record.get("streams", {}).items()}
        what = [record["sha256"], made, moments.first[a:b].tolist(), moments.stop[a:b].tolist()]
        content = hashlib.sha256(repr(what).encode()).digest()
        digest.update(content)
        if b == len(moments) or int.from_bytes(content[:4]) % BLOCK == 0:
            yield np.arange(begin, b), digest.hexdigest()
            begin, digest = b, hashlib.sha256()
