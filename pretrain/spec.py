"""The interface of every encoder, `Backbone`, and of its input, `InputSpec`.

A clip has named streams: "rgb", three colours; or "flow", two axes of motion. B clips, C channels, T frames, H x W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_PIXELS = 2**27  # of a clip: 512 frames of 512 x 512, ten times those of the longest published

# A batch of clips: one stream (B, C, T, H, W), or several by name.
Clip = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Stream:
    """How one stream of a backbone's clip is normalised.

    Attributes:
        mean: per-channel mean of the normalisation, for pixels in [0, 1].
        std: per-channel standard deviation, likewise.
        interpolation: how crops are scaled, "bilinear" or "bicubic", always anti-aliased.
        subtract_mean: whether the clip's mean frame is subtracted (temporal-mean subtraction), which removes static
            backgrounds. In footage of a fixed camera small networks then learn from far fewer clips.

    Raises:
        ValueError: another interpolation; a standard deviation that is not positive, or not one of each channel.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    subtract_mean: bool = False

    def __post_init__(self):
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ValueError(
                f"the standard deviations {list(self.std)} do not fit channels of the means {list(self.mean)}: give a "
                "positive one for each"
            )
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(
                f"interpolation {self.interpolation!r} is neither bilinear nor bicubic"
            )

    @property
    def channels(self) -> int:
        """Values of a pixel."""
        return len(self.mean)

    def refuse_layout(self, video: Tensor) -> None:
        """Raise ValueError unless the clip is (B, C, T, H, W); the message names the permutation that it needs."""
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

        Raises:
            ValueError: the values are not uint8, or dimensions are in another order.
        """
        self.refuse_layout(video)
        if video.dtype != torch.uint8:
            # Floats may be in [0, 1] or in [0, 255], or normalised already: values do not show which.
            raise ValueError(
                f"clips to normalise are uint8, 0 to 255, got {video.dtype}: give the frames as they were decoded"
            )
        mean = torch.tensor(self.mean, device=video.device).view(-1, 1, 1, 1)
        std = torch.tensor(self.std, device=video.device).view(-1, 1, 1, 1)
        video = (video.float() / 255).sub_(mean).div_(std)  # in place: a clip is large, passes cost
        return video - video.mean(2, keepdim=True) if self.subtract_mean else video


@dataclass(frozen=True)
class InputSpec:
    """The clip that a backbone takes. All its streams have the same frames and the same crop.

    Attributes:
        frames: number of frames.
        stride: source frames between two sampled frames; 0: uniform sampling, a frame of each of `frames` equal parts
            of the clip (see `pretrain.data.sampling.uniform_indices`).
        size: height and width in pixels.
        streams: those it takes, by name.

    Raises:
        ValueError: no stream; more pixels than `MOST_PIXELS`; or `subtract_mean` of a single frame.
    """

    frames: int
    stride: int
    size: int
    streams: Mapping[str, Stream] = field(default_factory=lambda: {"rgb": Stream()})

    def __post_init__(self):
        if not self.streams:
            raise ValueError("a clip has at least one stream")
        if self.frames * self.size**2 > MOST_PIXELS:
            raise ValueError(
                f"a clip of {self.frames} frames of {self.size} x {self.size} pixels has more than the {MOST_PIXELS:,} that "
                "are the limit: take fewer frames or a smaller size"
            )
        if self.frames == 1 and any(s.subtract_mean for s in self.streams.values()):
            raise ValueError(
                "subtract_mean of 1 frame leaves nothing: give False, or at least two frames"
            )

    @property
    def pace(self) -> str:
        """How frames are sampled, in words."""
        return f"stride {self.stride}" if self.stride else "one of each equal part"

    def refuse_lacking(self, available: tuple[str, ...], who: str) -> None:
        """Raise ValueError if the backbone takes a stream that the data do not have.

        Args:
            available: names of the data's streams.
            who: whose clip this is, for the message.
        """
        if lacking := [name for name in self.streams if name not in available]:
            raise ValueError(
                f"{who} takes {' and '.join(self.streams)}, and the data have {' and '.join(available)}, no "
                f"{' and no '.join(lacking)}: choose a model that takes {' or '.join(available)}"
            )

    def take(self, batch: Mapping[str, Any], device: torch.device | None = None) -> Clip:
        """The clips of a loaded batch, with the streams that this backbone takes, moved to `device`."""
        clip = self._named(batch)
        if device is not None:
            clip = {name: part.to(device, non_blocking=True) for name, part in clip.items()}
        return self._plain(clip)

    @overload
    def normalise(self, clip: Tensor) -> Tensor: ...

    @overload
    def normalise(self, clip: Mapping[str, Tensor]) -> Clip: ...

    def normalise(self, clip: Clip) -> Clip:
        """Normalise the uint8 clips of every stream to float.

        Raises:
            ValueError: a stream is missing, the values are no bytes, or dimensions are in another order.
        """
        parts = self._named(clip)
        return self._plain({n: stream.normalise(parts[n]) for n, stream in self.streams.items()})

    def expect(self, clip: Clip) -> None:
        """Refuse what is no batch of normalised clips of this shape.

        Args:
            clip: what a backbone was given.

        Raises:
            ValueError: a stream is missing; its channels, frames or size are not those of this clip, dimensions are in
                another order, or the values are bytes.
        """
        for name, part in self._named(clip).items():
            stream = self.streams[name]
            stream.refuse_layout(part)
            if not part.is_floating_point():
                raise ValueError(
                    f"this backbone takes normalised clips, got {part.dtype}: give it input_spec.normalise(clip)"
                )
            expected = (stream.channels, self.frames, self.size, self.size)
            if tuple(part.shape[1:]) != expected:
                raise ValueError(
                    f"this backbone takes clips of (C, T, H, W) = {expected}, got {tuple(part.shape[1:])}: "
                    "sample and crop to `input_spec`"
                )

    def empty(self, num: int) -> Clip:
        """Normalised clips of this shape, their values not set: for counting and for tries."""
        shape = (self.frames, self.size, self.size)
        return self._plain(
            {n: torch.empty(num, stream.channels, *shape) for n, stream in self.streams.items()}
        )

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


@runtime_checkable
class Backbone(Protocol):
    """An `nn.Module` that turns clips into tokens and into one embedding; every encoder here is one.

    A backbone takes normalised clips (`input_spec.normalise`): (B, C, T, H, W) if it takes one stream, a dict of them by name
    if it takes several. It refuses clips of another shape (`input_spec.expect`).

    Attributes:
        embed_dim: D, the width of tokens and embedding.
        grid: (t, h, w), the numbers of its N = t h w tokens along time, height and width; tokens come in this order.
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
