"""Models for other programs: ONNX and torch.export, with the clip that they take written inside.

The exported graph takes the clips as they are decoded, uint8, and normalises them itself, so that
nobody can give it other statistics. B clips, K classes, D width of the embedding.
"""

import contextlib
import json
import logging
import math
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from downstream.classifier import Classifier
from downstream.features import num_segments
from pretrain.clip import VideoText, video_encoder
from pretrain.names import first_line, for_screen
from pretrain.spec import AnyFrames, Backbone, InputSpec, Joints, Rebuildable
from pretrain.weights import weights_hash

FORMAT = "muybridge export 1"
KEY = "muybridge"  # under which it stands in the metadata of an ONNX model
CONTRACT = "contract.json"
# What fps (of the sources that were learned from) and frame_step (seconds between frames of a clip,
# there) mean, by whether there is a stride; null where it is not known.
RATES = (
    "any: the frames of a clip are spread over the whole source",
    "stride counts frames of the source; of one of another rate than fps take frames that are "
    "frame_step seconds apart",
)
TOLERANCE = 1e-4  # largest absolute difference from the model's own outputs
TIED = 1e-5  # scores so close to one another have no order
INLINE_BYTES = 1_800_000_000  # weights above it lie beside an ONNX model, which ends at 2 GB


class Whole(nn.Module):
    """A model behind its own normalisation: clips as decoded, a tensor a stream, to its output.

    Args:
        model: a `Backbone`, a `Classifier`, or a pair, whose clips are embedded beside its texts.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.spec = model, spec_of(model)

    def forward(self, *streams: Tensor) -> Tensor:
        """Streams in the order of the spec: pictures uint8 (B, C, T, H, W), joints float32."""
        clip = self.spec.normalise(dict(zip(self.spec.streams, streams, strict=True)))
        if isinstance(self.model, VideoText):
            assert isinstance(clip, Tensor)
            return self.model.encode_video(clip)
        return self.model(clip)


def spec_of(model: nn.Module) -> InputSpec:
    """The clip that a model takes; of a pair of towers, its video tower."""
    spec = video_encoder(model).input_spec
    assert isinstance(spec, InputSpec)
    return spec


def lengths_of(model: nn.Module) -> AnyFrames:
    """The lengths of a clip that an export of the model takes, as its backbone's family says.

    Args:
        model: as `Whole` takes it.

    Returns:
        the least number of frames and what it is a multiple of; or why it is fixed.
    """
    backbone = getattr(model, "backbone", video_encoder(model))
    assert isinstance(backbone, Backbone)
    told = getattr(backbone, "any_frames", "its family does not say that it takes others")
    if isinstance(told, str):
        return told
    (least, multiple), frames = told, backbone.input_spec.frames
    if wanted := getattr(model, "time_segments", None):
        if num_segments(backbone.grid, wanted) != wanted:
            return f"its classifier is of fewer than {wanted} parts of time"
        multiple = math.lcm(multiple, frames // backbone.grid[0] * wanted)
    least = -(-least // multiple) * multiple
    if frames < least or frames % multiple:
        return (
            f"{type(backbone).__name__} takes others from {least} frames on, in multiples of "
            f"{multiple}, and its clip has {frames}"
        )
    return least, multiple


def at_length(model: nn.Module, frames: int) -> nn.Module:
    """The same model with the same weights, built for clips of another number of frames.

    Args:
        model: as `Whole` takes it, of a family whose `any_frames` allows it.
        frames: of a clip.

    Raises:
        ValueError: the family refuses so many.
    """
    if isinstance(model, VideoText | Classifier):
        part = "video" if isinstance(model, VideoText) else "backbone"
        inner = at_length(model.get_submodule(part), frames)
        if isinstance(model, VideoText):
            other: nn.Module = VideoText(inner, model.text, **model.arguments)
        else:
            other = Classifier(inner, **model.arguments)
        state = {f"{part}.{name}": value for name, value in inner.state_dict().items()}
        other.load_state_dict(model.state_dict() | state)
    elif resized := getattr(model, "resized", None):
        other = resized(frames, 0)
    else:
        assert isinstance(model, Rebuildable)
        other = type(model)(**{**model.arguments, "frames": frames})
        other.load_state_dict(model.state_dict())
    return other.eval()


def contract_of(model: nn.Module, rate: float | None, lengths: AnyFrames) -> dict[str, Any]:
    """What a program has to know to give the model a clip and to read what comes out.

    Args:
        model: as `Whole` takes it.
        rate: frames a second of the clips that it was trained on; None: not known.
        lengths: of a clip that the export takes, see `lengths_of`.
    """
    spec, classes = spec_of(model), getattr(model, "classes", None)
    fixed = isinstance(lengths, str)
    least, multiple = (spec.frames, 1) if isinstance(lengths, str) else lengths
    times: int | str = spec.frames if fixed else "frames"
    streams = {}
    for name, stream in spec.streams.items():
        joints = isinstance(stream, Joints)
        streams[name] = {
            "dtype": "float32" if joints else "uint8",
            "axes": "B K T P J" if joints else "B C T H W",
            "shape": ["batch", stream.channels, times, *stream.shape(spec.frames, spec.size)[2:]],
            **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(stream).items()},
        }
    per_frame = bool(getattr(model, "per_frame", False))
    if isinstance(model, Classifier):
        shape: list[int | str] = ["batch", *([times] if per_frame else []), len(model.classes)]
    else:
        width = model.arguments["dim"] if isinstance(model, VideoText) else model.embed_dim
        assert isinstance(width, int)
        shape = ["batch", width]
    return {
        "format": FORMAT,
        "model": type(getattr(model, "backbone", video_encoder(model))).__name__,
        "frames": spec.frames,
        "frames_are": f"fixed: {lengths}" if fixed else "free: frames is what it was trained on",
        "frames_min": least,
        "frames_max": spec.frames if fixed else None,
        "frames_multiple_of": multiple,
        "stride": spec.stride,
        "fps": rate,
        "frame_step": spec.stride / rate if rate and spec.stride else None,
        "rate": RATES[bool(spec.stride)],
        "sampling": spec.pace,
        "size": spec.size,
        "crop": "shorter side scaled to size with anti-aliasing, then the middle square",
        "streams": streams,
        "normalisation": "inside the model: give the values as they are decoded",
        "output": {"name": "logits" if classes else "embedding", "shape": shape},
        "classes": classes,
        "per_frame": per_frame,
        "weights_sha256": weights_hash(model),
        "version": version("muybridge"),
        "torch": torch.__version__,
    }  # fmt: skip


def refuse_non_finite(model: nn.Module) -> None:
    """Raise ValueError if a weight is not finite: no comparison could see the difference."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(
                f"the weight {for_screen(name)} is not finite: the training went wrong, and there "
                "is nothing to export"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters tell their developers."""
    loud = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loud]
    try:
        for logger in loud:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)


def reason_of(error: BaseException) -> str:
    """The first line of what is behind an error: the exporters wrap it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return for_screen(first_line(error), 300)


@contextlib.contextmanager
def _recurrent() -> Iterator[None]:
    """LSTM and GRU as loops over any number of frames, where this torch has them so."""
    try:
        from torch.export import _patches

        loops = [
            _patches.register_lstm_while_loop_decomposition,
            _patches.register_gru_while_loop_decomposition,
        ]
    except (ImportError, AttributeError):
        loops = []
    with contextlib.ExitStack() as stack:
        for loop in loops:
            stack.enter_context(loop())
        yield


def program_of(model: nn.Module, lengths: AnyFrames) -> torch.export.ExportedProgram:
    """The model as `Whole` has it, in torch.export's form, for any number of clips.

    Args:
        model: on the CPU, float32, in evaluation mode.
        lengths: of a clip that it shall take, see `lengths_of`.

    Raises:
        ValueError: torch.export cannot follow it.
    """
    whole = Whole(model).eval()
    kinds = [
        torch.float32 if isinstance(s, Joints) else torch.uint8 for s in whole.spec.streams.values()
    ]
    shapes = [s.shape(whole.spec.frames, whole.spec.size) for s in whole.spec.streams.values()]
    # Two clips: one alone would be taken for a constant.
    like = tuple(torch.zeros(2, *s, dtype=k) for s, k in zip(shapes, kinds, strict=True))
    axes = {0: torch.export.Dim("batch")}
    loops: contextlib.AbstractContextManager = contextlib.nullcontext()
    if not isinstance(lengths, str):
        least, multiple = lengths
        times = torch.export.Dim("times", min=least // multiple)
        axes[2] = times if multiple == 1 else multiple * times
        loops = _recurrent()
    try:
        with _quiet(), torch.no_grad(), loops:
            return torch.export.export(
                whole, like, dynamic_shapes=(tuple(axes for _ in like),), strict=False
            )
    except Exception as error:  # of torch's tracing, of many kinds
        raise ValueError(f"torch.export cannot follow this model: {reason_of(error)}") from error


Runner = Callable[[Sequence[np.ndarray]], np.ndarray]


def write_torch(program: torch.export.ExportedProgram, path: Path, contract: dict) -> Runner:
    """Write model.pt2, with the contract among its extra files, and return what runs the program.

    A .pt2 of anybody may hold pickles, which `torch.export.load` runs: it is for files that you
    trust. Ours ask for none, and none is loaded here: the program at hand is what is compared.
    """
    program.example_inputs = None  # else torch would keep them, pickled
    with _quiet():
        torch.export.save(program, path, extra_files={CONTRACT: json.dumps(contract)})
    refuse_pickles(path)
    module = program.module()

    def run(streams: Sequence[np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return module(*map(torch.from_numpy, streams)).numpy()

    return run


def refuse_pickles(path: Path) -> None:
    """Raise ValueError if a .pt2 that we wrote asks for a pickle to be loaded."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if (
                name.endswith("_config.json")
                and '"use_pickle": true' in archive.read(name).decode()
            ):
                raise ValueError(f"torch.export wrote a pickle ({name}): take --to onnx or --to hf")


def refuse_missing_libraries() -> None:
    """Raise ValueError where what `write_onnx` needs is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--to onnx needs onnx, onnxscript and onnxruntime ({first_line(error)}): "
            "pip install 'muybridge[export]'"
        ) from error


def write_onnx(program: torch.export.ExportedProgram, path: Path, contract: dict) -> Runner:
    """Write model.onnx, with the contract in its metadata, and return what runs it on the CPU.

    Raises:
        ValueError: the model has what ONNX or its runtime has not.
    """
    import onnxruntime

    streams = list(contract["streams"])
    size = sum(v.numel() * v.element_size() for v in program.state_dict.values())
    free = contract["frames_max"] is None
    axes = {0: "batch", 2: "frames"} if free else {0: "batch"}
    silent = onnxruntime.SessionOptions()
    silent.log_severity_level = 4  # what fails is raised
    try:
        with _quiet(), _recurrent() if free else contextlib.nullcontext():
            made = torch.onnx.export(
                program, dynamo=True, input_names=streams, verbose=False,
                output_names=[contract["output"]["name"]],
                dynamic_shapes=(tuple(axes for _ in streams),),
            )  # fmt: skip
            assert made is not None
            made.model.metadata_props[KEY] = json.dumps(contract)
            made.save(path, external_data=size > INLINE_BYTES)
            session = onnxruntime.InferenceSession(path, silent, providers=["CPUExecutionProvider"])
    except Exception as error:  # of three libraries, of many kinds
        raise ValueError(f"ONNX has no form for this model: {reason_of(error)}") from error
    return lambda clips: session.run(None, dict(zip(streams, clips, strict=True)))[0]


# ------------------------------------------------------------------------------------------- check


def _best_alike(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Of rows of scores, whether both have the same best; scores that are tied have no order."""
    rows, chosen = np.arange(len(want)), got.argmax(1)
    return want.max(1) - want[rows, chosen] <= TIED


def _likeness(embeddings: np.ndarray) -> np.ndarray:
    """Cosine of every clip with every other (N, N); its own is none."""
    x = embeddings.astype(np.float64)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    found = x @ x.T
    np.fill_diagonal(found, -np.inf)
    return found


def compared(want: np.ndarray, got: np.ndarray, classes: bool) -> dict[str, Any]:
    """How far outputs of an export are from the model's.

    Args:
        want: (N, ..., K) logits or (N, D) embeddings of the model.
        got: of the export.
        classes: whether these are logits, of which the best class counts; of embeddings the
            nearest of the other clips does.

    Raises:
        ValueError: they differ by more than `TOLERANCE`, are not finite, or have another best.
    """
    if want.shape != got.shape or not np.isfinite(want).all() or not np.isfinite(got).all():
        raise ValueError(
            f"outputs are of the shape {got.shape} where the model has {want.shape}, or not finite"
        )
    difference = float(np.abs(want - got).max())
    if classes:
        same = _best_alike(*(x.reshape(-1, x.shape[-1]) for x in (want, got)))
    elif len(want) > 2:
        same = _best_alike(_likeness(want), _likeness(got))
    else:
        same = np.ones(len(want), bool)  # of two clips each is the other's nearest
    what = "best class" if classes else "nearest clip"
    if difference > TOLERANCE or not same.all():
        raise ValueError(
            f"the export differs from the model by {difference:.1e} at most, where {TOLERANCE:.0e} "
            f"is allowed, and has the same {what} in {same.sum()} of {len(same)}"
        )
    return {
        "clips": len(want),
        "max_abs_difference": difference,
        "largest_output": float(np.abs(want).max()),
        "same": what,
        "same_top1": float(same.mean()),
    }
