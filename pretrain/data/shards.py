"""A pack: what its index says of each clip, and the pixels, flow and joints in its shards."""

import contextlib
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

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
from pretrain.data.lists import line_of
from pretrain.data.poses import crop_pose, read_array
from pretrain.data.remote import Remote
from pretrain.data.shared import shared_array
from pretrain.data.sources import Source
from pretrain.data.transforms import pose_columns
from pretrain.files import is_file, open_regular
from pretrain.names import for_screen
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

    def column(self, name: str) -> np.ndarray:
        """What all clips have of a name, (len(self),); see `pretrain/data/columns.py`."""
        return self._clips.columns[name]

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
            wanted: as `pretrain.data.lists.line_of` takes it.
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
    "flow": "python recipes/pack.py --source VIDEOS --out FOLDER --flow dis adds it, also to a "
    "pack that is there; then give that folder",
    "pose": "python recipes/pack.py --source VIDEOS --out FOLDER --pose blazepose adds it, and "
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
