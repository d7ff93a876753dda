"""Zero-shot classification: class names in sentences -> unit vectors -> the nearest one wins.

Radford et al. 2021, https://arxiv.org/abs/2103.00020. N videos, C classes, M templates, D width.
"""

import re
import sys

import numpy as np
import torch

from pretrain.clip import VideoText
from pretrain.data.shards import Pack
from pretrain.device import autocast_dtype
from pretrain.modes import evaluating
from pretrain.names import first_of
from pretrain.text import trim, unseen_words

BATCH = 256  # sentences in one forward pass
# How the embeddings of views become one, for a card.
POOLING = "mean of the views' unit vectors, over the clips of a video, then normalised"


def warn_of_unseen(model: VideoText, words: list[str]) -> list[str]:
    """A warning where class names hold no word that the text tower ever saw; else nothing."""
    split = lambda name: list(dict.fromkeys(re.findall(r"\w+", name.lower())))
    lost = [w for w in words if split(w) and unseen_words(model.text, [w]) == split(w)]
    if not lost:
        return []
    some = first_of(lost, 20)
    return [f"WARNING: {len(lost)} of {len(words)} classes mean nothing to this text tower: {some}"]


def embed_texts(
    model: VideoText, texts: list[str], device: torch.device | str = "cpu", precision: str = "auto",
    said: list[str] | None = None,
) -> tuple[np.ndarray, int]:  # fmt: skip
    """Unit vectors (len(texts), D) of sentences, and how many were cut to the context length.

    Args:
        model: the pair of towers.
        texts: the sentences.
        device: on which they are computed.
        precision: see `pretrain.device.autocast_dtype`.
        said: what a person said of them, of which unseen words are named; None: all.

    Raises:
        ValueError: a sentence is empty, or an embedding is not finite.
    """
    empty = [i for i, text in enumerate(texts) if not text.strip()]
    if empty:
        raise ValueError(f"text number {empty[0] + 1} of {len(texts)} is empty")
    if unseen := unseen_words(model.text, texts if said is None else said):
        some = first_of(unseen, 20)
        print(f"note: words that the text tower never saw: {some}", file=sys.stderr)
    device = torch.device(device)
    dtype = autocast_dtype(device, precision)
    # Moved outside of inference mode: buffers that it copies could not be trained with afterwards,
    # and from "cpu" to "cpu:0", as a process among several calls it, they are copied.
    model.to(device)
    rows, num_cut = [], 0
    with (
        evaluating(model),
        torch.inference_mode(),
        torch.autocast(device.type, dtype, enabled=dtype is not None),
    ):
        for start in range(0, len(texts), BATCH):
            tokens, cut = model.text.tokenizer(texts[start : start + BATCH])
            num_cut += sum(cut)
            rows.append(model.encode_text(trim(tokens, model.text).to(device)).cpu())
    vectors = torch.cat(rows).numpy() if rows else np.empty((0, model.arguments["dim"]), np.float32)
    if not np.isfinite(vectors).all():
        raise ValueError(
            "the embedding of a text is not finite: the backbone's weights are damaged"
        )
    return vectors, num_cut


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True).clip(1e-12)


def texts_of_labels(pack: Pack) -> dict[str, str]:
    """The class_text of each label; empty without such a column."""
    texts: dict[str, str] = {}
    for record in pack.records():
        text = record["extra"].get("class_text")
        if record["label"] is not None and text:
            texts.setdefault(record["label"], text)
    return texts


def class_vectors(
    model: VideoText,
    words: list[str],
    templates: tuple[str, ...],
    device: torch.device,
    precision: str,
) -> tuple[np.ndarray, int]:
    """Unit vectors (M, C, D) of every class in every template, and how many sentences were cut."""
    sentences = [template.format(name) for template in templates for name in words]
    vectors, num_cut = embed_texts(model, sentences, device, precision, said=words)
    return vectors.reshape(len(templates), len(words), -1), num_cut


def ensemble(vectors: np.ndarray) -> np.ndarray:
    """One unit vector a class (C, D): the mean over the templates of (M, C, D), as CLIP has it."""
    return unit(vectors.mean(0))


def template_sensitivity(
    videos: np.ndarray, vectors: np.ndarray, labels: np.ndarray, templates: tuple[str, ...]
) -> dict:
    """How much the wording decides: the accuracy of each template against their ensemble's.

    Args:
        videos: (N, D) unit vectors.
        vectors: (M, C, D) of `class_vectors`.
        labels: (N,) class numbers.
        templates: the M sentences.

    Returns:
        `per_template` (sentence -> top-1), their `mean`, `std`, `worst` and `best`, `ensemble`, and
        `gain`, what the ensemble has over the mean.
    """
    single = [float(((videos @ v.T).argmax(1) == labels).mean()) for v in vectors]
    together = float(((videos @ ensemble(vectors).T).argmax(1) == labels).mean())
    return {
        "per_template": dict(zip(templates, single, strict=True)),
        "mean": float(np.mean(single)),
        "std": float(np.std(single)),
        "worst": min(single),
        "best": max(single),
        "ensemble": together,
        "gain": together - float(np.mean(single)),
    }
