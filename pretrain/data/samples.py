"""Clips as training and evaluation draw them from a pack.

Training is one endless stream of positions. Position p is epoch p // n and place p % n in that
epoch's permutation, so every epoch holds every clip exactly once, batches never change size, and a
resumed run needs one number: how many positions it has consumed.
"""

import sys
import zlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pretrain.data.decode import DecodeError
from pretrain.data.remote import MOST_LANES, Remote
from pretrain.data.sampling import (
    MIXTURE,
    counter_rng,
    dense_indices,
    epoch_order,
    even_indices,
    multi_scale_box,
    random_resized_box,
    spread_starts,
    test_boxes,
    test_indices,
    uniform_indices,
    window_order,
)
from pretrain.data.shards import Pack, crop_clip
from pretrain.data.shared import shared_array
from pretrain.data.transforms import Augment
from pretrain.names import counted, for_screen
from pretrain.spec import InputSpec

# (rng, index entry of the clip, numbers of the frames drawn) -> whatever else a training step wants
# to have of one view, by name: token numbers of a mask, those of a caption, labels. All views give
# tensors of the same shapes.
Describe = Callable[[np.random.Generator, dict, np.ndarray], dict[str, Tensor]]


KEEP_DECODED = 1 << 30  # bytes of decoded frames that a loading process may keep


def _fit_decoded(pack: Pack, ids: np.ndarray, spec: InputSpec) -> bool:
    """Whether these clips, decoded, take at most `KEEP_DECODED` bytes; large data answer early."""
    total, values = 0.0, sum(stream.channels for stream in spec.pictures.values())
    for start in range(0, len(ids), 2**20):
        some = ids[start : start + 2**20]
        sides = (pack.column(name)[some].astype(float) for name in ("frames", "height", "width"))
        total += np.prod([*sides], axis=0).sum() * values
        if total > KEEP_DECODED:
            return False
    return True


def _refuse_pictures(pack: Pack, ids: np.ndarray, spec: InputSpec) -> None:
    """Raise ValueError if there are single pictures, and the mean frame is subtracted."""
    if not spec.subtracts_mean:
        return
    pictures = np.flatnonzero(pack.column("frames")[ids] == 1)
    if len(pictures):
        record = pack.record(ids[pictures[0]])
        raise ValueError(
            f"clip {record['key']} ({for_screen(record['source'])}) is a single picture, of which "
            "this backbone's temporal-mean subtraction leaves nothing: choose another backbone, or "
            "leave pictures out"
        )


def warn_of_clips(pack: Pack, ids: np.ndarray, spec: InputSpec) -> None:
    """Say on standard error if a backbone would see little but repeats, or one single clip.

    Single pictures are repeated on purpose and are not counted.
    """
    if len(ids) == 1:
        _warn("there is one single clip: every batch shows it, and nothing general is learned")
    some = ids[:: max(1, len(ids) // 1000)]  # enough to estimate a fraction
    lengths = [n for n in pack.column("frames")[some].tolist() if n > 1]
    if not lengths:
        return
    shown = [draw_frames(n, spec, counter_rng(0, i)) for i, n in enumerate(lengths)]
    repeated = 1 - float(np.mean([len(np.unique(indices)) for indices in shown])) / spec.frames
    if repeated > 0.5 or np.median(lengths) < spec.frames:
        _warn(
            f"{repeated:.0%} of what the model sees is repeated frames: it is shown {spec.frames} "
            f"frames at a time, {spec.pace}, and half of the clips have {int(np.median(lengths))} "
            "frames or fewer. Give fewer frames or a smaller stride, or pack longer clips"
        )


def _warn(what: str) -> None:
    print(f"warning: {what}", file=sys.stderr, flush=True)


def draw_frames(
    num_frames: int, spec: InputSpec, rng: np.random.Generator, span: float = 1.0
) -> np.ndarray:
    """Frame numbers of one training clip of a video of `num_frames`; `span` as in `Augment`.

    Uniform sampling of pixels is VideoMAE's, number for number, which leaves out what is no whole
    part and shows a short clip as a still. Recordings of joints are often as short as the clips of
    their networks: of them it is `even_indices`.
    """
    if spec.stride:
        return dense_indices(num_frames, spec.frames, spec.stride, rng)
    if "pose" in spec.streams:
        return even_indices(num_frames, spec.frames, rng, span)
    return uniform_indices(num_frames, spec.frames, rng)


class TrainClips(Dataset):
    """Augmented views of clips, by position in the endless stream.

    Args:
        pack: the clips.
        ids: the samples to train on.
        spec: the clip the model wants.
        seed: of order, frames, crops and masks.
        views: crops taken from one decode (repeated augmentation).
        spread: give every view other frames, see `spread_starts`, which have to be decoded too;
            else the views of a clip share theirs.
        scales: crop sides as fractions of the short side, see `multi_scale_box`; None:
            `random_resized_box`.
        describe: what else a view has: its mask, or its caption.
        augment: what is done to a view before and after its crop; None: nothing.

    Decoded frames are kept in memory, by every loading process for itself, if those of all clips
    fit in `KEEP_DECODED` bytes: small data are then decoded once, not once in every epoch.
    """

    def __init__(
        self,
        pack: Pack,
        ids: np.ndarray,
        spec: InputSpec,
        seed: int,
        views: int,
        scales: tuple[float, ...] | None,
        describe: Describe,
        augment: Augment | None = None,
        spread: bool = False,
    ):
        pack.check_streams(ids, spec)
        _refuse_pictures(pack, ids, spec)
        if augment:
            augment.check(spec)
        self.pack, self.ids, self.spec, self.seed = pack, ids, spec, seed
        self.views, self.scales, self.describe, self.augment = views, scales, describe, augment
        self.spread = spread
        self._order: tuple[int, np.ndarray] = (-1, ids)
        self._shards = pack.shards_of(ids) if pack.remote else None
        about = "" if self._shards is None else f"-{zlib.crc32(self._shards.tobytes())}"
        self._order_name = f"order-{seed}-{len(ids)}{about}"
        self._decoded: dict[int, dict[str, Tensor]] = {}
        self._keep = _fit_decoded(pack, ids, spec)

    def sample_at(self, epoch: int, place: int) -> int:
        """The sample at a place of an epoch's order, which begins again after the last."""
        return int(self.ids[self._at(epoch, place)])

    def _at(self, epoch: int, place: int) -> int:
        if self._order[0] != epoch:
            self._order = (epoch, self._order_of(epoch))
        return int(self._order[1][place % len(self.ids)])

    def _order_of(self, epoch: int) -> np.ndarray:
        def make() -> np.ndarray:
            if self.pack.remote is None or self._shards is None:
                return epoch_order(self.seed, epoch, len(self.ids))
            return window_order(self.seed, epoch, self._shards, self.pack.remote.lanes)

        dtype = np.uint32 if len(self.ids) < 2**32 else np.int64
        return shared_array(self._order_name, epoch, len(self.ids), make, dtype)

    @property
    def streamed(self) -> bool:
        """Whether shards come from far away."""
        return self.pack.remote is not None

    def lane(self, position: int) -> float:
        """Where in [0, 1) a position lies among the sub-lists that take turns."""
        lanes = self.pack.remote.lanes if self.pack.remote else MOST_LANES
        return position % len(self.ids) % lanes / lanes

    def needs(self, positions: Iterable[int]) -> list[tuple[Remote, dict]]:
        """The shards far away that positions want."""
        if self.pack.remote is None or self._shards is None:
            return []
        places = [self._at(*divmod(position, len(self.ids))) for position in positions]
        numbers = np.unique(self._shards[places])
        return [(self.pack.remote, self.pack.index["shards"][number]) for number in numbers]

    def __getitem__(self, position: int) -> dict:
        epoch, place = divmod(position, len(self.ids))
        errors: list[dict[str, str]] = []
        # A broken clip is replaced by the next in the same order, never by a random one: then
        # resuming and other numbers of processes still see the same batches.
        for attempt in range(min(len(self.ids), 20)):
            sample = self.sample_at(epoch, place + attempt)
            record = self.pack.record(sample)
            try:
                return self._views(record, epoch, sample) | {"sample": sample, "errors": errors}
            except (DecodeError, OSError) as error:
                errors.append(
                    {"key": record["key"], "source": record["source"], "reason": str(error)}
                )
        raise ValueError(
            f"{counted(len(errors), 'clip')} in a row cannot be decoded, the last one: {errors[-1]}"
        )

    def _clip(self, record: dict, sample: int, indices: np.ndarray) -> dict[str, Tensor]:
        if not self._keep:
            return self.pack.clip(record, indices, self.spec)
        if sample not in self._decoded:
            everything = np.arange(record["frames"])
            self._decoded[sample] = self.pack.clip(record, everything, self.spec)
        chosen = torch.from_numpy(indices)
        return {name: part[chosen] for name, part in self._decoded[sample].items()}

    def _views(self, record: dict, epoch: int, sample: int) -> dict:
        rngs = [counter_rng(self.seed, view, epoch, sample) for view in range(self.views)]
        span = self.augment.span if self.augment else 1.0
        indices = draw_frames(record["frames"], self.spec, rngs[0], span)
        starts = [indices]
        if self.spread:
            starts = spread_starts(indices, record["frames"], self.views)
        whole = self._clip(record, sample, np.concatenate(starts))
        width, height = record["width"], record["height"]
        clips, others = [], []
        for view, rng in enumerate(rngs):
            shown = starts[view % len(starts)]
            parts = _part(whole, view % len(starts), self.spec.frames)
            if self.augment and "rgb" in parts:
                parts["rgb"] = self.augment.before_crop(parts["rgb"], rng, len(parts) == 1)
            if self.scales is None:
                box = random_resized_box(width, height, rng)
            else:
                box = multi_scale_box(width, height, self.scales, rng)
            clip = crop_clip(parts, record, box, self.spec)
            others.append(self.describe(rng, record, shown))
            clips.append(self.augment(clip, rng, self.spec) if self.augment else clip)
        return {
            **{name: torch.stack([clip[name] for clip in clips]) for name in clips[0]},
            **{name: torch.stack([other[name] for other in others]) for name in others[0]},
        }


def _part(whole: dict[str, Tensor], number: int, frames: int) -> dict[str, Tensor]:
    """So many frames of every stream, the given number of times as many behind the first."""
    return {name: x[number * frames : (number + 1) * frames] for name, x in whole.items()}


class Mixture(Dataset):
    """Training clips of several data sets, a fixed number of each in every global batch.

    The batch of step s holds, of part i, the positions [s counts[i], (s + 1) counts[i]) of its own
    endless stream: each part has epochs of its own in which every clip occurs once, and nothing but
    the step decides what a batch holds. The order inside a batch is shuffled, so that processes and
    micro-batches share the parts evenly.

    Args:
        parts: the data sets.
        counts: positions of each in a global batch.
        seed: of the order.
    """

    def __init__(self, parts: list[TrainClips], counts: list[int], seed: int):
        self.parts, self.counts, self.seed = parts, counts, seed
        self._owner = np.repeat(np.arange(len(parts)), counts)
        self._nth = np.concatenate([np.arange(n) for n in counts])
        self._places: tuple[int, np.ndarray] = (-1, self._nth)

    @property
    def streamed(self) -> bool:
        """Whether shards of a part come from far away."""
        return any(part.streamed for part in self.parts)

    def lane(self, position: int) -> float:
        """As `TrainClips.lane`, of the part whose clip it is."""
        part, own = self._own(position)
        return self.parts[part].lane(own)

    def needs(self, positions: Iterable[int]) -> list[tuple[Remote, dict]]:
        """As `TrainClips.needs`, of all parts."""
        own = [self._own(position) for position in positions]
        return [
            need
            for number, part in enumerate(self.parts)
            for need in part.needs([place for other, place in own if other == number])
        ]

    def _own(self, position: int) -> tuple[int, int]:
        """Whose clip is at a position, and where in that part's own stream."""
        step, place = divmod(position, len(self._owner))
        if self._places[0] != step:
            order = counter_rng(self.seed, step, purpose=MIXTURE).permutation(len(self._owner))
            self._places = (step, order)
        place = self._places[1][place]
        part = self._owner[place]
        return int(part), step * self.counts[part] + int(self._nth[place])

    def __getitem__(self, position: int) -> dict:
        part, own = self._own(position)
        return self.parts[part][own] | {"part": part}


def batch_counts(weights: tuple[float, ...], batch: int) -> list[int]:
    """Clips of a batch from each source of a mixture, by largest remainder; their sum is `batch`.

    Raises:
        ValueError: a weight is not positive, or too small to give one clip.
    """
    total = sum(weights)
    if not all(w > 0 for w in weights):
        raise ValueError(
            f"weights of a mixture have to be positive, not {', '.join(map(str, weights))}"
        )
    exact = [w / total * batch for w in weights]
    counts = [int(x) for x in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_rest[: batch - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        raise ValueError(
            f"weight {weights[counts.index(0)]:g} of {total:g} gives less than one clip in a batch "
            f"of {batch}: raise it or --batch-size"
        )
    return counts


class EvalClips(Dataset):
    """Every clip once, in the views of a test protocol: no randomness at all.

    Args:
        pack: the clips.
        ids: the samples to show, in this order.
        spec: the clip the model wants.
        num_clips: temporal views.
        num_crops: spatial views of each.

    An item is the sample id and, of each stream that the spec takes, its views (num_clips *
    num_crops, C, T, H, W), see `crop_clip`.
    """

    def __init__(
        self, pack: Pack, ids: np.ndarray, spec: InputSpec, num_clips: int, num_crops: int
    ):
        pack.check_streams(ids, spec)
        _refuse_pictures(pack, ids, spec)
        self.pack, self.ids, self.spec = pack, ids, spec
        self.num_clips, self.num_crops = num_clips, num_crops

    def __len__(self) -> int:
        return len(self.ids)

    def _views(self, record: dict) -> list[np.ndarray]:
        return test_indices(record["frames"], self.spec.frames, self.spec.stride, self.num_clips)

    def seconds(self, place: int) -> np.ndarray:
        """When the frames of each temporal view were, seconds of the source: (num_clips, T)."""
        record = self.pack.record(int(self.ids[place]))
        return record["start"] + np.stack(self._views(record)) / record["fps"]

    def __getitem__(self, place: int) -> tuple[int, dict[str, Tensor]]:
        sample = int(self.ids[place])
        record = self.pack.record(sample)
        views = self._views(record)
        try:
            whole = self.pack.clip(record, np.concatenate(views), self.spec)
        except DecodeError as error:
            # A number over a subset would not be the number that was asked for.
            raise ValueError(
                f"clip {record['key']} ({for_screen(record['source'])}) cannot be decoded: "
                f"{error}; pack again"
            ) from error
        boxes = test_boxes(record["width"], record["height"], self.num_crops)
        clips = [
            crop_clip(_part(whole, view, self.spec.frames), record, box, self.spec)
            for view in range(len(views))
            for box in boxes
        ]
        return sample, {name: torch.stack([clip[name] for clip in clips]) for name in clips[0]}
