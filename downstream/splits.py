"""The videos of a pack's training, validation and test split.

The packer may have cut a long video into several clips; labels and predictions are per video (the
`source` of the index), so clips are averaged over their video.
"""

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from downstream.groups import (
    LEAKS,
    NO_PAIRS,
    find_leaks,
    group_clips,
    join_subjects,
    joined_groups,
    leak_notes,
)
from pretrain.data.index import NEAR
from pretrain.data.near_list import STRUCK
from pretrain.data.shards import Pack
from pretrain.folders import writing
from pretrain.names import counted, did_you_mean, first_of, for_csv, for_screen
from pretrain.prompts import refuse_same_words

HELD_OUT = 0.25  # the fraction that validation, or a test split made here, aims at


@dataclass(frozen=True)
class Videos:
    """The labelled videos of one split.

    Attributes:
        sources: what the user called each video.
        labels: its class name; None where it has several over time.
        subjects: who is seen in it, where known.
        samples: (K,) sample ids in the pack of all their clips, ascending.
        owner: (K,) the number of the video that each of these clips was cut from.
        groups: of each video a number: equal ones may not be divided, see `groups.group_clips`.
        recordings: likewise, where subjects do not count.
    """

    sources: list[str]
    labels: list[str | None]
    subjects: list[str | None]
    samples: np.ndarray
    owner: np.ndarray
    groups: list[int]
    recordings: list[int]

    def __len__(self) -> int:
        return len(self.sources)

    def average(self, values: np.ndarray) -> np.ndarray:
        """Mean over the clips of each video: (K, ...) to (len(self), ...), float32."""
        total = np.zeros((len(self), *values.shape[1:]), dtype=np.float64)
        np.add.at(total, self.owner, values)
        counts = np.bincount(self.owner, minlength=len(self))
        return (total / counts.reshape(-1, *[1] * (values.ndim - 1))).astype(np.float32)

    def numbers(self, classes: list[str]) -> np.ndarray:
        """Labels as indices into `classes`."""
        place = {name: i for i, name in enumerate(classes)}
        return np.array([place[label] for label in self.known_labels], dtype=np.int64)

    @property
    def known_labels(self) -> list[str]:
        """The labels, of videos that have one each."""
        known = [label for label in self.labels if label is not None]
        assert len(known) == len(self)
        return known


def videos_digest(*parts: Videos) -> str:
    """A hash of which videos with which labels are in which part, at any packed size."""
    listed = [sorted(zip(p.sources, p.labels, strict=True), key=str) for p in parts]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def group_by_source(sources: list[str]) -> tuple[list[str], np.ndarray]:
    """The different sources in order of their first clip, and each clip's number of them (K,)."""
    numbers: dict[str, int] = {}
    owner = [numbers.setdefault(source, len(numbers)) for source in sources]
    return list(numbers), np.array(owner, dtype=np.int64)


NOT_LOOKED = (
    "near-duplicates were not looked for in this pack, so copies may be on both sides of a split: "
    "python -m pretrain.data.near PACK lists them"
)


def near_pairs(pack: Pack) -> np.ndarray:
    """The near-duplicates of a pack, sample ids (K, 2); none where it was not looked for any."""
    found = pack.near_duplicates()
    return NO_PAIRS if found is None else found


class _Clips:
    """The clips of a pack and their groups.

    Attributes:
        records: all index entries, by sample id.
        labelled: those with a label, or segments.
        pairs: of near-duplicates, see `Pack.near_duplicates`.
    """

    def __init__(self, pack: Pack, labels: bool = True):
        self.name = pack.name
        self.records, self.labelled = _labelled(pack, labels)
        self.pairs = near_pairs(pack)
        entries = list(self.records.values())
        self.groups = group_clips(entries, self.pairs)
        self.recordings = group_clips(entries, self.pairs, people=False)

    def collect(self, records: dict[int, dict]) -> Videos:
        """Group labelled clips, sample id -> index entry, into their videos."""
        return _collect(records, self.name, self.groups, self.recordings)

    def joined(self, pack: Pack) -> list[str]:
        """What near-duplicates join, in words; what is wrong with their list, or that none is."""
        if pack.near_duplicates() is None:
            return [NOT_LOOKED]
        in_vain = pack.struck_in_vain()
        return self._joined() + [in_vain] * bool(in_vain)

    def _joined(self) -> list[str]:
        if not len(self.pairs):
            return []
        alone = group_clips(list(self.records.values()))
        count, people = joined_groups(
            alone, self.groups, [r["subject"] for r in self.records.values()]
        )
        if not count:
            return []
        words = f"near-duplicates join {counted(count, 'group')} of clips with others"
        if people:
            words += (
                f"; those of different people: {first_of(people, 5, '; ')}. Look at "
                f"{NEAR} of the pack, and copy lines of pairs that are none to {STRUCK} beside it"
            )
        return [words]

    def notes(self, splits: tuple[str, str], train: Videos, test: Videos) -> list[str]:
        """What two splits share, in words."""
        first, second = ({int(i): self.records[i] for i in v.samples} for v in (train, test))
        return leak_notes(find_leaks(first, second, self.pairs), splits)


def _collect(
    records: dict[int, dict], where: str, groups: np.ndarray, recordings: np.ndarray
) -> Videos:
    numbers: dict[str, int] = {}
    labels: list[str | None] = []
    subjects: list[str | None] = []
    owner, first = [], []
    for sample, record in records.items():
        source, label = record["source"], record["label"]
        if source not in numbers:
            numbers[source] = len(numbers)
            labels.append(label)
            subjects.append(record["subject"])
            first.append(sample)
        elif labels[numbers[source]] != label:
            raise ValueError(
                f"{where}: {for_screen(source)} has two labels, {labels[numbers[source]]!r} and "
                f"{label!r}: this protocol measures one label a video, so keep one"
            )
        owner.append(numbers[source])
    samples = np.array(list(records), dtype=np.int64)
    own = groups[first].tolist(), recordings[first].tolist()
    return Videos(list(numbers), labels, subjects, samples, np.array(owner, dtype=np.int64), *own)


def _labelled(pack: Pack, labels: bool = True) -> tuple[dict[int, dict], dict[int, dict]]:
    """All index entries by sample id, and those with a label (or segments); there must be some.

    No two labels may be the same but for spelling.
    """
    records = dict(enumerate(pack.records()))
    has = lambda r: r["label"] is not None or (not labels and bool(r["extra"].get("segments")))
    labelled = {i: r for i, r in records.items() if has(r)}
    if not labelled:
        raise ValueError(
            f"{pack.name}: no clip has a label, and a probe measures against labels: give a list "
            "file with a label column, or a folder with one subfolder a class"
        )
    names = sorted({r["label"] for r in labelled.values() if r["label"] is not None})
    refuse_same_words(dict(zip(names, names, strict=True)), lambda name: pack.where(label=name))
    return records, labelled


def _refuse_one_class(pack: Pack, classes: set[str]) -> None:
    if len(classes) == 1:
        raise ValueError(
            f"{pack.name}: the only label is {min(classes)!r}: classification needs at least two"
        )


def subset(videos: Videos, keep: np.ndarray) -> Videos:
    """The videos where `keep` (len(videos),) is True."""
    chosen = np.flatnonzero(keep)
    clips = keep[videos.owner]
    return Videos(
        [videos.sources[i] for i in chosen],
        [videos.labels[i] for i in chosen],
        [videos.subjects[i] for i in chosen],
        videos.samples[clips],
        (np.cumsum(keep) - 1)[videos.owner[clips]],
        [videos.groups[i] for i in chosen],
        [videos.recordings[i] for i in chosen],
    )


def choose_splits(
    pack: Pack, train_split: str, test_split: str, seed: int, labels: bool = True,
    leave_out: str | None = None,
) -> tuple[Videos, Videos, list[str]]:  # fmt: skip
    """The training and the test videos of a pack.

    Data without any split get a seeded one here, about 3 to 1, that shares no subject where
    subjects are known.

    Args:
        pack: the data.
        train_split: name of the split to fit on.
        test_split: name of the split to measure on, once.
        seed: of a split made here.
        labels: every video has to have a label; False: a video with a column `segments` needs none.
        leave_out: a subject whose videos are the test part, while all others are for training;
            splits are ignored.

    Returns:
        training videos, test videos, and sentences a reader of the result must see.

    Raises:
        ValueError: a split or subject is not there or holds no labels, all labels are one class,
            the splits are the same, or a class of the test split never occurs in training.
    """
    clips = _Clips(pack, labels)
    records, labelled = clips.records, clips.labelled
    notes = []
    if leave_out is not None:
        refuse_nobody(pack.name, [r["subject"] for r in labelled.values()], leave_out)
        theirs = [i for i, r in labelled.items() if r["subject"] == leave_out]
        linked = set(np.flatnonzero(np.isin(clips.groups, clips.groups[theirs])).tolist())
        test = clips.collect({i: labelled[i] for i in theirs})
        train = clips.collect({i: r for i, r in labelled.items() if i not in linked})
        if out := [r for i, r in labelled.items() if i in linked.difference(theirs)]:
            notes.append(
                f"left out of training: {counted(len(out), 'clip')} in one group with those of "
                f"{for_screen(leave_out)}, such as {for_screen(out[0]['source'])}: recordings or "
                "near-duplicates show both"
            )
        ignored = len(records) - len(labelled)
    elif all(record["split"] is None for record in records.values()):
        if any(record["label"] is None for record in labelled.values()):
            raise ValueError(
                f"{pack.name}: videos with segments and no label cannot be divided here: add a "
                "column split to the list"
            )
        videos = clips.collect(labelled)
        held, rule = hold_out(videos, seed)
        if not held.any():
            raise ValueError(f"{pack.name}: no test part can be made, {rule}")
        train, test = subset(videos, ~held), subset(videos, held)
        notes.append(
            f"the data name no splits: {len(test)} of {len(videos)} videos were held out for "
            f"testing, seed {seed}, {rule}; compare only with results on this very split"
        )
        ignored = len(records) - len(labelled)
    else:
        names = sorted({r["split"] for r in records.values() if r["split"] is not None})
        if train_split == test_split:
            raise ValueError(f"--train-split and --test-split are both {train_split!r}: name two")
        parts = []
        for flag, name in (("--train-split", train_split), ("--test-split", test_split)):
            if name not in names:
                raise ValueError(
                    f"{pack.name} has no split {name!r}; it has {', '.join(names)}: name one of "
                    f"them with {flag}, or leave the split column out to have a test part held out "
                    "for you"
                )
            part = {i: r for i, r in labelled.items() if r["split"] == name}
            if not part:
                raise ValueError(f"{pack.name}: no clip of split {name!r} has a label")
            parts.append(clips.collect(part))
        train, test = parts
        used = {train_split, test_split}
        ignored = sum(i not in labelled and r["split"] in used for i, r in records.items())
    notes += clips.notes((train_split, test_split), train, test) + clips.joined(pack)
    if ignored:
        notes.append(f"left out: {counted(ignored, 'clip')} without a label")
    if not labels:
        return train, test, notes
    classes, tested = set(train.known_labels), set(test.known_labels)
    _refuse_one_class(pack, classes | tested)
    if tested - classes:
        raise ValueError(
            f"{pack.where(label=min(tested - classes))}: {counted(len(tested - classes), 'class')} "
            "tested but never trained: "
            f"{first_of(sorted(tested - classes), 10)}; correct the labels or "
            "the splits"
        )
    return train, test, notes


def labelled_videos(pack: Pack, split: str) -> tuple[Videos, list[str]]:
    """The labelled videos of one split, all of them where the data name no splits.

    Returns:
        the videos, and sentences a reader of the result must see.

    Raises:
        ValueError: there is no such split, or nothing in it has a label.
    """
    clips = _Clips(pack)
    records, labelled = clips.records, clips.labelled
    notes = []
    if pack.index["splits"]:
        ids = set(pack.split(split).tolist())
        labelled = {i: r for i, r in labelled.items() if i in ids}
        if not labelled:
            raise ValueError(f"{pack.name}: no clip of split {split!r} has a label")
    else:
        ids = set(records)
        notes.append("the data name no splits: all videos were scored")
    if len(labelled) < len(ids):
        notes.append(f"left out: {counted(len(ids) - len(labelled), 'clip')} without a label")
    return clips.collect(labelled), notes


def _people(where: str, subjects: list[str | None]) -> list[str]:
    """The names of at least two subjects of labelled videos, all of which have one."""
    names = sorted({who for who in subjects if who is not None})
    if None in subjects or len(names) < 2:
        nameless = subjects.count(None)
        said = f"{nameless} of {len(subjects)} labelled videos name no subject"
        if names:
            said += f", the others {counted(len(names), 'subject')}"
        raise ValueError(
            f"{where}: {said}: leaving one out needs a list file with a subject column"
        )
    return names


def refuse_nobody(where: str, subjects: list[str | None], who: str) -> None:
    """Refuse to leave out somebody who is not there.

    Args:
        where: the data.
        subjects: of all that has a label.
        who: is to be left out.

    Raises:
        ValueError: some have no subject, all have the same, or nobody has this name.
    """
    if who not in (names := _people(where, subjects)):
        raise ValueError(
            f"{where} has no labelled video of a subject {who!r:.80}{did_you_mean(who, names)}; "
            f"its subjects are {first_of(names, 20)}"
        )


def leave_one_subject_out(pack: Pack) -> tuple[Videos, list[np.ndarray], list[str]]:
    """All labelled videos of a pack, and for each subject the mask of its videos.

    The usual protocol where people are few: each is tested with classifiers trained on all others,
    and the predictions are pooled. Splits are ignored.

    Returns:
        the videos; for each subject, in order of name, (N,) True = its videos; and sentences a
        reader of the result must see.

    Raises:
        ValueError: a labelled video has no subject, there is only one, or a class is one subject's
            alone.
    """
    clips = _Clips(pack)
    records, labelled = clips.records, clips.labelled
    videos = clips.collect(labelled)
    names = _people(pack.name, videos.subjects)
    _refuse_one_class(pack, set(videos.known_labels))
    together: dict[int, list[str]] = {}  # those whom a recording or near-duplicates join
    for who, group in sorted(set(zip(map(str, videos.subjects), videos.groups, strict=True))):
        together.setdefault(group, []).append(who)
    if len(together) == 1:
        raise ValueError(
            f"{pack.name}: recordings or near-duplicates join all of its "
            f"{counted(len(names), 'subject')}: nobody can be left out"
        )
    folds = [np.array([own == group for own in videos.groups]) for group in together]
    labels = np.array(videos.known_labels)
    alone = [
        (whose, sorted(missing))
        for whose, fold in zip(together.values(), folds, strict=True)
        if (missing := set(labels[fold]) - set(labels[~fold]))
    ]
    if alone:
        each = [f"{' and '.join(whose)} has {first_of(names, 10)}" for whose, names in alone]
        raise ValueError(
            f"{pack.where(subject=alone[0][0][0])}: what only one subject does cannot be learned "
            f"from the others: {first_of(each, 10, '; ')}. Leave these classes out of the list"
        )
    ignored = any(record["split"] is not None for record in records.values())
    notes = [
        f"every one of {len(names)} subjects was left out in turn"
        + "; splits were ignored" * ignored
    ]
    notes += clips.joined(pack)
    if joined := [" and ".join(whose) for whose in together.values() if len(whose) > 1]:
        notes.append(
            "left out together, because recordings or near-duplicates join them: "
            f"{first_of(joined, 10, '; ')}"
        )
    if len(labelled) < len(records):
        notes.append(f"left out: {counted(len(records) - len(labelled), 'clip')} without a label")
    return videos, folds, notes


def hold_out(videos: Videos, seed: int, divide_people: bool = False) -> tuple[np.ndarray, str]:
    """`choose_validation` of videos that all have a label; unless told, no group is divided."""
    about = videos.known_labels, videos.subjects, seed, videos.groups, videos.recordings
    return choose_validation(*about, divide_people)


def choose_validation(
    labels: list[str],
    subjects: list[str | None],
    seed: int,
    groups: Sequence[int] | np.ndarray | None = None,
    recordings: Sequence[int] | np.ndarray | None = None,
    divide_people: bool = True,
) -> tuple[np.ndarray, str]:
    """Choose about a quarter of the videos for validation, sharing no subject with the rest.

    Where subjects are known, whole groups are held out such that every class stays in the rest; a
    video without a subject then counts as a person of its own. Without subjects, or where they
    cannot be held out, whole recordings are drawn class by class.

    Args:
        labels: class of each video.
        subjects: who is seen in each, None where unknown.
        seed: of the choice.
        groups: of each video a number, see `Videos`; None: those of equal subjects.
        recordings: likewise; None: each is its own. They are never divided.
        divide_people: whether subjects may be divided where they cannot be held out whole: only
            for what no number that is reported is measured on.

    Returns:
        (N,) True = held out, and a description of the rule that was followed. Nothing is held out
        where every class has a single video, or nothing can be without dividing a group.
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels, return_inverse=True)[1]
    each = np.arange(len(labels)) if recordings is None else np.array(recordings)
    whole = join_subjects(subjects, each) if groups is None else np.array(groups)
    reason = "no subjects are known"
    if any(subject is not None for subject in subjects):
        people = [f"video {i}" if s is None else f"subject {s}" for i, s in enumerate(subjects)]
        first: dict[int, str] = {}  # the numbering, and so the draw, is by name
        for group, name in sorted(zip(whole.tolist(), people, strict=True)):
            first.setdefault(group, name)
        held = _hold_out_groups(
            classes, np.unique([first[g] for g in whole.tolist()], return_inverse=True)[1], rng
        )
        if held is not None:
            return held, "whole subjects held out, every class remains in the rest"
        reason = "whole subjects cannot be held out without losing a class"
        if len(set(people)) == 1:
            reason = "there is only one subject"
        if not divide_people:
            return np.zeros(len(labels), dtype=bool), (
                f"{reason}, and none is ever divided: name splits in the list, or leave the column "
                "subject out"
            )
    held = _hold_out_recordings(classes, each, rng)
    if not held.any():
        return held, f"every class has a single video and {reason}: label more videos"
    whole_too = ", recordings and near-duplicates whole" * (len(set(each.tolist())) < len(each))
    return held, f"videos held out class by class, {reason}{whole_too}"


def _hold_out_recordings(
    classes: np.ndarray, recordings: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A hold-out of whole recordings, class by class; those of several classes stay in the rest."""
    held = np.zeros(len(classes), dtype=bool)
    videos: dict[int, list[int]] = {}
    for i, recording in enumerate(recordings.tolist()):
        videos.setdefault(recording, []).append(i)
    for number in range(classes.max() + 1):
        members = rng.permutation(np.flatnonzero(classes == number))
        wanted = max(round(HELD_OUT * len(members)), int(len(members) > 1))
        units = [videos[r] for r in dict.fromkeys(recordings[members].tolist())]
        units = [u for u in units if len(u) < len(members) and (classes[u] == number).all()]
        chosen: list[int] = []
        for unit in units:
            if len(chosen) + len(unit) <= wanted:
                chosen += unit
        held[chosen or min(units, key=len, default=[])] = True
    return held


def _hold_out_groups(
    classes: np.ndarray, people: np.ndarray, rng: np.random.Generator
) -> np.ndarray | None:
    """Of 100 random orders of groups, the hold-out nearest to the aim; None if there is none."""
    per_subject = np.zeros((people.max() + 1, classes.max() + 1), dtype=np.int64)  # videos
    np.add.at(per_subject, (people, classes), 1)
    aim = HELD_OUT * len(classes)
    best: tuple[float, list[int]] | None = None
    for _ in range(100):
        left, held, count = per_subject.sum(0), [], 0
        for person in rng.permutation(len(per_subject)):
            size = per_subject[person].sum()
            keeps_classes = (left > per_subject[person])[per_subject[person] > 0].all()
            if keeps_classes and abs(count + size - aim) <= abs(count - aim):
                left, count = left - per_subject[person], count + size
                held.append(person)
        if held and (best is None or abs(count - aim) < best[0]):
            best = (abs(count - aim), held)
    return None if best is None else np.isin(people, best[1])


def write_leaks(folder: Path, pack: Pack, splits: dict[str, Videos]) -> dict[str, Path]:
    """Write what the first of some splits shares with each of the others, to `LEAKS` in a folder.

    Args:
        folder: of results.
        pack: where the videos are.
        splits: by name, the one that is learned from first.

    Returns:
        what was written, name -> path: nothing where nothing is shared.

    Raises:
        ValueError: the disk does not take it.
    """
    first, *others = splits
    pairs = near_pairs(pack)
    records = {name: {int(i): pack.record(i) for i in v.samples} for name, v in splits.items()}
    found = [(name, find_leaks(records[first], records[name], pairs)) for name in others]
    path = folder / LEAKS
    if not any(leaks for _, leaks in found):
        path.unlink(missing_ok=True)  # of an earlier call
        return {}
    with writing(path), open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["shared", "split", "source", "start", "split", "source", "start", "note"])
        for name, leaks in found:
            for leak in leaks:
                cells: list[object] = []
                for split, record in zip((first, name), leak.clips, strict=True):
                    cells += [for_csv(split), for_csv(record["source"]), record["start"]]
                writer.writerow([leak.kind, *cells, for_csv(leak.note)])
    return {"leaks": path}


def few_shots(labels: list[str], shots: int, seed: int) -> np.ndarray:
    """Which videos (N,) are kept when every class may have `shots` of them: a seeded draw.

    Raises:
        ValueError: fewer than one.
    """
    if shots < 1:
        raise ValueError(f"--shots {shots} leaves nothing to learn from: give at least 1")
    rng = np.random.default_rng([seed, shots])
    keep = np.zeros(len(labels), dtype=bool)
    for name in sorted(set(labels)):
        members = np.array([i for i, label in enumerate(labels) if label == name])
        keep[rng.permutation(members)[:shots]] = True
    return keep
