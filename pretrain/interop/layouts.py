"""The weights of a VideoMAE under three names: ours, the official code's and Hugging Face's.

Pure functions on dicts of weights. Every weight is renamed by the table below, strictly: a key that
is missing, left over, of another shape, not finite or all zero is refused by name; the names of
dropped weights are returned; each import is converted back and compared bit for bit with its
source.

A bare `VideoTransformer` and a whole `VideoMAE` are both handled. "Arguments" are what rebuilds a
model: {"encoder": those of VideoTransformer} and, for a VideoMAE, "decoder": its other ones. A
fine-tuned VideoMAE is an encoder with pool "fc_norm"; "classes" are the names of its classes, and
its classifier's weights are head.weight (K, D) and head.bias (K,) beside the encoder's.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.names import first_of
from pretrain.third_party import check, check_arguments, dry_state, several, text
from pretrain.videomae import VideoMAE
from pretrain.vit import VideoTransformer
from pretrain.weights import refuse_misfit

# Published attention heads by width, of encoders and decoders alike (96 and 192: ours too). An
# official file does not record them.
HEADS = {96: 3, 192: 3, 384: 6, 512: 8, 640: 8, 768: 12, 1024: 16, 1280: 16}
# Arguments of `VideoTransformer` that every published VideoMAE has.
PUBLISHED = {
    "positions": "flat", "init": "xavier", "motion_tokens": 1.0, "stream": "rgb", "bound": 0.0,
    "method": "",
}  # fmt: skip
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
        frames: frames of a clip. Positions are a formula, so any number works, but a model sees
            best what it was trained on.
        size: height and width of a clip in pixels, likewise.
        heads: attention heads of the encoder.
        decoder_heads: those of the decoder.
    """

    frames: int | None = None
    size: int | None = None
    heads: int | None = None
    decoder_heads: int | None = None


AS_RECORDED = Sizes()


def assemble(state: dict[str, Tensor], arguments: dict) -> VideoMAE | VideoTransformer:
    """The model of `arguments` with the weights `state` but a classifier's, in evaluation mode.

    Raises:
        ValueError: the arguments are not admitted, or make a model of other shapes.
    """
    check_sizes(arguments)
    if "classes" in arguments:
        state = {name: value for name, value in state.items() if name not in HEAD}
    refuse_misfit(dry_state(lambda: _model(arguments)), state, "the file")
    model = _model(arguments)
    model.load_state_dict(state)
    return model.eval()


def arguments_of(model: VideoMAE | VideoTransformer) -> dict:
    """The arguments that rebuild `model`; see the head of this file."""
    return model.arguments if isinstance(model, VideoMAE) else {"encoder": model.arguments}


HEAD = ("head.weight", "head.bias")


def find_classifier(state: dict[str, Tensor]) -> tuple[bool, list[str]]:
    """Whether a VideoMAE is fine-tuned (it has fc_norm); if not, the classifier weights to drop."""
    if any(name.startswith("fc_norm.") for name in state):
        return True, []
    return False, [name for name in state if name.startswith(("head.", "classifier."))]


def check_sizes(arguments: dict) -> None:
    """Raise ValueError if sizes have another type or are out of bounds."""
    if "classes" in arguments:
        names = {"classes": arguments["classes"]}
        check(names, {"classes": several(text(1000), 1, 100_000)}, "the file")
    check_arguments(VideoTransformer, arguments["encoder"], "the file", ())
    if "decoder" in arguments:
        check_arguments(VideoMAE, arguments["decoder"], "the file", ("encoder",))


def obstacles(arguments: dict) -> list[str]:
    """What neither of the other formats can represent of our model, each with its remedy."""
    e, found = arguments["encoder"], []
    if e.get("stream", "rgb") != "rgb":
        found.append(f"{e['stream']} in place of colour (pretrain with --stream rgb)")
    elif (target := arguments.get("decoder", {}).get("target") or "rgb") != "rgb":
        found.append(f"a decoder of {target} (convert the run's backbone/, its encoder alone)")
    if e.get("positions", "flat") != "flat":
        found.append(f"{e['positions']} positions (pretrain with --positions flat)")
    if e.get("motion_tokens", 1.0) != 1.0:
        found.append(
            f"motion-selected tokens, {e['motion_tokens']:.0%} of all (pretrain with "
            "--motion-tokens 1)"
        )
    if e.get("pool", "mean") == "class":
        found.append("a class token (pretrain with --pool mean)")
    if decides_numbers(arguments)["encoder"].get("trained_grid"):
        t, h, w = e["trained_grid"]
        found.append(
            f"positions stretched from a grid of {t} x {h} x {w} tokens (convert it before its "
            "clip is changed)"
        )
    return found


def decides_numbers(arguments: dict) -> dict:
    """Arguments without those that no output depends on once there are weights.

    Left out: how the first weights were drawn, and the grid that positions were made for where it
    is the model's own.
    """
    e = arguments["encoder"]
    kept = {name: value for name, value in e.items() if name not in ("init", "trained_grid")}
    grid = [e["frames"] // e["tubelet"], e["size"] // e["patch"], e["size"] // e["patch"]]
    if e.get("trained_grid") and list(e["trained_grid"]) != grid:
        kept["trained_grid"] = list(e["trained_grid"])
    return {**arguments, "encoder": kept}


def _model(arguments: dict) -> VideoMAE | VideoTransformer:
    encoder = VideoTransformer(**arguments["encoder"])
    return VideoMAE(encoder, **arguments["decoder"]) if "decoder" in arguments else encoder


def _table(column: int, arguments: dict) -> dict[str, str]:
    """Our name -> third-party name, for every weight of the model of `arguments`."""
    decoder = arguments.get("decoder")
    tuned = arguments["encoder"]["pool"] == "fc_norm"
    modules: list[Sequence[str]] = [PATCH_EMBED, FC_NORM if tuned else NORM]
    rows: list[Sequence[str]] = []
    if "classes" in arguments:
        modules.append(CLASSIFIER)
    stacks = [(BLOCKS, arguments["encoder"]["depth"])]
    if decoder:
        modules += DECODER
        stacks.append((DECODER_BLOCKS, decoder["decoder_depth"]))
        rows += [("mask_token",) * 3, ("encoder_to_decoder.weight",) * 3]
    for stack, depth in stacks:
        for block in (tuple(f"{name}.{i}." for name in stack) for i in range(depth)):
            modules += [[a + b for a, b in zip(block, row, strict=True)] for row in IN_BLOCK]
            rows += [[a + b for a, b in zip(block, row, strict=True)] for row in IN_ATTENTION]
    rows += [[f"{name}.{kind}" for name in row] for row in modules for kind in ("weight", "bias")]
    return {row[0] if decoder else row[0].removeprefix("encoder."): row[column] for row in rows}


def clean(state: dict) -> dict[str, Tensor]:
    """The weights in float32.

    Raises:
        ValueError: one is not dense, not floating or not finite.
    """
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


def shapes(state: dict[str, Tensor], column: int) -> tuple[dict, dict]:
    """The sizes of the encoder, and of the decoder if there is one, by names and shapes.

    Raises:
        ValueError: these are not the weights of a VideoMAE, or only a part of its decoder's.
    """
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


def take(
    state: dict[str, Tensor], column: int, arguments: dict, dropped: list[str]
) -> dict[str, Tensor]:
    """Cleaned third-party weights under our names.

    Args:
        state: weights as `clean` gives them.
        column: whose names they have, `OFFICIAL` or `HF`.
        arguments: of the model.
        dropped: names that may be left over.

    Raises:
        ValueError: weights are missing, left over, of another shape, or zero and should not be.
    """
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
        said = "; ".join(f"{what} {first_of(names, 3)}" for what, names in problems if names)
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
    back = give(ours, column, arguments)
    assert all(torch.equal(value, state[k]) for k, value in back.items()), "not reversible"
    return ours


def give(ours: dict[str, Tensor], column: int, arguments: dict) -> dict[str, Tensor]:
    """Our weights under third-party names; the patch embedding is a Conv3d again.

    Raises:
        ValueError: the other format cannot represent this model, or these are not its weights.
    """
    table, e = _table(column, arguments), arguments["encoder"]
    if found := obstacles(arguments):
        raise ValueError(f"neither the official code nor transformers has {'; nor '.join(found)}")
    if ours.keys() != table.keys():
        wrong = sorted(ours.keys() ^ table.keys())
        raise ValueError(f"not the weights of the model of `arguments`: {first_of(wrong, 3)}")
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
            f"{first_of([table[name] for name in ours if name in suspects], 3)}: all zeros in a "
            "trained checkpoint, so an earlier conversion lost them: start from the original file"
        )
