"""One model's weights in three layouts: ours, official VideoMAE's and Hugging Face's.

Pure functions on dicts of weights. Every weight is renamed by the table below, strictly: a key that is
missing, left over, of another shape, not finite or silently zero is refused by name, what is dropped
on purpose is returned, and each import is converted back and compared with its source, bit for bit.

A bare `VideoTransformer` and a whole `VideoMAE` are both handled. "Arguments" are what rebuilds a
model: {"encoder": those of VideoTransformer} and, for a VideoMAE, "decoder": its other ones. A fine-tuned VideoMAE is an
encoder with pool "fc_norm"; "classes" are the names of its classifier's, whose weights stand beside the encoder's as
head.weight (K, D) and head.bias (K,).
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.foreign import (
    check,
    check_arguments,
    dry_state,
    either,
    flag,
    number,
    one_of,
    several,
    text,
    whole,
)
from pretrain.videomae import VideoMAE
from pretrain.vit import IMAGENET_MEAN, IMAGENET_STD, VideoTransformer
from pretrain.weights import refuse_misfit, unwrap

# Published attention heads by width, of encoders and decoders alike (96 and 192: ours too). An
# official file does not record them.
HEADS = {96: 3, 192: 3, 384: 6, 512: 8, 640: 8, 768: 12, 1024: 16, 1280: 16}

# Columns: ours, official, Hugging Face. Modules with a weight and a bias:
OFFICIAL, HF = 1, 2
PATCH_EMBED = (
    "encoder.patch_embed",
    "encoder.patch_embed.proj",
    "videomae.embeddings.patch_embeddings.projection",
)
NORM = ("encoder.norm", "encoder.norm", "videomae.layernorm")
FC_NORM = ("encoder.norm", "fc_norm", "fc_norm")  # of a fine-tuned one, behind the mean
CLASSIFIER = ("head", "head", "classifier")
DECODER = (
    ("decoder_norm", "decoder.norm", "decoder.norm"),
    ("head", "decoder.head", "decoder.head"),
)
BLOCKS = ("encoder.blocks", "encoder.blocks", "videomae.encoder.layer")
DECODER_BLOCKS = ("decoder_blocks", "decoder.blocks", "decoder.decoder_layers")
IN_BLOCK = (
    ("norm1", "norm1", "layernorm_before"),
    ("norm2", "norm2", "layernorm_after"),
    ("attn.proj", "attn.proj", "attention.output.dense"),
    ("fc1", "mlp.fc1", "intermediate.dense"),
    ("fc2", "mlp.fc2", "output.dense"),
)
# Weights by themselves. Hugging Face's query, key and value are joined to one qkv before.
IN_ATTENTION = (
    ("attn.qkv.weight", "attn.qkv.weight", "attention.attention.qkv.weight"),
    ("attn.q_bias", "attn.q_bias", "attention.attention.query.bias"),
    ("attn.v_bias", "attn.v_bias", "attention.attention.value.bias"),
)


@dataclass(frozen=True)
class Sizes:
    """What a checkpoint may not record. None: as recorded, else as published.

    Attributes:
        frames: frames of a clip. Positions are a formula, so any number works, but a model sees best
            what it was trained on.
        size: height and width of a clip in pixels, likewise.
        heads: attention heads of the encoder.
        decoder_heads: those of the decoder.
    """

    frames: int | None = None
    size: int | None = None
    heads: int | None = None
    decoder_heads: int | None = None


AS_RECORDED = Sizes()


def build(state: dict[str, Tensor], arguments: dict) -> VideoMAE | VideoTransformer:
    """The model of `arguments` holding exactly the weights `state`, a classifier's left out, in evaluation mode.

    Raises:
        ValueError: the arguments are not admitted, or make a model of other shapes.
    """
    _check(arguments)
    if "classes" in arguments:
        state = {name: value for name, value in state.items() if name not in HEAD}
    refuse_misfit(dry_state(lambda: _model(arguments)), state, "the file")
    model = _model(arguments)
    model.load_state_dict(state)
    return model.eval()


def arguments_of(model: VideoMAE | VideoTransformer) -> dict:
    """What rebuilds `model`; see the head of this file."""
    return model.arguments if isinstance(model, VideoMAE) else {"encoder": model.arguments}


def from_official(
    content: dict, sizes: Sizes = AS_RECORDED
) -> tuple[dict[str, Tensor], dict, list[str]]:
    """Convert an official VideoMAE checkpoint: of pretraining, with or without its decoder, or fine-tuned.

    Args:
        content: the file's dict; weights under "model" or the like, or bare. Frames and size come
            from its "args", else they are 16 and 224. It does not name classes; ours do, in "args".
        sizes: what is known better.

    Returns:
        our weights, the arguments, and the names of what was dropped.

    Raises:
        ValueError: anything is missing, left over, misshapen, not finite or silently zero; or the
            heads are not known.
    """
    recorded = content.get("args") or {}  # the training command's Namespace, or our dict
    recorded = recorded if isinstance(recorded, dict) else getattr(recorded, "__dict__", {})
    state = _clean(unwrap(content))
    if any("patch_embeddings." in k for k in state):
        raise ValueError(
            "the names are Hugging Face's: put its config.json beside it, give hf:FOLDER"
        )
    if "patch_embed.proj.weight" in state:  # an encoder saved by itself
        own = ("patch_embed.", "blocks.", "norm.")
        state = {f"encoder.{k}" if k.startswith(own) else k: v for k, v in state.items()}
    tuned, dropped = _classifier(state)
    encoder, decoder = _shapes(state, OFFICIAL)

    def known(name: str, default):
        value = recorded.get(name)
        return value if isinstance(value, type(default)) else default

    encoder |= {
        "heads": sizes.heads or known("num_heads", HEADS.get(encoder["dim"], 0)),
        "frames": sizes.frames or known("num_frames", 16),
        "size": sizes.size or known("input_size", 224),
        # Its fine-tuning on Something-Something samples uniformly, whatever the rate.
        "stride": 0 if tuned and known("data_set", "") == "SSV2" else known("sampling_rate", 4),
        "mean": known("image_mean", list(IMAGENET_MEAN)),
        "std": known("image_std", list(IMAGENET_STD)),
        "positions": "flat",
        "init": "xavier",
        "moving": 1.0,
        "pool": "fc_norm" if tuned else "mean",
        "trained_grid": None,
        "norm_eps": known("fc_norm_eps", 1e-6) if tuned else 1e-6,
    }
    arguments = {"encoder": encoder}
    if tuned and "head.weight" in state:
        num = len(state["head.weight"])
        arguments["classes"] = known("classes", [f"class {i}" for i in range(num)])
    if decoder:
        published = HEADS.get(decoder["decoder_dim"], 0)
        decoder["decoder_heads"] = sizes.decoder_heads or known("decoder_heads", published)
        decoder["target_eps"] = known("target_eps", 1e-6)
        arguments["decoder"] = decoder
    if not encoder["heads"] or (decoder and not decoder["decoder_heads"]):
        widths = [encoder["dim"]] + ([decoder["decoder_dim"]] if decoder else [])
        raise ValueError(
            f"the file does not say how many attention heads its {' and '.join(map(str, widths))} wide "
            "blocks have, and no published VideoMAE is that wide: give heads and decoder_heads"
        )
    _check(arguments)
    return _take(state, OFFICIAL, arguments, dropped), arguments, dropped


def to_official(ours: dict[str, Tensor], arguments: dict) -> dict:
    """Convert to what an official checkpoint file holds, {"model": weights, "args": sizes}.

    Official code reads "model" alone; "args" has the sizes that weights do not tell, under the names
    of its command line where it has them.
    """
    e = arguments["encoder"]
    args = {
        "num_frames": e["frames"], "input_size": e["size"], "sampling_rate": e["stride"],
        "num_heads": e["heads"], "image_mean": list(e["mean"]), "image_std": list(e["std"]),
    }  # fmt: skip
    if "decoder" in arguments:
        args |= {k: arguments["decoder"][k] for k in ("decoder_heads", "target_eps")}
    state = _give(ours, OFFICIAL, arguments)
    if e["pool"] == "fc_norm":  # the official code fine-tunes an encoder by itself
        args["fc_norm_eps"] = e["norm_eps"]
        state = {name.removeprefix("encoder."): value for name, value in state.items()}
    if "classes" in arguments:
        args |= {"nb_classes": len(arguments["classes"]), "classes": list(arguments["classes"])}
    return {"model": state, "args": args}


def from_hf(
    state: dict[str, Tensor], config: dict, sizes: Sizes = AS_RECORDED
) -> tuple[dict[str, Tensor], dict, list[str]]:
    """Convert Hugging Face weights: VideoMAEModel, VideoMAEForPreTraining or VideoMAEForVideoClassification.

    The key names of transformers 4 (q_bias), 5.0 to 5.17 (a key bias, which must be zero: VideoMAE
    has none) and 5.23 are read.

    Args:
        state: the weights.
        config: the content of config.json; "layer_norm_eps" is left to `pretrain.interop.videomae.verify`.
        sizes: what is known better.

    Returns:
        our weights, the arguments, and the names of what was dropped.

    Raises:
        ValueError: as `from_official`; or `config` asks for what our model does not do.
    """
    from transformers import VideoMAEConfig

    if config.get("model_type") != "videomae":
        raise ValueError(f"config.json is of a {config.get('model_type')!r} model, not a videomae")
    check({k: config[k] for k in _READ if k in config}, _READ, "config.json")
    labels = config.get("id2label")
    config = (
        VideoMAEConfig().to_dict() | config
    )  # what the file leaves out is transformers' default
    state = _clean(unwrap(state))
    if any(k.startswith("embeddings.") for k in state):  # VideoMAEModel by itself
        state = {f"videomae.{k}": v for k, v in state.items()}
    tuned, dropped = _classifier(state)
    if not tuned and ("videomae.layernorm.weight" not in state or config["use_mean_pooling"]):
        raise ValueError(
            "a Hugging Face VideoMAE with use_mean_pooling has no norm after its blocks, and this one no fc_norm "
            "either: give the whole fine-tuned model, or a pretraining checkpoint (use_mean_pooling false)"
        )
    for key in list(state):
        if key.endswith("attention.key.bias"):
            if state.pop(key).any():
                raise ValueError(f"{key} is not zero: VideoMAE's attention has no bias on its keys")
            dropped.append(key)
        elif key.endswith((".q_bias", ".v_bias")):
            new = key.replace(".q_bias", ".query.bias").replace(".v_bias", ".value.bias")
            if new in state:
                raise ValueError(f"{key} and {new} are the same weight twice")
            state[new] = state.pop(key)
        elif key.endswith("attention.query.weight"):
            parts = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            if not all(part in state for part in parts):
                raise ValueError(f"missing {_some([part for part in parts if part not in state])}")
            state[key.replace(".query.", ".qkv.")] = torch.cat([state.pop(part) for part in parts])
    encoder, decoder = _shapes(state, HF)
    if not sizes.heads and (encoder["dim"], config["num_attention_heads"]) == (384, 16):
        raise ValueError(
            "config.json says 16 attention heads at width 384. The official small VideoMAE has 6, and "
            "Hugging Face's converter wrote 16: give heads, 6 for those weights or 16 if they are yours"
        )
    encoder |= {
        "heads": sizes.heads or config["num_attention_heads"],
        "frames": sizes.frames or config["num_frames"],
        "size": sizes.size or config["image_size"],
        "stride": config.get("sampling_rate", 4),
        "mean": list(config.get("image_mean", IMAGENET_MEAN)),
        "std": list(config.get("image_std", IMAGENET_STD)),
        "positions": "flat",
        "init": "xavier",
        "moving": 1.0,
        "pool": "fc_norm" if tuned else "mean",
        "trained_grid": None,
        # transformers leaves torch's default to fc_norm, whatever layer_norm_eps says.
        "norm_eps": config.get("fc_norm_eps", 1e-5) if tuned else 1e-6,
    }
    arguments = {"encoder": encoder}
    if tuned and "classifier.weight" in state:
        arguments["classes"] = _names(labels, len(state["classifier.weight"]))
    if decoder:
        arguments["decoder"] = decoder | {
            "decoder_heads": sizes.decoder_heads or config["decoder_num_attention_heads"],
            "target_eps": config.get("target_eps", 1e-6),
        }
    known_better = {
        "architectures": True, "layer_norm_eps": True, "id2label": True, "label2id": True, "num_frames": sizes.frames,
        "image_size": sizes.size, "num_attention_heads": sizes.heads,
        "decoder_num_attention_heads": sizes.decoder_heads,
    }  # fmt: skip
    for key, value in _hf_config(arguments).items():
        if config.get(key, value) != value and not known_better.get(key):
            raise ValueError(f"config.json has {key} {config[key]!r}; these weights need {value!r}")
    return _take(state, HF, arguments, dropped), arguments, dropped


HEAD = ("head.weight", "head.bias")


def _classifier(state: dict[str, Tensor]) -> tuple[bool, list[str]]:
    """Whether this is a fine-tuned VideoMAE, with fc_norm; and what is left out on purpose: another one's classifier."""
    if any(name.startswith("fc_norm.") for name in state):
        return True, []
    return False, [name for name in state if name.startswith(("head.", "classifier."))]


def _names(labels: dict | None, num: int) -> list[str]:
    """The names of `num` classes, from a config.json's id2label."""
    labels = {str(i): f"LABEL_{i}" for i in range(num)} if labels is None else labels
    missing = [i for i in range(num) if str(i) not in labels]
    if missing or len(labels) != num:
        wrong = f"not number {missing[0]}" if missing else f"{len(labels)}"
        raise ValueError(
            f"the classifier has {num} classes, and config.json's id2label names {wrong}"
        )
    return [str(labels[str(i)]) for i in range(num)]


def _check(arguments: dict) -> None:
    """Refuse sizes that are none, or beyond all bounds."""
    if "classes" in arguments:
        names = {"classes": arguments["classes"]}
        check(names, {"classes": several(text(1000), 1, 100_000)}, "the file")
    check_arguments(VideoTransformer, arguments["encoder"], "the file", ())
    if "decoder" in arguments:
        check_arguments(VideoMAE, arguments["decoder"], "the file", ("encoder",))


def _labels(value: object) -> bool:
    name = either(text(1000), whole(-(2**31), 2**31))
    return isinstance(value, dict) and len(value) <= 100_000 and all(map(name, value.values()))


# What is read of a Hugging Face config.json.
_READ = {
    "use_mean_pooling": flag,
    "num_attention_heads": whole(1, 256),
    "decoder_num_attention_heads": whole(1, 256),
    "num_frames": whole(1, 4096),
    "image_size": whole(1, 2048),
    "sampling_rate": whole(0, 4096),
    "image_mean": several(number(-1e6, 1e6), 3, 3),
    "image_std": several(number(1e-6, 1e6), 3, 3),
    "target_eps": number(0, 1),
    "layer_norm_eps": number(0, 1),
    "fc_norm_eps": number(0, 1),
    "id2label": either(one_of(None), _labels),
}


def to_hf(ours: dict[str, Tensor], arguments: dict) -> tuple[dict[str, Tensor], dict]:
    """Convert to Hugging Face's weights, in the key names of transformers 5.23, and its config.json."""
    state = {}
    for name, value in _give(ours, HF, arguments).items():
        if ".qkv." in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[name.replace(".qkv.", f".{part}.")] = rows.contiguous()
        else:
            state[name] = value
    if "decoder" not in arguments and arguments["encoder"]["pool"] != "fc_norm":
        state = {k.removeprefix("videomae."): v for k, v in state.items()}
    return state, _hf_config(arguments)


def obstacles(arguments: dict) -> list[str]:
    """What a model of ours has and neither of the others can be told, each with its remedy."""
    e, found = arguments["encoder"], []
    if e.get("positions", "flat") != "flat":
        found.append(f"{e['positions']} positions (pretrain with --positions flat)")
    if e.get("moving", 1.0) != 1.0:
        found.append(
            f"a look at {e['moving']:.0%} of a clip's tokens, those that move (pretrain with --moving 1)"
        )
    if e.get("pool", "mean") == "class":
        found.append("a class token (pretrain with --pool mean)")
    if decides_numbers(arguments)["encoder"].get("trained_grid"):
        t, h, w = e["trained_grid"]
        found.append(
            f"positions stretched from a grid of {t} x {h} x {w} tokens (convert it before its clip is changed)"
        )
    return found


def decides_numbers(arguments: dict) -> dict:
    """Arguments without those that no output depends on once there are weights.

    Left out: how the first weights were drawn, and the grid that positions were made for where it is the model's own.
    """
    e = arguments["encoder"]
    kept = {name: value for name, value in e.items() if name not in ("init", "trained_grid")}
    grid = [e["frames"] // e["tubelet"], e["size"] // e["patch"], e["size"] // e["patch"]]
    if e.get("trained_grid") and list(e["trained_grid"]) != grid:
        kept["trained_grid"] = list(e["trained_grid"])
    return {**arguments, "encoder": kept}


def _hf_config(arguments: dict) -> dict:
    e, decoder = arguments["encoder"], arguments.get("decoder")
    config = {
        "architectures": ["VideoMAEForPreTraining" if decoder else "VideoMAEModel"],
        "model_type": "videomae", "num_channels": 3, "hidden_act": "gelu", "qkv_bias": True,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layer_norm_eps": 1e-6,
        "use_mean_pooling": False, "image_size": e["size"], "patch_size": e["patch"],
        "num_frames": e["frames"], "tubelet_size": e["tubelet"], "hidden_size": e["dim"],
        "num_hidden_layers": e["depth"], "num_attention_heads": e["heads"],
        "intermediate_size": 4 * e["dim"],
        # Unknown to transformers, which keeps them: so nothing is lost on the way back.
        "sampling_rate": e["stride"], "image_mean": list(e["mean"]), "image_std": list(e["std"]),
    }  # fmt: skip
    if e["pool"] == "fc_norm":
        # Without a classifier its logits are the embedding.
        labels = {str(i): name for i, name in enumerate(arguments.get("classes", ()))}
        config |= {
            "architectures": ["VideoMAEForVideoClassification"], "use_mean_pooling": True, "id2label": labels,
            "label2id": {name: int(i) for i, name in labels.items()}, "fc_norm_eps": e["norm_eps"],  # ours again
        }  # fmt: skip
    if decoder:
        config |= {
            "norm_pix_loss": True, "decoder_hidden_size": decoder["decoder_dim"],
            "decoder_num_hidden_layers": decoder["decoder_depth"],
            "decoder_num_attention_heads": decoder["decoder_heads"],
            "decoder_intermediate_size": 4 * decoder["decoder_dim"],
            "target_eps": decoder["target_eps"],  # ours again
        }  # fmt: skip
    return config


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _model(arguments: dict) -> VideoMAE | VideoTransformer:
    encoder = VideoTransformer(**arguments["encoder"])
    return VideoMAE(encoder, **arguments["decoder"]) if "decoder" in arguments else encoder


def _table(column: int, arguments: dict) -> dict[str, str]:
    """Our name -> foreign name, for every weight of the model of `arguments`."""
    decoder = arguments.get("decoder")
    tuned = arguments["encoder"]["pool"] == "fc_norm"
    modules, rows = [PATCH_EMBED, FC_NORM if tuned else NORM], []
    if "classes" in arguments:
        modules.append(CLASSIFIER)
    stacks = [(BLOCKS, arguments["encoder"]["depth"])]
    if decoder:
        modules += DECODER
        stacks.append((DECODER_BLOCKS, decoder["decoder_depth"]))
        rows += [("mask_token",) * 3, ("encoder_to_decoder.weight",) * 3]
    for stack, depth in stacks:
        for block in (tuple(f"{name}.{i}." for name in stack) for i in range(depth)):
            modules += [tuple(map(str.__add__, block, row)) for row in IN_BLOCK]
            rows += [tuple(map(str.__add__, block, row)) for row in IN_ATTENTION]
    rows += [
        tuple(f"{name}.{kind}" for name in row) for row in modules for kind in ("weight", "bias")
    ]
    return {row[0] if decoder else row[0].removeprefix("encoder."): row[column] for row in rows}


def _clean(state: dict) -> dict[str, Tensor]:
    """The weights in float32; all sound."""
    clean = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(f"{key} is not a dense tensor: this is no dict of weights")
        if not value.is_floating_point():
            raise ValueError(
                f"{key} is {value.dtype}: quantised or integer weights are not converted"
            )
        value = value.detach().float()
        if not torch.isfinite(value).all():
            raise ValueError(f"{key} holds values that are not finite: the checkpoint is broken")
        clean[key] = value
    return clean


def _shapes(state: dict[str, Tensor], column: int) -> tuple[dict, dict]:
    """The sizes that names and shapes tell, of the encoder and, if there is one, of the decoder."""
    name = f"{PATCH_EMBED[column]}.weight"
    shape = tuple(state[name].shape) if name in state else None
    if not shape or len(shape) != 5 or shape[1] != 3 or shape[3] != shape[4]:
        wrong = f"is {shape}, not (D, 3, p, q, q)" if shape else "is missing"
        raise ValueError(f"not the weights of a VideoMAE: {name} {wrong}")

    def depth(stack: str) -> int:  # a gap in the numbers shows up as a missing weight
        found = (re.match(rf"{re.escape(stack)}\.(\d+)\.", key) for key in state)
        return max(1, len({match[1] for match in found if match}))

    encoder = {
        "dim": shape[0],
        "depth": depth(BLOCKS[column]),
        "patch": shape[3],
        "tubelet": shape[2],
    }
    if not any(k.startswith(("encoder_to_decoder.", "mask_token", "decoder.")) for k in state):
        return encoder, {}
    if "mask_token" not in state:
        raise ValueError("the checkpoint has a part of a decoder: missing mask_token")
    width = state["mask_token"].shape[-1]
    return encoder, {"decoder_dim": width, "decoder_depth": depth(DECODER_BLOCKS[column])}


def _take(
    state: dict[str, Tensor], column: int, arguments: dict, dropped: list[str]
) -> dict[str, Tensor]:
    """Cleaned foreign weights under our names, or a refusal of whatever does not fit."""
    with torch.device("meta"):  # a model that is only shapes
        expected = {k: v.shape for k, v in _model(arguments).state_dict().items()}
    if "classes" in arguments:
        num = len(arguments["classes"])
        expected |= {"head.weight": (num, arguments["encoder"]["dim"]), "head.bias": (num,)}
    table = _table(column, arguments)
    assert table.keys() == expected.keys()
    missing = [k for k in table.values() if k not in state]
    left_over = sorted(state.keys() - set(table.values()) - set(dropped))
    if missing or left_over:
        problems = (("missing", missing), ("left over", left_over))
        said = "; ".join(f"{what} {_some(names)}" for what, names in problems if names)
        raise ValueError(f"the checkpoint does not fit a VideoMAE of these sizes: {said}")
    ours = {}
    for name, shape in expected.items():
        value = state[table[name]]
        if name.endswith("patch_embed.weight"):
            # (D, C, p, q, r) to (D, p q r C): our tubelets have the channel fastest.
            value = value.permute(0, 2, 3, 4, 1).flatten(1)
        if value.shape != shape:
            raise ValueError(f"{table[name]} is {tuple(value.shape)}, expected {tuple(shape)}")
        ours[name] = value.contiguous()
    _refuse_silent_zeros(ours, table)
    back = _give(ours, column, arguments)
    assert all(torch.equal(value, state[k]) for k, value in back.items()), "not reversible"
    return ours


def _give(ours: dict[str, Tensor], column: int, arguments: dict) -> dict[str, Tensor]:
    """Our weights under foreign names; the patch embedding is a Conv3d again."""
    table, e = _table(column, arguments), arguments["encoder"]
    if found := obstacles(arguments):
        raise ValueError(f"neither the official code nor transformers has {'; nor '.join(found)}")
    if ours.keys() != table.keys():
        wrong = sorted(ours.keys() ^ table.keys())
        raise ValueError(f"not the weights of the model of `arguments`: {_some(wrong)}")
    out = {table[name]: value.detach() for name, value in ours.items()}
    conv = f"{PATCH_EMBED[column]}.weight"
    out[conv] = (
        out[conv].unflatten(1, (e["tubelet"], e["patch"], e["patch"], 3)).permute(0, 4, 1, 2, 3)
    )
    return {k: v.contiguous() for k, v in out.items()}


def _refuse_silent_zeros(ours: dict[str, Tensor], table: dict[str, str]) -> None:
    """Refuse weights that a lossy conversion left at zero.

    transformers 5.0 to 5.17 loads the published files with every query and value bias zero. A bias
    is zero before training only, and then all biases of its stack are.
    """
    zero = {name for name, value in ours.items() if not value.any()}
    # Hugging Face starts the mask token at zero.
    suspects = {name for name in zero if ours[name].ndim > 1 and name != "mask_token"}
    for stack in ("encoder.blocks.", "blocks.", "decoder_blocks."):
        biases = {name for name in ours if name.startswith(stack) and name.endswith("bias")}
        if not biases <= zero:
            suspects |= biases & zero
    if suspects:
        raise ValueError(
            f"{_some([table[name] for name in ours if name in suspects])}: all zeros in a trained "
            "checkpoint, so some earlier conversion lost them: start from the original file"
        )
