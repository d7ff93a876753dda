"""Ranks against a literal computation, ties, several captions, chunks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from downstream.retrieval import (
    chance_ranks,
    rank_intervals,
    retrieval_ranks,
    same_texts,
    summarise_ranks,
)
from pretrain.text import ClipTokenizer, HubTokenizer


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
        best = similar[owner == v, v].max()
        rivals = similar[owner != v, v]
        assert to_text[v] == literal_place(np.append(rivals, best), best)


def test_answering_everything_alike_is_chance_and_not_perfect():
    ranks, _ = retrieval_ranks(np.ones((99, 4)), np.ones((99, 4)), np.arange(99))
    assert summarise_ranks(ranks) == {
        "r1": 0.0, "r5": 0.0, "r10": 0.0, "median_rank": 50.0, "mean_rank": 50.0,
    }  # fmt: skip


@pytest.mark.parametrize("same", [1, 2, 20])
def test_a_videos_own_captions_are_no_rivals(same):
    """A perfect model stays perfect however often a video says the same."""
    owner = np.repeat(np.arange(12), same)
    _, to_text = retrieval_ranks(np.eye(12)[owner], np.eye(12), owner)
    assert summarise_ranks(to_text)["r1"] == 1.0 and to_text.max() == 1


def test_another_videos_text_of_the_same_words_ties():
    owner = np.array([0, 0, 1, 2])  # 0 and 1 say the same, 0 twice
    _, to_text = retrieval_ranks(np.eye(3)[[0, 0, 0, 2]], np.eye(3)[[0, 0, 2]], owner)
    assert to_text.tolist() == [1.5, 2.0, 1.0]


def test_equal_but_for_case_and_spaces_is_equal_also_for_a_tower_that_sees_case():
    said = ["A man Walks", "a man  walks", "a man walks.", "it sits", "a man walks", "It sits"]
    cased = HubTokenizer(fast_words(), 100, 8)
    assert same_texts(said, ClipTokenizer(77)).tolist() == [0, 0, 2, 3, 0, 3]
    assert same_texts(said, cased).tolist() == [0, 0, 2, 3, 0, 3]
    # What only the tower takes for the same, and what is the same only because it was cut.
    assert same_texts(
        ["caf\u00e9", "cafe\u0301", "tea &amp; cake", "tea & cake"], ClipTokenizer(77)
    ).tolist() == [0, 0, 2, 2]
    assert same_texts([f"{'a ' * 99}{end}" for end in "xyx"], ClipTokenizer(77)).tolist() == [
        0,
        1,
        0,
    ]


def fast_words():
    """A tokenizer that tells capitals from small letters."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "A", "a", "man", "Walks", "walks", ".", "it", "It", "sits"]
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def test_a_video_without_a_text_is_left_out():
    texts = np.eye(3)[:2]
    _, to_text = retrieval_ranks(texts, np.eye(3), np.array([0, 1]))
    assert np.isnan(to_text[2])
    assert summarise_ranks(to_text)["r1"] == 1.0


def test_summary():
    found = summarise_ranks(np.array([1, 2, 6, 11.5]))
    assert found["r1"] == 0.25 and found["r5"] == 0.5 and found["r10"] == 0.75
    assert found["median_rank"] == 4 and found["mean_rank"] == pytest.approx(5.125)


@pytest.mark.parametrize(
    "right, num", [([1] * 4, 4), ([1, 1, 2, 1, 3], 8), ([0, 2, 1], 3), ([1], 1)]
)
def test_chance_is_what_random_orders_reach(right, num):
    """By drawing orders, scored by the same function; exact where every video has one caption."""
    rng, owner = np.random.default_rng(0), np.repeat(np.arange(len(right)), right)
    chance = chance_ranks(np.array(right), num)
    ranks = []
    for _ in range(3000):
        texts, videos = np.eye(num), rng.random((len(right), num))
        ranks.append(retrieval_ranks(texts, videos, owner)[1])
    drawn = summarise_ranks(np.concatenate(ranks))
    assert chance.keys() == drawn.keys()
    for name in drawn:
        # Half a rank where as many ranks lie below a place as above.
        assert chance[name] == pytest.approx(drawn[name], abs=0.5 if "median" in name else 0.05)
    if set(right) == {1}:
        assert chance["r1"] == pytest.approx(1 / num) and chance["r10"] == 1
        assert chance["mean_rank"] == chance["median_rank"] == pytest.approx((num + 1) / 2)


def test_intervals_are_those_of_drawn_videos_with_all_their_texts():
    """Of R@1 that of a mean over people; of ranks that are all one it is exact, or none."""
    rng = np.random.default_rng(3)
    owner = np.repeat(np.arange(60), 2)
    hit = rng.random(60) < 0.4
    to_text = np.where(hit, 1.0, 20.0)
    people = [str(i // 6) for i in range(60)]
    t2v, v2t = rank_intervals(np.repeat(to_text, 2), to_text, owner, people, 0)
    assert t2v == v2t  # every text is ranked as its video
    low, high = v2t["r1"]
    each = hit.reshape(10, 6).mean(1)
    half = 1.96 * np.sqrt(each.var(ddof=1) / 10 + hit.var() / 60)
    assert low < hit.mean() < high and high - low == pytest.approx(2 * half, rel=0.35)
    alone, _ = rank_intervals(np.full(120, 3.0), to_text, owner, people, 0)
    room = 1 - 0.025 ** (1 / 10)
    assert alone["r1"] == (0, room) and alone["r5"] == (1 - room, 1)
    assert alone["mean_rank"] == (3, 3)
