"""Convert weights between ours, official VideoMAE's and Hugging Face's, and verify the result.

    python recipes/convert.py --source runs/videomae-tiny --to hf --out converted/
    python recipes/convert.py --source runs/videomae-tiny/backbone --to official --out backbone.pth
    python recipes/convert.py --source hf:MCG-NJU/videomae-base --to ours --out backbone/

A run gives its whole model, encoder and decoder; RUN/backbone the encoder alone. What is written is read
back and compared with the source, weight by weight and by its outputs in transformers' model. Nothing
that exists is overwritten. What neither the official code nor transformers can be told is refused: models of
the presets `tiny` and `shrec` convert if they were pretrained with --positions flat --moving 1.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from downstream.models import load_backbone
from pretrain.checkpoint import export_backbone, load_pretrained_videomae
from pretrain.convert import import_foreign, verify
from pretrain.flags import Count
from pretrain.layouts import (
    Sizes,
    arguments_of,
    decides_numbers,
    obstacles,
    to_hf,
    to_official,
)
from pretrain.log import cli, print_table
from pretrain.videomae import VideoMAE
from pretrain.vit import VideoTransformer


@dataclass(frozen=True)
class Config:
    """What to convert, and to what."""

    source: str
    """A run, RUN/backbone, hf:OWNER/NAME, hf:FOLDER, or an official .pth file."""
    to: Literal["hf", "official", "ours"]
    """hf: a folder for transformers; official: a .pth file; ours: a backbone folder (encoder only)."""
    out: str
    """The folder or file to write; it must not exist."""
    frames: Count | None = None
    """Frames of a clip, where an official file does not record them (16 then)."""
    size: Count | None = None
    """Height and width of a clip in pixels, likewise (224 then)."""
    heads: Count | None = None
    """Attention heads of the encoder, likewise (by its width then)."""
    decoder_heads: Count | None = None
    """Attention heads of the decoder, likewise."""


def read(config: Config, problems: list[str]) -> tuple[VideoMAE | VideoTransformer, dict]:
    """The model that `config.source` names, verified against transformers, and the report on it.

    Args:
        config: the configuration.
        problems: what is amiss with its other flags.

    Raises:
        ValueError: there are problems, or it cannot be read or converted; the message names them all.
    """
    path = Path(config.source)
    sizes = Sizes(config.frames, config.size, config.heads, config.decoder_heads)
    theirs = config.source.startswith("hf:") or path.suffix in (".pth", ".pt")
    try:
        if theirs:
            model, report = import_foreign(config.source, sizes)
        elif (path / "checkpoints").is_dir():
            model = load_pretrained_videomae(path)
        else:
            model = load_backbone(config.source)
    except ValueError as error:
        raise ValueError("; ".join([*problems, str(error)])) from error
    if not theirs:
        if sizes != Sizes():
            problems.append(
                f"{path} is ours and records its sizes: leave out --frames, --size, --heads, --decoder-heads"
            )
        if isinstance(model, VideoMAE | VideoTransformer):
            problems += [
                f"neither the official code nor transformers has {what}"
                for what in obstacles(arguments_of(model))
            ]
        else:
            problems.append(
                f"{config.source} is a {type(model).__name__}: only plain video transformers convert"
            )
    if problems:
        raise ValueError("; ".join(problems))
    if not theirs:
        report = {"source": config.source, "dropped": [], "max_difference": verify(model)}
    return model, report


def write_hf(model: VideoMAE | VideoTransformer, folder: Path) -> None:
    """Write what transformers' from_pretrained reads."""
    state, config = to_hf(model.state_dict(), arguments_of(model))
    spec = (model.encoder if isinstance(model, VideoMAE) else model).input_spec
    processor = {
        "image_processor_type": "VideoMAEImageProcessor",
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "size": {"shortest_edge": spec.size},
        "crop_size": {"height": spec.size, "width": spec.size},
    }
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))


def main(config: Config) -> dict:
    """Convert, and return the report that is printed."""
    out = Path(config.out)
    aside = out.with_name(f"tmp-{out.name}")
    problems = []  # told together, since each may cost a training run
    if out.exists():
        problems.append(f"--out {out} exists already: name another, nothing is overwritten")
    if config.to == "official" and out.suffix not in (".pth", ".pt"):
        problems.append(f"--out {out}: an official checkpoint is a file whose name ends in .pth")
    if aside.exists():
        problems.append(f"{aside} is in the way, left by a conversion that was stopped: remove it")
    model, report = read(config, problems)
    if config.to == "ours" and isinstance(model, VideoMAE):
        # A backbone is the encoder; a run continues from the source itself (--backbone).
        whole, model = model, model.encoder
        report["dropped"] += [k for k in whole.state_dict() if not k.startswith("encoder.")]

    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if config.to == "hf":
            write_hf(model, aside)
            written, check = import_foreign(f"hf:{aside}")
        elif config.to == "official":
            torch.save(to_official(model.state_dict(), arguments_of(model)), aside)
            written, check = import_foreign(str(aside))
        else:
            export_backbone(model, aside, {"converted_from": config.source})
            written = load_backbone(str(aside))
            check = {"max_difference": verify(written)}
        expected, got = model.state_dict(), written.state_dict()
        same = expected.keys() == got.keys() and all(torch.equal(expected[k], got[k]) for k in got)
        as_written, as_meant = (decides_numbers(arguments_of(m)) for m in (written, model))
        assert same and as_written == as_meant, "what was written reads differently"
        os.replace(aside, out)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        aside.unlink(missing_ok=True)

    report["max_difference"] = max(report["max_difference"], check["max_difference"])
    dropped = report["dropped"]
    rows = {k: v for k, v in arguments_of(model)["encoder"].items() if v is not None}
    rows |= arguments_of(model).get("decoder", {"decoder": "none"})
    rows["weights"] = f"{len(got)}, of {sum(v.numel() for v in got.values()):,} values"
    rows["dropped"] = f"{len(dropped)}: {', '.join(dropped[:3])}, ..." if dropped else "nothing"
    rows["difference"] = f"{report['max_difference']:.1e} at most from transformers' outputs"
    print_table(f"{config.source} -> {out} ({config.to})", rows)
    return report


if __name__ == "__main__":
    cli(main, Config)
