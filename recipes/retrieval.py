"""Find videos by sentences, and sentences by videos.

    python recipes/retrieval.py --backbone runs/clip-tiny/backbone --data synthetic
    python recipes/retrieval.py --backbone RUN/backbone --data my_videos/ --query "sits down"

Scored on a data set with captions: every caption of the split is a query for its video among all
videos of the split (text to video), every video one for its captions among all captions. R@k is the
fraction of queries whose correct item is among the k best; equal similarities share their average
rank, and of several captions of a video the best-placed counts, whose only rivals are captions of
other videos (downstream/retrieval.py). The ranking is exact. Written: results.json, CARD.md.

With --query the best videos are listed, and drawn on a contact sheet.
"""

from pathlib import Path
from typing import Any

import pretrain.threads  # noqa: F401 (before torch)

import numpy as np

from downstream.features import Extraction, cached_embeddings, start_extraction
from downstream.metrics import all_named
from downstream.models import load_video_text, match_rate
from downstream.report import contact_sheet_figure, publish
from downstream.results import (
    Data,
    Metric,
    about_intervals,
    build_results,
    claim_results,
    default_folder,
    describe_model,
    describe_views,
    seen_in_training,
    try_results,
    versions,
)
from downstream.retrieval import (
    chance_ranks,
    rank_intervals,
    retrieval_ranks,
    same_texts,
    summarise_ranks,
)
from downstream.splits import group_by_source
from downstream.zero_shot import POOLING, embed_texts, unit
from pretrain.backbones import provenance_of
from pretrain.clip import VideoText
from pretrain.data.cache import open_data, packing_side
from pretrain.data.shards import Pack
from pretrain.folders import claim
from pretrain.log import print_notes, print_table, write_json
from pretrain.names import counted, for_screen
from pretrain.weights import weights_hash
from recipes.options.retrieval import Config, command

# A best video that is no more above the mean of all is called flat. Of CLIP's pairs a sentence and
# what shows it are 0.1 or more above others.
FLAT = 0.05


def embed_sources(
    config: Config, model: VideoText, pack: Pack, samples: np.ndarray, how: Extraction
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the videos, their unit vectors (V, D), and the video of each clip."""
    names, owner = group_by_source([pack.record(i)["source"] for i in samples])
    clips = cached_embeddings(model, pack, samples, how, "videos")
    total = np.zeros((len(names), clips.shape[1]))
    np.add.at(total, owner, clips)
    return names, unit(total).astype(np.float32), owner


def search_notes(config: Config, pack: Pack, similar: np.ndarray) -> list[str]:
    """Notes on a search, from the similarities (V,) of all videos."""
    notes = []
    above = float(similar.max() - similar.mean())
    if len(similar) > 1 and above < FLAT:
        notes.append(
            f"the scores are flat: the best is only {above:.3f} above the mean of all videos, so "
            "either none shows what the sentence says, or all do, or this model cannot rank them"
        )
    split = seen_in_training(provenance_of(config.backbone), config.data, pack.index)
    if split:
        num = len(pack) if split == "all" else pack.index["splits"].get(split, 0)
        notes.append(
            f"{num} of the {len(pack)} clips searched are training clips (split {split}): on new "
            "videos expect less"
        )
    return notes


def search(config: Config, model: VideoText, how: Extraction) -> dict:
    """List the best videos for a sentence.

    Raises:
        ValueError: the sentence is empty, --top asks for none, or data or --out cannot be used.
    """
    if not config.query or not config.query.strip():
        raise ValueError("--query is empty: write a sentence")
    if config.top < 1:
        raise ValueError(f"--top {config.top}: ask for at least one video")
    out = Path(config.out or default_folder("search", config.backbone, config.data))
    lock = claim(out, ("search.json", "contact_sheet.png"))
    side = packing_side(model.video.input_spec.size)
    pack = open_data(config.data, side, machine=config.machine)
    match_rate(config.backbone, model.video, pack.rates())
    samples = np.arange(len(pack))
    names, videos, owner = embed_sources(config, model, pack, samples, how)
    text, cut = embed_texts(model, [config.query], how.device, config.machine.precision)
    if cut:
        print("note: the sentence is longer than the text tower's context and was cut")
    similar = videos @ text[0]
    best = np.argsort(-similar, kind="stable")[: config.top]
    notes = search_notes(config, pack, similar)
    found = {
        "query": config.query,
        "num_videos": len(names),
        "best": [{"video": names[i], "similarity": float(similar[i])} for i in best],
        "mean_similarity": float(similar.mean()),
        "notes": notes,
    }
    write_json(out / "search.json", found)  # before the pictures, which may fail
    print(f"\n{config.query!r} among {counted(len(names), 'video')} of {for_screen(config.data)}")
    print("  rank  similarity  video")
    for rank, i in enumerate(best, 1):
        print(f"  {rank:>4}  {similar[i]:10.3f}  {for_screen(names[i])}")
    print(f"        {found['mean_similarity']:10.3f}  mean of {counted(len(names), 'video')}")
    print_notes(notes)
    pictures = []
    for i in best:
        record = pack.record(int(samples[np.flatnonzero(owner == i)[0]]))
        # Of a photograph one, not four times the same.
        chosen = np.unique(np.linspace(0, record["frames"] - 1, 4).astype(int))
        frames = pack.frames(record, chosen).numpy()
        seconds = record["start"] + chosen / record["fps"]
        pictures.append((f"similarity {similar[i]:.3f}, {names[i]}", frames, seconds))
    found_in = f"{counted(len(names), 'video')} of {config.data}, by {config.backbone}"
    title = f'"{config.query}": the best {len(best)} of {found_in}'
    picture = contact_sheet_figure(out / "contact_sheet.png", pictures, title)
    print(f"\nfigure   {picture}\nanswer   {for_screen(out)}/search.json", flush=True)
    lock.release(force=True)
    return found


def captioned(pack: Pack, split: str) -> tuple[np.ndarray, list[str]]:
    """The samples of a split whose video has a caption, and sentences a reader must see.

    Raises:
        ValueError: none has.
    """
    notes = []
    if pack.index["splits"]:
        ids = pack.split(split)
    else:
        ids = pack.split("all")
        notes.append("the data name no splits: everything was scored")
    kept = ids[pack.column("captions")[ids] > 0]
    if not len(kept):
        raise ValueError(
            f"no clip of split {split!r} ({len(ids)} in all) has a caption: retrieval is scored "
            "against captions; add a caption column, or give --query to search"
        )
    if len(kept) < len(ids):
        notes.append(f"left out: {counted(len(ids) - len(kept), 'clip')} without a caption")
    return kept, notes


def score(config: Config, model: VideoText, how: Extraction) -> dict:
    """Score both directions on a split; returns what results.json holds."""
    out = Path(config.out or default_folder("retrieval", config.backbone, config.data))
    try_results(out)
    side = packing_side(model.video.input_spec.size)
    pack = open_data(config.data, side, machine=config.machine)
    match_rate(config.backbone, model.video, pack.rates())
    samples, notes = captioned(pack, config.test_split)
    settings = {
        "weights_sha256": weights_hash(model),
        "data_fingerprint": pack.index["fingerprint"],
        "test_split": config.test_split,
        "num_clips": config.num_clips,
        "num_crops": config.num_crops,
        "precision": how.dtype_name,
    }
    lock = claim_results(out, settings)
    names, videos, owner = embed_sources(config, model, pack, samples, how)
    # The clips of a long video share its captions.
    of_video: dict[int, list[str]] = {}
    for sample, video in zip(samples, owner, strict=True):
        of_video.setdefault(int(video), pack.record(int(sample))["captions"])
    captions = [(text, video) for video in range(len(names)) for text in of_video[video]]
    sentences, whose = [c for c, _ in captions], np.array([v for _, v in captions])
    # The same words get the same vector, to the bit, so that they tie.
    different, place = np.unique(same_texts(sentences, model.text.tokenizer), return_inverse=True)
    vectors, num_cut = embed_texts(
        model, [sentences[i] for i in different], how.device, config.machine.precision
    )
    texts = vectors[place]
    if num_cut:
        notes.append(
            f"cut to the text tower's context: {num_cut} of {len(different)} different captions"
        )
    videos_of = np.unique(
        np.stack([place, whose]), axis=1
    )  # of each different caption, once a video
    shared = videos_of.shape[1] - len(different)
    if shared:
        notes.append(
            f"{counted(shared, 'caption')} given before for another video: no model can place all "
            "of its videos first"
        )
    to_video, to_text = retrieval_ranks(texts, videos, whose)
    metrics: dict[str, Metric] = {}
    texts_of = np.bincount(whose, minlength=len(names))
    people = [
        pack.record(int(i))["subject"] for i in samples[np.unique(owner, return_index=True)[1]]
    ]
    groups = people if all_named(people) else np.arange(len(names))
    t2v_ends, v2t_ends = rank_intervals(to_video, to_text, whose, groups, 0)
    about_ends, few = about_intervals(people, "videos")
    notes += few
    for name, ranks, of, chances, ends in (
        ("t2v", to_video, "captions", chance_ranks(np.ones(len(whose), int), len(names)), t2v_ends),
        ("v2t", to_text, "videos", chance_ranks(texts_of, len(whose)), v2t_ends),
    ):
        for key, value in summarise_ranks(ranks).items():
            kind = "rank" if key.endswith("rank") else "fraction"
            metrics[f"{name}_{key}"] = Metric(value, len(ranks), ends[key], chances[key], of, kind)
    described = describe_model(config.backbone, model)
    seen = seen_in_training(described.provenance, config.data, pack.index)
    if seen and (seen == config.test_split or "all" in (seen, config.test_split)):
        notes.append(f"WARNING: the towers were trained on these very videos (split {seen})")
    protocol = {
        "kind": "retrieval", "test_split": config.test_split, "num_videos": len(names),
        "num_captions": len(sentences),
        "num_clips": config.num_clips, "num_crops": config.num_crops,
    }  # fmt: skip
    details: dict[str, dict[str, Any]] = {
        "views": describe_views(model.video.input_spec, how, POOLING), "interval": about_ends,
        "ranking": {
            "similarity": "cosine, exact", "ties": "average place",
            "several_captions": "each is a query; of a video's own the best-placed counts, and "
            "they are no rivals",
            "chance": "a random order",
        },
    }  # fmt: skip
    data = Data(config.data, pack.index["fingerprint"], config.test_split, len(names), len(samples))
    results = build_results(
        "retrieval",
        data,
        described,
        protocol,
        settings,
        metrics,
        None,
        versions(how.device, how.dtype_name),
        notes,
        details,
    )
    written = publish(out, results)
    print()
    print_table("done", written)
    lock.release(force=True)
    return results.as_dict()


def main(config: Config) -> dict:
    """Score a data set or search it."""
    how = start_extraction(config.machine, config.num_clips, config.num_crops, config.batch_size)
    model = load_video_text(config.backbone)
    return score(config, model, how) if config.query is None else search(config, model, how)


if __name__ == "__main__":
    command(main)
