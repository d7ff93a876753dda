"""C3D: eight 3x3x3 convolutions and two fully connected layers.

Tran et al. 2015, "Learning spatiotemporal features with 3D convolutional networks",
https://arxiv.org/abs/1412.0767. B clips, T frames.
"""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from downstream.models.attention import insert
from pretrain.spec import InputSpec, Stream

# Pixels in 0..255 minus a mean cube in the original; here minus the usual colour means, in units of
# the standard deviation, since there is no mean cube of the user's data.


class C3D(nn.Module):
    """C3D, at any width and any clip.

    Args:
        width: factor on all channels and on the fully connected layers; 1 as published.
        batch_norm: normalise after every convolution; the published network does not, and is slow
            to train from scratch.
        dropout: after each fully connected layer.
        frames: frames of a clip; 16 as published, at least that.
        stride: source frames between two sampled frames; only recorded.
        size: height and width; 112 as published, at least 16.
        attention: blocks to insert, see `downstream.models.attention.insert`.
        subtract_mean: whether each clip's mean frame is subtracted, see `Stream`.

    Raises:
        ValueError: a clip too small for the five poolings.
    """

    kind = "c3d"  # to presets of published training, see `downstream.training.kind_of`
    any_frames = "its first fully connected layer sees every place of the clip"

    def __init__(
        self, width: float = 1.0, batch_norm: bool = False, dropout: float = 0.5, frames: int = 16,
        stride: int = 1, size: int = 112, attention: str = "", subtract_mean: bool = False,
    ):  # fmt: skip
        super().__init__()
        if frames < 16 or size < 16:
            raise ValueError(
                f"C3D halves time four times and space five times: {frames} frames of {size} "
                "pixels are too few, give at least 16 of 16"
            )
        self.arguments: dict[str, Any] = {
            "width": width, "batch_norm": batch_norm, "dropout": dropout, "frames": frames,
            "stride": stride, "size": size, "attention": attention, "subtract_mean": subtract_mean,
        }  # fmt: skip
        of = lambda n: max(round(n * width), 1)
        hidden = of(4096)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        inputs = 3

        def conv(name: str, outputs: int) -> None:
            nonlocal inputs
            unit: list[nn.Module] = [nn.Conv3d(inputs, outputs, 3, padding=1, bias=not batch_norm)]
            unit += [nn.BatchNorm3d(outputs)] if batch_norm else []
            layers[f"conv{name}"] = nn.Sequential(*unit, nn.ReLU())
            inputs = outputs

        conv("1", of(64))
        layers["pool1"] = nn.MaxPool3d((1, 2, 2))
        conv("2", of(128))
        layers["pool2"] = nn.MaxPool3d(2)
        for stage, outputs in ((3, of(256)), (4, of(512)), (5, of(512))):
            conv(f"{stage}a", outputs)
            conv(f"{stage}b", outputs)
            # Caffe rounded up: 7 -> 4 at 112 pixels, written as padding; even maps need none.
            last = stage == 5
            odd = size // 16 % 2
            layers[f"pool{stage}"] = nn.MaxPool3d(2, padding=(0, 1, 1) if last and odd else 0)
        self.features = nn.Sequential(layers)
        flat = inputs * (frames // 16) * ((size // 16 + 1) // 2) ** 2
        self.fc6, self.fc7 = nn.Linear(flat, hidden), nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.embed_dim, self.grid = hidden, (1, 1, 1)
        self.input_spec = InputSpec(
            frames, stride, size, {"rgb": Stream(subtract_mean=subtract_mean)}
        )
        insert(self, attention)

    def forward_features(self, video: Tensor) -> Tensor:
        """One token (B, 1, D): fc6 sees the whole clip."""
        return self.forward(video).unsqueeze(1)

    def forward(self, video: Tensor) -> Tensor:
        """The output of fc7."""
        self.input_spec.expect(video)
        x = self.dropout(self.fc6(self.features(video).flatten(1)).relu())
        return self.fc7(x).relu()  # the classifier drops out before itself
