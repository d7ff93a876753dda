"""The interface of every encoder, `Backbone`, and of its input, `InputSpec`.

A clip has named streams: "rgb", three colours; "flow", two axes of motion; "pose", the joints of
people. B clips, C channels, T frames, H x W pixels; P people of J joints.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from pretrain.names import counted

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Of a clip: 512 frames of 512 x 512, ten times those of the longest published.
MOST_PIXELS = 2**27
MOST_PEOPLE, MOST_JOINTS = 16, 1024
# Optical flow as bytes: 128 is no motion, and 127 levels on either side stand for the bound.
FLOW_ZERO, FLOW_LEVELS = 128, 127

# A batch of clips: one stream, or several by name.
Clip = Tensor | Mapping[str, Tensor]


def flow_bound(size: int) -> float:
    """The motion that optical flow keeps unless told otherwise: 20 pixels at 224 pixels.

    Args:
        size: height and width of the crop, pixels.

    Returns:
        pixels of the crop.
    """
    return 20 * size / 224


@dataclass(frozen=True)
class Stream:
    """How a stream of pictures of a backbone's clip, (B, C, T, H, W), is normalised.

    Attributes:
        mean: per-channel mean of the normalisation, for pixels in [0, 1].
        std: per-channel standard deviation, likewise.
        interpolation: how crops are scaled, "bilinear" or "bicubic", always anti-aliased.
        subtract_mean: whether the clip's mean frame is subtracted (temporal-mean subtraction),
            which removes static backgrounds. In footage of a fixed camera small networks then learn
            from far fewer clips.
        bound: of optical flow: the pixels of the crop that 127 levels stand for; 0: no flow.
        method: of optical flow: what computed the flow that the weights were trained on, such as
            "tvl1"; flow of another method is refused. "": any.

    Raises:
        ValueError: another interpolation; a standard deviation that is not positive, or not one of
            each channel; a bound that is negative or not finite, or no flow and a method.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    subtract_mean: bool = False
    bound: float = 0.0
    method: str = ""

    def __post_init__(self):
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ValueError(
                f"the standard deviations {list(self.std)} do not fit channels of the means "
                f"{list(self.mean)}: give a positive one for each"
            )
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(
                f"interpolation {self.interpolation!r} is neither bilinear nor bicubic"
            )
        if not 0 <= self.bound < math.inf:
            raise ValueError(
                f"a bound of optical flow is a positive number of pixels, not {self.bound}"
            )
        if self.method and not self.bound:
            raise ValueError(f"method {self.method!r:.80} is of optical flow, which has a bound")

    @property
    def channels(self) -> int:
        """Values of a pixel."""
        return len(self.mean)

    def shape(self, frames: int, size: int) -> tuple[int, ...]:
        """Of one clip (C, T, H, W)."""
        return (self.channels, frames, size, size)

    def refuse_layout(self, video: Tensor) -> None:
        """Raise ValueError unless it is (B, C, T, H, W); the message says how to permute it."""
        channels = self.channels
        if video.ndim == 5 and video.shape[1] == channels:
            return
        hint = ""
        if video.ndim == 4 and channels in video.shape:
            hint = ": one clip is a batch of one, video[None]"
        elif video.ndim == 5 and video.shape[4] == channels:
            hint = ": channels come before time, video.permute(0, 4, 1, 2, 3)"
        elif video.ndim == 5 and video.shape[2] == channels:
            hint = ": channels come before time, video.transpose(1, 2)"
        raise ValueError(
            f"clips are (B, C, T, H, W) with {channels} channels, got {tuple(video.shape)}{hint}"
        )

    def normalise(self, video: Tensor) -> Tensor:
        """Normalise uint8 clips (B, C, T, H, W) to float.

        Of optical flow (`flow_stream`) to motion over the bound, in [-1, 1].

        Raises:
            ValueError: the values are not uint8, or dimensions are in another order.
        """
        self.refuse_layout(video)
        if video.dtype != torch.uint8:
            # Floats may be in [0, 1] or in [0, 255], or normalised already: values do not show
            # which.
            raise ValueError(
                f"clips to normalise are uint8, 0 to 255, got {video.dtype}: give the frames as "
                "they were decoded"
            )
        mean = torch.tensor(self.mean, device=video.device).view(-1, 1, 1, 1)
        std = torch.tensor(self.std, device=video.device).view(-1, 1, 1, 1)
        # In place: a clip is large, passes cost.
        video = (video.float() / 255).sub_(mean).div_(std)
        return video - video.mean(2, keepdim=True) if self.subtract_mean else video


def flow_stream(
    size: int, bound: float = 0.0, method: str = "", subtract_mean: bool = False
) -> Stream:
    """The stream of optical flow of a backbone that takes crops of `size` pixels.

    Args:
        size: height and width of the crop, pixels.
        bound: see `Stream`; 0: `flow_bound` of this size.
        method: see `Stream`, likewise `subtract_mean`.
        subtract_mean: see there.
    """
    mean, std = (FLOW_ZERO / 255,) * 2, (FLOW_LEVELS / 255,) * 2
    bound = bound or flow_bound(size)
    return Stream(mean, std, subtract_mean=subtract_mean, bound=bound, method=method)


@dataclass(frozen=True)
class Joints:
    """A stream of joints of a backbone's clip: (B, K, T, P, J), and how it is normalised.

    K is the coordinates and a confidence, which is 0 where a joint was not seen; its coordinates
    then are 0 as well. Two coordinates are pixels of the crop, x to the right and y down; three
    are metres in the camera's axes.

    Attributes:
        skeleton: name of the skeleton, see `pretrain.data.poses.SKELETONS`.
        joints: J, its number of joints.
        coordinates: 2 or 3.
        people: P; where fewer are in view, the joints of the others are not seen.

    Raises:
        ValueError: other coordinates, no or too many joints or people.
    """

    skeleton: str
    joints: int
    coordinates: int = 3
    people: int = 1

    def __post_init__(self):
        if self.coordinates not in (2, 3):
            raise ValueError(f"joints have 2 or 3 coordinates, not {self.coordinates}")
        if not 1 <= self.people <= MOST_PEOPLE or not 1 <= self.joints <= MOST_JOINTS:
            raise ValueError(
                f"{self.people} people of {self.joints} joints: give 1 to {MOST_PEOPLE} people of "
                f"1 to {MOST_JOINTS} joints"
            )

    @property
    def channels(self) -> int:
        """Values of a joint: its coordinates and its confidence."""
        return self.coordinates + 1

    def shape(self, frames: int, size: int) -> tuple[int, ...]:
        """Of one clip (K, T, P, J), whatever the size of its pictures."""
        return (self.channels, frames, self.people, self.joints)

    def refuse_layout(self, pose: Tensor) -> None:
        """Raise ValueError unless it is (B, K, T, P, J); the message says how to permute it."""
        if pose.ndim == 5 and (pose.shape[1], pose.shape[4]) == (self.channels, self.joints):
            return
        hint = ""
        if pose.ndim == 4 and self.channels in pose.shape:
            hint = ": one clip is a batch of one, pose[None]"
        elif pose.ndim == 5 and tuple(pose.shape[3:]) == (self.joints, self.channels):
            hint = ": channels come before time, pose.permute(0, 4, 1, 2, 3)"
        raise ValueError(
            f"clips are (B, K, T, P, J), joints with {self.coordinates} coordinates and a "
            f"confidence, {self.joints} joints of {self.skeleton}, got {tuple(pose.shape)}{hint}"
        )

    def normalise(self, pose: Tensor) -> Tensor:
        """Centre and scale the people of every clip (B, K, T, P, J).

        The mean of all joints seen in a clip becomes 0, and the size of a body 1: the root mean
        square of the joints' distances from the mean joint of their own person and frame. So where
        the camera stood does not matter, nor whether coordinates are pixels or metres; how people
        move through the clip, and where they stand to one another, remains. Joints not seen stay
        0, confidences are left as they are.

        Raises:
            ValueError: the values are not float32, or dimensions are in another order.
        """
        self.refuse_layout(pose)
        if pose.dtype != torch.float32:
            raise ValueError(f"joints to normalise are float32, got {pose.dtype}")
        where, confidence = pose[:, :-1], pose[:, -1:]
        seen = confidence > 0
        mean = lambda x, dims: x.sum(dims, keepdim=True) / seen.sum(dims, keepdim=True).clamp(min=1)
        where = (where - mean(where * seen, (2, 3, 4))) * seen
        body = mean(((where - mean(where, (4,))) * seen).square(), (2, 3, 4)).sum(1, keepdim=True)
        # A clip of single joints has no body: the extent of its motion then is 1.
        extent = mean(where.square(), (2, 3, 4)).sum(1, keepdim=True)
        size = torch.where(body > 0, body, extent).sqrt()
        return torch.cat([where / torch.where(size > 0, size, 1), confidence], 1)


@dataclass(frozen=True)
class InputSpec:
    """The clip that a backbone takes. All its streams have the same frames and the same crop.

    Attributes:
        frames: number of frames.
        stride: source frames between two sampled frames; 0: uniform sampling, a frame of each of
            `frames` equal parts of the clip (see `pretrain.data.shards.draw_frames`).
        size: height and width in pixels, of pictures and of the crop in which 2-D joints are.
        streams: those it takes, by name.

    Raises:
        ValueError: no stream; more pixels than `MOST_PIXELS`; `subtract_mean` of a single frame;
            or "flow" without a bound.
    """

    frames: int
    stride: int
    size: int
    streams: Mapping[str, Stream | Joints] = field(default_factory=lambda: {"rgb": Stream()})

    def __post_init__(self):
        if not self.streams:
            raise ValueError("a clip has at least one stream")
        if self.frames * self.size**2 > MOST_PIXELS:
            raise ValueError(
                f"a clip of {self.frames} frames of {self.size} x {self.size} pixels has more than "
                f"the {MOST_PIXELS:,} that are the limit: take fewer frames or a smaller size"
            )
        if self.frames == 1 and self.subtracts_mean:
            raise ValueError(
                "subtract_mean of 1 frame leaves nothing: give False, or at least two frames"
            )
        if "flow" in self.streams and not (
            isinstance(flow := self.streams["flow"], Stream) and flow.bound
        ):
            raise ValueError("optical flow has a bound: see flow_stream")

    @property
    def pictures(self) -> dict[str, Stream]:
        """The streams of pictures, by name."""
        return {name: s for name, s in self.streams.items() if isinstance(s, Stream)}

    @property
    def subtracts_mean(self) -> bool:
        """Whether the clip's mean frame is subtracted from a stream of it."""
        return any(stream.subtract_mean for stream in self.pictures.values())

    @property
    def pace(self) -> str:
        """How frames are sampled, in words."""
        return f"stride {self.stride}" if self.stride else "one of each equal part"

    @property
    def in_words(self) -> str:
        """The clip in words: frames, their size and how they are sampled."""
        return f"{counted(self.frames, 'frame')} of {self.size} px, {self.pace}"

    def refuse_other_kinds(self, made: Mapping[str, str], who: str) -> None:
        """Raise ValueError if the data's flow has another method, or their poses another skeleton.

        Args:
            made: by stream of the data: the method of "flow", the skeleton of "pose".
            who: whose clip this is, for the message.
        """
        for name, stream in self.streams.items():
            wants = stream.skeleton if isinstance(stream, Joints) else stream.method
            if wants and name in made and made[name] != wants:
                has = f"{made[name]!r:.80}" if made[name] else "of unknown origin"
                new = isinstance(stream, Joints) and made[name]
                fresh = (
                    "of finetune.py and clip.py, a fresh --model takes such joints with --skeleton"
                )
                remedy = f"; {fresh} {has}" if new else ""
                raise ValueError(
                    f"{who} takes {name} {wants!r}, and the data's {name} is {has}: choose weights "
                    f"that were trained on such {name}, or data with {wants!r}{remedy}"
                )

    def take(self, batch: Mapping[str, Any], device: torch.device | None = None) -> Clip:
        """The clips of a loaded batch, the streams that this backbone takes, moved to `device`."""
        clip = self._named(batch)
        if device is not None:
            clip = {name: part.to(device, non_blocking=True) for name, part in clip.items()}
        return self._plain(clip)

    @overload
    def normalise(self, clip: Tensor) -> Tensor: ...

    @overload
    def normalise(self, clip: Mapping[str, Tensor]) -> Clip: ...

    def normalise(self, clip: Clip) -> Clip:
        """Normalise the clips of every stream, as they are loaded, to float.

        Raises:
            ValueError: a stream is missing, its values are of another type, or dimensions are in
                another order.
        """
        parts = self._named(clip)
        return self._plain({n: stream.normalise(parts[n]) for n, stream in self.streams.items()})

    def expect(self, clip: Clip) -> None:
        """Refuse what is no batch of normalised clips of this shape.

        Args:
            clip: what a backbone was given.

        Raises:
            ValueError: a stream is missing; its channels, frames or size are not those of this
                clip, dimensions are in another order, or the values are bytes.
        """
        for name, part in self._named(clip).items():
            stream = self.streams[name]
            stream.refuse_layout(part)
            if not part.is_floating_point():
                raise ValueError(
                    f"this backbone takes normalised clips, got {part.dtype}: give it "
                    "input_spec.normalise(clip)"
                )
            # In an export for any number of frames it is a symbol.
            frames = part.shape[2] if isinstance(part.shape[2], torch.SymInt) else self.frames
            if tuple(part.shape[1:]) != stream.shape(frames, self.size):
                expected = stream.shape(self.frames, self.size)
                axes = "(C, T, H, W)" if isinstance(stream, Stream) else "(K, T, P, J)"
                raise ValueError(
                    f"this backbone takes clips of {axes} = {expected}, got "
                    f"{tuple(part.shape[1:])}: sample and crop to `input_spec`"
                )

    def empty(self, num: int) -> Clip:
        """Normalised clips of this shape, their values not set: for counting and for tries."""
        shapes = {n: stream.shape(self.frames, self.size) for n, stream in self.streams.items()}
        return self._plain({n: torch.empty(num, *shape) for n, shape in shapes.items()})

    def _named(self, clip: Clip) -> dict[str, Tensor]:
        """The streams by name; a tensor by itself is the only one."""
        if isinstance(clip, Tensor):
            clip = dict.fromkeys(self.streams, clip) if len(self.streams) == 1 else {}
        if missing := [name for name in self.streams if name not in clip]:
            raise ValueError(
                f"this backbone takes {', '.join(self.streams)}: {missing[0]} is missing"
            )
        return {name: clip[name] for name in self.streams}

    def _plain(self, clip: dict[str, Tensor]) -> Clip:
        """Where a backbone takes one stream it is a tensor by itself."""
        return clip if len(clip) > 1 else next(iter(clip.values()))


# What a family says as `any_frames`: the least frames that its exports take and what their number
# is a multiple of, with the same weights; or why they take those of its clip only.
AnyFrames = tuple[int, int] | str


@runtime_checkable
class Backbone(Protocol):
    """An `nn.Module` that turns clips into tokens and one embedding; every encoder here is one.

    A backbone takes normalised clips (`input_spec.normalise`): a tensor if it takes one stream, a
    dict of them by name if it takes several. It refuses clips of another shape
    (`input_spec.expect`).

    Attributes:
        embed_dim: D, the width of tokens and embedding.
        grid: (t, h, w), the numbers of its N = t h w tokens along time, height and width; tokens
            come in this order. Of joints (t, 1, joints), or (t, 1, 1) of whole people.
        input_spec: the clip that it takes.
        arguments: what its class is called with to build it again, as JSON has it.
    """

    embed_dim: int
    grid: tuple[int, int, int]
    input_spec: InputSpec
    arguments: dict[str, Any]

    def forward_features(self, clip: Any, /) -> Tensor:
        """Clips to tokens (B, N, D)."""
        ...

    def forward(self, clip: Any, /) -> Tensor:
        """Clips to one embedding each (B, D)."""
        ...


@runtime_checkable
class Selective(Protocol):
    """A backbone that can be shown some of its tokens only."""

    num_motion_tokens: int  # tokens that it uses

    def forward_visible(self, video: Tensor, visible: Tensor, /) -> Tensor:
        """Clips and the indices of the tokens to use (B, K) to one embedding each (B, D)."""
        ...


@runtime_checkable
class Rebuildable(Protocol):
    """A model that says what its class is called with to build it again."""

    arguments: dict[str, Any]
