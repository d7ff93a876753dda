"""Edit score and F1 of segments, against hand counts and a literal re-computation."""

import itertools
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from downstream.segments import (
    UNLABELLED,
    classes_of_frames,
    edit_score,
    frame_at,
    frame_classes,
    segment_hits,
    segment_scores,
)
from downstream.splits import choose_splits
from pretrain.data.sources import list_sources


def test_classes_of_frames_that_differ_in_spelling_only_are_refused():
    def row(i: int, split: str, segments: str) -> dict:
        extra = {"segments": segments}
        return {"source": f"v{i}", "label": None, "subject": None, "split": split, "extra": extra}

    rows = [row(0, "train", "0-1 sit down; 1-2 up"), row(1, "test", "0-1 up; 1-2 Sit_Down")]
    pack = SimpleNamespace(
        name="DATA",
        where=lambda **_: "DATA",
        records=lambda: iter(rows),
        record=lambda i: rows[i],
        near_duplicates=lambda: None,
    )
    train, test, _ = choose_splits(pack, "train", "test", 0, labels=False)
    with pytest.raises(ValueError, match=r"'Sit_Down' and 'sit down'"):
        classes_of_frames(pack, train, test)


def frames(text: str) -> np.ndarray:
    """'AAB..C': one letter a frame, a dot where there is no label."""
    return np.array([UNLABELLED if c == "." else ord(c) - ord("A") for c in text])


@pytest.mark.parametrize(
    ("truth", "predicted", "score"),
    [
        ("AAABBBCC", "ABBBBBBC", 1),  # order right, borders wrong
        ("AAABBBCC", "AAABBBBB", 2 / 3),  # C forgotten
        ("AAAABBBB", "ABAABBBB", 1 / 2),  # A B A B against A B: two too many of four
        ("AAAA", "BBBB", 0),
        ("AA..AA", "AA..AA", 1),  # a gap parts two segments of one class
        ("AA..AA", "AA..BB", 1 / 2),
        ("....", "....", 1),
    ],
)
def test_the_edit_score_of_hand_counted_sequences(truth, predicted, score):
    assert edit_score(frames(truth), frames(predicted)) == pytest.approx(score)


def literal_edit(a: tuple, b: tuple) -> int:
    """The recursive definition of the edit distance."""

    @cache
    def distance(i, j):
        if not i or not j:
            return i + j
        return min(
            distance(i - 1, j) + 1,
            distance(i, j - 1) + 1,
            distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]),
        )

    return distance(len(a), len(b))


def test_the_edit_score_is_the_recursive_definitions():
    rng = np.random.default_rng(0)
    for _ in range(200):
        truth, predicted = (np.repeat(rng.integers(0, 4, 7), rng.integers(1, 4, 7)) for _ in "ab")
        n = min(len(truth), len(predicted))
        truth, predicted = truth[:n], predicted[:n]
        runs = [tuple(x[np.r_[True, x[1:] != x[:-1]]].tolist()) for x in (truth, predicted)]
        expected = 1 - literal_edit(*runs) / max(map(len, runs))
        assert edit_score(truth, predicted) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("truth", "predicted", "overlap", "hits"),
    [
        ("AAAABBBB", "AAAABBBB", 0.5, (2, 0, 0)),
        ("AAAABBBB", "AABBBBBB", 0.5, (2, 0, 0)),  # 2 of 4, 4 of 6
        ("AAAABBBB", "AABBBBBB", 0.6, (1, 1, 1)),
        ("AAAAAAAA", "AAABAAAA", 0.25, (1, 2, 0)),  # one of the two As; B and the other A invented
        ("AAAABBBB", "CCCCCCCC", 0.1, (0, 1, 2)),
        ("AA..AA", "AA..BB", 0.1, (1, 1, 1)),
        ("AA....", "AA....", 0.1, (1, 0, 0)),
    ],
)
def test_segments_are_found_invented_and_missed(truth, predicted, overlap, hits):
    assert segment_hits(frames(truth), frames(predicted), overlap) == hits


def test_scores_over_sequences():
    perfect, half = ("AAAABBBB", "AAAABBBB"), ("AAAABBBB", "AAAAAAAA")
    pairs = [(frames(a), frames(b)) for a, b in (perfect, half)]
    scores = segment_scores(pairs)
    assert scores["edit"] == pytest.approx((1 + 0.5) / 2)
    assert scores["f1_10"] == scores["f1_50"] == pytest.approx(2 * 3 / (2 * 3 + 0 + 1))


@pytest.mark.parametrize("decimals", [2, 3, 6])
def test_written_times_find_their_frames(decimals):
    for rate in (24000 / 1001, 24, 25, 30000 / 1001, 30, 50, 60000 / 1001, 60):
        for number in range(int(600 * rate)):
            assert frame_at(float(f"{number / rate:.{decimals}f}"), rate) == number, rate


def test_a_segment_holds_the_frames_that_it_was_made_of(tmp_path):
    (tmp_path / "a.mp4").touch()
    for rate in (30000 / 1001, 60):
        edges = list(range(0, 300, 7))
        lines = [f"a.mp4,{a / rate},{b / rate},{'xy'[i % 2]}" for i, (a, b) in
                 enumerate(itertools.pairwise(edges))]  # fmt: skip
        (tmp_path / "list.csv").write_text("\n".join(["path,start,end,label", *lines]))
        (source,) = list_sources(tmp_path / "list.csv").sources
        clip = {"frames": 300, "fps": rate, "start": 0.0, "extra": source.extra, "source": "a"}
        found = frame_classes(clip, {"x": 0, "y": 1})
        assert found.tolist() == [(i // 7) % 2 if i < edges[-1] else -1 for i in range(300)]
