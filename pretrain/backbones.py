"""Exported backbones: describe, build, write and read.

RUN/backbone/ holds model.safetensors, config.json and manifest.json of the encoder, or of the pair
of towers of a video-text run.
"""

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from pretrain.checkpoint import newest_valid, read_state, read_weights
from pretrain.clip import VideoText
from pretrain.files import is_file, is_folder, read_json, sync
from pretrain.folders import remove, writing
from pretrain.names import for_screen
from pretrain.settings import STARTER
from pretrain.spec import Backbone, Rebuildable
from pretrain.text import HuggingFaceText, OpenClipText
from pretrain.third_party import check_arguments, dry_state, hub_folder
from pretrain.videomae import VideoMAE
from pretrain.vit import VideoTransformer, without_init
from pretrain.weights import (
    CheckpointError,
    MisfitError,
    load_strict,
    read_safetensors,
    refuse_misfit,
    verify_folder,
    weights_hash,
    write_folder,
)

Model = TypeVar("Model", bound=nn.Module)

# What a config.json may name: class name -> class. These are the ones in this package, to which
# `downstream.models.builders` adds the model families.
Builders = Mapping[str, Callable[..., nn.Module]]
BUILDERS: Builders = {
    builder.__name__: builder
    for builder in (VideoTransformer, OpenClipText, HuggingFaceText, VideoText)
}

# A classifier on two networks, of which one is of two itself.
MOST_NESTED = 2

# Arguments of older exports: old name -> current name, and of old values the current ones where
# they differ.
RENAMED: dict[str, tuple[str, dict[str, object]]] = {
    "moving": ("motion_tokens", {}),
    "still": ("subtract_mean", {"keep": False, "subtract": True}),
}


def parts_of(builder: Callable[..., nn.Module]) -> tuple[str, ...]:
    """The arguments of a class that are models; the backbone of a pair or a classifier is first."""
    return getattr(builder, "parts", ())


def describe(model: nn.Module) -> dict:
    """What `build` makes the same architecture from: a class's name and its arguments."""
    assert isinstance(model, Rebuildable)
    parts = {part: describe(getattr(model, part)) for part in parts_of(type(model))}
    return {"builder": type(model).__name__, "arguments": model.arguments | parts}


def current_arguments(builder: Callable[..., nn.Module], arguments: object) -> object:
    """Arguments as an older version wrote them, under the names that they have now."""
    if not isinstance(arguments, dict):
        return arguments
    takes, arguments = signature(builder).parameters, dict(arguments)
    for old, (new, values) in RENAMED.items():
        unclear = old in takes or new in arguments or new not in takes or old not in arguments
        if not unclear and (not values or arguments[old] in list(values)):
            value = arguments.pop(old)
            arguments[new] = values[value] if values else value
    return arguments


def check_description(description: object, where: str, builders: Builders, depth: int = 0) -> dict:
    """Validate a description from a file.

    Args:
        description: as read from a file, which may be anybody's.
        where: the file, for the message.
        builders: what it may name.
        depth: of how many others it is a part of a part.

    Returns:
        the builder and its arguments under their current names, see `current_arguments`.

    Raises:
        ValueError: it names no builder, or arguments that are not its own, or beyond all bounds.
    """
    description = description if isinstance(description, dict) else {}
    name = description.get("builder")
    if not isinstance(name, str):
        raise ValueError(f"{where} names no builder of ours but {name!r:.80}")
    if name not in builders:
        raise ValueError(f"{where} names {name!r:.80}, which is none of {', '.join(builders)}")
    parts = parts_of(builders[name])
    arguments = current_arguments(builders[name], description.get("arguments"))
    if parts and depth > MOST_NESTED:
        raise ValueError(f"{where} is a {name}, a model of others too deep within others")
    check_arguments(builders[name], arguments, where, parts)
    assert isinstance(arguments, dict)  # or it was refused
    checked = {
        part: check_description(arguments.get(part), f"{where}: {part}", builders, depth + 1)
        for part in parts
    }
    return {"builder": name, "arguments": arguments | checked}


def build(description: dict, builders: Builders) -> nn.Module:
    """The architecture that `describe` described, with fresh weights.

    What comes from a file passes `check_description` first.

    Raises:
        ValueError: a text tower is given as a backbone, or the reverse.
    """
    builder, arguments = builders[description["builder"]], description["arguments"]
    parts = {part: build(arguments[part], builders) for part in parts_of(builder)}
    for part, model in parts.items():
        if (part == "text") == isinstance(model, Backbone):
            raise ValueError(f"its {part} is a {type(model).__name__}, which cannot be that")
    return builder(**arguments | parts)


def export_backbone(model: nn.Module, folder: Path, provenance: dict) -> None:
    """Write a backbone folder: model.safetensors, config.json and their manifest.

    Args:
        model: a `Backbone`, or a `VideoText` pair.
        folder: where to; an older export there is replaced as a whole.
        provenance: where the weights come from, JSON-able, for the cards of later measurements.
    """
    config = {**describe(model), "provenance": provenance, "weights_sha256": weights_hash(model)}
    aside = folder.with_name(f"tmp-{folder.name}")
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with writing(folder):
        remove(aside)
        folder.parent.mkdir(parents=True, exist_ok=True)
    write_folder(aside, {"model": weights}, {"config": config})
    with writing(folder):
        remove(folder)
        os.replace(aside, folder)
        sync(folder.parent)


def read_backbone_config(folder: Path) -> dict:
    """The config.json of an exported backbone; whether it can be built is not checked.

    Raises:
        ValueError: the folder is no exported backbone, or is damaged.
    """
    if not (folder / "config.json").exists():
        inside = [p for p in (folder / "backbone", folder.parent / "backbone") if p.exists()]
        hint = f"did you mean {inside[0]}?" if inside else "a run exports one as RUN/backbone"
        raise ValueError(f"{folder} holds no config.json, so it is not a backbone: {hint}")
    config = read_json(folder / "config.json")
    if not isinstance(config.get("builder"), str) or not isinstance(config.get("arguments"), dict):
        hint = "give a folder that a recipe exported (RUN/backbone)"
        if is_folder(folder / "backbone"):
            hint = f"did you mean {folder / 'backbone'}?"
        elif config.get("model_type") == "videomae":
            hint = f"write hf:{folder}, since it is a Hugging Face VideoMAE folder"
        raise ValueError(f"{folder}/config.json names no builder of ours; {hint}")
    verify_folder(folder)
    if not isinstance(config.get("provenance"), dict):
        raise ValueError(f"{folder}/config.json does not say where its weights come from")
    return config


EXPORT = ["config.json", "manifest.json", "model.safetensors"]  # what an exported folder holds


def folder_of(name: str) -> str:
    """The folder of an export of ours that `STARTER`, or `hf:` and a name, mean; else the name.

    Behind `hf:` a hub name or a folder is known by its config.json, which names a builder of ours.
    From the hub the files of an export are taken and no others, so that no code comes with them.

    Raises:
        ValueError: the hub does not give it.
    """
    if name == STARTER:
        return str(Path(__file__).parent / STARTER)
    if not name.startswith("hf:"):
        return name
    theirs = name.removeprefix("hf:")
    here = is_folder(theirs)
    try:
        folder = Path(theirs) if here else hub_folder(theirs, EXPORT[:1])
        if not is_file(folder / "config.json"):
            return name
        if not isinstance(read_json(folder / "config.json").get("builder"), str):
            return name
        return str(folder if here else hub_folder(theirs, EXPORT))
    except ValueError as error:
        raise ValueError(str(error) if theirs in str(error) else f"{name}: {error}") from error


def provenance_of(name: str) -> dict | str:
    """Where the weights of `--backbone` come from: as an exported folder says, else the name."""
    name = folder_of(name)
    return read_backbone_config(Path(name))["provenance"] if is_folder(name) else name


def _build_to_fit(
    make: Callable[[], Model], folder: Path, read: Callable[[Mapping[str, Tensor]], dict]
) -> Model:
    """Build a model, once its shapes are known to be those that are read, and load the weights."""
    with without_init():
        try:
            shapes = dry_state(make)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        weights = read(shapes)
        model = make()
    load_strict(model, weights, str(folder))
    return model.eval()


def load_export(folder: Path, builders: Builders) -> nn.Module:
    """The exported model of a folder, in evaluation mode: an encoder, a pair or a classifier.

    `downstream.models.load_backbone` and its neighbours hand their table of families to this one.

    Raises:
        ValueError: the folder is no export, does not verify, or names none of `builders`.
    """
    config = read_backbone_config(folder)
    description = check_description(config, f"{folder}/config.json", builders)
    try:
        read = partial(read_safetensors, folder / "model.safetensors")
        model = _build_to_fit(lambda: build(description, builders), folder, read)
    except MisfitError as error:  # although it verifies
        raise CheckpointError(
            f"{error}. It was exported by another version of this program, which understood by the "
            "same names another network: train it again, or read it with that version"
        ) from error
    if weights_hash(model) != config.get("weights_sha256"):
        raise CheckpointError(f"{folder}: the weights are not those that were exported")
    return model


def fresh_like(model: nn.Module, seed: int) -> nn.Module:
    """The same architecture with fresh weights, in evaluation mode: the baseline of every probe."""

    def again(model: nn.Module) -> nn.Module:
        assert isinstance(model, Rebuildable)
        parts = {part: again(getattr(model, part)) for part in parts_of(type(model))}
        return type(model)(**model.arguments | parts)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return again(model).eval()


def load_pretrained_videomae(run: Path) -> VideoMAE:
    """The whole model, encoder and decoder, of a run's newest checkpoint, in evaluation mode.

    The encoder is the one that the run exported, where that is another one: weights between the
    starting and the trained ones, or the best of a run that the guard stopped.

    Raises:
        CheckpointError: the run has no valid checkpoint, or has not exported such an encoder.
    """
    folder, problems = newest_valid(run)
    if folder is None:
        raise CheckpointError(f"{run} holds no valid checkpoint. {' '.join(problems)}")
    for problem in problems:
        print(f"warning: {for_screen(problem)}; {folder} is taken", file=sys.stderr, flush=True)
    state = read_state(folder)
    described = state.get("model")
    if not isinstance(described, dict) or "decoder" not in described:
        raise CheckpointError(f"{run} is no VideoMAE run; its backbone is in {run}/backbone")
    where = f"{folder}/state.json"
    encoder = current_arguments(VideoTransformer, described.get("encoder"))
    check_arguments(VideoTransformer, encoder, where, ())
    assert isinstance(encoder, dict)  # or it was refused
    check_arguments(VideoMAE, described["decoder"], where, ("encoder",))
    make = lambda: VideoMAE(VideoTransformer(**encoder), **described["decoder"])
    if {"contrast", "sigreg", "distill"} & described.keys():
        # What is around the VideoMAE, a head for the views, ends with the training.
        weights = {
            name.removeprefix("masked."): value
            for name, value in read_weights(folder).items()
            if name.startswith("masked.")
        }
        refuse_misfit(dry_state(make), weights, str(folder))
        model = make()
        load_strict(model, weights, str(folder))
    else:
        model = _build_to_fit(make, folder, partial(read_weights, folder))
    distill, guard = described.get("distill"), state.get("guard")
    between = isinstance(distill, dict) and "share" in distill
    if between or (isinstance(guard, dict) and guard.get("stopped")):
        exported = run / "backbone"
        if not is_folder(exported):
            raise CheckpointError(
                f"{run} has not ended, and what it exports is not what its checkpoint holds: start "
                "the same command again and let it end"
            )
        load_strict(model.encoder, load_export(exported, BUILDERS).state_dict(), str(exported))
    return model.eval()
