"""The only module that has other libraries build or fetch something by name or configuration.

A name or a configuration may come from an untrusted file, and the factories of timm, torchvision,
open_clip and transformers do more than one expects: they import code from a hub, follow paths and
URLs, and allocate whatever sizes they are given. So no other module calls one (a test checks that).
Here a name has to be in the library's own list, a configuration may hold known keys with plain
values within bounds, and `trust_remote_code=False` is passed everywhere.
"""

import inspect
import json
import math
import re
import socket
import sys
import typing
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pretrain.files import is_folder, is_there, no_folder, parse_json
from pretrain.names import did_you_mean, first_line, for_screen

if TYPE_CHECKING:
    from open_clip import CustomTextCLIP
    from transformers import PreTrainedModel

Rule = Callable[[object], bool]
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
WORD = re.compile(r"[\w.+-]{0,64}", re.ASCII)
HUB_SECONDS = 5  # until the hub counts as out of reach


# ---- rules for values


def whole(least: int, most: int) -> Rule:
    """Whole numbers from `least` to `most`; no truth values, which Python counts among them."""
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most


def number(least: float, most: float) -> Rule:
    """Finite numbers from `least` to `most`."""
    return lambda v: (
        isinstance(v, int | float)
        and not isinstance(v, bool)
        and least <= v <= most  # False for NaN
        and math.isfinite(v)
    )


def flag(value: object) -> bool:
    """A truth value."""
    return isinstance(value, bool)


def one_of(*values: object) -> Rule:
    """One of a few values, of the same type."""
    return lambda v: any(v == known and type(v) is type(known) for known in values)


def either(*rules: Rule) -> Rule:
    """A rule that admits what any of several rules admits."""
    return lambda v: any(rule(v) for rule in rules)


def several(rule: Rule, least: int, most: int) -> Rule:
    """Lists of `least` to `most` values."""
    return lambda v: isinstance(v, list | tuple) and least <= len(v) <= most and all(map(rule, v))


def text(most: int) -> Rule:
    """Text of at most so many characters."""
    return lambda v: isinstance(v, str) and len(v) <= most


def mapping(rules: dict[str, Rule]) -> Rule:
    """Objects with no other keys than these, each with what its rule admits."""
    return lambda v: isinstance(v, dict) and all(k in rules and rules[k](x) for k, x in v.items())


def shown(value: object) -> str:
    """A value for a message, short whatever its size."""
    try:
        return repr(value)[:80]
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"


def check(config: object, rules: dict[str, Rule], where: str) -> None:
    """Refuse a configuration with unknown keys or with values that no rule admits.

    Raises:
        ValueError: naming the first such key and value.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{where} is no object but {shown(config)}")
    for key, value in config.items():
        if key not in rules:
            raise ValueError(
                f"{where} has {shown(key)}, which is not among the keys that are admitted"
            )
        if not rules[key](value):
            raise ValueError(f"{where} has {key} = {shown(value)}, which is not admitted")


# ---- arguments of our own classes, as an exported config.json has them

# Ten times what published models have. Bounds keep a hostile file from asking for gigabytes of
# objects; the shapes are compared with the weights' besides.
MOST = {
    "depth": 256, "layers": 256, "temporal_depth": 256, "pool_depth": 256, "decoder_depth": 256,
    "frames": 4096, "size": 2048, "patch": 2048, "tubelet": 1024, "kernel": 1024, "window": 1024,
    "trained_grid": 4096, "people": 16,
}  # fmt: skip
POSITIVE = {
    "frames", "size", "patch", "tubelet", "dim", "heads", "hidden", "channels", "kernel",
    "time_kernel", "layers", "context_length", "decoder_dim", "decoder_heads", "window",
    "trained_grid", "people", "coordinates",
}  # fmt: skip
RANGES = {  # of fractions
    "width": (1e-3, 64), "dropout": (0, 1), "bound": (0, 1e4),
    "space": (0, 1), "time": (0, 1), "motion_tokens": (0, 1), "target_eps": (0, 1),
    "eps": (1e-12, 1), "norm_eps": (1e-12, 1),  # of norms: at 0 a token without variance is nan
}  # fmt: skip
MOST_TEXT = {"tokenizer": 2**26}
MOST_ITEMS = {"classes": 100_000}


def check_arguments(build: Callable, arguments: object, where: str, parts: Sequence[str]) -> None:
    """Refuse arguments that the signature of one of our classes does not name or type so.

    Args:
        build: the class.
        arguments: as read from a file.
        where: the file, for the message.
        parts: arguments that are models themselves, which are not checked.

    Raises:
        ValueError: an argument is unknown, missing, of another type or out of bounds.
    """
    hints = typing.get_type_hints(build.__init__)
    parameters = {k: p for k, p in inspect.signature(build).parameters.items() if k not in parts}
    rules = {name: _rule(hints[name], name) for name in parameters}
    given = arguments
    if isinstance(arguments, dict):
        given = {k: v for k, v in arguments.items() if k not in parts}
    check(given, rules, f"{where}: {build.__name__}")
    assert isinstance(given, dict)  # or it was refused
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in given]
    if missing:
        raise ValueError(f"{where}: {build.__name__} lacks {', '.join(missing)}")


def _rule(hint: object, name: str) -> Rule:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is int:
        return whole(name in POSITIVE, MOST.get(name, 65_536))
    if hint is float:
        return number(*RANGES.get(name, (-1e6, 1e6)))
    if hint is bool:
        return flag
    if hint is str:
        return text(MOST_TEXT.get(name, 1000))
    if hint is type(None):
        return lambda v: v is None
    if hint is dict:
        # Another library's configuration: checked key by key where it is used, in this module.
        return lambda v: isinstance(v, dict)
    if origin is tuple:
        return several(_rule(inner[0], name), len(inner), len(inner))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return several(_rule(inner[0], name), 0, MOST_ITEMS.get(name, 64))
    assert inner, f"no rule for the argument {name}: {hint}"  # what is left is a union
    return either(*(_rule(kind, name) for kind in inner))


# ---- timm and torchvision


def is_timm_network(name: object) -> bool:
    """Whether timm itself has a network of this name: no address, no path, nothing from a hub."""
    import timm  # takes seconds, as torchvision does, and most recipes need neither

    # is_model reads the name before the first dot, without the tag of pretrained weights.
    return isinstance(name, str) and WORD.fullmatch(name) is not None and timm.is_model(name)


def timm_network(
    name: str,
    size: int | None = None,
    channels: int = 3,
    pretrained: bool = False,
    stages: bool = False,
) -> nn.Module:
    """A network of timm.

    Args:
        name: in timm's list.
        size: of the images, for networks that are built for one; None: the network's own, with its
            classifier.
        channels: of the images.
        pretrained: with timm's own weights, downloaded once.
        stages: the feature maps of its stages instead of one vector.

    Raises:
        ValueError: timm has no such network.
    """
    import timm

    if not is_timm_network(name):
        near = did_you_mean(name.split(".")[0], timm.list_models())
        raise ValueError(f"{shown(name)} is no network of timm{near}")
    if pretrained:
        with asking_hub(name):
            return timm.create_model(name, pretrained=True)
    if stages:
        return timm.create_model(name, pretrained=False, features_only=True, in_chans=channels)
    given: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": channels}
    try:
        return timm.create_model(name, img_size=size, **given)
    except TypeError:  # not built for one size
        return timm.create_model(name, **given)


def torchvision_network(name: str, video: bool = False, pretrained: bool = False) -> nn.Module:
    """A network of torchvision with its classifier.

    Args:
        name: in torchvision's list.
        video: of the list of 3-D networks, not of the 2-D ones.
        pretrained: with torchvision's own weights, downloaded once.

    Raises:
        ValueError: torchvision has no such network.
    """
    import torchvision

    kind = torchvision.models.video if video else torchvision.models
    names = torchvision.models.list_models(module=kind)
    if name not in names:
        kind = "video" if video else "image"
        near = did_you_mean(str(name), names)
        raise ValueError(f"torchvision has no {kind} network {shown(name)}{near}")
    if pretrained:
        return torchvision.models.get_model(name, weights="DEFAULT")
    if name in ("googlenet", "inception_v3"):
        return torchvision.models.get_model(name, weights=None, aux_logits=False, init_weights=True)
    return torchvision.models.get_model(name, weights=None)


def flow_network(name: str) -> nn.Module:
    """A network of torchvision that estimates optical flow, with its weights, downloaded once.

    Args:
        name: "raft_small" or "raft_large".

    Raises:
        ValueError: the weights cannot be fetched, or have another hash than their name says.
    """
    from torchvision.models import get_model, get_model_weights

    assert name in ("raft_small", "raft_large")
    weights = get_model_weights(name)["DEFAULT"]
    try:
        state = weights.get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the weights of {name} cannot be fetched ({first_line(error)}): with a network try "
            f"again, or put {weights.url} into {torch.hub.get_dir()}/checkpoints"
        ) from error
    network = get_model(name, weights=None)
    network.load_state_dict(state)
    return network


# ---- open_clip

_LAYERS, _WIDTH, _SIDE = whole(1, 256), whole(1, 16_384), whole(1, 2048)
_BLOCK: dict[str, Rule] = {  # what both kinds of towers know
    "layers": either(_LAYERS, several(_LAYERS, 4, 4)),
    "width": _WIDTH,
    "mlp_ratio": number(0.01, 100),
    "ls_init_value": either(one_of(None), number(0, 100)),
    "output_tokens": one_of(False, True),
    "final_ln_after_pool": flag,
    "block_type": one_of(None, "default", "custom"),
    "act_kwargs": either(one_of(None), mapping({"approximate": one_of("none", "tanh")})),
    "norm_kwargs": either(one_of(None), mapping({"eps": number(0, 1)})),
    "qk_norm": flag,
    "scaled_cosine_attn": flag,
    "scale_heads": flag,
    "scale_attn_inner": flag,
    "scale_attn": flag,
    "scale_fc": flag,
}
VISION = _BLOCK | {
    "head_width": _WIDTH,
    "patch_size": either(one_of(None), _SIDE),
    "image_size": either(_SIDE, several(_SIDE, 2, 2)),
    "patch_dropout": number(0, 0.99),
    "attentional_pool": one_of(False, True, "parallel", "cascade"),
    "attn_pooler_queries": whole(1, 4096),
    "attn_pooler_heads": whole(1, 256),
    "no_ln_pre": flag,
    "pos_embed_type": one_of("learnable", "sin_cos_2d"),
    "pool_type": one_of("tok", "avg", "none"),
    "timm_model_name": either(one_of(None), is_timm_network),
    "timm_model_pretrained": flag,  # never followed: the weights come from elsewhere
    "timm_pool": one_of("", "avg", "abs_attn", "rot_attn", "map", "token"),
    "timm_proj": one_of(None, "", "none", "linear", "mlp"),
    "timm_proj_bias": flag,
    "timm_drop": number(0, 0.99),
    "timm_drop_path": either(one_of(None), number(0, 0.99)),
}
TEXT = _BLOCK | {
    "context_length": whole(1, 4096),
    "vocab_size": whole(2, 2_000_000),
    "heads": whole(1, 256),
    "embed_cls": flag,
    "pad_id": whole(0, 2_000_000),
    "eos_id": whole(0, 2_000_000),
    "no_causal_mask": flag,
    "pool_type": one_of("argmax", "first", "last", "eos", "none"),
    "proj_bias": flag,
    "proj_type": one_of("linear", "none"),
    # Names of tokenizers are never followed: a tokenizer comes as data.
    "hf_tokenizer_name": text(200),
    "tokenizer_kwargs": mapping(
        {"clean": one_of("whitespace", "lower", "canonicalize"), "strip_sep_token": flag}
    ),
}


def check_open_clip(config: object, where: str) -> None:
    """Refuse an open_clip configuration with keys or values that are not admitted.

    Args:
        config: `{"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}`, or a part of it.
        where: it comes from, for the message.

    Raises:
        ValueError: it names a key or value that is not admitted, or leaves one out.
    """
    later: Rule = lambda v: True  # checked below
    outer = {"embed_dim": _WIDTH, "quick_gelu": flag, "vision_cfg": later, "text_cfg": later}
    check(config, outer, where)
    assert isinstance(config, dict)  # or it was refused
    if "embed_dim" not in config:
        raise ValueError(f"{where} names no embed_dim")
    if "vision_cfg" in config:
        check(config["vision_cfg"], VISION, f"{where}: vision_cfg")
    if "text_cfg" in config:
        about = config["text_cfg"]
        if isinstance(about, dict) and about.get("hf_model_name"):
            raise ValueError(
                f"{where} has a text tower that is fetched by name "
                f"({shown(about['hf_model_name'])}) and could not be exported as data; take "
                "another pair, or train towers with --text-model hf:NAME"
            )
        check(about, TEXT, f"{where}: text_cfg")


def build_open_clip(
    vision: dict | None = None, text: dict | None = None, bias: bool = False
) -> "CustomTextCLIP":
    """An open_clip model with fresh weights.

    open_clip builds its towers in pairs; one that is not asked for is a tiny one.

    Args:
        vision: `embed_dim`, `vision_cfg`, `quick_gelu` of the image tower.
        text: `embed_dim`, `text_cfg`, `quick_gelu` of the text tower.
        bias: with SigLIP's bias beside the scale.

    Raises:
        ValueError: a configuration is not admitted, or open_clip cannot build it.
    """
    from open_clip import CustomTextCLIP

    for config, key in ((vision, "vision_cfg"), (text, "text_cfg")):
        if config is not None:
            check_open_clip(config, "the open_clip configuration")
            if key not in config:
                raise ValueError(f"the open_clip configuration has no {key}")
    wanted = vision or text
    assert wanted is not None
    no_vision = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 16, "image_size": 16}
    no_text = {"layers": 1, "width": 64, "heads": 1, "context_length": 8, "vocab_size": 8}
    vision_cfg = dict(vision["vision_cfg"]) if vision else no_vision
    if "timm_model_name" in vision_cfg:
        vision_cfg["timm_model_pretrained"] = False  # the weights come from elsewhere
    try:
        return CustomTextCLIP(
            embed_dim=wanted["embed_dim"],
            vision_cfg=vision_cfg,
            text_cfg=dict(text["text_cfg"]) if text else no_text,
            quick_gelu=wanted.get("quick_gelu", False),
            init_logit_bias=-10.0 if bias else None,
        )
    except (TypeError, RuntimeError, AssertionError, ArithmeticError, LookupError) as error:
        raise ValueError(f"open_clip cannot build {shown(wanted)}: {error}") from error


def listed_open_clip(model: str) -> dict:
    """The configuration of a model in open_clip's own list.

    Raises:
        ValueError: there is none of this name.
    """
    import open_clip

    config = None
    if WORD.fullmatch(model):
        config = open_clip.get_model_config(model)
    if config is None:
        raise ValueError(
            f"open_clip has no model {shown(model)}{did_you_mean(model, open_clip.list_models())}"
        )
    return config


def listed_open_clip_model(model: str, weights: str | None, quick_gelu: bool) -> "CustomTextCLIP":
    """A model in open_clip's own list, with two separate towers.

    Args:
        model: its name.
        weights: a tag of open_clip's list (downloaded once); None: fresh ones.
        quick_gelu: which activation.
    """
    import open_clip

    with asking_hub(f"{model}/{weights}") if weights else nullcontext():
        return open_clip.create_model(
            model,
            pretrained=weights,
            force_quick_gelu=quick_gelu,
            force_custom_text=True,
            require_pretrained=bool(weights),
            weights_only=True,
        )


# ---- text models and tokenizers of transformers

# Encoders of plain text that transformers builds from numbers alone.
TEXT_MODELS = (
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie",
    "modernbert", "mpnet", "roberta", "xlm-roberta",
)  # fmt: skip
# Keys that name code, other files, kernels of a hub or number formats, not the network's shape.
_NOT_SHAPE = {
    "auto_map", "quantization_config", "dtype", "torch_dtype", "attn_implementation",
    "architectures", "tokenizer_class", "name_or_path", "model_type", "transformers_version",
}  # fmt: skip
# What a text model outputs, and how: the only values that are used here.
_OUTPUT = {
    "output_hidden_states": False, "output_attentions": False, "return_dict": True,
    "chunk_size_feed_forward": 0, "is_decoder": False, "is_encoder_decoder": False,
    "add_cross_attention": False,
}  # fmt: skip


def text_config(config: object, where: str, drop: bool = False) -> dict:
    """A configuration of one of `TEXT_MODELS`, only with what decides the network.

    Args:
        config: as a config.json has it.
        where: for the message.
        drop: leave out other keys, as transformers does with what it does not know, instead of
            refusing them.

    Raises:
        ValueError: another kind of model, or a value that is not admitted.
    """
    from transformers import CONFIG_MAPPING

    if not isinstance(config, dict) or config.get("model_type") not in TEXT_MODELS:
        kind = config.get("model_type") if isinstance(config, dict) else config
        raise ValueError(
            f"{where} describes {shown(kind)}, and not one of {', '.join(TEXT_MODELS)}"
        )
    defaults = CONFIG_MAPPING[config["model_type"]]().to_dict()
    word: Rule = lambda v: isinstance(v, str) and bool(WORD.fullmatch(v))
    plain = either(one_of(None), flag, number(-1e6, 2_000_000), word)
    values = either(plain, several(plain, 0, 1000))
    inner = _object_of(values)
    # Objects of objects, one level deep: rotary frequencies by kind of layer.
    anything, count = either(values, inner, _object_of(inner)), whole(0, 256)
    rules = {
        key: count if re.fullmatch(r"num_.*(layers|heads|groups)", key) else anything
        for key in defaults
        if not key.startswith("_") and key not in _NOT_SHAPE
    }
    for key in ("id2label", "label2id"):  # of classifiers: no part of an encoder
        rules.pop(key, None)
    rules |= {key: one_of(value) for key, value in _OUTPUT.items() if key in rules}
    if drop:
        rules = {key: rule for key, rule in rules.items() if key not in _OUTPUT}
    kept = {k: v for k, v in config.items() if k in rules} if drop else dict(config)
    kept.pop("model_type", None)
    check(kept, rules, where)
    return {"model_type": config["model_type"], **kept}


def _object_of(rule: Rule) -> Rule:
    """Objects of at most 64 values."""
    return lambda v: isinstance(v, dict) and len(v) <= 64 and all(map(rule, v.values()))


def build_text_model(config: dict) -> "PreTrainedModel":
    """A text encoder of transformers with fresh weights.

    Args:
        config: as `text_config` returns it.

    Raises:
        ValueError: it is not admitted, or transformers cannot build it.
    """
    from transformers import CONFIG_MAPPING, AutoModel

    config = text_config(config, "the text model's configuration")
    try:
        built = CONFIG_MAPPING[config["model_type"]](
            **{k: v for k, v in config.items() if k != "model_type"}
        )
        return AutoModel.from_config(built, trust_remote_code=False)
    except Exception as error:  # transformers' own checks raise many kinds
        raise ValueError(
            f"transformers cannot build this text model: {first_line(error)}"
        ) from error


def fetch_text_model(name: str) -> tuple["PreTrainedModel", dict, object]:
    """A text encoder by its name on the Hugging Face hub, or its folder, with weights.

    Returns:
        the model, its configuration as `text_config` returns it, and its tokenizer.

    Raises:
        ValueError: it is not there, or is no text encoder that can be exported as data.
    """
    from transformers import AutoModel, PretrainedConfig

    try:
        with _from_hub_or_here(name):
            raw, _ = PretrainedConfig.get_config_dict(name)
            config = text_config(raw, f"{name}: config.json", drop=True)
            built = type(build_text_model(config).config)(
                **{k: v for k, v in config.items() if k != "model_type"}
            )
            model = AutoModel.from_pretrained(
                name, config=built, trust_remote_code=False, weights_only=True
            )
        return model, config, fetch_tokenizer(name)
    except Exception as error:  # a hub, a file system and transformers raise many kinds
        raise ValueError(
            f"transformers cannot load a text model {name!r}: {first_line(error)}"
        ) from error


def fetch_tokenizer(name: str):
    """A fast tokenizer of transformers by its name on the hub, or its folder.

    Raises:
        ValueError: it is not there, or is not one of those that are data alone.
    """
    from transformers import AutoTokenizer

    try:
        with _from_hub_or_here(name):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a hub, a file system and tokenizer libraries raise many kinds
        raise ValueError(
            f"the tokenizer of {name} cannot be loaded: {first_line(error)}"
        ) from error
    if not tokenizer.is_fast or tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {name} has no tokenizer.json or no padding token")
    return tokenizer


def tokenizer_data(tokenizer) -> dict:
    """A fast tokenizer as `{"json": text of its tokenizer.json, "special": name -> token}`."""
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    return {"json": tokenizer.backend_tokenizer.to_str(), "special": special}


def build_tokenizer(data: str, special: object):
    """A fast tokenizer from data.

    Args:
        data: the text of a tokenizer.json.
        special: names of its special tokens, such as {"pad_token": "[PAD]"}.

    Raises:
        ValueError: they are not such.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    names = ("bos", "cls", "eos", "mask", "pad", "sep", "unk")
    check(special, {f"{name}_token": text(200) for name in names}, "the tokenizer")
    assert isinstance(special, dict)  # or it was refused
    with no_panic("the tokenizer's data are damaged"):
        about = _check_tokenizer(data)
        made = Tokenizer.from_str(json.dumps(about))
        if made.num_special_tokens_to_add(False) > 64:
            raise ValueError("it puts more than 64 tokens around every caption")
        return PreTrainedTokenizerFast(tokenizer_object=made, **special)


@contextmanager
def no_panic(what: str) -> Iterator[None]:
    """Turn whatever the tokenizer library raises into a ValueError; a Rust panic is no `Exception`.

    Raises:
        ValueError: beginning with `what`.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {first_line(error)}") from error


def _check_tokenizer(data: str) -> dict:
    """The content of a tokenizer.json whose time and memory are in proportion to its size.

    Raises:
        ValueError: they are not, or it is no tokenizer.json.
    """
    # Lists and objects take more memory than their text; the largest real ones have half as many.
    if data.count("[") + data.count("{") > 1_500_000 or data.count(",") > 5_000_000:
        raise ValueError("it has too many parts")
    about = parse_json(data)
    if not isinstance(about, dict):
        raise ValueError(f"it holds a {type(about).__name__} where an object has to be")
    added = about.get("added_tokens")
    if added is not None:
        content = lambda v: isinstance(v, dict) and text(1000)(v.get("content"))
        if not several(content, 0, 10_000)(added):
            raise ValueError("its added_tokens are no list of at most 10,000 short tokens")
    if len(json.dumps(about.get("post_processor"))) > 100_000:
        raise ValueError("its post_processor is longer than 100,000 characters")
    if _growth(about.get("normalizer")) > 1000:
        raise ValueError("its normalizer may make a caption more than a thousand times as long")
    return about | {"padding": None, "truncation": None}  # ours are given with every call


def _growth(normalizer: object) -> float:
    """The largest factor by which a normaliser of the tokenizer library lengthens a text.

    1 for what the library refuses itself.
    """
    if not isinstance(normalizer, dict):
        return 1
    kind = normalizer.get("type")
    if kind == "Sequence" and isinstance(parts := normalizer.get("normalizers"), list):
        return math.prod(map(_growth, parts))
    if kind == "Precompiled":
        return 18  # NFKC's longest; it has one table for all letters
    new = (
        normalizer.get("content" if kind == "Replace" else "prepend")
        if kind in ("Replace", "Prepend")
        else ""
    )
    return 1 + len(new) if isinstance(new, str) else 1


def clean_caption(kind: str) -> Callable[[str], str]:
    """open_clip's cleaning of captions: "whitespace", "lower" or "canonicalize"."""
    from open_clip.tokenizer import get_clean_fn

    return get_clean_fn(kind)


# ---- the Hugging Face hub


def hub_folder(name: str, patterns: list[str]) -> Path:
    """The files of a repository on the Hugging Face hub that match, downloaded once.

    Raises:
        ValueError: it is no repository's name, or the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    _check_repository(name)
    try:
        with asking_hub(name):
            return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub, the network and the disk raise many kinds
        raise ValueError(
            f"no such folder here, and the hub does not give it ({first_line(error)}): "
            "check the name and the network, or download it"
        ) from error


@cache
def hub_answers(server: str) -> bool:
    """Whether a hub answers at all, within seconds."""
    try:
        request = urllib.request.Request(server, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True  # an answer, too
    except urllib.error.URLError as error:
        # What else is wrong, such as a certificate, the hub's own client says.
        return not isinstance(error.reason, TimeoutError | ConnectionError | socket.gaierror)
    except (OSError, ValueError, HTTPException):  # also no address, or an answer that is no HTTP
        return False


@contextmanager
def asking_hub(name: str) -> Iterator[None]:
    """Say what is asked of the hub; of one that does not answer only its cache is asked.

    The libraries themselves would try for a minute, without a word.

    Args:
        name: of what is fetched, for the messages.

    Raises:
        ValueError: the hub does not answer, and the cache lacks what is fetched.
    """
    from huggingface_hub import constants

    from pretrain.processes import is_first

    offline, server = constants.HF_HUB_OFFLINE, constants.ENDPOINT
    if not offline and is_first():
        print(f"asking {for_screen(server)} for {for_screen(name)}", file=sys.stderr, flush=True)
    constants.HF_HUB_OFFLINE = offline or not hub_answers(server)
    try:
        yield
    except (OSError, RuntimeError) as error:
        if offline or not constants.HF_HUB_OFFLINE:
            raise
        raise ValueError(
            f"{server} does not answer (check the network), and {name} is not in the cache"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def open_clip_at_hand(model: str, tag: str) -> bool:
    """Whether weights of open_clip's list are in the cache, or the hub answers within seconds.

    Args:
        model: its name.
        tag: of the weights.
    """
    import open_clip
    from huggingface_hub import constants, try_to_load_from_cache

    repository = open_clip.get_pretrained_cfg(model, tag).get("hf_hub", "").rstrip("/")
    files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
        return True
    return not constants.HF_HUB_OFFLINE and hub_answers(constants.ENDPOINT)


def _from_hub_or_here(name: str) -> AbstractContextManager[None]:
    """`asking_hub` for a name on the hub, nothing for a folder here.

    Raises:
        ValueError: it is neither.
    """
    if is_folder(name):
        return nullcontext()
    _check_repository(name)
    return asking_hub(name)


def _check_repository(name: str) -> None:
    if is_there(name) and not is_folder(name):
        raise ValueError(f"{shown(name)}: {no_folder(name)}")
    if not REPOSITORY.fullmatch(name):
        raise ValueError(
            f"{shown(name)} is neither a folder here nor a name on the hub (OWNER/NAME)"
        )


# ---- before anything is built


def dry_state(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Names and shapes of a model's weights, on the meta device: nothing is allocated for them.

    Args:
        build: makes the model.

    Raises:
        ValueError: the arguments make no model.
    """
    try:
        with torch.device("meta"):
            return build().state_dict()
    except ValueError:
        raise
    except (
        RuntimeError, TypeError, AssertionError, ArithmeticError, LookupError, AttributeError,
        MemoryError, RecursionError, NotImplementedError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"its arguments make no model: {type(error).__name__}: {first_line(error)}"
        ) from error
