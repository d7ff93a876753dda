"""Opens a video and the files that came with it, in a process that decodes."""

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from pretrain.data.arrays import read_arrays
from pretrain.data.encode import DiskError
from pretrain.data.guard import Refused
from pretrain.data.pose_files import MAX_BYTES, parse_poses, read_poses
from pretrain.data.poses import COLUMNS, Poses
from pretrain.files import open_regular

OURS = (errno.EMFILE, errno.ENFILE)  # said on opening a file, and no fault of that file


class Part(io.RawIOBase):
    """A regular file, or a part of one, as a file; `error` is what the disk said while reading."""

    def __init__(self, path: str, member: tuple[int, int] | None):
        self.file = open_regular(path)
        self.offset, self.size = member or (0, os.fstat(self.file.fileno()).st_size)
        self.at = 0
        self.error: OSError | None = None

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.RawIOBase`."""
        self.at = offset + (0, self.at, self.size)[whence]
        if self.at < 0:
            raise OSError(errno.EINVAL, "seek before the start")
        return self.at

    def readinto(self, buffer) -> int:
        """See `io.RawIOBase`."""
        try:
            self.file.seek(self.offset + self.at)
            data = self.file.read(max(0, min(len(buffer), self.size - self.at)))
        except OSError as error:
            self.error = error
            raise
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def close(self) -> None:
        """See `io.RawIOBase`."""
        self.file.close()
        super().close()


@contextlib.contextmanager
def opened(file: dict) -> Iterator[io.BufferedReader]:
    """A file beside a video, or a member of a tar, for reading."""
    with reading(file["path"]):
        raw: Any = Part(file["path"], file["member"])
        with io.BufferedReader(raw) as given:
            yield given


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """What cannot be read is Refused, unless this machine is to blame."""
    try:
        yield
    except OSError as error:
        if error.errno in OURS:
            raise DiskError(f"cannot open {path}: {error.strerror}") from error
        raise Refused(f"cannot be read: {error.strerror or error}", retry=True) from error


def given_poses(file: dict, camera: dict | None, skeleton: str) -> Poses:
    """The poses of a whole video, with u and v where the file, or that of a camera, says them.

    Args:
        file: path and member of the file, or the path of a folder.
        camera: of another file, which may say where joints are in the picture, see `_project`.
        skeleton: of the joints, where the file leaves it open.

    Raises:
        Refused: they cannot be read.
    """
    try:
        if file["member"] is None and os.path.isdir(file["path"]):
            poses = read_poses(file["path"], skeleton)
        else:
            with opened(file) as given:
                poses = parse_poses(given.read(MAX_BYTES + 1), skeleton)
    except ValueError as error:
        raise Refused(str(error)) from error
    return poses if "u" in poses.columns or camera is None else _project(poses, camera)


def _project(poses: Poses, camera: dict) -> Poses:
    """Add to joints in metres where they are in the picture, if the file beside them says.

    That is an array `camera` (T, 3), as the synthetic dataset has: pixels a metre, and column and
    row of the origin, pixel centres at whole numbers; the projection is parallel.
    """
    values, columns = poses.values, poses.columns
    with opened(camera) as given:
        found = read_arrays(given, ("camera",)).get("camera")
    if found is None or found.shape != (len(values), 3) or columns[:3] != COLUMNS[:3]:
        return poses
    place = found.astype(np.float32)[:, None, None]
    pixels = values[..., :2] * place[..., :1] + place[..., 1:] + 0.5
    pixels = pixels * (values[..., -1:] > 0)
    values = np.concatenate([values[..., :3], pixels, values[..., -1:]], -1)
    return Poses(values, COLUMNS, poses.skeleton, poses.fps, poses.people, None)


def refuse_frames(poses: Poses, total: int) -> None:
    """Raise Refused where poses are not of so many frames."""
    if len(poses.values) != total:
        raise Refused(
            f"has {len(poses.values)} frames of poses, and the video has {total}: give one for each"
        )
