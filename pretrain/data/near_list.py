"""Reads near_duplicates.jsonl of a pack, which `pretrain/data/near.py` describes and writes."""

import hashlib
from pathlib import Path

import numpy as np

from pretrain.files import open_regular, parse_json, reading

MOST = 64  # pairs that are listed of a clip; a chain of pairs leads to further ones


def read_pairs(path: Path, about: dict, num_clips: int) -> np.ndarray:
    """The near-duplicates of a pack, numbers of clips (K, 2).

    Args:
        path: the file.
        about: what the index says of it.
        num_clips: how many clips the pack has.

    Raises:
        ValueError: it is not the file that the index describes, or cannot be true.
    """
    size, digest = about["bytes"], hashlib.sha256()
    wrong = f"{path} is not the file its index describes: pack again"
    pairs: list[tuple[int, int]] = []
    with reading(path), open_regular(path) as file:
        for line in iter(lambda: file.readline(2**20), b""):
            size -= len(line)
            digest.update(line)
            if size < 0 or len(pairs) >= MOST * num_clips:
                raise ValueError(wrong)
            try:
                found = parse_json(line)
            except ValueError:
                found = None
            match found:
                case {"clips": [int(a), int(b)]} if 0 <= a < b < num_clips:
                    pairs.append((a, b))
                case _:
                    raise ValueError(f"{path}:{len(pairs) + 1}: no pair of clips: pack again")
    if size or digest.hexdigest() != about["sha256"]:
        raise ValueError(wrong)
    return np.array(pairs, np.int64).reshape(-1, 2)
