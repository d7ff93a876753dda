"""A backbone with a linear classifier on top, and what it says about clips, frames and files.

B clips, C channels, T frames, K classes.
"""

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from downstream.features import (
    Extraction,
    finish_means,
    num_segments,
    segment_means,
    show_views,
)
from downstream.metrics import softmax
from downstream.segments import UNLABELLED, frame_classes
from downstream.splits import Videos
from downstream.windows import window_scores
from pretrain.backbones import provenance_of
from pretrain.data.decode import DecodeError
from pretrain.data.sampling import test_boxes
from pretrain.data.shards import Pack, crop_clip
from pretrain.device import autocast_dtype
from pretrain.modes import evaluating
from pretrain.names import counted, for_screen
from pretrain.spec import Backbone, InputSpec

CHECKED = ("val_top1", "val_videos")  # of an export's provenance: accuracy, and on how many
MOST_VIEWS = 1000  # of each kind, that an export may ask for


class Classifier(nn.Module):
    """Dropout and a linear layer on a backbone's embedding, or on tokens, averaged over space.

    Args:
        backbone: a `Backbone`.
        classes: names of the K classes.
        dropout: fraction of the embedding dropped in training.
        per_frame: a label for every frame (many-to-many), from the tokens of its time.
        time_segments: of a frozen probe (recipes/fit.py): from the means over so many parts of
            time, one behind the other; 0: from the embedding. Its logits, not its probabilities,
            are averaged over the views of a clip, as its features were. None: no frozen probe.

    Raises:
        ValueError: `per_frame` and `time_segments`, or fewer than 0; `per_frame` and a backbone
            that has fewer time slots than frames or samples them uniformly; or fewer than two
            classes, or two of the same name.
    """

    parts = ("backbone",)  # arguments that are models, see `pretrain.backbones`

    def __init__(
        self, backbone: nn.Module, classes: list[str], dropout: float = 0.0,
        per_frame: bool = False, time_segments: int | None = None,
    ):  # fmt: skip
        super().__init__()
        if len(classes) < 2:
            raise ValueError(
                f"the only class is {', '.join(classes)!r}: classification needs at least two"
            )
        twice = sorted(name for name, count in Counter(classes).items() if count > 1)
        if twice:
            raise ValueError(f"two classes are called {twice[0]!r}: give each a name of its own")
        assert isinstance(backbone, Backbone)
        if per_frame:
            refuse_per_frame(backbone)
        if time_segments is not None and (per_frame or time_segments < 0):
            raise ValueError(
                f"time_segments {time_segments}: 0 or more, of a classifier of whole clips"
            )
        self.arguments: dict[str, Any] = {
            "classes": list(classes),
            "dropout": dropout,
            "per_frame": per_frame,
            **({} if time_segments is None else {"time_segments": time_segments}),
        }
        self.backbone, self.per_frame, self.time_segments = backbone, per_frame, time_segments
        self.dropout = nn.Dropout(dropout)
        parts = num_segments(backbone.grid, time_segments) if time_segments else 1
        self.head = nn.Linear(parts * backbone.embed_dim, len(classes))
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        if getattr(backbone, "zero_head", False):  # a paper's start
            nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return self.arguments["classes"]

    @property
    def input_spec(self) -> InputSpec:
        """The clip that the backbone takes."""
        return self.backbone.input_spec

    def forward(self, video: Tensor) -> Tensor:
        """Normalised clips (B, C, T, H, W) to logits (B, K), or (B, T, K) for every frame."""
        if self.per_frame:
            tokens = self.backbone.forward_features(video)
            means = tokens.unflatten(1, (-1, math.prod(self.backbone.grid[1:]))).mean(2)
            embedding = finish_means(self.backbone, means)
        elif self.time_segments:
            tokens = self.backbone.forward_features(video)
            means = segment_means(tokens, self.backbone.grid, self.time_segments)
            embedding = finish_means(self.backbone, means).flatten(1)
        else:
            embedding = self.backbone(video)
        if self.time_segments is None:
            return self.head(self.dropout(embedding))
        # The head also subtracts the mean of each feature, of which bf16 would keep 8 bits.
        with torch.autocast(embedding.device.type, enabled=False):
            return self.head(self.dropout(embedding).float())


def refuse_per_frame(backbone: nn.Module) -> None:
    """Refuse a backbone that cannot give every frame a label.

    Raises:
        ValueError: it has fewer time slots than frames, or samples them uniformly.
    """
    assert isinstance(backbone, Backbone)
    frames = backbone.input_spec.frames
    if not backbone.input_spec.stride:
        raise ValueError(
            "a label for every frame needs frames at a stride, and uniform sampling has none: "
            "give --sampling dense"
        )
    if backbone.grid[0] != frames or frames == 1:
        raise ValueError(
            f"a label for every frame needs a token for every frame, and this backbone has "
            f"{backbone.grid[0]} for {frames} frames: take rnn, lstm, gru, tcn, ed_tcn or inflated"
        )


def fitted_views(name: str) -> tuple[int, int] | None:
    """Views over time and over space of which a frozen probe was fitted, as its export says.

    None where it says nothing of the kind.

    Args:
        name: of the classifier, as the user gave it.
    """
    told = provenance_of(name)
    views = told.get("views") if isinstance(told, dict) else None
    if not isinstance(views, list) or len(views) != 2:
        return None
    good = all(type(n) is int and 1 <= n <= MOST_VIEWS for n in views)
    return (views[0], views[1]) if good else None


def at_chance(name: str, num_classes: int) -> str:
    """A sentence that warns of a classifier that has learned nothing; "" where that is not known.

    Its export says what part of how many validation videos it recognised. That is at chance unless
    it is above it by more than 1.96 standard deviations.

    Args:
        name: of the classifier, as the user gave it.
        num_classes: K.
    """
    told = provenance_of(name)
    value, videos = (told.get(k) if isinstance(told, dict) else None for k in CHECKED)
    chance = 1 / num_classes
    if not isinstance(value, float) or not isinstance(videos, int) or videos < 1:
        return ""
    if not value <= chance + 1.96 * math.sqrt(chance * (1 - chance) / videos):
        return ""
    return (
        f"this classifier recognised {value:.1%} of its {counted(videos, 'validation video')}, and "
        f"chance is {chance:.1%}: what it says may mean nothing"
    )


def class_probabilities(
    model: Classifier, pack: Pack, samples: np.ndarray, how: Extraction, title: str | None = None
) -> np.ndarray:
    """Class probabilities of clips (len(samples), K), averaged over views.

    Those of a per-frame classifier are averaged over frames too; of a frozen probe the logits are.

    Args:
        model: the classifier; weights, buffers and mode are left as they are, it is moved to the
            device.
        pack: the clips.
        samples: which of them.
        how: views, precision and where.
        title: of the progress bar; None: no bar.

    Raises:
        ValueError: a clip cannot be decoded, or a prediction is not finite.
    """
    probe = model.time_segments is not None

    def predict(video: Tensor) -> Tensor:
        if probe:
            return model(video)
        probabilities = model(video).float().softmax(-1)
        return probabilities.mean(1) if model.per_frame else probabilities

    shown = [views.mean(1) for views in show_views(model, predict, pack, samples, how, title)]
    probabilities = (
        np.concatenate(shown) if shown else np.empty((0, len(model.classes)), np.float32)
    )
    probabilities = softmax(probabilities) if probe else probabilities
    if not np.isfinite(probabilities).all():
        raise ValueError(
            "a prediction of the classifier is not finite: its weights are damaged; "
            "train or export it again"
        )
    return probabilities


@torch.inference_mode()
def frame_probabilities(
    model: Classifier, pack: Pack, record: dict, device: torch.device, precision: str = "auto"
) -> np.ndarray:
    """Class probabilities of a per-frame classifier for every frame of a packed clip (frames, K).

    Windows of the backbone's clip slide over the frames by half their length, and where they
    overlap they are averaged; a frame that the stride leaves out has the prediction of the last one
    before it.

    Args:
        model: the classifier, on `device`.
        pack: where the clip is.
        record: its index entry.
        device: where to compute.
        precision: "auto", "bf16" or "fp32".

    Raises:
        ValueError: the clip cannot be decoded.
    """
    spec = model.input_spec
    try:
        parts = pack.clip(record, np.arange(record["frames"]), spec)
    except DecodeError as error:
        raise ValueError(f"{for_screen(record['source'])} cannot be decoded: {error}") from error
    box = test_boxes(record["width"], record["height"], 1)[0]
    clip = crop_clip(parts, record, box, spec)
    dtype = autocast_dtype(device, precision)
    model.to(device)
    with evaluating(model), torch.autocast(device.type, dtype, enabled=dtype is not None):
        predict = lambda window: (
            model(spec.normalise(spec.take(window, device))).float().softmax(-1)
        )
        hop = max(spec.frames * spec.stride // 2, 1)
        windows = window_scores([clip], spec.frames, spec.stride, hop, 1, predict)
        return np.concatenate(list(windows))


def score(
    model: Classifier, pack: Pack, videos: Videos, how: Extraction, title: str | None = None
) -> np.ndarray:
    """Class probabilities (N, K) of videos, averaged over views and over the clips of a video."""
    return videos.average(class_probabilities(model, pack, videos.samples, how, title))


def score_frames(
    model: Classifier, pack: Pack, videos: Videos, where: torch.device, precision: str
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list]:
    """True and predicted class of every frame, `UNLABELLED` in both where no label is.

    Returns:
        (truth, predicted) of each video with a labelled frame, its clips in order of time, and
        whose video each labelled frame is of.
    """
    numbers = {name: i for i, name in enumerate(model.classes)}
    parts: dict[int, list] = {}
    for sample, owner in zip(videos.samples, videos.owner, strict=True):
        record = pack.record(sample)
        truth = frame_classes(record, numbers)
        known = truth != UNLABELLED
        if known.any():
            predicted = frame_probabilities(model, pack, record, where, precision).argmax(1)
            part = (record["start"], truth, np.where(known, predicted, UNLABELLED))
            parts.setdefault(owner, []).append(part)
    sequences, subjects = [], []
    for owner, clips in parts.items():
        clips.sort(key=lambda part: part[0])
        truth, predicted = (np.concatenate([clip[i] for clip in clips]) for i in (1, 2))
        sequences.append((truth, predicted))
        whose = videos.subjects[owner] or videos.sources[owner]
        subjects += [whose] * int((truth != UNLABELLED).sum())
    return sequences, subjects
