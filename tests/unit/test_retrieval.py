"""Ranks against a literal computation, ties, several captions, chunks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from downstream.retrieval import retrieval_ranks, summarise_ranks


def literal_place(row: np.ndarray, right: float) -> float:
    """Mean of the places that equal values take in a sorted list."""
    places = [i for i, v in enumerate(sorted(row.tolist(), reverse=True), 1) if v == right]
    return sum(places) / len(places)


@given(
    num_videos=st.integers(1, 9),
    captions=st.integers(1, 3),
    levels=st.integers(1, 4),
    chunk=st.integers(1, 12),
    seed=st.integers(0, 50),
)
def test_ranks_against_a_literal_computation(num_videos, captions, levels, chunk, seed):
    """Integer vectors of few values make many ties."""
    rng = np.random.default_rng(seed)
    videos = rng.integers(0, levels, (num_videos, 2)).astype(np.float32)
    owner = rng.permutation(np.repeat(np.arange(num_videos), captions))
    texts = rng.integers(0, levels, (len(owner), 2)).astype(np.float32)
    to_video, to_text = retrieval_ranks(texts, videos, owner, chunk)
    similar = texts @ videos.T
    for q in range(len(owner)):
        assert to_video[q] == literal_place(similar[q], similar[q, owner[q]])
    for v in range(num_videos):
        best = min(literal_place(similar[:, v], similar[q, v]) for q in np.flatnonzero(owner == v))
        assert to_text[v] == best


def test_answering_everything_alike_is_chance_and_not_perfect():
    ranks, _ = retrieval_ranks(np.ones((99, 4)), np.ones((99, 4)), np.arange(99))
    assert summarise_ranks(ranks) == {
        "r1": 0.0, "r5": 0.0, "r10": 0.0, "median_rank": 50.0, "mean_rank": 50.0,
    }  # fmt: skip


def test_a_video_without_a_text_is_left_out():
    texts = np.eye(3)[:2]
    _, to_text = retrieval_ranks(texts, np.eye(3), np.array([0, 1]))
    assert np.isnan(to_text[2])
    assert summarise_ranks(to_text)["r1"] == 1.0


def test_summary():
    found = summarise_ranks(np.array([1, 2, 6, 11.5]))
    assert found["r1"] == 0.25 and found["r5"] == 0.5 and found["r10"] == 0.75
    assert found["median_rank"] == 4 and found["mean_rank"] == pytest.approx(5.125)
