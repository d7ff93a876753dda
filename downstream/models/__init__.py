"""The model families: `MODELS`, name -> family, which `python -m downstream.models` prints.

Each builds a `pretrain.spec.Backbone`. `load_backbone` here is the one that knows them all.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from downstream.classifier import Classifier
from downstream.models.attention import insert
from downstream.models.c3d import C3D
from downstream.models.frames import FrameNetwork, frame_tower
from downstream.models.fusion import EarlyFusion, EarlyStreams, LateFusion, SlowFusion
from downstream.models.i3d import I3D, load_i3d_flow_k400, load_i3d_k400
from downstream.models.images import with_image_weights
from downstream.models.inflated import Inflated
from downstream.models.pose_attention import PoseAttention
from downstream.models.recurrent import FrameRNN
from downstream.models.skeleton import SkeletonLSTM
from downstream.models.stgcn import STGCN
from downstream.models.tcn import FrameTCN
from downstream.models.torchvision3d import TorchvisionVideo, load_torchvision_k400
from downstream.models.two_stream import FeatureFusion, FlowStack
from downstream.models.video_swin import VideoSwin
from downstream.models.vivit import ViViT
from pretrain import backbones
from pretrain.clip import VideoText
from pretrain.files import is_folder, no_folder
from pretrain.interop.openclip import PREFIX as OPEN_CLIP
from pretrain.interop.openclip import load_open_clip, video_text
from pretrain.interop.videomae import import_videomae, load_videomae
from pretrain.names import counted, did_you_mean, for_screen
from pretrain.processes import is_first
from pretrain.settings import SIZES, STARTER
from pretrain.spec import Backbone
from pretrain.third_party import shown
from pretrain.vit import VideoTransformer

__all__ = [
    "MODELS",
    "PUBLISHED",
    "Family",
    "build_model",
    "builders",
    "check_name",
    "choose_sampling",
    "classifier_of",
    "load_backbone",
    "load_classifier",
    "load_video_text",
    "match_rate",
    "matched_stride",
    "trained_rate",
]


STARTER_RATE = 16.0  # frames a second


@dataclass(frozen=True)
class Family:
    """One way to see a clip.

    Attributes:
        build: the class.
        paper: where it was published.
        arguments: of the class, where they are not its defaults.
        small: arguments for minutes on a CPU: fewer pixels, a small 2-D network, fewer channels,
            the joints of the synthetic dataset.
        k400: loads the classifier of Kinetics-400 that was published with it, from a file ("":
            downloaded where that is possible); None: there is none.

    A class of several networks (`parts`) has the names of families as their arguments. A class
    whose networks can start from third-party weights has `with_weights(weights, arguments, given)`,
    which builds it and loads them; `given` are the arguments that weights may not change.
    """

    build: Callable[..., nn.Module]
    paper: str
    arguments: dict = field(default_factory=dict)
    small: dict = field(default_factory=dict)
    k400: Callable[[str], Classifier] | None = None


# 0.4 million parameters; and temporal-mean subtraction, see the changelog.
_SMALL_NETWORK = {"network": "test_resnet", "size": 48, "subtract_mean": True}
_KARPATHY = "Karpathy et al. 2014 (CVPR)"
_FRAMES16 = {"frames": 16, "stride": 4}
_SMALL16 = {**_SMALL_NETWORK, "frames": 16, "stride": 2}
_LRCN = "Donahue et al. 2015, arXiv:1411.4389"
_TCN = "Bai et al. 2018, arXiv:1803.01271"
_I3D = "Carreira & Zisserman 2017, arXiv:1705.07750"
_R3D = "Tran et al. 2018, arXiv:1711.11248"
_SMALL3D = {"frames": 16, "stride": 2, "size": 48, "subtract_mean": True}
_SMALL_I3D = {**_SMALL3D, "width": 0.5}
_TWO_STREAM = "Simonyan & Zisserman 2014, arXiv:1406.2199"
_SMALL_FLOW = {"network": "test_resnet", "size": 48}
_STGCN = "Yan et al. 2018, arXiv:1801.07455"
_BONES = "Shi et al. 2019, arXiv:1805.07694"
_SMALL_JOINTS = {"skeleton": "synthetic20", "people": 1, "size": 48}
_SMALL_STGCN = {**_SMALL_JOINTS, "width": 0.5, "dropout": 0.0, "frames": 32}
_DAS = "Das et al. 2019 (ICCV)"


def _sized(size: str) -> Family:
    dim, depth, heads = SIZES[size]
    small = {
        "size": 48,
        "patch": 8,
        "stride": 2,
        "positions": "separable",
        "init": "mimetic",
        "motion_tokens": 0.375,
    }
    return Family(
        VideoTransformer, "Tong et al. 2022, arXiv:2203.12602",
        {"dim": dim, "depth": depth, "heads": heads}, small,
    )  # fmt: skip


def _vivit(number: int) -> Family:
    dim, depth, heads = SIZES["b"]
    arguments = {
        "model": number,
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "class_token": number < 3,
    }
    small = {"dim": 128, "depth": 4, "heads": 4, "temporal_depth": 2, "patch": 8, **_SMALL3D}
    return Family(ViViT, "Arnab et al. 2021, arXiv:2103.15691", arguments, small)


def _swin(variant: str) -> Family:
    return Family(
        VideoSwin,
        "Liu et al. 2022, arXiv:2106.13230",
        {"variant": variant},
        {**_SMALL3D, "variant": "xs"},
    )


def _torchvision(name: str, paper: str, **clip: int) -> Family:
    small = _SMALL3D if name == "s3d" else {"size": 48, "subtract_mean": True}
    published = partial(load_torchvision_k400, name)
    return Family(TorchvisionVideo, paper, {"name": name, **clip}, small, published)


MODELS: dict[str, Family] = {
    "frame_single": Family(
        FrameNetwork, _KARPATHY, {"frames": 1}, {**_SMALL_NETWORK, "subtract_mean": False}
    ),
    "frame_mean": Family(FrameNetwork, "mean of frames", _FRAMES16, _SMALL16),
    "frame_max": Family(
        FrameNetwork, "maximum over frames", {**_FRAMES16, "pool": "max"}, _SMALL16
    ),
    "frame_late": Family(LateFusion, _KARPATHY, {}, _SMALL_NETWORK),
    "frame_early": Family(EarlyFusion, _KARPATHY, {}, {**_SMALL_NETWORK, "stride": 3}),
    "frame_slow": Family(SlowFusion, _KARPATHY, {}, {**_SMALL_NETWORK, "stride": 3}),
    "early_streams": Family(EarlyStreams, "colour and flow stacked", {}, _SMALL_FLOW),
    "flow_stack": Family(FlowStack, _TWO_STREAM, {}, _SMALL_FLOW),
    "two_stream": Family(
        FeatureFusion, _TWO_STREAM, {"first": "frame_single", "second": "flow_stack"}
    ),
    "rnn": Family(FrameRNN, "Elman 1990, on frames", {"cell": "rnn"}, _SMALL16),
    "lstm": Family(FrameRNN, _LRCN, {"cell": "lstm"}, _SMALL16),
    "bilstm": Family(
        FrameRNN, _LRCN, {"cell": "lstm", "bidirectional": True}, _SMALL16
    ),
    "gru": Family(FrameRNN, "Cho et al. 2014, on frames", {"cell": "gru"}, _SMALL16),
    "tcn": Family(FrameTCN, _TCN, {}, _SMALL16),
    "tcn_acausal": Family(FrameTCN, _TCN, {"causal": False}, _SMALL16),
    "ed_tcn": Family(
        FrameTCN, "Lea et al. 2017, arXiv:1611.05267",
        {
            "form": "encoder_decoder", "causal": False, "hidden": 64, "depth": 2, "kernel": 25,
            "dropout": 0.3,
        },
        _SMALL16,
    ),
    "c3d": Family(
        C3D, "Tran et al. 2015, arXiv:1412.0767", {},
        {**_SMALL3D, "width": 0.25, "batch_norm": True},
    ),
    "i3d": Family(I3D, _I3D, {}, _SMALL_I3D, load_i3d_k400),
    "i3d_flow": Family(I3D, _I3D, {"channels": 2}, _SMALL_I3D, load_i3d_flow_k400),
    "i3d_early": Family(I3D, "I3D of colour and flow stacked", {"channels": 5}, _SMALL_I3D),
    "i3d_two_stream": Family(FeatureFusion, _I3D, {"first": "i3d", "second": "i3d_flow"}),
    "inflated": Family(Inflated, _I3D, {}, _SMALL16),
    "inflated_se": Family(
        Inflated, "Hu et al. 2018, arXiv:1709.01507", {"attention": "se@sums"}, _SMALL16
    ),
    "inflated_cbam": Family(
        Inflated, "Woo et al. 2018, arXiv:1807.06521", {"attention": "cbam@sums"}, _SMALL16
    ),
    "inflated_nonlocal": Family(
        Inflated, "Wang et al. 2018, arXiv:1711.07971", {"attention": "nonlocal@*.layer3"}, _SMALL16
    ),
    **{name: _torchvision(name, _R3D) for name in ("r3d_18", "mc3_18", "r2plus1d_18")},
    "s3d": _torchvision("s3d", "Xie et al. 2018, arXiv:1712.04851", frames=64, stride=1, size=224),
    **{f"vit_{size}": _sized(size) for size in SIZES},
    **{f"vivit_{number}": _vivit(number) for number in (1, 2, 3, 4)},
    "frame_swin": Family(
        FrameNetwork, "Liu et al. 2021, arXiv:2103.14030, mean of frames",
        {**_FRAMES16, "network": "torchvision:swin_t"},
        {**_SMALL3D, "network": "torchvision:swin_xs"},
    ),
    **{f"video_swin_{variant}": _swin(variant) for variant in ("t", "s", "b", "l")},
    "skeleton_lstm": Family(
        SkeletonLSTM, _DAS, {}, {**_SMALL_JOINTS, "hidden": 128, "frames": 16}
    ),
    "stgcn": Family(STGCN, _STGCN, {}, _SMALL_STGCN),
    "stgcn_bone": Family(STGCN, _BONES, {"data": "bone"}, _SMALL_STGCN),
    "stgcn_both": Family(STGCN, _BONES, {"data": "both"}, _SMALL_STGCN),
    "pose_attention": Family(PoseAttention, _DAS, {"video": "i3d", "pose": "skeleton_lstm"}),
    "feature_fusion": Family(
        FeatureFusion, "embeddings side by side", {"first": "i3d", "second": "skeleton_lstm"}
    ),
}  # fmt: skip


# Classifiers that others published: name -> what loads it from a file.
PUBLISHED = {f"{name}_k400": family.k400 for name, family in MODELS.items() if family.k400}


FRAMES = (8, 8)  # frames and stride of an image tower that comes without a clip of its own


def builders() -> dict[str, Callable[..., nn.Module]]:
    """What a config.json may name: `pretrain.backbones.BUILDERS`, families, the classifier."""
    families = {family.build.__name__: family.build for family in MODELS.values()}
    return {**backbones.BUILDERS, **families, "Classifier": Classifier}


def check_name(name: str) -> Family:
    """The family called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in MODELS:
        raise ValueError(
            f"there is no model {name!r}{did_you_mean(name, MODELS)}; python -m downstream.models "
            "lists them"
        )
    return MODELS[name]


def build_model(
    name: str, small: bool = False, weights: str = "", parts: Sequence[str] = (), **changes: object
) -> nn.Module:
    """A backbone of `MODELS`, fresh or with third-party weights, in evaluation mode.

    Args:
        name: in `MODELS`.
        small: with the family's arguments for a CPU.
        weights: "": fresh, from torch's generator; "imagenet": of the family's 2-D network, or a
            file of them in the layout of timm or torchvision; "kinetics": of torchvision's 3-D
            networks and Video Swins, or a file of them; for a ViViT, an image ViT, see
            `read_image_vit`.
        parts: of a model of several networks, what each is, in order: a name in `MODELS`, or what
            `load_backbone` knows besides; (): the family's.
        changes: arguments of the class that differ from the family's, or of its parts; `network`
            may be an open_clip name, whose weights then come with it.

    Raises:
        ValueError: an unknown name or argument, or weights that do not fit.
    """
    family = check_name(name)
    if slots := backbones.parts_of(family.build):
        return _build_of_parts(name, slots, small, weights, parts, changes)
    if parts:
        raise ValueError(f"--parts {parts[0]} means nothing to {name}, which is one network")
    known = inspect.signature(family.build).parameters
    for key in changes:
        if key not in known:
            # A name implies its family's arguments, but for the clip.
            free = [
                k for k in known if k not in family.arguments or k in ("frames", "stride", "size")
            ]
            raise ValueError(
                f"--{key.replace('_', '-')} means nothing to {name}, which has {', '.join(free)}"
            )
    arguments = {**family.arguments, **(family.small if small else {}), **changes}
    # Weights go in before attention blocks do, so that they meet the names they know.
    attention = arguments.pop("attention", "") if "attention" in known else ""
    if hasattr(family.build, "with_weights"):
        backbone = family.build.with_weights(weights, arguments, changes)
    elif "network" in known:
        backbone = with_image_weights(family.build, weights, arguments)
    elif not weights:
        backbone = family.build(**arguments)
    else:
        trained = f"{name}_k400"
        hint = f"; trained is --backbone {trained} --weights FILE" if trained in PUBLISHED else ""
        raise ValueError(f"--weights {weights}: {name} takes no third-party weights{hint}")
    if attention:
        insert(backbone, attention)
        backbone.arguments["attention"] = attention
    return backbone.eval()


def _build_of_parts(
    name: str, slots: Sequence[str], small: bool, weights: str, parts: Sequence[str], changes: dict
) -> nn.Module:
    """A model of several networks; see `build_model`."""
    family = MODELS[name]
    if parts and len(parts) != len(slots):
        raise ValueError(
            f"{name} is of {len(slots)} networks, {' and '.join(slots)}: --parts takes as many "
            f"names, not {len(parts)}"
        )
    known = inspect.signature(family.build).parameters
    arguments = {k: v for k, v in family.arguments.items() if k not in slots}
    arguments |= {k: v for k, v in changes.items() if k in known and k not in slots}
    shared = changes.keys() - arguments.keys()
    left, unloaded = set(shared), weights
    for slot, part in zip(slots, parts or [family.arguments[s] for s in slots], strict=True):
        if part not in MODELS:
            arguments[slot] = load_backbone(part)
            continue
        theirs = inspect.signature(MODELS[part].build).parameters
        # A single frame stays one, however many the other network sees.
        single = MODELS[part].arguments.get("frames") == 1
        handed = {k: changes[k] for k in shared & theirs.keys() if not (single and k == "frames")}
        left -= handed.keys()
        takes = "network" in theirs or hasattr(MODELS[part].build, "with_weights")
        arguments[slot] = build_model(part, small, weights if takes else "", **handed)
        unloaded = "" if takes else unloaded
    if left or unloaded:
        what = f"--{min(left).replace('_', '-')}" if left else f"--weights {shown(weights)}"
        raise ValueError(f"{what} means nothing to {name} of {' and '.join(parts or slots)}")
    return family.build(**arguments).eval()


def load_backbone(name: str, weights: str = "") -> Backbone:
    """The backbone that `--backbone` names, with its weights, in evaluation mode.

    Args:
        name: a folder that a recipe exported (of a pair its video tower, of a classifier what is
            under its head); `starter`, which comes with the package; `hf:` and a hub name or folder
            of such an export or of a VideoMAE, or an official VideoMAE `.pth` file, pretrained or
            fine-tuned; `open_clip:MODEL/WEIGHTS`, whose image tower sees `FRAMES`, their embeddings
            averaged; a name in `PUBLISHED`; or one in `MODELS` (fresh weights unless `weights` is
            given).
        weights: for a name in `MODELS`, see `build_model`; for one in `PUBLISHED`, its file.

    Raises:
        ValueError: nothing of the kind is there, or it does not verify.
    """
    if name in PUBLISHED:
        return PUBLISHED[name](weights).backbone
    if name in MODELS:
        backbone = build_model(name, weights=weights)
        assert isinstance(backbone, Backbone)
        return backbone
    if weights:
        raise ValueError(
            f"--weights takes effect with a name of MODELS or i3d_k400 only, not with {name}"
        )
    if name.startswith(OPEN_CLIP):
        return frame_tower(load_open_clip(name), *FRAMES)
    name = backbones.folder_of(name)
    if _is_videomae(name):
        return load_videomae(name)
    if not is_folder(name):
        raise ValueError(
            f"no backbone at {shown(name)} ({no_folder(name)}){did_you_mean(name, MODELS)}; give a "
            "folder exported by a recipe (RUN/backbone), starter, which comes with the package, "
            "hf:OWNER/NAME or hf:FOLDER, an official VideoMAE .pth file, open_clip:MODEL/WEIGHTS, "
            "or a name of python -m downstream.models"
        )
    model = backbones.load_export(Path(name), builders())
    parts = backbones.parts_of(type(model))
    encoder = model if isinstance(model, Backbone) else getattr(model, parts[0]) if parts else model
    if not isinstance(encoder, Backbone):
        raise ValueError(
            f"{name} holds a {type(encoder).__name__}, which takes no clips; give a video backbone"
        )
    return encoder


def _is_videomae(name: str) -> bool:
    """Whether this is how a VideoMAE of others is named: on the hub, in a folder or in a file."""
    return name.startswith("hf:") or name.endswith((".pth", ".pt"))


def load_video_text(name: str) -> VideoText:
    """The pair of towers that `--backbone` names, with its weights, in evaluation mode.

    Args:
        name: a folder exported by recipes/clip.py, `hf:` and a hub name of one; `starter`, which
            comes with the package; or `open_clip:MODEL/WEIGHTS`, whose image tower sees `FRAMES`,
            their embeddings averaged.

    Raises:
        ValueError: nothing of the kind is there, or it has no text tower.
    """
    if name.startswith(OPEN_CLIP):
        pair = load_open_clip(name)
        if not pair.trained:
            raise ValueError(
                f"{name} names no weights: write {name}/WEIGHTS, a tag of open_clip or a file"
            )
        return video_text(pair, frame_tower(pair, *FRAMES))
    name = backbones.folder_of(name)
    remedy = f"train one: muybridge clip --backbone {name} --data VIDEOS_WITH_CAPTIONS"
    if _is_videomae(name):
        raise ValueError(f"{name} is a VideoMAE and has no text tower; {remedy}")
    if not is_folder(name):
        raise ValueError(
            f"no backbone at {shown(name)} ({no_folder(name)}): give the folder of a video-text "
            "run (RUN/backbone), starter or open_clip:MODEL/WEIGHTS"
        )
    if backbones.read_backbone_config(Path(name))["builder"] != "VideoText":
        raise ValueError(f"{name} has no text tower; {remedy}")
    towers = backbones.load_export(Path(name), builders())
    assert isinstance(towers, VideoText)
    return towers


def choose_sampling(backbone: nn.Module, sampling: str | None, stride: int | None) -> None:
    """Let a backbone see other frames of a clip, in place: no weight depends on it.

    Args:
        backbone: to change.
        sampling: "uniform", a frame of each equal part of a clip; "dense", frames at a stride;
            None: as it is.
        stride: source frames between two sampled ones; None: as it is.

    Raises:
        ValueError: uniform sampling at a stride, or dense sampling at none.
    """
    if sampling == "uniform" and stride:
        raise ValueError(f"--sampling uniform has no stride: leave out --stride {stride}")
    assert isinstance(backbone, Backbone)
    if sampling == "dense" and not (stride or backbone.input_spec.stride):
        raise ValueError("--sampling dense: this backbone samples uniformly, give --stride too")
    if stride or sampling == "uniform":
        backbone.arguments["stride"] = stride or 0
        backbone.input_spec = dataclasses.replace(backbone.input_spec, stride=stride or 0)


def matched_stride(stride: int, fps: float, trained: float | None) -> int:
    """The stride at which frames are about as far apart in time as those that weights learned from.

    At most a tenth further apart: wider ones lost accuracy (recipes/RESULTS.md).

    Args:
        stride: that the weights record; 0: of uniform sampling, which has none.
        fps: frames a second of the clips.
        trained: those of the clips that the weights learned from; None: not known.
    """
    if not stride or not trained:
        return stride
    exact = stride * fps / trained
    nearest = round(exact)
    return max(1, nearest if nearest <= 1.1 * exact else int(exact))


def match_rate(name: str, video: nn.Module, rates: np.ndarray) -> None:
    """Give a backbone the `matched_stride` of clips, in place, and print that where it is another.

    Args:
        name: of the weights, as --backbone has it; those that do not say at which rate they learned
            keep their stride.
        video: the backbone, or the video tower of the pair.
        rates: frames a second of the clips; their median counts.
    """
    assert isinstance(video, Backbone)
    own, trained, fps = video.input_spec.stride, trained_rate(name), float(np.median(rates))
    stride = matched_stride(own, fps, trained)
    choose_sampling(video, None, stride)
    if not is_first() or trained is None:
        return
    if stride != own:
        print(
            f"note: stride {stride} instead of {own}: {for_screen(name)} learned from clips of "
            f"{trained:.4g} frames a second, and these have {fps:.4g}"
        )
    if len({matched_stride(own, rate, trained) for rate in rates.tolist()}) > 1:
        print(
            f"note: these clips have {rates.min():.4g} to {rates.max():.4g} frames a second: "
            f"stride {stride} fits their median"
        )


def another_stride(stride: int, own: int, videos: int, rate: float | None) -> str:
    """In words that so many videos are seen at a stride that is not the model's own."""
    assert rate is not None, "a stride that nothing asks for"
    return (
        f"stride {stride} instead of {own} in {counted(videos, 'video')}: the model learned from "
        f"clips of {rate:.4g} frames a second"
    )


def trained_rate(name: str) -> float | None:
    """Frames a second of the clips that weights were trained on; None: they do not say it.

    Args:
        name: of the weights, as --backbone has it.
    """
    if name == STARTER:
        return STARTER_RATE
    told = backbones.provenance_of(name)
    rate = told.get("fps") if isinstance(told, dict) else None
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.01 <= rate <= 1000:
        return None
    return float(rate)


def classifier_of(encoder: nn.Module, report: dict, names: list[str] | None = None) -> Classifier:
    """The classifier of a fine-tuned VideoMAE, in evaluation mode.

    Args:
        encoder: of `pretrain.interop.videomae.import_videomae`, likewise the report.
        report: with its "classes" and "head".
        names: of the classes; None: those it carries.

    Raises:
        ValueError: it has no classifier, or as many other classes as there are names.
    """
    if "head" not in report:
        raise ValueError(
            f"{report['source']} has no classifier behind an fc_norm, as fine-tuned VideoMAEs "
            f"have; train one: muybridge finetune --backbone {report['source']} "
            "--data LABELLED_VIDEOS"
        )
    _check_names(names, len(report["classes"]))
    model = Classifier(encoder, names or report["classes"])
    model.head.load_state_dict(report["head"])
    return model.eval()


def _check_names(names: list[str] | None, num: int) -> None:
    if names is not None and len(names) != num:
        raise ValueError(f"{len(names)} names for a classifier of {num} classes")


def load_classifier(name: str, weights: str = "", names: list[str] | None = None) -> Classifier:
    """The classifier that `--backbone` names, in evaluation mode.

    Args:
        name: RUN/backbone of recipes/finetune.py, a name in `PUBLISHED`; `hf:` and a hub name or
            folder of such an export or of a fine-tuned VideoMAE; or an official `.pth` file of one.
        weights: for a name in `PUBLISHED`, its file; "": downloaded, where that is possible.
        names: of the classes, in the order of the logits; None: those that it carries.

    Raises:
        ValueError: nothing of the kind is there, it does not verify, it has no classifier, or
            another number of classes.
    """
    if weights and name not in PUBLISHED:
        raise ValueError(
            f"--weights takes effect with {', '.join(PUBLISHED)} only, not with {name}"
        )
    name = backbones.folder_of(name)
    if _is_videomae(name):
        return classifier_of(*import_videomae(name), names)
    model = PUBLISHED[name](weights) if name in PUBLISHED else _load_own(name)
    _check_names(names, len(model.classes))
    model.arguments["classes"] = names or model.classes
    return model


def _load_own(name: str) -> Classifier:
    folder = Path(name)
    remedy = f"train one: muybridge fit, or finetune, --backbone {name} --data LABELLED_VIDEOS"
    if not is_folder(name):
        if name in MODELS:
            remedy = f"train one: muybridge finetune --model {name} --data LABELLED_VIDEOS"
            raise ValueError(f"{name} is a model without a trained classifier; {remedy}")
        raise ValueError(
            f"no classifier at {shown(name)} ({no_folder(name)}): give RUN/backbone of "
            "muybridge fit or finetune, a fine-tuned VideoMAE (hf:OWNER/NAME, "
            f"hf:FOLDER or a .pth file), or one of {', '.join(PUBLISHED)}"
        )
    if backbones.read_backbone_config(folder)["builder"] != "Classifier":
        raise ValueError(f"{name} has no classifier; {remedy}")
    classifier = backbones.load_export(Path(name), builders())
    assert isinstance(classifier, Classifier)
    return classifier
