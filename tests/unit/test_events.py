"""Frames of a long video, their scores, the events cut from them, and the numbers about events."""

import gc
import io
import itertools
import json
import os
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from downstream.events import (
    KeptScores,
    choose_thresholds,
    cut_events,
    detection_draws,
    detection_scores,
    find_truth,
    frame_draws,
    frame_precision,
    frames_of,
    match_labels,
    read_thresholds,
    read_truth,
    smooth,
)
from downstream.metrics import detection_precision
from downstream.report import events_figure
from downstream.segments import piece_scores, segment_scores
from downstream.windows import window_scores
from pretrain.data.guard import Refused
from pretrain.data.stream import FRAME, HEAD, Frames
from recipes.fuse import Line, fusion_figure
from tests.conftest import draw_motion, write_video

# ------------------------------------------------------------------------------- frames of a stream


def everything(path, most: int = 32, side: int = 32) -> tuple[np.ndarray, Frames]:
    with Frames(str(path), None, side) as frames:
        chunks = list(frames.chunks(most))
        return np.concatenate(chunks) if chunks else np.empty((0, 0, 0, 3)), frames


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("film") / "a.mp4"
    write_video(path, np.concatenate([draw_motion(m, 0, 0, 24, 64) for m in ("right", "up")]))
    return path


def test_a_stream_has_every_frame_once_whatever_the_chunks(film):
    whole, about = everything(film, 1000)
    assert whole.shape == (48, 32, 32, 3) and about.fps == 16 and about.ticks == 48
    assert not about.reason
    for most in (1, 7, 48):
        assert np.array_equal(everything(film, most)[0], whole)
    with av.open(str(film)) as container:
        own = [f.to_ndarray(format="rgb24", width=32, height=32) for f in container.decode(video=0)]
    assert np.abs(whole.astype(int) - np.stack(own)).mean() < 4


def test_a_text_named_mp4_an_empty_file_and_nothing_are_refused(tmp_path):
    for name, data in (
        ("a.mp4", b"hello " * 99),
        ("b.mp4", b""),
        ("c.mp4", b"#EXTM3U\nhttp://a/b"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Refused, match=r"text|empty"):
            Frames(str(tmp_path / name), None, 32)
    with pytest.raises(Refused, match="cannot be read"):
        Frames(str(tmp_path / "none.mp4"), None, 32)


def test_a_film_without_pictures_is_refused(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(Refused, match="no video"):
        Frames(str(path), None, 32)


def test_what_comes_before_an_unreadable_middle_is_kept(tmp_path, film):
    data = bytearray(film.read_bytes())
    start = data.index(b"mdat") + 4
    middle = start + (len(data) - start) // 2
    data[middle : middle + 400] = b"\xff" * 400
    path = tmp_path / "torn.mp4"
    path.write_bytes(data)
    found, about = everything(path)
    whole, _ = everything(film)
    assert about.reason and 0 < len(found) < len(whole)
    assert np.array_equal(found[:5], whole[:5])


def test_a_film_without_a_length(tmp_path, film):
    """A live recording: nothing in its head says how long it is."""
    path, target = tmp_path / "live.mkv", io.BytesIO()
    target.seekable = lambda: False  # its head cannot be completed
    with av.open(str(film)) as source, av.open(target, "w", format="matroska") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    path.write_bytes(target.getvalue())
    found, about = everything(path)
    assert np.array_equal(found, everything(film)[0]) and not about.reason


def test_frames_at_uneven_times_come_on_an_even_clock(tmp_path):
    path = tmp_path / "uneven.mkv"
    times = [0, 1, 2, 3, 4, 8, 9, 10, 14, 15, 16, 17, 18]  # of sixteenths of a second
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width = stream.height = 32
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 16)
        for i, when in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 12 * i, np.uint8), "rgb24")
            frame.pts, frame.time_base = when, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found, about = everything(path)
    assert about.fps == 16 and len(found) >= 19
    level = found.mean((1, 2, 3))
    for i, when in enumerate(times):
        assert abs(level[when] - 12 * i) < 4
    assert abs(level[7] - 12 * 4) < 4  # the one before is shown until the next


def worker(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import sys, time\nout = sys.stdout.buffer\n{code}\nout.flush()")


def test_a_decoder_that_hangs_dies_or_lies_is_ended(film):
    about = b'{"fps": [16, 1], "ticks": 9}'
    head = f"out.write({HEAD.pack(b'H', len(about)) + about!r})\nout.flush()\n"
    with pytest.raises(Refused, match=r"no progress for 0.5 s"):
        Frames(str(film), None, 32, 0.5, worker("time.sleep(60)"))
    with pytest.raises(Refused, match="died"):
        Frames(str(film), None, 32, 20, worker("sys.exit(3)"))
    for rest, words in (
        ("time.sleep(60)", "no progress"),
        ("sys.exit(3)", "died"),
        ("out.write(b'F\\x10\\0\\0\\0abc')", "died"),
        (f"out.write({HEAD.pack(b'F', 8) + FRAME.pack(1, 30000, 30000)!r})", "no sense"),
        (f"out.write({HEAD.pack(b'X', 8) + FRAME.pack(1, 0, 0)!r})", "no sense"),
    ):
        with Frames(str(film), None, 32, 0.5 if "sleep" in rest else 20, worker(head + rest)) as f:
            assert list(f.chunks()) == [] and words in f.reason


def test_a_stream_that_is_left_early_ends_its_decoder(film, tmp_path):
    note = tmp_path / "pid"
    about = b'{"fps": [16, 1], "ticks": 9}'
    code = (
        f"import os\nopen({str(note)!r}, 'w').write(str(os.getpid()))\n"
        f"out.write({HEAD.pack(b'H', len(about)) + about!r})\nout.flush()\n"
        f"while True: out.write({HEAD.pack(b'F', 11) + FRAME.pack(1, 1, 1) + b'abc'!r})"
    )
    with Frames(str(film), None, 32, 20, worker(code)) as frames:
        assert next(frames.chunks(1)).tolist() == [[[[97, 98, 99]]]]
        os.kill(int(note.read_text()), 0)  # it is there
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


# ------------------------------------------------------------------------------------------- scores


def predict_mean(window: dict) -> torch.Tensor:
    """Two scores a frame: its brightness, and that of the window."""
    level = window["rgb"].float().mean((1, 3, 4))
    return torch.stack([level, level.mean(1, keepdim=True).expand_as(level)], -1)


def direct(levels: np.ndarray, frames: int, stride: int, hop: int) -> np.ndarray:
    """The definition, with the whole video at hand."""
    num, span = len(levels), frames * stride
    total, count = np.zeros((num, 2)), np.zeros((num, 1))
    last = max(num - span, 0)
    for start in sorted({*range(0, last, hop), last}):
        seen = levels[np.minimum(start + stride * np.arange(frames), num - 1)]
        for t in range(start, min(start + span, num)):
            total[t] += seen[(t - start) // stride], seen.mean()
            count[t] += 1
    return total / count


@given(
    st.integers(1, 60), st.integers(1, 6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 4),
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
)  # fmt: skip
def test_windows_of_a_stream_are_those_of_the_whole(num, frames, stride, hop, batch, sizes):
    hop = min(hop, frames * stride)
    levels = np.random.default_rng(num).integers(0, 256, num).astype(np.uint8)
    video = torch.from_numpy(levels)[None, :, None, None].expand(3, num, 2, 2)

    def chunks():
        start, turn = 0, 0
        while start < num:
            size = sizes[turn % len(sizes)]
            yield {"rgb": video[:, start : start + size]}
            start, turn = start + size, turn + 1

    parts = list(window_scores(chunks(), frames, stride, hop, batch, predict_mean))
    whole = window_scores([{"rgb": video}], frames, stride, hop, batch, predict_mean)
    assert np.array_equal(np.concatenate(parts), np.concatenate(list(whole)))
    assert [len(p) for p in parts]  # in the same parts, too
    assert np.allclose(np.concatenate(parts), direct(levels.astype(float), frames, stride, hop))


def test_windows_of_nothing_and_of_damaged_weights():
    assert list(window_scores([], 4, 1, 2, 2, predict_mean)) == []
    bad = lambda window: predict_mean(window) * float("nan")
    video = {"rgb": torch.zeros(3, 9, 2, 2, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="not finite"):
        list(window_scores([video], 4, 1, 2, 2, bad))


def test_windows_keep_a_window_and_no_more():
    alive: list[int] = []
    windows = itertools.count()

    def chunks():
        for _ in range(100):
            yield {"rgb": torch.zeros(3, 5, 2, 2, dtype=torch.uint8)}

    def predict(window):
        if next(windows) % 3 == 0:  # all objects of this process are many
            held = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.dim() == 4]
            alive.append(sum(t.shape[1] for t in held if t.shape[0] == 3))
        return predict_mean(window)

    gone = sum(len(p) for p in window_scores(chunks(), 8, 1, 4, 2, predict))
    assert gone == 500 and len(alive) > 20 and max(alive[5:]) <= max(alive[:5])


@given(st.integers(1, 50), st.integers(0, 8), st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_smoothing_in_parts_is_smoothing_of_the_whole(num, radius, sizes):
    scores = np.random.default_rng(num).random((num, 3))
    parts, start, turn = [], 0, 0
    while start < num:
        parts.append(scores[start : start + sizes[turn % len(sizes)]])
        start, turn = start + len(parts[-1]), turn + 1
    found = np.concatenate(list(smooth(parts, radius)))
    assert np.array_equal(found, np.concatenate(list(smooth([scores], radius))))
    means = [scores[max(t - radius, 0) : t + radius + 1].mean(0) for t in range(num)]
    assert np.allclose(found, np.stack(means), atol=1e-6)


@given(st.integers(1, 60), st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_events_of_parts_are_those_of_the_whole(num, sizes):
    scores = np.random.default_rng(num).random((num, 3)).astype(np.float32)
    thresholds = np.array([0.3, 0.5, 0.9])
    parts, start, turn = [], 0, 0
    while start < num:
        parts.append(scores[start : start + sizes[turn % len(sizes)]])
        start, turn = start + len(parts[-1]), turn + 1
    names = ["a", "b", "c"]
    events = cut_events(parts, names, thresholds, 10, 0.2)
    assert events == cut_events([scores], names, thresholds, 10, 0.2)
    for k, name in enumerate(names):
        inside = frames_of([e[:3] for e in events], name, 10, num)
        high = scores[:, k] >= thresholds[k]
        assert not (inside & ~high).any()
        # Frames left out are single: two in a row make 0.2 s.
        alone = high & ~inside
        assert not (alone[1:] & alone[:-1]).any()
    for label, start, end, score in events:
        k, (a, b) = names.index(label), (round(start * 10), round(end * 10))
        assert end - start >= 0.2 - 1e-9 and score == pytest.approx(scores[a:b, k].mean(), abs=2e-6)


def test_events_of_several_classes_overlap():
    scores = np.array([[0.9, 0.1], [0.9, 0.8], [0.1, 0.8], [0.1, 0.1]])
    found = cut_events([scores], ["a", "b"], np.array([0.5, 0.5]), 1, 0)
    assert [e[:3] for e in found] == [("a", 0.0, 2.0), ("b", 1.0, 3.0)]
    assert [e[:3] for e in cut_events([scores[:2]], ["a", "b"], np.array([0.5, 0.5]), 1, 0)] == [
        ("a", 0.0, 2.0),
        ("b", 1.0, 2.0),
    ]


# ------------------------------------------------------------------------------------------- truth


def test_truth_as_activitynet_and_as_a_table(tmp_path):
    about = {
        "abc": {"subset": "validation", "annotations": [{"segment": [1, 2.5], "label": "walk"}]},
        "def": {"subset": "testing", "annotations": []},
    }
    (tmp_path / "t.json").write_text(json.dumps({"database": about, "version": "1.3"}))
    found = read_truth(tmp_path / "t.json")
    assert found["abc"].events == [("walk", 1.0, 2.5)] and found["abc"].split == "val"
    assert found["def"].events == [] and found["def"].split == "test"
    for head in ("video,start,end,label,subset", "Video_Name,T-Start,T-End,Class,Split"):
        (tmp_path / "t.csv").write_text(f"{head}\nabc,1,2.5,walk,validation\ndef,,,,testing\n")
        assert read_truth(tmp_path / "t.csv") == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "video,start,end,label\n",
        "start,end,label\n1,2,a\n",
        "video,start,end,label\na,1,x,b\n",
        "video,start,end,label\na,2,1,b\n",
        "video,start,end,label\na,1,2,\n",
        "video,start,end,label\na,nan,2,b\n",
        "video,start,end,label\na,1,inf,b\n",
        "video,start,end,label\na,-1,2,b\n",
        "video,start,end,label\na,1,1e99,b\n",
        '{"database": []}',
        '{"database": {"a": 3}}',
        '{"database": {" ": {"annotations": []}}}',
        '{"database": {"a": {"annotations": [3]}}}',
        "[" * 9999,
        '{"database": {"a": {"annotations": [{"segment": [1], "label": "b"}]}}}',
        '{"database": {"a": {"annotations": [{"segment": [1, true], "label": "b"}]}}}',
        '{"database": {"a": {"annotations": [{"segment": [1, 2], "label": 5}]}}}',
        '{"database": {"a": {"annotations": [{"segment": [[1], {}], "label": "b"}]}}}',
        '{"database": {"a": {"subset": 3, "annotations": []}}}',
        '{"results": {}}',
    ],
)
def test_truth_that_is_none_is_a_sentence(tmp_path, text):
    path = tmp_path / ("t.csv" if text[:1] not in "{[" or not text else "t.json")
    path.write_text(text)
    with pytest.raises(ValueError, match=r"t\.(csv|json)"):
        read_truth(path)


def test_names_of_videos_and_classes_are_found():
    truth = {"abc": 1, "v_def": 2, "x.mp4": 3}
    names = ("folder/abc.mp4", "v_abc.mkv", "def.mp4", "sub/x.mp4", "C:\\d\\abc.avi")
    assert [find_truth(truth, n) for n in names] == ["abc", "abc", "v_def", "x.mp4", "abc"]
    assert find_truth(truth, "abcd.mp4") is None
    events = [("Sit Down", 0, 1), ("fall", 1, 2)]
    assert match_labels(events, ["sit_down", "x"]) == ([("sit_down", 0, 1)], {"fall"})


def test_damaged_thresholds_are_a_sentence(tmp_path):
    path = tmp_path / "thresholds.json"
    for values in ({}, {"a": 0.5}, {"a": 0.5, "b": float("nan")}, {"a": 0.5, "b": "x"},
                   {"a": 0.5, "b": 7}, [0.5, 0.5]):  # fmt: skip
        path.write_text(json.dumps({"thresholds": values}))
        with pytest.raises(ValueError, match="thresholds"):
            read_thresholds(path, ["a", "b"])
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="thresholds"):
            read_thresholds(path, ["a", "b"])
    path.write_text('{"thresholds": {"b": 0.25, "a": 1}}')
    assert read_thresholds(path, ["a", "b"]).tolist() == [1, 0.25]


# ----------------------------------------------------------------------------------- numbers

TRUE = {
    "v": [("a", 0, 4), ("a", 6, 10), ("b", 3, 8)],
    "w": [("a", 1, 3), ("b", 0, 2), ("b", 5, 9)],
    "x": [],
}
FOUND = {
    "v": [
        ("a", 0.5, 4.2, 0.9), ("a", 1, 3.9, 0.95), ("a", 6.4, 9.9, 0.5), ("b", 3, 6, 0.6),
        ("b", 6, 8, 0.7),
    ],
    "w": [("a", 1.2, 4, 0.8), ("b", 5, 9.5, 0.65), ("b", 0.9, 2, 0.3)],
    "x": [("a", 0, 2, 0.85), ("b", 1, 2, 0.1)],
}  # fmt: skip


def test_precision_of_events_is_activitynets():
    """The numbers are those of `average_precision_at_temporal_iou` of mmaction2 on these events."""
    theirs = {
        0.1: {"a": 0.7333333, "b": 0.9166667},
        0.3: {"a": 0.7333333, "b": 0.9166667},
        0.5: {"a": 0.7333333, "b": 0.75},
        0.7: {"a": 0.4666667, "b": 0.1666667},
    }
    for overlap, values in theirs.items():
        assert detection_precision(TRUE, FOUND, overlap) == pytest.approx(values, abs=1e-6)


def test_draws_of_videos_have_the_numbers_of_these_videos():
    rng = np.random.default_rng(0)
    scores = {v: kept(rng.random((100, 2)).astype(np.float32)) for v in TRUE}
    times = np.array([[1, 1, 1], [2, 0, 1], [0, 3, 0], [0, 0, 3]])
    drawn = detection_draws(TRUE, FOUND, times)
    of_frames = frame_draws(scores, TRUE, ["a", "b"], times)
    for i, row in enumerate(times[:3]):
        names = [f"{v}{n}" for v, count in zip(TRUE, row, strict=True) for n in range(count)]
        true, found, again = ({n: each[n[0]] for n in names} for each in (TRUE, FOUND, scores))
        expected, _ = detection_scores(true, found)
        assert {name: values[i] for name, values in drawn.items()} == pytest.approx(expected)
        exact = frame_precision(again, true, ["a", "b"])
        assert of_frames[i] == pytest.approx(np.mean(list(exact.values())), abs=0.005)
    assert np.isnan([drawn["map"][3], of_frames[3]]).all()  # nothing happens in this video


def test_numbers_of_perfect_and_of_no_events():
    perfect = {v: [(*e, 0.5) for e in events] for v, events in TRUE.items()}
    scores, each = detection_scores(TRUE, perfect)
    assert set(scores.values()) == {1.0} and each == {"a": 1, "b": 1}
    scores, each = detection_scores(TRUE, {v: [] for v in TRUE})
    assert scores["map"] == scores["f1_50"] == 0 and each == {"a": 0, "b": 0}


def test_events_without_overlap_have_the_scores_of_frames():
    truth = np.array([0, 0, 0, -1, 1, 1, -1, 0, 0, 0])
    predicted = np.array([0, 0, -1, -1, 1, 1, 1, 1, 0, 0])
    pieces = lambda frames: [
        (int(frames[a]), float(a), float(b)) for a, b in ((0, 3), (4, 6), (7, 10)) if frames[a] >= 0
    ]
    ours = [(0, 0.0, 2.0), (1, 4.0, 8.0), (0, 8.0, 10.0)]
    assert piece_scores([(pieces(truth), ours)]) == segment_scores([(truth, predicted)])


def kept(scores: np.ndarray, fps: float = 10) -> KeptScores:
    found = KeptScores(fps)
    for part in np.array_split(scores, 5):
        list(found.record([part]))
    return found


def test_scores_are_kept_as_they_came():
    scores = np.random.default_rng(0).random((999, 3)).astype(np.float32)
    found = kept(scores)
    assert np.array_equal(np.concatenate(list(found.parts(100))), scores)
    assert np.array_equal(found.column(1), scores[:, 1]) and (found.rows, found.width) == (999, 3)
    assert list(KeptScores(1).parts()) == [] and len(KeptScores(1).column(0)) == 0


def test_thresholds_are_those_that_find_most():
    rng = np.random.default_rng(0)
    true = {"v": [("a", 1.0, 3.0), ("a", 6.0, 7.0), ("b", 4.0, 8.0)]}
    scores = rng.random((100, 3)).astype(np.float32) * 0.1
    scores[10:30, 0] += 0.3
    scores[60:70, 0] += 0.3
    scores[40:80, 1] += 0.8
    scores[:5, 1] += 0.5
    chosen = choose_thresholds({"v": kept(scores)}, true, ["a", "b", "c"], 0)
    assert 0.1 < chosen[0] <= 0.3 and 0.6 < chosen[1] <= 0.8 and chosen[2] == np.median(chosen[:2])
    events = cut_events([scores], ["a", "b", "c"], chosen, 10, 0)
    assert [e[:3] for e in events] == sorted(true["v"], key=lambda e: e[1])
    assert frame_precision({"v": kept(scores)}, true, ["a", "b", "c"]) == {"a": 1.0, "b": 1.0}
    with pytest.raises(ValueError, match="no event"):
        choose_thresholds({"v": kept(scores)}, {"v": []}, ["a", "b", "c"], 0)


@pytest.mark.parametrize("seconds", [0.5, 10, 100, 4e3, 1e6])
def test_the_figure_ends_with_the_video(tmp_path, seconds):
    widths = []
    for end in (seconds / 2, seconds):
        path = tmp_path / "events.png"
        events_figure(path, [("v", seconds, [("a", 0.0, end, 1.0)], None)], "title")
        red, _, blue = np.asarray(Image.open(path).convert("RGB"), int).transpose(2, 0, 1)
        bar = (blue - red > 100).sum(1).max()  # the longest line of blue pixels
        widths.append(bar)
    assert widths[0] / widths[1] == pytest.approx(0.5, abs=0.02)


def test_figures_are_drawn_whatever_there_is(tmp_path):
    odd = ["$x_1$", "=a|b", "\x1b[2J", "walk" * 30]
    found = [(name, i, i + 1.5, 0.5) for i, name in enumerate(odd)]
    rows = [
        ("a.mp4", 9.0, found, [(odd[0], 0.0, 1.0)]),
        ("none.mp4", 0.04, [], None),
        ("b$.mp4", 3600.0, [], []),
    ]
    many = [(f"c{i}", 0.0, 1.0, 2.0) for i in range(40)]
    for i, shown in enumerate((rows, rows * 4, [("many", 1e7, many, None)])):
        events_figure(tmp_path / f"events{i}.png", shown, "a $title")
    lines = [
        Line(("a",), "", np.eye(3), 0.5, (0.4, 0.6), 0.5),
        Line(("b$",), "", np.eye(3), 0.5, (0.5, 0.5), 0.5),
        Line(("a", "b$"), "mean", np.eye(3), 1.0, (1.0, 1.0), 0.5, (0.1, 0.0, 0.2)),
    ]
    for num in (3, 90):
        rate = np.linspace(0, 1, num)
        rate[0] = np.nan  # a class without videos
        names = [f"$c_{i}" for i in range(num)]
        rates = {"a": rate, "b$": rate, "all": rate}
        fusion_figure(tmp_path / f"f{num}.png", lines, rates, names, "over 3 people", "$")
    assert {p.name for p in tmp_path.iterdir()} == {
        "events0.png", "events1.png", "events2.png", "f3.png", "f90.png",
    }  # fmt: skip


@pytest.mark.slow
def test_memory_is_flat_over_an_hour(tmp_path):
    """An hour takes no more than three minutes do, but for 16 MiB: a list of the packets' times."""
    peaks = []
    for minutes in (3, 60):
        path = tmp_path / f"{minutes}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            pictures = [
                av.VideoFrame.from_ndarray(p, "rgb24") for p in draw_motion("right", 0, 0, 64, 64)
            ]
            for i in range(minutes * 60 * 25):
                frame = pictures[i % 64]
                frame.pts, frame.time_base = i, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        began = time.monotonic()
        out = subprocess.run(
            [sys.executable, "-c", HOUR, str(path)], capture_output=True, text=True, check=True
        ).stdout.split()
        assert int(out[0]) == minutes * 1500
        peaks.append(np.array(out[1:], float))
        took = time.monotonic() - began
        print(f"{minutes} minutes: {out[1:]} MiB of this process and the decoder, {took:.0f} s")
    assert (peaks[1] < peaks[0] + 16).all()


HOUR = """
import resource, sys
import numpy as np, torch
from downstream.events import cut_events, smooth
from downstream.windows import window_scores
from pretrain.data.stream import Frames
rows = 0
def count(parts):
    global rows
    for part in parts:
        rows += len(part)
        yield part
def predict(window):
    level = window["rgb"].float().mean((1, 3, 4)) / 255
    return torch.stack([level] * 20, -1)
with Frames(sys.argv[1], None, 32) as frames:
    clips = ({"rgb": torch.from_numpy(c).permute(3, 0, 1, 2)} for c in frames.chunks())
    scores = smooth(count(window_scores(clips, 16, 2, 16, 8, predict)), 6)
    cut_events(scores, list("abcdefghijklmnopqrst"), np.full(20, .5), 25, .2)
own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(rows, own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""
