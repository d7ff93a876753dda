"""Retrieval between texts and videos: ranks, exact and in chunks.

Q queries, V videos, D width. A text has one right video; a video may have several right texts.
"""

import numpy as np

CHUNK = 1024  # rows of similarities held at once


def retrieval_ranks(
    texts: np.ndarray, videos: np.ndarray, owner: np.ndarray, chunk: int = CHUNK
) -> tuple[np.ndarray, np.ndarray]:
    """Rank of the right answer for every text and for every video, 1 = first.

    The similarity is the dot product. Of equal similarities the average place counts (ranks of 1.5 and the
    like), so that a model which answers everything alike scores chance and not everything, as in the code
    of Collaborative Experts (Liu et al. 2019, https://arxiv.org/abs/1907.13487). For a video with several
    texts the best-placed of them counts, as for MSVD and Flickr30k. Nothing is approximated, and no more than
    `chunk` rows of the matrix of similarities exist at a time.

    Args:
        texts: (Q, D).
        videos: (V, D).
        owner: (Q,) the number of the video each text belongs to.
        chunk: rows at a time; changes memory only.

    Returns:
        ranks of each text's video among all videos (Q,), ranks of each video's best text among all texts
        (V,), NaN for a video without a text.
    """
    assert len(texts) == len(owner)
    to_video = np.empty(len(texts))
    for start in range(0, len(texts), chunk):
        rows = slice(start, start + chunk)
        similar = texts[rows] @ videos.T
        right = similar[np.arange(len(similar)), owner[rows]]
        to_video[rows] = _place(similar, right)
    to_text = np.full(len(videos), np.nan)
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(len(videos) + 1))
    for start in range(0, len(videos), chunk):
        stop = min(start + chunk, len(videos))
        similar = videos[start:stop] @ texts.T
        for i in range(start, stop):
            own = order[bounds[i] : bounds[i + 1]]
            if len(own):
                row = similar[i - start]
                to_text[i] = _place(row[None], row[own].max()[None])[0]
    return to_video, to_text


def _place(similar: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Mean place (N,) of the value `right` (N,) in each row of `similar` (N, M), largest first, from 1."""
    above = (similar > right[:, None]).sum(1)
    equal = (similar == right[:, None]).sum(1)
    return above + (equal + 1) / 2


def summarise_ranks(ranks: np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10 as shares, median and mean rank, of ranks from 1; NaN are left out."""
    ranks = ranks[~np.isnan(ranks)]
    return {
        **{f"r{k}": float((ranks <= k).mean()) for k in (1, 5, 10)},
        "median_rank": float(np.median(ranks)),
        "mean_rank": float(ranks.mean()),
    }
