"""How good the search of `look` is: P@10 of one sentence a class.

    python -m downstream.look.score --backbone runs/clip-motion/backbone --data synthetic

A sentence is looked for among the moments of a split, and of the ten best those count that have its
label. The mean over the classes is printed, and what a random order would have: the fraction of all
moments that have the label.
"""

from dataclasses import dataclass

import pretrain.threads  # noqa: F401 (before torch)

import numpy as np

from downstream.features import start_extraction
from downstream.look.index import nearest
from downstream.look.labels import marks_of
from downstream.look.moments import Moments, embed_moments, find_moments
from downstream.models import load_video_text
from downstream.zero_shot import embed_texts, texts_of_labels
from pretrain.data.cache import open_data, packing_side
from pretrain.data.shards import Pack
from pretrain.flags import Count, Positive
from pretrain.log import cli
from pretrain.names import for_screen
from pretrain.prompts import load_classes, same_words, words_of
from pretrain.settings import MACHINE, MachineFlags


@dataclass(frozen=True)
class Config:
    """Configuration of the score."""

    backbone: str
    """RUN/backbone of recipes/clip.py, or open_clip:MODEL/WEIGHTS."""
    data: str
    """A packed folder, a folder of videos, a list file, or `synthetic`: with labels."""
    classes: str | None = None
    """Sentences: a file, csv with label,text; by default the list's class_text, or the labels."""
    split: str = "test"
    """The split that is searched; "all" for everything, and of data without splits."""
    best: Count = 10
    """How many of the best count."""
    every: Positive = 4.0
    """Seconds of a moment, about."""
    batch_size: Count = 64
    """Views in one forward pass; changes speed and memory only."""
    machine: MachineFlags = MACHINE


def labels_of_moments(pack: Pack, moments: Moments) -> list[set[str]]:
    """The labels that the data give to each moment."""
    marks = {int(s): marks_of(pack.record(int(s))) for s in np.unique(moments.sample)}
    places = zip(moments.sample.tolist(), moments.start, moments.end, strict=True)
    return [{m.label for m in marks[s] if m.of(float(a), float(b))} for s, a, b in places]


def precision_at(
    vectors: np.ndarray, labels: list[set[str]], queries: dict[str, np.ndarray], best: int
) -> dict[str, tuple[float, float]]:
    """Of each label the precision among the best moments for its query, and that of chance.

    Where fewer moments than that have the label, no order could have all of the best right.

    Args:
        vectors: (M, D) unit vectors of the moments.
        labels: of each moment.
        queries: label to unit vector (D,).
        best: how many moments count.
    """
    found = {}
    for label, query in queries.items():
        numbers, _ = nearest(vectors, query, best)
        hits = [label in labels[n] for n in numbers.tolist()]
        found[label] = float(np.mean(hits)), float(np.mean([label in own for own in labels]))
    return found


def main(config: Config) -> dict:
    """Print the precision of every class, and their mean."""
    how = start_extraction(config.machine, 1, 1, config.batch_size)
    model = load_video_text(config.backbone)
    side = packing_side(model.video.input_spec.size)
    pack = open_data(config.data, side, machine=config.machine, labels=True)
    moments = find_moments(pack, config.every)
    searched = moments.only(np.isin(moments.sample, pack.split_if_any(config.split)))
    labels = labels_of_moments(pack, searched)
    named = sorted(set().union(*labels))
    if not named:
        raise ValueError(f"{config.data}: no moment of split {config.split} has a label")
    given = load_classes(config.classes) if config.classes else texts_of_labels(pack)
    by_words = {same_words(label): text for label, text in given.items()}
    sentences = [by_words.get(same_words(name)) or words_of(name) for name in named]
    vectors = embed_moments(model, pack, searched, how)
    texts, _ = embed_texts(model, sentences, how.device, how.precision)
    found = precision_at(vectors, labels, dict(zip(named, texts, strict=True)), config.best)
    for (label, (hits, chance)), text in zip(found.items(), sentences, strict=True):
        print(f"  {hits:5.2f}  (chance {chance:.2f})  {for_screen(label)}: {for_screen(text)}")
    mean, chance = np.mean(list(found.values()), axis=0).tolist()
    print(
        f"P@{config.best} {mean:.3f} of {len(named)} sentences among {len(searched)} moments "
        f"(chance {chance:.3f})"
    )
    return {"precision": mean, "chance": chance, "classes": found, "num_moments": len(searched)}


if __name__ == "__main__":
    cli(main, Config)
