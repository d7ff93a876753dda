"""Pairs of clip and text: a clip's texts, its positives, and the tensors of a micro-batch."""

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from downstream.finetune import make_targets, mix
from pretrain.clip import VideoText, has_batch_norm
from pretrain.data.cache import raw_sources
from pretrain.data.shards import Pack, batch_counts, refuse_raw_streams
from pretrain.loop import Plan
from pretrain.names import counted
from pretrain.prompts import load_templates, refuse_same_words, words_of
from pretrain.spec import InputSpec, Selective
from pretrain.text import trim

# Behind a full stop and before a space; those of Chinese and Japanese have none behind them.
_BETWEEN = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


@dataclass(frozen=True)
class Texts:
    """The texts of a clip.

    Attributes:
        kind: its captions, or its class name ("label") in each of the templates.
        templates: as `pretrain.prompts.load_templates` takes them.
        positives: texts that are positives of the same clips: "pair" and "caption": equal ones;
            "label": those of a class.
        sentences: whether each sentence of a caption is a text by itself.
    """

    kind: Literal["caption", "label"]
    templates: str
    positives: Literal["pair", "caption", "label"]
    sentences: bool = False

    def of(self, record: dict) -> list[str]:
        """The texts that a clip may be paired with; none if it has no caption (or label)."""
        if self.kind == "caption":
            captions = record["captions"]
            return [s for c in captions for s in sentences(c)] if self.sentences else captions
        if record["label"] is None:
            return []
        words = record["extra"].get("class_text") or words_of(record["label"])
        return [template.format(words) for template in load_templates(self.templates)]

    def has_one(self, captions: Sequence[str], label: str | None) -> bool:
        """Whether a clip with these captions and this label has a text."""
        return bool(captions) if self.kind == "caption" else label is not None

    def among(self, pack: Pack, ids: np.ndarray) -> np.ndarray:
        """Those of the samples that have a text."""
        there = pack.column("captions") > 0 if self.kind == "caption" else pack.column("label") >= 0
        return ids[there[ids]]

    def group(self, record: dict, text: str) -> int:
        """A number that is equal for texts that are positives of the same clips."""
        by_label = self.positives == "label" and record["label"] is not None
        key = f"label {record['label']}" if by_label else "text " + " ".join(text.lower().split())
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True)


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order; the text itself if it has no word."""
    parts = (part.strip() for part in _BETWEEN.split(text))
    return [part for part in parts if re.search(r"\w", part)] or [text]


class TextOfView:
    """The texts of a training view: (rng, index entry) -> tokens, group, class, visible tokens.

    Args:
        texts: of a clip.
        model: the pair of towers, whose tokenizer is used.
        drop_tokens: fraction of the video tokens left out (FLIP).
        classes: of which a view has a number; empty: it has none.
    """

    def __init__(self, texts: Texts, model: VideoText, drop_tokens: float, classes: list[str]):
        self.texts, self.tokenizer = texts, model.text.tokenizer
        self.numbers = {name: i for i, name in enumerate(classes)}
        self.num_tokens = self.num_visible = 0
        if drop_tokens and isinstance(model.video, Selective):
            self.num_tokens = model.video.num_motion_tokens
            self.num_visible = self.num_tokens - int(drop_tokens * self.num_tokens)

    def __call__(self, rng: np.random.Generator, record: dict, _: np.ndarray) -> dict[str, Tensor]:
        """Draw one of the clip's texts, and the tokens that the video tower will see."""
        texts = self.texts.of(record)
        caption = texts[rng.integers(len(texts))]
        tokens, cut = self.tokenizer([caption])
        drawn = {
            "tokens": tokens[0],
            "groups": torch.tensor(self.texts.group(record, caption)),
            "cut": torch.tensor(cut[0]),
        }
        if self.numbers:
            drawn["classes"] = torch.tensor(self.numbers[record["label"]])
        if self.num_visible:
            kept = np.sort(rng.permutation(self.num_tokens)[: self.num_visible])
            drawn["visible"] = torch.from_numpy(kept)
        return drawn


def micro_batch(model: VideoText, trim_text: bool, batch: dict) -> dict[str, Tensor]:
    """What of a loaded batch model and loss take; `trim_text`: to the longest caption."""
    names = ("tokens", "groups", "visible")
    micro: dict[str, Any] = {"video": model.video.input_spec.take(batch)}
    micro |= {name: batch[name] for name in names if name in batch}
    if trim_text:
        micro["tokens"] = trim(micro["tokens"], model.text)
    return micro


class AgainstClasses:
    """A loaded batch to be scored against all classes: mixed clips, all prompts, soft targets.

    Args:
        model: whose tokenizer and clip they go by.
        prompts: a sentence a class.
        trim_text: cut the token rows to the longest prompt.
        smoothing: fraction of every target spread over all classes.
        mixup: alpha of mixup; 0: off.
        cutmix: alpha of cutmix; 0: off.
        device: where clips are mixed.

    Raises:
        ValueError: a prompt is longer than the text tower's context.
    """

    def __init__(
        self, model: VideoText, prompts: list[str], trim_text: bool, smoothing: float, mixup: float,
        cutmix: float,
        device: torch.device,
    ):  # fmt: skip
        self.spec, self.device = model.video.input_spec, device
        self.smoothing, self.mixup, self.cutmix = smoothing, mixup, cutmix
        self.num_classes = len(prompts)
        if (mixup or cutmix) and not self.spec.pictures:
            raise ValueError("--mixup and --cutmix mix pixels, and this tower has none: give 0")
        tokens, cut = model.text.tokenizer(prompts)
        if any(cut):
            raise ValueError(
                "the prompt of a class is longer than the text tower's context: "
                f"{prompts[cut.index(True)]!r}"
            )
        self.tokens = trim(tokens, model.text) if trim_text else tokens

    def __call__(self, rng: np.random.Generator, batch: dict) -> dict[str, Tensor]:
        """A micro-batch for `backward_classes`; all randomness comes from `rng`."""
        video = self.spec.normalise(self.spec.take(batch, self.device))
        assert isinstance(video, Tensor)  # mixing is of one stream
        targets = make_targets(batch["classes"], self.num_classes, self.smoothing)
        video, targets = mix(video, targets.to(self.device), self.mixup, self.cutmix, rng)
        micro: dict[str, Any] = {"video": video, "tokens": self.tokens, "targets": targets}
        return micro | {name: batch[name] for name in ("visible",) if name in batch}


def refuse_batch(
    model: VideoText, plan: Plan, by_class: bool, sources: Sequence[str],
    weights: tuple[float, ...] | None,
) -> None:  # fmt: skip
    """Refuse a batch that a model cannot be trained with.

    Args:
        model: the pair of towers.
        plan: of the run.
        by_class: for --loss classes, which compares no clips.
        sources: of the data.
        weights: theirs in a batch; None: their numbers of clips.

    Raises:
        ValueError: it is divided and the model mixes the clips of a part; it is a single clip; or
            it cannot have all sources, or another number of them has weights.
    """
    batch = plan.batch_size
    if weights:
        batch_counts(weights, batch)
    if weights and len(weights) != len(sources):
        raise ValueError(f"{len(weights)} --data-weights and {len(sources)} --data: give one each")
    if plan.accumulate > 1 and has_batch_norm(model):
        raise ValueError(
            f"a batch of {batch} in micro-batches of {plan.micro} would not be exact: this tower "
            "has batch normalisation, which mixes the clips of a micro-batch; raise --micro-batch "
            "or take a ViT"
        )
    if not by_class and batch < 2:
        raise ValueError(
            f"--batch-size {batch}: one clip has nothing to be contrasted with, give 2 or more"
        )


def refuse_raw(
    texts: Texts, by_class: bool, sources: Sequence[str], split: str, spec: InputSpec
) -> None:
    """Refuse, before data are packed, texts and streams that they could not have.

    Args:
        texts: of a clip.
        by_class: for --loss classes, which has one sentence a class.
        sources: of the data; of raw ones the texts are known before.
        split: of the data.
        spec: the clip that the video tower takes.

    Raises:
        ValueError: there are no such templates, several sentences a class, a source without a
            single text or without a stream that the tower takes, or fewer than two classes; or a
            source cannot be read.
    """
    if texts.kind == "label":
        load_templates(texts.templates)
    if by_class and (texts.kind != "label" or len(load_templates(texts.templates)) != 1):
        raise ValueError(
            "--loss classes has one sentence a class: give --text label and --templates with one "
            "line, such as vificlip"
        )
    listed = {source: raw_sources(source, split) for source in sources}
    for source, found in listed.items():
        refuse_raw_streams(found, spec, source, "the video tower")
        if found and not any(texts.has_one(s.captions, s.label) for s in found):
            raise _without_text(texts, len(found), source)
    classes = {s.label for found in listed.values() for s in found if s.label is not None}
    if by_class and all(listed.values()) and len(classes) < 2:
        raise _only_class(classes)


def _only_class(classes: Collection[str]) -> ValueError:
    return ValueError(
        f"--loss classes: the only class is {min(classes)!r}, there is nothing to classify"
    )


def _without_text(texts: Texts, num: int, source: str) -> ValueError:
    remedy = "add a label column, or sort the videos into one folder per class"
    if texts.kind == "caption":
        remedy = "add a caption column to the list, or give --text label to train on class names"
    return ValueError(f"no clip of {source} ({num} in all) has a {texts.kind}: {remedy}")


def class_prompts(
    texts: Texts, sources: Sequence[str], packs: list[Pack], chosen: list[np.ndarray]
) -> dict[str, str]:
    """The classes of the clips and the one sentence of each, for --loss classes.

    Raises:
        ValueError: fewer than two classes, or names that differ in spelling only.
    """
    prompts: dict[str, str] = {}
    for pack, ids in zip(packs, chosen, strict=True):
        for first in np.unique(pack.column("label")[ids], return_index=True)[1]:
            record = pack.record(ids[first])
            prompts.setdefault(record["label"], texts.of(record)[0])
    if len(prompts) < 2:
        raise _only_class(prompts)
    refuse_same_words(prompts, " + ".join(sources))
    return dict(sorted(prompts.items()))


def positives_in_words(texts: Texts, packs: list[Pack], chosen: list[np.ndarray]) -> str:
    """Which texts are positives of a clip, as the data have it: without a label, equal ones."""
    if texts.positives == "pair":
        return "its own text"
    each = zip(packs, chosen, strict=True)
    known = np.concatenate([pack.column("label")[ids] >= 0 for pack, ids in each])
    if texts.positives == "caption" or not known.any():
        return "equal texts"
    return "texts of its class" if known.all() else "texts of its class, else equal ones"


def clips_with_text(
    texts: Texts, sources: Sequence[str], packs: list[Pack], split: str, spec: InputSpec, say: bool
) -> list[np.ndarray]:
    """The training samples of each source that have a text; prints how many have none if `say`.

    Raises:
        ValueError: a source has not a single one, or lacks a stream of `spec`; or classes are used
            that differ in spelling only.
    """
    if "label" in (texts.kind, texts.positives):
        names = sorted({name for pack in packs for name in pack.classes})
        refuse_same_words(dict(zip(names, names, strict=True)), " + ".join(sources))
    chosen = []
    for source, pack in zip(sources, packs, strict=True):
        ids = pack.split_if_any(split)
        kept = texts.among(pack, ids)
        if not len(kept):
            raise _without_text(texts, len(ids), source)
        if len(kept) < len(ids) and say:
            print(
                f"{source}: left out for want of a {texts.kind}: {len(ids) - len(kept)} of "
                f"{counted(len(ids), 'clip')}"
            )
        pack.check_streams(kept, spec, "the video tower")
        chosen.append(kept)
    return chosen
