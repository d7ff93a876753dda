"""Which videos are fitted on, judged on and tested on."""

from types import SimpleNamespace

import numpy as np
import pytest

from downstream.splits import choose_splits, choose_validation

PEOPLE = (("ada", "train"), ("ida", "test"), ("eva", None))


def fake_pack(rows: list[tuple]) -> SimpleNamespace:
    """A pack of records (source, label, split, subject); only the index matters here."""
    names = ("source", "label", "split", "subject")
    return SimpleNamespace(
        name="DATA",
        where=lambda **_: "DATA",
        records=lambda: (dict(zip(names, r, strict=True)) for r in rows),
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
