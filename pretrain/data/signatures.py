"""The signature of a clip: small grey pictures over time, by which near-duplicates are found.

They are made while the clip is packed, of frames that are decoded anyway: `SIDE` x `SIDE` pixels,
the whole picture stretched to a square, the means of all frames within `RATE` parts of a second (of
slower clips each frame). A pack has those of all clips in signatures.bin:

    int64      where each clip's begins in the file, and the end of the last: one more than clips
    zlib       differences of pictures from the one before, uint8 (T, SIDE, SIDE); nothing for poses

So whoever looks for near-duplicates need not decode what is packed (`pretrain/data/near.py`).
"""

import contextlib
import hashlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from pretrain.data.index import SIGNATURES
from pretrain.data.timing import SHOWN, SLOW
from pretrain.files import open_regular, reading

RATE = 12  # pictures a second
SIDE = 32  # pixels
LONGEST = 2**12  # pictures of a clip; what comes later is not compared
SUFFIX = ".sig"  # of a clip's signature that is not in a pack yet


_AREA = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


def pace(fps: float) -> float:
    """The frames that count as a second."""
    return SHOWN if fps < SLOW else fps


def _places(frames: np.ndarray, fps: float) -> np.ndarray:
    """The numbers of the pictures to which frames of these numbers belong."""
    fps = pace(fps)
    return np.floor((frames + 0.5) * RATE / fps).astype(np.int64) if fps > RATE else frames


def count_pictures(frames: int, fps: float) -> int:
    """How many pictures the signature of a clip of so many frames has."""
    return min(LONGEST, int(_places(np.array([frames - 1]), fps)[0]) + 1)


class Signature:
    """Takes the frames of a clip and makes its signature.

    Args:
        fps: of the clip.
    """

    def __init__(self, fps: float):
        self.fps, self.scaler = fps, VideoReformatter()
        self.pictures: list[np.ndarray] = []
        self.sum = np.zeros((SIDE, SIDE), np.float32)
        self.count = self.frame = self.at = 0

    def small(self, frame: av.VideoFrame) -> np.ndarray:
        """A frame as grey levels (SIDE, SIDE)."""
        small = self.scaler.reformat(frame, SIDE, SIDE, "gray", interpolation=_AREA, threads=1)
        return small.to_ndarray()

    def take(self, small: np.ndarray, repeats: int = 1) -> None:
        """Take the next frame, as `small` gives it, which is shown so many times."""
        if len(self.pictures) >= LONGEST:
            return
        for at in _places(self.frame + np.arange(repeats), self.fps).tolist():
            if at != self.at:
                self._end()
                self.at = at
            self.sum += small
            self.count += 1
        self.frame += repeats

    def _end(self) -> None:
        if self.count and len(self.pictures) < LONGEST:
            self.pictures.append((self.sum / self.count).round().astype(np.uint8))
        self.sum[:] = 0
        self.count = 0

    def data(self) -> bytes:
        """The signature as it is stored."""
        self._end()
        pictures = np.stack(self.pictures)
        steps = np.concatenate([pictures[:1], pictures[1:] - pictures[:-1]])  # modulo 256
        return zlib.compress(steps.tobytes(), 6)


def read_signature(data: bytes, frames: int, fps: float) -> np.ndarray:
    """The pictures of a clip, float32 (T, SIDE, SIDE), `RATE` a second.

    Args:
        data: as it is stored.
        frames: of the clip.
        fps: of the clip.

    Raises:
        ValueError: it cannot be the signature of such a clip.
    """
    size = count_pictures(frames, fps) * SIDE**2
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"a damaged signature: {error}") from error
    if len(found) != size:
        raise ValueError("a signature of another length than its clip")
    steps = np.frombuffer(found, np.uint8).reshape(-1, SIDE, SIDE)
    pictures = np.cumsum(steps, axis=0, dtype=np.uint8).astype(np.float32)
    if (fps := pace(fps)) < RATE:  # each is shown for longer
        shown = np.arange(max(1, int(len(pictures) * RATE / fps + 1e-6))) * fps / RATE
        pictures = pictures[np.minimum((shown + 1e-6).astype(int), len(pictures) - 1)][:LONGEST]
    return pictures


class Signatures:
    """The signatures of the clips of a pack.

    Args:
        path: the file.
        about: what the index says of it.
        num_clips: of the pack.

    Raises:
        ValueError: it is not the file that the index describes.
    """

    def __init__(self, path: Path, about: dict, num_clips: int):
        wrong = f"{path} is not the file its index describes: pack again"
        with reading(path), open_regular(path) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != about["sha256"]:
                raise ValueError(wrong)
            file.seek(0)
            head = file.read(8 * (num_clips + 1))
        if len(head) != 8 * (num_clips + 1):
            raise ValueError(wrong)
        self.path, self.starts = path, np.frombuffer(head, "<i8")
        steps = np.diff(self.starts)
        if (steps < 0).any() or self.starts[0] != len(head) or self.starts[-1] != about["bytes"]:
            raise ValueError(wrong)

    def get(self, number: int) -> bytes:
        """The signature of a clip as it is stored; nothing, where there is none."""
        with reading(self.path), open_regular(self.path) as file:
            file.seek(int(self.starts[number]))
            return file.read(int(self.starts[number + 1] - self.starts[number]))


def open_signatures(folder: Path, index: dict) -> Signatures | None:
    """The signatures of a pack; None where it has none, or not those that its index describes.

    Args:
        folder: of the pack.
        index: of the pack.
    """
    if about := index.get("signatures"):
        with contextlib.suppress(ValueError):
            return Signatures(folder / SIGNATURES, about, index["num_clips"])
    return None


def write_signatures(path: Path, all_of_them: Iterable[bytes], num_clips: int) -> dict:
    """Write the signatures of all clips of a pack in order; returns what its index says of it.

    Args:
        path: of a new file.
        all_of_them: as they are stored, one a clip.
        num_clips: how many there are.
    """
    starts = [8 * (num_clips + 1)]
    with open(path, "xb") as file:
        file.write(bytes(starts[0]))
        for data in all_of_them:
            file.write(data)
            starts.append(starts[-1] + len(data))
        assert len(starts) == num_clips + 1
        file.seek(0)
        file.write(np.array(starts, "<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": starts[-1]}
