"""Save, resume, export, load: the only module that writes weights; `pretrain/weights.py` reads them.

A run's folder:

    RUN/config.json                   the resolved configuration
    RUN/checkpoints/step-00000100/    model.safetensors, optimizer.safetensors, state.json, manifest.json
    RUN/backbone/                     model.safetensors, config.json: the exported encoder, or the pair of
                                      towers of a video-text run

A checkpoint is written aside, synced, hashed and renamed, and only then are older ones removed, so at
every instant there is a valid one. No pickle: tensors are safetensors, the rest is JSON.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain.clip import VideoText
from pretrain.files import is_folder, read_json, share, sync
from pretrain.folders import remove, writing
from pretrain.foreign import check_arguments, dry_state, shown
from pretrain.frames import FrameTower
from pretrain.names import for_screen
from pretrain.openclip import PREFIX as OPEN_CLIP
from pretrain.openclip import Pair, load_open_clip
from pretrain.text import HuggingFaceText, OpenClipText
from pretrain.videomae import VideoMAE
from pretrain.vit import IMAGENET_MEAN, IMAGENET_STD, VideoTransformer, weights_follow
from pretrain.weights import MisfitError, read_safetensors, refuse_misfit, sha256

# What an exported folder may name as its builder, and a tower of a pair likewise. `downstream/models` adds its
# families and the classifier.
BUILDERS = {
    builder.__name__: builder
    for builder in (VideoTransformer, FrameTower, OpenClipText, HuggingFaceText, VideoText)
}

# What a manifest lists: of a checkpoint, or of an export.
WHOLE = (
    {"model.safetensors", "optimizer.safetensors", "state.json"},
    {"model.safetensors", "config.json"},
)
KEEP = 2  # complete checkpoints that stay

# What the optimizers remember of a parameter: `step` is a number, all others have its shape.
MOMENTS = {
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "Muon": {"momentum_buffer"},
    "SGD": {"momentum_buffer"},
}


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message says which, why and what to do."""


def _write_folder(
    folder: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, dict]
) -> None:
    """Write safetensors and JSON files and their manifest into a new folder, each synced."""
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    free = shutil.disk_usage(folder.parent).free
    try:
        if free < needed * 1.01 + 2**20:
            raise OSError(f"{needed:,} bytes are needed and {free:,} are free")
        folder.mkdir()
        for name, group in tensors.items():
            save_file(group, folder / f"{name}.safetensors")
            share(folder / f"{name}.safetensors")
        for name, content in texts.items():
            (folder / f"{name}.json").write_text(json.dumps(content, indent=1))
        files = sorted(folder.iterdir())
        for path in files:
            sync(path)
        # The manifest comes last: a folder without a matching one is not a checkpoint.
        manifest = folder / "manifest.json"
        manifest.write_text(json.dumps({p.name: sha256(p) for p in files}, indent=1))
        sync(manifest)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(
            f"cannot write {folder.parent}: {error}. What was saved before is intact: make room there "
            "and start the same command again"
        ) from error


def _verify(folder: Path) -> None:
    """Raise CheckpointError unless every file of a checkpoint or an export is there with its recorded hash."""
    try:
        manifest = read_json(folder / "manifest.json")
        if manifest.keys() not in WHOLE:
            raise ValueError(
                f"its manifest lists {', '.join(map(ascii, manifest))[:200] or 'nothing'}"
            )
        bad = [n for n, digest in manifest.items() if sha256(folder / n) != digest]
    except ValueError as error:
        raise CheckpointError(f"{folder} is incomplete: {error}") from error
    if bad:
        raise CheckpointError(
            f"{folder} is corrupt: {', '.join(bad)} does not match its recorded hash"
        )


def checkpoints(run: Path) -> list[Path]:
    """The committed checkpoints of a run, newest first, not yet verified."""
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True)


def read_state(folder: Path) -> dict:
    """The state of a checkpoint, which names the step that its folder is called after.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        state = read_json(folder / "state.json")
    except ValueError as error:
        raise CheckpointError(f"{folder} is corrupt: {error}") from error
    if type(state.get("step")) is not int or folder.name != f"step-{state['step']:08d}":
        raise CheckpointError(
            f"{folder} is corrupt: its state.json is of step {state.get('step')!r:.20}"
        )
    return state


def save_checkpoint(
    run: Path, model: VideoMAE | VideoText, optimizers: list[torch.optim.Optimizer], state: dict
) -> Path:
    """Write one checkpoint and remove all but the `KEEP` newest of those that verify.

    A damaged one does not count and is replaced; it is named on the screen.

    Args:
        run: the run's folder.
        model: the bare model, not its distributed wrapper.
        optimizers: those over its parameters.
        state: JSON-able; `state["step"]` counts finished optimizer steps.

    Raises:
        CheckpointError: the disk is full or not writable, or a weight is not finite; the checkpoints
            that were there are untouched.
    """
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    broken = [k for k, v in weights.items() if not torch.isfinite(v).all()]
    if broken:
        raise CheckpointError(f"not saved: {broken[0]} holds values that are not finite")
    moments = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    root = run / "checkpoints"
    final = root / f"step-{state['step']:08d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob("tmp-*"):  # of a run that was killed while saving
            remove(leftover)
    except OSError as error:
        raise CheckpointError(f"cannot write {root}: {error}") from error
    if os.path.lexists(final) and not (problem := _problem(final)):
        return final
    aside = root / f"tmp-{final.name}"
    _write_folder(
        aside,
        {"model": weights, "optimizer": moments},
        {"state": state | {"model": model.arguments}},
    )
    try:
        if os.path.lexists(final):
            print(f"warning: {for_screen(problem)}; it is replaced", file=sys.stderr, flush=True)
            remove(final)
        os.replace(aside, final)
        sync(root)
        whole = 0
        for old in checkpoints(run):
            # The one just written was hashed as it was written; an older one may have decayed since.
            problem = "" if old == final or whole == KEEP else _problem(old)
            if problem:
                print(f"warning: {for_screen(problem)}; it is removed", file=sys.stderr, flush=True)
            if problem or whole == KEEP:
                remove(old)
            else:
                whole += 1
    except OSError as error:
        raise CheckpointError(
            f"cannot write {root}: {error}. What was saved before is intact: mend that and start the same "
            "command again"
        ) from error
    return final


def load_checkpoint(
    folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict:
    """Put a verified checkpoint into `model` and `optimizers`, in place, and return its state.

    Raises:
        CheckpointError: a file is missing or corrupt, or the weights are of another model.
    """
    _verify(folder)
    load_strict(model, read_safetensors(folder / "model.safetensors"), str(folder))
    moments = read_safetensors(folder / "optimizer.safetensors")
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        prefix = f"{name}."
        entries = {k[len(prefix) :]: moments.pop(k) for k in list(moments) if k.startswith(prefix)}
        if not entries:
            continue
        wanted = MOMENTS[type(owner[parameter]).__name__] if parameter in owner else set()
        shapes = {k: () if k == "step" else parameter.shape for k in entries}
        if entries.keys() != wanted or any(v.shape != shapes[k] for k, v in entries.items()):
            raise CheckpointError(
                f"{folder} does not fit the optimizer: {name} has {', '.join(sorted(entries))[:80]}"
            )
        owner[parameter].state[parameter] = {k: v.to(parameter.device) for k, v in entries.items()}
    if moments:
        raise CheckpointError(
            f"{folder} does not fit the optimizer: {next(iter(moments))!r:.80} is of no parameter"
        )
    return read_state(folder)


def _problem(folder: Path) -> str:
    """What is wrong with a checkpoint; nothing if it verifies."""
    try:
        _verify(folder)
        read_state(folder)
    except CheckpointError as error:
        return str(error)
    return ""


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that verifies, and what was wrong with newer ones."""
    problems = []
    for folder in checkpoints(run):
        if not (problem := _problem(folder)):
            return folder, problems
        problems.append(problem)
    return None, problems


def load_strict(model: nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Load weights with nothing missing, nothing left over and every shape equal."""
    try:
        refuse_misfit(model.state_dict(), weights, origin)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    model.load_state_dict(weights)


def weights_hash(model: nn.Module) -> str:
    """Hash of all weights and buffers, independent of device and file format."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


# Arguments of a builder that are models themselves: the towers of a pair, what is under a classifier's head.
PARTS = {"VideoText": ("video", "text"), "Classifier": ("backbone",)}


def describe(model: nn.Module) -> dict:
    """What `build` makes the same architecture of: the name of a class and its arguments."""
    name = type(model).__name__
    assert name in BUILDERS, name
    parts = {part: describe(getattr(model, part)) for part in PARTS.get(name, ())}
    return {"builder": name, "arguments": model.arguments | parts}


def check_description(description: object, where: str, nested: bool = False) -> None:
    """Refuse what `describe` cannot have written.

    Args:
        description: as read from a file, which may be anybody's.
        where: the file, for the message.
        nested: a part of another one, which has no parts itself.

    Raises:
        ValueError: it names no builder, or arguments that are not its own, or beyond all bounds.
    """
    name = description.get("builder") if isinstance(description, dict) else None
    if not isinstance(name, str) or name not in BUILDERS or (nested and name in PARTS):
        raise ValueError(f"{where} names no builder of ours but {name!r:.80}")
    parts, arguments = PARTS.get(name, ()), description.get("arguments")
    check_arguments(BUILDERS[name], arguments, where, parts)
    for part in parts:
        check_description(arguments.get(part), f"{where}: {part}", nested=True)


def build(description: dict) -> nn.Module:
    """The architecture that `describe` described, with fresh weights.

    What comes from a file passes `check_description` first.
    """
    name, arguments = description["builder"], description["arguments"]
    parts = {part: build(arguments[part]) for part in PARTS.get(name, ())}
    return BUILDERS[name](**arguments | parts)


def export_backbone(model: nn.Module, folder: Path, provenance: dict) -> None:
    """Write a backbone folder: model.safetensors, config.json and their manifest.

    Args:
        model: an encoder of the contract, or a `VideoText` pair.
        folder: where to; an older export there is replaced as a whole.
        provenance: where the weights come from, JSON-able, for the cards of later measurements.
    """
    config = {
        **describe(model),
        "provenance": provenance,
        "weights_sha256": weights_hash(model),
    }
    aside = folder.with_name(f"tmp-{folder.name}")
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with writing(folder):
        remove(aside)
        folder.parent.mkdir(parents=True, exist_ok=True)
    _write_folder(aside, {"model": weights}, {"config": config})
    with writing(folder):
        remove(folder)
        os.replace(aside, folder)
        sync(folder.parent)


def _hint(folder: Path, config: dict) -> str:
    """What to do with a folder whose config.json names no builder that is known."""
    if is_folder(folder / "backbone"):
        return f"did you mean {folder / 'backbone'}?"
    if isinstance(config.get("builder"), str) and "weights_sha256" in config:
        return (
            f"{config['builder']!r:.100} may be a model family: `downstream.models.load_backbone` knows those, and here "
            "only plain video transformers and image towers can be used"
        )
    if config.get("model_type") == "videomae":
        return f"write hf:{folder}, since it is a Hugging Face VideoMAE folder"
    return "give a folder that a recipe exported (RUN/backbone)"


def read_backbone_config(folder: Path) -> dict:
    """The config.json of an exported backbone.

    Raises:
        ValueError: the folder is no exported backbone, or is damaged.
    """
    if not (folder / "config.json").exists():
        inside = [p for p in (folder / "backbone", folder.parent / "backbone") if p.exists()]
        hint = f"did you mean {inside[0]}?" if inside else "a run exports one as RUN/backbone"
        raise ValueError(f"{folder} holds no config.json, so it is not a backbone: {hint}")
    config = read_json(folder / "config.json")
    if not isinstance(config.get("builder"), str) or config["builder"] not in BUILDERS:
        raise ValueError(f"{folder}/config.json names no builder of ours; {_hint(folder, config)}")
    _verify(folder)
    check_description(config, f"{folder}/config.json")
    if not isinstance(config.get("provenance"), dict):
        raise ValueError(f"{folder}/config.json does not say where its weights come from")
    return config


def provenance_of(name: str) -> dict | str:
    """Where the weights of `--backbone` come from: what an exported folder says of them, or else the name itself."""
    return read_backbone_config(Path(name))["provenance"] if is_folder(name) else name


def _build_to_fit(make: Callable[[], nn.Module], folder: Path) -> nn.Module:
    """Build a model for the weights in `folder`, once its shapes are known to be theirs, and load them."""
    with weights_follow():
        try:
            shapes = dry_state(make)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        weights = read_safetensors(folder / "model.safetensors", shapes)
        model = make()
    load_strict(model, weights, str(folder))
    return model.eval()


def load_export(folder: Path) -> nn.Module:
    """The exported model of a folder, in evaluation mode: an encoder, a pair of towers or a classifier.

    Raises:
        ValueError: the folder is no export, or does not verify.
    """
    config = read_backbone_config(folder)
    try:
        model = _build_to_fit(lambda: build(config), folder)
    except MisfitError as error:  # although it verifies
        raise CheckpointError(
            f"{error}. It was exported by another version of this program, which understood by the same names another "
            "network: train it again, or read it with that version"
        ) from error
    if weights_hash(model) != config.get("weights_sha256"):
        raise CheckpointError(f"{folder}: the weights are not those that were exported")
    return model


def load_backbone(name: str) -> nn.Module:
    """Build the encoder that `--backbone` names, with its weights, in evaluation mode.

    Args:
        name: a folder exported by us (of a video-text pair, its video tower); `hf:` and a hub name or
            folder of a Hugging Face VideoMAE; an official VideoMAE `.pth` file, pretrained or fine-tuned; or
            `open_clip:MODEL/WEIGHTS`, whose image tower is applied to frames, see `pretrain/openclip.py`.

    Raises:
        ValueError: nothing of the kind is there, or it does not verify.
    """
    if name.startswith(OPEN_CLIP):
        return frame_tower(load_open_clip(name), FRAMES, STRIDE, "mean")
    if name.startswith("hf:") or name.endswith((".pth", ".pt")):
        from pretrain.convert import load_foreign

        return load_foreign(name)
    folder = Path(name)
    if not is_folder(name):
        raise ValueError(
            f"no backbone at {shown(name)}: give a folder exported by a recipe (RUN/backbone), "
            "hf:OWNER/NAME or hf:FOLDER, an official VideoMAE .pth file, or open_clip:MODEL/WEIGHTS; names of model families are "
            "for downstream.models.load_backbone"
        )
    model = load_export(folder)
    for part in PARTS.get(type(model).__name__, ())[
        :1
    ]:  # the video tower, or what is under the head
        return getattr(model, part)
    return model


# How an image tower that comes without a clip of its own sees videos.
FRAMES, STRIDE = 8, 8


def frame_tower(
    pair: Pair, frames: int, stride: int, pool: str, pixels: str = "tower"
) -> FrameTower:
    """The image tower of an open_clip pair for the frames of clips, in evaluation mode.

    Args:
        pair: of open_clip.
        frames: as of `FrameTower`, like `stride` and `pool`.
        stride: see there.
        pool: see there.
        pixels: "tower": normalised and scaled as the pair was trained; "imagenet": by ImageNet's mean and deviation, and
            bilinearly.
    """
    about = {k: pair.preprocess[k] for k in ("mean", "std", "interpolation")}
    if pixels == "imagenet":
        about = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bilinear"}
    tower = FrameTower(pair.vision_config, frames, stride, pool, **about)
    load_strict(tower.visual, pair.visual.state_dict(), "the image tower of open_clip")
    return tower.eval()


def load_video_text(name: str) -> VideoText:
    """Build the pair of towers that `--backbone` names, with its weights, in evaluation mode.

    Args:
        name: a folder exported by recipes/clip.py, or `open_clip:MODEL/WEIGHTS`: frame embeddings are
            averaged, the text tower and scale are its own.

    Raises:
        ValueError: nothing of the kind is there, or it has no text tower.
    """
    if name.startswith(OPEN_CLIP):
        pair = load_open_clip(name)
        if not pair.trained:
            raise ValueError(
                f"{name} names no weights: write {name}/WEIGHTS, a tag of open_clip or a file"
            )
        video = frame_tower(pair, FRAMES, STRIDE, "mean")
        text = OpenClipText(pair.text_config, pair.tokenizer)
        load_strict(text.tower, pair.text.state_dict(), name)
        loss = "infonce" if pair.bias is None else "siglip"
        model = VideoText(video, text, pair.config["embed_dim"], project=False, loss=loss)
        model.log_scale.data.copy_(pair.log_scale.reshape(()))
        if pair.bias is not None:
            model.bias.data.copy_(pair.bias.reshape(()))
        return model.eval()
    remedy = f"train one: python recipes/clip.py --backbone {name} --data VIDEOS_WITH_CAPTIONS"
    if name.startswith("hf:") or name.endswith((".pth", ".pt")):
        raise ValueError(f"{name} is a VideoMAE and has no text tower; {remedy}")
    if not is_folder(name):
        raise ValueError(
            f"no backbone at {shown(name)}: give the folder of a video-text run (RUN/backbone) or "
            "open_clip:MODEL/WEIGHTS"
        )
    if read_backbone_config(Path(name))["builder"] != "VideoText":
        raise ValueError(f"{name} has no text tower; {remedy}")
    return load_export(Path(name))


def fresh_like(encoder: nn.Module, seed: int) -> nn.Module:
    """The same architecture with newly drawn weights, in evaluation mode: the baseline every probe is shown beside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(describe(encoder)).eval()


def load_pretrained_videomae(run: Path) -> VideoMAE:
    """The whole model, encoder and decoder, of a run's newest checkpoint, in evaluation mode.

    Raises:
        CheckpointError: the run has no valid checkpoint.
    """
    folder, problems = newest_valid(run)
    if folder is None:
        raise CheckpointError(f"{run} holds no valid checkpoint. {' '.join(problems)}")
    for problem in problems:
        print(f"warning: {for_screen(problem)}; {folder} is taken", file=sys.stderr, flush=True)
    described = read_state(folder).get("model")
    if not isinstance(described, dict) or "decoder" not in described:
        raise CheckpointError(f"{run} is no VideoMAE run; its backbone is in {run}/backbone")
    where = f"{folder}/state.json"
    check_arguments(VideoTransformer, described.get("encoder"), where, ())
    check_arguments(VideoMAE, described["decoder"], where, ("encoder",))
    make = lambda: VideoMAE(VideoTransformer(**described["encoder"]), **described["decoder"])
    if "contrast" not in described:
        return _build_to_fit(make, folder)
    # The head of the contrast, on top of the VideoMAE, ends with the training.
    weights = {
        name.removeprefix("masked."): value
        for name, value in read_safetensors(folder / "model.safetensors").items()
        if name.startswith("masked.")
    }
    refuse_misfit(dry_state(make), weights, str(folder))
    model = make()
    load_strict(model, weights, str(folder))
    return model.eval()
