"""Cameras: an rtsp:// address or a webcam, as frames on a constant clock, the newest only.

Frames are decoded in a process of their own, `python -m pretrain.data.live`, with the guards of
`stream.py`. `Camera` keeps as many of the newest as it is told to: whoever is too slow for them
misses some, and what is shown is never old. What a camera is called in print and in files has no
user, password, path or query of its address, any of which may be secret.
"""

import math
import os
import re
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from urllib.parse import urlsplit

import av
import av.device
import numpy as np
from av.video.reformatter import VideoReformatter

from pretrain.data.guard import MAX_PIXELS, Refused
from pretrain.data.stream import Message, Worker, serve_stream
from pretrain.data.timing import plain_rate
from pretrain.files import is_there
from pretrain.names import for_screen

WORKER = (sys.executable, "-P", "-m", "pretrain.data.live")
FRAME = struct.Struct("<dHH")  # seconds on the camera's clock (NaN: it has none), height, width
TIMEOUT = 15.0  # seconds without a frame
AGAIN = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds of waiting before each further try to connect
LATE = 1.0  # seconds by which the camera's clock may lag behind ours before it is set anew
STILL = 1.0  # seconds without a frame that the one before fills; after more a new stretch begins
USUAL = 25  # frames a second, where a camera does not say
BROKEN = 100  # packets in a row that cannot be decoded, after which the camera is given up
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # of one letter: a disk of Windows
_WEBCAM = re.compile(r"webcam(?::(\d{1,3}))?")
_TRANSPORTS = {"udp", "tcp", "multicast", "prefer_tcp"}


@dataclass(frozen=True)
class Source:
    """What libavformat opens.

    Attributes:
        name: what it is called, without secrets.
        format: the demuxer or device.
        address: of the camera; it may hold a password.
        options: of the demuxer.
    """

    name: str
    format: str
    address: str = field(repr=False)
    options: dict[str, str] = field(default_factory=dict)


def is_live(text: str) -> bool:
    """Whether a user means a camera, that there may be or not."""
    return bool(_WEBCAM.fullmatch(text) or text.lower().startswith("rtsp:"))


def live_source(text: str) -> Source | None:
    """The camera that a user means; None: it is the name of a file or folder.

    Raises:
        ValueError: it is an address of another kind, or none that can be right. No message repeats
            an address.
    """
    webcam = _WEBCAM.fullmatch(text)
    scheme = _SCHEME.match(text)
    if (webcam or scheme) and is_there(text):
        if webcam:
            raise ValueError(f"there is a file {text}: write ./{text} for it, or move it away")
        return None
    if webcam:
        return _webcam(int(webcam[1] or 0))
    if scheme is None:
        return None
    if scheme[1].lower() != "rtsp":
        raise ValueError(
            f"--video {for_screen(scheme[1])}:... is read neither as a file nor as an address: "
            "give a file, a folder, rtsp://HOST/..., webcam or webcam:1"
        )
    return _rtsp(text)


def _rtsp(text: str) -> Source:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("--video rtsp://...: the host or port of this address is none") from None
    if not text[5:].startswith("//") or not host:
        raise ValueError("--video rtsp:...: the address has no host: give rtsp://HOST/...")
    if not (text.isascii() and text.isprintable()) or set(text) & set(' "<>\\^`{|}#'):
        raise ValueError(
            f"--video rtsp://{for_screen(host)}/...: the address holds a character that addresses "
            "do not have: write it as %XX"
        )
    if _TRANSPORTS & {part.lower() for part in parts.query.split("&")}:
        raise ValueError(
            f"--video rtsp://{host}/...: leave the transport out of the address: it is tcp"
        )
    where = f"[{host}]" if ":" in host else host
    options = {"rtsp_transport": "tcp", "allowed_media_types": "video"}
    options |= {"protocol_whitelist": "rtsp,rtp,tcp,udp"}
    return Source(f"rtsp://{where}{f':{port}' if port else ''}", "rtsp", text, options)


def _webcam(number: int) -> Source:
    name = f"webcam:{number}"
    if sys.platform == "darwin":
        return Source(name, "avfoundation", f"{number}:none", {"framerate": "30"})
    if sys.platform == "win32":
        known = av.device.enumerate_input_devices("dshow")
        cameras = [device for device in known if "video" in device.media_types]
        if number >= len(cameras):
            raise ValueError(f"--video {name}: this computer has {len(cameras)} cameras, from 0")
        return Source(name, "dshow", f"video={cameras[number].name}")
    path = f"/dev/video{number}"
    if not os.path.exists(path):
        raise ValueError(f"--video {name}: this computer has no camera {path}")
    return Source(name, "v4l2", path)


class Newest:
    """The newest frames, on a constant clock; written by one thread, read by another.

    Frames are put on ticks by the camera's own clock, which is set by ours. Where one is late, the
    one before is shown on. A stretch is a time without longer gaps: when the camera is lost it
    ends, and the next one begins when it is found again.

    Args:
        fps: ticks a second.
        room: ticks that are kept.

    Attributes:
        fps: ticks a second.
        over: no frame will come any more.
    """

    def __init__(self, fps: Fraction, room: int):
        self.fps, self.over = fps, False
        self._frames: deque[np.ndarray] = deque(maxlen=room)
        self._first = 0  # tick of the first frame that is kept
        self._stretch = -1
        self._before: tuple[int, int, list[np.ndarray]] | None = None  # the stretch before
        self._lag: float | None = None  # seconds from the camera's clock to ours
        self._there = threading.Condition()

    def take(self, seconds: float, picture: np.ndarray, now: float) -> None:
        """Put a frame on its tick.

        Args:
            seconds: on the camera's clock; NaN: it has none.
            picture: uint8 (H, W, 3).
            now: seconds on ours.
        """
        if not math.isnan(seconds):
            lag = now - seconds
            # A frame cannot come before it was taken: the shortest way is the truest.
            if self._lag is None or lag < self._lag or lag - self._lag > LATE:
                self._lag = lag
            now = seconds + self._lag
        tick = math.floor(now * self.fps + 0.5)
        with self._there:
            end = self._first + len(self._frames)
            gap, known = tick - end, self._frames[-1] if self._frames else None
            if known is None or gap > STILL * self.fps or known.shape != picture.shape:
                if known is not None:
                    self._before = self._stretch, self._first, list(self._frames)
                self._frames.clear()
                self._stretch, self._first = self._stretch + 1, max(tick, end)
                self._frames.append(picture)
            elif gap < 0:  # two on a tick
                self._frames[-1] = picture
            else:
                for shown in [known] * gap + [picture]:
                    self._first += len(self._frames) == self._frames.maxlen
                    self._frames.append(shown)
            self._there.notify_all()

    def set_anew(self) -> None:
        """Forget the camera's clock: it may have another one now."""
        self._lag = None

    def stretch(self, after: int) -> int | None:
        """The number of the next stretch behind one; None: there is none any more."""
        while True:
            with self._there:
                if self._stretch > after:
                    before = self._before[0] if self._before else after
                    return before if before > after else self._stretch
                if self.over:
                    return None
                self._there.wait(0.2)

    def up_to(self, end: int, stretch: int) -> tuple[int, list[np.ndarray], bool]:
        """The newest frames of a stretch, once it has them up to a tick, or has ended before.

        Args:
            end: the tick.
            stretch: its number.

        Returns:
            The first frame's tick, the frames, and whether the stretch has ended.
        """
        while True:
            with self._there:
                if stretch != self._stretch:
                    if self._before and self._before[0] == stretch:
                        return *self._before[1:], True
                    return end, [], True
                if self.over or self._first + len(self._frames) >= end:
                    return self._first, list(self._frames), self.over
                self._there.wait(0.2)


class Camera:
    """A camera that is read until it is stopped or given up.

    Args:
        source: the camera.
        short_side: pixels; larger frames are scaled down to it.
        room: ticks that are kept, by the frames a second.
        timeout: seconds without a frame after which the camera is lost.
        again: seconds of waiting before each further try, after the last of which it is given up.

    Attributes:
        newest: its frames.
        begun: when it was opened, seconds since 1970.
        lost: why it was lost, each time with the second.
        reason: why it was given up; "": it was not.

    Raises:
        ValueError: it cannot be opened.
    """

    def __init__(
        self, source: Source, short_side: int, room: Callable[[float], int],
        timeout: float = TIMEOUT, again: tuple[float, ...] = AGAIN,
    ):  # fmt: skip
        self.source, self.again, self.timeout = source, again, timeout
        self._job = {
            "format": source.format, "address": source.address, "options": source.options,
            "short_side": short_side, "timeout": timeout,
        }  # fmt: skip
        self.lost: list[str] = []
        self.reason = ""
        try:
            self._worker = self._connect()
        except Refused as error:
            raise ValueError(f"{source.name} cannot be opened: {error}") from None
        fps = Fraction(*self._worker.about["fps"])
        self.newest = Newest(fps, room(float(fps)))
        self.begun, self._start = time.time(), time.monotonic()
        threading.Thread(target=self._run, daemon=True).start()

    def _connect(self) -> Worker:
        return Worker(WORKER, self._job, 2 * self.timeout)

    def now(self) -> float:
        """Seconds since it was opened."""
        return time.monotonic() - self._start

    def stop(self) -> None:
        """Take no more frames; may be called by a signal's handler."""
        self.newest.over = True

    def close(self) -> None:
        """End the worker."""
        self.stop()
        self._worker.close()

    def _run(self) -> None:
        try:
            while not self.newest.over:
                reason = self._read()
                self._worker.close()
                if self.newest.over or not self._find_again(reason):
                    break
        finally:
            self.newest.over = True
            self._worker.close()

    def _read(self) -> str:
        """Takes frames until there are no more; returns why."""
        try:
            for seconds, picture in self._worker.pictures(FRAME):
                if self.newest.over:
                    return ""
                self.newest.take(seconds, picture, self.now())
        except Refused as error:
            return str(error)
        return "the stream ended"

    def _find_again(self, reason: str) -> bool:
        self.lost.append(f"{self.now():.1f} s: {reason}")
        for wait in self.again:
            end = time.monotonic() + wait
            while time.monotonic() < end and not self.newest.over:
                time.sleep(0.05)
            if self.newest.over:
                return False
            try:
                self._worker = self._connect()
                self.newest.set_anew()
                return True
            except (Refused, ValueError) as error:
                reason = str(error)
        self.reason = f"{self.source.name} was lost and not found again: {reason}"
        return False


# ---- the worker --------------------------------------------------------------------------------


def _read(job: dict, beat: Callable[[], None]) -> Iterator[dict | Message]:
    """Frames of a camera as they come, with the camera's seconds. No reason repeats its address."""
    av.logging.set_level(None)
    side, broken = job["short_side"], 0
    options = {**job["options"], "max_pixels": str(MAX_PIXELS)}
    try:
        with av.open(
            job["address"], format=job["format"], options=options, timeout=job["timeout"]
        ) as container:
            if not container.streams.video:
                raise Refused("it shows no video")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate or USUAL
            rate = rate if 1 <= rate <= 240 else USUAL
            yield {"fps": plain_rate(Fraction(rate)).as_integer_ratio()}
            to_rgb = VideoReformatter()
            for packet in container.demux(stream):
                beat()
                try:
                    frames = packet.decode()
                    broken = 0
                except av.error.InvalidDataError:  # as a stream that is joined half way begins
                    frames, broken = [], broken + 1
                    if broken > BROKEN:
                        raise Refused("what it sends cannot be decoded") from None
                for frame in frames:
                    scale = min(1, side / min(frame.width, frame.height))
                    width, height = (max(1, round(n * scale)) for n in (frame.width, frame.height))
                    shown = to_rgb.reformat(frame, width, height, "rgb24", threads=1)
                    picture = shown.to_ndarray()
                    seconds = math.nan if frame.time is None else frame.time
                    yield FRAME.pack(seconds, *picture.shape[:2]), picture
    except (Refused, MemoryError):
        raise
    except Exception as error:
        raise Refused(getattr(error, "strerror", None) or type(error).__name__) from None


if __name__ == "__main__":
    serve_stream(_read)
