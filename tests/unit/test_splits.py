"""Which videos are fitted on, judged on and tested on."""

import contextlib
import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from downstream.groups import LEAKS, find_leaks, group_clips
from downstream.probe import choose_folds
from downstream.splits import (
    choose_splits,
    choose_validation,
    hold_out,
    leave_one_subject_out,
    write_leaks,
)
from downstream.tasks import choose_videos, task_of

PEOPLE = (("ada", "train"), ("ida", "test"), ("eva", None))


def fake_pack(rows: list[tuple], pairs: Sequence[tuple[int, int]] = ()) -> SimpleNamespace:
    """A pack of records (source, label, split, subject) and perhaps (..., start, extra)."""
    names = ("source", "label", "split", "subject", "start", "extra")
    about = {"start": 0.0, "extra": {}, "frames": 10, "fps": 10.0}
    records = [about | dict(zip(names, row, strict=False)) for row in rows]
    return SimpleNamespace(
        name="DATA",
        where=lambda **_: "DATA",
        records=lambda: iter(records),
        record=records.__getitem__,
        near_duplicates=lambda: np.array(pairs, np.int64).reshape(-1, 2),
        struck_in_vain=lambda: "",
        index={"splits": {}},
    )


@pytest.mark.parametrize("seed", range(10))
def test_validation_shares_no_subject_and_the_rest_keeps_every_class(seed):
    rng = np.random.default_rng(seed)
    people = rng.integers(9, size=150)
    labels = [f"c{i}" for i in rng.integers(6, size=150)]
    subjects = [f"s{p}" for p in people]
    held, rule = choose_validation(labels, subjects, seed)
    assert "whole subjects" in rule
    assert not set(people[held]) & set(people[~held])
    assert {c for c, h in zip(labels, held, strict=True) if not h} == set(labels)
    assert 0.17 < held.mean() < 0.33


def test_a_class_of_one_person_stays_in_the_rest():
    labels = ["rare"] * 4 + ["a", "b"] * 10
    subjects = ["s0"] * 4 + [f"s{i % 5}" for i in range(20)]
    for seed in range(20):
        held, rule = choose_validation(labels, subjects, seed)
        assert not held[:4].any() and held.any() and "whole subjects" in rule


def test_two_people_give_one_for_validation():
    held, rule = choose_validation(["a", "b"] * 10, ["s0", "s0", "s1", "s1"] * 5, 0)
    assert held.sum() == 10 and "whole subjects" in rule


@pytest.mark.parametrize(
    ("subjects", "reason"),
    [
        ([None] * 16, "no subjects are known"),
        (["me"] * 16, "only one subject"),
        (["x"] * 8 + ["y"] * 8, "without losing a class"),  # each person does one action only
    ],
)
def test_validation_falls_back_to_videos_and_says_why(subjects, reason):
    held, rule = choose_validation(["a"] * 8 + ["b"] * 8, subjects, 0)
    assert reason in rule and "class by class" in rule
    assert (held[:8].sum(), held[8:].sum()) == (2, 2)


def test_a_class_with_one_video_is_not_held_out():
    held, _ = choose_validation(["a"] * 4 + ["b"], [None] * 5, 0)
    assert held[:4].sum() == 1 and not held[4]
    held, rule = choose_validation(["a", "b", "c"], [None] * 3, 0)
    assert not held.any() and "single video" in rule


def test_clips_of_one_source_are_one_video():
    pack = fake_pack(
        [
            ("u", "a", "train", None),
            ("v", "b", "train", None),
            ("u", "a", "train", None),
            ("w", "b", "test", None),
        ]
    )
    train, test, notes = choose_splits(pack, "train", "test", 0)
    assert (
        train.sources == ["u", "v"] and train.samples.tolist() == [0, 1, 2] and test.labels == ["b"]
    )
    assert train.owner.tolist() == [0, 1, 0] and notes == []
    averaged = train.average(np.array([[1.0, 0.0], [7.0, 7.0], [3.0, 4.0]]))
    assert averaged.tolist() == [[2.0, 2.0], [7.0, 7.0]] and averaged.dtype == np.float32


def test_data_without_splits_get_one_that_shares_no_subject_and_say_so():
    rows = [(f"v{i}", "ab"[i % 2], None, f"s{i // 4}") for i in range(32)]
    train, test, notes = choose_splits(fake_pack(rows), "train", "test", 0)
    assert len(train) == 24 and len(test) == 8 and not set(train.subjects) & set(test.subjects)
    assert "held out for testing" in notes[0]
    for part in (train, test):
        # Samples and owners still belong to the sources.
        assert [f"v{i}" for i in part.samples] == [part.sources[o] for o in part.owner]
    other = choose_splits(fake_pack(rows), "train", "test", 1)[1]
    assert other.sources != test.sources


def test_leaks_are_called_out():
    rows = [("v0", "a", "train", "p"), ("v1", "b", "train", "q"), ("v0", "a", "test", "p")]
    notes = choose_splits(fake_pack(rows), "train", "test", 0)[2]
    assert "1 video " in notes[0] and "1 subject:" in notes[1]


def test_clips_without_labels_are_left_out_and_counted():
    rows = [
        ("v0", "a", "train", None),
        ("v1", "b", "train", None),
        ("v2", None, "train", None),
        ("v3", "a", "test", None),
    ]
    train, _, notes = choose_splits(fake_pack(rows), "train", "test", 0)
    assert train.sources == ["v0", "v1"] and notes == ["left out: 1 clip without a label"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("v0", None, "train", None)], "label"),
        ([("v0", "a", "train", None), ("v1", "a", "test", None)], "the only label is 'a'"),
        ([("v0", "a", "train", None), ("v1", "b", "test", None)], "never trained: b"),
        ([("v0", "a", "fit", None), ("v1", "b", "val", None)], "it has fit, val.*--train-split"),
        ([("v0", "a", "train", None), ("v1", "b", "train", None)], "it has train.*--test-split"),
        ([("v0", "a", "train", None), ("v1", None, "test", None)],
         "no clip of split 'test' has a label"),
        ([("v0", "a", "train", None), ("v0", "b", "train", None), ("v1", "b", "test", None)],
         "v0 has two labels"),
        ([("v0", "a", None, None), ("v1", "b", None, None)], "label more videos"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_probed_are_refused_with_the_reason(rows, message):
    with pytest.raises(ValueError, match=message):
        choose_splits(fake_pack(rows), "train", "test", 0)


def test_a_subject_left_out_is_the_test_part_whatever_the_splits_say():
    """The others' videos of every split are for training; a video of two people is called out."""
    rows = [(f"{who}{k}", f"c{k}", split, who) for k in "01" for who, split in PEOPLE]
    train, test, notes = choose_splits(fake_pack(rows), "train", "test", 0, leave_out="eva")
    assert test.sources == ["eva0", "eva1"] and set(test.subjects) == {"eva"}
    assert train.sources == ["ada0", "ida0", "ada1", "ida1"] and notes == []
    rows.append(("ada0", "c0", "train", "eva"))
    _, _, notes = choose_splits(fake_pack(rows), "train", "test", 0, leave_out="eva")
    assert any("both" in note and "ada0" in note for note in notes)


@pytest.mark.parametrize(
    ("changed", "who", "message"),
    [
        ([], "eve", "'eve'; did you mean eva.*ada, eva, ida"),
        ([], "", "ada, eva, ida"),
        ([("x", "c0", "train", None)], "eva", "1 of 7 labelled videos name no subject"),
        ([("x", "rare", "train", "eva")], "eva", "never trained: rare"),
    ],
)
def test_a_subject_that_cannot_be_left_out(changed, who, message):
    rows = [(f"{who}{k}", f"c{k}", split, who) for k in "01" for who, split in PEOPLE]
    with pytest.raises(ValueError, match=message):
        choose_splits(fake_pack(rows + changed), "train", "test", 0, leave_out=who)


def test_one_split_for_both_is_refused():
    rows = [("v0", "a", "train", None), ("v1", "b", "train", None)]
    with pytest.raises(ValueError, match="both 'train'"):
        choose_splits(fake_pack(rows), "train", "train", 0)


# ---- groups


def row(
    source: str, split: str | None = None, subject: str | None = None, start: float = 0, **extra
) -> tuple:
    return (source, source[0], split, subject, start, extra)


def test_groups_are_of_people_files_recordings_and_near_duplicates_and_chains_of_them():
    rows = [
        row("a1", None, "ada"), row("b1", None, "ada"), row("b1"), row("c1"), row("d1"),
        row("e1", recording="R"), row("f1", recording="R"), row("g1"),
    ]  # fmt: skip
    records = list(fake_pack(rows).records())
    pairs = np.array([[3, 4], [4, 6]])
    assert group_clips(records, pairs).tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert group_clips(records, pairs, people=False).tolist() == [0, 1, 1, 2, 2, 2, 2, 3]


CLIP = st.tuples(
    st.integers(0, 25).map(lambda i: f"{'ab'[i % 2]}{i}"),
    st.sampled_from([None, *"pqrstu"]),
    st.integers(0, 9),
    st.sampled_from(["", "", "", *"RST"]),
)


@settings(max_examples=30)
@given(
    st.lists(CLIP, min_size=8, max_size=60),
    st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=6),
    st.integers(0, 99),
)
def test_no_split_that_is_made_divides_a_group(clips, pairs, seed):
    rows = [
        (source, source[0], None, subject, start, {"recording": recording} if recording else {})
        for source, subject, start, recording in clips
    ]
    pairs = [(a, b) for a, b in pairs if a < b < len(rows)]
    pack = fake_pack(rows, pairs)
    records = list(pack.records())
    groups = group_clips(records, np.array(pairs, np.int64).reshape(-1, 2))
    recordings = group_clips(records, np.array(pairs, np.int64).reshape(-1, 2), people=False)

    def apart(of: np.ndarray, *parts: np.ndarray) -> None:
        for i, part in enumerate(parts):
            for other in parts[i + 1 :]:
                assert not {*of[part].tolist()} & {*of[other].tolist()}

    with contextlib.suppress(ValueError):  # where nothing can be held out
        train, test, notes = choose_splits(pack, "train", "test", seed)
        apart(groups, train.samples, test.samples)
        assert not any("WARNING" in note for note in notes)
        held, _ = hold_out(train, seed)
        part = held[train.owner]
        apart(groups, train.samples[part], train.samples[~part])
        chosen = choose_videos(task_of(False), pack, "train", "test", None, "hold-out", None, seed)
        apart(groups, *(p.samples for p in (chosen.train, chosen.val, chosen.test)))
    for who in {subject for _, subject, *_ in clips if subject}:
        with contextlib.suppress(ValueError):
            train, test, _ = choose_splits(pack, "train", "test", seed, leave_out=who)
            apart(groups, train.samples, test.samples)
    with contextlib.suppress(ValueError):
        videos, folds, _ = leave_one_subject_out(pack)
        for fold in folds:
            part = fold[videos.owner]
            apart(groups, videos.samples[part], videos.samples[~part])
        apart(np.arange(len(videos)), *map(np.flatnonzero, folds))
    for one_out in (False, True):
        with contextlib.suppress(ValueError):
            given = choose_folds(pack, "train", "test", one_out, seed)
            first = [videos_of.samples[np.unique(videos_of.owner, return_index=True)[1]]
                     for videos_of in given.parts]  # fmt: skip
            sample = np.concatenate(first)  # one of each video
            for learned, validations, tested in given.folds:
                apart(groups, sample[learned], sample[tested])
                for held in validations:
                    apart(recordings, sample[learned[held]], sample[learned[~held]])


def test_a_person_is_not_divided_by_what_is_reported_nor_a_recording_by_anything():
    rows = [(f"v{i}", "ab"[i % 2], None, "me") for i in range(16)]
    with pytest.raises(ValueError, match="only one subject"):
        choose_splits(fake_pack(rows), "train", "test", 0)
    held, rule = choose_validation(["a", "b"] * 8, ["me"] * 16, 0, recordings=[0, 0, *range(1, 15)])
    assert held.sum() == 4 and not held[:2].any() and "only one subject" in rule


def test_what_given_splits_share_is_counted_named_and_listed(tmp_path: Path):
    rows = [
        row("a1", "train", "ada", 0.0), row("b2", "train", None, 0.0),
        row("a3", "train", None, 0.0, recording="R", start_time="5"),
        row("b4", "train", None, 0.0),
        row("a1", "test", "ada", 9.0), row("b5", "test", "ada"),
        row("a6", "test", None, 0.0, recording="R", start_time="5.5"),
        row("b7", "test"), row("b8", "test"), row("=b9", "test"),
    ]  # fmt: skip
    rows[-1] = ("=b9", "b", *rows[-1][2:])
    pack = fake_pack(rows, [(1, 7), (7, 8), (3, 9)])
    train, test, notes = choose_splits(pack, "train", "test", 0)
    notes = [note for note in notes if not note.startswith("near-duplicates join")]
    found = {word: note for note in notes for word in ("overlap", "near", "subject", "of one rec")
             if word in note and ("overlap" in note) == (word == "overlap")}  # fmt: skip
    assert all("WARNING" in note and "train and test" in note for note in notes)
    assert "3 videos" in found["near"] and "b2 = b7" in found["near"]
    assert "a3 = a6" in found["overlap"] and "a1 = a1 at 9 s" in found["of one rec"]
    assert "1 subject" in found["subject"] and not any(LEAKS in note for note in notes)
    written = write_leaks(tmp_path, pack, {"train": train, "test": test})
    with open(written["leaks"], newline="") as file:
        kinds = [line["shared"] for line in csv.DictReader(file)]
    assert sorted(kinds) == [
        "near-duplicate", "near-duplicate", "near-duplicate", "overlapping times", "recording",
        "subject",
    ]  # fmt: skip
    none = dataclasses.replace(test, samples=test.samples[:0])
    assert not write_leaks(tmp_path, pack, {"train": train, "test": none})
    assert not (tmp_path / LEAKS).exists()


def test_near_duplicates_in_either_order_are_told_as_such():
    records = [{"source": f"v{i}", "subject": None, "extra": {}} for i in range(4)]
    pairs = np.array([(0, 2), (2, 3)])
    leaks = lambda a, b: find_leaks({a: records[a]}, {b: records[b]}, pairs)
    told = {(a, b): [leak.note for leak in leaks(a, b)] for a in (0, 2, 3) for b in (0, 2, 3)}
    assert told[0, 2] == told[2, 0] == told[2, 3] == told[3, 2] == [""]
    assert told[0, 3] == told[3, 0] == ["by way of other clips"]


def test_those_whom_a_near_duplicate_joins_are_left_out_together():
    rows = [(f"{who}{k}", f"c{k}", None, who) for k in "01" for who in ("ada", "ida", "eva")]
    _, folds, notes = leave_one_subject_out(fake_pack(rows, [(0, 4)]))
    assert [int(fold.sum()) for fold in folds] == [4, 2] and "ada and ida" in notes[1]
    train, _, notes = choose_splits(fake_pack(rows, [(0, 4)]), "train", "test", 0, leave_out="ada")
    assert {*train.subjects} == {"eva"} and "2 clips" in notes[0]
    with pytest.raises(ValueError, match="nobody can be left out"):
        leave_one_subject_out(fake_pack(rows, [(0, 4), (1, 2)]))


def test_every_class_of_one_subject_alone_is_named():
    rows = [("a0", "walk", None, "ada"), ("i0", "walk", None, "ida"), ("a1", "run", None, "ada"),
            ("i1", "jump", None, "ida"), ("i2", "skip", None, "ida")]  # fmt: skip
    with pytest.raises(ValueError, match="ada has run; ida has jump, skip"):
        leave_one_subject_out(fake_pack(rows))
