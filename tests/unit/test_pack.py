"""From files to a pack: every frame right, nothing lost, nothing done twice."""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from downstream.segments import classes_of_frames
from downstream.splits import choose_splits
from pretrain.data.cache import open_data
from pretrain.data.decode import (
    DecodeError,
    check_decoder,
    installed_decoders,
    nothing_needs,
    read_frames,
)
from pretrain.data.index import RULES, json_line, load_index, text_digest
from pretrain.data.ingest import ingest
from pretrain.data.pack import pack
from pretrain.data.pool import run_jobs
from pretrain.data.progress import slow_files
from pretrain.data.shards import Pack
from pretrain.data.timing import frame_rate
from tests.unit.media import number_of, numbers, picture, read_video, ready_video, write_video

ROOT = Path(__file__).resolve().parents[2]


def make(
    path: Path, short_side: int = 256, clip_seconds: float = 10.0, kind: str = "video"
) -> list[dict]:
    """Ingests one file here, without a worker; adds the path of each clip."""
    out = path.parent / f"{path.name}-out"
    clips = ingest(str(path), None, kind, str(out), short_side, clip_seconds)
    return [clip | {"path": path.parent / clip["file"]} for clip in clips]


def quick(source: Path, out: Path, **more) -> dict:
    return pack(source, out, **({"workers": 1, "progress": False} | more))


def clips_of(folder: Path) -> dict[tuple[str, int], tuple[dict, bytes]]:
    """(source, ordinal) -> its line and its bytes, read through the index."""
    index = load_index(folder)
    found = {}
    for line in (folder / "clips.jsonl").read_text().splitlines():
        row = json.loads(line)
        with open(folder / index["shards"][row["shard"]]["name"], "rb") as file:
            file.seek(row["offset"])
            found[row["source"], row["clip"]] = row, file.read(row["bytes"])
    return found


def state(folder: Path) -> dict[str, tuple[int, str]]:
    """Names, dates and hashes of the visible files."""
    return {
        p.name: (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in folder.iterdir()
        if p.is_file()
    }


def hashes(folder: Path) -> dict[str, str]:
    return {name: digest for name, (_, digest) in state(folder).items()}


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    for i, name in enumerate(("walk/a.mp4", "walk/b.mp4", "run/c.mp4", "run/d.mp4")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / name, 10 + i)
    return folder


# ---- pixels and time


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.mp4", {}),
        ("a.mkv", {"codec": "libx264"}),
        ("a.webm", {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}}),
        ("a.avi", {"codec": "mpeg4"}),
        ("a.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
        ("a.mpg", {"codec": "mpeg1video"}),
        ("a.ts", {"codec": "mpeg2video"}),
        ("a.mov", {"codec": "libx264", "pix_fmt": "yuv420p10le"}),
        ("a.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none:bframes=3"}}),
        ("a.mkv", {"codec": "libx264rgb", "pix_fmt": "rgb24"}),
        ("a.mkv", {"codec": "ffv1", "pix_fmt": "yuva420p"}),
        ("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
        ("a.wmv", {"codec": "wmv2"}),
        ("a.flv", {"codec": "flv"}),
        ("a.mp4", {"audio": True}),
    ],
)
def test_every_frame_of_every_format_in_order(tmp_path, name, how):
    (clip,) = make(write_video(tmp_path / name, 37, **how))
    assert numbers(clip["path"]) == list(range(37))
    assert (clip["frames"], clip["fps"], clip["width"], clip["height"]) == (37, 25, 96, 64)
    # Black and white survive whatever range, depth and colour space they were stored in.
    image = read_video(clip["path"])[31]
    assert abs(image[8:24, 4:56].mean() - 235) < 8 and abs(image[40:].mean() - 16) < 8


def test_our_clips_are_short_closed_groups_with_frames_to_skip(tmp_path):
    # The source has its keyframes elsewhere: they must not become ours.
    (clip,) = make(write_video(tmp_path / "a.mkv", 50, options={"g": "7"}))
    with av.open(str(clip["path"])) as file:
        stream = file.streams.video[0]
        assert len(file.streams) == 1 and stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        packets = [p for p in file.demux(stream) if p.size]
    assert [i for i, p in enumerate(packets) if p.is_keyframe] == [0, 16, 32, 48]
    shown = sorted(p.pts for p in packets)
    assert shown[0] == 0 and len({b - a for a, b in pairwise(shown)}) == 1
    skippable = [shown.index(p.pts) for p in packets if nothing_needs(bytes(p), 4)]
    kept = [i for i in range(50) if i not in skippable]
    # A reference every fourth frame, and where a group ends.
    assert set(kept) == {i for i in range(50) if i % 16 % 4 == 0 or i % 16 == 15 or i == 49}
    data = clip["path"].read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    for packet in packets[::16]:
        units = bytes(packet)  # a closed group starts with a NAL unit of type 5
        kinds, at = [], 0
        while at < len(units):
            kinds.append(units[at + 4] & 31)
            at += 4 + int.from_bytes(units[at : at + 4], "big")
        assert 5 in kinds
    # The proof of the pudding: each group alone gives its own frames.
    order = [33, 2, 49, 16, 15, 47, 0]
    assert [number_of(f) for f in read_frames(data, np.array(order)).numpy()] == order
    for stride in (1, 2, 3, 4, 5):
        for start in range(50):
            order = list(range(start, 50, stride))
            assert [number_of(f) for f in read_frames(data, np.array(order)).numpy()] == order


def test_decord_reads_the_same_frames(tmp_path):
    decord = pytest.importorskip("decord")
    (clip,) = make(write_video(tmp_path / "a.mkv", 50))
    order = [49, 0, 17, 16, 31, 33, 5]
    frames = (
        decord.VideoReader(io.BytesIO(clip["path"].read_bytes()), num_threads=1)
        .get_batch(order)
        .asnumpy()
    )
    assert [number_of(f) for f in frames] == order


@pytest.mark.parametrize("angle", [90, 180, -90])
def test_rotation_is_applied(tmp_path, angle):
    # The recorder stored the picture turned, and a tag that says how to turn it back.
    frames = [np.rot90(picture(i), -angle // 90) for i in range(20)]
    (clip,) = make(write_video(tmp_path / "a.mp4", frames, rotation=angle))
    assert (clip["width"], clip["height"]) == (96, 64) and not clip["copied"]
    assert numbers(clip["path"]) == list(range(20))
    with av.open(str(clip["path"])) as file:
        assert next(file.decode(video=0)).rotation == 0


def test_rotation_alone_forbids_copying(tmp_path):
    plain, turned = tmp_path / "plain.mp4", tmp_path / "turned.mp4"
    frames = [np.rot90(picture(i), 2) for i in range(10)]
    ready_video(plain, frames)
    ready_video(turned, frames, rotation=180)
    assert make(plain)[0]["copied"]
    (clip,) = make(turned)
    assert not clip["copied"] and numbers(clip["path"]) == list(range(10))


def test_variable_frame_rate_becomes_constant(tmp_path):
    # 25 frames in a second, then one every 200 ms: 35 frames in 3 s.
    times = [40 * i for i in range(25)] + [1000 + 200 * i for i in range(10)]
    (clip,) = make(write_video(tmp_path / "a.mkv", 35, times=times))
    fps, seen = clip["fps"], numbers(clip["path"])
    assert seen == sorted(seen)
    for tick, number in enumerate(seen):
        shown = tick / fps * 1000
        assert times[number] <= shown + 500 / fps + 1  # a frame comes at most half a tick early
        if number + 1 < 35 and tick + 1 < len(seen):
            assert times[number + 1] > shown - 500 / fps - 1  # and its successor is not yet due
    assert abs(len(seen) / fps - 3) < 0.2


def shown_at(clips: list[dict]) -> list[tuple[int, float, float]]:
    """The pictures of all clips, without repeats: their number, and from when to when they are
    seen, in ms.
    """
    seen: list[tuple[int, float, float]] = []
    for clip in clips:
        for tick, number in enumerate(numbers(clip["path"])):
            start = (clip["start"] + tick / clip["fps"]) * 1000
            end = start + 1000 / clip["fps"]
            if seen and seen[-1][0] == number:
                seen[-1] = (number, seen[-1][1], end)
            else:
                seen.append((number, start, end))
    return seen


def assert_true_times(clips: list[dict], times: list[float]) -> None:
    """Every picture is there, and is seen from its time on, to half a tick."""
    seen, near = shown_at(clips), 500 / clips[0]["fps"] + 1
    assert [number for number, _, _ in seen] == list(range(len(times)))
    for number, start, end in seen:
        assert abs(start - (times[number] - times[0])) <= near, number
        if number + 1 < len(times):
            assert abs(end - (times[number + 1] - times[0])) <= near, number


FORMATS = [
    ("a.mkv", {}),
    ("a.mp4", {}),
    ("a.3gp", {"codec": "mpeg4"}),
    ("a.webm", {"codec": "libvpx", "options": {"cpu-used": "8", "deadline": "realtime"}}),
    ("a.avi", {"codec": "mpeg4"}),
    ("b.avi", {"codec": "libx264"}),
    ("c.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    ("a.wmv", {"codec": "wmv2"}),
    ("a.asf", {"codec": "mpeg4"}),
    ("a.flv", {"codec": "flv"}),
    ("a.ts", {}),
    ("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
]


@pytest.mark.parametrize(("name", "how"), FORMATS)
def test_a_video_that_rests_and_drops_frames_keeps_its_times(tmp_path, name, how):
    later = (0, 1, 2, 5, 6, 7, 8, 9, 11, 12, 13, 14)
    times = [40 * i for i in range(12)] + [2000 + 40 * i for i in later]
    clips = make(write_video(tmp_path / name, len(times), times=times, size=(64, 48), **how))
    assert [clip["fps"] for clip in clips] == [25]
    assert_true_times(clips, times)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.avi", "a.wmv", "a.flv"])
@pytest.mark.parametrize(
    ("fps", "times"),
    [
        (23.4, [round(i / 23.4 * 1000) for i in range(60)]),
        (29.97, [round(i * 1001 / 30) for i in range(60)]),
        (30, [0, 38, 64, 100, 137, 164, 205, 231, 270, 297, 336, 366, 397, 431, 468, 500, 530, 570,
              598, 634]),
        (30, [200 * i for i in range(30)] + [6000 + 33 * i for i in range(30)]),
        (25, [40 * i for i in range(60) if i % 3 != 1 and i % 7 != 2]),
        (25, [0, 40, 3000]),
    ],
    ids=["odd", "ntsc", "jitter", "slow, then fast", "half dropped", "three"],
)  # fmt: skip
def test_rates_are_those_of_the_timestamps(tmp_path, name, fps, times):
    how = dict(FORMATS)[name]
    clips = make(write_video(tmp_path / name, len(times), times=times, size=(64, 48), **how))
    assert all(clip["fps"] == pytest.approx(fps, rel=0.012) for clip in clips)
    assert_true_times(clips, times)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_long_rest_thins_nothing_out(tmp_path, name):
    times = [40 * i for i in range(20)] + [60_000 + 40 * i for i in range(20)]
    clips = make(write_video(tmp_path / name, 40, times=times, size=(32, 32)))
    assert len(clips) == 7 and sum(clip["frames"] for clip in clips) == 60.8 * 25
    assert_true_times(clips, times)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.gif", "a.wmv"])
@pytest.mark.parametrize("seconds", [1, 30, 3600])
def test_a_series_of_pictures_is_cut_by_frames(tmp_path, name, seconds):
    times = [seconds * 1000 * i for i in range(60)]
    if seconds > {"a.gif": 600, "a.avi": 1}.get(name, seconds):
        pytest.skip("the format has no such times, or writes millions of empty places")
    path = write_video(tmp_path / name, 60, times=times, size=(64, 48), **dict(FORMATS)[name])
    clips = make(path, clip_seconds=1)
    assert [clip["frames"] for clip in clips] == [20, 20, 20]
    assert all(clip["fps"] == pytest.approx(1 / seconds) for clip in clips)
    assert_true_times(clips, times)


@pytest.mark.parametrize(
    "delays",
    [[100, 300, 50, 1000], [2000, 3000, 1000], [40, 500, 500, 500], [70] * 9, [30, 60, 90]],
)
def test_pictures_of_a_gif_are_shown_as_long_as_it_says(tmp_path, delays):
    images = [Image.fromarray(picture(i)) for i in range(len(delays))]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=delays)
    clips = make(tmp_path / "a.gif")
    assert_true_times(clips, [sum(delays[:i]) for i in range(len(delays))])
    (clip,) = clips
    assert clip["frames"] / clip["fps"] == pytest.approx(sum(delays) / 1000, abs=0.5 / clip["fps"])


def moved(path: Path, name: str, move) -> Path:
    """A copy of a video whose packets have other times: `move` of number and milliseconds."""
    target = path.parent / name
    options = {"avoid_negative_ts": "disabled", "mpegts_copyts": "1"} if name.endswith("ts") else {}
    with av.open(str(path)) as old, av.open(str(target), "w", container_options=options) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for number, packet in enumerate(old.demux(stream)):
            if packet.size:
                time = round(packet.pts * packet.time_base * 1000)
                shift = round(Fraction(move(number, time) - time, 1000) / packet.time_base)
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = copy
                new.mux(packet)
    return target


@pytest.mark.parametrize(
    ("name", "move"),
    [
        ("b.ts", lambda i, t: t + 2**33 * 1000 // 90000 - 2500),  # 33 bits end in the middle
        ("b.mkv", lambda i, t: t // 80 * 80),  # every time twice
        ("b.mkv", lambda i, t: t - 40 * (i % 10 == 9)),  # or now and then
        ("b.mkv", lambda i, t: 0),  # no times at all
        ("b.mkv", lambda i, t: t + 3_600_000 * (i > 25)),  # a clock that was set
        ("b.mkv", lambda i, t: t + 5000),
    ],
    ids=["wraps", "twice", "some twice", "none", "jumps", "starts late"],
)
def test_odd_timestamps(tmp_path, name, move):
    path = write_video(tmp_path / f"a{name[1:]}", 50, codec="mpeg4" if "mkv" in name else "libx264")
    clips = make(moved(path, name, move))
    assert clips[0]["fps"] == pytest.approx(25, rel=0.03) and len(clips) == 1
    assert_true_times(clips, [40 * i for i in range(50)])


@pytest.mark.parametrize(
    ("times", "count", "fps"),
    [
        (range(0, 360_000, 3600), 200, 50),  # two packets for a frame, one of them with a time
        (range(0, 432_000, 43_200), 120, 25),  # a time for every twelfth frame
        (range(0, 180_000, 3600), 50, 25),
        ([0] * 50, 50, 25),
        ([], 50, 25),
        ([7], 1, 25),
        ([0, 90_000 * 86_400 * 30], 2, Fraction(1, 86_400)),
        ([0, 3600, 3601, 7200, 7201, 10_800, 14_400, 14_401], 8, 25),
    ],
)
def test_rate_of_timestamps(times, count, fps):
    found = frame_rate(np.array(times, dtype=np.int64), Fraction(1, 90_000), count, [Fraction(25)])
    assert found == fps


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.h264", {"format": "h264", "fps": 12}),
        ("a.264", {"format": "h264", "fps": 25, "options": {"x264-params": "annexb=1:aud=1"}}),
        ("a.mpg", {"format": "mpeg1video", "codec": "mpeg1video"}),
        ("a.mpeg", {"format": "mpeg2video", "codec": "mpeg2video", "fps": 50}),
    ],
)
def test_streams_without_timestamps_have_the_rate_they_say(tmp_path, name, how):
    fps = how.get("fps", 25)
    clips = make(write_video(tmp_path / name, 30, **how))
    assert [clip["fps"] for clip in clips] == [fps]
    assert_true_times(clips, [1000 / fps * i for i in range(30)])


def test_high_frame_rates_are_halved(tmp_path):
    (clip,) = make(write_video(tmp_path / "a.mp4", 48, fps=120))
    seen = numbers(clip["path"])
    assert clip["fps"] == 60 and len(seen) in (24, 25)
    assert all(b - a in (1, 2) for a, b in pairwise(seen))


def test_a_broken_clock_does_not_fill_the_disk(tmp_path):
    times = [40 * i for i in range(10)] + [10**9 + 40 * i for i in range(10)]
    (clip,) = make(write_video(tmp_path / "a.mkv", 20, times=times))
    assert numbers(clip["path"])[:10] == list(range(10)) and clip["frames"] < 120


def test_frames_before_an_edit_are_dropped(tmp_path):
    whole = ready_video(tmp_path / "whole.mp4", 30, gop=16)
    cut = tmp_path / "cut.mp4"
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(whole)) as source, av.open(str(cut), "w", container_options=options) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                shift = round(10 / 25 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                target.mux(packet)
    (clip,) = make(cut)
    assert numbers(clip["path"]) == list(range(10, 30)) and not clip["copied"]


@pytest.mark.parametrize(
    ("size", "aspect", "short", "expected"),
    [
        ((96, 64), None, 32, (48, 32)),
        ((64, 96), None, 32, (32, 48)),
        ((96, 64), None, 256, (96, 64)),
        ((98, 66), None, 33, (48, 32)),
        ((48, 64), Fraction(2), 256, (96, 64)),
        ((96, 64), Fraction(1, 2), 256, (48, 64)),
    ],
)
def test_sizes(tmp_path, size, aspect, short, expected):
    path = write_video(tmp_path / "a.mp4", 20, size=size, aspect=aspect)
    (clip,) = make(path, short_side=short)
    assert (clip["width"], clip["height"]) == expected
    assert numbers(clip["path"]) == list(range(20))
    assert read_video(clip["path"])[0].shape == (*expected[::-1], 3)


def test_odd_sizes_become_even(tmp_path):
    path = write_video(tmp_path / "a.mkv", 20, size=(97, 65), codec="ffv1", pix_fmt="bgr0")
    (clip,) = make(path)
    assert (clip["width"], clip["height"]) == (96, 64) and numbers(clip["path"]) == list(range(20))


def test_long_videos_are_cut_into_equal_parts(tmp_path):
    path = write_video(tmp_path / "a.mp4", 100)
    clips = make(path, clip_seconds=1.5)
    assert [c["frames"] for c in clips] == [33, 33, 34]
    assert [c["start"] for c in clips] == [0.0, 1.32, 2.64]
    assert [n for c in clips for n in numbers(c["path"])] == list(range(100))
    # A nominal ten seconds are rarely exactly ten: they must not become two halves.
    assert [c["frames"] for c in make(path, clip_seconds=3.9)] == [100]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_become_upright_clips_of_one_frame(tmp_path, orientation):
    upright = picture(0b1011)
    turn = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    Image.fromarray(np.ascontiguousarray(turn(upright))).save(path, quality=95, exif=exif)
    (clip,) = make(path, kind="image")
    assert numbers(clip["path"]) == [0b1011]
    assert (clip["frames"], clip["width"], clip["height"]) == (1, 96, 64)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16", "CMYK"])
def test_images_of_every_kind(tmp_path, mode):
    image = Image.fromarray(picture(0b101))
    if mode == "I;16":
        image = Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16) << 8) + 7)
    else:
        image = image.convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    (clip,) = make(path, kind="image")
    assert numbers(clip["path"]) == [0b101]
    frame = read_frames(clip["path"].read_bytes(), np.array([0]))
    assert tuple(frame.shape) == (1, 64, 96, 3)


# ---- copying


def test_a_file_that_is_ready_is_copied(tmp_path):
    path = ready_video(tmp_path / "a.mp4")
    (clip,) = make(path)
    assert clip["copied"] and clip["path"].read_bytes() == path.read_bytes()
    assert (clip["frames"], clip["fps"]) == (20, 25)


@pytest.mark.parametrize(
    "how",
    [
        {"gop": 40, "frames": 60},
        {"size": (98, 66), "short": 64},
        {"seconds": 0.5},
        {"audio": True},
        {"aspect": Fraction(4, 3)},
        {"pix_fmt": "yuv444p"},
        {"pix_fmt": "yuvj420p"},
        {"times": [40 * i + 15 * (i % 2) for i in range(20)]},
    ],
    ids=lambda how: next(iter(how)),
)
def test_a_file_that_is_not_ready_is_encoded(tmp_path, how):
    short, seconds = how.pop("short", 256), how.pop("seconds", 10.0)
    path = ready_video(tmp_path / "a.mp4", **how)
    clips = make(path, short, seconds)
    assert not any(c["copied"] for c in clips)
    assert sum(c["frames"] for c in clips) == how.get("frames", 20)


def test_open_groups_are_not_copied(tmp_path):
    options = {"x264-params": "keyint=8:min-keyint=8:scenecut=0:open-gop=1:bframes=3:b-adapt=0"}
    (clip,) = make(write_video(tmp_path / "a.mp4", 40, options=options))
    assert not clip["copied"] and numbers(clip["path"]) == list(range(40))


# ---- the pack


def test_pack_as_described(videos, tmp_path):
    (videos / "run" / "bad.mp4").write_text("no video")
    (videos / "notes.txt").write_text("left alone")
    out = tmp_path / "out"
    index = quick(videos, out)
    assert index == load_index(out) == json.loads((out / "index.json").read_text())
    assert (index["num_sources"], index["num_clips"], index["num_refused"]) == (5, 4, 1)
    assert (index["classes"], index["splits"]) == (["run", "walk"], {})
    (refused,) = map(json.loads, (out / "refused.jsonl").read_text().splitlines())
    assert refused == {"source": "run/bad.mp4", "reason": "not a video: text"}
    clips = clips_of(out)
    for name, count in (
        ("walk/a.mp4", 10),
        ("walk/b.mp4", 11),
        ("run/c.mp4", 12),
        ("run/d.mp4", 13),
    ):
        row, data = clips[name, 0]
        assert numbers(data) == list(range(count)) and row["frames"] == count
        assert (
            row["label"] == name.split("/")[0] and row["sha256"] == hashlib.sha256(data).hexdigest()
        )
    assert hashlib.sha256((out / "clips.jsonl").read_bytes()).hexdigest() == index["clips_sha256"]
    members = []
    for shard in index["shards"]:
        data = (out / shard["name"]).read_bytes()
        assert len(data) == shard["bytes"] and hashlib.sha256(data).hexdigest() == shard["sha256"]
        with tarfile.open(out / shard["name"]) as file:
            members += [(m.name, m.mtime, m.uid) for m in file]
    keys = [row["key"] for row, _ in clips.values()]
    assert members == [(f"{key}.{end}", 0, 0) for key in keys for end in ("mp4", "json")]


def test_shards_are_read_by_webdataset_and_of_near_equal_size(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    folder = tmp_path / "videos"
    folder.mkdir()
    path = ready_video(folder / "0.mp4", 8)
    for i in range(1, 30):
        shutil.copy(path, folder / f"{i}.mp4")
    (tmp_path / "l.csv").write_text(
        "path,caption,label\n" + "".join(f"videos/{i}.mp4,nr {i},{i % 3}\n" for i in range(30))
    )
    total = path.stat().st_size * 30
    index = quick(tmp_path / "l.csv", tmp_path / "out", shard_bytes=total // 4)
    sizes = [shard["bytes"] for shard in index["shards"]]
    assert 4 <= len(sizes) <= 6 and max(sizes) - min(sizes) < 2.5 * (path.stat().st_size + 1536)
    urls = [str(tmp_path / "out" / shard["name"]) for shard in index["shards"]]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [
        row["key"] for row, _ in clips_of(tmp_path / "out").values()
    ]
    order = [s["__key__"] for s in samples]  # shuffled, so that classes do not come in blocks
    assert order == sorted(order, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    about = json.loads(samples[0]["json"])
    assert (
        about["captions"] == [f"nr {about['source'][7:-4]}"]
        and samples[0]["mp4"] == path.read_bytes()
    )


def test_the_same_frames_give_the_same_bytes(tmp_path):
    """Every time: x264's macroblock tree changed 2 to 3 clips of 100, so it takes many."""
    path = write_video(tmp_path / "a.avi", 40, codec="mpeg4")
    made = {make(path)[0]["sha256"] for _ in range(80)}
    assert len(made) == 1
    (clip,) = make(path)
    assert b" mbtree=0 " in clip["path"].read_bytes()  # x264 writes its settings into the stream


def test_the_number_of_workers_changes_nothing(videos, tmp_path):
    (videos / "run" / "bad.mp4").write_text("no video")
    quick(videos, tmp_path / "one", workers=1, shard_bytes=4000)
    quick(videos, tmp_path / "two", workers=2, shard_bytes=4000)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert len(load_index(tmp_path / "one")["shards"]) > 1


def test_packing_again_does_nothing(videos, tmp_path):
    (videos / "run" / "bad.mp4").write_text("no video")
    quick(videos, tmp_path / "out")
    before = state(tmp_path / "out")
    quick(videos, tmp_path / "out")
    assert state(tmp_path / "out") == before
    assert len((tmp_path / "out/.pack/journal.jsonl").read_text().splitlines()) == 5
    assert not list((tmp_path / "out/.pack/clips").iterdir())


def test_only_what_changed_is_done_again(videos, tmp_path, capsys):
    out = tmp_path / "out"
    quick(videos, out)
    old = clips_of(out)
    write_video(videos / "walk/a.mp4", 30)
    (videos / "run/d.mp4").unlink()
    write_video(videos / "run/e.mp4", 7)
    index = pack(videos, out, workers=1)
    assert "2 clips made" in capsys.readouterr().err
    new = clips_of(out)
    assert set(new) == {("walk/a.mp4", 0), ("walk/b.mp4", 0), ("run/c.mp4", 0), ("run/e.mp4", 0)}
    assert numbers(new["walk/a.mp4", 0][1]) == list(range(30))
    assert new["run/c.mp4", 0][1] == old["run/c.mp4", 0][1]
    assert index["num_sources"] == 4
    assert {p.name for p in out.glob("*.tar")} == {shard["name"] for shard in index["shards"]}
    quick(videos, tmp_path / "fresh")
    assert hashes(out) == hashes(tmp_path / "fresh")


def test_a_pack_of_older_timing_makes_anew_what_may_be_wrong(videos, tmp_path, capsys):
    write_video(videos / "run" / "encoded.avi", codec="mpeg4")
    Image.new("RGB", (64, 64)).save(videos / "run" / "picture.png")
    out = tmp_path / "out"
    quick(videos, out)
    before, journal = hashes(out), out / ".pack" / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    old = [{name: value for name, value in line.items() if name != "timing"} for line in lines]
    journal.write_text("".join(json.dumps(line) + "\n" for line in old))
    quick(videos, out, progress=True)
    assert "1 clip made" in capsys.readouterr().err and hashes(out) == before
    last = [json.loads(line) for line in journal.read_text().splitlines()][-1]
    assert last["name"] == "run/encoded.avi" and last["timing"]


def test_new_labels_need_no_decoding(videos, tmp_path, capsys):
    (tmp_path / "l.csv").write_text("path,label\nvideos/walk/a.mp4,x\nvideos/run/c.mp4,y\n")
    first = pack(tmp_path / "l.csv", tmp_path / "out", workers=1)
    (tmp_path / "l.csv").write_text(
        "path,label,split\nvideos/run/c.mp4,z,test\nvideos/walk/a.mp4,x,train\n"
    )
    second = pack(tmp_path / "l.csv", tmp_path / "out", workers=1)
    assert "nothing new to decode" in capsys.readouterr().err
    assert (first["classes"], second["classes"]) == (["x", "y"], ["x", "z"])
    assert (
        second["splits"] == {"test": 1, "train": 1}
        and first["fingerprint"] != second["fingerprint"]
    )
    row, data = clips_of(tmp_path / "out")["videos/run/c.mp4", 0]
    assert row["label"] == "z" and numbers(data) == list(range(12))


def test_columns_that_nothing_reads_are_told_in_one_line(videos, tmp_path, capsys):
    names = [f"walk/{n}.mp4" for n in "ab"]
    text = (
        "path;label;camera;segments;my col\n"
        + "".join(f'{n};x;left;"0-{9 + i} x; {90 * i}-99 y";7\n' for i, n in enumerate(names))
        + "walk/a.mp4;x;left;1_0-2_0 x;7\n"
    )
    (videos / "list.csv").write_text(text)
    quick(videos / "list.csv", tmp_path / "out", progress=True)
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "camera" in line]
    assert "my col" in line and "segments" not in line and "label" not in line
    assert "1 segment behind the end of the video, such as '90-99 y' of walk/b.mp4" in said
    assert "1 part of the column segments, such as '1_0-2_0 x' of walk/a.mp4" in said


@pytest.mark.parametrize(("rest", "said"), [(200, False), (2000, True)])
def test_a_pack_of_repeats_is_told(tmp_path, capsys, rest, said):
    times = [40 * i + rest * (i > 4) for i in range(10)]
    path = write_video(tmp_path / "a.mkv", 10, times=times, size=(32, 32))
    quick(path, tmp_path / "out", progress=True)
    assert ("repeat" in capsys.readouterr().err) == said


def test_tars_and_lists_give_the_same_clips(videos, tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as file:
        file.add(videos / "walk/a.mp4", "a.mp4")
        file.add(ready_video(tmp_path / "r.mp4"), "b.mp4")
    quick(tmp_path / "s.tar", tmp_path / "out")
    clips = clips_of(tmp_path / "out")
    assert numbers(clips["s.tar/a.mp4", 0][1]) == list(range(10))
    assert clips["s.tar/b.mp4", 0][1] == (tmp_path / "r.mp4").read_bytes()


def test_what_must_not_be_mixed_is_refused(videos, tmp_path):
    out = tmp_path / "out"
    quick(videos, out, short_side=48)
    before = state(out)
    with pytest.raises(ValueError, match=r"--short-side 48: .*another --out"):
        quick(videos, out, short_side=64)
    other = tmp_path / "other"
    other.mkdir()
    write_video(other / "z.mp4", 3)
    with pytest.raises(ValueError, match="other files"):
        quick(other, out, short_side=48)
    with pytest.raises(ValueError, match="something else"):
        quick(videos, other)
    with pytest.raises(ValueError, match="inside"):
        quick(videos, videos / "pack")
    with pytest.raises(ValueError, match="already"):
        quick(out, tmp_path / "again")
    with pytest.raises(ValueError, match="short_side is 0"):
        quick(videos, tmp_path / "again", short_side=0)
    assert state(out) == before and not (tmp_path / "again").exists()


def test_all_refused(videos, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for i in range(3):
        (bad / f"{i}.mp4").write_text("text")
    with pytest.raises(ValueError, match="3 files") as caught:
        quick(bad, tmp_path / "out")
    reasons, where = caught.value.__notes__
    assert reasons == "  3 x not a video: text" and where.endswith("refused.jsonl")
    assert len((tmp_path / "out/refused.jsonl").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="not finished"):
        load_index(tmp_path / "out")


def test_load_index_checks_what_it_reads(videos, tmp_path):
    out = tmp_path / "out"
    good = quick(videos, out)
    for change, message in (
        ({"format": "other-2"}, "has the format 'other-2'"),
        ({"num_clips": "4"}, "no usable 'num_clips'"),
        ({"shards": [{"name": "../../etc/passwd"}]}, "names a shard"),
    ):
        (out / "index.json").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            load_index(out)
    (out / "index.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_index(out)
    with pytest.raises(ValueError, match="is no pack"):
        load_index(tmp_path)


def test_a_damaged_pack_is_made_whole(videos, tmp_path):
    out = tmp_path / "out"
    quick(videos, out, shard_bytes=4000)
    good = hashes(out)
    shards = sorted(out.glob("*.tar"))
    shards[0].unlink()
    quick(videos, out, shard_bytes=4000)
    assert hashes(out) == good
    (out / "clips.jsonl").write_text("{}\n")
    quick(videos, out, shard_bytes=4000)
    assert hashes(out) == good


# ---- interruptions

RUN = (
    "import sys; from pretrain.data.pack import pack; "
    "pack(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]), shard_bytes=20000)"
)


def start(videos: Path, out: Path, workers: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, str(videos), str(out), str(workers)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


# Packs until so many answers are in the journal; then names its decoders and kills itself.
DIES = """
import os, signal, sys
from pathlib import Path
from pretrain.data import pack as packing

def some(*given):
    for number, answer in enumerate(real(*given)):
        if number == int(sys.argv[3]):
            print(Path(f"/proc/self/task/{os.getpid()}/children").read_text(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        yield answer

real, packing.run_jobs = packing.run_jobs, some
packing.pack(sys.argv[1], sys.argv[2], workers=1, shard_bytes=20000)
"""


def until_gone(processes: list[int], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < end, processes
        time.sleep(0.005)


@pytest.fixture
def many(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    path = write_video(folder / "000.mp4", 40, codec="mpeg4")
    for i in range(1, 40):
        shutil.copy(path, folder / f"{i:03}.mp4")
    return folder


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="looks for processes in /proc")
def test_a_killed_pack_goes_on(many, tmp_path):
    assert start(many, tmp_path / "whole", 2).wait() == 0
    out = tmp_path / "out"
    journal = out / ".pack/journal.jsonl"
    for more in (3, 14):
        words = [sys.executable, "-c", DIES, str(many), str(out), str(more)]
        killed = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        assert killed.returncode == -signal.SIGKILL and not (out / "index.json").exists()
        workers = [*map(int, killed.stdout.split())]
        assert workers
        until_gone(workers)
    assert journal.read_bytes().count(b"\n") == 17
    with open(journal, "a") as file:
        file.write('{"id": "cut off by the ki')
    process = start(many, out)
    _, said = process.communicate()
    assert process.returncode == 0 and hashes(out) == hashes(tmp_path / "whole")
    assert "23 clips made" in said


def test_every_moment_of_a_commit_is_safe(videos, tmp_path, monkeypatch):
    """Stops at each renaming and deleting in turn: the index is whole or absent, and it goes on."""

    class Stop(BaseException):
        pass

    out, calls = tmp_path / "out", [0, 10**9]
    real = {name: getattr(os, name) for name in ("replace", "unlink", "fsync")}

    def counted(name):
        def call(*args, **more):
            calls[0] += 1
            if calls[0] > calls[1]:
                raise Stop
            return real[name](*args, **more)

        return call

    quick(videos, out, shard_bytes=4000)
    write_video(videos / "walk/a.mp4", 30)
    for name in real:
        monkeypatch.setattr(os, name, counted(name))
    calls[:] = 0, 0
    with pytest.raises(Stop):  # with all decoding done, so that what follows is quick
        quick(videos, out, shard_bytes=4000)
    shutil.copytree(out, tmp_path / "old")
    calls[:] = 0, 10**9
    quick(videos, out, shard_bytes=4000)
    wanted, steps = hashes(out), calls[0]
    assert steps > 10

    def nothing_to_do(jobs, *_):
        assert not jobs  # whatever is lost, it is not decoded work
        yield from ()

    monkeypatch.setattr("pretrain.data.pack.run_jobs", nothing_to_do)
    for step in range(steps):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "old", out)
        calls[:] = 0, step
        with pytest.raises(Stop):
            quick(videos, out, shard_bytes=4000)
        calls[1] = 10**9
        if (out / "index.json").exists():
            clips_of(out)
            index = load_index(out)
            lines = (out / "clips.jsonl").read_bytes()
            assert hashlib.sha256(lines).hexdigest() == index["clips_sha256"]
            for shard in index["shards"]:
                assert (
                    hashlib.sha256((out / shard["name"]).read_bytes()).hexdigest()
                    == shard["sha256"]
                )
        quick(videos, out, shard_bytes=4000)
        assert hashes(out) == wanted


def test_several_processes_at_once(videos, tmp_path):
    processes = [start(videos, tmp_path / "out") for _ in range(3)]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert sum("4 clips made" in text for text in said) == 1
    assert sum("nothing new to decode" in text for text in said) == 2


@pytest.mark.parametrize("limit", [3_000, 60_000], ids=["clip", "shard"])
def test_a_full_disk_is_said_and_harms_nothing(many, tmp_path, limit):
    out = tmp_path / "out"
    first = sorted(many.iterdir())[30:]
    rest = sorted(many.iterdir())[:30]
    for path in rest:
        path.rename(tmp_path / path.name)
    quick(many, out, shard_bytes=2**28 if limit > 3_000 else 20_000)
    before = state(out)
    for path in rest:
        (tmp_path / path.name).rename(path)
    full = (
        "import resource, sys; from pretrain.data.pack import pack; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "pack(sys.argv[1], sys.argv[2], workers=1)"
    )
    result = subprocess.run(
        [sys.executable, "-c", full, str(many), str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1 and "cannot write" in result.stderr, result.stderr
    assert str(out) in result.stderr and "free" in result.stderr and len(first) == 10
    assert state(out) == before
    assert quick(many, out)["num_clips"] == 40


# ---- workers that fail

WORKER = """
import json, os, sys, time
print('{"ready": 1}', flush=True)
for line in sys.stdin:
    job = json.loads(line)["do"]
    if job == "hang": time.sleep(60)
    if job == "crash": os.kill(os.getpid(), 11)
    if job == "leave": os._exit(3)
    if job == "rubbish": print("not json", flush=True); time.sleep(60)
    if job == "slow":
        for _ in range(35): time.sleep(0.1); print('{"beat": 1}', flush=True)
    print(json.dumps({"clips": [job]}), flush=True)
"""


def test_workers_that_hang_or_die_are_replaced():
    jobs = ["slow", "hang", "hang", "a", "crash", "leave", "b", "rubbish", "c"]
    command = (sys.executable, "-c", WORKER)
    answers = dict(run_jobs([{"do": job} for job in jobs], 3, 3.0, command))
    assert sorted(answers) == list(range(9))
    for number, job in enumerate(jobs):
        if job in "abc" or job == "slow":
            assert answers[number] == {"clips": [job]}
        else:
            assert answers[number]["retry"]
    assert answers[1]["refused"] == answers[2]["refused"] == "decoder made no progress for 3 s"
    assert answers[4]["refused"] == "decoder died: signal 11 (SIGSEGV)"
    assert answers[5]["refused"] == "decoder died: exit code 3"


def test_a_worker_that_stops_listening_costs_its_job_alone():
    deaf = (
        "import os, time; os.close(0); print('{\"ready\": 1}', flush=True);"
        "time.sleep(0.3); os._exit(3)"
    )
    answers = dict(run_jobs([{}, {}], 1, 30.0, (sys.executable, "-c", deaf)))
    assert answers == {n: {"refused": "decoder died: exit code 3", "retry": True} for n in (0, 1)}


def test_a_worker_that_cannot_start_is_explained():
    with pytest.raises(RuntimeError, match="no_such_module"):
        list(run_jobs([{}], 1, 5, (sys.executable, "-c", "import no_such_module")))


# The real worker, but the first file stops it and the second one crashes it, each with a clip half
# written.
HURT = """
import os, signal
from pathlib import Path
from pretrain.data import ingest as worker

def hurt(beat, **job):
    def end():
        beat()
        if list(out.parent.glob(f"{out.name}-*.mp4")):
            os.kill(os.getpid(), ends[name])

    out, name = Path(job["out"]), Path(job["path"]).stem
    return real(beat=end if name in ends else beat, **job)

ends = {"stopped": signal.SIGSTOP, "crashed": signal.SIGSEGV}
real, worker.ingest = worker.ingest, hurt
worker.main()
"""


def decode_by(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let packing decode by processes that run `code`."""
    command = (sys.executable, "-c", code)
    monkeypatch.setattr(
        "pretrain.data.pack.run_jobs",
        lambda jobs, workers, timeout, _, *rest: run_jobs(jobs, workers, timeout, command, *rest),
    )


def test_a_stopped_and_a_crashed_decoder_cost_one_file_each(tmp_path, monkeypatch):
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    names = ("stopped", "crashed", "third")
    write_video(folder / "third.mp4", 40, codec="mpeg4")
    for name in names[:2]:
        shutil.copy(folder / "third.mp4", folder / f"{name}.mp4")
    with monkeypatch.context() as patch:
        decode_by(patch, HURT)
        assert quick(folder, out, timeout=3.0)["num_refused"] == 2
    lines = map(json.loads, (out / ".pack/journal.jsonl").read_text().splitlines())
    said = {line["name"]: line.get("refused", "") for line in lines}
    assert "no progress for 3 s" in said["stopped.mp4"] and "signal 11" in said["crashed.mp4"]
    assert not said["third.mp4"] and not list(out.glob(".pack/clips/*.mp4"))
    index = quick(folder, out, workers=2)  # what the machine may be to blame for is tried again
    assert (index["num_sources"], index["num_refused"]) == (3, 0)


# ---- the time of a file, and its name on the screen

LIVELY = """
import json, sys, time
print('{"ready": 1}', flush=True)
for line in sys.stdin:
    for _ in range(1000 if json.loads(line)["do"] == "beat" else 0):
        time.sleep(0.05); print('{"beat": 1}', flush=True)
    print('{"clips": []}', flush=True)
"""


def test_beats_keep_no_file_alive_beyond_its_time():
    seen = []
    command = (sys.executable, "-c", LIVELY)
    jobs = [{"do": "beat"}, {"do": "a"}, {"do": "b"}]
    answers = dict(run_jobs(jobs, 2, 60.0, command, [2.5, 60.0, 60.0], seen.append))
    assert answers[1] == answers[2] == {"clips": []}
    assert answers[0]["seconds"] == 2.5 and "--file-timeout" in answers[0]["refused"]
    assert any(jobs.get(0, 0) >= 1 for jobs in seen)


ENDLESS = "import sys, time; print('{\"ready\": 1}', flush=True); time.sleep(600)"


def test_a_file_that_takes_too_long_is_tried_again_with_more_time_only(tmp_path, monkeypatch):
    write_video(tmp_path / "long.mp4", 20)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        decode_by(patch, ENDLESS)
        for file_timeout in (0.2, 0.2, 0.1):
            with pytest.raises(ValueError, match="--file-timeout"):
                quick(tmp_path / "long.mp4", out, file_timeout=file_timeout)
            assert len((out / ".pack/journal.jsonl").read_bytes().splitlines()) == 1
            assert not list(out.glob(".pack/clips/*"))
    assert quick(tmp_path / "long.mp4", out)["num_refused"] == 0


def test_files_that_take_long_are_named():
    slow = {f"walk/{i}.gif": 31.0 + i for i in range(5)}
    assert slow_files({"walk/quick.mp4": 0.5, "walk/0.gif": 31.0}) == "walk/0.gif for 31 s"
    assert slow_files(slow).endswith("walk/2.gif for 33 s and 2 more")


# ---- folders that cannot be written to


def test_a_clip_that_cannot_be_written_stops_the_pack(videos, tmp_path, monkeypatch):
    digest = text_digest
    monkeypatch.setattr("pretrain.data.pack.text_digest", lambda text: f"gone/{digest(text)}")
    with pytest.raises(ValueError, match="No such file"):
        quick(videos, tmp_path / "out")
    monkeypatch.undo()
    assert (tmp_path / "out/.pack/journal.jsonl").read_text() == ""
    assert quick(videos, tmp_path / "out")["num_refused"] == 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder in which nobody can write")
def test_a_folder_that_cannot_be_made_is_named(videos):
    with pytest.raises(ValueError, match=r"/proc/here/out.*--out"):
        quick(videos, Path("/proc/here/out"))


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EROFS, "Read-only file system"),
        NotImplementedError("no locks here"),
    ],
)
def test_a_folder_that_cannot_be_locked_is_named(videos, tmp_path, monkeypatch, error):
    def acquire(*_, **__):
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=f"{tmp_path}/out.*--out"):
        quick(videos, tmp_path / "out")
    with pytest.raises(ValueError, match=f"{tmp_path}/cache.*MUYBRIDGE_CACHE"):
        open_data("synthetic:2", 64, say=False)


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_cache_that_is_a_file_is_named(videos, tmp_path, monkeypatch, where):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / where))
    for source in ("synthetic:2", str(videos)):
        with pytest.raises(ValueError, match="MUYBRIDGE_CACHE"):
            open_data(source, 64, say=False)


def test_a_cache_says_kept_once_and_follows_its_list(videos, tmp_path, monkeypatch, capsys):
    """Also where the list names other files altogether, or was packed by other rules: nobody chose
    that folder.
    """
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))
    clips = sorted(videos.rglob("*.mp4"))
    listing = tmp_path / "mine.csv"
    for names, word in ((clips[:1], "kept"), (clips[:1], "before"), (clips[1:2], "before")):
        listing.write_text("path,label\n" + "".join(f"{name},a\n" for name in names))
        pack = open_data(str(listing), 64)
        assert [r["source"] for r in pack.records()] == [str(name) for name in names]
        said = capsys.readouterr().out
        assert ("kept for next time" in said) == (word == "kept") and str(listing) in said
    monkeypatch.setattr("pretrain.data.pack.RULES", {**RULES, "rule": "new"})
    assert len(open_data(str(listing), 64, say=False)) == 1


BAD_LISTS = {
    "no such split": ("label,split\n{0},a,train\n{1},b,train\n", "mine.csv has no split 'test'"),
    "never trained": ("label,split\n{0},a,train\n{1},b,test\n", "mine.csv:3: .*never trained"),
    "spelling": ("label,split\n{0},Sit_Down,train\n{1},sit down,test\n", "mine.csv:3: .*Sit_Down"),
    "one label": ("label\n{0},a\n{1},a\n", "mine.csv: the only label"),
    "segments": ("segments,split\n{0},0-1 a; 1-2 b,train\n{1},0-1 a; 2-1 b,test\n",
                 "mine.csv:3: .*2-1 b"),
    "overlap": ("segments,split\n{0},0-1 a; 0.5-2 b,train\n{1},0-1 a,test\n",
                "mine.csv:2: .*overlap"),
    "frames": ("segments,split\n{0},0-1 a; 1-2 b,train\n{1},0-1 c,test\n",
               "mine.csv:3: .*never trained: c"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LISTS)
def test_what_is_wrong_with_a_list_names_the_list_and_the_line(case, videos, tmp_path, monkeypatch):
    """Not the folder of the cache, which nobody has seen."""
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))
    text, said = BAD_LISTS[case]
    (tmp_path / "mine.csv").write_text("path," + text.format(*sorted(videos.rglob("*.mp4"))))
    data = open_data(str(tmp_path / "mine.csv"), 64, say=False)
    frames = "segments" in text
    with pytest.raises(ValueError, match=said) as refused:
        train, test, _ = choose_splits(data, "train", "test", 0, labels=not frames)
        classes_of_frames(data, train, test)
    assert str(tmp_path / "cache") not in str(refused.value)


def test_sources_and_packs_may_be_read_only(videos, tmp_path):
    out = tmp_path / "out"
    with read_only(videos):
        quick(videos, out)
    before = state(out)
    with read_only(out):
        pack = open_data(str(out), 64, say=False)
        assert len(pack) == 4 and len(pack.read(pack.record(0)))
    assert state(out) == before


@contextlib.contextmanager
def read_only(folder: Path):
    """No name below it may be added; binds everybody but root."""
    folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    for path in folders:
        path.chmod(0o555)
    yield
    for path in folders:
        path.chmod(0o755)


# ---- packs that somebody else made


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Two videos and their pack, to be copied."""
    folder = tmp_path_factory.mktemp("packed")
    for name in ("walk/a.mp4", "run/b.mp4"):
        (folder / "in" / name).parent.mkdir(parents=True)
        ready_video(folder / "in" / name)
    quick(folder / "in", folder / "out")
    return folder


@pytest.fixture
def copied(packed, tmp_path):
    return Path(shutil.copytree(packed / "out", tmp_path / "out"))


HUGE = "9" * 5000


@pytest.mark.parametrize(
    "change",
    [
        {"shard": 9},
        {"shard": -1},
        {"shard": "0"},
        {"offset": -512},
        {"offset": 2**60},
        {"bytes": 0},
        {"bytes": 2**40},
        {"frames": 0},
        {"frames": -3},
        {"frames": 2**40},
        {"frames": 1.5},
        {"frames": True},
        {"width": 10**9},
        {"width": 16384, "height": 16384},
        {"height": 0},
        {"fps": float("nan")},
        {"fps": 0},
        {"start": float("inf")},
        {"key": "../../up"},
        {"key": 7},
        {"label": "nowhere"},
        {"label": ["walk"]},
        {"captions": "text"},
        {"captions": [1]},
        {"split": 3},
        {"source": None},
        {"extra": {"a": 1}},
        {"sha256": None},
        {"fps": 61.5},
        {"start": -0.5},
        {"frames": 999, "width": 8192, "height": 8192},
        {"key": "a" * 101},
        lambda row: json.dumps(row | {"source": "SOURCE"}).replace("SOURCE", "a\tb"),
        lambda row: json.dumps(row | {"source": "SOURCE"}).replace("SOURCE", "\\x41"),
        lambda row: json.dumps(row | {"clip": 7}).replace('"clip": 7', '"clip": 07'),
        lambda row: json.dumps(row | {"start": 7}).replace('"start": 7', '"start": 7.'),
        lambda row: json.dumps(row) + " {}",
        lambda row: json.dumps({k: v for k, v in row.items() if k != "label"}),
        lambda row: "[1]",
        lambda row: "{",
        lambda row: '{"frames": ' + HUGE + "}",
        lambda row: "[" * 100_000,
        lambda row: json.dumps(row) + "\n" + json.dumps(row),
        lambda row: "",
    ],
)
def test_a_line_that_cannot_be_true_is_named_when_the_pack_is_opened(packed, copied, change):
    """The second line is changed, and an index made that agrees with it."""
    lines = (copied / "clips.jsonl").read_text().splitlines()
    row = json.loads(lines[1])
    lines[1] = change(row) if callable(change) else json.dumps(row | change)
    with_lines(copied, lines)
    where = "clips.jsonl:2: " if "\n" not in lines[1] else "clips.jsonl"
    with pytest.raises(ValueError, match=where):
        Pack(copied)
    if change == {"frames": -3}:  # and the packer makes it whole
        assert quick(packed / "in", copied)["num_clips"] == 2
        Pack(copied)


def test_a_shard_that_changed_in_place_is_named_and_made_anew(packed, copied):
    """Its size is the same, so nothing but a clip that cannot be decoded tells."""
    (shard,) = copied.glob("shard-*")
    pack = Pack(copied)
    record = pack.record(0)
    data = bytearray(shard.read_bytes())
    data[record["offset"] : record["offset"] + record["bytes"]] = bytes(record["bytes"])
    shard.write_bytes(data)
    with pytest.raises(DecodeError, match=rf"{shard.name} has changed .* delete that file"):
        pack.frames(record, np.array([0]))
    shard.unlink()
    quick(packed / "in", copied)
    assert len(Pack(copied).frames(record, np.array([0]))) == 1


@pytest.mark.parametrize("given", [("", "out"), ("in", "")])
def test_an_empty_path_is_not_this_folder(packed, tmp_path, monkeypatch, given):
    monkeypatch.chdir(packed)
    with pytest.raises(ValueError, match="is empty"):
        quick(*given)


def with_lines(folder: Path, lines: list[str]) -> Path:
    """Writes these lines about clips, and an index that agrees with them."""
    data = "".join(line + "\n" for line in lines).encode()
    (folder / "clips.jsonl").write_bytes(data)
    index = json.loads((folder / "index.json").read_text())
    index |= {"clips_sha256": hashlib.sha256(data).hexdigest(), "num_clips": len(lines)}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"fps": 60.0},
        {"fps": 60},
        {"fps": 0.04},
        {"fps": 59.94005994005994},
        {"start": 1e-07},
        {"start": 12345.678},
        {"bytes": 7, "frames": 7},
        {"frames": 1200, "bytes": 2000},
        {"width": 4096, "height": 4096, "frames": 1},
        {"label": None, "captions": ['a "b" \\ c', "跑步 \x1b[2J"], "extra": {"é": "\n", "b": ""}},
        {"key": "clé-1", "source": "=cmd|' /C calc'!A0", "subject": "", "split": "\u202e"},
    ],
)
def test_a_line_that_can_be_true_is_read_however_it_is_written(copied, change):
    first = (copied / "clips.jsonl").read_text().splitlines()[0]
    row = json.loads(first) | change
    lines = [json.dumps(row), json.dumps(row, separators=(",", ":"), ensure_ascii=False)]
    pack = Pack(with_lines(copied, [first, *lines, json.dumps(dict(sorted(row.items()))), first]))
    assert list(pack.records()) == [json.loads(first), row, row, row, json.loads(first)]


@pytest.mark.parametrize(
    "change",
    [
        "[]",
        "7",
        '{"format": ' + HUGE + "}",
        "[" * 100_000,
        "NaN",
        {"num_clips": float("nan")},
        {"num_clips": -1},
        {"num_clips": True},
        {"num_clips": 10**400},
        {"num_clips": 5},
        {"classes": [1]},
        {"classes": ["walk", "walk"]},
        {"splits": {"train": "all"}},
        {"shards": {}},
        {"shards": [7]},
        {"shards": []},
        {"shards": [{"name": "shard-00000-00000000.tar"}]},
        {"format": ["x"]},
    ],
)
def test_an_index_that_cannot_be_true_is_refused(copied, change):
    good = json.loads((copied / "index.json").read_text())
    text = change if isinstance(change, str) else json.dumps(good | change)
    (copied / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index.json|clips.jsonl"):
        Pack(copied)
    for field, value in (("sha256", "x"), ("bytes", "7"), ("bytes", -1), ("num_clips", None)):
        shard = good["shards"][0] | {field: value}
        (copied / "index.json").write_text(json.dumps(good | {"shards": [shard]}))
        with pytest.raises(ValueError, match=r"index.json"):
            Pack(copied)


@pytest.mark.parametrize("name", ["index.json", "clips.jsonl", "shard"])
@pytest.mark.parametrize("kind", ["zero", "pipe", "folder", "nowhere"])
def test_a_pack_of_devices_and_pipes_is_refused_at_once(copied, name, kind):
    path = next(copied.glob("shard-*")) if name == "shard" else copied / name
    path.unlink()
    {
        "zero": lambda: os.symlink("/dev/zero", path),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "nowhere": lambda: os.symlink("missing", path),
    }[kind]()
    with pytest.raises(ValueError, match=path.name):
        open_data(str(copied), 64, say=False)


@pytest.mark.parametrize(
    "damage",
    [
        b"[]\n",
        b'{"id": 7}\n',
        b'{"id": "a", "name": "b", "clips": [{"key": "../../up"}]}\n',
        b'{"id": "a", "name": "b", "clips": 3}\n',
        b'{"id": "a", "name": [], "refused": "x"}\n',
        b'{"id": "a", "name": "b"}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b'{"id": ' + HUGE.encode() + b"}\n",
        b'{"id": "half',
    ],
)
def test_damaged_journal_lines_are_left_out_with_a_word(packed, copied, capsys, damage):
    journal = copied / ".pack/journal.jsonl"
    first, second = map(json.loads, journal.read_bytes().splitlines())
    second["clips"][0]["key"] = "../../../up"  # a good line made to point out of the folder
    journal.write_bytes(json_line(first).encode() + json_line(second).encode() + damage)
    quick(packed / "in", copied, progress=True)
    assert "2 damaged lines" in capsys.readouterr().err
    assert hashes(copied) == hashes(packed / "out")
    assert len(journal.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b"", HUGE.encode()])
def test_damaged_settings_are_written_anew_with_a_word(packed, copied, capsys, content):
    (copied / "index.json").unlink()
    (copied / ".pack/settings.json").write_bytes(content)
    quick(packed / "in", copied, progress=True)
    assert "settings.json" in capsys.readouterr().err
    assert json.loads((copied / ".pack/settings.json").read_text())["short_side"] == 256


@pytest.mark.parametrize("name", ["journal.jsonl", "settings.json", "lock"])
def test_pipes_among_our_own_files_are_not_waited_for(packed, copied, name):
    (copied / "index.json").unlink()
    (copied / ".pack" / name).unlink(missing_ok=True)
    os.mkfifo(copied / ".pack" / name)
    if name == "journal.jsonl":
        with pytest.raises(ValueError, match=name):
            quick(packed / "in", copied)
    else:  # written anew, or as good as a file
        assert quick(packed / "in", copied)["num_clips"] == 2
    assert hashes(packed / "out").items() >= hashes(copied).items()  # and nothing was lost


@pytest.mark.parametrize("size", [(40, 32), (68, 54), (80, 64), (140, 112), (340, 256), (454, 256)])
def test_clips_of_any_shape_are_decoded(tmp_path, size):
    """A frame takes more memory than it shows, by processor: a limit of pixels must leave room for
    that.
    """
    data = ready_video(tmp_path / "a.mp4", size=size).read_bytes()
    assert read_frames(data, np.array([3]), size).shape == (1, size[1], size[0], 3)


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
@pytest.mark.parametrize("size", [(68, 54), (72, 54), (340, 256)])  # decord copies no 72
def test_other_decoders_give_the_same_bits(tmp_path, size, decoder):
    need(decoder)
    data = ready_video(tmp_path / "a.mp4", frames=70, size=size).read_bytes()
    for wanted in (np.arange(0, 64, 4), np.array([69, 3, 3, 40]), np.array([0])):
        ours, theirs = (read_frames(data, wanted, size, d) for d in ("pyav", decoder))
        assert torch.equal(ours, theirs)
    for beyond in (70, 2**40):
        with pytest.raises(DecodeError):
            read_frames(data, np.array([beyond]), size, decoder)


def need(decoder: str) -> None:
    if decoder not in installed_decoders():
        pytest.skip(f"{decoder} is not installed")


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
def test_a_decoder_that_is_not_installed_is_named_before_anything_is_decoded(
    packed, monkeypatch, decoder
):
    monkeypatch.setitem(sys.modules, decoder, None)
    check_decoder.cache_clear()
    with pytest.raises(ValueError, match=f"pip install {decoder}"):
        Pack(packed / "out", decoder=decoder)
    assert decoder not in installed_decoders()


@pytest.mark.parametrize("decoder", ["pyav", "decord", "torchcodec"])
def test_clips_are_decoded_only_as_what_the_index_says(tmp_path, decoder):
    need(decoder)
    good = ready_video(tmp_path / "good.mp4").read_bytes()
    assert len(read_frames(good, np.array([3]), (96, 64), decoder)) == 1
    other = ready_video(tmp_path / "other.mp4", size=(128, 64)).read_bytes()
    matroska = write_video(tmp_path / "a.mkv").read_bytes()
    mpeg4 = write_video(tmp_path / "b.mp4", codec="mpeg4").read_bytes()
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        file.mux(stream.encode(None))
    for data in (
        other,
        matroska,
        mpeg4,
        sound.getvalue(),
        b"#EXTM3U\nfile:///etc/passwd\n",
        b"",
        b"\0" * 99,
    ):
        with pytest.raises(DecodeError):
            read_frames(data, np.array([3]), (96, 64), decoder)
    claims = bytearray(good)
    at = claims.index(b"stsz") + 8
    claims[at : at + 8] = (1).to_bytes(4, "big") + (2**31 - 1).to_bytes(4, "big")
    with pytest.raises(DecodeError, match="claims"):
        read_frames(bytes(claims), np.array([3]), (96, 64), decoder)
    for path in ("clip.mp4", Path("clip.mp4"), None):
        with pytest.raises(ValueError, match="read_bytes"):
            read_frames(path, np.array([3]), None, decoder)


def test_packing_imports_no_decoder():
    heavy = "[m for m in ('torch', 'av', 'numpy') if m in sys.modules]"
    code = (
        f"import sys, pretrain.data.pack; print({heavy});"
        "import recipes.pack; print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == ["[]", "False"], result


def test_command_line(videos, tmp_path):
    """On a terminal that knows ASCII only, into a folder with a space."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    videos = videos.rename(tmp_path / "vidéos")

    def run(*flags):
        command = [sys.executable, "recipes/pack.py", *map(str, flags)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)

    out = tmp_path / "öut 1"
    result = run("--data", videos, "--out", out, "--short-side", 32, "--workers", 1)
    assert result.returncode == 0, result.stderr
    assert "4 sources, 4 clips, 0 refused" in result.stderr
    assert f"muybridge videomae --data '{tmp_path}/\\xf6ut 1'" in result.stdout
    assert load_index(out)["settings"]["short_side"] == 32
    result = run("--data", tmp_path / "nowhere", "--out", tmp_path / "o2")
    assert result.returncode == 2 and result.stderr.startswith("error: ")
    result = run("--data", videos, "--out", tmp_path / "o2", "--short-sid", 3)
    assert result.returncode == 2 and "--short-side" in result.stderr


def test_missing_labels_are_said_before_packing(tmp_path, monkeypatch):
    """Not after minutes."""
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "a.mp4", 8)
    with pytest.raises(ValueError, match=r"none of its 1 file has a label.*subfolder"):
        open_data(str(tmp_path / "in"), 64, say=False, labels=True)
    assert not list((tmp_path / "cache").rglob("*.tar"))
    (tmp_path / "list.csv").write_text("path,lable\nin/a.mp4,x\n")
    with pytest.raises(ValueError, match="columns 'lable'"):
        open_data(str(tmp_path / "list.csv"), 64, say=False, labels=True)
    for table in ("path,label\nin/a.mp4,x\n", "path,segments\nin/a.mp4,0-0.2 sit\n"):
        (tmp_path / "list.csv").write_text(table)
        assert len(open_data(str(tmp_path / "list.csv"), 64, say=False, labels=True)) == 1
