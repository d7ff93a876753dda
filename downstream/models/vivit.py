"""ViViT: four ways for a transformer to attend over space and time.

Arnab et al. 2021, "ViViT: A video vision transformer", https://arxiv.org/abs/2103.15691. Model 1
lets all tokens attend to all; model 2 encodes every time slot by itself and then the slots; model 3
attends over space, then over time, in every block; model 4 gives half of the heads to space and
half to time. B clips, N = t h w tokens, D width.
"""

from collections.abc import Container
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from downstream.models.images import download, read_weights
from pretrain.interop.openclip import PREFIX as OPEN_CLIP
from pretrain.interop.openclip import load_open_clip
from pretrain.spec import InputSpec, Stream
from pretrain.vit import spread_drop_path
from pretrain.weights import load_strict

ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
TIMM = "timm:"


class Attention(nn.Module):
    """Multi-head self-attention over one or over two groupings of the tokens."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of the {heads} attention heads")
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Attend over all of x (B, N, D).

        Args:
            x: the tokens.
            grid: (t, positions of a slot), for model 4: the first half of the heads attends inside
                each time slot, the other half along time at each place.
        """
        # (3, B, heads, N, d)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if grid is None:
            out = F.scaled_dot_product_attention(*qkv)
        else:
            half = self.heads // 2
            space = qkv[:, :, :half].unflatten(3, grid)  # (3, B, half, t, s, d)
            time = qkv[:, :, half:].unflatten(3, grid).transpose(3, 4)
            out = torch.cat(
                [
                    F.scaled_dot_product_attention(*space),
                    F.scaled_dot_product_attention(*time).transpose(2, 3),
                ],
                1,
            ).flatten(2, 3)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block of an image ViT under timm's names; in model 3 with a second attention over time."""

    def __init__(self, dim: int, heads: int, activation: str, over_time: bool, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.activation = ACTIVATIONS[activation]
        self.norm_time = self.attn_time = None
        if over_time:
            self.norm_time = nn.LayerNorm(dim, eps=eps)
            self.attn_time = Attention(dim, heads)
        self.drop_path = 0.0

    def _branch(self, y: Tensor, clips: int) -> Tensor:
        """Stochastic depth, for every clip by itself."""
        if not self.training or not self.drop_path:
            return y
        keep = 1 - self.drop_path
        kept = (torch.rand(clips, device=y.device) < keep).to(y.dtype) / keep
        return y * kept.repeat_interleave(len(y) // clips).view(-1, 1, 1)

    def forward(self, x: Tensor, grid: tuple[int, int] | None, split: str) -> Tensor:
        """Tokens (B, N, D) to tokens.

        Args:
            x: the tokens, t and positions in that order.
            grid: (t, positions of a slot).
            split: "joint", "blocks" (model 3) or "heads" (model 4).
        """
        clips = x.shape[0]
        if split == "blocks":
            assert grid is not None and self.norm_time is not None and self.attn_time is not None
            t, positions = grid
            y = self.attn(self.norm1(x).unflatten(1, grid).flatten(0, 1))
            x = x + self._branch(y.unflatten(0, (clips, t)).flatten(1, 2), clips)
            y = self.norm_time(x).unflatten(1, grid).transpose(1, 2).flatten(0, 1)
            y = self.attn_time(y).unflatten(0, (clips, positions)).transpose(1, 2).flatten(1, 2)
            x = x + self._branch(y, clips)
        else:
            y = self.attn(self.norm1(x), grid if split == "heads" else None)
            x = x + self._branch(y, clips)
        y = self.activation(self.mlp["fc1"](self.norm2(x)))
        return x + self._branch(self.mlp["fc2"](y), clips)


class ViViT(nn.Module):
    """A ViViT of any of the four models.

    Args:
        model: 1 (joint), 2 (factorised encoder), 3 (factorised self-attention) or 4 (factorised dot
            product).
        dim: token width.
        depth: blocks; of model 2, of the spatial encoder.
        heads: attention heads; an even number for model 4.
        temporal_depth: blocks of model 2's temporal encoder.
        class_token: pool by a token of its own (models 1 and 2) instead of the mean.
        frames: frames of a clip; 32 as published.
        size: height and width, pixels.
        patch: height and width of a tubelet.
        tubelet: frames of a tubelet; 1 is the paper's uniform frame sampling.
        stride: source frames between two sampled ones; only recorded.
        activation: "gelu_tanh", as published; "gelu", as image ViTs of timm have it; or
            "quick_gelu", OpenAI's CLIP's.
        pre_norm: normalise tokens before the first block, as CLIP's image ViTs do.
        eps: of every LayerNorm.
        mean: of the pixels in [0, 1] that the weights expect, for each colour.
        std: their standard deviation.
        subtract_mean: whether each clip's mean frame is subtracted, see `Stream`.
        recompute: save memory: keep no activations inside blocks, compute them again in the
            backward pass.

    Positional embeddings are learned: one for each token (models 1, 3, 4), or for each place and
    for each time slot (model 2).

    Raises:
        ValueError: the clip is not a whole number of tubelets, or the model cannot be so.
    """

    kind = "vivit"  # to presets of published training, see `downstream.training.kind_of`
    any_frames = "its learned positions are of these frames only"
    zero_head = True  # its classifier starts at zero, as the authors' code has it

    def __init__(
        self, model: int = 1, dim: int = 768, depth: int = 12, heads: int = 12,
        temporal_depth: int = 4, class_token: bool = True, frames: int = 32, size: int = 224,
        patch: int = 16, tubelet: int = 2, stride: int = 2, activation: str = "gelu_tanh",
        pre_norm: bool = False, eps: float = 1e-6, mean: tuple[float, float, float] = (0.5,) * 3,
        std: tuple[float, float, float] = (0.5,) * 3, subtract_mean: bool = False,
        recompute: bool = False,
    ):  # fmt: skip
        super().__init__()
        if model not in (1, 2, 3, 4):
            raise ValueError(f"ViViT has models 1 to 4, not {model}")
        if size % patch or frames % tubelet:
            raise ValueError(
                f"a clip of {frames} frames of {size}x{size} pixels cannot be cut into tubelets of "
                f"{tubelet} frames of {patch}x{patch}: choose multiples"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if model == 4 and heads % 2:
            raise ValueError(f"model 4 halves its heads between space and time: {heads} is odd")
        if model in (3, 4) and class_token:
            raise ValueError(
                f"model {model} has no place for a class token: give class_token=False"
            )
        self.arguments: dict[str, Any] = {
            "model": model, "dim": dim, "depth": depth, "heads": heads,
            "temporal_depth": temporal_depth, "class_token": class_token, "frames": frames,
            "size": size, "patch": patch, "tubelet": tubelet, "stride": stride,
            "activation": activation, "pre_norm": pre_norm, "eps": eps, "mean": list(mean),
            "std": list(std), "subtract_mean": subtract_mean, "recompute": recompute,
        }  # fmt: skip
        self.model, self.recompute = model, recompute
        t, side = frames // tubelet, size // patch
        self.slots, self.side = t, side
        self.embed_dim = dim
        # The tokens of model 2 are those of its temporal encoder, one a slot.
        self.grid = (t, 1, 1) if model == 2 else (t, side, side)
        self.input_spec = InputSpec(
            frames,
            stride,
            size,
            {"rgb": Stream(tuple(mean), tuple(std), subtract_mean=subtract_mean)},
        )
        self.patch_embed = nn.Conv3d(3, dim, (tubelet, patch, patch), (tubelet, patch, patch))
        per_encoder = side * side if model == 2 else t * side * side
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, per_encoder + class_token, dim))
        self.norm_pre = nn.LayerNorm(dim, eps=eps) if pre_norm else None
        self.blocks = nn.ModuleList(
            Block(dim, heads, activation, model == 3, eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=eps)
        if model == 2:
            self.time_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
            self.time_pos_embed = nn.Parameter(torch.zeros(1, t + class_token, dim))
            self.time_blocks = nn.ModuleList(
                Block(dim, heads, activation, False, eps) for _ in range(temporal_depth)
            )
            self.time_norm = nn.LayerNorm(dim, eps=eps)
        for name, parameter in self.named_parameters():
            if name.endswith(("pos_embed", "_token")) or parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for block in self.blocks:
            if isinstance(block, Block) and block.attn_time is not None:
                # At the start each slot is seen as an image ViT sees it.
                nn.init.zeros_(block.attn_time.proj.weight)

    def set_drop_path(self, rate: float) -> None:
        """Let blocks be left out in training, the last with probability `rate`."""
        spread_drop_path(self.blocks, rate)

    @classmethod
    def with_weights(cls, weights: str, arguments: dict, given: Container[str]) -> Self:
        """Built with these arguments, and started from an image ViT, see `read_image_vit`.

        What the image ViT says of its blocks and pixels replaces the arguments that were not given.
        """
        if not weights:
            return cls(**arguments)
        about, theirs = read_image_vit(weights)
        if arguments["model"] > 2:
            del about["class_token"]  # these two have no place for one
        backbone = cls(**arguments | {k: v for k, v in about.items() if k not in given})
        load_strict(backbone, start_from_image(theirs, backbone, "central"), weights)
        return backbone

    def _run(
        self, blocks: nn.ModuleList, x: Tensor, grid: tuple[int, int] | None, split: str
    ) -> Tensor:
        for block in blocks:
            if self.recompute and self.training:
                x = checkpoint(block, x, grid, split, use_reentrant=False)
            else:
                x = block(x, grid, split)
        return x

    def encode_all(self, video: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens (B, N, D) of clips and the class token (B, D), if there is one."""
        self.input_spec.expect(video)
        x = self.patch_embed(video).flatten(3).permute(0, 2, 3, 1)  # (B, t, positions, D)
        clips = x.shape[0]
        if self.model == 2:
            x = x.flatten(0, 1)  # every slot is a picture
        else:
            x = x.flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.pos_embed
        if self.norm_pre is not None:
            x = self.norm_pre(x)
        if self.model != 2:
            split = {1: "joint", 3: "blocks", 4: "heads"}[self.model]
            x = self.norm(self._run(self.blocks, x, (self.slots, self.side**2), split))
            return (x, None) if self.cls_token is None else (x[:, 1:], x[:, 0])
        x = self.norm(self._run(self.blocks, x, None, "joint"))
        slots = (x.mean(1) if self.cls_token is None else x[:, 0]).unflatten(0, (clips, self.slots))
        if self.time_token is not None:
            slots = torch.cat([self.time_token.expand(clips, -1, -1), slots], 1)
        slots = slots + self.time_pos_embed
        slots = self.time_norm(self._run(self.time_blocks, slots, None, "joint"))
        return (slots, None) if self.time_token is None else (slots[:, 1:], slots[:, 0])

    def forward_features(self, video: Tensor) -> Tensor:
        """The tokens of the last block, without the class token."""
        return self.encode_all(video)[0]

    def forward(self, video: Tensor) -> Tensor:
        """The class token, or the mean token."""
        tokens, token = self.encode_all(video)
        return tokens.mean(1) if token is None else token


def read_image_vit(source: str) -> tuple[dict, dict[str, Tensor]]:
    """An image ViT, to start a `ViViT` from.

    Args:
        source: "imagenet", timm's vit_base_patch16_224; timm:NAME, another of timm's ViTs; an
            open_clip name, open_clip:MODEL/WEIGHTS; or a .safetensors, .pth or .pt file in timm's
            layout, whose heads are taken to be 64 wide and whose activation is GELU, since a file
            does not say.

    Returns:
        the arguments of the `ViViT` that has the same blocks and sees the same pixels, and the
        weights under timm's names, ready for `start_from_image`.

    Raises:
        ValueError: there is no such network or file, nothing can be downloaded, or it is not a ViT.
    """
    about: dict[str, Any] = {"activation": "gelu", "eps": 1e-6}
    if source.startswith(OPEN_CLIP):
        pair = load_open_clip(source)
        weights = _under_timms_names(pair.visual.state_dict(), source)
        vision = pair.config["vision_cfg"]
        about["heads"] = weights["cls_token"].shape[2] // vision.get("head_width", 64)
        about["activation"] = "quick_gelu" if pair.config["quick_gelu"] else "gelu"
        norm = pair.visual.get_submodule("ln_post")
        assert isinstance(norm, nn.LayerNorm)
        about["eps"] = norm.eps
        about |= {"mean": list(pair.preprocess["mean"]), "std": list(pair.preprocess["std"])}
    elif source == "imagenet" or source.startswith(TIMM):
        import timm

        name = "vit_base_patch16_224" if source == "imagenet" else source.removeprefix(TIMM)
        net = download(name, "timm")
        if not isinstance(net, timm.models.VisionTransformer):
            raise ValueError(f"--weights {source}: {name} is not a plain image ViT")
        weights, block, told = dict(net.state_dict()), net.blocks[0], net.pretrained_cfg
        assert isinstance(block, timm.models.vision_transformer.Block) and isinstance(told, dict)
        about |= {"heads": block.attn.num_heads, "eps": block.norm1.eps}
        about["activation"] = "quick_gelu" if "Quick" in type(block.mlp.act).__name__ else "gelu"
        about |= {k: list(told[k]) for k in ("mean", "std")}
    else:
        weights = read_weights(source)
    if not {"patch_embed.proj.weight", "pos_embed"} <= weights.keys():
        raise ValueError(f"--weights {source} is not an image ViT in timm's layout")
    dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
    weights.setdefault("patch_embed.proj.bias", torch.zeros(dim))  # CLIP's have none
    has_class = "cls_token" in weights
    side = round((weights["pos_embed"].shape[1] - has_class) ** 0.5)
    return {
        "dim": dim, "heads": max(dim // 64, 1), "patch": patch, "size": side * patch,
        "class_token": has_class,
        "depth": len({n.split(".")[1] for n in weights if n.startswith("blocks.")}),
        "pre_norm": "norm_pre.weight" in weights, **about,
    }, weights  # fmt: skip


def _under_timms_names(weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights of open_clip's image ViT under timm's names, without its projection to texts."""
    if "conv1.weight" not in weights or "class_embedding" not in weights:
        raise ValueError(f"--weights {source}: its image tower is not open_clip's own ViT")
    names = {
        "conv1.weight": "patch_embed.proj.weight", "ln_pre": "norm_pre", "ln_post": "norm",
        "ln_1": "norm1", "ln_2": "norm2", "attn.in_proj_": "attn.qkv.",
        "attn.out_proj": "attn.proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
        "transformer.resblocks": "blocks",
    }  # fmt: skip
    theirs = {}
    for name, value in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        theirs[name] = value
    theirs.pop("proj", None)
    theirs["cls_token"] = theirs.pop("class_embedding").view(1, 1, -1)
    theirs["pos_embed"] = theirs.pop("positional_embedding").unsqueeze(0)
    return theirs


def start_from_image(weights: dict[str, Tensor], model: ViViT, start: str) -> dict[str, Tensor]:
    """The weights of an image ViT for a `ViViT`, which keeps its initialisation of any others.

    Args:
        weights: of a ViT with the same width, depth, patch and size, under timm's names; its head
            is left out.
        model: the model to start.
        start: of the patch embedding: "central", the middle frame of a tubelet is seen as the image
            ViT sees it and the others not at all; or "average", all alike (section 3.4 of the
            paper).

    Returns:
        a state for `load_strict`.

    Raises:
        ValueError: another word for `start`, or weights of another shape.
    """
    if start not in ("central", "average"):
        raise ValueError(f"start {start!r} is neither central nor average")
    ours = dict(model.state_dict())
    tubelet, has_class = model.arguments["tubelet"], model.cls_token is not None
    used = set()
    for name, value in weights.items():
        if name.startswith(("head.", "fc_norm.", "pre_logits.")):
            continue
        target = {
            "patch_embed.proj.weight": "patch_embed.weight",
            "patch_embed.proj.bias": "patch_embed.bias",
        }.get(name, name)
        if name == "patch_embed.proj.weight":
            kernel = torch.zeros_like(ours[target])
            if start == "central":
                kernel[:, :, tubelet // 2] = value
            else:
                kernel[:] = value.unsqueeze(2) / tubelet
            value = kernel
        elif name == "cls_token" and not has_class:
            continue
        elif name == "pos_embed":
            first = int("cls_token" in weights)
            token, positions = value[:, :first], value[:, first:]
            if model.model != 2:
                positions = positions.repeat(1, model.slots, 1)  # the same in every slot
            value = torch.cat([token, positions], 1) if has_class else positions
        if target not in ours or ours[target].shape != value.shape:
            shape = tuple(ours[target].shape) if target in ours else "no such weight"
            raise ValueError(
                f"the image ViT's {name} is {tuple(value.shape)}, this ViViT has {shape}"
            )
        ours[target] = value
        used.add(target)
    # What spans time, and a class token where the image ViT has none, keep their start.
    fresh = lambda n: n.startswith("time_") or "_time." in n or (n == "cls_token" and not has_class)
    missing = [n for n in ours if n not in used and not fresh(n)]
    if missing:
        raise ValueError(f"the image ViT lacks {missing[0]}: it has other blocks than this ViViT")
    return ours
