"""Turns one untrusted file into checked, uniform clips, inside a process that may be killed.

`python -m pretrain.data.ingest` is the worker: it reads one job a line (JSON) from standard input
and answers with one line a message on standard output. `pool.py` starts it, watches it and kills it
when it stalls, so nothing here has to survive a decoder that hangs, crashes or eats memory.

Guards, in this order:
1. the first bytes must be those of a container we know, and that demuxer alone is used: a playlist
   or a text named `.mp4` never reaches libavformat. libavformat gets an open file, never a name,
   and may open nothing else;
2. sizes claimed in the header are compared with the bytes that are there, so a cut file is refused
   and a small file that claims ten million frames is too;
3. more than `MAX_PIXELS` in a frame is refused from the header, and the process may not map more
   than `MEMORY_LIMIT` bytes;
4. all frames together may have so many pixels for each byte of the file, and the
   clips made of it may be so many and so large (`encode.py`): a small file costs no hours, and
   fills no disk. How long a file may take in all, `pool.py` watches.

Every frame is then decoded once, strictly: an error of the decoder, or one that libavformat only
writes into its log before it skips to the next thing it understands, refuses the file. A clip that
is silently shorter or smeared is worse than one that is missing and named. What cannot be noticed
is a clean cut in a format that has no length (MPEG-TS and PS, WMV, FLV).

Time: the clip has a constant frame rate, at most `MAX_FPS`, which the timestamps decide and not the
header (`timing.py`). Each decoded frame goes to the nearest tick of that clock; of several on a
tick the last is kept, and a tick without a frame repeats the one before. AVI has no presentation
times, but places in which frames may be missing. A gap of more than `MAX_GAP` seconds, or a step
backwards, is taken for a broken clock.
"""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import math
import os
import signal
import sys
import time
from array import array
from collections.abc import Callable, Generator, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from pretrain.data.beside import OURS, Part
from pretrain.data.encode import LONGER, Clips, DiskError, copy_clip
from pretrain.data.guard import (
    MAX_PIXELS,
    Refused,
    check_container,
    describe,
    too_many_pixels,
)
from pretrain.data.h264 import unit_headers
from pretrain.data.index import MAX_FPS
from pretrain.data.timing import (
    HALF,
    MAX_GAP,
    SHOWN,
    SLOW,
    count_ticks,
    frame_rate,
    on_ticks,
    plain_rate,
)

MEMORY_LIMIT = 2 * 2**30
COMPLETE = 0.9  # of the packets of a good MP4 or Matroska file give a frame, one more or less
POSE_FPS = 30  # of poses where nothing says it: a Kinect's
COPY_GOP = 32  # the longest keyframe distance with which a file is copied as it is


def ingest(
    path: str,
    member: tuple[int, int] | None,
    kind: str,
    out: str,
    short_side: int,
    clip_seconds: float,
    beat: Callable[[], None] = lambda: None,
    skeleton: str = "",
    fps: str | None = None,
    follow: dict | None = None,
) -> list[dict]:
    """Decode one source fully and write its clips to `out-0000.mp4`, `out-0001.mp4`, ...

    Of poses without a video the clips are `out-0000.pose.npy` and so on, see `_ingest_poses`.

    Args:
        path: the file.
        member: offset and size in bytes of the payload inside the file, if it is an archive.
        kind: "video", "image" or "pose".
        out: where to write, up to the ordinal.
        short_side: pixels; larger frames are scaled down to it, smaller ones are left.
        clip_seconds: a longer video is cut into equal parts.
        beat: called whenever there was progress.
        skeleton: of poses: their skeleton, where the file leaves it open.
        fps: of poses: frames a second as the list has it; None: as the file says, or `POSE_FPS`.
        follow: what tells where in the picture to cut, see `pretrain.data.follow.Follow`; None:
            nowhere.

    Returns:
        For each clip its file, frames, fps, width, height, start (seconds), bytes, `copied` and
        `seen`, width and height of the upright frames before they were scaled; and, if something
        was to be followed, `follow`: see `pretrain.data.cuts.Cut.note`.

    Raises:
        Refused: the file is not usable; the message is the reason.
        DiskError: a clip could not be written, or this process may not open more files.
        MemoryError: the file needs more than this process may have.
    """
    if kind == "pose":
        return _ingest_poses(path, out, clip_seconds, skeleton, fps)
    with payload(path, member) as file:
        return _ingest(file, kind, out, short_side, clip_seconds, beat, follow)


def stream(
    path: str, member: tuple[int, int] | None, short_side: int, beat: Callable[[], None]
) -> Iterator[dict | tuple[np.ndarray, int]]:
    """Decodes a video once, from front to back, and keeps nothing of it.

    Args:
        path: the file.
        member: offset and size in bytes of the payload inside the file, if it is an archive.
        short_side: pixels; larger frames are scaled down to it, as `ingest` does.
        beat: called whenever there was progress.

    Yields:
        first {"fps": ticks a second as a ratio, "ticks": about how many}; then uint8 frames
        (H, W, 3) with the ticks that each lasts.

    Raises:
        Refused: the file is not usable, or not from here on.
        MemoryError: the file needs more than this process may have.
    """
    with payload(path, member) as file:
        name = check_container(file)
        size = file.seek(0, io.SEEK_END)
        # Damage further on is for `_decode` to find: what comes before it is of use.
        scan = _scan(file, name, beat, whole=False) | {"size": size}
        _check_pixels(scan["pixels"], size)
        yield {"fps": scan["fps"].as_integer_ratio(), "ticks": scan["ticks"]}
        uniform = Clips("", scan, scan["ticks"], short_side, write=False)
        to_rgb = VideoReformatter()
        with contextlib.closing(_decode(file, name, size, beat)) as frames:
            for frame, repeats in on_ticks(
                frames, scan["fps"], scan["clock"], scan["ticks"], scan["last"]
            ):
                uniform.add(frame, repeats)
                rgb = to_rgb.reformat(uniform.convert(frame), format="rgb24", threads=1)
                yield rgb.to_ndarray(), repeats
        if not uniform.decoded:
            raise Refused("holds no frame that can be decoded")


@contextlib.contextmanager
def payload(path: str, member: tuple[int, int] | None) -> Iterator[io.BufferedReader]:
    """Opens the payload; what goes wrong with it is Refused, unless this machine is to blame."""
    try:
        raw = Part(path, member)
    except OSError as error:
        if error.errno in OURS:
            raise DiskError(f"cannot open {path}: {error.strerror}") from error
        raise Refused(f"cannot be read: {error.strerror or error}", retry=True) from error
    with raw:
        try:
            yield io.BufferedReader(raw)
            if raw.error is not None:
                raise raw.error
        except (DiskError, MemoryError):
            raise
        except Exception as error:
            if raw.error:  # whatever libavformat and Pillow made of it
                reason = f"cannot be read: {raw.error.strerror or raw.error}"
                raise Refused(reason, retry=True) from error
            if isinstance(error, Refused):
                raise
            _out_of_memory(error)
            # A decoder's odd ValueError must not stop the other files.
            what = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise Refused(f"cannot be decoded: {what}") from error


def _ingest(
    file, kind: str, out: str, short_side: int, clip_seconds: float, beat, follow: dict | None
) -> list[dict]:
    if kind == "image":
        return _ingest_image(file, out, short_side, beat, follow)
    return _ingest_video(file, out, short_side, clip_seconds, beat, follow)


def clip_frames(fps: Fraction, seconds: float) -> int:
    """The frames of a clip of so many seconds; of a slow series 25 pictures count as one."""
    return max(1, round(seconds * (SHOWN if fps < SLOW else fps)))


def _ingest_video(
    file, out: str, short_side: int, clip_seconds: float, beat, follow: dict | None
) -> list[dict]:
    name = check_container(file)
    size = file.seek(0, io.SEEK_END)
    scan = _scan(file, name, beat) | {"size": size}
    _check_pixels(scan["pixels"], size)
    longest = clip_frames(scan["fps"], clip_seconds)

    @contextlib.contextmanager
    def shown() -> Iterator[Iterator[tuple[av.VideoFrame, int]]]:
        with contextlib.closing(_decode(file, name, size, beat)) as frames:
            yield on_ticks(frames, scan["fps"], scan["clock"], scan["ticks"], scan["last"])

    if follow is not None:
        from pretrain.data.follow import Follow  # what it needs, others can do without

        following = Follow(shown, scan, longest, short_side, beat, **follow)
        if following.anyone():
            return following.write(out)
    copy = scan["copyable"] and scan["short"] <= short_side
    copy = copy and scan["ticks"] <= longest * (1 + LONGER)
    done: list[dict] | None = None
    for write in (False, True) if copy else (True,):
        with shown() as frames, Clips(out, scan, longest, short_side, write) as clips:
            for frame, repeats in frames:
                clips.add(frame, repeats)
        # Only decoding shows whether the packets kept their promise, and a rotation.
        if not write and clips.plain and clips.decoded == scan["packets"]:
            done = [copy_clip(file, out, scan, clips)]
            break
        done = clips.done
    if not done:
        raise Refused("holds no frame that can be decoded")
    return done if follow is None else following.noted(done)


def _check_pixels(pixels: int, size: int) -> None:
    if too_many_pixels(pixels, size):
        raise Refused(
            f"is too much to decode: over {pixels / 1e9:.0f} billion pixels in {size} bytes"
        )


# ---- reading -----------------------------------------------------------------------------------


@contextlib.contextmanager
def demuxer(file, name: str) -> Iterator[tuple]:
    """Open the payload with one demuxer; yield the container and its first real video stream."""
    file.seek(0)
    # libavformat probes by decoding, so the decoder's limit has to be set already here.
    options = {"max_pixels": str(MAX_PIXELS), "err_detect": "explode"}
    with av.logging.Capture() as logs, _opened(file, name, options) as container:
        streams = [s for s in container.streams.video if not s.disposition & _COVER]
        if not streams:
            raise Refused("holds no video stream")
        stream = streams[0]
        codec = stream.codec_context
        if codec is None:
            raise Refused("its video codec is unknown")
        if not codec.width or not codec.height:
            raise Refused(f"has no frame size, or one over {MAX_PIXELS} pixels")
        if codec.width * codec.height > MAX_PIXELS:
            raise Refused(f"frames of {codec.width}x{codec.height} pixels are over {MAX_PIXELS}")
        codec.options = options
        codec.thread_count = 1  # the pool uses the cores, one file on each
        yield container, stream, logs


# Errors that libavformat only logs are read from its log: see `packets_of`.
av.logging.set_level(av.logging.ERROR)
av.logging.set_skip_repeated(False)  # or a repetition is told during the next file


def _opened(file, name: str, options: dict[str, str]):
    try:
        return av.open(
            file,
            format=name,
            options=options,
            container_options={"format_whitelist": name, "protocol_whitelist": "none"},
            metadata_errors="replace",
        )
    except av.FFmpegError as error:
        _out_of_memory(error)
        raise Refused(f"cannot be opened as {name}: {error.strerror}") from error


_COVER = av.stream.Disposition.attached_pic


def _out_of_memory(error: Exception) -> None:
    if getattr(error, "errno", None) == errno.ENOMEM:
        raise MemoryError from error


def packets_of(container, stream, logs: list, beat, whole: bool = True) -> Iterator[av.Packet]:
    """The packets; of a damaged file that need not be `whole` those before the damage."""
    packets = _checked_packets(container, stream, logs, beat)
    count = 0
    try:
        for packet in packets:
            yield packet
            count += 1
    except Refused:
        if whole or not count:
            raise


def _checked_packets(container, stream, logs: list, beat) -> Iterator[av.Packet]:
    # What an audio stream's decoder says is not our business; names are like "matroska,webm".
    speakers = {*container.format.name.split(","), stream.codec_context.name}
    packets, count = container.demux(stream), 0
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:
            _out_of_memory(error)
            raise Refused(f"reading stopped after {count} packets: {error.strerror}") from error
        for level, speaker, message in logs:
            if level <= av.logging.ERROR and speakers & {*speaker.split(",")}:
                raise Refused(f"is damaged, noticed after {count} packets: {message.strip()}")
        logs.clear()
        if packet is None:
            return
        if packet.is_corrupt:
            raise Refused(f"packet {count} is damaged")
        beat()
        yield packet
        count += 1


def _decode(file, name: str, size: int, beat) -> Generator[av.VideoFrame, None, None]:
    count = expected = pixels = 0
    with demuxer(file, name) as (container, stream, logs):
        for packet in packets_of(container, stream, logs, beat):
            expected += bool(packet.size) and not packet.is_discard
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                _out_of_memory(error)
                raise Refused(f"decoding stopped after {count} frames: {error.strerror}") from error
            for frame in frames:
                if frame.is_corrupt:
                    raise Refused(f"frame {count} is damaged")
                count += 1
                pixels += frame.width * frame.height
                _check_pixels(pixels, size)
                yield frame
                beat()
    if name in ("mov", "matroska") and count < COMPLETE * expected - 1:
        raise Refused(f"only {count} of {expected} packets give a frame")


def _scan(file, name: str, beat, whole: bool = True) -> dict:
    """Read the packets without decoding: the frame rate, the length, and whether to copy.

    Of a file that need not be `whole` it reads those before the first damage.
    """
    # Numbers, not objects: of a day there are millions.
    stamps, lasts = array("q"), array("q")
    keys, count, idr, skipped = [], 0, True, 0
    with demuxer(file, name) as (container, stream, logs):
        codec, base = stream.codec_context, stream.time_base or Fraction(1, 1000)
        # An AVI's frames have a place each, some are empty: a frame that was dropped. libavformat's
        # guess of when a frame is shown is wrong where they are reordered, its place is not.
        when = "dts" if name == "avi" else "pts"
        h264 = name == "mov" and codec.name == "h264"
        prefix = (codec.extradata[4] & 3) + 1 if h264 and len(codec.extradata or b"") > 4 else 0
        for packet in packets_of(container, stream, logs, beat, whole):
            if not packet.size:
                continue
            if (stamp := getattr(packet, when)) is not None and not packet.is_discard:
                stamps.append(stamp)
                lasts.append(packet.duration or 0)
            if packet.is_keyframe:
                keys.append(count)
                headers = unit_headers(bytes(packet), prefix) if prefix else ()
                idr = idr and any(header & 31 == 5 for header in headers)
            count += 1
            skipped += packet.is_discard
        times = np.array(stamps, dtype=np.int64)
        steps = np.unique(np.diff(np.sort(times)))
        regular = len(times) == count and len(steps) == 1 and times.min() == 0 and steps[0] > 0
        claims = [stream.average_rate, stream.guessed_rate]
        # A stream without timestamps; libavformat makes some up.
        raw = name in ("mpegvideo", "h264")
        if raw:
            claims, times = [codec.framerate, *claims], times[:1]
        fps = frame_rate(times, base, count - skipped, claims)
        if regular:
            fps = plain_rate(1 / (int(steps[0]) * base))
        gaps = np.diff([*keys, count]) if keys and keys[0] == 0 else [COPY_GOP + 1]
        copyable = (
            regular
            and h264
            and idr
            and not skipped
            and max(gaps) <= COPY_GOP
            and len(container.streams) == 1
            and codec.pix_fmt == "yuv420p"
            and codec.width % 2 == codec.height % 2 == 0
            and stream.sample_aspect_ratio in (None, 0, 1)
            and int(steps[0]) * base * MAX_FPS >= 1
        )
        # Without two different timestamps there is no clock, and frames are counted.
        timed = not raw and len(steps) > 0 and steps[-1] > 0
        ticks = count_ticks(times, base, fps) if timed else count - skipped
        last, told = 1, name in ("gif", "matroska") or (name == "mov" and not codec.has_b_frames)
        if timed and told and not regular:  # for so long the last frame is shown
            longest = max(zip(stamps, lasts, strict=True))[1]
            last = max(1, math.floor(min(longest * base, MAX_GAP) * fps + HALF))
        return {
            "fps": fps,
            "ticks": max(1, ticks + last - 1),
            "clock": ("dts" if name == "avi" else "pts") if timed else None,
            "last": last,
            "packets": count,
            "pixels": count * codec.width * codec.height,
            "copyable": copyable,
            "short": min(codec.width, codec.height),
            "aspect": stream.sample_aspect_ratio,
        }


# ---- images ------------------------------------------------------------------------------------


def _ingest_image(
    file, out: str, short_side: int, beat: Callable[[], None], follow: dict | None
) -> list[dict]:
    """An image is a clip of one frame; of an animated one the first frame is taken."""
    if not file.read(1):
        raise Refused("the file is empty")
    file.seek(0)
    try:
        image = Image.open(file, formats=["JPEG", "PNG", "WEBP"])
    except Image.DecompressionBombError as error:
        raise Refused(f"an image of over {MAX_PIXELS} pixels") from error
    except OSError as error:
        file.seek(0)
        what = describe(file.read(1024))
        if what.endswith(" image"):
            raise Refused(f"cannot be decoded: {what} with a damaged header") from error
        raise Refused(f"not an image: {what}") from error
    if image.width * image.height > MAX_PIXELS:
        raise Refused(f"an image of {image.width}x{image.height} pixels is over {MAX_PIXELS}")
    try:
        image.load()
        upright: Image.Image = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits a channel
            upright = Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8))
        pixels = np.ascontiguousarray(upright.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise Refused(f"cannot be decoded: {error}") from error
    scan = {"fps": Fraction(1), "ticks": 1, "aspect": None, "size": file.seek(0, io.SEEK_END)}
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    if follow is not None:
        from pretrain.data.follow import Follow

        once = lambda: contextlib.nullcontext(iter([(frame, 1)]))
        following = Follow(once, scan, 1, short_side, beat, **follow)
        if following.anyone():
            return following.write(out)
    with Clips(out, scan, 1, short_side, write=True) as clips:
        clips.add(frame, 1)
    return clips.done if follow is None else following.noted(clips.done)


def _ingest_poses(
    path: str, out: str, clip_seconds: float, skeleton: str, fps: str | None
) -> list[dict]:
    """A recording of joints without a video, cut into clips as a video is.

    Of more than `MAX_FPS` frames a second every second one is kept, or every third, and so on.
    Where nothing says how large the picture was, it is as large as what is in it.
    """
    from pretrain.data.pose_files import read_poses
    from pretrain.data.poses import pose_member

    try:
        poses = read_poses(path, skeleton)
        rate = float(fps) if fps else poses.fps or POSE_FPS
    except ValueError as error:
        raise Refused(str(error).removeprefix(f"{path}: ")) from error
    if not 0 < rate < 10_000:
        raise Refused(f"its list says {fps} frames a second")
    step = math.ceil(rate / MAX_FPS)
    rate /= step
    values, size = poses.in_pixels()
    values = values[::step]
    longest = max(1, round(clip_seconds * (SHOWN if rate < SLOW else rate)))
    parts = max(1, math.ceil(len(values) / longest - LONGER))
    cuts = [len(values) * i // parts for i in range(parts + 1)]
    clips = []
    for number, (start, end) in enumerate(itertools.pairwise(cuts)):
        data, about = pose_member(values[start:end], poses.columns, poses.skeleton)
        file = Path(f"{out}-{number:04d}.pose.npy")
        try:
            file.write_bytes(data)
        except OSError as error:
            raise DiskError(f"{file}: {error.strerror or error}") from error
        clips.append(
            {
                "file": file.name,
                "frames": end - start,
                "fps": round(rate, 6),
                "width": size[0],
                "height": size[1],
                "start": round(start / rate, 6),
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "copied": True,
                "main": "pose",
                "entry": {"method": "given", "parameters": {}} | about,
            }
        )
    return clips


# ---- the worker --------------------------------------------------------------------------------


def limit_worker(memory: bool = True) -> None:
    """Cap the memory, and die with the parent process, where the system can do these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    with contextlib.suppress(ImportError, OSError, ValueError, AttributeError):
        import ctypes
        import resource

        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if not memory:
            return
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_LIMIT,) * 2)


def serve(work: Callable[..., dict], memory: bool = True) -> None:
    """Serve jobs until standard input ends.

    Args:
        work: what a job's values are given to, and `beat`, to be called whenever there was
            progress. What it returns is the answer; it may raise what `ingest` does.
        memory: whether memory is capped.
    """
    limit_worker(memory)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not be read as an answer
    last = 0.0

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            answers.write('{"beat": 1}\n')

    answers.write('{"ready": 1}\n')
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = work(**json.loads(line), beat=beat)
        except Refused as error:
            answer = {"refused": str(error), "retry": error.retry}
        except DiskError as error:
            answer = {"disk": str(error)}
        except MemoryError:  # what is left of the limit may be in pieces: start afresh
            answer = {
                "refused": f"needed more than {MEMORY_LIMIT >> 30} GiB of memory",
                "retire": True,
            }
        answers.write(json.dumps(answer) + "\n")


def main() -> None:
    """Serve jobs of decoding raw files."""
    serve(lambda **job: {"clips": ingest(**job)})


if __name__ == "__main__":
    main()
