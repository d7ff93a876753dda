"""The official VideoMAE's `.pth` files, imported and exported: github.com/MCG-NJU/VideoMAE."""

from pathlib import Path

import torch
from torch import Tensor

from pretrain.interop.layouts import (
    AS_RECORDED,
    HEADS,
    OFFICIAL,
    PUBLISHED,
    Sizes,
    check_sizes,
    clean,
    find_classifier,
    give,
    shapes,
    take,
)
from pretrain.spec import IMAGENET_MEAN, IMAGENET_STD
from pretrain.weights import unwrap


def from_official(
    content: dict, sizes: Sizes = AS_RECORDED
) -> tuple[dict[str, Tensor], dict, list[str]]:
    """Convert an official checkpoint: pretrained, with or without its decoder, or fine-tuned.

    Args:
        content: the file's dict; weights under "model" or the like, or bare. Frames and size come
            from its "args", else they are 16 and 224. It does not name classes; ours do, in "args".
        sizes: override what is recorded.

    Returns:
        our weights, the arguments, and the names of what was dropped.

    Raises:
        ValueError: anything is missing, left over, misshapen, not finite or silently zero; or the
            heads are not known.
    """
    recorded = content.get("args") or {}  # the training command's Namespace, or our dict
    recorded = recorded if isinstance(recorded, dict) else getattr(recorded, "__dict__", {})
    state = clean(unwrap(content))
    if any("patch_embeddings." in k for k in state):
        raise ValueError(
            "the names are Hugging Face's: put its config.json beside it, give hf:FOLDER"
        )
    if "patch_embed.proj.weight" in state:  # an encoder saved by itself
        own = ("patch_embed.", "blocks.", "norm.")
        state = {f"encoder.{k}" if k.startswith(own) else k: v for k, v in state.items()}
    tuned, dropped = find_classifier(state)
    encoder, decoder = shapes(state, OFFICIAL)

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
        **PUBLISHED,
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
        arguments["decoder"] = decoder | {"target": "rgb"}
    if not encoder["heads"] or (decoder and not decoder["decoder_heads"]):
        widths = [encoder["dim"]] + ([decoder["decoder_dim"]] if decoder else [])
        raise ValueError(
            f"the file does not say how many attention heads its {' and '.join(map(str, widths))} "
            "wide blocks have, and no published VideoMAE is that wide: give heads and "
            "decoder_heads"
        )
    check_sizes(arguments)
    return take(state, OFFICIAL, arguments, dropped), arguments, dropped


def to_official(ours: dict[str, Tensor], arguments: dict) -> dict:
    """Convert to what an official checkpoint file holds, {"model": weights, "args": sizes}.

    Official code reads "model" alone; "args" has the sizes that weights do not determine, under the
    names of its command line where it has them.
    """
    e = arguments["encoder"]
    args = {
        "num_frames": e["frames"], "input_size": e["size"], "sampling_rate": e["stride"],
        "num_heads": e["heads"], "image_mean": list(e["mean"]), "image_std": list(e["std"]),
    }  # fmt: skip
    if "decoder" in arguments:
        args |= {k: arguments["decoder"][k] for k in ("decoder_heads", "target_eps")}
    state = give(ours, OFFICIAL, arguments)
    if e["pool"] == "fc_norm":  # the official code fine-tunes an encoder by itself
        args["fc_norm_eps"] = e["norm_eps"]
        state = {name.removeprefix("encoder."): value for name, value in state.items()}
    if "classes" in arguments:
        args |= {"nb_classes": len(arguments["classes"]), "classes": list(arguments["classes"])}
    return {"model": state, "args": args}


def write_official(ours: dict[str, Tensor], arguments: dict, path: Path) -> None:
    """Write `to_official` to a `.pth` file: a pickle, as the official code reads nothing else."""
    torch.save(to_official(ours, arguments), path)
