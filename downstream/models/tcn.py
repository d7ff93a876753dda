"""Temporal convolutional networks over frame features.

Dilated and residual: Bai, Kolter & Koltun 2018, https://arxiv.org/abs/1803.01271. Encoder-decoder:
Lea et al. 2017, https://arxiv.org/abs/1611.05267 (ED-TCN, with its normalised ReLU). B clips, T
frames, F features, D width.

`TCN` and `EncoderDecoder` take features that are there already, (Batch, Temporal_length,
Feature_size), of any length and from anywhere; `FrameTCN` takes clips and has a 2-D network for
them.

    tokens = TCN(2048, hidden=256)(features)             # (B, T, 2048) to (B, T, 256), causal
    tokens = EncoderDecoder(2048)(features)              # (B, T, 2048) to (B, T, 64), sees the
    whole clip
"""

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from downstream.models.attention import insert
from downstream.models.images import ImageNetwork
from pretrain.spec import AnyFrames, InputSpec


class TimeConv1d(nn.Module):
    """A weight-normalised convolution over time that keeps its length.

    Causal: all padding comes before the clip, so that what is said at a frame depends on no later
    one.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int, causal: bool):
        super().__init__()
        conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation)
        # The published code draws the weight from N(0, 0.01), which its weight norm then divides
        # out again; the length is a parameter of its own, here the one that keeps the variance.
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        self.conv = weight_norm(conv)
        span = (kernel - 1) * dilation
        self.padding = (span, 0) if causal else (span // 2, span - span // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, T) to (B, outputs, T)."""
        return self.conv(F.pad(x, self.padding))


class ResidualBlock(nn.Module):
    """Two dilated convolutions with ReLU and dropout, and a residual around them."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, dilation: int, causal: bool, dropout: float
    ):
        super().__init__()
        self.conv1 = TimeConv1d(inputs, outputs, kernel, dilation, causal)
        self.conv2 = TimeConv1d(outputs, outputs, kernel, dilation, causal)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, T) to (B, outputs, T)."""
        y = self.dropout(self.conv1(x).relu())
        y = self.dropout(self.conv2(y).relu())
        return (y + self.shortcut(x)).relu()


class TCN(nn.Sequential):
    """Residual blocks of dilation 1, 2, 4, ... over features.

    Args:
        inputs: F.
        hidden: D.
        depth: residual blocks.
        kernel: steps that a convolution spans.
        causal: a token depends on no later step.
        dropout: fraction of values dropped in training.
    """

    def __init__(
        self, inputs: int, hidden: int = 256, depth: int = 4, kernel: int = 3, causal: bool = True,
        dropout: float = 0.2
    ):  # fmt: skip
        widths = [inputs] + [hidden] * depth
        super().__init__(
            *(
                ResidualBlock(i, o, kernel, 2**n, causal, dropout)
                for n, (i, o) in enumerate(pairwise(widths))
            )
        )
        self.inputs = inputs
        self.receptive_field = 1 + 2 * (kernel - 1) * (2**depth - 1)  # steps

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, F) to a token for every step (B, T, D)."""
        _expect_features(features, self.inputs)
        return super().forward(features.transpose(1, 2)).transpose(1, 2)


class EncoderDecoder(nn.Module):
    """ED-TCN: convolution, normalised ReLU, pooling by 2, `depth` times; then all of it backwards.

    Defaults are those of the authors' code for 50 Salads.

    Args:
        inputs: F.
        hidden: channels of the first level, and D; each further level has 32 more.
        depth: levels.
        kernel: steps that a convolution spans; the authors' is as long as an action (20 on JIGSAWS,
            5 on MERL).
        dropout: fraction of channels dropped in training, each over the whole clip.
    """

    def __init__(
        self, inputs: int, hidden: int = 64, depth: int = 2, kernel: int = 25, dropout: float = 0.3
    ):
        super().__init__()
        self.inputs = inputs
        widths = [hidden + 32 * level for level in range(depth)]
        self.encoder = nn.ModuleList(
            nn.Conv1d(i, o, kernel, padding="same") for i, o in pairwise([inputs, *widths])
        )
        self.decoder = nn.ModuleList(
            nn.Conv1d(i, o, kernel, padding="same")
            for i, o in pairwise([widths[-1], *widths[::-1]])
        )
        for conv in (*self.encoder, *self.decoder):  # Keras's start
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.dropout = nn.Dropout1d(dropout)

    def _activate(self, x: Tensor) -> Tensor:
        x = self.dropout(x).relu()  # ReLU divided by the largest channel of each frame
        return x / (x.amax(1, keepdim=True) + 1e-5)

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, F) to a token for every step (B, T, D); T need not be a multiple of 2 ** depth."""
        _expect_features(features, self.inputs)
        x, lengths = features.transpose(1, 2), []
        for conv in self.encoder:
            lengths.append(x.shape[-1])
            # In two axes: torch.export fixes the length of a pooling in one.
            x = F.max_pool2d(self._activate(conv(x)).unsqueeze(2), (1, 2), ceil_mode=True)
            x = x.squeeze(2)
        for conv, length in zip(self.decoder, reversed(lengths), strict=True):
            x = self._activate(conv(x.repeat_interleave(2, -1)[..., :length]))
        return x.transpose(1, 2)


def _expect_features(features: Tensor, size: int) -> None:
    if features.ndim != 3 or features.shape[2] != size:
        raise ValueError(
            f"features are (Batch, Temporal_length, Feature_size), the last one {size}, and these "
            f"are {tuple(features.shape)}"
        )


class FrameTCN(nn.Module):
    """A temporal convolutional network over the vectors of a clip's frames.

    Args:
        form: "dilated" (residual blocks of dilation 1, 2, 4, ...) or "encoder_decoder".
        network: as `ImageNetwork` takes it.
        hidden: channels; of the encoder-decoder's first level, see `EncoderDecoder`.
        depth: residual blocks, or levels of the encoder.
        kernel: frames that a convolution spans.
        causal: a frame's token depends on no later frame; the dilated form only.
        dropout: fraction of values (of the encoder-decoder: of channels) dropped in training.
        frames: frames of a clip.
        stride: source frames between two sampled frames; only recorded.
        size: height and width, pixels.
        attention: blocks to insert, see `downstream.models.attention.insert`.
        subtract_mean: whether each clip's mean frame is subtracted, see `Stream`.

    Raises:
        ValueError: another form, a causal encoder-decoder, or the network cannot be built.
    """

    def __init__(
        self, form: str = "dilated", network: str | dict = "resnet18", hidden: int = 256,
        depth: int = 4, kernel: int = 3, causal: bool = True, dropout: float = 0.2,
        frames: int = 16, stride: int = 4, size: int = 224, attention: str = "",
        subtract_mean: bool = False,
    ):  # fmt: skip
        super().__init__()
        if form not in ("dilated", "encoder_decoder"):
            raise ValueError(f"form {form!r} is neither dilated nor encoder_decoder")
        if form == "encoder_decoder" and causal:
            raise ValueError(
                "the encoder-decoder pools over time, so it is not causal: give causal=False"
            )
        self.arguments: dict[str, Any] = {
            "form": form, "network": network, "hidden": hidden, "depth": depth, "kernel": kernel,
            "causal": causal, "dropout": dropout, "frames": frames, "stride": stride, "size": size,
            "attention": attention, "subtract_mean": subtract_mean,
        }  # fmt: skip
        self.images = ImageNetwork(network, size)
        inputs = self.images.embed_dim
        self.norm = nn.LayerNorm(inputs)
        self.causal = causal
        if form == "dilated":
            self.temporal: nn.Module = TCN(inputs, hidden, depth, kernel, causal, dropout)
        else:
            self.temporal = EncoderDecoder(inputs, hidden, depth, kernel, dropout)
        self.embed_dim, self.grid = hidden, (frames, 1, 1)
        self.input_spec = InputSpec(
            frames, stride, size, {"rgb": self.images.stream(subtract_mean)}
        )
        insert(self, attention)

    @property
    def kind(self) -> str:
        """Its name in the presets of published training, see `downstream.training.kind_of`."""
        return "ed_tcn" if self.arguments["form"] == "encoder_decoder" else "tcn"

    @property
    def any_frames(self) -> AnyFrames:
        """Other lengths of a clip that exports take."""
        if self.arguments["form"] == "encoder_decoder":
            multiple = 2 ** self.arguments["depth"]
            return 2 * multiple, multiple
        return 2, 1

    def forward_features(self, video: Tensor) -> Tensor:
        """A token for every frame."""
        self.input_spec.expect(video)
        return self.temporal(self.norm(self.images.frames(video)))

    def forward(self, video: Tensor) -> Tensor:
        """The last token, which alone has seen all, or the mean."""
        tokens = self.forward_features(video)
        return tokens[:, -1] if self.causal else tokens.mean(1)
