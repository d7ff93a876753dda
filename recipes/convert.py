"""Convert weights between ours, official VideoMAE's and Hugging Face's, and verify the result.

    python recipes/convert.py --source runs/videomae-tiny --to hf --out converted/
    python recipes/convert.py --source runs/videomae-tiny/backbone --to official --out backbone.pth
    python recipes/convert.py --source hf:MCG-NJU/videomae-base --to ours --out backbone/

A run gives its whole model, encoder and decoder; RUN/backbone the encoder alone. A fine-tuned
VideoMAE, of transformers, of the official code or of recipes/finetune.py with --pool fc_norm, is
converted with its classifier. What is written is read back and compared with the source, weight by
weight and by its outputs in transformers' model. No existing file is overwritten. What neither the
official code nor transformers can represent is refused: models of the presets `tiny` and `shrec`
convert if they were pretrained with --positions flat --motion-tokens 1.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pretrain.threads  # noqa: F401 (before torch)

import torch
from torch import Tensor

from downstream.classifier import Classifier
from downstream.models import classifier_of, load_backbone, load_classifier
from pretrain.backbones import (
    export_backbone,
    folder_of,
    load_pretrained_videomae,
    read_backbone_config,
)
from pretrain.files import is_folder, is_there
from pretrain.folders import try_folder
from pretrain.interop.hugging_face import write_hf
from pretrain.interop.layouts import Sizes, arguments_of, decides_numbers, obstacles
from pretrain.interop.official import write_official
from pretrain.interop.videomae import import_videomae, verify
from pretrain.log import print_table
from pretrain.names import counted, first_of
from pretrain.videomae import VideoMAE
from pretrain.vit import VideoTransformer
from recipes.options.convert import Config, command

Model = VideoMAE | VideoTransformer | Classifier


def load_theirs(source: str, sizes: Sizes) -> tuple[Model, dict]:
    """Third-party weights, of a fine-tuned VideoMAE with its classifier, and the report on them."""
    model, report = import_videomae(source, sizes)
    return (classifier_of(model, report) if "head" in report else model), report


def load_ours(source: str) -> tuple[torch.nn.Module, list[str]]:
    """An exported model of ours, and which of its weights are left out.

    A classifier is kept where it stands behind the norm of the mean, as the others have it; else
    its backbone goes alone.
    """
    folder = Path(source)
    if is_folder(folder) and read_backbone_config(folder)["builder"] == "Classifier":
        model = load_classifier(source)
        if getattr(model.backbone, "fc_norm", False) and not model.per_frame:
            return model, []
        return model.backbone, ["head.weight", "head.bias"]
    backbone = load_backbone(source)
    assert isinstance(backbone, torch.nn.Module)
    return backbone, []


def described(model: Model) -> tuple[dict[str, Tensor], dict]:
    """A model's weights and arguments as `pretrain.interop.layouts` takes them."""
    if isinstance(model, Classifier):
        assert isinstance(model.backbone, VideoTransformer)  # what else was refused
        state, arguments = described(model.backbone)
        head = {f"head.{kind}": value for kind, value in model.head.state_dict().items()}
        return state | head, arguments | {"classes": model.classes}
    return model.state_dict(), arguments_of(model)


def compare(model: Model) -> float:
    """The largest difference from transformers' outputs, see `verify`."""
    if isinstance(model, Classifier):
        assert isinstance(model.backbone, VideoTransformer)
        return verify(model.backbone, head=model.head.state_dict())
    return verify(model)


def read(config: Config, problems: list[str]) -> tuple[Model, dict]:
    """The model that `config.source` names, verified against transformers, and the report on it.

    Args:
        config: the configuration.
        problems: what is amiss with its other flags.

    Raises:
        ValueError: there are problems, or it cannot be read or converted; the message names them
            all.
    """
    path = Path(config.source)
    sizes = Sizes(config.frames, config.size, config.heads, config.decoder_heads)
    report: dict[str, Any] = {"source": config.source, "dropped": []}
    model: torch.nn.Module
    theirs = config.source.startswith("hf:") or path.suffix in (".pth", ".pt")
    if not theirs and sizes != Sizes():
        problems.append(
            f"{path} is ours and records its sizes: leave out --frames, --size, --heads, "
            "--decoder-heads"
        )
    try:
        if folder_of(config.source) != config.source:
            raise ValueError(
                f"{config.source} is an export of ours: download it, and give its folder"
            )
        if theirs:
            model, report = load_theirs(config.source, sizes)
        elif is_folder(path / "checkpoints"):
            model = load_pretrained_videomae(path)
        else:
            model, report["dropped"] = load_ours(config.source)
    except ValueError as error:
        raise ValueError("; ".join([*problems, str(error)])) from error
    if not theirs:
        plain = model.backbone if isinstance(model, Classifier) else model
        if isinstance(plain, VideoMAE | VideoTransformer):
            problems += [
                f"neither the official code nor transformers has {what}"
                for what in obstacles(arguments_of(plain))
            ]
        else:
            problems.append(
                f"{config.source} is a {type(plain).__name__}: only plain video transformers "
                "convert"
            )
    if problems:
        raise ValueError("; ".join(problems))
    assert isinstance(model, VideoMAE | VideoTransformer | Classifier)
    if not theirs:
        report["max_difference"] = compare(model)
    return model, report


def main(config: Config) -> dict:
    """Convert, and return the report that is printed."""
    out = Path(config.out)
    aside = out.with_name(f"tmp-{out.name}")
    problems = []  # told together, since each may cost a training run
    if is_there(out):
        problems.append(f"--out {out} exists already: name another, nothing is overwritten")
    if config.to == "official" and out.suffix not in (".pth", ".pt"):
        problems.append(f"--out {out}: an official checkpoint is a file whose name ends in .pth")
    try:
        try_folder(out.parent)
    except ValueError as error:
        problems.append(str(error))
    if is_there(aside):
        problems.append(f"{aside} is in the way, left by a conversion that was stopped: remove it")
    model, report = read(config, problems)
    if config.to == "ours" and isinstance(model, VideoMAE):
        # A backbone is the encoder; a run continues from the source itself (--backbone).
        whole, model = model, model.encoder
        report["dropped"] += [k for k in whole.state_dict() if not k.startswith("encoder.")]

    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if config.to == "hf":
            write_hf(*described(model), aside)
            written, check = load_theirs(f"hf:{aside}", Sizes())
        elif config.to == "official":
            write_official(*described(model), aside)
            written, check = load_theirs(str(aside), Sizes())
        else:
            export_backbone(model, aside, {"converted_from": config.source})
            exported, _ = load_ours(str(aside))
            assert isinstance(exported, VideoMAE | VideoTransformer | Classifier)
            written = exported
            check = {"max_difference": compare(written)}
        (expected, arguments), (got, read_back) = described(model), described(written)
        same = expected.keys() == got.keys() and all(torch.equal(expected[k], got[k]) for k in got)
        assert same and decides_numbers(read_back) == decides_numbers(arguments), (
            "what was written reads differently"
        )
        os.replace(aside, out)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        aside.unlink(missing_ok=True)

    report["max_difference"] = max(report["max_difference"], check["max_difference"])
    dropped = report["dropped"]
    rows = {k: v for k, v in arguments["encoder"].items() if v is not None}
    rows |= arguments.get("decoder", {"decoder": "none"})
    if "classes" in arguments:
        rows["classifier"] = (
            f"{counted(len(arguments['classes']), 'class')}: {', '.join(arguments['classes'])[:60]}"
        )
    rows["weights"] = f"{len(got)}, of {sum(v.numel() for v in got.values()):,} values"
    rows["dropped"] = f"{len(dropped)}: {first_of(dropped, 3)}" if dropped else "nothing"
    rows["difference"] = f"{report['max_difference']:.1e} at most from transformers' outputs"
    print_table(f"{config.source} -> {out} ({config.to})", rows)
    return report


if __name__ == "__main__":
    command(main)
