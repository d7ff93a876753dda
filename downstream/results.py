"""results.json, with one schema for all recipes that score, and CARD.md, which is made from it."""

import dataclasses
import json
import math
import platform
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from filelock import FileLock
from torch import nn

from downstream.features import Extraction
from downstream.metrics import (
    RESAMPLES,
    all_named,
    bootstrap_intervals,
    confusion_matrix,
    mean_class_accuracy,
    per_class_accuracy,
    reversed_pairs_accuracy,
    topk_hits,
)
from downstream.splits import Videos
from pretrain.backbones import provenance_of
from pretrain.data.shards import Pack
from pretrain.device import describe
from pretrain.files import is_file, is_folder, is_there, read_json
from pretrain.flags import Count, Fraction, Seed, Whole, Within
from pretrain.folders import claim, refuse_others, try_folder
from pretrain.names import counted, file_name, for_screen
from pretrain.spec import InputSpec, Rebuildable
from pretrain.weights import weights_hash

FORMAT = "muybridge-results-1"
PACKAGES = ("torch", "numpy", "scikit-learn", "av", "safetensors")
# The recipes that score: name -> what a title says.
RECIPES = {
    "linear_probe": "Frozen probe",
    "fit": "Frozen probe, cross-validated",
    "finetune": "Fine-tuning",
    "zero_shot": "Zero-shot classification",
    "retrieval": "Retrieval",
    "fuse": "Late fusion (mean of probabilities)",
    "detect": "Events",
}
FEW = 10  # people, or videos, below which a bootstrap's interval is called rough
ROUGH = "the 95 % intervals are rough"


@dataclass(frozen=True)
class Metric:
    """A measured number, with its interval and chance level.

    Attributes:
        value: a fraction, or a rank.
        n: of how many.
        of: what they are: "videos", "frames" or "captions".
        interval: the ends of its 95 % interval.
        chance: what guessing gives.
        unit: "fraction", shown in per cent, or "rank".
    """

    value: float
    n: Count
    interval: tuple[float, float] | None = None
    chance: float | None = None
    of: str = "videos"
    unit: str = "fraction"


@dataclass(frozen=True)
class Data:
    """The data of a score; numbers of videos are those with a label (for retrieval: a caption).

    Attributes:
        name: as the user gave it.
        fingerprint: of the pack.
        test_split: what was scored.
        num_test: its videos.
        num_clips: the clips they were cut into.
        num_classes: that there are.
        train_split: what a classifier learned from; None: nothing was fitted.
        num_train: its videos.
        train_subjects: people in it, where known; likewise in the next.
        test_subjects: people scored.
        subjects_in_both: people in both.
        videos_in_both: videos in both.
    """

    name: str
    fingerprint: str
    test_split: str
    num_test: Count
    num_clips: Count
    num_classes: Count | None = None
    train_split: str | None = None
    num_train: Count | None = None
    train_subjects: Count | None = None
    test_subjects: Count | None = None
    subjects_in_both: Whole = 0
    videos_in_both: Whole = 0


@dataclass(frozen=True)
class Model:
    """The evaluated model: a backbone, a pair of towers or a classifier.

    Attributes:
        name: as the user gave it.
        weights_sha256: hash of all weights.
        parameters: their number.
        arguments: what rebuilds it.
        provenance: where the weights come from: what an exported folder says, or a word.
        flops: operations of one clip, where counted.
    """

    name: str
    weights_sha256: str
    parameters: Whole
    arguments: dict[str, Any]
    provenance: dict[str, Any] | str
    flops: Whole | None = None


@dataclass(frozen=True)
class ClassScore:
    """The score of one class.

    Attributes:
        accuracy: fraction recognised.
        num: its videos, or frames.
        most_confused: the class it is most often taken for; None if it never is.
    """

    accuracy: Fraction
    num: Count
    most_confused: str | None


@dataclass(frozen=True)
class Results:
    """All that a recipe found and how.

    Attributes:
        recipe: its name, in `RECIPES`.
        data: what was scored.
        model: what was measured.
        protocol: what has to be equal before two numbers may stand side by side; its `kind` is a
            word.
        settings: what decides the numbers.
        metrics: name -> number; the first is the headline.
        seed: of all that was drawn; None: nothing was.
        command: the command line.
        versions: of the software, the device and its precision.
        notes: sentences a reader must see first.
        details: section -> name -> value, of this recipe alone.
        per_class: class -> its score.
    """

    recipe: str
    data: Data
    model: Model
    protocol: dict[str, Any]
    settings: dict[str, Any]
    metrics: dict[str, Metric]
    seed: Seed | None
    command: str
    versions: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    per_class: dict[str, ClassScore] = field(default_factory=dict)

    def value(self, name: str) -> float | None:
        """The value of a metric; None where it was not measured."""
        return self.metrics[name].value if name in self.metrics else None

    def detail(self, section: str, name: str) -> float | None:
        """A number of the details that is not negative; None where it was not measured.

        Raises:
            ValueError: it is something else, such as a person wrote there.
        """
        value = self.details.get(section, {}).get(name)
        if value is None or (type(value) in (int, float) and Within(0).holds(value)):
            return value
        raise ValueError(
            f"{self.model.name}: {name} of {section} is {value!r:.60}, not a number of at least 0"
        )

    @property
    def summary(self) -> dict[str, Any]:
        """The plain values at the top of results.json, whose names stay.

        Every metric (`top5` is null where there are five classes or fewer), `chance`, `num_test`
        and, of a zero-shot score, `templates`: the accuracy of each.
        """
        values: dict[str, Any] = {n: m.value for n, m in self.metrics.items()}
        if "top1" in values:
            values.setdefault("top5", None)
        headline = next(iter(self.metrics.values()))
        values |= {"chance": headline.chance, "num_test": self.data.num_test}
        if "accuracy_of_each_template" in self.details:
            values["templates"] = self.details["accuracy_of_each_template"]
        return values

    def as_dict(self) -> dict:
        """The content of results.json."""
        whole = {"format": FORMAT, **self.summary, **dataclasses.asdict(self)}
        return json.loads(json.dumps(whole))


# ---- making them


def describe_data(
    name: str, pack: Pack, train: tuple[str, Videos] | None, test: tuple[str, Videos],
    classes: list[str],
) -> Data:  # fmt: skip
    """The data of a score.

    Args:
        name: as the user gave it.
        pack: where it is.
        train: name and videos of the split learned from.
        test: of that scored.
        classes: that there are.
    """
    split, videos = test
    about = Data(
        name, pack.index["fingerprint"], split, len(videos), len(videos.samples), len(classes),
        test_subjects=len(_people(videos)) or None,
    )  # fmt: skip
    if train is None:
        return about
    return dataclasses.replace(
        about, train_split=train[0], num_train=len(train[1]),
        train_subjects=len(_people(train[1])) or None,
        subjects_in_both=len(_people(train[1]) & _people(videos)),
        videos_in_both=len(set(train[1].sources) & set(videos.sources)),
    )  # fmt: skip


def _people(videos: Videos) -> set[str]:
    return {subject for subject in videos.subjects if subject is not None}


def describe_model(name: str, model: nn.Module) -> Model:
    """A model as `--backbone` names it, for its results."""
    parameters = sum(p.numel() for p in model.parameters())
    assert isinstance(model, Rebuildable)
    return Model(name, weights_hash(model), parameters, model.arguments, provenance_of(name))


@dataclass(frozen=True)
class Predictions:
    """Predictions of a classifier on a test split. N: videos, or labelled frames.

    Attributes:
        classes: names of the K classes.
        truth: (N,) class numbers.
        predicted: (N,) likewise.
        subjects: (N,) who is seen, where known; of frames perhaps whose video they are of, see
            `named`.
        scores: (N, K); None: only the best class of each is kept.
        sources: (N,) names of the videos; None: frames, of which no list is written.
        unit: what was classified: "videos" or "frames".
        more: further numbers between 0 and 1, by name.
        named: what `subjects` names: "subjects" or, of frames whose people are not known, "videos".
    """

    classes: list[str]
    truth: np.ndarray
    predicted: np.ndarray
    subjects: list[str | None]
    scores: np.ndarray | None = None
    sources: list[str] | None = None
    unit: str = "videos"
    more: dict[str, float] = field(default_factory=dict)
    named: str = "subjects"

    @property
    def counts(self) -> np.ndarray:
        """Confusion matrix (K, K): row = true class, column = predicted class."""
        return confusion_matrix(self.truth, self.predicted, len(self.classes))


def top1_of(said: Predictions, predicted: np.ndarray, seed: int) -> Metric:
    """Top-1 accuracy of other predictions (N,) of the same videos, with its interval.

    Args:
        said: truth, subjects and classes.
        predicted: class numbers.
        seed: of the bootstrap.
    """
    ends, _ = bootstrap_intervals(said.truth, predicted, said.subjects, seed, {})
    value = float((predicted == said.truth).mean())
    return Metric(value, len(said.truth), ends["top1"], 1 / len(said.classes))


def accuracies(
    said: Predictions,
    seed: int,
    train_counts: np.ndarray | None = None,
    hits: Mapping[str, np.ndarray] = types.MappingProxyType({}),
) -> tuple[dict[str, Metric], dict[str, Any], list[str]]:
    """Metrics of every classifier.

    They are top-1, top-5 where there are more than five classes, mean class accuracy, the
    synthetic dataset's pairs of actions that differ in order only, and what the most frequent class
    of the training split gives.

    Args:
        said: the predictions.
        seed: of the bootstrap.
        train_counts: (K,) how often each class occurs in training; None: nothing was fitted.
        hits: further scores, each the mean over the videos of what is here (N,), of chance 1 / K.

    Returns:
        the metrics, what the intervals are, and sentences that a reader must see: few people, or
        the same prediction for everything.
    """
    truth, predicted, classes, unit = said.truth, said.predicted, said.classes, said.unit
    num, chance = len(truth), 1 / len(classes)
    top5 = {}
    if said.scores is not None and len(classes) > 5:  # else the five best hold every class
        top5 = {"top5": topk_hits(said.scores, truth, 5)}
    ends, _ = bootstrap_intervals(truth, predicted, said.subjects, seed, {**top5, **hits})
    one = lambda name, value, guessed=chance: Metric(float(value), num, ends[name], guessed, unit)
    metrics = {"top1": one("top1", (truth == predicted).mean())}
    metrics |= {name: one(name, values.mean(), 5 * chance) for name, values in top5.items()}
    mean = mean_class_accuracy(truth, predicted)
    metrics["mean_class_accuracy"] = one("mean_class_accuracy", mean)
    metrics |= {name: one(name, values.mean()) for name, values in hits.items()}
    if said.scores is not None:
        pairs = reversed_pairs_accuracy(said.scores, truth, classes)
        if pairs is not None:
            metrics["reversed_pairs"] = Metric(pairs, num, chance=0.5, of=unit)
    if train_counts is not None:
        most = float((truth == train_counts.argmax()).mean())
        metrics["majority"] = Metric(most, num, of=unit)
    about, notes = about_intervals(said.subjects, unit, said.named)
    if len(set(truth)) > 1 and len(set(predicted)) == 1:
        notes.append(
            f"all {num} {unit} were taken for one class, {classes[predicted[0]]!r}: this model "
            "does not distinguish these classes"
        )
    return metrics, about, notes


def about_intervals(
    subjects: Sequence[str | None], unit: str, named: str = "subjects"
) -> tuple[dict[str, Any], list[str]]:
    """What 95 % intervals rest on, for the card, and a sentence if these are few.

    Args:
        subjects: who is seen in each video.
        unit: what is drawn where people cannot be.
        named: what `subjects` names.
    """
    people = all_named(subjects)
    groups, drawn = (len(set(subjects)), named) if people else (len(subjects), unit)
    about = {
        "kind": "95 % percentile bootstrap; of 0 and 100 % exact binomial", "resamples": RESAMPLES
    }  # fmt: skip
    about |= {"resampled": drawn, "groups": groups}
    if drawn not in ("subjects", "source files"):  # else too narrow: people are like themselves
        alone = named == "subjects" and None not in subjects
        about["people"] = "all are of one person" if alone else "not all have a `subject`"
    if groups >= FEW:
        return about, []
    who = "person" if drawn == "subjects" else drawn.removesuffix("s")
    return about, [f"{ROUGH}: they rest on {counted(groups, who)} only"]


def describe_views(spec: InputSpec, how: Extraction, pooling: str) -> dict[str, Any]:
    """The section `views` of a card: what of a clip a model was shown.

    Args:
        spec: the model's clip.
        how: views of it.
        pooling: how embeddings or predictions of views become one, in words.
    """
    return {
        "frames": spec.frames, "sampling": spec.pace, "stride": spec.stride, "size": spec.size,
        "subtract_mean": spec.subtracts_mean, "num_clips": how.num_clips,
        "num_crops": how.num_crops, "pooling": pooling,
    }  # fmt: skip


def build_results(
    recipe: str, data: Data, model: Model, protocol: dict[str, Any], settings: dict[str, Any],
    metrics: dict[str, Metric], seed: int | None, software: dict[str, Any], notes: list[str],
    details: dict[str, dict[str, Any]], said: Predictions | None = None,
) -> Results:  # fmt: skip
    """The results of a recipe that scores, as this process computed them.

    Args:
        recipe: see `Results`, likewise what is not explained here.
        data: see there.
        model: see there.
        protocol: see there.
        settings: see there.
        metrics: see there.
        seed: see there.
        software: of `versions`.
        notes: see there.
        details: see there.
        said: of a classifier, what it predicted.
    """
    assert recipe in RECIPES
    per_class = {} if said is None else per_class_accuracy(said.counts, said.classes)
    return Results(
        recipe, data, model, protocol, settings, metrics, seed, " ".join(sys.argv),
        software, notes, details,
        {name: ClassScore(**score) for name, score in per_class.items()},
    )  # fmt: skip


def seen_in_training(provenance: dict | str, name: str, index: dict) -> str | None:
    """Which split of these data a backbone was trained on, as its export says; None: of none.

    Args:
        provenance: of the backbone.
        name: of the data, as the user gave it.
        index: of their pack; one without splits was trained on whole, whatever split was asked for.
    """
    if not isinstance(provenance, dict):
        return None
    data = provenance.get("data")
    named = name in ([data] if isinstance(data, str) else data if isinstance(data, list) else [])
    if not named and provenance.get("data_fingerprint") != index["fingerprint"]:
        return None
    return str(provenance.get("split") or "all") if index["splits"] else "all"


def versions(device: torch.device, precision: str) -> dict[str, str | None]:
    """Versions of what computed a number, this project's commit where known, and the device."""
    root = Path(__file__).resolve().parents[1]
    commit = None
    if (root / ".git").exists():
        try:
            git = ["git", "-C", str(root)]
            run = partial(subprocess.run, capture_output=True, text=True, check=True, timeout=20)
            commit = run([*git, "rev-parse", "HEAD"]).stdout.strip()
            if run([*git, "status", "--porcelain", "--untracked-files=no"]).stdout.strip():
                commit += " with uncommitted changes"
        except (OSError, subprocess.SubprocessError):
            commit = None  # no git here, or a repository without a commit
    return {
        "commit": commit,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "device": describe(device),
        "precision": precision,
    }


# ---- the folder


def data_name(data: str) -> str:
    """What some data are called in the name of a folder; `data` as the user named them."""
    source = Path(data)
    if is_file(source):  # a list's own name is often just clips.csv
        return f"{source.resolve().parent.name}-{source.stem}"
    return source.resolve().name if is_there(source) else data


def default_folder(kind: str, backbone: str, data: str) -> Path:
    """Where results go by default: beside an exported backbone, else in runs/.

    Args:
        kind: what was measured, such as "probe".
        backbone: as the user named it.
        data: likewise.
    """
    name = data_name(data)
    if is_folder(backbone):
        given = Path(backbone)
        # Relative where the user's path is; only the folder above `.` and `..` has another name.
        beside = given.parent if given.name not in ("", "..") else given.resolve().parent
        return beside / f"{kind}-{file_name(name)}"
    return Path("runs") / f"{kind}-{file_name(backbone)}-{file_name(name)}"


def try_results(out: Path) -> None:
    """Find out early whether a folder may hold results; `claim_results` knows more, and later.

    Raises:
        ValueError: it holds something else, or cannot be written to.
    """
    try_folder(out)
    if not (out / "results.json").is_file():
        refuse_others(out)


def claim_results(out: Path, settings: dict) -> FileLock:
    """Take `out` for results, unless it holds some of other settings or anything else.

    Args:
        out: where results are to go.
        settings: as `Results` has them.

    Returns:
        the lock that keeps others from writing there, to be released when all is written.

    Raises:
        ValueError: the folder holds something else, cannot be written to, or another process has
            it.
    """
    _refuse_other_results(out, settings)
    lock = claim(out)
    _refuse_other_results(out, settings)  # it may have changed before it was ours
    return lock


def _refuse_other_results(out: Path, settings: dict) -> None:
    if not (out / "results.json").is_file():
        refuse_others(out)
        return
    try:
        old = read_results(out).settings
    except OldResultsError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{out} holds other files: give another folder with --out, or remove it ({error})"
        ) from error
    differences = _differences(old, json.loads(json.dumps(settings)))
    if differences:
        raise ValueError(
            f"{out} holds results of other settings ({'; '.join(differences)}): give another "
            "folder with --out, or remove it"
        )


def _differences(old: dict, new: dict) -> list[str]:
    """What differs between two groups of settings, by name; of inner groups only what differs."""
    differences = []
    for name in sorted(new.keys() | old.keys()):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            differences += _differences(before, now)
        elif before != now:
            differences.append(f"{name} was {before!r:.200}, is {now!r:.200}")
    return differences


# ---- reading


class OldResultsError(ValueError):
    """The results are those of a version before `FORMAT`."""


def read_results(folder: Path) -> Results:
    """The results.json of a folder, every field of its kind and none too many.

    Raises:
        OldResultsError: an older version wrote it; the message says how to renew it.
        ValueError: there is none, or it is not one.
    """
    path = folder / "results.json"
    content = read_json(path)
    if "format" not in content and isinstance(content.get("card"), dict):
        about = content["card"].get("software")
        old = about.get("command") if isinstance(about, dict) else None
        again = f": python {for_screen(old, 500)}" if isinstance(old, str) else ""
        raise OldResultsError(
            f"{path} is of an older version, which wrote another form: give another folder with "
            f"--out, or remove this one, and run its command again{again}"
        )
    if content.get("format") != FORMAT:
        found = str(content.get("format"))[:60]
        raise ValueError(f"{path} has the format {found!r}, and this version reads {FORMAT!r}")
    names = {field.name for field in dataclasses.fields(Results)}
    results = _typed(Results, {n: v for n, v in content.items() if n in names}, str(path))
    if results.recipe not in RECIPES:
        known = ", ".join(RECIPES)
        raise ValueError(f"{path}: the recipe {results.recipe!r:.60} is none of {known}")
    if not isinstance(results.protocol.get("kind"), str):
        raise ValueError(f"{path}: its protocol names no kind")
    if not results.metrics:
        raise ValueError(f"{path} holds no metric")
    bounds = {"fraction": Within(0, 1), "rank": Within(1)}
    for name, metric in results.metrics.items():
        low, high = metric.interval or (metric.value, metric.value)
        chance = metric.value if metric.chance is None else metric.chance
        within = bounds.get(metric.unit)
        if (
            not within
            or low > high
            or not all(map(within.holds, (metric.value, low, high, chance)))
        ):
            raise ValueError(f"{path}: the metric {name!r:.60} is none: {str(metric)[:200]}")
    summary = {n: v for n, v in content.items() if n not in names | {"format"}}
    if summary != results.summary:
        odd = next(n for n in summary | results.summary if summary.get(n) != results.summary.get(n))
        raise ValueError(
            f"{path}: {odd!r:.60} at its top is not what its metrics say: it was changed by hand"
        )
    return results


def _typed(kind: Any, value: Any, where: str) -> Any:
    """A value out of JSON as what a type hint says, or a ValueError."""
    arguments, origin = get_args(kind), get_origin(kind)
    if origin is Annotated:
        number = _typed(arguments[0], value, where)
        for bounds in (a for a in arguments[1:] if isinstance(a, Within)):
            if not bounds.holds(number):
                raise ValueError(f"{where} is {number:g}: it has to be {bounds}")
        return number
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind, include_extras=True)
        if odd := sorted(hints.keys() ^ value.keys()):
            what = "no" if odd[0] in hints else "an unknown"
            raise ValueError(f"{where} has {what} {odd[0]!r:.60}")
        found = {name: _typed(hints[name], value[name], f"{where}: {name}") for name in hints}
        return kind(**found)
    if origin in (types.UnionType, tuple) and isinstance(value, list) and origin is tuple:
        if len(value) == len(arguments):
            return tuple(_typed(k, v, where) for k, v in zip(arguments, value, strict=True))
    elif origin in (types.UnionType, Union):  # the second where a part has bounds
        for option in arguments:
            try:
                return _typed(option, value, where)
            except ValueError:
                continue
    elif origin is dict and isinstance(value, dict):
        return {k: _typed(arguments[1], v, f"{where}: {k!r:.60}") for k, v in value.items()}
    elif origin is list and isinstance(value, list):
        return [_typed(arguments[0], v, where) for v in value]
    elif kind is Any or (kind is types.NoneType and value is None):
        return value
    elif kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif kind in (str, int, bool) and type(value) is kind:
        return value
    raise ValueError(f"{where} is {str(value)[:60]!r}, which is not what it has to be")
