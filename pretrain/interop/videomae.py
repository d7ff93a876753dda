"""Third-party VideoMAEs, pretrained or fine-tuned: read, converted and verified.

`official.py` and `hugging_face.py` read and write the files; here every conversion is compared with
transformers' model of the same weights: tokens, reconstruction and loss must agree.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.files import is_file, no_file
from pretrain.interop.hugging_face import from_hf, read_hf, to_hf
from pretrain.interop.layouts import AS_RECORDED, Sizes, arguments_of, assemble
from pretrain.interop.official import from_official
from pretrain.videomae import VideoMAE, draw_tokens
from pretrain.vit import VideoTransformer, patchify, take_tokens
from pretrain.weights import load_torch_file

TOLERANCE = 1e-4  # largest absolute difference from transformers' outputs


def import_videomae(
    name: str, sizes: Sizes = AS_RECORDED
) -> tuple[VideoMAE | VideoTransformer, dict]:
    """Read, convert and verify third-party weights.

    The model is in evaluation mode, as in the two functions below.

    Args:
        name: `hf:` and a hub name or a folder; or an official `.pth` file.
        sizes: what the checkpoint does not record.

    Returns:
        a VideoMAE if the weights have a decoder, else a VideoTransformer; and a report: "source",
        "dropped" (names of weights), "max_difference" from transformers; of a fine-tuned VideoMAE
        "classes" (names) and "head", its classifier's "weight" (K, D) and "bias" (K,).

    Raises:
        ValueError: the weights cannot be found, converted or verified.
    """
    try:
        if name.startswith("hf:"):
            weights, config = read_hf(name.removeprefix("hf:"))
            state, arguments, dropped = from_hf(weights, config, sizes)
            eps = float(config.get("layer_norm_eps", 1e-12))  # 1e-12: transformers' default
        elif not is_file(name):
            raise ValueError(no_file(name))
        else:
            state, arguments, dropped = from_official(load_torch_file(Path(name)), sizes)
            eps = 1e-6
        model = assemble(state, arguments)
        report: dict[str, Any] = {"source": name, "dropped": dropped}
        if "classes" in arguments:
            report["classes"] = arguments["classes"]
            report["head"] = {kind: state[f"head.{kind}"] for kind in ("weight", "bias")}
        report["max_difference"] = verify(model, eps, report.get("head"))
    except ValueError as error:
        named = name.removeprefix("hf:") in str(error)
        raise ValueError(str(error) if named else f"{name}: {error}") from error
    return model, report


def load_videomae(name: str, sizes: Sizes = AS_RECORDED) -> VideoTransformer:
    """The encoder of `import_videomae`, whose arguments these are."""
    model, _ = import_videomae(name, sizes)
    return model.encoder if isinstance(model, VideoMAE) else model


def to_transformers(
    model: VideoMAE | VideoTransformer,
    layer_norm_eps: float = 1e-6,
    head: dict[str, Tensor] | None = None,
):
    """Build transformers' model with the weights of `model` and, if fine-tuned, its classifier.

    It is VideoMAEForPreTraining, VideoMAEModel or, with pool "fc_norm",
    VideoMAEForVideoClassification.
    """
    import transformers

    ours, arguments = model.state_dict(), arguments_of(model)
    if head:
        ours |= {f"head.{kind}": value for kind, value in head.items()}
        arguments["classes"] = [str(i) for i in range(len(head["bias"]))]
    state, config = to_hf(ours, arguments)
    kind = getattr(transformers, config["architectures"][0])
    about = transformers.VideoMAEConfig(**config | {"layer_norm_eps": layer_norm_eps})
    theirs = kind(about).eval()
    # transformers 5.0 to 5.17 has a bias on the keys too.
    for name, value in theirs.state_dict().items():
        if name.endswith("attention.key.bias"):
            state[name] = torch.zeros_like(value)
    theirs.load_state_dict(state)
    return theirs


@torch.no_grad()
def verify(
    model: VideoMAE | VideoTransformer,
    layer_norm_eps: float = 1e-6,
    head: dict[str, Tensor] | None = None,
) -> float:
    """Compare `model` with transformers' model of its weights on one fixed random clip and mask.

    Compared are the tokens of the visible quarter (all would take five times as long and use the
    same weights); for a VideoMAE also the reconstruction and the loss; for a fine-tuned one the
    logits of the mean token. transformers fixes the epsilon of the decoder's last norm and of
    fc_norm at 1e-5, which changes the outputs by some 1e-5; the original's is 1e-6. Here
    transformers' model gets that of `model`. No comparison can detect a wrong number of heads.

    Args:
        model: float32, on the CPU.
        layer_norm_eps: of transformers' model; ours is 1e-6.
        head: "weight" (K, D) and "bias" (K,) of a fine-tuned model's classifier.

    Returns:
        the largest absolute difference.

    Raises:
        ValueError: it is above `TOLERANCE`.
    """
    theirs = to_transformers(model, layer_norm_eps, head)
    encoder = model.encoder if isinstance(model, VideoMAE) else model
    spec, rng = encoder.input_spec, np.random.default_rng(0)
    shape = (1, 3, spec.frames, spec.size, spec.size)
    video = torch.from_numpy(rng.integers(256, size=shape, dtype=np.uint8))
    drawn = draw_tokens("random", encoder.grid, 0.75, False, rng)
    visible, masked = (torch.from_numpy(tokens)[None] for tokens in drawn)
    mask = torch.zeros(1, int(np.prod(encoder.grid)), dtype=torch.bool).scatter(1, masked, True)
    clip = spec.normalise(video)
    pixels = clip.transpose(1, 2)  # transformers has time before colour

    patches = patchify(clip, encoder.tubelet, encoder.patch)
    inner = theirs.videomae if hasattr(theirs, "videomae") else theirs
    tokens = inner(pixels, bool_masked_pos=mask).last_hidden_state
    own = encoder.encode(take_tokens(patches, visible), visible)
    pairs = [(own, tokens)]
    if encoder.fc_norm:
        theirs.fc_norm.eps = encoder.norm.eps
        mean = encoder.norm(own.mean(1))
        logits = F.linear(mean, head["weight"], head["bias"]) if head else mean
        pairs.append((logits, theirs.classifier(theirs.fc_norm(tokens.mean(1)))))
    if isinstance(model, VideoMAE):
        theirs.decoder.norm.eps = 1e-6
        loss, prediction = model(video, visible, masked)
        output = theirs(pixels, bool_masked_pos=mask)
        pairs.append((prediction, output.logits))
        if model.target_eps == 1e-6:  # with another one the targets differ on purpose
            pairs.append((loss, output.loss))
    difference = max((a - b).abs().max().item() for a, b in pairs)
    if not difference <= TOLERANCE:  # rather than >: a NaN fails too
        why = ""
        if layer_norm_eps != 1e-6:
            why = f": its layer_norm_eps is {layer_norm_eps}, ours 1e-6"
        raise ValueError(
            f"the converted model differs from transformers' by {difference:.2e}, more than "
            f"{TOLERANCE}{why}"
        )
    return difference
