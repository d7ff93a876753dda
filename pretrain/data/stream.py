"""A long video as a stream of frames: decoded once, forward, in a process that may be killed.

Memory stays flat. `python -m pretrain.data.stream` is the worker: one job (JSON) from standard
input, then messages on standard output, of which each is a letter, four bytes that say how long it
is, and its content. The guards are those of `ingest.py`.
"""

import contextlib
import json
import os
import queue
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import IO, Any

import numpy as np

from pretrain.data.guard import Refused
from pretrain.data.ingest import MEMORY_LIMIT, limit_worker, stream
from pretrain.data.pool import worker_environment

WORKER = (sys.executable, "-P", "-m", "pretrain.data.stream")
AHEAD = 8  # messages read before they are asked for
HEAD = struct.Struct("<cI")  # kind and bytes
FRAME = struct.Struct("<IHH")  # ticks, height, width; the pixels follow
Message = tuple[bytes, np.ndarray]  # what stands before a frame, and the frame


class Worker:
    """A process that decodes one thing and says messages.

    Args:
        command: the program.
        job: what it reads from its standard input.
        timeout: seconds without a sign of progress before it is given up.

    Attributes:
        about: what its first message says.

    Raises:
        Refused: it cannot read what the job names.
    """

    def __init__(self, command: tuple[str, ...], job: dict, timeout: float):
        self.timeout = timeout
        self._messages: queue.Queue = queue.Queue(AHEAD)
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env=worker_environment(),
            )  # fmt: skip
        except OSError as error:
            raise ValueError(f"cannot start a decoding process: {error.strerror}") from error
        assert self._process.stdin is not None and self._process.stdout is not None  # pipes
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()
        with contextlib.suppress(OSError):  # it died: `next` says so
            self._process.stdin.write(json.dumps(job).encode())
            self._process.stdin.close()
        try:
            kind, content = self.next()
            if kind != b"H":
                raise Refused(_reason(content))
            self.about: dict = json.loads(content)
        except BaseException:
            self.close()
            raise

    def _listen(self, pipe: IO[bytes]) -> None:
        """Hands on what the worker says; None where it ends without saying so."""
        with contextlib.suppress(OSError, ValueError):  # closed under our hands
            while head := pipe.read(HEAD.size):
                kind, size = HEAD.unpack(head)
                content = pipe.read(size)
                if len(content) < size:
                    break
                self._messages.put((kind, content))
        self._messages.put(None)

    def next(self) -> tuple[bytes, bytes]:
        """The next message that is no mere sign of life."""
        while True:
            try:
                message = self._messages.get(timeout=self.timeout)
            except queue.Empty:
                raise Refused(f"decoder made no progress for {self.timeout:g} s") from None
            if message is None:
                raise Refused(f"decoder died with exit code {self._process.wait()}")
            if message[0] != b"B":
                return message

    def pictures(self, head: struct.Struct) -> Iterator[tuple[Any, np.ndarray]]:
        """What stands before each frame, and the frame, uint8 (H, W, 3), to the end.

        Args:
            head: of a frame's message: a number, height and width.

        Raises:
            Refused: the worker says that it cannot go on, or nonsense.
        """
        while True:
            kind, content = self.next()
            if kind == b"E":
                if reason := _reason(content):
                    raise Refused(reason)
                return
            number, height, width = head.unpack(content[: head.size].ljust(head.size, b"\0"))
            pixels = height * width
            if kind != b"F" or len(content) != head.size + 3 * pixels or not pixels:
                raise Refused("decoder said something that makes no sense")
            picture = np.frombuffer(content, np.uint8, offset=head.size)
            yield number, picture.reshape(height, width, 3)

    def close(self) -> None:
        """End the worker, wherever it is."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(queue.Empty):  # its listener may wait for room
            while True:
                self._messages.get_nowait()


class Frames:
    """The frames of a raw video on a constant clock, from front to back, once.

    Args:
        path: the file.
        member: offset and size in bytes of the payload inside the file, if it is an archive.
        short_side: pixels; larger frames are scaled down to it.
        timeout: seconds without a sign of progress before the decoder is killed.
        command: the worker program.

    Attributes:
        fps: frames a second; frame i is shown from i / fps on.
        ticks: about how many frames there are.
        reason: why nothing follows the last frame, where that is not the end; empty otherwise.

    Raises:
        Refused: the file cannot be used.
    """

    def __init__(
        self, path: str, member: tuple[int, int] | None, short_side: int, timeout: float = 60.0,
        command: tuple[str, ...] = WORKER,
    ):  # fmt: skip
        self.reason = ""
        job = {"path": path, "member": member, "short_side": short_side}
        self._worker = Worker(command, job, timeout)
        self.fps, self.ticks = (
            Fraction(*self._worker.about["fps"]),
            int(self._worker.about["ticks"]),
        )

    def chunks(self, most: int = 32) -> Iterator[np.ndarray]:
        """All frames in order, uint8 (n, H, W, 3) with n up to `most`; sets `reason` at the end."""
        waiting: list[np.ndarray] = []
        shape = None
        try:
            for ticks, picture in self._worker.pictures(FRAME):
                shape = shape or picture.shape
                if picture.shape != shape:
                    raise Refused("decoder said something that makes no sense")
                for _ in range(ticks):
                    waiting.append(picture)
                    if len(waiting) == most:
                        yield np.stack(waiting)
                        waiting = []
        except Refused as error:
            self.reason = str(error)
        if waiting:
            yield np.stack(waiting)

    def close(self) -> None:
        """End the worker, wherever it is."""
        self._worker.close()

    def __enter__(self) -> "Frames":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _reason(content: bytes) -> str:
    return content.decode(errors="replace")


# ---- the worker --------------------------------------------------------------------------------


def serve_stream(stream: Callable[[dict, Callable[[], None]], Iterator[dict | Message]]) -> None:
    """Be a worker: say what becomes of the one job of standard input.

    Args:
        stream: takes the job and `beat`, to be called whenever there was progress; yields first
            what there is to know, then what stands before each frame, and the frame.
    """
    limit_worker()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not be read as an answer
    last = time.monotonic()

    def say(kind: bytes, *parts: bytes) -> None:
        answers.write(HEAD.pack(kind, sum(map(len, parts))))
        for part in parts:
            answers.write(part)
        answers.flush()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            say(b"B")

    reason = ""
    try:
        for found in stream(json.load(sys.stdin), beat):
            if isinstance(found, dict):
                say(b"H", json.dumps(found).encode())
            else:
                say(b"F", found[0], found[1].tobytes())
    except MemoryError:
        reason = f"needed more than {MEMORY_LIMIT >> 30} GiB of memory"
    except Exception as error:  # DiskError and Refused are about what is read
        reason = str(error) or type(error).__name__
    say(b"E", reason.encode(errors="replace"))


def _stream(job: dict, beat: Callable[[], None]) -> Iterator[dict | Message]:
    for found in stream(job["path"], job["member"], job["short_side"], beat):
        if isinstance(found, dict):
            yield found
        else:
            yield FRAME.pack(found[1], *found[0].shape[:2]), found[0]


if __name__ == "__main__":
    serve_stream(_stream)
