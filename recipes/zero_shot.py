"""Classify videos by the names of the classes, with no training.

    python recipes/zero_shot.py --backbone runs/clip-tiny/backbone --data synthetic
    python recipes/zero_shot.py --backbone RUN/backbone --video clip.mp4 --classes "walks, sits"
    python recipes/zero_shot.py --backbone open_clip:ViT-B-32/laion2b_s34b_b79k --data clips.csv

On a data set the classes are those of its labels (or --classes); every class name is put into every
template of a set, the unit vectors of the sentences are averaged and normalised (Radford et al.
2021, https://arxiv.org/abs/2103.00020), and the nearest one is predicted. How much the wording
decides is measured too: the accuracy of every single template is printed beside that of their
ensemble. Nothing is fitted, so only the tested split is read. Written: results.json, CARD.md,
confusion.png, predictions.csv, scores.csv (of every class).

On one file, a ranked table and a filmstrip.
"""

import dataclasses
import tempfile
from pathlib import Path

import pretrain.threads  # noqa: F401 (before torch)

import numpy as np

from downstream.features import Extraction, cached_embeddings, embed_now, start_extraction
from downstream.fusion import scored, scores_csv, write_scores
from downstream.metrics import softmax, topk_hits
from downstream.models import load_video_text, match_rate
from downstream.report import filmstrip_figure, publish
from downstream.results import (
    Predictions,
    Results,
    accuracies,
    build_results,
    claim_results,
    default_folder,
    describe_data,
    describe_model,
    describe_views,
    seen_in_training,
    try_results,
    versions,
)
from downstream.splits import Videos, labelled_videos, videos_digest
from downstream.zero_shot import (
    POOLING,
    class_vectors,
    ensemble,
    template_sensitivity,
    texts_of_labels,
    unit,
    warn_of_unseen,
)
from pretrain.clip import VideoText
from pretrain.data.cache import open_data, pack_file, packing_side
from pretrain.data.shards import Pack
from pretrain.files import is_file, no_file
from pretrain.folders import claim
from pretrain.log import print_notes, print_table, write_json
from pretrain.names import counted, file_name, first_of, for_screen
from pretrain.prompts import load_classes, load_templates, refuse_same_words, same_words, words_of
from pretrain.weights import weights_hash
from recipes.options.zero_shot import Config, command

# ------------------------------------------------------------------------------------ the classes


def classes_of_data(
    config: Config, pack: Pack, videos: Videos
) -> tuple[list[str], list[str], bool]:
    """Names and words of the classes to choose from, and whether data or user gave the words.

    Raises:
        ValueError: a video's label is not among --classes, or there are fewer than two classes.
    """
    named = set(videos.known_labels)
    if config.classes:
        words = load_classes(config.classes)
        # "sit down" on the command line is the label sit_down.
        listed = {same_words(name) for name in words}
        missing = sorted(n for n in named if same_words(n) not in listed)
        if missing:
            raise ValueError(
                f"--classes lacks {len(missing)} of the {len(named)} labels of the videos: "
                f"{first_of(missing, 10)}"
            )
        theirs = {same_words(n): n for n in named}
        names = [theirs.get(same_words(name), name) for name in words]
        texts, given = list(words.values()), True
    else:
        names = sorted(set(pack.classes) | named)
        written = texts_of_labels(pack)
        given = bool(written)
        texts = [written.get(name) or words_of(name) for name in names]
        refuse_same_words(dict(zip(names, texts, strict=True)), lambda name: pack.where(label=name))
    if len(names) < 2:
        raise ValueError(f"the only class is {names[0]!r}: give at least two")
    return names, texts, given


def refuse_confusion(config: Config) -> None:
    """Refuse flags that contradict each other.

    Raises:
        ValueError: they do.
    """
    if bool(config.data) == bool(config.video):
        raise ValueError(
            "give either --data, to score a data set, or --video, to classify one file"
        )
    if config.video and not config.classes:
        raise ValueError('--video needs --classes, such as --classes "drinking water, reading"')


# ------------------------------------------------------------------------------------- one video


def classify_video(config: Config, model: VideoText, how: Extraction) -> dict:
    """Rank the classes for one file, draw its filmstrip, and return what was printed.

    Raises:
        ValueError: the file, its classes, templates or --out cannot be used.
    """
    assert config.video and config.classes  # `refuse_confusion`
    path = Path(config.video)
    if not is_file(path):
        raise ValueError(f"--video {config.video}: {no_file(path)}")
    words = load_classes(config.classes)
    if len(words) < 2:
        raise ValueError(f"--classes names only {next(iter(words))!r}: give at least two")
    templates = load_templates(
        "openai_kinetics" if config.templates == "auto" else config.templates
    )
    out = Path(config.out or f"runs/zero-shot-{file_name(path.stem)}")
    lock = claim(out, ("prediction.json", "filmstrip.png"))
    with tempfile.TemporaryDirectory() as folder:
        side = packing_side(model.video.input_spec.size)
        pack = pack_file(path, Path(folder) / "pack", side)
        match_rate(config.backbone, model.video, pack.rates())
        samples = np.arange(len(pack))
        embedding = unit(embed_now(model, pack, samples, how).mean(0))
        vectors, num_cut = class_vectors(
            model, list(words.values()), templates, how.device, config.machine.precision
        )
        scale = model.scale().item()
        logits = scale * (ensemble(vectors) @ embedding)
        probabilities = softmax(logits)
        order = np.argsort(-logits, kind="stable")
        names = list(words)
        result = {
            "video": str(path),
            "ranking": [{"class": names[i], "probability": float(probabilities[i])} for i in order],
        }
        write_json(out / "prediction.json", result)  # before the picture, which may fail
        records = list(pack.records())
        best = order[:5]
        picture = filmstrip_figure(
            out / "filmstrip.png", filmstrip_frames(pack, records), [names[i] for i in best],
            probabilities[best],
            f"{path.name}, by {config.backbone}: the best {len(best)} of {len(names)} classes",
        )  # fmt: skip
    seconds = sum(r["frames"] / r["fps"] for r in records)
    print(
        f"\n{for_screen(path.name)}: {seconds:.1f} s in {counted(len(records), 'clip')}, "
        f"{counted(len(templates), 'template')}"
    )
    shown = [for_screen(name, 60) for name in names]
    width = max(map(len, shown))
    for i in order:
        bar = "#" * round(30 * probabilities[i])
        print(f"  {shown[i]:<{width}}  {probabilities[i]:6.1%}  {bar}")
    print("  (probabilities among these classes only)")
    print_notes(warn_of_unseen(model, list(words.values())))
    if num_cut:
        print(f"note: cut to the text tower's context: {counted(num_cut, 'sentence')}")
    print(f"\nfigure   {picture}\nanswer   {for_screen(out)}/prediction.json", flush=True)
    lock.release(force=True)
    return result


def filmstrip_frames(
    pack: Pack, records: list[dict], num: int = 8
) -> list[tuple[float, np.ndarray]]:
    """Frames spread evenly over a packed video: (second, uint8 (H, W, 3)) of each."""
    lengths = np.array([r["frames"] for r in records])
    ends = np.cumsum(lengths)
    picked = np.unique(np.linspace(0, ends[-1] - 1, num).astype(int))
    shown = []
    for place in picked:
        i = int(np.searchsorted(ends, place, side="right"))
        frame = int(place - (ends[i] - lengths[i]))
        image = pack.frames(records[i], np.array([frame]))[0].numpy()
        shown.append((records[i]["start"] + frame / records[i]["fps"], image))
    return shown


# ------------------------------------------------------------------------------------ a data set


def print_details(results: Results) -> None:
    """Classes and templates, for a person."""
    classes = sorted(results.per_class.items(), key=lambda item: item[1].accuracy)
    width = max(len(for_screen(name, 60)) for name, _ in classes)
    shown = classes if len(classes) <= 30 else [*classes[:15], *classes[-5:]]
    print("\nper class, worst first" + (" (15 worst, 5 best)" if shown is not classes else ""))
    for name, entry in shown:
        other = entry.most_confused
        taken = f", most often taken for {for_screen(other, 60)}" if other else ""
        score = f"{100 * entry.accuracy:5.1f} % of {entry.num}{taken}"
        print(f"  {for_screen(name, 60):<{width}}  {score}")
    templates, over = (
        results.details[f"accuracy_{n}"] for n in ("of_each_template", "over_templates")
    )
    if len(templates) > 1:
        print(
            f"\nprompt sensitivity over {len(templates)} templates: single ones "
            f"{100 * over['worst']:.1f} to {100 * over['best']:.1f} %, mean "
            f"{100 * over['mean']:.1f} %, "
            f"std {100 * over['std']:.1f}; together {100 * over['ensemble']:.1f} % "
            f"({100 * over['gain']:+z.1f})"
        )
        ranked = sorted(templates.items(), key=lambda item: -item[1])
        for text, value in (ranked[0], ranked[-1]):
            print(f"  {100 * value:5.1f} %  {text!r}")


def on_training(provenance: dict | str, seen: str, test_split: str) -> list[str]:
    """What a reader must know of towers that were trained on the split `seen` of these data."""
    same = seen == test_split or "all" in (seen, test_split)
    about = "WARNING: these very videos" if same else "other videos, but of the same data"
    notes = [f"the towers were trained on the captions of split {seen!r} of these data: {about}"]
    trained = provenance.get("config") if isinstance(provenance, dict) else None
    if isinstance(trained, dict) and "label" in (trained.get("text"), trained.get("positives")):
        notes.append(
            "training used the class labels, as texts or to tell which captions mean the same: "
            "these classes are not unseen" + ", only these videos are" * (not same)
        )
    return notes


def score_data(config: Config, model: VideoText, how: Extraction) -> dict:
    """Score the labelled videos of a split; returns what results.json holds."""
    assert config.data  # `refuse_confusion`
    out = Path(config.out or default_folder("zero-shot", config.backbone, config.data))
    try_results(out)
    side = packing_side(model.video.input_spec.size)
    pack = open_data(config.data, side, machine=config.machine, labels=True)
    match_rate(config.backbone, model.video, pack.rates())
    videos, notes = labelled_videos(pack, config.test_split)
    classes, words, given = classes_of_data(config, pack, videos)
    notes += warn_of_unseen(model, words)
    auto = "third_person" if given and not config.classes else "openai_kinetics"
    template_set = auto if config.templates == "auto" else config.templates
    templates = load_templates(template_set)
    settings = {
        "weights_sha256": weights_hash(model), "data_fingerprint": pack.index["fingerprint"],
        "test_split": config.test_split, "classes": dict(zip(classes, words, strict=True)),
        "templates": list(templates), "num_clips": config.num_clips, "num_crops": config.num_crops,
        "precision": how.dtype_name, "seed": config.seed,
    }  # fmt: skip
    lock = claim_results(out, settings)

    # ---- embed
    print(
        for_screen(
            f"{config.backbone}: {counted(len(videos), 'video')} of {config.data} "
            f"({config.test_split}), {counted(len(classes), 'class')}, "
            f"{counted(len(templates), 'template')} ({template_set})"
        ),
        flush=True,
    )
    clips = cached_embeddings(model, pack, videos.samples, how, "videos")
    embeddings = unit(videos.average(clips))
    vectors, num_cut = class_vectors(model, words, templates, how.device, config.machine.precision)
    if num_cut:
        notes.append(
            f"cut to the text tower's context: {num_cut} of the "
            f"{vectors.shape[0] * vectors.shape[1]} sentences"
        )

    # ---- score
    labels = videos.numbers(classes)
    scores = embeddings @ ensemble(vectors).T
    said = Predictions(classes, labels, scores.argmax(1), videos.subjects, scores, videos.sources)
    both = {}
    if len(classes) > 5:
        hits = [topk_hits(scores, labels, k) for k in (1, 5)]
        both["mean_top1_top5"] = np.mean(hits, axis=0)
    metrics, interval, more = accuracies(said, config.seed, hits=both)
    for name in both:  # of guessing, three times that of top-1
        metrics[name] = dataclasses.replace(metrics[name], chance=3 / len(classes))
    over_templates = template_sensitivity(embeddings, vectors, labels, templates)
    described = describe_model(config.backbone, model)
    provenance = described.provenance
    if seen := seen_in_training(provenance, config.data, pack.index):
        notes += on_training(provenance, seen, config.test_split)
    protocol = {
        "kind": "zero-shot", "videos": videos_digest(videos), "test_split": config.test_split,
        "num_test": len(videos),
        "template_set": template_set, "words": settings["classes"], "num_clips": config.num_clips,
        "num_crops": config.num_crops,
    }  # fmt: skip
    details = {
        "views": describe_views(model.video.input_spec, how, POOLING),
        "prompts": {
            "template_set": template_set, "num_templates": len(templates),
            "averaging": "mean of the sentences' unit vectors, then normalised",
            "class_words": "given" if given else "made from the class names",
        },
        "interval": interval,
        "accuracy_of_each_template": over_templates.pop("per_template"),
        "accuracy_over_templates": over_templates,
    }  # fmt: skip
    data = describe_data(config.data, pack, None, (config.test_split, videos), classes)
    results = build_results(
        "zero_shot", data, described, protocol, settings, metrics, config.seed,
        versions(how.device, how.dtype_name), [*notes, *more], details, said,
    )  # fmt: skip
    probabilities = softmax(model.scale().item() * scores.astype(np.float64))
    saved = scores_csv({"test": scored(videos, probabilities)}, classes, results)
    written = publish(out, results, said) | {"scores": write_scores(out, saved)}
    print_details(results)
    print()
    print_table("done", written)
    lock.release(force=True)
    return results.as_dict()


# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> dict:
    """Score a data set or classify one video."""
    refuse_confusion(config)
    how = start_extraction(config.machine, config.num_clips, config.num_crops, config.batch_size)
    model = load_video_text(config.backbone)
    return classify_video(config, model, how) if config.video else score_data(config, model, how)


if __name__ == "__main__":
    command(main)
