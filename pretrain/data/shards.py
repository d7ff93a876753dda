"""Packed shards -> samples, in an order that is a pure function of (seed, epoch).

Training is one endless stream of positions. Position p is epoch p // n and place p % n in that
epoch's permutation, so every epoch holds every clip exactly once, batches never change size, and a
resumed run needs one number: how many positions it has consumed.
"""

import contextlib
import copy
import hashlib
import itertools
import os
import re
import signal
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from pretrain.data.annotations import line_of
from pretrain.data.columns import Clips
from pretrain.data.decode import (
    DecodeError,
    check_decoder,
    crop_resize,
    decode_frames,
    read_frames,
)
from pretrain.data.flow import to_pixels
from pretrain.data.index import load_index, refuse_part
from pretrain.data.near_list import read_pairs, unmatched
from pretrain.data.poses import crop_pose, read_array
from pretrain.data.remote import MOST_LANES, ReadAhead, Remote, Unreachable
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
from pretrain.data.shared import shared_array
from pretrain.data.sources import Source
from pretrain.data.transforms import Augment, pose_columns
from pretrain.files import is_file, open_regular
from pretrain.names import counted, for_screen
from pretrain.spec import FLOW_LEVELS, FLOW_ZERO, InputSpec, Joints, Stream


class Pack:
    """Random access to the clips of a packed folder.

    Attributes:
        folder: where it lies.
        name: what the user called the data, for messages; by default the folder.
        remote: where its shards come from, if it lies far away; `folder` is then the cache's.
        decoder: of frames, as `read_frames` takes it.
        index: the content of index.json.
        classes: label names, sorted; a label's number is its place here.

    Raises:
        ValueError: no pack there, its files are not those the index names, a line about a clip
            cannot be true, or the decoder is not installed.
    """

    def __init__(
        self, folder: str | Path, name: str | None = None, remote: Remote | None = None,
        decoder: str = "pyav",
    ):  # fmt: skip
        self.folder, self.remote, self.decoder = Path(folder), remote, decoder
        check_decoder(decoder)
        self.name = name or str(folder)
        self.index = load_index(self.folder)
        self.classes: list[str] = self.index["classes"]
        refuse_part(self.index, self.name)
        if not self.index["num_clips"]:
            raise ValueError(f"{self.name} is a pack without a single clip")
        self._clips = Clips(self.folder, self.index)
        for shard in [] if remote else self.index["shards"]:
            path = self.folder / shard["name"]
            size = os.path.getsize(path) if os.path.isfile(path) else -1
            if size != shard["bytes"]:
                raise ValueError(
                    f"{path} {'is missing' if size < 0 else f'has {size} bytes'}, the index says "
                    f"{shard['bytes']}: pack again"
                )

    def __reduce__(self) -> tuple:
        # Another process maps the same files.
        return Pack, (self.folder, self.name, self.remote, self.decoder)

    def __len__(self) -> int:
        return len(self._clips)

    def record(self, sample: int) -> dict:
        """The index entry of one clip; its fields are listed in `pretrain/data/index.py`.

        Raises:
            ValueError: it has changed on the disk, or cannot be true.
        """
        return self._clips.row(sample)

    def records(self) -> Iterator[dict]:
        """All index entries, in sample order."""
        return (self.record(i) for i in range(len(self)))

    def rates(self) -> np.ndarray:
        """Frames a second of up to 64 of its clips."""
        some = np.linspace(0, len(self) - 1, min(len(self), 64)).astype(int)
        return np.array([self.record(int(i))["fps"] for i in some])

    def rate(self) -> float:
        """Frames a second: the median of `rates`."""
        return float(np.median(self.rates()))

    def column(self, name: str) -> np.ndarray:
        """What all clips have of a name, (len(self),); see `pretrain/data/columns.py`."""
        return self._clips.columns[name]

    def near_duplicates(self) -> np.ndarray | None:
        """Pairs of samples (K, 2) that show nearly the same; None: it was not looked for any.

        Those that a person struck out are left out, see `pretrain/data/near_list.py`.

        Raises:
            ValueError: their list has changed on the disk, or cannot be true.
        """
        about = self.index.get("near_duplicates")
        return about and read_pairs(self.folder, about, len(self))

    def struck_in_vain(self) -> str:
        """A sentence on struck-out pairs that are no near-duplicates, if there are any.

        Raises:
            ValueError: as of `near_duplicates`.
        """
        about = self.index.get("near_duplicates")
        return unmatched(self.folder, about, len(self)) if about else ""

    @property
    def address(self) -> str:
        """What opens it again as `--data`."""
        return self.remote.address if self.remote else str(self.folder)

    @property
    def streams(self) -> tuple[str, ...]:
        """What there is of clips: "rgb" of each, and "flow" and "pose" where there are any."""
        frames = ("rgb",) * (self._alone < len(self))
        return (*frames, *self.index.get("streams", {}))

    @property
    def _alone(self) -> int:
        """How many clips are poses without frames."""
        alone = self.index.get("streams", {}).get("pose", {}).get("alone", 0)
        return alone if type(alone) is int else 0

    def check_streams(self, ids: np.ndarray, spec: InputSpec, who: str = "this backbone") -> None:
        """Refuse a backbone if a clip lacks a stream that it takes, or has another kind of it.

        Args:
            ids: the samples that it is to be shown.
            spec: the clip that it takes.
            who: what it is called in the message.

        Raises:
            ValueError: naming the command that adds the stream, or the first clip that is wrong.
        """
        refuse_missing_streams(spec, self.streams, self.name, who)
        more = [name for name in spec.streams if name != "rgb" or self._alone]
        # Clips of one kind have the same streams, made in the same way: one of each is looked at.
        first = np.unique(self.column("kind")[ids], return_index=True)[1] if more else ()
        for record in (self.record(ids[i]) for i in sorted(first)):
            streams = record.get("streams", {})
            clip = f"clip {record['key']} ({for_screen(record['source'])})"
            if "rgb" in more and "main" in record:
                raise ValueError(f"{clip} is of poses alone, and {who} takes rgb: leave it out")
            others = [name for name in more if name != "rgb"]
            for name in others:
                if name not in streams:
                    why = "a single picture" if record["frames"] == 1 else "see refused.jsonl"
                    raise ValueError(
                        f"{clip} has no {name} ({why}), which {who} takes: leave such files out"
                    )
            made = {n: streams[n]["skeleton" if n == "pose" else "method"] for n in others}
            spec.refuse_other_kinds(made, f"{clip}: {who}")
            for name, joints in spec.streams.items():
                if isinstance(joints, Joints):
                    wanted, entry = pose_columns(joints), streams[name]
                    if not {*wanted} <= {*entry["columns"]} or entry["joints"] != joints.joints:
                        raise ValueError(
                            f"{clip} has {entry['joints']} joints with "
                            f"{', '.join(entry['columns'])}, and {who} takes "
                            f"{joints.joints} with {', '.join(wanted)}"
                        )

    def read(self, record: dict, stream: str = "rgb") -> bytes:
        """The bytes of a clip's .mp4, or of the member of another stream of it."""
        place = record if stream == "rgb" else record["streams"][stream]
        shard = self.index["shards"][record["shard"]]
        with self.remote.open(shard) if self.remote else open_regular(self._shard(record)) as file:
            file.seek(place["offset"])
            return file.read(place["bytes"])

    def shards_of(self, ids: np.ndarray) -> np.ndarray:
        """The numbers of the shards in which samples lie."""
        return self.column("shard")[ids]

    def _shard(self, record: dict) -> Path:
        return self.folder / self.index["shards"][record["shard"]]["name"]

    @contextlib.contextmanager
    def _blaming(self, record: dict, data: bytes, sha256: str) -> Iterator[None]:
        """Say of bytes that cannot be decoded whether they are still those that were packed."""
        try:
            yield
        except DecodeError as error:
            if hashlib.sha256(data).hexdigest() == sha256:
                raise
            then = "start again" if self.remote else "pack again"
            raise DecodeError(
                f"{self._shard(record)} has changed on the disk since it was packed: delete that "
                f"file and {then} ({error})"
            ) from error

    def frames(self, record: dict, indices: np.ndarray) -> Tensor:
        """Frames of a clip by number, uint8 (len(indices), H, W, 3); see `read_frames`."""
        if "main" in record:
            raise DecodeError("a recording of poses alone has no frames")
        data = self.read(record)
        with self._blaming(record, data, record["sha256"]):
            return read_frames(data, indices, (record["width"], record["height"]), self.decoder)

    def levels(self, record: dict, indices: np.ndarray) -> Tensor:
        """Flow at frames by number, uint8 (len(indices), 2, H, W); see `pretrain/data/flow.py`.

        The last frame, behind which there is no motion, has the flow of the one before.
        """
        entry, size = record["streams"]["flow"], (record["width"], 2 * record["height"])
        data = self.read(record, "flow")
        with self._blaming(record, data, entry["sha256"]):
            numbers = np.minimum(indices, record["frames"] - 2)
            planes = decode_frames(data, numbers, size, grey=True)
        return torch.from_numpy(planes.reshape(len(planes), 2, -1, record["width"]))

    def flow(self, record: dict, indices: np.ndarray) -> Tensor:
        """`levels` as motion in pixels of the packed frame, float32."""
        levels = self.levels(record, indices).numpy()
        return torch.from_numpy(to_pixels(levels, record["streams"]["flow"]["bound"]))

    def poses(self, record: dict, indices: np.ndarray) -> Tensor:
        """Joints at frames by number, float32 (len(indices), P, J, K), K as `columns` of the entry.

        See `pretrain/data/poses.py`; u and v are pixels of the packed frame.
        """
        entry = record["streams"]["pose"]
        data = self.read(record, "pose")
        shape = (record["frames"], entry["people"], entry["joints"], len(entry["columns"]))
        with self._blaming(record, data, entry["sha256"]):
            try:
                values = read_array(data)
            except ValueError as error:
                raise DecodeError(str(error)) from error
            if values.shape != shape or values.dtype != np.float32:
                raise DecodeError(f"poses of {values.dtype} {values.shape}, not float32 {shape}")
            if not np.isfinite(values).all():
                raise DecodeError("poses with a joint that is nowhere")
        return torch.from_numpy(values[indices])

    def clip(self, record: dict, indices: np.ndarray, spec: InputSpec) -> dict[str, Tensor]:
        """What a backbone takes of a clip at frames by number: `frames`, `levels`, `poses`."""
        read = {"rgb": self.frames, "flow": self.levels, "pose": self.poses}
        return {name: read[name](record, indices) for name in spec.streams}

    def where(self, **wanted: str) -> str:
        """Where something stands in the list of the clips, `LIST:LINE`; else the data's name.

        Args:
            wanted: as `pretrain.data.annotations.line_of` takes it.
        """
        line = line_of(Path(self.name), wanted) if is_file(self.name) else None
        return f"{self.name}:{line}" if line else self.name

    def split(self, name: str) -> np.ndarray:
        """Sample ids of one split, "all" for everything.

        Raises:
            ValueError: there is no such split.
        """
        about = f"split-{self.index['clips_sha256'][:16]}"
        if name == "all":
            size, make = len(self), lambda: np.arange(len(self))
            return shared_array(f"{about}-all", 0, size, make)
        if name not in self._clips.splits:
            raise no_split(self.name, name, self.index["splits"])
        number = self._clips.splits.index(name)
        chosen = self.column("split") == number
        size, make = int(np.count_nonzero(chosen)), lambda: np.flatnonzero(chosen)
        return shared_array(f"{about}-{number}", 0, size, make)

    def split_if_any(self, name: str) -> np.ndarray:
        """`split`; data without splits are used whole."""
        return self.split(name if self.index["splits"] else "all")


_ADDS = {
    "rgb": "these are poses without videos; name the videos in a column path of the list",
    "flow": "muybridge pack --data VIDEOS --out FOLDER --flow dis adds it, also to a "
    "pack that is there; then give that folder",
    "pose": "muybridge pack --data VIDEOS --out FOLDER --pose blazepose adds it, and "
    "keeps poses that a column pose of a list names; then give that folder",
}


def crop_clip(
    parts: dict[str, Tensor], record: dict, box: tuple[int, int, int, int], spec: InputSpec
) -> dict[str, Tensor]:
    """Cut one box out of every stream of a clip and scale it to what a backbone takes.

    Args:
        parts: of `Pack.clip`, or some of its frames.
        record: the clip's index entry.
        box: left, top, width and height, pixels of the packed frame.
        spec: the clip that the backbone takes.

    Returns:
        By stream: "rgb", uint8 (3, T, size, size); "flow", uint8 (2, T, size, size), levels of the
        backbone's bound; "pose", float32 (K, T, P, J), see `pretrain.spec.Joints`. Of more people
        than it takes these are those who are seen most.
    """
    clip = {}
    for name, stream in spec.pictures.items():
        if name == "flow":
            bound = record["streams"]["flow"]["bound"]
            clip[name] = crop_flow(parts[name], bound, box, spec.size, stream)
        else:
            clip[name] = crop_resize(parts[name], box, spec.size, stream.interpolation)
    for name, joints in spec.streams.items():
        if isinstance(joints, Joints):
            columns = record["streams"][name]["columns"]
            clip[name] = _crop_joints(parts[name], columns, box, spec.size, joints)
    return clip


def _crop_joints(
    values: Tensor, columns: list[str], box: tuple[int, int, int, int], size: int, stream: Joints
) -> Tensor:
    """Joints (T, P, J, K) as a backbone takes them in a crop: its K, of its number of people."""
    cropped = torch.from_numpy(crop_pose(values.numpy(), columns, box, (size, size)))
    chosen = cropped[:, : stream.people, :, [columns.index(c) for c in pose_columns(stream)]]
    lacking = stream.people - chosen.shape[1]
    return F.pad(chosen, (0, 0, 0, 0, 0, lacking)).permute(3, 0, 1, 2).contiguous()


def crop_flow(
    levels: Tensor, bound: float, box: tuple[int, int, int, int], size: int, stream: Stream
) -> Tensor:
    """Cut one box out of flow and scale it, its values too.

    Args:
        levels: uint8 (T, 2, H, W), as `Pack.levels` gives them.
        bound: pixels of the packed frame for which 127 levels stand.
        box: left, top, width and height.
        size: side of the result, pixels.
        stream: what the backbone takes.

    Returns:
        Levels uint8 (2, T, size, size), of which 127 stand for the bound of `stream`; what exceeds
        it is clipped.
    """
    x, y, w, h = box
    flow = levels[:, :, y : y + h, x : x + w].float().sub_(FLOW_ZERO)
    if (w, h) != (size, size):
        flow = F.interpolate(flow, (size, size), mode=stream.interpolation, antialias=True)
    # From levels of one bound, pixels of the frame, to levels of the other, pixels of the crop.
    scale = torch.tensor([size / w, size / h]) * (bound / stream.bound)
    flow = (flow * scale.view(1, 2, 1, 1)).round_().clamp_(-FLOW_LEVELS, FLOW_LEVELS)
    return flow.add_(FLOW_ZERO).to(torch.uint8).transpose(0, 1).contiguous()


def refuse_missing_streams(spec: InputSpec, has: Collection[str], data: str, who: str) -> None:
    """Refuse a backbone that takes a stream which data do not have.

    Args:
        spec: the clip that it takes.
        has: names of the data's streams.
        data: as the user named them.
        who: what the backbone is called in the message.

    Raises:
        ValueError: naming the command that adds the stream.
    """
    for name in spec.streams:
        if name not in has:
            raise ValueError(
                f"{who} takes {' and '.join(spec.streams)}, and {for_screen(data)} has "
                f"{' and '.join(has)}, no {name}: {_ADDS[name]}"
            )


def refuse_raw_streams(listed: list[Source], spec: InputSpec, source: str, who: str) -> None:
    """`refuse_missing_streams` of raw data, before they are packed.

    Args:
        listed: videos and images; none: nothing is known yet.
        spec: the clip that the backbone takes.
        source: of the data, as the user named it.
        who: what the backbone is called in the message.

    Raises:
        ValueError: no video has a stream that it takes.
    """
    frames = {"pose" if s.kind == "pose" else "rgb" for s in listed}
    more = {name for s in listed for name in s.beside}
    if listed:
        refuse_missing_streams(spec, sorted(frames | more, reverse=True), source, who)


def no_split(source: str, split: str, known: Iterable[str]) -> ValueError:
    """That data have no clip of a split, and which splits they have."""
    names = ", ".join(sorted(known)) or "no splits at all: give --split all"
    return ValueError(f"{source} has no clip of split {split!r}; it has {names}")


def fingerprint(packs: list[Pack]) -> str:
    """What identifies the clips of one pack, or of several together."""
    prints = "".join(pack.index["fingerprint"] for pack in packs)
    return prints if len(packs) == 1 else hashlib.sha256(prints.encode()).hexdigest()


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


Batch = TypeVar("Batch")


class Positions:
    """The positions that one process reads, micro-batch by micro-batch.

    The global batch of step s is positions [s G, (s + 1) G) whatever the number of processes and of
    accumulation passes; pass a of process r takes the r-th part of the a-th part of it.

    Args:
        start_step: the first step to read for.
        num_steps: the step to stop before.
        batch: positions in one micro-batch of one process.
        accumulate: micro-batches in a step.
        world: number of processes.
        rank: this process.
        lane: of a position, where it lies among the sub-lists of an epoch that is streamed: the
            process then takes its part of the global batch in that order, so that it reads few of
            the sub-lists; None: nothing is streamed.
    """

    def __init__(
        self, start_step: int, num_steps: int, batch: int, accumulate: int, world: int, rank: int,
        lane: Callable[[int], float] | None = None,
    ):  # fmt: skip
        self.steps = range(start_step, num_steps)
        self.batch, self.accumulate, self.world, self.rank = batch, accumulate, world, rank
        self.lane = lane

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            if self.lane:
                own = self.batch * self.accumulate
                whole = range(step * own * self.world, (step + 1) * own * self.world)
                mine = sorted(whole, key=self.lane)[self.rank * own : (self.rank + 1) * own]
                yield from (mine[i : i + self.batch] for i in range(0, own, self.batch))
                continue
            for a in range(self.accumulate):
                part = (step * self.accumulate + a) * self.world + self.rank
                yield list(range(part * self.batch, (part + 1) * self.batch))

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate


def collate_views(items: list[dict]) -> dict:
    """Stack training items: views of a clip become neighbouring rows, `clips` says whose."""
    names = [name for name, value in items[0].items() if isinstance(value, Tensor)]
    batch: dict[str, Any] = {name: torch.cat([item[name] for item in items]) for name in names}
    batch["samples"] = [item["sample"] for item in items]
    views = len(items[0][names[0]])  # every tensor of an item has one row a view
    batch["clips"] = torch.tensor(batch["samples"]).repeat_interleave(views)
    batch["errors"] = [error for item in items for error in item["errors"]]
    if get_worker_info():
        # Where the others see it, as torch's own collation does: left to the thread that sends it,
        # a failure would lose the batch, and who waits for it would wait for ever.
        for name in [*names, "clips"]:
            batch[name].share_memory_()
    return batch


def start_worker(_: int) -> None:
    """Let signals be the main process's business: it saves a checkpoint, workers just go on."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


class WorkerKilled(ValueError):
    """A process that decodes clips was killed; the message says how and what to do."""


class NoSharedMemory(WorkerKilled):
    """A process that decodes clips can hand none over; the message says why and what to do."""


def _start(loader: DataLoader) -> Iterator:
    """Start the processes of a loader, if it has any."""
    batches = iter(loader)
    if loader.num_workers and threading.current_thread() is threading.main_thread():
        # torch's handler raises as soon as a worker dies, in the middle of a step or of a save.
        # Without it, the next batch that is waited for says so.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches


def _next(batches: Iterator[Batch]) -> Batch:
    """The next batch of what `_start` returned.

    Raises:
        NoSharedMemory: one of its processes finds no room in the memory that it shares with this
            one.
        Unreachable: clips far away cannot be had.
        WorkerKilled: one of its processes is dead.
    """
    try:
        return next(batches)
    except Unreachable as error:  # of another process, whose traceback is no help
        raise Unreachable(str(error).strip().rpartition("Unreachable: ")[2]) from error
    except (RuntimeError, OSError, EOFError) as error:
        if full := re.search(r"</?torch_\w+>.*: ([^:\n]+) \(\d+\)", str(error)):
            raise NoSharedMemory(
                f"the memory that decoding processes share (/dev/shm) takes no batch: {full[1]}. "
                "Give --num-workers 0 or a smaller --batch-size, or make it larger (a container: "
                "--shm-size), and start the same command again"
            ) from error
        workers = getattr(batches, "_workers", [])
        deadline = time.monotonic() + 1  # a pipe breaks before its process is known to have ended
        while (
            not (ends := [w.exitcode for w in workers if w.exitcode])
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        if not ends:
            raise
        how = signal.Signals(-ends[0]).name if ends[0] < 0 else f"exit status {ends[0]}"
        raise WorkerKilled(
            f"a process that decodes clips was killed ({how}); most often the machine ran out of "
            "memory. Give fewer --num-workers (0: none) or make memory free, and start the same "
            "command again"
        ) from error


class TrainBatches:
    """The batches of the whole rest of a run, as `collate_views` makes them.

    If a process that loads them is killed, another one takes over, once, so that the step at hand
    can be ended and saved; this process itself, if there is no room for handing them over.

    Attributes:
        lost: that it happened, or that data far away cannot be had, in words; empty before.
        waited: seconds spent in waiting for batches.
        errors: clips of the batches given that could not be decoded, and were replaced.
    """

    def __init__(self, dataset: TrainClips | Mixture, positions: Positions, num_workers: int):
        self.lost, self.waited = "", 0.0
        self.errors: list[dict[str, str]] = []
        self._positions, self._given, self._num_workers = positions, 0, num_workers
        self._loader = partial(
            DataLoader,
            dataset,
            collate_fn=collate_views,
            worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
        )
        prefetch = 4 if num_workers else None
        self._batches = _start(
            self._loader(batch_sampler=positions, num_workers=num_workers, prefetch_factor=prefetch)
        )
        # Behind the processes: while they were forked there were no threads.
        streamed = isinstance(dataset, TrainClips | Mixture) and dataset.streamed
        self._ahead = ReadAhead(map(_apart(dataset).needs, positions)) if streamed else None
        self._waiting: deque[dict] = deque()

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> dict:
        batch = self._waiting.popleft() if self._waiting else self._load()
        self.errors += batch.pop("errors")
        return batch

    def look_ahead(self, count: int) -> None:
        """Have so many batches, those of the next step, here before they are asked for.

        Only where clips come from far away: the step at hand can then still be saved if the next
        one cannot be taken, which `lost` says.
        """
        if not self._ahead or self.lost:
            return
        try:
            while len(self._waiting) < count:
                self._waiting.append(self._load())
        except Unreachable as error:
            self.lost = str(error)
            told = "data far away cannot be had: saving at the end of this step ..."
            print(told, file=sys.stderr, flush=True)

    def _load(self) -> dict:
        before = time.monotonic()
        try:
            batch = _next(self._batches)
        except WorkerKilled as error:
            if self.lost:
                raise
            self.lost = str(error)
            alone = isinstance(error, NoSharedMemory)
            what = "hands none over" if alone else "was killed"
            told = f"a process that decodes clips {what}: saving at the end of this step ..."
            print(told, file=sys.stderr, flush=True)
            self.close()
            rest = itertools.islice(self._positions, self._given, None)
            workers = 0 if alone else 1
            self._batches = _start(
                self._loader(
                    batch_sampler=rest, num_workers=workers, prefetch_factor=workers or None
                )
            )
            batch = _next(self._batches)
        self.waited += time.monotonic() - before
        self._given += 1
        if self._ahead:
            self._ahead.given = self._given
        return batch

    def close(self) -> None:
        """End the processes, and bring nothing more."""
        if self._ahead:
            self._ahead.close()
        # Said in so many words, because an exception on its way out keeps the iterator alive, and
        # Python would then wait at exit for workers that ignore its SIGTERM.
        if isinstance(self._batches, _MultiProcessingDataLoaderIter):
            self._batches._shutdown_workers()


def _apart(dataset: TrainClips | Mixture) -> TrainClips | Mixture:
    """The same clips, for a thread: the order of an epoch, which is kept, is its own."""
    other = copy.copy(dataset)
    if isinstance(other, Mixture):
        other.parts = [copy.copy(part) for part in other.parts]
    return other


def train_batches(
    dataset: TrainClips | Mixture, positions: Positions, num_workers: int
) -> contextlib.closing[TrainBatches]:
    """Load the batches of the whole rest of a run, inside `with`."""
    return contextlib.closing(TrainBatches(dataset, positions, num_workers))


def eval_loader(
    dataset: EvalClips, batch_size: int, num_workers: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Batches of (sample ids (B,), views {stream: (B, V, C, T, H, W)}) in the order of the ids.

    The global generator is left alone: a score while a model trains changes no later step.

    Raises:
        WorkerKilled: a process that decodes was killed.
    """
    batches = _start(
        DataLoader(
            dataset,
            batch_size=batch_size,
            num_workers=num_workers,
            worker_init_fn=start_worker,
            generator=torch.Generator(),
        )
    )
    with contextlib.suppress(StopIteration):
        while True:
            yield _next(batches)
