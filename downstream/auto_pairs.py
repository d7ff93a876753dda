"""The preset `auto` of video-text contrast: what a run takes from its clips and their texts.

As `pretrain.auto` does for reconstruction: what was measured, by rules, becomes settings, each with
its reason. What each rule was measured on stands in recipes/RESULTS.md.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from downstream.pairs import Texts
from pretrain import auto, flags
from pretrain.auto import SIDE, STILL, WINDOW, Choice, Facts, measure, recorded
from pretrain.data.cache import open_all
from pretrain.data.sampling import MEASURED, counter_rng
from pretrain.data.shards import Pack, fingerprint
from pretrain.log import print_table
from pretrain.names import counted
from pretrain.processes import computes_on_gpu, is_first
from pretrain.text import CONTEXT_LENGTH, ClipTokenizer

READ = 4096  # clips whose texts are read
SEVERAL = 8  # clips that share a text, on average: then texts are classes
LONG = 0.05  # of the texts that are cut: then one sentence of a text is drawn at a time
SIDES = {False: (64, 48, 32), True: (224, 160, 128, 112, 96, 64, 48, 32)}  # on a GPU: True
FUSED = (14, 10, 6)  # frames that slow fusion takes
SIDED = re.compile(r"\b(left|right)(wards?|[- ]hand(ed)?)?\b", re.IGNORECASE)


@dataclass(frozen=True)
class TextFacts:
    """What the texts of clips are like.

    Attributes:
        kind: "caption", or "label" where no clip has a caption.
        clips: that were read.
        different: texts among theirs, apart from case and spacing.
        tokens: of a text, the median.
        cut: the part of the texts that has more tokens than the context.
        sided: one says left or right.
    """

    kind: str
    clips: int
    different: int
    tokens: int
    cut: float
    sided: bool

    @property
    def classes(self) -> bool:
        """Whether so many clips share a text that texts are names of classes."""
        return self.clips >= SEVERAL * self.different

    def in_words(self) -> str:
        """For a person."""
        kind = "caption" if self.kind == "caption" else "class name"
        words = f"{counted(self.different, f'different {kind}')} of {counted(self.clips, 'clip')}"
        words += f", {counted(self.tokens, 'token')} long"
        return words + f", {self.cut:.0%} longer than the context" * (self.cut > 0)


def measure_texts(packs: Sequence[Pack], split: str, kind: str, templates: str) -> TextFacts:
    """Read the texts of `READ` clips at most; the same clips give the same facts.

    Args:
        packs: the data.
        split: to train on.
        kind: of the texts, if it was asked for; "": captions, or class names where there are none.
        templates: of class names.
    """
    ids = [pack.split_if_any(split) for pack in packs]
    captions = any((pack.column("captions")[some] > 0).any() for pack, some in zip(packs, ids))
    labels = any((pack.column("label")[some] >= 0).any() for pack, some in zip(packs, ids))
    kind = kind or ("label" if labels and not captions else "caption")
    texts_of = Texts("label" if kind == "label" else "caption", templates, "caption")
    found: list[str] = []
    clips = 0
    for pack, some in zip(packs, ids, strict=True):
        some = texts_of.among(pack, some)
        order = counter_rng(0, 0, purpose=MEASURED).permutation(len(some))
        most = READ // len(packs)
        some = some[:most] if pack.remote else some[np.sort(order[:most])]
        clips += len(some)
        found += [text for i in some for text in texts_of.of(pack.record(int(i)))]
    rows, cut = ClipTokenizer(CONTEXT_LENGTH)(found)
    tokens = int(np.median((rows != 0).sum(1))) if found else 0
    different = len({" ".join(text.lower().split()) for text in found})
    sided = any(map(SIDED.search, found))
    return TextFacts(kind, clips, different, tokens, float(np.mean(cut or [0])), sided)


def together(facts: Sequence[Facts]) -> Facts:
    """What the clips of several sources are like: those of the largest with motion, if there is any.

    Where some are stills and some are videos, everything is said to move: what does not cannot be
    told from what does.
    """
    videos = [f for f in facts if f.frames > 1]
    largest = max(videos or facts, key=lambda f: f.clips)
    moving = max(f.moving for f in facts) if len(videos) in (0, len(facts)) else 1.0
    side, clips = min(f.side for f in facts), sum(f.clips for f in facts)
    return replace(largest, clips=clips, side=side, moving=moving)


def choose(
    facts: Facts, texts: TextFacts, typed: Mapping[str, Any], gpu: bool
) -> dict[str, Choice]:
    """The settings of video-text contrast for clips and texts like these, each with its reason.

    Args:
        facts: of the clips.
        texts: theirs.
        typed: values that the user gave, by flag; others follow from them.
        gpu: whether it is computed on one. None of these rules was measured there.
    """
    chosen: dict[str, Choice] = {}

    def put(name: str, value: Any, why: str) -> Any:
        if name not in typed:
            chosen[name] = (value, why)
        return typed.get(name, value)

    _choose_texts(facts, texts, put)
    still, seconds = facts.frames == 1, min(facts.frames / facts.fps, WINDOW)
    fused = not still and facts.moving <= STILL
    moves = f"in nine of ten clips at most {facts.moving:.0%} of picture and time move"
    model = put(
        "model", "frame_slow" if fused else "vit_s" if gpu else "vit_xs",
        f"frames less their mean, in slow fusion: {moves}" if fused
        else "a transformer: " + ("pictures have no motion" if still else moves)
    )  # fmt: skip
    fused = model == "frame_slow"
    if fused:
        frames = next((n for n in FUSED if n <= facts.frames), FUSED[-1])
        frames = put("frames", frames, "as many as slow fusion takes of a clip")
    else:
        even = max(2, facts.frames - facts.frames % 2)
        frames = put("frames", 1 if still else min(16, even), "pictures" if still else "a clip")
    if frames and frames > 1:
        stride = max(1, round(seconds * facts.fps / frames))
        put("stride", stride, f"a clip spans {seconds:.1f} s of {facts.frames / facts.fps:.1f} s")
    size = next((s for s in SIDES[gpu] if s <= facts.side), SIDES[gpu][-1])
    size = put("size", size, f"clips have {facts.side} pixels")
    if not fused:
        patch = 16 if size > 64 else 8
        put("patch", patch, f"{size // patch} x {size // patch} of them make a picture")
        put("tubelet", 1 if frames and frames % 2 else 2, "as the frames allow")
    # A frame network without its mean frame knows people by little but what they do, and few of
    # them by heart: its decay is strong.
    put("weight_decay", 4.0 if fused else 0.05, "of a network of frames less their mean" if fused
        else "as usual")  # fmt: skip
    batch = min(256 if gpu else 64, facts.clips)
    put("batch_size", max(2, batch), "what takes a second or so" if batch < facts.clips
        else "all clips")  # fmt: skip
    put("micro_batch", max(2, batch), "one pass")
    return chosen


def _choose_texts(facts: Facts, texts: TextFacts, put: Callable[[str, Any, str], Any]) -> None:
    """The settings that follow from the texts."""
    put("text", texts.kind, "as clips have them" if texts.kind == "caption"
        else "no clip has a caption: class names are their texts")  # fmt: skip
    each = texts.clips / max(texts.different, 1)
    why = "equal texts are positives of the same clips"
    if texts.classes:
        why += f", {each:.0f} clips each: they are classes, zero_shot.py scores them"
    put("positives", "caption", why)
    if texts.kind == "caption":
        many = texts.cut > LONG
        why = f"{texts.cut:.0%} of the captions are longer than {CONTEXT_LENGTH} tokens"
        put("sentences", many, why + ": one sentence is drawn" * many)
    size = "xs" if texts.different < 50_000 else "ti"
    put("text_model", size, counted(texts.different, "different text"))
    put("flip", not texts.sided, "a text says left or right" if texts.sided
        else "no text says left or right")  # fmt: skip


def choose_by_data(
    config: Any, folder: Path, unused: Callable[[Any], Collection[str]]
) -> tuple[Any, int]:
    """What `auto` makes of clips and texts, all but the steps; or made, of a run that goes on.

    Args:
        config: of video-text contrast, as typed.
        folder: of the run.
        unused: of a configuration, the flags without effect.

    Returns:
        the configuration; and the short side to which raw data are packed, pixels.

    Raises:
        ValueError: as `open_all`, `recorded` and `measure`.
    """
    gpu = computes_on_gpu()
    packs = open_all(config.data, SIDE[gpu], is_first(), config.machine)
    if known := recorded(folder, config, fingerprint(packs)):
        return known, SIDE[gpu]
    typed = {name: value for name, value in flags.flat(config).items() if name in config.given}
    texts = measure_texts(packs, config.split, typed.get("text", ""), config.templates)
    facts = together([measure(pack, pack.split_if_any(config.split)) for pack in packs])
    chosen = choose(facts, texts, typed, gpu)
    values = {name: value for name, (value, _) in chosen.items()}
    without = unused(flags.replace(config, **values))
    values = {name: value for name, value in values.items() if name not in without}
    if is_first():
        rows = {flags.flag(name): f"{values[name]}: {chosen[name][1]}" for name in values}
        about = {"the clips": facts.in_words(), "their texts": texts.in_words()}
        print_table("auto (a flag overrides it)", about | rows)
    return flags.replace(config, **values), SIDE[gpu]
