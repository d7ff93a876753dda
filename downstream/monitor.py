"""Scores to watch while a training runs: never of the test split, and none ends the run."""

import math
import sys

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from downstream.features import Extraction, embed_now, extract, rows_by_all
from downstream.groups import among, group_clips
from downstream.models import load_backbone, match_rate
from downstream.pairs import Texts
from downstream.probe import knn_accuracy
from downstream.retrieval import retrieval_ranks, summarise_ranks
from downstream.splits import choose_validation, group_by_source, near_pairs
from downstream.zero_shot import embed_texts, unit
from pretrain.backbones import fresh_like
from pretrain.clip import VideoText
from pretrain.data.sampling import SCORED, some_clips
from pretrain.data.shards import Pack, TrainClips
from pretrain.device import autocast_dtype
from pretrain.health import feature_health
from pretrain.modes import evaluating
from pretrain.names import counted, for_screen
from pretrain.processes import SHARE
from pretrain.settings import STARTER
from pretrain.spec import Backbone

KNN_CLIPS = 480  # clips behind the scores of features
KNN = ("knn", "knn_chance", "knn_clips")  # what `online_scores` may say of labels
VIEWS = ("view_retrieval", "view_retrieval_chance", "view_retrieval_clips")
VIEWED_CLIPS = 128  # clips behind view retrieval
VAL_CLIPS = 512  # clips of a pack behind the retrieval score


def _some(pack: Pack, ids: np.ndarray, most: int, seed: int) -> np.ndarray:
    return some_clips(ids, most, seed, SCORED, in_order=pack.remote is not None)


def online_scores(
    encoder: nn.Module,
    pack: Pack,
    ids: np.ndarray,
    seed: int,
    accelerator: Accelerator,
    precision: str,
    views: bool = False,
) -> dict[str, float]:
    """What the features of some training clips are like, as a run's log has it.

    `feature_health` and, where clips have labels, the kNN accuracy on held-out subjects of the
    training split: "knn", "knn_chance" and "knn_clips", the number of held-out clips. Nothing where
    a clip is broken.

    Args:
        encoder: a `Backbone`; its training mode is left as it is.
        pack: the data.
        ids: training clips; at most `KNN_CLIPS` of them are used, one centre view each.
        seed: of that choice.
        accelerator: the processes, of which each embeds a share; all have to take part.
        precision: see `pretrain.device.autocast_dtype`.
        views: without labels, score `_view_retrieval` instead.
    """
    assert isinstance(encoder, Backbone)
    picked = _some(pack, ids, KNN_CLIPS, seed)
    how = Extraction(
        time_segments=0, batch_size=SHARE, device=accelerator.device, precision=precision
    )
    embed = lambda some: extract(encoder, pack, picked[some], how)[:, 0]
    try:
        x = rows_by_all(accelerator, len(picked), encoder.embed_dim, embed)
        scores = feature_health(x) | _knn(x, pack, picked, seed)
        if views and "knn" not in scores:
            scores |= _view_retrieval(encoder, pack, ids, seed, accelerator, precision)
    except ValueError as error:
        _no_score("score of the features", error, accelerator)
        return {}
    return scores


def _view_retrieval(
    encoder: Backbone, pack: Pack, ids: np.ndarray, seed: int, accelerator: Accelerator,
    precision: str,
) -> dict[str, float]:  # fmt: skip
    """How often a view of a clip (crop and frames of its own) finds the other one of its clip.

    Among the other views of `VIEWED_CLIPS` clips, by cosine of features minus their mean.

    Raises:
        ValueError: many clips in a row cannot be decoded.
    """
    clips = _some(pack, ids, VIEWED_CLIPS, seed)
    device, dtype = accelerator.device, autocast_dtype(accelerator.device, precision)
    both = TrainClips(
        pack, clips, encoder.input_spec, seed, 2, (1.0, 0.9, 0.8), lambda *_: {}, spread=True
    )
    assert isinstance(encoder, nn.Module)

    def embed(some: np.ndarray) -> np.ndarray:
        shown = [both[int(i)] for i in some]
        batch = {n: torch.cat([clip[n] for clip in shown]) for n in encoder.input_spec.streams}
        with (
            evaluating(encoder),
            torch.inference_mode(),
            torch.autocast(device.type, dtype, enabled=dtype is not None),
        ):
            spec = encoder.input_spec
            x = encoder(spec.normalise(spec.take(batch, device)))
        return x.float().cpu().numpy().reshape(len(some), -1)

    x = rows_by_all(accelerator, len(clips), 2 * encoder.embed_dim, embed)
    x = x.reshape(2 * len(clips), -1)
    x = unit(x - x.mean(0))
    found = (x[0::2] @ x[1::2].T).argmax(1) == np.arange(len(clips))
    values = (float(found.mean()), 1 / len(clips), len(clips))
    return dict(zip(VIEWS, values, strict=True))


def _knn(x: np.ndarray, pack: Pack, ids: np.ndarray, seed: int) -> dict[str, float]:
    """The kNN accuracy of features (N, D) of those clips that have a label, if enough do."""
    records = [pack.record(i) for i in ids]
    labelled = [place for place, record in enumerate(records) if record["label"] is not None]
    x, ids, records = x[labelled], ids[labelled], [records[place] for place in labelled]
    names = [r["label"] for r in records]
    if len(set(names)) < 2:
        return {}
    pairs = among(near_pairs(pack), ids)
    linked = group_clips(records, pairs), group_clips(records, pairs, people=False)
    held_out, _ = choose_validation(names, [r["subject"] for r in records], seed, *linked)
    if not held_out.any():
        return {}  # a single clip of each class: nobody to ask
    labels = np.unique(names, return_inverse=True)[1]
    score = knn_accuracy(x[~held_out], labels[~held_out], x[held_out], labels[held_out])
    return dict(zip(KNN, (score, 1 / len(set(names)), int(held_out.sum())), strict=True))


def starter_ahead(pack: Pack, ids: np.ndarray, seed: int) -> tuple[bool, str]:
    """Whether the labels of training clips speak for `--backbone starter`, and why.

    Its kNN accuracy on held-out subjects of the training split has to be above that of the same
    network with random weights by two standard errors. Without labels nothing tells.

    Args:
        pack: the data.
        ids: see `online_scores`, likewise the seed.
        seed: of the choice of clips and of the random weights.
    """
    picked = _some(pack, ids, KNN_CLIPS, seed)
    picked = picked[[pack.record(int(i))["label"] is not None for i in picked]]
    if not len(picked):
        return False, "no clip has a label by which to ask whether the starter fits"
    starter = load_backbone(STARTER)
    assert isinstance(starter, nn.Module)
    match_rate(STARTER, starter, pack.rates())
    how = Extraction(time_segments=0)
    found = []
    for encoder in (starter, fresh_like(starter, seed)):
        try:
            found.append(_knn(extract(encoder, pack, picked, how)[:, 0], pack, picked, seed))
        except ValueError as error:  # clips are broken
            return False, f"the starter was not tried: {for_screen(error)}"
    if not found[0]:
        return False, "too few clips have labels to ask whether the starter fits"
    (score, _, clips), (random, _, _) = [[scores[name] for name in KNN] for scores in found]
    share = (score * clips + 2) / (clips + 4)  # as `downstream.guard.has_fallen` counts
    asked = counted(int(clips), "held-out clip")
    told = f"kNN {100 * score:.0f} % of {asked}, random weights {100 * random:.0f} %"
    if score < random + 2 * math.sqrt(share * (1 - share) / clips):
        return False, f"the starter is not shown to be above random weights: {told}"
    return True, told


def learning_words(values: dict, state: dict, health: str) -> tuple[str, str]:
    """What a person watches of pretraining without texts: of the step, and the last kNN score.

    Args:
        values: of the step, as the log has them.
        state: of the run, with the last values of `KNN`.
        health: the word for it, see `pretrain.health`.
    """
    text = f"loss {values['loss']:.4f}"
    if "explained" in values:
        text += f" ({values['explained']:z.0%} explained)"
    if "view_retrieval_accuracy" in values:
        text += f"  view-retrieval accuracy {values['view_retrieval_accuracy']:.0%}"
    if VIEWS[0] in values:
        text += f"  view retrieval {values[VIEWS[0]]:.0%} of {counted(values[VIEWS[2]], 'clip')}"
        text += f" (chance {values[VIEWS[1]]:.1%})"
    score, chance, clips = (state[name] for name in KNN)
    knn = "" if score is None else (
        f"kNN {100 * score:.1f} % of {counted(clips, 'clip')} (chance {100 * chance:.1f} %)"
    )  # fmt: skip
    return f"{text}  {health}", knn


def online_features(
    model: VideoText,
    packs: list[Pack],
    chosen: list[np.ndarray],
    seed: int,
    accelerator: Accelerator,
    precision: str,
) -> dict[str, float]:
    """`feature_health` of some training clips in the joint space; nothing where a clip is broken.

    Args:
        model: the pair of towers.
        packs: the data.
        chosen: of each pack the training clips; at most `KNN_CLIPS` in all are used.
        seed: see `online_scores`, likewise the rest.
        accelerator: see there.
        precision: see there.
    """
    how = Extraction(
        time_segments=1, batch_size=SHARE, device=accelerator.device, precision=precision
    )
    most, width = KNN_CLIPS // len(packs), model.arguments["dim"]
    rows = []
    try:
        for pack, ids in zip(packs, chosen, strict=True):
            picked = _some(pack, ids, most, seed)
            embed = lambda some, p=pack, ids=picked: embed_now(model, p, ids[some], how)
            rows.append(rows_by_all(accelerator, len(picked), width, embed))
    except ValueError as error:
        _no_score("score of the features", error, accelerator)
        return {}
    return feature_health(np.concatenate(rows))


def online_retrieval(
    model: VideoText,
    packs: list[Pack],
    texts_of: Texts,
    seed: int,
    accelerator: Accelerator,
    precision: str,
) -> dict | None:
    """Text-to-video retrieval in the split "val" (first text, one view a clip); None without.

    Args:
        model: the pair of towers.
        packs: the data.
        texts_of: the texts of a clip.
        seed: of the choice of at most `VAL_CLIPS` clips a pack.
        accelerator: the processes, of which each embeds a share; all have to take part.
        precision: see `pretrain.device.autocast_dtype`.
    """
    device, width = accelerator.device, model.arguments["dim"]
    how = Extraction(time_segments=1, batch_size=SHARE, device=device, precision=precision)

    def embed_clips(pack: Pack, ids: np.ndarray) -> np.ndarray:
        embed = lambda some: embed_now(model, pack, ids[some], how)
        return rows_by_all(accelerator, len(ids), width, embed)

    clips, sources, texts = [], [], []
    try:
        for number, pack in enumerate(packs):
            if "val" not in pack.index["splits"]:
                continue
            ids = texts_of.among(pack, pack.split("val"))
            if not len(ids):
                continue
            ids = _some(pack, ids, VAL_CLIPS, seed)
            clips.append(embed_clips(pack, ids))
            sources += [f"{number} {pack.record(i)['source']}" for i in ids]
            texts += [texts_of.of(pack.record(i))[0] for i in ids]
        if not clips:
            return None
        # The clips of a long video share its captions, and are not contrasted with one another.
        names, owner = group_by_source(sources)
        texts = [texts[i] for i in np.unique(owner, return_index=True)[1]]
        embed = lambda some: embed_texts(model, [texts[i] for i in some], device, precision)[0]
        text = rows_by_all(accelerator, len(texts), width, embed)
    except ValueError as error:
        _no_score("score on val", error, accelerator)
        return None
    videos = np.zeros((len(names), text.shape[1]))
    np.add.at(videos, owner, np.concatenate(clips))
    ranks, _ = retrieval_ranks(text, unit(videos), np.arange(len(names)))
    return summarise_ranks(ranks) | {"num": len(names)}


def _no_score(what: str, error: ValueError, accelerator: Accelerator) -> None:
    """Say that a clip is broken; a monitor must not end the run it watches."""
    if accelerator.is_main_process:
        print(f"no {what}: {for_screen(error)}", file=sys.stderr, flush=True)


def retrieval_values(val: dict | None) -> dict[str, float]:
    """A score of `online_retrieval` as a run's log has it, recalls beside those of chance."""
    if val is None:
        return {}
    values = {f"val_t2v_{name}": value for name, value in val.items() if name != "num"}
    return values | {f"val_t2v_r{k}_chance": min(1, k / val["num"]) for k in (1, 5, 10)}


def retrieval_words(val: dict | None) -> str:
    """The same for a person."""
    if val is None:
        return ""
    first, tenth = (100 * min(1, k / val["num"]) for k in (1, 10))
    return (
        f"val R@1 {100 * val['r1']:.1f} % R@10 {100 * val['r10']:.1f} % of "
        f"{counted(val['num'], 'clip')} (chance {first:.1f} and {tenth:.1f} %)"
    )


def contrast_words(values: dict, val: dict | None, health: str) -> tuple[str, str]:
    """What a person watches of a step, and the last score on val."""
    text = (
        f"loss {values['loss']:.3f}  in-batch {values['video_to_text']:.0%} to text "
        f"{values['text_to_video']:.0%} to video  gap {values['gap']:.2f}  "
        f"scale {values['scale']:.1f}  {counted(values['duplicates'], 'duplicate')}  {health}"
    )
    after = [
        retrieval_words(val),
        f"{counted(values['cut'], 'caption')} cut to the context" if values["cut"] else "",
    ]
    return text, "  ".join(filter(None, after))
