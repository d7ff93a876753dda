"""Attention blocks to insert into 2-D and 3-D networks: squeeze-and-excitation, CBAM, non-local.

Every block takes and gives feature maps (B, C, H, W) or (B, C, T, H, W); D below is 2 or 3, the
number of axes after the channels. In a 3-D network, `inflated` among them, a block sees the whole
clip; the 2-D network of a frame family (frames, recurrent, TCN) has a block for every frame by
itself. The last layer of a non-local block starts at zero, so that a network with trained weights
is unchanged by its insertion; gates of the other two start at a half or near it.
"""

import fnmatch
import math
import re

import torch
from torch import Tensor, nn

from pretrain.modes import dry_output
from pretrain.spec import InputSpec

KINDS = (
    "se", "cbam", "nonlocal", "nonlocal_gaussian", "nonlocal_dot", "nonlocal_concat",
)  # fmt: skip
MOST_BLOCKS = 256  # one after each of the 151 convolutions of a ResNet-152, and more
_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOL = {2: nn.MaxPool2d(2), 3: nn.MaxPool3d((1, 2, 2))}


class SqueezeExcitation(nn.Module):
    """Channels are weighed by what the whole map holds.

    Hu et al. 2018, https://arxiv.org/abs/1709.01507.

    Args:
        channels: C.
        reduction: of the hidden layer.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel of a map by a gate between 0 and 1."""
        gate = self.fc2(self.fc1(x.flatten(2).mean(2)).relu()).sigmoid()
        return x * gate.view(*gate.shape, *[1] * (x.ndim - 2))


class CBAM(nn.Module):
    """A gate for channels, then one for positions (Woo et al. 2018, https://arxiv.org/abs/1807.06521).

    Over a clip, the first sees all frames and the second 7 of them. It starts as the
    authors' code does, which has the last norm's scale at zero: all positions alike.

    Args:
        channels: C.
        axes: D.
        reduction: of the channel gate's hidden layer.
    """

    def __init__(self, channels: int, axes: int, reduction: int = 16):
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.conv = _CONV[axes](2, 1, 7, padding=3, bias=False)
        # As the authors have it (BasicConv of Jongchan/attention-module). After a tiny training of
        # 300 steps 5 % of the running statistics are still those of the beginning.
        self.norm = _NORM[axes](1, momentum=0.01)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")
        for value in (self.fc1.bias, self.fc2.bias, self.norm.weight):
            nn.init.zeros_(value)

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel, then every place of a map by a gate between 0 and 1."""
        flat = x.flatten(2)
        mlp = lambda v: self.fc2(self.fc1(v).relu())
        gate = (mlp(flat.mean(2)) + mlp(flat.amax(2))).sigmoid()
        x = x * gate.view(*gate.shape, *[1] * (x.ndim - 2))
        seen = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return x * self.norm(self.conv(seen)).sigmoid()


class NonLocal(nn.Module):
    """Every place of a map attends to all others.

    Wang et al. 2018, https://arxiv.org/abs/1711.07971.

    Args:
        channels: C.
        axes: D.
        form: how similar two positions are: "embedded" (softmax of embedded dot products, scaled as
            the authors' code does), "gaussian" (softmax of plain dot products), "dot" (embedded dot
            products over the number of positions) or "concat" (a ReLU of a learned sum, likewise).
    """

    def __init__(self, channels: int, axes: int, form: str = "embedded"):
        super().__init__()
        assert form in ("embedded", "gaussian", "dot", "concat"), form
        inner = max(channels // 2, 1)
        conv = _CONV[axes]
        self.form, self.scale = form, 1 / math.sqrt(inner)
        self.value = conv(channels, inner, 1)
        if form != "gaussian":
            self.query, self.key = conv(channels, inner, 1), conv(channels, inner, 1)
        if form == "concat":
            self.alike = nn.Linear(2 * inner, 1, bias=False)
        self.pool = _POOL[axes]  # keys and values are pooled over space by 2, as the authors do
        self.out = conv(inner, channels, 1)
        for name, parameter in self.named_parameters():  # as the authors' code starts them
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.01)
            else:
                nn.init.zeros_(parameter)
        self.norm = _NORM[axes](channels)
        nn.init.zeros_(self.norm.weight)  # the block starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        """A map to a map of the same shape."""
        pooled = self.pool(x) if min(x.shape[-2:]) > 1 else x
        value = self.value(pooled).flatten(2).transpose(1, 2)  # (B, M, inner)
        if self.form == "gaussian":
            query, key = x.flatten(2).transpose(1, 2), pooled.flatten(2)
            weights = (query @ key).softmax(-1)
        else:
            query = self.query(x).flatten(2).transpose(1, 2)  # (B, N, inner)
            key = self.key(pooled).flatten(2)  # (B, inner, M)
            if self.form == "embedded":
                weights = (query @ key * self.scale).softmax(-1)
            elif self.form == "dot":
                weights = query @ key / key.shape[-1]
            else:  # a linear function of both, side by side, is the sum of one of each
                left, right = self.alike.weight.chunk(2, 1)
                weights = (query @ left.T + (right @ key)).relu() / key.shape[-1]
        y = (weights @ value).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.norm(self.out(y))


def make_block(kind: str, channels: int, axes: int) -> nn.Module:
    """The block named `kind` for a map of so many channels.

    Raises:
        ValueError: another name.
    """
    if kind == "se":
        return SqueezeExcitation(channels)
    if kind == "cbam":
        return CBAM(channels, axes)
    if kind in KINDS:
        return NonLocal(channels, axes, kind.partition("_")[2] or "embedded")
    raise ValueError(f"attention block {kind!r} is not one of {', '.join(KINDS)}")


def _before_sums(modules: dict[str, nn.Module]) -> list[str]:
    """The last norm of every residual block, before the sum: bn3 of a bottleneck, else bn2."""
    last = {n.rpartition(".")[0]: n for n in sorted(modules) if re.search(r"\.\d+\.bn[23]$", n)}
    return [n for n in modules if n in last.values()]


def insert(backbone: nn.Module, where: str) -> list[str]:
    """Put attention blocks after named modules of a backbone; it is changed in place.

    Args:
        backbone: of any family with convolutions, as it was built.
        where: `kind@place`, several separated by commas. A place is the dotted name of a module,
            `*` and `?` match as in file names: `nonlocal@*layer3` after a ResNet's third stage,
            `cbam@features.Mixed_4?` in I3D. The place `sums` is before the residual sum of every
            block of a 2-D ResNet, where SE and CBAM belong.

    Returns:
        the modules that got a block.

    Raises:
        ValueError: an unknown kind, a name that matches no module, too many modules, or what comes
            out of one is no feature map.
    """
    # Its convolutions span time, although its maps are those of frames.
    frames_in_batch = getattr(backbone, "frames_in_batch", False)
    placed: list[str] = []
    for order in filter(None, (part.strip() for part in where.split(","))):
        kind, _, place = order.partition("@")
        modules = dict(backbone.named_modules())
        if place == "sums":
            names = _before_sums(modules)
        else:
            names = [n for n in modules if n and fnmatch.fnmatchcase(n, place)]
        # Blocks after the parts of blocks would double with every order.
        names = [n for n in names if not isinstance(modules[n.rpartition(".")[0]], Attended)]
        if not place or not names:
            known = [n for n in modules if n.count(".") in (1, 2) and list(modules[n].parameters())]
            raise ValueError(
                f"--attention {order!r}: no place of the network is called {place!r}; "
                f"some that are: {', '.join(known[:12])}"
            )
        if len(placed) + len(names) > MOST_BLOCKS:
            raise ValueError(
                f"--attention {order!r} makes {len(placed) + len(names):,} blocks, and "
                f"{MOST_BLOCKS} are the limit: name fewer modules"
            )
        shapes: dict[str, torch.Size] = {}
        hooks = [
            modules[n].register_forward_hook(
                lambda _, __, out, n=n, shapes=shapes: shapes.__setitem__(
                    n, getattr(out, "shape", torch.Size())
                )
            )
            for n in names
        ]
        spec = backbone.input_spec
        assert isinstance(spec, InputSpec)
        clip = spec.empty(1)
        assert isinstance(clip, torch.Tensor)  # these take one stream
        dry_output(backbone, *clip.shape)
        for hook in hooks:
            hook.remove()
        for name in names:
            shape = shapes.get(name, torch.Size())
            # Clips are square: where the last two axes differ, the channels come last.
            if len(shape) not in (4, 5) or shape[-1] != shape[-2]:
                raise ValueError(
                    f"--attention {order!r}: what comes out of {name} is no feature map with its "
                    "channels first; name a convolution, a norm or a stage"
                )
            if frames_in_batch:
                block: nn.Module = OverClips(make_block(kind, shape[1], 3))
            else:
                block = make_block(kind, shape[1], len(shape) - 2)
            parent = modules[name.rpartition(".")[0]]
            setattr(parent, name.rpartition(".")[2], Attended(modules[name], block))
            placed.append(name)
    return placed


class OverClips(nn.Module):
    """A block that sees clips, in a network that has frames in the batch.

    `frames`, those of a clip, are set before a pass.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.frames = block, 0

    def forward(self, x: Tensor) -> Tensor:
        """(B T, C, H, W) to the same."""
        clips = x.unflatten(0, (-1, self.frames)).transpose(1, 2)
        return self.block(clips).transpose(1, 2).flatten(0, 1)


class Attended(nn.Sequential):
    """A module and the attention block put after it."""

    def __init__(self, module: nn.Module, block: nn.Module):
        super().__init__()
        self.add_module("before", module)
        self.add_module("attention", block)
