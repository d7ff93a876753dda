"""Late fusion: class scores that runs saved, read with care, brought into one order and combined.

A run may be in folds, such as one for each person left out: then every fold is fused by itself, and
the folds' test videos are pooled. N videos, C classes, R runs.

The scores of a run are class probabilities, averaged over views and clips. Their logarithms are the
logits up to a constant of each video, which decides nothing, where one view of one clip was scored;
else they are the logarithms of the mean.
"""

import csv
import dataclasses
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from downstream.metrics import topk_accuracy
from downstream.results import ROUGH, Data, Results, read_results
from downstream.splits import Videos
from pretrain.files import (
    is_folder,
    is_there,
    read_limited,
    reading,
    replacing,
    write_synced,
)
from pretrain.folders import writing
from pretrain.names import counted, for_csv, for_screen, from_csv
from pretrain.settings import Machine, RunSettings

NAME = "scores.csv"
COLUMNS = ["part", "source", "subject", "label"]  # and then one a class
PARTS = ("val", "test")
MAX_SCORES = 2**29  # bytes: 100,000 videos of 400 classes
SMALLEST = float(np.finfo(np.float32).tiny)  # a probability of zero has no logarithm
ROUNDS = 1000  # of the weights' fit
MAX_FOLDS = 1000
# In what the settings of a run's folds may differ: which part of the data, where, and the machine.
OF_A_FOLD = {
    "leave_out", "data", "data_fingerprint", "train_split", "test_split", "out", "backbone",
    "weights", "weights_sha256", *(f.name for f in dataclasses.fields(Machine)),
    *(f.name for f in dataclasses.fields(RunSettings)),
}  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """Class probabilities of some videos.

    Attributes:
        sources: (N,) what the user called each.
        subjects: (N,) who is seen, where known.
        labels: (N,) class names.
        probabilities: (N, C).
    """

    sources: list[str]
    subjects: list[str | None]
    labels: list[str]
    probabilities: np.ndarray


@dataclass(frozen=True)
class Run:
    """A run whose scores are to be fused, or one fold of it.

    Attributes:
        name: of its model, and of its folder where two have one name.
        folder: where it is.
        results: its results.json.
        classes: names of the C classes.
        parts: "test" and, where it has them, "val" -> scores; nothing was fitted on either.
        sha256: of scores.csv.
    """

    name: str
    folder: Path
    results: Results
    classes: list[str]
    parts: dict[str, Scored]
    sha256: str


# ---- saved


def scored(videos: Videos, probabilities: np.ndarray) -> Scored:
    """Scores of labelled videos."""
    return Scored(videos.sources, videos.subjects, videos.known_labels, probabilities)


def scores_csv(parts: dict[str, Scored], classes: list[str], results: Results) -> bytes:
    """What `write_scores` writes: part, video, person, label and the probability of every class.

    Made before the results are written, which are told its hash: another file is not taken for it.

    Args:
        parts: "test" and, where there are videos that nothing was fitted on, "val".
        classes: names of the C classes.
        results: of the run; its details get the hash.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*COLUMNS, *map(for_csv, classes)])
    for part, about in parts.items():
        names = zip(about.sources, about.subjects, about.labels, strict=True)
        for (source, subject, label), row in zip(names, about.probabilities, strict=True):
            cells = map(for_csv, (source, subject or "", label))
            writer.writerow([part, *cells, *(f"{value:.9g}" for value in row)])
    data = text.getvalue().encode()
    results.details["scores"] = {"sha256": hashlib.sha256(data).hexdigest()}
    return data


def write_scores(folder: Path, data: bytes) -> Path:
    """Write the scores of a run to scores.csv, and return the file.

    Raises:
        ValueError: the disk does not take it.
    """
    with writing(folder / NAME), replacing(folder / NAME) as aside:
        write_synced(aside, data)
    return folder / NAME


# ---- read


def read_folds(folders: list[Path]) -> list[list[Run]]:
    """The runs of these folders, fold by fold.

    A folder is a run; or each of its subfolders is the run of one fold, which together test every
    video at most once.

    Returns:
        of every fold the runs in the order of the folders, which can be fused; one fold where the
        folders are runs themselves.

    Raises:
        ValueError: one is given twice, or has no scores; they are damaged; the folds of a run were
            not made alike; or the runs cannot be fused.
    """
    twice = [f for i, f in enumerate(folders) if f.resolve() in [g.resolve() for g in folders[:i]]]
    if twice:
        raise ValueError(f"{twice[0]} is given twice: name different runs")
    runs = [[read_run(fold) for fold in fold_folders(folder)] for folder in folders]
    hashes = [[fold.sha256 for fold in run] for run in runs]
    for i, folder in enumerate(folders):
        if hashes[i] in hashes[:i]:
            raise ValueError(
                f"{folders[hashes.index(hashes[i])]} and {folder} hold the same scores: name "
                "different runs"
            )
    names = [run[0].name for run in runs]
    for i, folder in enumerate(folders):
        _refuse_unlike_folds(runs[i])
        if names.count(names[i]) > 1:
            label = f"{names[i]} ({folder})"
            runs[i] = [dataclasses.replace(fold, name=label) for fold in runs[i]]
    for run in runs[1:]:
        if len(run) > len(runs[0]):  # else some fold of the first finds none
            raise ValueError(
                f"{runs[0][0].name} and {run[0].name} cannot be fused: their folders hold "
                f"{len(runs[0])} and {len(run)} folds, and some would be ignored"
            )
    folds = [[first, *(_same_fold(first, run) for run in runs[1:])] for first in runs[0]]
    for fold in folds:
        refuse_different(fold)
    return folds


def fold_folders(folder: Path) -> list[Path]:
    """The folders of a run's folds, by name; the folder itself where it holds a run.

    Raises:
        ValueError: a fold is not finished, or there are too many.
    """
    if is_there(folder / "results.json") or not is_folder(folder):
        return [folder]
    with reading(folder):
        inner = sorted(path for path in folder.iterdir() if is_folder(path))
    finished = [path for path in inner if is_there(path / "results.json")]
    if not finished:
        return [folder]  # which is no run: reading it says so
    if missing := [path for path in inner if path not in finished]:
        raise ValueError(
            f"{folder} holds runs, one for each fold, and {for_screen(missing[0].name)} in it has "
            "no results.json: finish that run, or move the folder away"
        )
    if len(inner) > MAX_FOLDS:
        raise ValueError(f"{folder} holds {len(inner)} runs: {MAX_FOLDS} folds are the most")
    return inner


def read_run(folder: Path) -> Run:
    """The run, or fold, of a folder.

    Raises:
        ValueError: it has no scores, or is damaged.
    """
    results = read_results(folder)
    run = Run(results.model.name, folder, results, *read_scores(folder))
    _check_alike(run)
    return run


def _refuse_unlike_folds(folds: list[Run]) -> None:
    """Raise ValueError unless the folds are one model, trained in one way, on other videos."""
    first, tested = folds[0], dict.fromkeys(folds[0].parts["test"].sources, folds[0])
    about = lambda run: {
        "recipe": run.results.recipe, "model": run.name, "classes": run.classes,
        "arguments": run.results.model.arguments,
        **{k: v for k, v in run.results.settings.items() if k not in OF_A_FOLD},
    }  # fmt: skip
    mine = about(first)
    for fold in folds[1:]:
        theirs = about(fold)
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise ValueError(
                    f"{first.folder} and {fold.folder} are not folds of one run: {name} is "
                    f"{mine.get(name)!r:.100} and {theirs.get(name)!r:.100}"
                )
        for source in fold.parts["test"].sources:
            if other := tested.get(source):
                raise ValueError(
                    f"{other.folder} and {fold.folder} both test {for_screen(source)}: folds test "
                    "every video once"
                )
            tested[source] = fold


def _same_fold(one: Run, folds: list[Run]) -> Run:
    """The fold of another run that tests what a fold tests, or its only one."""
    source = one.parts["test"].sources[0]
    found = [fold for fold in folds if source in fold.parts["test"].sources]
    if not found and len(folds) > 1:
        raise ValueError(
            f"{one.name} and {folds[0].name} cannot be fused: no fold of {folds[0].name} tests "
            f"{for_screen(source)}, as {one.folder} does"
        )
    return found[0] if found else folds[0]


def read_scores(folder: Path) -> tuple[list[str], dict[str, Scored], str]:
    """The classes, the scores of each part, and the sha256 of a run's scores.csv.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = folder / NAME
    if not path.exists():
        raise ValueError(
            f"{folder} has no {NAME}: fine-tuning with a label a video, the linear probe and "
            "zero-shot classification of this version write it. Run its command again with "
            "another --out"
        )
    with reading(path):
        data = read_limited(path, MAX_SCORES)
    try:
        rows = csv.reader(io.StringIO(data.decode(), newline=""), strict=True)
        head = next(rows, [])
        classes = [from_csv(cell) for cell in head[len(COLUMNS) :]]
        if head[: len(COLUMNS)] != COLUMNS or len(classes) < 2:
            raise ValueError(f"its first line is not {', '.join(COLUMNS)} and the classes")
        if len(set(classes)) < len(classes):
            raise ValueError("it has a class twice")
        return classes, _parts(rows, classes), hashlib.sha256(data).hexdigest()
    except (ValueError, csv.Error) as error:  # no UTF-8, too
        raise ValueError(
            f"{path} holds no scores in our form: {error}; run that model again"
        ) from error


def _parts(rows: Iterable[list[str]], classes: list[str]) -> dict[str, Scored]:
    """The scores of each part; rows become numbers one by one, which take a tenth of their text."""
    known = set(classes)
    names: dict[str, list[tuple[str, str | None, str]]] = {part: [] for part in PARTS}
    values: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    for number, row in enumerate(rows, 2):
        if len(row) != len(COLUMNS) + len(classes):
            raise ValueError(f"row {number} has {counted(len(row), 'cell')}")
        part, source, subject, label = row[0], *map(from_csv, row[1:4])
        if part not in PARTS:
            raise ValueError(f"row {number} is of part {part!r:.60}")
        if label not in known:
            raise ValueError(f"row {number} has a label that is no class: {label!r:.60}")
        scores = np.array(row[len(COLUMNS) :], dtype=np.float64)
        if not ((scores >= 0).all() and abs(scores.sum() - 1) < 1e-3):  # NaN is neither
            raise ValueError(f"row {number} does not hold the probabilities of classes")
        names[part].append((source, subject or None, label))
        values[part].append(scores)
    parts = {}
    for part in PARTS:
        sources = [source for source, _, _ in names[part]]
        subjects = [subject for _, subject, _ in names[part]]
        labels = [label for _, _, label in names[part]]
        if len(set(sources)) < len(sources):
            raise ValueError(f"it has a video of part {part} twice")
        if sources:
            parts[part] = Scored(sources, subjects, labels, np.stack(values[part]))
    if "test" not in parts:
        raise ValueError("it has no test videos")
    return parts


def _check_alike(run: Run) -> None:
    """Raise ValueError where scores.csv is not that of results.json: one of them was exchanged."""
    test, data = run.parts["test"], run.results.data
    places = np.array([run.classes.index(label) for label in test.labels])
    top1 = run.results.value("top1")
    measured = topk_accuracy(test.probabilities, places, 1)
    known = run.results.details.get("scores", {}).get("sha256", run.sha256)  # older ones say none
    if (
        known != run.sha256
        or top1 is None
        or data.num_test != len(places)
        or abs(top1 - measured) > 1.5 / len(places)
    ):
        raise ValueError(
            f"{run.folder}: {NAME} is not of the run of its results.json: run that model again"
        )


# ---- one order


# What has to be equal on the cards; a recipe that knows nothing of a name has None there.
PROTOCOL = ("train_split", "test_split", "shots", "leave_one_out")


def refuse_different(runs: list[Run]) -> None:
    """Refuse runs that do not classify the same videos into the same classes under one protocol.

    Raises:
        ValueError: they differ; the message says in what.
    """
    first = runs[0]
    for run in runs[1:]:
        if what := _difference(first, run):
            raise ValueError(f"{first.name} and {run.name} cannot be fused: {what}")


def _difference(one: Run, two: Run) -> str:
    """In what two runs differ, in words; nothing if in nothing that matters."""
    if what := _only(one, two, one.classes, two.classes):
        return f"their classes differ ({what})"
    mine, theirs = (
        dict(zip(r.parts["test"].sources, r.parts["test"].labels, strict=True)) for r in (one, two)
    )
    if what := _only(one, two, mine, theirs):
        return f"their test videos differ ({what})"
    if odd := [s for s in mine if mine[s] != theirs[s]]:
        labels = f"{mine[odd[0]]!r} and {theirs[odd[0]]!r}"
        differ = f"labels of {counted(len(odd), 'test video')} differ"
        return f"the {differ} ({for_screen(odd[0])}: {labels})"
    people = [
        dict(zip(r.parts["test"].sources, r.parts["test"].subjects, strict=True))
        for r in (one, two)
    ]
    for source, who in people[0].items():
        other = people[1][source]
        if who != other and None not in (who, other):
            return f"{for_screen(source)} is of {who!r} in one and of {other!r} in the other"
    cards = [run.results.protocol for run in (one, two)]
    for name in PROTOCOL:
        values = [card.get(name) or None for card in cards]
        # Zero-shot classification learns from no video.
        if values[0] != values[1] and not (name == "train_split" and None in values):
            return f"their protocols differ ({name}: {values[0]!r} and {values[1]!r})"
    kinds, videos = ([card.get(name) for card in cards] for name in ("kind", "videos"))
    if kinds[0] == kinds[1] and videos[0] != videos[1]:
        return "their protocols differ (videos: they learned from different ones)"
    return ""


def _only(one: Run, two: Run, mine, theirs) -> str:
    """What only one of two runs has, in words."""
    told = []
    for run, missing in ((one, set(mine) - set(theirs)), (two, set(theirs) - set(mine))):
        if missing:
            told.append(f"only {run.name} has {len(missing)}, such as {for_screen(min(missing))}")
    return "; ".join(told)


def in_order(runs: list[Run], part: str) -> tuple[list[str], list[str | None], np.ndarray, list]:
    """The videos of a part that all runs have.

    Classes and videos come in the order of the first run; who is seen may be known to another one.

    Returns:
        names, people, class numbers (N,), and each run's probabilities (N, C).
    """
    first, classes = runs[0].parts[part], runs[0].classes
    places = [{s: i for i, s in enumerate(run.parts[part].sources)} for run in runs]
    shared = [s for s in first.sources if all(s in place for place in places)]
    scores = []
    for run, place in zip(runs, places, strict=True):
        columns = [run.classes.index(name) for name in classes]
        rows = [place[source] for source in shared]
        scores.append(run.parts[part].probabilities[rows][:, columns])
    mine = [places[0][source] for source in shared]
    labels = np.array([classes.index(first.labels[i]) for i in mine], dtype=np.int64)
    seen = [run.parts[part].subjects for run in runs]
    people = [
        next((who[p[s]] for who, p in zip(seen, places, strict=True) if who[p[s]]), None)
        for s in shared
    ]
    return shared, people, labels, scores


def pooled(folds: list[list[Run]]) -> tuple[list[str], list[str | None], np.ndarray, list]:
    """The test videos of all folds, one fold after another, as `in_order` gives those of one."""
    tested = [in_order(fold, "test") for fold in folds]
    sources = [source for fold in tested for source in fold[0]]
    people = [who for fold in tested for who in fold[1]]
    scores = [np.concatenate(run) for run in zip(*(fold[3] for fold in tested), strict=True)]
    return sources, people, np.concatenate([fold[2] for fold in tested]), scores


# ---- in words


def pooled_card(folds: list[list[Run]]) -> tuple[Data, dict]:
    """The data and the protocol of the folds together, as the first run has them."""
    runs = [fold[0].results for fold in folds]
    data, protocol = runs[0].data, runs[0].protocol
    if len(folds) == 1:
        return data, protocol
    each = [run.data for run in runs]
    fewest = lambda values: min((value for value in values if value is not None), default=None)
    people = {who for who in pooled(folds)[1] if who is not None}
    data = dataclasses.replace(
        data, train_split="the rest of each fold", test_split="all folds",
        num_train=fewest(d.num_train for d in each), num_test=sum(d.num_test for d in each),
        num_clips=sum(d.num_clips for d in each),
        train_subjects=fewest(d.train_subjects for d in each), test_subjects=len(people) or None,
        subjects_in_both=max(d.subjects_in_both for d in each),
        videos_in_both=max(d.videos_in_both for d in each),
    )  # fmt: skip
    digests = " ".join(str(run.protocol.get("videos")) for run in runs)
    return data, protocol | {
        "videos": hashlib.sha256(digests.encode()).hexdigest(), "train_split": data.train_split,
        "test_split": data.test_split, "num_train": data.num_train, "num_test": data.num_test,
        "leave_out": None, "folds": len(folds),
    }  # fmt: skip


def notes_of(folds: list[list[Run]]) -> list[str]:
    """What the runs' cards warn of, with the run's or the fold's name where not all have it.

    Left out is what is said again of all folds together: that an interval is rough.
    """
    names = [run.name for run in folds[0]]
    said: dict[str, list[str]] = {}
    for i, name in enumerate(names):
        notes = [fold[i].results.notes for fold in folds]
        for note in dict.fromkeys(note for own in notes for note in own):
            have = [fold[i] for fold, own in zip(folds, notes, strict=True) if note in own]
            every = len(have) == len(folds)
            said.setdefault(note, []).extend(
                [name] if every else [f"{name} ({run.folder.name})" for run in have]
            )
    found = [
        f"{'every run' if labels == names else ', '.join(labels)}: {note}"
        for note, labels in said.items()
        if not note.startswith(ROUGH)
    ]
    # Whoever is left out of one fold is in the others: a fold's parts are all of the data.
    whole = max(
        len(run.parts["test"].sources) + len(run.parts["val"].sources if "val" in run.parts else ())
        + (run.results.data.num_train or 0)
        for (run, *_) in folds
    )  # fmt: skip
    tested = sum(len(run.parts["test"].sources) for run, *_ in folds)
    if folds[0][0].results.protocol.get("leave_out") is not None and tested < whole:
        found.append(f"the folds test {tested} of {whole} videos: folds are missing")
    return found


# ---- combined


def mean_of_probabilities(scores: list[np.ndarray]) -> np.ndarray:
    """Scores (N, C) from each run's probabilities (N, C): their mean."""
    return np.mean(scores, axis=0)


def mean_of_logits(scores: list[np.ndarray]) -> np.ndarray:
    """Scores (N, C) from each run's probabilities (N, C): the mean of their logarithms."""
    return np.mean([np.log(np.maximum(s, SMALLEST)) for s in scores], axis=0)


def fit_weights(scores: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Weights (R,), not negative and of sum 1, that maximise the likelihood of the labels.

    The likelihood has no other maxima; each round of expectation and maximisation raises it.

    Args:
        scores: each run's probabilities (N, C) of validation videos.
        labels: (N,) their classes.
    """
    likely = np.stack([np.maximum(s[np.arange(len(labels)), labels], SMALLEST) for s in scores])
    weights = np.full(len(scores), 1 / len(scores))
    for _ in range(ROUNDS):
        joint = weights[:, None] * likely
        weights = (joint / joint.sum(0)).mean(1)
    return weights


def weighted_mean(scores: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Scores (N, C): the mean of each run's probabilities with these weights (R,)."""
    return np.tensordot(weights, np.stack(scores), 1)


def svm_scores(
    validation: list[np.ndarray], labels: np.ndarray, scores: list[np.ndarray]
) -> np.ndarray:
    """Scores (N, C) of a linear SVM on the runs' probabilities, as two-stream networks were fused.

    Simonyan and Zisserman 2014 (https://arxiv.org/abs/1406.2199): the runs' probabilities one
    behind the other, each run's of length 1.

    Args:
        validation: each run's probabilities (M, C) of the videos that it learns from.
        labels: (M,) their classes, of which each occurs.
        scores: each run's probabilities (N, C).
    """
    from sklearn.svm import LinearSVC

    machine = LinearSVC(C=1.0, dual="auto", max_iter=20000, random_state=0)
    machine.fit(_stacked(validation), labels)
    found = machine.decision_function(_stacked(scores))
    return np.stack([-found, found], 1) if found.ndim == 1 else found


def _stacked(scores: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([s / np.linalg.norm(s, axis=1, keepdims=True) for s in scores], axis=1)
