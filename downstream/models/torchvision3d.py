"""torchvision's 3-D networks: R3D, MC3, R(2+1)D (Tran et al. 2018) and S3D (Xie et al. 2018).

https://arxiv.org/abs/1711.11248, https://arxiv.org/abs/1712.04851. The modules and weights are
torchvision's own; only the classifier is left off. B clips, T frames, N tokens of the last feature
map, D width.
"""

from collections import OrderedDict
from collections.abc import Container
from typing import Any, Self

from torch import Tensor, nn

from downstream.classifier import Classifier
from downstream.models.attention import insert
from downstream.models.images import video_weights
from pretrain.modes import dry_output
from pretrain.spec import AnyFrames, InputSpec, Stream
from pretrain.third_party import torchvision_network
from pretrain.weights import load_strict

NAMES = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")
# Published normalisation of the Kinetics weights.
MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
# How they were tested: frames, stride, size.
CLIPS = {
    "r3d_18": (16, 2, 112),
    "mc3_18": (16, 2, 112),
    "r2plus1d_18": (16, 2, 112),
    "s3d": (128, 1, 224),
}


class TorchvisionVideo(nn.Module):
    """A 3-D network of torchvision without its classifier.

    Args:
        name: "r3d_18", "mc3_18", "r2plus1d_18" or "s3d".
        frames: frames of a clip, at least 8 (s3d: 16).
        stride: source frames between two sampled frames; only recorded.
        size: height and width, pixels, at least 16 (s3d: 32).
        attention: blocks to insert, see `downstream.models.attention.insert`.
        subtract_mean: whether each clip's mean frame is subtracted, see `Stream`.

    Raises:
        ValueError: another name, or a clip of which the network leaves nothing.
    """

    def __init__(
        self,
        name: str,
        frames: int = 16,
        stride: int = 2,
        size: int = 112,
        attention: str = "",
        subtract_mean: bool = False,
    ):
        super().__init__()
        if name not in NAMES:
            raise ValueError(f"{name!r} is not one of {', '.join(NAMES)}")
        least = (16, 32) if name == "s3d" else (8, 16)
        if frames < least[0] or size < least[1]:
            raise ValueError(
                f"{name} sees at least {least[0]} frames of {least[1]} pixels, not {frames} of "
                f"{size}"
            )
        self.arguments: dict[str, Any] = {
            "name": name,
            "frames": frames,
            "stride": stride,
            "size": size,
            "attention": attention,
            "subtract_mean": subtract_mean,
        }
        net = torchvision_network(name, video=True)
        if name == "s3d":
            last = net.get_submodule("classifier.1")
            assert isinstance(last, nn.Conv3d)
            self.features, self.embed_dim = net.get_submodule("features"), last.in_channels
        else:
            parts = ("stem", "layer1", "layer2", "layer3", "layer4")
            last = net.get_submodule("fc")
            assert isinstance(last, nn.Linear)
            self.features = nn.Sequential(OrderedDict((p, net.get_submodule(p)) for p in parts))
            self.embed_dim = last.in_features
        self.name = name
        self.input_spec = InputSpec(
            frames, stride, size, {"rgb": Stream(MEAN, STD, subtract_mean=subtract_mean)}
        )
        self.grid = tuple(dry_output(self.features, 1, 3, frames, size, size).shape[2:])
        insert(self, attention)

    @property
    def kind(self) -> str:
        """Its name in the presets of published training, see `downstream.training.kind_of`."""
        return "s3d" if self.name == "s3d" else "r3d"

    @property
    def any_frames(self) -> AnyFrames:
        """Other lengths of a clip that exports take."""
        return (16, 8) if self.name == "s3d" else (9, 1)

    @classmethod
    def with_weights(cls, weights: str, arguments: dict, given: Container[str]) -> Self:
        """Built with these arguments, and started from "kinetics" or a file, see `build_model`."""
        backbone = cls(**arguments)
        if weights:
            trunk, _ = convert_torchvision(backbone.name, video_weights(backbone.name, weights))
            load_strict(backbone, trunk, weights)
        return backbone

    def _map(self, video: Tensor) -> Tensor:
        self.input_spec.expect(video)
        return self.features(video)

    def forward_features(self, video: Tensor) -> Tensor:
        """The positions of the last feature map."""
        return self._map(video).flatten(2).transpose(1, 2)

    def forward(self, video: Tensor) -> Tensor:
        """The last feature map, pooled as torchvision does."""
        x = self._map(video).mean((-2, -1))  # (B, D, t)
        # It pools every two neighbours, then averages the logits.
        return mean_of_neighbours(x) if self.name == "s3d" else x.mean(-1)


def mean_of_neighbours(x: Tensor) -> Tensor:
    """Average every two neighbours in time, then over time: (B, D, t) to (B, D)."""
    if x.shape[-1] == 1:
        return x[..., 0]
    # Without a map of the pairs, which may be a single one: an export would take that for a rule.
    ends = (x[..., 0] + x[..., -1]) / 2
    return (x.sum(-1) - ends) / (x.shape[-1] - 1)


def convert_torchvision(
    name: str, weights: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Torchvision's weights under our names, and the classifier's weight and bias."""
    head = {
        "fc.weight": "weight",
        "fc.bias": "bias",
        "classifier.1.weight": "weight",
        "classifier.1.bias": "bias",
    }
    ours, theirs = {}, {}
    for key, value in weights.items():
        if key in head:
            theirs[head[key]] = value.flatten(1) if value.ndim > 1 else value
        else:
            ours[key if name == "s3d" else f"features.{key}"] = value
    return ours, theirs


def kinetics_classes() -> list[str]:
    """The 400 class names of torchvision's weights, in alphabetical order like DeepMind's."""
    import torchvision

    return torchvision.models.video.R3D_18_Weights.DEFAULT.meta["categories"]


def load_torchvision_k400(name: str, weights: str) -> Classifier:
    """A network of torchvision with its classifier of Kinetics-400, in evaluation mode.

    Args:
        name: in `NAMES`.
        weights: a file of them; "": torchvision's own, downloaded once.

    Raises:
        ValueError: nothing can be downloaded, there is no such file or it does not fit.
    """
    model = Classifier(TorchvisionVideo(name, *CLIPS[name]), kinetics_classes())
    trunk, head = convert_torchvision(name, video_weights(name, weights or "kinetics"))
    load_strict(model.backbone, trunk, weights or name)
    load_strict(model.head, head, weights or name)
    return model.eval()
