"""The preset `auto` of video-text contrast: what a run takes from its clips and their texts.

As `pretrain.auto` does for reconstruction: what was measured, by rules, becomes settings, each with
its reason. What each rule was measured on stands in recipes/RESULTS.md.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from downstream.pairs import Texts, micro_batch
from pretrain import flags
from pretrain.auto import (
    NOTHING,
    SIDE,
    STILL,
    WINDOW,
    Choice,
    Facts,
    explain,
    measure,
    recorded,
    with_choices,
)
from pretrain.clip import Contrast, VideoText
from pretrain.data.cache import open_all, raw_sources
from pretrain.data.sampling import MEASURED, some_clips
from pretrain.data.shards import Pack, fingerprint
from pretrain.names import counted
from pretrain.processes import asked_processes, computes_on_gpu, is_first
from pretrain.run import try_place
from pretrain.text import CONTEXT_LENGTH, ClipTokenizer

READ = 4096  # clips whose texts are read
SEVERAL = 8  # clips that share a text, on average: then texts are classes
LONG = 0.05  # of the texts that are cut: then one sentence of a text is drawn at a time
SIDES = {False: (64, 48, 32), True: (224, 160, 128, 112, 96, 64, 48, 32)}  # on a GPU: True
OF_TOKENS = {"patch", "tubelet", "positions", "init", "motion_tokens", "depth", "drop_tokens"}
SIDES_SAID = 0.02  # of the texts say left or right: then no clip is mirrored
FUSED = (14, 10, 6)  # frames that slow fusion takes
Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
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
        sided: the part of them that says left or right.
    """

    kind: str
    clips: int
    different: int
    tokens: int
    cut: float
    sided: float

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
    both = list(zip(packs, ids, strict=True))
    captions, labels = (Texts(kind, templates, "caption") for kind in ("caption", "label"))
    if not kind:
        named = not any(len(captions.among(*one)) for one in both)
        kind = "label" if named and any(len(labels.among(*one)) for one in both) else "caption"
    texts_of = labels if kind == "label" else captions
    found: list[str] = []
    clips = 0
    for pack, some in both:
        some = texts_of.among(pack, some)
        far = pack.remote is not None
        some = some_clips(some, READ // len(packs), 0, MEASURED, in_order=far)
        clips += len(some)
        found += [text for i in some for text in texts_of.of(pack.record(int(i)))]
    rows, cut = ClipTokenizer(CONTEXT_LENGTH)(found)
    tokens = int(np.median((rows != 0).sum(1))) if found else 0
    different = len({" ".join(text.lower().split()) for text in found})
    sided = sum(bool(SIDED.search(text)) for text in found) / max(len(found), 1)
    return TextFacts(kind, clips, different, tokens, sum(cut) / max(len(cut), 1), sided)


def together(facts: Sequence[Facts]) -> Facts:
    """What the clips of several sources are like: the largest with motion stands for all.

    Pictures are counted, of all.
    """
    videos = [f for f in facts if f.frames > 1]
    largest = max(videos or facts, key=lambda f: f.clips)
    side, clips = min(f.side for f in facts), sum(f.clips for f in facts)
    moving, pictures = max(f.moving for f in facts), sum(f.pictures for f in facts)
    return replace(largest, clips=clips, side=side, moving=moving, pictures=pictures)


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

    _choose_texts(texts, put)
    still, seconds = facts.frames == 1, min(facts.frames / facts.fps, WINDOW)
    moves = f"in three of four clips at most {facts.moving:.0%} of picture and time move"
    asked = OF_TOKENS & typed.keys()
    wanted = typed.get("frames") or FUSED[0]
    if wanted < 6 or wanted % 4 != 2:  # slow fusion takes 4k + 2
        asked |= {"frames"}
    if asked:
        moves = f"{flags.flag(min(asked))} is for one"
    elif facts.pictures and not still:
        moves = f"{counted(facts.pictures, 'picture')} among them would be nothing less its mean"
    elif facts.moving < NOTHING:
        moves = "nothing moves"
    plain = still or asked or facts.pictures
    fused = not plain and NOTHING <= facts.moving <= STILL
    model = put(
        "model", "frame_slow" if fused else "vit_s" if gpu else "vit_xs",
        f"slow fusion of frames less their mean: {moves}" if fused
        else "a transformer: " + ("pictures have no motion" if still else moves)
    )  # fmt: skip
    fused = model == "frame_slow" and not typed.get("backbone")
    if fused:
        put("small", not gpu, "of minutes" if not gpu else "as in the paper")
        frames = next((n for n in FUSED if n <= facts.frames), FUSED[-1])
    else:
        frames = 1 if still else min(16, max(2, facts.frames - facts.frames % 2))
    many = "pictures" if still else f"as many as it takes, of {facts.frames} of a clip"
    frames = put("frames", frames, many) or frames
    if frames > 1:
        stride = max(1, round(seconds * facts.fps / frames))
        put("stride", stride, f"a clip spans {seconds:.1f} s of {facts.frames / facts.fps:.1f} s")
    sides = SIDES[gpu] if fused or still or gpu else SIDES[gpu][1:]  # tokens of videos are many
    size = next((s for s in sides if s <= facts.side), sides[-1])
    size = put("size", size, f"clips have {facts.side} pixels")
    if not fused:
        put("patch", 16 if size > 64 else 8, f"of a picture of {size} pixels")
        put("tubelet", 1 if frames % 2 else 2, "a single frame" if still else "as published")
    # A frame network without its mean frame knows people by little but what they do, and few of
    # them by heart: its decay is strong.
    put("weight_decay", 4.0 if fused else 0.05, "of a network of frames less their mean" if fused
        else "as usual")  # fmt: skip
    if typed.get("optimizer") == "adamw":
        put("base_lr", 0.0032, "a fifth of Muon's")
    shared = asked_processes()
    batch = shared * math.ceil(max(2, min(256 if gpu else 64, facts.clips)) / shared)
    few = "all clips, " if facts.clips <= batch else ""
    batch = put("batch_size", batch, f"{few}compared with one another")
    put("micro_batch", batch, "compared in one pass")
    return chosen


def _choose_texts(texts: TextFacts, put: Callable[[str, Any, str], Any]) -> None:
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
    put("flip", texts.sided < SIDES_SAID, f"{texts.sided:.1%} of the texts say left or right")


def choose_by_data(
    config: Any, folder: Path, unused: Callable[[Any], Collection[str]],
    check: Callable[[Any], object],
) -> tuple[Any, list[Pack]]:  # fmt: skip
    """What `auto` makes of clips and texts, all but the steps; or made, of a run that goes on.

    Args:
        config: of video-text contrast, as typed.
        folder: of the run.
        unused: of a configuration, the flags without effect.
        check: raises ValueError for a configuration that contradicts itself.

    Returns:
        the configuration; and the data, opened.

    Raises:
        ValueError: as `try_place`, `open_all`, `recorded`, `measure` and `check`.
    """
    try_place(folder, config.run)
    given: dict[str, Any] = flags.flat(config)
    gpu, typed = computes_on_gpu(), {name: given[name] for name in config.given}

    def chosen_for(facts: Facts, texts: TextFacts) -> tuple[Any, dict[str, Choice]]:
        return with_choices(config, choose(facts, texts, typed, gpu), unused)

    # Packing takes long: what can be said before is.
    if all(listed := [raw_sources(source, config.split) for source in config.data]):
        raw = [one for found in listed for one in found]
        named = not any(one.captions for one in raw) and any(one.label for one in raw)
        kind = typed.get("text", "label" if named else "caption")
        clips = Facts(len(raw), 100, 25.0, 256, 1.0)
        check(chosen_for(clips, TextFacts(kind, len(raw), len(raw), 10, 0.0, 0.0))[0])
    packs = open_all(config.data, SIDE[gpu], is_first(), config.machine)
    if known := recorded(folder, config, fingerprint(packs)):
        return known, packs
    texts = measure_texts(packs, config.split, typed.get("text", ""), config.templates)
    if texts.different == 1:
        raise ValueError(
            f"all {counted(texts.clips, 'clip')} have the same {texts.kind}: there is nothing by "
            "which clips are kept apart; give each a caption of its own"
        )
    facts = together([measure(pack, pack.split_if_any(config.split)) for pack in packs])
    config, chosen = chosen_for(facts, texts)
    about = {"the clips": facts.in_words(), "their texts": texts.in_words()}
    return explain(config, about, chosen), packs


def loss_of_batch(model: VideoText, trim_text: bool, loss_of: Callable[..., Contrast]) -> Loss:
    """The loss of a loaded micro-batch, for the time that a step takes."""

    def loss(twin: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        micro = micro_batch(model, trim_text, batch)
        groups = micro.pop("groups")
        return loss_of(*twin(**micro), groups).loss

    return loss
