"""Features of a frozen backbone: embeddings, cached, and tokens.

B clips of a batch, V views of each (temporal x spatial), N tokens, S time segments, D width.
"""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor, nn

from downstream.controls import controlled
from pretrain.clip import VideoText, video_encoder
from pretrain.data.progress import Bar
from pretrain.data.shards import EvalClips, Pack, eval_loader
from pretrain.device import autocast_dtype
from pretrain.files import cache_folder, replacing, share
from pretrain.modes import evaluating
from pretrain.processes import loader_workers, start_evaluation, sum_of_shares
from pretrain.settings import Machine
from pretrain.spec import Backbone, InputSpec
from pretrain.weights import read_safetensors, weights_hash

CODE_VERSION = 6  # raise it whenever embeddings would be others, or are kept in another form


@dataclass(frozen=True)
class Extraction:
    """How clips are shown to a backbone.

    Attributes:
        num_clips: temporal views of a clip.
        num_crops: spatial views of each.
        time_segments: parts of a view's time whose tokens are averaged apart, see `segment_means`;
            1: the mean token; 0: the backbone's own embedding (an LSTM's last state, a maximum over
            frames).
        batch_size: views in one forward pass.
        num_workers: decoding processes.
        device: where the backbone runs.
        precision: "auto", "bf16" or "fp32", see `pretrain.device.autocast_dtype`.
        control: what is done to a clip first, a name in `downstream.controls.CONTROLS`; "":
            nothing.
    """

    num_clips: int = 1
    num_crops: int = 1
    time_segments: int = 4
    batch_size: int = 64
    num_workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "auto"
    control: str = ""

    def __post_init__(self):
        for name, least in {
            "num_clips": 1,
            "num_crops": 1,
            "time_segments": 0,
            "batch_size": 1,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")

    @property
    def num_views(self) -> int:
        """Views of one clip."""
        return self.num_clips * self.num_crops

    @property
    def dtype_name(self) -> str:
        """Precision of the forward pass: "bfloat16" or "float32"."""
        dtype = autocast_dtype(self.device, self.precision) or torch.float32
        return str(dtype).removeprefix("torch.")


def start_extraction(
    machine: Machine, num_clips: int, num_crops: int, batch_size: int, time_segments: int = 1
) -> Extraction:
    """How a recipe of one process shows clips, with the device and workers of its machine.

    Raises:
        ValueError: a launcher started several processes, or a number is too small.
    """
    device, workers = start_evaluation(machine), loader_workers(machine, 1)
    return Extraction(
        num_clips, num_crops, time_segments, batch_size, workers, device, machine.precision
    )


MOST_VIEWS = 4  # spread over time, unless more are asked for
WIDE = 1.15  # long side by short side from which one crop loses much


def covering_views(pack: Pack, samples: np.ndarray, spec: InputSpec) -> tuple[int, int, str]:
    """How many views show whole clips: over time, over the longer side; and why.

    Twice as many as fit behind one another, so that what one cuts in two another has whole; one
    where a view spans the clip. Three along the longer side of a picture that is not square.

    Args:
        pack: the data.
        samples: that are to be shown.
        spec: the clip that the backbone takes.
    """
    frames, width, height = (pack.column(n)[samples] for n in ("frames", "width", "height"))
    length, spanned = float(np.median(frames)), spec.frames * max(spec.stride, 1)
    if not spec.stride:
        clips, why = 2, "frames are spread over the whole clip"
    elif spanned >= 0.95 * length:
        clips, why = 1, "a view spans a clip"
    else:
        clips = min(math.ceil(2 * length / spanned), MOST_VIEWS)
        why = f"a view spans {spanned} frames and half of the clips have {length:.0f} or more"
    long, short = np.maximum(width, height), np.maximum(np.minimum(width, height), 1)
    ratio = float(np.median(long / short))
    if not spec.pictures or ratio < WIDE:
        return clips, 1, f"{why}; a crop shows nearly all of a picture"
    return clips, 3, f"{why}; pictures are {ratio:.2f} times as long as wide"


def choose_views(
    pack: Pack, samples: np.ndarray, spec: InputSpec, num_clips: int | None, num_crops: int | None
) -> tuple[int, int, str]:
    """Views over time and over the longer side: as typed, else `covering_views`; and in words.

    Args:
        pack: the data.
        samples: that are to be shown.
        spec: the clip that the backbone takes.
        num_clips: as typed.
        num_crops: likewise.
    """
    clips, crops, why = covering_views(pack, samples, spec)
    why = f" ({why})" * (not (num_clips or num_crops))
    clips, crops = num_clips or clips, num_crops or crops
    words = f"views of a clip: {clips} over time, {crops} over the longer side{why}"
    return clips, crops, words


def num_segments(grid: tuple[int, int, int], wanted: int) -> int:
    """The number of equal parts of a token grid's time, at most `wanted`: 4 of 8 slots, 3 of 6."""
    wanted = max(wanted, 1)
    return max(n for n in range(1, min(wanted, grid[0]) + 1) if grid[0] % n == 0)


def segment_means(tokens: Tensor, grid: tuple[int, int, int], wanted: int) -> Tensor:
    """Average tokens (B, N, D) over space and over equal parts of time: (B, S, D).

    The mean over all tokens forgets what came first, so that of two actions that hold the same
    frames in another order it keeps only what the encoder wrote into single tokens; a few parts in
    a row keep the order, and their mean is the mean token.

    Args:
        tokens: in the order of `grid`.
        grid: (t, h, w).
        wanted: parts; fewer where time has no such number of equal ones, see `num_segments`.
    """
    return tokens.unflatten(1, (num_segments(grid, wanted), -1)).mean(2)


def finish_means(encoder: nn.Module, means: Tensor) -> Tensor:
    """Mean tokens (..., D) after the encoder's norm, where the norm follows the mean.

    So it does in a fine-tuned VideoMAE (pool "fc_norm"), whose tokens have no norm.
    """
    norm = encoder.get_submodule("norm") if getattr(encoder, "fc_norm", False) else None
    return means if norm is None else norm(means)


def show_views(
    encoder: nn.Module,
    function: Callable[[Any], Tensor],
    pack: Pack,
    samples: np.ndarray,
    how: Extraction,
    title: str | None,
) -> Iterator[np.ndarray]:
    """Yield `function` of all views of each clip, float32 (B, V, ...), in order of `samples`.

    Raises:
        ValueError: the clips lack a stream that the encoder takes, or one cannot be decoded.
    """
    dataset = EvalClips(pack, samples, spec_of(encoder), how.num_clips, how.num_crops)
    yield from show(encoder, function, dataset, how, title)


def spec_of(encoder: nn.Module) -> InputSpec:
    """The clip that an encoder takes; a pair of towers sees what its video tower sees."""
    spec = video_encoder(encoder).input_spec
    assert isinstance(spec, InputSpec)
    return spec


def show(
    encoder: nn.Module,
    function: Callable[[Any], Tensor],
    dataset: EvalClips,
    how: Extraction,
    title: str | None,
) -> Iterator[np.ndarray]:
    """`show_views` of a dataset that has chosen the views of its clips."""
    spec, dtype = dataset.spec, autocast_dtype(how.device, how.precision)
    loader = eval_loader(dataset, max(1, how.batch_size // how.num_views), how.num_workers)
    encoder.to(how.device)
    try:
        with (
            evaluating(encoder),  # BatchNorm statistics stay as they are
            torch.inference_mode(),
            torch.autocast(how.device.type, dtype, enabled=dtype is not None),
            Bar(len(dataset), title or "", "clip", title is not None) as bar,
        ):
            for ids, views in loader:
                if how.control:
                    views = controlled(views, how.control, ids.tolist(), how.num_crops)
                flat = {name: part.flatten(0, 1) for name, part in views.items()}
                parts = []
                for start in range(0, len(ids) * how.num_views, how.batch_size):
                    some = {n: part[start : start + how.batch_size] for n, part in flat.items()}
                    clips = spec.normalise(spec.take(some, how.device))
                    parts.append(function(clips).float().cpu())
                yield torch.cat(parts).unflatten(0, (len(ids), how.num_views)).numpy()
                bar.update(len(ids))
    except ValueError as error:
        # A loader process wraps the sentence meant for the user in its own traceback.
        if "in DataLoader worker process" not in str(error):
            raise
        raise ValueError(
            str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        ) from error


def extract(
    encoder: nn.Module, pack: Pack, samples: np.ndarray, how: Extraction, title: str | None = None
) -> np.ndarray:
    """Embed clips: `segment_means` of the last tokens, averaged over the views.

    The encoder's weights, buffers and training mode are left as they are; it is moved to the
    device.

    Args:
        encoder: a `Backbone`.
        pack: the clips.
        samples: (K,) which of them.
        how: views, time segments, precision and where.
        title: of the progress bar; None: no bar.

    Returns:
        (K, S, D) float32.

    Raises:
        ValueError: a clip cannot be decoded, or an embedding is not finite.
    """
    assert isinstance(encoder, Backbone)

    def embed(video: Tensor) -> Tensor:
        if not how.time_segments:
            return encoder(video).unsqueeze(1)
        means = segment_means(encoder.forward_features(video), encoder.grid, how.time_segments)
        return finish_means(encoder, means)

    shape = (0, num_segments(encoder.grid, how.time_segments), encoder.embed_dim)
    batches = [views.mean(1) for views in show_views(encoder, embed, pack, samples, how, title)]
    features = np.concatenate(batches) if batches else np.empty(shape, np.float32)
    _refuse_non_finite(features, pack, samples)
    return features


def cached_features(
    encoder: nn.Module, pack: Pack, samples: np.ndarray, how: Extraction, title: str | None = None
) -> np.ndarray:
    """`extract`, or what it returned last time for the same weights, clips, views and precision.

    Files lie in `features/` of the cache folder and carry a hash of their content; one that does
    not match is computed again, and that is said. Arguments and errors as of `extract`.
    """
    assert isinstance(encoder, Backbone)
    segments = num_segments(encoder.grid, how.time_segments)
    return _cached(
        encoder,
        pack,
        samples,
        how,
        {"time_segments": segments if how.time_segments else 0},
        (len(samples), segments, encoder.embed_dim),
        lambda: extract(encoder, pack, samples, how, title),
    )


def cached_embeddings(
    model: VideoText, pack: Pack, samples: np.ndarray, how: Extraction, title: str | None = None
) -> np.ndarray:
    """Place clips in the joint space of a pair of towers: the mean over the views of unit vectors.

    Kept and read again as by `cached_features`; `time_segments` does not matter here.

    Args:
        model: the pair.
        pack: the clips.
        samples: (K,) which of them.
        how: views, precision and where.
        title: of the progress bar; None: no bar.

    Returns:
        (K, D) float32, not normalised.

    Raises:
        ValueError: a clip cannot be decoded, or an embedding is not finite.
    """
    shape = (len(samples), model.arguments["dim"])
    compute = lambda: embed_now(model, pack, samples, how, title)
    return _cached(model, pack, samples, how, {"kind": "video-text"}, shape, compute)


def embed_now(
    model: VideoText, pack: Pack, samples: np.ndarray, how: Extraction, title: str | None = None
) -> np.ndarray:
    """`cached_embeddings` without the cache."""
    shown = show_views(model, model.encode_video, pack, samples, how, title)
    embeddings = np.concatenate([views.mean(1) for views in shown])
    _refuse_non_finite(embeddings, pack, samples)
    return embeddings


def rows_by_all(
    accelerator: Accelerator, count: int, width: int, embed: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Embeddings (count, width) float32 of items, of which every process makes a share.

    Args:
        accelerator: the processes; all have to take part and get all rows.
        count: the number of items.
        width: that of an embedding.
        embed: takes the numbers of a batch of items.

    Raises:
        ValueError: `embed` raised it in some process, see `sum_of_shares`.
    """

    def work(batches: list[np.ndarray]) -> np.ndarray:
        rows = np.zeros((count, width), np.float32)
        for batch in batches:
            rows[batch] = embed(batch)
        return rows

    return sum_of_shares(accelerator, count, work)


def _refuse_non_finite(features: np.ndarray, pack: Pack, samples: np.ndarray) -> None:
    finite = np.isfinite(features.reshape(len(features), -1)).all(1)
    if not finite.all():
        raise ValueError(
            f"the embedding of clip {pack.record(samples[~finite][0])['key']} is not finite: the "
            "backbone's weights are damaged, or its values overflow in this precision (try "
            "--precision fp32)"
        )


def _cached(
    model: nn.Module,
    pack: Pack,
    samples: np.ndarray,
    how: Extraction,
    more: dict,
    shape: tuple[int, ...],
    compute: Callable[[], np.ndarray],
) -> np.ndarray:
    """The result of `compute`, cached by model, clips and views."""
    # The weights alone do not fix the numbers: stride and normalisation are no weights.
    video = video_encoder(model)
    spec = video.input_spec
    assert isinstance(spec, InputSpec)
    identity = {
        "version": CODE_VERSION,
        "weights": weights_hash(model),
        "arguments": video.arguments,
        "spec": repr(spec),
        "clips": _clips_digest(pack, samples, spec),
        "views": [how.num_clips, how.num_crops],
        "precision": how.dtype_name,
        **({"control": how.control} if how.control else {}),
        **more,
    }
    return keep_computed(identity, shape, compute)


def _clips_digest(pack: Pack, samples: np.ndarray, spec: InputSpec) -> str:
    """A hash of what a backbone is shown, whatever the labels are: these change while labelling."""
    state = hashlib.sha256()
    for record in map(pack.record, samples):
        parts = [record["sha256"]] + [
            record["streams"][name]["sha256"] for name in spec.streams if name in
            record.get("streams", {})
        ]  # fmt: skip
        # Joints are scaled and cut by the size of the picture that they are of.
        parts += [record[name] for name in ("frames", "width", "height")]
        state.update(json.dumps(parts).encode())
    return state.hexdigest()


def keep_computed(
    identity: dict, shape: tuple[int, ...], compute: Callable[[], np.ndarray]
) -> np.ndarray:
    """What `compute` returns, or returned last time for the same identity.

    Args:
        identity: JSON-able: all that decides the result.
        shape: of the result, float32.
        compute: makes it.
    """
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "features" / f"{key}.safetensors"
    if path.exists():
        try:
            return _read_features(path, shape)
        except ValueError as error:
            print(f"cached features {path} are damaged ({error}): computing them again", flush=True)
    features = np.ascontiguousarray(compute())  # or it would be written in another order
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as aside:
            save_file({"features": features, "sha256": _digest(features)}, aside)
            share(aside)
    except (SafetensorError, OSError) as error:  # a full disk costs time next time, nothing else
        print(
            f"features could not be kept in {path.parent} ({error}): going on without", flush=True
        )
    return features


def _read_features(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    meta = {"features": torch.empty(shape, device="meta")}
    meta["sha256"] = torch.empty(32, dtype=torch.uint8, device="meta")
    read = {name: tensor.numpy() for name, tensor in read_safetensors(path, meta).items()}
    if _digest(read["features"]).tobytes() != read["sha256"].tobytes():
        raise ValueError("the content is not what was written")
    return read["features"]


def _digest(features: np.ndarray) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(features.tobytes()).digest(), np.uint8)


def token_bytes(encoder: nn.Module, num_clips: int, how: Extraction) -> int:
    """Disk that `extract_tokens` takes for so many clips."""
    assert isinstance(encoder, Backbone)
    return 2 * num_clips * how.num_views * int(np.prod(encoder.grid)) * encoder.embed_dim


def extract_tokens(
    encoder: nn.Module, pack: Pack, samples: np.ndarray, how: Extraction, title: str | None = None
) -> np.ndarray:
    """The last tokens of all views of clips, float16 (K, V, N, D), on disk.

    They lie in an unnamed file in the cache folder that goes when the array does, however the
    process ends. Arguments as of `extract`.

    Raises:
        ValueError: the disk has not enough room for them, a token does not fit float16, or a clip
            cannot be decoded.
    """
    assert isinstance(encoder, Backbone)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = token_bytes(encoder, len(samples), how), shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        raise ValueError(
            f"the tokens of {len(samples)} clips take {needed:,} bytes and {folder} has {free:,} "
            "free: make room, set MUYBRIDGE_CACHE to another disk, or give --attentive off"
        )
    shape = (len(samples), how.num_views, int(np.prod(encoder.grid)), encoder.embed_dim)
    # Written as a stream, mapped afterwards: a full disk is then an OSError and not a SIGBUS.
    with tempfile.TemporaryFile(dir=folder) as file:
        for tokens in show_views(encoder, encoder.forward_features, pack, samples, how, title):
            if not (np.abs(tokens) < np.finfo(np.float16).max).all():
                raise ValueError(
                    "a token is not finite or does not fit float16: the backbone's weights are "
                    "damaged, or it ends without a normalisation; give --attentive off"
                )
            try:
                file.write(tokens.astype(np.float16).tobytes())
            except OSError as error:
                raise ValueError(f"the tokens could not be written to {folder}: {error}") from error
        file.flush()
        return np.memmap(file, dtype=np.float16, mode="r", shape=shape)
