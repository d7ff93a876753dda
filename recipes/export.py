"""Export a model for other programs: ONNX, torch.export, or a folder for the Hugging Face hub.

    python recipes/export.py --backbone RUN/backbone --to onnx --out exported/
    python recipes/export.py --backbone RUN/backbone --to torch --out exported/ --data packs/mine
    python recipes/export.py --backbone RUN/backbone --to hf --out hub/

What is exported takes the clips as they are decoded and normalises them itself. It carries the clip
that it takes, its classes and its version: in the metadata of the ONNX model, among the extra files
of the torch program, in the model card, and in contract.json beside. Before anything is kept, its
outputs are compared with the model's on clips of --data.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pretrain.threads  # noqa: F401 (before torch)

import numpy as np
import torch
from torch import nn

from downstream.classifier import Classifier
from downstream.export import (
    CONTRACT,
    Runner,
    Whole,
    at_length,
    compared,
    contract_of,
    lengths_of,
    program_of,
    reason_of,
    refuse_missing_libraries,
    refuse_non_finite,
    spec_of,
    write_onnx,
    write_torch,
)
from downstream.models import (
    PUBLISHED,
    load_backbone,
    load_classifier,
    load_video_text,
    trained_rate,
)
from downstream.report import for_card, markdown_table, table
from downstream.results import read_results
from pretrain.backbones import export_backbone, folder_of, provenance_of, read_backbone_config
from pretrain.data.cache import open_data, packing_side
from pretrain.data.progress import Bar
from pretrain.data.shards import EvalClips, eval_loader
from pretrain.files import is_file, is_folder, is_there
from pretrain.folders import try_folder, writing
from pretrain.interop.videomae import import_videomae
from pretrain.log import print_table, write_json
from pretrain.names import for_markdown, for_screen
from pretrain.spec import AnyFrames
from recipes.options.export import Config, command

UNKNOWN = "the weights do not say at how many frames a second they were trained"
FEW = 6  # clips to compare on at another length
BATCH = 4  # clips in one forward pass; the last has fewer, and so other numbers are tried


def load(name: str, weights: str) -> nn.Module:
    """What `name` names: its classifier, its pair of towers, or else its backbone; on the CPU."""
    name = folder_of(name)
    if name in PUBLISHED:
        return load_classifier(name, weights)
    if name.startswith("hf:") or name.endswith((".pth", ".pt")):
        fine_tuned = not weights and "head" in import_videomae(name)[1]
        return load_classifier(name) if fine_tuned else _module(load_backbone(name, weights))
    if is_folder(name):
        kind = read_backbone_config(Path(name))["builder"]
        if kind == "Classifier":
            return load_classifier(name, weights)
        if kind == "VideoText" and not weights:
            return load_video_text(name)
    return _module(load_backbone(name, weights))


def _module(backbone: object) -> nn.Module:
    assert isinstance(backbone, nn.Module)
    return backbone


# --------------------------------------------------------------------------------- the hub's folder


def scores_of(name: str) -> list[str]:
    """The lines of a card with the scores in the results folder of a run, if there are any."""
    folder = Path(name).parent
    if not is_folder(name) or not is_file(folder / "results.json"):
        return []
    heads, *rows = table(read_results(folder))
    return markdown_table(heads, rows)


def card_of(model: nn.Module, name: str, contract: dict[str, Any], scores: list[str]) -> str:
    """The model card, README.md of the hub's folder: what is known, and what the user fills in.

    Args:
        model: that is exported.
        name: as the user gave it.
        contract: of it, checked.
        scores: lines of Markdown.
    """
    told = provenance_of(name)
    about = dict(told) if isinstance(told, dict) else {"weights": told}
    settings = about.pop("config", {})
    kind = "a classifier of clips" if contract["classes"] else "an encoder of clips"
    spec, check, classes = spec_of(model), contract["check"], contract["classes"] or []
    rate = f", learned at {contract['fps']:.4g} frames a second" if contract["fps"] else ""
    use = (
        "predict --backbone hf:OWNER/NAME --video VIDEOS"
        if classes
        else ("linear-probe --backbone hf:OWNER/NAME --data LABELLED_VIDEOS")
    )
    lines = [
        "---", "library_name: muybridge", "tags: [muybridge, video]",
        "# license: choose one before you push", "---", "",
        f"# {contract['model']}: {kind}", "",
        f"It takes {spec.in_words} ({', '.join(spec.streams)}){rate}, and gives "
        f"{contract['output']['name']} of the shape {tuple(contract['output']['shape'])}.", "",
        "```bash", f"muybridge {use}", "```", "",
        "`contract.json` has the clip in full. Weights are in safetensors; no code of this "
        "repository is run.",
    ]  # fmt: skip
    if classes:
        shown = ", ".join(map(for_markdown, classes[:100]))
        more = f", and {len(classes) - 100} more" if len(classes) > 100 else ""
        lines += ["", "## Classes", "", f"{len(classes)}: {shown}{more}"]
    lines += ["", "## Data, recipe and scores", "", *for_card("provenance", about, "")]
    lines += ["", *scores] if scores else ["", "No results were found beside these weights."]
    if isinstance(settings, dict) and settings:
        lines += ["", "## Settings", "", *for_card("settings", settings, "")]
    lines += [
        "", "## Intended use", "",
        "Research, and footage like that of the data above. To be filled in: what it was made for.",
        "", "## Limits", "",
        "- Scores hold for the data that they were measured on, and for clips sampled and cropped "
        "as above.",
        "- What the data do not show was not learned; people, places and cameras in them decide "
        "whom it serves badly. That was not measured unless it stands above.",
        "- " + ("A clip of none of the classes gets one of them all the same."
                if classes else "An embedding says nothing until something is fitted on it."),
        "", "## Check", "",
        f"Loaded again, outputs differed by {check['max_abs_difference']:.1e} at most on "
        f"{check['clips']} clips.",
        "", "## Licence", "", "To be filled in. That of the data may bind the weights.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def write_hub(model: nn.Module, name: str, folder: Path) -> Runner:
    """Write a folder of ours for the hub, and return what runs the model loaded from it again."""
    told = provenance_of(name)
    about = told if isinstance(told, dict) else {"weights": told}
    export_backbone(model, folder, about)
    again = load(f"hf:{folder}", "")
    assert type(again) is type(model)
    return runner_of(again)


# --------------------------------------------------------------------------------------- comparing


def runner_of(model: nn.Module) -> Runner:
    """What runs a model of ours on clips as they are decoded."""
    whole = Whole(model).eval()

    def run(streams: Sequence[np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return whole(*map(torch.from_numpy, streams)).numpy()

    return run


def check(model: nn.Module, exported: Runner, clips: EvalClips) -> dict[str, Any]:
    """Compare outputs of an export with the model's, see `compared`.

    Raises:
        ValueError: they differ, or the export does not run on these clips.
    """
    own, want, got = runner_of(model), [], []
    with Bar(len(clips), "comparing", "clip", True) as bar:
        for ids, views in eval_loader(clips, BATCH, 0):
            streams = [views[name][:, 0].numpy() for name in clips.spec.streams]
            want.append(own(streams))
            try:
                got.append(exported(streams))
            except Exception as error:  # of two runtimes, of many kinds
                raise ValueError(f"the export does not run: {reason_of(error)}") from error
            bar.update(len(ids))
    return compared(np.concatenate(want), np.concatenate(got), isinstance(model, Classifier))


def check_lengths(
    model: nn.Module, exported: Runner, clips: EvalClips, lengths: tuple[int, int]
) -> dict[str, float]:
    """Compare an export on clips of two other lengths with the model rebuilt for each.

    Returns:
        by number of frames, the largest difference.

    Raises:
        ValueError: at one of them it is not the model.
    """
    (least, multiple), frames = lengths, spec_of(model).frames
    found = {}
    for other in (least if least < frames else frames + 2 * multiple, frames + multiple):
        try:
            rebuilt = at_length(model, other)
            few = EvalClips(clips.pack, clips.ids[:FEW], spec_of(rebuilt), 1, 1)
            found[str(other)] = check(rebuilt, exported, few)["max_abs_difference"]
        except (ValueError, RuntimeError) as error:  # weights that do not fit are a RuntimeError
            raise ValueError(f"at {other} frames {reason_of(error)}") from error
    return found


def open_clips(config: Config, model: nn.Module) -> EvalClips:
    """The clips to compare on: those that the model takes, spread over the data."""
    spec = spec_of(model)
    pack = open_data(config.data, packing_side(spec.size))
    count = min(config.clips, len(pack))
    ids = np.unique(np.linspace(0, len(pack) - 1, count).round().astype(int))
    return EvalClips(pack, ids, spec, 1, 1)


# --------------------------------------------------------------------------------------------- main


def frames_in_words(contract: dict[str, Any]) -> str:
    """Which lengths of a clip the export takes, and how far it is from the model at others."""
    if contract["frames_max"] is not None:
        return f"{contract['frames']}, {contract['frames_are']}"
    multiple = contract["frames_multiple_of"]
    every = f" in multiples of {multiple}" if multiple > 1 else ""
    tried = ", ".join(
        f"{off:.1e} at {n}" for n, off in contract["check"]["differences_at_other_lengths"].items()
    )
    return (
        f"{contract['frames_min']} or more{every}, trained on {contract['frames']}; "
        f"largest difference {tried}"
    )


def export(
    model: nn.Module, config: Config, clips: EvalClips, folder: Path, lengths: AnyFrames
) -> dict[str, Any]:
    """Write an export that takes clips of these lengths, compare it, and return its contract.

    Args:
        model: on the CPU, in evaluation mode.
        config: of the recipe.
        clips: to compare on.
        folder: to write to; it is made anew.
        lengths: see `lengths_of`.

    Raises:
        ValueError: it cannot be exported so, or differs.
    """
    contract = contract_of(model, trained_rate(config.backbone), lengths)
    if folder.is_dir():  # of a try before
        shutil.rmtree(folder)
    if config.to == "hf":
        run = write_hub(model, config.backbone, folder)
    else:
        program = program_of(model, lengths)
        folder.mkdir()
        if config.to == "onnx":
            run = write_onnx(program, folder / "model.onnx", contract)
        else:
            run = write_torch(program, folder / "model.pt2", contract)
    found = {"data": Path(config.data).name, **check(model, run, clips)}
    if not isinstance(lengths, str):
        found["differences_at_other_lengths"] = check_lengths(model, run, clips, lengths)
    contract["check"] = found
    return contract


def export_any_length(
    model: nn.Module, config: Config, clips: EvalClips, folder: Path
) -> dict[str, Any]:
    """`export` for all lengths that the family takes, or where that fails for its own."""
    lengths = lengths_of(model)
    if config.to == "hf":
        lengths = "the model refuses clips of another length"
    if not isinstance(lengths, str):
        try:
            return export(model, config, clips, folder, lengths)
        except ValueError as error:
            lengths = f"for any number of them it failed ({error})"
    return export(model, config, clips, folder, lengths)


def main(config: Config) -> dict[str, Any]:
    """Export, compare, and return the contract."""
    out = Path(config.out)
    aside = out.with_name(f"tmp-{out.name}")
    for path, why in ((out, "nothing is overwritten"), (aside, "an export was stopped there")):
        if is_there(path):
            raise ValueError(f"--out: {path} exists already ({why}): remove it or name another")
    try_folder(out.parent)
    if config.to == "onnx":
        refuse_missing_libraries()
    torch.manual_seed(0)  # of a named model's fresh weights
    model = load(config.backbone, config.weights or "").float().cpu().eval()
    refuse_non_finite(model)
    clips = open_clips(config, model)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    try:
        contract = export_any_length(model, config, clips, aside)
        write_json(aside / CONTRACT, contract)
        if config.to == "hf":
            card = card_of(model, config.backbone, contract, scores_of(config.backbone))
            with writing(aside / "README.md"):
                (aside / "README.md").write_text(card)
        with writing(out):
            os.replace(aside, out)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
    said = contract["check"]
    rows = {
        "clip": spec_of(model).in_words,
        "streams": ", ".join(contract["streams"]) + ", as decoded; normalised inside",
        "output": f"{contract['output']['name']} {tuple(contract['output']['shape'])}",
        "frames": frames_in_words(contract),
        "rate": f"trained at {contract['fps']:.4g} frames a second" if contract["fps"] else UNKNOWN,
        "difference": f"{said['max_abs_difference']:.1e} at most on {said['clips']} clips of "
        f"{for_screen(config.data)}",
        "same": f"{said['same']} in {said['same_top1']:.1%}",
        "files": ", ".join(sorted(p.name for p in out.iterdir())),
    }
    print_table(f"{config.backbone} -> {out} ({config.to})", rows)
    if config.to == "hf":
        print("\nconfig.json and README.md hold the run's settings, paths among them: read them, "
              "and choose a licence, before you push")  # fmt: skip
    return contract


if __name__ == "__main__":
    command(main)
