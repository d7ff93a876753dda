"""Encoders as the flags of the pretraining recipes ask for them."""

from pathlib import Path
from typing import Any

from torch import nn

from downstream.models import MODELS, build_model, load_backbone, matched_stride, trained_rate
from downstream.models.frames import FrameNetwork, frame_tower
from pretrain.backbones import folder_of, load_pretrained_videomae
from pretrain.clip import VideoText
from pretrain.files import is_folder
from pretrain.interop.openclip import MEAN as CLIP_MEAN
from pretrain.interop.openclip import PREFIX as OPEN_CLIP
from pretrain.interop.openclip import STD as CLIP_STD
from pretrain.interop.openclip import Pair, load_open_clip
from pretrain.interop.videomae import import_videomae
from pretrain.names import did_you_mean
from pretrain.settings import JOINTS, SIZES, VITS, Form, JointForm
from pretrain.spec import Backbone, Selective
from pretrain.text import HuggingFaceText, OpenClipText, TextTower, fresh_text
from pretrain.videomae import VideoMAE
from pretrain.vit import VideoTransformer
from pretrain.weights import load_strict

FRAMES = 16  # of a clip, unless it is said or a family has its own


def transformer(
    name: str, form: Form, frames: int | None, stride: int, size: int, pool: str = "mean",
    stream: str = "rgb",
) -> VideoTransformer:  # fmt: skip
    """A video transformer of a size, with fresh weights.

    Args:
        name: of `VITS`.
        form: how it is built.
        frames: of a clip; None: 16.
        stride: source frames between two sampled ones; 0: uniform sampling.
        size: height and width of a clip, pixels.
        pool: see `VideoTransformer`, likewise `stream`.
        stream: see there.

    Raises:
        ValueError: the clip is not a whole number of tubelets, or as `VideoTransformer`.
    """
    frames = frames or FRAMES
    _refuse_rest("--size", size, "--patch", form.patch)
    _refuse_rest("--frames", frames, "--tubelet", form.tubelet)
    dim, depth, heads = SIZES[VITS[name]]
    return VideoTransformer(
        dim, form.depth or depth, heads, frames, size, form.patch, form.tubelet, stride,
        positions=form.positions, init=form.init, motion_tokens=form.motion_tokens, pool=pool,
        stream=stream,
    )  # fmt: skip


def _refuse_rest(flag: str, whole: int, part_flag: str, part: int) -> None:
    if whole % part:
        fits = [n for n in range(1, whole + 1) if whole % n == 0]
        near = min(fits, key=lambda n: abs(n - part))
        raise ValueError(
            f"{flag} {whole} is not a multiple of {part_flag} {part}: choose multiples, such as "
            f"{part_flag} {near}, or {flag} {part * max(round(whole / part), 1)}"
        )


def weights_to_start_from(name: str) -> nn.Module:
    """What --backbone of masked reconstruction names, in evaluation mode.

    Args:
        name: a run or published weights, which come with their decoder if they have one; or a
            backbone.

    Raises:
        ValueError: nothing of the kind is there, or it does not verify.
    """
    if name in MODELS:
        raise ValueError(f"--backbone {name} is a network without weights: give --model {name}")
    if is_folder(Path(name) / "checkpoints"):
        return load_pretrained_videomae(Path(name))
    name = folder_of(name)
    if name.startswith("hf:") or name.endswith((".pth", ".pt")):
        return import_videomae(name)[0]
    backbone = load_backbone(name)
    assert isinstance(backbone, nn.Module)
    return backbone


def form_of_weights(name: str, fps: float) -> dict[str, Any]:
    """What weights decide of a masked reconstruction that starts from them, by flag.

    Args:
        name: as `weights_to_start_from` takes it.
        fps: frames a second of the clips: with those that the weights saw they decide the stride.

    Raises:
        ValueError: see there.
    """
    loaded = weights_to_start_from(name)
    encoder = loaded.encoder if isinstance(loaded, VideoMAE) else loaded
    assert isinstance(encoder, Backbone)
    spec, has = encoder.input_spec, encoder.arguments
    form: dict[str, Any] = {"frames": spec.frames, "size": spec.size}
    run = is_folder(Path(name) / "checkpoints")
    rate = trained_rate(f"{name}/backbone" if run else name)
    if rate and spec.stride:
        form["stride"] = matched_stride(spec.stride, fps, rate)
    if not isinstance(encoder, VideoTransformer):
        return form
    if named := [n for n, size in VITS.items() if SIZES[size][0] == has["dim"]]:
        form["model"] = named[0]  # else a network of another width is built, and refused
    form |= {n: has[n] for n in ("depth", "patch", "tubelet", "positions", "motion_tokens")}
    if isinstance(loaded, VideoMAE):
        decoder = loaded.arguments["decoder"]
        form |= {n: decoder[n] for n in ("decoder_dim", "decoder_depth")}
    return form


# ---- two towers --------------------------------------------------------------------------------


def video_tower(
    model: str, small: bool, form: Form, frames: int | None, stride: int, size: int, pool: str,
    pixels: str, pair: Pair | None = None, joints: JointForm = JOINTS,
) -> nn.Module:  # fmt: skip
    """A fresh video tower, or that of an open_clip pair.

    Args:
        model: of `VITS`, one of them behind "frames:" for an image ViT on every frame, of `MODELS`,
            or that of `pair`.
        small: of `MODELS`: the small network.
        form: see `transformer`, likewise `frames`, `stride` and `size`.
        frames: see there; None: 16, or those of a family.
        stride: see there.
        size: see there.
        pool: of an image tower's frames, see `FrameNetwork`.
        pixels: of an open_clip tower, see `Pair.network`.
        pair: of open_clip.
        joints: of `MODELS` that take joints.

    Raises:
        ValueError: there is no such tower, or it cannot be built so.
    """
    if model in VITS:
        return transformer(model, form, frames, stride, size)
    if model in MODELS:
        changes: dict[str, Any] = {"stride": stride, "size": size}
        changes |= {"frames": frames} if frames else {}
        tower = build_model(model, small=small, **changes, **joints.given())
        assert isinstance(tower, Backbone) and isinstance(tower, nn.Module)
        return tower
    if pair:
        return frame_tower(pair, frames or FRAMES, stride, pool, pixels)
    name = model.removeprefix("frames:")
    if name not in VITS:
        known = [*MODELS, *(f"frames:{vit}" for vit in VITS)]
        raise ValueError(
            f"--model {model!r} is not a name of python -m downstream.models, frames: and one of "
            f"{', '.join(VITS)}, or open_clip:MODEL/WEIGHTS{did_you_mean(model, known)}"
        )
    _refuse_rest("--size", size, "--patch", form.patch)
    dim, depth, heads = SIZES[VITS[name]]
    vision_cfg = {
        "layers": form.depth or depth, "width": dim, "head_width": dim // heads,
        "patch_size": form.patch, "image_size": size,
    }  # fmt: skip
    network = {
        "open_clip": {"embed_dim": dim, "vision_cfg": vision_cfg, "quick_gelu": False},
        "mean": list(CLIP_MEAN), "std": list(CLIP_STD), "interpolation": "bilinear",
    }  # fmt: skip
    return FrameNetwork(network, frames or FRAMES, stride, size, pool)


def text_model_name(model: str, backbone: str | None, text_model: str | None) -> str:
    """--text-model, or what it is when not given: the other half of an open_clip pair, else ti."""
    own = model.startswith(OPEN_CLIP) and not backbone
    return text_model or (model if own else "ti")


def build_pair(
    model: str, backbone: str | None, small: bool, form: Form, frames: int | None, stride: int,
    size: int, pool: str, pixels: str, drop_tokens: float, text_model: str | None, dim: int,
    loss: str, joints: JointForm = JOINTS,
) -> VideoText:  # fmt: skip
    """The two towers, fresh or with the weights that they name.

    Args:
        model: see `video_tower`, likewise the other arguments that it has.
        backbone: a trained video tower instead.
        small: see there.
        form: see there.
        frames: see there.
        stride: see there.
        size: see there.
        pool: see there.
        pixels: see there.
        drop_tokens: fraction of the video tokens left out in training (FLIP).
        text_model: a size of `fresh_text`, open_clip:MODEL/WEIGHTS or hf:NAME; None: see
            `text_model_name`.
        dim: width of the joint space, where the towers do not share one.
        loss: see `VideoText`.
        joints: see `video_tower`.

    Raises:
        ValueError: there is no such tower, it cannot be loaded, or cannot drop tokens.
    """
    if backbone and backbone.startswith(OPEN_CLIP):
        raise ValueError(f"give --model {backbone}, not --backbone: it has no clip of its own")
    if not 0 <= drop_tokens < 1:
        raise ValueError(f"--drop-tokens {drop_tokens} is not a fraction between 0 and 1")
    text_model = text_model_name(model, backbone, text_model)
    names = {n for n in (model, text_model) if n.startswith(OPEN_CLIP)}
    # A pair that gives both towers is loaded once.
    pairs = {n: load_open_clip(n) for n in sorted(names)}
    video: Any = load_backbone(backbone) if backbone else None
    if not backbone:
        video = video_tower(
            model, small, form, frames, stride, size, pool, pixels, pairs.get(model), joints,
        )  # fmt: skip
    if drop_tokens and not isinstance(video, Selective):
        if not hasattr(video, "drop_tokens"):
            raise ValueError(
                "--drop-tokens needs a video transformer or a ViT of open_clip; give 0"
            )
        video.drop_tokens(drop_tokens)
    pair = pairs.get(text_model)
    if pair:
        text: TextTower = OpenClipText(pair.text_config, pair.tokenizer)
        load_strict(text.tower, pair.text.state_dict(), text_model)
    elif text_model.startswith("hf:"):
        text = HuggingFaceText.from_name(text_model.removeprefix("hf:"))
    else:
        text = fresh_text(text_model, dim)
    if loss == "classes" and isinstance(text, OpenClipText):
        # As ViFi-CLIP: the prompts are always the same, and the words of other classes stay.
        text.tower.token_embedding.requires_grad_(False)
    whole = pair if pair and text_model == model and pair.trained else None
    towers = VideoText(video, text, text.embed_dim if whole else dim, not whole, loss)
    if whole and (whole.bias is None) == (loss != "siglip"):
        towers.log_scale.data.copy_(whole.log_scale.reshape(()))
        if whole.bias is not None and towers.bias is not None:
            towers.bias.data.copy_(whole.bias.reshape(()))
    return towers
