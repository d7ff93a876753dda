"""2-D networks, of timm, torchvision or open_clip, that turn an image into a vector.

The frame families (`frames.py`, `recurrent.py`, `tcn.py`, `inflated.py`) put one of these on every
frame.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pretrain.backbones import read_backbone_config
from pretrain.files import is_file, is_folder, no_file
from pretrain.interop.openclip import PREFIX as OPEN_CLIP
from pretrain.interop.openclip import load_open_clip
from pretrain.modes import dry_output
from pretrain.spec import Stream
from pretrain.third_party import (
    build_open_clip,
    check,
    number,
    one_of,
    several,
    shown,
    timm_network,
    torchvision_network,
)
from pretrain.weights import load_strict, load_torch_file, read_safetensors, unwrap

TORCHVISION = "torchvision:"
# See `video_swin.SIZES`; ours, for minutes on a CPU.
SWIN_XS = (32, (1, 1, 2, 1), (1, 2, 4, 8), 0.0)
_HEADS = ("fc", "classifier", "head", "heads")  # where torchvision's networks keep their classifier


class ImageNetwork(nn.Module):
    """A 2-D network without its classifier: images (B, C, H, W) to vectors (B, D).

    Args:
        network: a name of timm (`resnet18`), `torchvision:resnet18`, `torchvision:swin_xs` (ours:
            torchvision's Swin in the size of `video_swin.py`'s xs, for minutes on a CPU), or, as
            `image_network` makes it of `open_clip:MODEL/WEIGHTS`, the dict that `Pair.network`
            describes.
        size: height and width of the images, pixels.
        channels: of the images; more than 3 where frames are stacked.

    Raises:
        ValueError: there is no such network, or it cannot see such images.
    """

    def __init__(self, network: str | dict, size: int, channels: int = 3):
        super().__init__()
        self.network, self.pixels = network, Stream()
        if isinstance(network, dict):
            if channels != 3:
                raise ValueError(
                    f"an open_clip tower sees images of 3 channels, not {channels}: fuse its "
                    "frames later"
                )
            three = several(number(-1e6, 1e6), 3, 3)
            rules = {"open_clip": lambda v: isinstance(v, dict), "mean": three, "std": three}
            rules["interpolation"] = one_of("bilinear", "bicubic")
            check(network, rules, "the 2-D network")
            if lacking := [key for key in rules if key not in network]:
                raise ValueError(f"the 2-D network lacks {', '.join(lacking)}")
            self.net = build_open_clip(vision=network["open_clip"]).visual
            mean, std = tuple(network["mean"]), tuple(network["std"])
            self.pixels = Stream(mean, std, network["interpolation"])
        elif network.startswith(TORCHVISION):
            self.net = _torchvision(network.removeprefix(TORCHVISION), channels)
        else:
            try:
                self.net = timm_network(network, size, channels)
            except ValueError as error:
                raise ValueError(
                    f"--network {network}: {error}; torchvision's are torchvision:NAME, "
                    "open_clip's open_clip:MODEL/WEIGHTS"
                ) from error
            about = self.net.pretrained_cfg
            assert isinstance(about, dict)
            self.pixels = Stream(tuple(about["mean"]), tuple(about["std"]))
        try:
            self.embed_dim = dry_output(self.net, 1, channels, size, size).shape[1]
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"{describe_network(network)} cannot see images of {size} x {size} pixels: {error}"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) to vectors (B, D)."""
        return self.net(images)

    def stream(self, subtract_mean: bool) -> Stream:
        """How frames are normalised and scaled, as it was trained.

        Args:
            subtract_mean: see `Stream`.
        """
        return dataclasses.replace(self.pixels, subtract_mean=subtract_mean)

    def frames(self, video: Tensor) -> Tensor:
        """Normalised clips (B, C, T, H, W) to the vectors of their frames (B, T, D)."""
        images = video.transpose(1, 2).flatten(0, 1)
        return self.net(images).unflatten(0, (video.shape[0], video.shape[2]))


def describe_network(network: str | dict) -> str:
    """The network in words, for messages."""
    return network if isinstance(network, str) else "this open_clip tower"


def _torchvision(name: str, channels: int) -> nn.Module:
    if name == "swin_xs":
        import torchvision

        dim, depths, heads, drop_path = SWIN_XS
        net = torchvision.models.SwinTransformer(
            [4, 4], dim, list(depths), list(heads), [7, 7], stochastic_depth_prob=drop_path
        )
    else:
        net = torchvision_network(name)
    head = next(attribute for attribute in _HEADS if hasattr(net, attribute))
    last = getattr(net, head)
    if isinstance(last, nn.Sequential):
        # VGG's first two fully connected layers stay, as descriptors.
        place = max(i for i, layer in enumerate(last) if list(layer.parameters()))
        last[place] = nn.Flatten(1)
    else:
        setattr(net, head, nn.Identity())
    if channels != 3:
        path, first = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
        (kh, kw), (sh, sw), padding = first.kernel_size, first.stride, first.padding
        padding = padding if isinstance(padding, str) else (padding[0], padding[1])
        wider = nn.Conv2d(
            channels, first.out_channels, (kh, kw), (sh, sw), padding,
            bias=first.bias is not None,
        )  # fmt: skip
        parent = net.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], wider)
    return net


def image_network(name: str) -> tuple[str | dict, dict[str, Tensor] | None]:
    """The argument of `ImageNetwork` for a name on the command line, and its weights.

    Args:
        name: of timm, `torchvision:NAME` or `open_clip:MODEL/WEIGHTS`.

    Returns:
        the description, and the weights of an open_clip name that has some.

    Raises:
        ValueError: open_clip cannot load it.
    """
    if not name.startswith(OPEN_CLIP):
        return name, None
    pair = load_open_clip(name)
    return pair.network(), pair.visual.state_dict() if pair.trained else None


def read_network(weights: str, arguments: dict) -> tuple[dict, dict[str, Tensor] | None, str]:
    """The arguments of a family on a 2-D network, and the weights of that network.

    Args:
        weights: "", "imagenet" or a file, see `image_weights`; an open_clip name in the arguments
            brings its own.
        arguments: of the family, `network` as on the command line.

    Returns:
        the arguments with `network` as `ImageNetwork` takes it; the weights, for
        `load_image_weights`, None: fresh; and where they are from.

    Raises:
        ValueError: there are no such weights.
    """
    network = arguments.get("network", "resnet18")
    if isinstance(network, str):
        network, theirs = image_network(network)
        if theirs is not None:
            return arguments | {"network": network}, theirs, "open_clip"
    theirs = image_weights(network, weights) if weights else None
    return arguments | {"network": network}, theirs, weights


def with_image_weights(build: Callable[..., nn.Module], weights: str, arguments: dict) -> nn.Module:
    """A family with a `network`, built, and that network (its `images`) started from `weights`."""
    arguments, theirs, origin = read_network(weights, arguments)
    backbone = build(**arguments)
    if theirs is not None:
        images = backbone.images
        assert isinstance(images, ImageNetwork)
        load_image_weights(images, theirs, origin)
    return backbone


def image_weights(network: str, source: str) -> dict[str, Tensor]:
    """The weights of a 2-D network, without its classifier, ready for `load_strict`.

    Args:
        network: a name of timm or `torchvision:NAME`.
        source: "imagenet", the library's own (downloaded once); a .safetensors, .pth or .pt file in
            the library's layout; or RUN/backbone of a frame family, whose 2-D network is taken.

    Raises:
        ValueError: there is no such file, it has another network, or nothing can be downloaded.
    """
    if is_folder(source):
        weights = _exported_network(Path(source), network)
    elif source != "imagenet":
        weights = read_weights(source)
    else:
        weights = download(network, "ImageNet").state_dict()
    return weights


def _exported_network(folder: Path, network: str) -> dict[str, Tensor]:
    """The weights of the 2-D network in an exported frame family, or under a classifier's head."""
    described = read_backbone_config(folder)
    described = described["arguments"].get("backbone", described)
    arguments = described.get("arguments") if isinstance(described, dict) else None
    has = arguments.get("network") if isinstance(arguments, dict) else None
    if has != network:
        has = "no 2-D network at all" if has is None else f"{has!r:.100}"
        raise ValueError(
            f"--weights {folder} has {has}, which is not {network}: give the folder of a model "
            "with that network"
        )
    weights = read_safetensors(folder / "model.safetensors")
    return {
        name.removeprefix("backbone.").removeprefix("images.net."): value
        for name, value in weights.items()
        if name.removeprefix("backbone.").startswith("images.net.")
    }


def download(network: str, data: str, video: bool = False) -> nn.Module:
    """A network of timm, or torchvision:NAME, with the library's own weights, downloaded once.

    Args:
        network: its name.
        data: what it was trained on, for the message.
        video: one of torchvision's 3-D networks.

    Raises:
        ValueError: nothing can be downloaded.
    """
    try:
        if network.startswith(TORCHVISION):
            name = network.removeprefix(TORCHVISION)
            return torchvision_network(name, video, pretrained=True)
        return timm_network(network, pretrained=True)
    except Exception as error:  # hubs and file systems raise many kinds
        raise ValueError(
            f"the {data} weights of {network} cannot be downloaded ({error}): give --weights FILE"
        ) from error


def video_weights(name: str, source: str) -> dict[str, Tensor]:
    """The weights of a video network of torchvision's, classifier included, or of a file.

    Args:
        name: of the network.
        source: "kinetics", torchvision's own (downloaded once), or a file.

    Raises:
        ValueError: nothing can be downloaded, or there is no such file.
    """
    if source != "kinetics":
        return read_weights(source)
    return download(TORCHVISION + name, "Kinetics", video=True).state_dict()


def read_weights(source: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .pt file, without wrappers around their names.

    Raises:
        ValueError: it is not there or not such a file, or holds a number that is not finite.
    """
    path = Path(source)
    if not is_file(path):
        raise ValueError(f"--weights {shown(source)}: {no_file(source)}")
    if path.suffix == ".safetensors":
        weights = read_safetensors(path)
    else:
        weights = load_torch_file(path)
    weights = {k: v.detach() for k, v in unwrap(weights).items() if isinstance(v, Tensor)}
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: {key!r:.100} holds values that are not finite")
    return weights


def over_colour(filters: Tensor, channels: int) -> Tensor:
    """Filters over three colours as filters over other channels: each gets the mean over colour.

    TSN's cross-modality initialisation, Wang et al. 2016 (https://arxiv.org/abs/1608.00859),
    section 3.2; as there, the sum is not scaled to the number of channels.

    Args:
        filters: (outputs, 3, ...).
        channels: of the result.
    """
    return filters.mean(1, keepdim=True).repeat_interleave(channels, 1)


def load_image_weights(images: ImageNetwork, weights: dict[str, Tensor], origin: str) -> None:
    """Put an image classifier's weights into an `ImageNetwork`; only its head may be left over.

    A first convolution that sees stacked frames gets the colour filters' copies, divided by their
    number, so that a frame repeated gives the output of the single frame.

    Raises:
        ValueError: something is missing, left over or of another shape.
    """
    own = images.net.state_dict()
    heads = {k for k in weights if k not in own and k.split(".")[0] in _HEADS}
    weights = {k: v for k, v in weights.items() if k not in heads}
    for key, value in own.items():
        theirs = weights.get(key)
        if theirs is None or theirs.shape == value.shape:
            continue
        if value.ndim != 4 or theirs.ndim != 4 or not theirs.numel():
            continue  # refused below
        times, rest = divmod(value.shape[1], theirs.shape[1])
        if not rest and theirs.shape[0] == value.shape[0] and theirs.shape[2:] == value.shape[2:]:
            weights[key] = theirs.repeat(1, times, 1, 1) / times
    load_strict(images.net, weights, origin)
