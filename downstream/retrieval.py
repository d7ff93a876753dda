"""Retrieval between texts and videos: ranks, exact and in chunks.

Q queries, V videos, D width. A text belongs to one video; a video may have several texts.
"""

from collections.abc import Callable, Sequence

import numpy as np

from downstream.metrics import bootstrap, exact_at_ends

CHUNK = 1024  # rows of similarities held at once


def retrieval_ranks(
    texts: np.ndarray, videos: np.ndarray, owner: np.ndarray, chunk: int = CHUNK
) -> tuple[np.ndarray, np.ndarray]:
    """Rank of the correct item for every text and for every video, 1 = first.

    The similarity is the dot product. Equal similarities share their average rank (1.5
    and the like), so that a model that scores everything alike scores chance and not everything, as
    in the code of Collaborative Experts (Liu et al. 2019, https://arxiv.org/abs/1907.13487). For a
    video with several texts the best-ranked of them counts, as for MSVD and Flickr30k, and the
    others are left out: it is ranked among the texts of other videos. Nothing is
    approximated, and no more than `chunk` rows of the matrix of similarities exist at a time.

    Args:
        texts: (Q, D).
        videos: (V, D).
        owner: (Q,) the number of the video each text belongs to.
        chunk: rows at a time; changes memory only.

    Returns:
        ranks of each text's video among all videos (Q,), ranks of each video's best text among it
        and the texts of all other videos (V,), NaN for a video without a text.
    """
    assert len(texts) == len(owner)
    to_video = np.empty(len(texts))
    for start in range(0, len(texts), chunk):
        rows = slice(start, start + chunk)
        similar = texts[rows] @ videos.T
        to_video[rows] = _rank(similar, similar[np.arange(len(similar)), owner[rows]])
    to_text = np.full(len(videos), np.nan)
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(len(videos) + 1))
    for start in range(0, len(videos), chunk):
        stop = min(start + chunk, len(videos))
        similar = videos[start:stop] @ texts.T
        for i in range(start, stop):
            own = order[bounds[i] : bounds[i + 1]]
            if len(own):
                best = similar[i - start, own].max()
                similar[i - start, own[1:]] = -np.inf  # one stands for all its own
                similar[i - start, own[0]] = best
                to_text[i] = _rank(similar[None, i - start], best[None])[0]
    return to_video, to_text


def same_texts(texts: list[str], tokenizer: Callable) -> np.ndarray:
    """For each text the number of the first one that is the same (Q,).

    The same are texts that differ in case and spacing only, and those that a text tower encodes
    equally, whose tokens are equal. A cut text is the same as another only by its words.

    Args:
        texts: sentences.
        tokenizer: of the tower: texts -> tokens (B, L), and which were cut.
    """
    first: dict[object, int] = {}
    number = [first.setdefault(" ".join(t.lower().split()), i) for i, t in enumerate(texts)]
    kept = sorted(set(number))
    by_tokens: dict[bytes, int] = {}
    same = {}
    for start in range(0, len(kept), CHUNK):
        some = kept[start : start + CHUNK]
        tokens, cut = tokenizer([texts[i] for i in some])
        for i, row, is_cut in zip(some, tokens.numpy(), cut, strict=True):
            same[i] = i if is_cut else by_tokens.setdefault(row.tobytes(), i)
    return np.array([same[i] for i in number], dtype=np.int64)


def _rank(similar: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Mean rank (N,) from 1 of `value` (N,) in each row of `similar` (N, M), largest first."""
    above = (similar > value[:, None]).sum(1)
    equal = (similar == value[:, None]).sum(1)
    return above + (equal + 1) / 2


def summarise_ranks(ranks: np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10 as fractions, median and mean rank, of ranks from 1; NaN are left out."""
    ranks = ranks[~np.isnan(ranks)]
    return {
        **{f"r{k}": float((ranks <= k).mean()) for k in (1, 5, 10)},
        "median_rank": float(np.median(ranks)),
        "mean_rank": float(ranks.mean()),
    }


def rank_intervals(
    to_video: np.ndarray, to_text: np.ndarray, owner: np.ndarray,
    groups: Sequence[str | None] | np.ndarray, seed: int,
) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:  # fmt: skip
    """95 % intervals of `summarise_ranks` of both directions, by name; see `metrics.bootstrap`.

    Videos are drawn, each with all of its texts, and ranks stay those among all others.

    Args:
        to_video: (Q,) as `retrieval_ranks` gives it, likewise `to_text` (V,).
        to_text: see there.
        owner: (Q,) the number of the video each text belongs to.
        groups: (V,) who is seen in each video; all different: videos are drawn.
        seed: of the draws.
    """

    def both(times: np.ndarray) -> tuple[float, ...]:
        often = times.astype(int)
        drawn = np.repeat(to_video, often[owner]), np.repeat(to_text, often)
        return tuple(value for ranks in drawn for value in summarise_ranks(ranks).values())

    names = list(summarise_ranks(to_video))
    ends = [
        exact_at_ends(each, len({*groups})) if name.startswith("r") else each
        for name, each in zip([*names, *names], zip(*bootstrap(both, groups, seed), strict=True),
                              strict=True)
    ]  # fmt: skip
    first, second = ends[: len(names)], ends[len(names) :]
    return dict(zip(names, first, strict=True)), dict(zip(names, second, strict=True))


def chance_ranks(correct: np.ndarray, num: int) -> dict[str, float]:
    """The values of `summarise_ranks` for a random order of `num` items.

    Args:
        correct: (N,) the number of correct items of each query; as in `retrieval_ranks` the best of
            them is ranked among the wrong ones.
        num: of all items.
    """
    # The probability that 0, 1, ... wrong items come before the first correct one.
    before = np.zeros(num + 1)
    for own, count in zip(*np.unique(correct[correct > 0], return_counts=True), strict=True):
        wrong = num - own - np.arange(num - own)
        before[: num - own + 1] += count * np.cumprod([1, *wrong / (wrong + own)])
    before /= (correct > 0).sum()
    at_most = 1 - before[1:]  # of ranks 1, 2, ...
    median = [np.searchsorted(at_most.round(12), 0.5, side) + 1 for side in ("left", "right")]
    return {
        **{f"r{k}": float(at_most[min(k, num) - 1]) for k in (1, 5, 10)},
        "median_rank": float(np.mean(median)),
        "mean_rank": float(before.sum()),
    }
