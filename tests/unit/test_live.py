"""Cameras: what may be opened, their clock, windows on the newest frames, and what is lost."""

import base64
import contextlib
import csv
import json
import math
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from downstream.classifier import Classifier
from downstream.live import Watched, stretch_scores
from downstream.models import build_model
from downstream.windows import window_scores
from pretrain.backbones import export_backbone
from pretrain.data import live
from pretrain.data.live import Camera, Newest, Source, live_source
from recipes import predict
from tests.conftest import draw_motion, write_video
from tests.recipes.runs import ROOT, configure

SECRETS = ("hunter2", "admin", "topsecret")
CLOCK = Source(
    "a test card", "lavfi", "testsrc=size=64x48:rate=20,realtime", {}
)  # a device that shows moving bars, as fast as a camera would


# ---- what may be opened


@pytest.mark.parametrize(
    "text",
    [
        "http://admin:hunter2@host/a.mp4", "https://host/a", "file:/etc/passwd", "pipe:0",
        "concat:a.mp4|b.mp4", "rtmp://host/a", "udp://host:1", "RTSPS://host/a", "rtsp:host/a",
        "rtsp://", "rtsp:///path", "rtsp://:8554/a", "rtsp://admin:hunter2@host:99999/a",
        "rtsp://admin:hunter2@host:x/a", "rtsp://admin:hunter2@host/a b", "rtsp://h/a|b",
        "rtsp://host/a?tcp", "rtsp://host/a?x=1&UDP", "rtsp://host/a#b", "rtsp://host/\x1b[2J",
        "rtsp://[::1/a", "webcam:7999",
    ],
)  # fmt: skip
def test_other_addresses_are_refused_and_no_secret_is_repeated(text):
    with pytest.raises(ValueError, match="--video") as refused:
        live_source(text)
    assert not any(secret in str(refused.value) for secret in SECRETS)
    assert str(refused.value).isprintable()


def test_a_camera_is_called_without_its_secrets():
    text = "rtsp://admin:hun:t@er2@Host:8554/live?channel=1&pw=topsecret"
    source = live_source(text)
    assert source.name == "rtsp://host:8554" and source.address == text
    assert not any(secret in repr(source) for secret in ("hun", "admin", "topsecret"))
    assert live_source("rtsp://[::1]/a").name == "rtsp://[::1]"


def test_files_are_no_cameras(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b.mp4").touch()
    (tmp_path / "webcam").touch()
    assert live_source("a:b.mp4") is None and live_source("C:\\videos") is None
    with pytest.raises(ValueError, match=r"\./webcam"):
        live_source("webcam")
    assert live_source("./webcam") is None


def test_webcams_by_platform(monkeypatch):
    monkeypatch.setattr(live.sys, "platform", "darwin")
    assert (live_source("webcam:1").format, live_source("webcam").address) == (
        "avfoundation", "0:none",
    )  # fmt: skip
    monkeypatch.setattr(live.sys, "platform", "win32")
    about = type("Device", (), {"name": "Cam", "media_types": ["video"]})
    sound = type("Device", (), {"name": "Mic", "media_types": ["audio"]})
    monkeypatch.setattr(live.av.device, "enumerate_input_devices", lambda _: [sound, about])
    assert live_source("webcam").address == "video=Cam"
    with pytest.raises(ValueError, match="1 camera"):
        live_source("webcam:1")
    monkeypatch.setattr(live.sys, "platform", "linux")
    monkeypatch.setattr(live.os.path, "exists", lambda path: path == "/dev/video3")
    assert live_source("webcam:3").address == "/dev/video3"
    with pytest.raises(ValueError, match="no camera /dev/video0"):
        live_source("webcam")


@pytest.mark.parametrize(
    "source", [Source("closed", "v4l2", "/dev/null"), Source("shut", "rtsp", "rtsp://127.0.0.1:9/")]
)
def test_a_camera_that_is_closed_is_refused(source):
    begun = time.monotonic()
    with pytest.raises(ValueError, match=f"{source.name} cannot be opened"):
        Camera(source, 32, lambda _: 8, timeout=5)
    assert time.monotonic() - begun < 20


def test_a_camera_that_says_nothing_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        begun = time.monotonic()
        with pytest.raises(ValueError, match=f"rtsp://127.0.0.1:{port} cannot be opened"):
            Camera(live_source(f"rtsp://a:b@127.0.0.1:{port}/x"), 32, lambda _: 8, timeout=1)
        assert time.monotonic() - begun < 6


# ---- the clock


class Shown(Newest):
    """Frames of 2x2 at given seconds; each has ten times its second as its grey."""

    def __init__(self, fps: int = 10, room: int = 8):
        super().__init__(Fraction(fps), room)

    def show(self, *times: float, now: float | None = None) -> "Shown":
        for at in times:
            self.take(at, grey(round(10 * at) % 256), at if now is None else now)
        return self

    def kept(self, stretch: int = 0) -> tuple[int, list[int]]:
        first, frames, _ = self.up_to(0, stretch)
        return first, [int(f[0, 0, 0]) for f in frames]


def grey(level: int) -> np.ndarray:
    return np.full((2, 2, 3), level, np.uint8)


def test_frames_go_to_their_ticks():
    assert Shown().show(0, 0.11, 0.19, 0.3).kept() == (0, [0, 1, 2, 3])
    assert Shown().show(0, 0.1, 0.5).kept() == (0, [0, 1, 1, 1, 1, 5])  # two are late
    assert Shown().show(0, 0.1, 0.12).kept() == (0, [0, 1])  # two on a tick: the last
    camera = Shown(room=3).show(*np.arange(0, 2, 0.1))
    assert camera.kept() == (17, [17, 18, 19])  # no more than there is room for
    assert camera.show(5).kept(1) == (50, [50]) and camera.stretch(0) == 1
    assert camera.kept(0) == (17, [17, 18, 19]) and camera.up_to(99, 0)[2]  # the one before
    assert camera.stretch(-1) == 0
    camera.take(5.1, np.zeros((4, 4, 3), np.uint8), 5.1)  # of another size
    assert camera.kept(2) == (51, [0])
    camera.over = True
    assert camera.stretch(2) is None


def test_a_camera_without_a_clock_goes_by_ours_and_of_a_burst_there_is_the_newest():
    camera = Shown()
    for i in range(3):
        camera.take(math.nan, grey(i), i / 10)
    assert camera.kept() == (0, [0, 1, 2])
    burst = Shown().show(100, 100.1, 100.2, 100.3, now=5.0)  # what a camera had kept for us
    assert burst.kept() == (50, [1003 % 256])
    # One that is late by less than a second keeps its place; by more the clock is set anew.
    assert burst.show(100.4, now=5.1).show(100.5, now=5.95).kept() == (50, [235, 236, 237])
    assert burst.show(100.6, now=7.3).kept(1) == (73, [1006 % 256])


# ---- windows


def by_mean(pictures: np.ndarray) -> np.ndarray:
    value = pictures.reshape(len(pictures), -1).mean(1) / 255
    return np.stack([value, 1 - value], 1)


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("count", [3, 16, 40, 51])
def test_scores_are_those_of_a_file_where_the_model_is_fast(per_frame, count):
    frames, stride, hop = 8, 2, 4
    values = np.random.default_rng(count).integers(0, 255, count).astype(np.uint8)
    score = lambda p: by_mean(p) if per_frame else by_mean(p).mean(0)

    class Asked(Shown):
        """Shows a frame whenever one is waited for."""

        def up_to(self, end: int, stretch: int):
            for i in shown:
                self.take(i / 10, grey(values[i]), i / 10)
                if i + 1 >= end:
                    return super().up_to(end, stretch)
            self.over = True
            return super().up_to(end, stretch)

    shown, watched = iter(range(count)), Watched()
    newest = Asked(room=frames * stride + hop)
    parts = [*stretch_scores(newest, 0, 0, frames, stride, hop, score, watched)]

    def of_windows(windows):
        clips = windows["rgb"].permute(0, 2, 3, 4, 1).numpy()
        return torch.from_numpy(np.stack([score(clip) for clip in clips]))

    film = torch.from_numpy(np.broadcast_to(values[None, :, None, None], (3, count, 2, 2)).copy())
    whole = np.concatenate([*window_scores([{"rgb": film}], frames, stride, hop, 4, of_windows)])
    assert np.allclose(np.concatenate(parts), whole) and watched.ticks == count
    assert not watched.dropped


def test_a_stretch_that_is_gone_before_it_is_looked_at():
    newest = Shown().show(0, 0.1, 5, 9)  # three stretches, of which the last two are kept
    score = lambda pictures: by_mean(pictures).mean(0)
    for stretch, count in ((0, 0), (1, 1)):
        begin = newest.up_to(0, stretch)[0]
        rows = [*stretch_scores(newest, stretch, begin, 2, 1, 1, score, Watched())]
        assert sum(map(len, rows)) == count


def test_a_slow_model_sees_the_newest_frames_and_counts_what_it_missed():
    camera = Shown(fps=100, room=20)
    going = threading.Event()

    def film():
        begun = time.monotonic()
        while not going.is_set():
            now = time.monotonic() - begun
            camera.take(now, grey(1), now)
            time.sleep(0.005)
        camera.over = True

    def slow(pictures):
        time.sleep(0.2)  # 20 ticks, of which a window shows 8
        return by_mean(pictures).mean(0)

    thread = threading.Thread(target=film)
    thread.start()
    threading.Timer(1.5, going.set).start()
    watched = Watched()
    rows = sum(
        len(p) for p in stretch_scores(camera, camera.stretch(-1), 0, 8, 1, 4, slow, watched)
    )
    thread.join()
    assert watched.ticks == rows and 0.3 < watched.dropped / rows < 0.8
    assert 3 <= watched.windows <= 10 and rows > 100  # it kept up, at the end too


# ---- all of it


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier") / "backbone"
    model = Classifier(build_model("i3d", True, width=0.1, frames=8, size=32), ["a", "=b"])
    model.head.bias.data[:] = torch.tensor([2.0, 0.0])
    export_backbone(model, folder, {})
    return folder


def run(backbone: Path, out: Path, source: Source, monkeypatch, **flags) -> dict:
    monkeypatch.setattr(predict, "live_source", lambda _: source)
    wanted = configure(
        predict.Config, str(backbone), ("webcam",), out=str(out), num_workers=0, **flags
    )
    return predict.main(wanted)


def test_a_camera_gives_bouts_until_it_is_to_stop(backbone, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    content = run(backbone, out, CLOCK, monkeypatch, seconds=2.5)
    (bout,) = content["bouts"]
    assert bout["label"] == "a" and 1 < bout["end"] - bout["start"] < 3 and bout["score"] > 0.5
    assert content["frames"] > 20 and not content["lost"] and 2 < content["seconds"] < 8
    with open(out / "bouts.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["source"] == "a test card" and float(row["end"]) == bout["end"]
    lasted = [np.datetime64(row[name].split("+")[0]) for name in ("started", "ended")]
    seconds = (lasted[1] - lasted[0]) / np.timedelta64(1, "s")
    assert seconds == pytest.approx(bout["end"] - bout["start"], abs=0.002)
    assert json.loads((out / "bouts.json").read_text())["bouts"] == content["bouts"]
    assert "watching" in capsys.readouterr().out
    run(backbone, tmp_path / "none", CLOCK, monkeypatch, seconds=0.5, threshold=1.0)
    assert "no event: the highest score" in capsys.readouterr().out
    with pytest.raises(ValueError, match="bouts of a camera"):  # they are nowhere else
        run(backbone, out, CLOCK, monkeypatch, seconds=1.0)


def test_a_camera_that_ends_is_looked_for_and_given_up(backbone, tmp_path, monkeypatch, capsys):
    short = Source("a short card", "lavfi", "testsrc=size=64x48:rate=20:duration=1,realtime")
    opened = predict.open_camera
    monkeypatch.setattr(predict, "open_camera", lambda *given: opened(*given, again=(0.2,)))
    worker, tries = live.Worker, iter([{}, {"format": "v4l2", "address": "/dev/null"}])
    monkeypatch.setattr(live, "Worker", lambda c, job, t: worker(c, job | next(tries), t))
    content = run(backbone, tmp_path / "out", short, monkeypatch)
    assert content["bouts"] and "stream ended" in content["lost"][0]
    assert "not found again" in content["given_up"]
    assert "was lost at" in capsys.readouterr().out


class Rtsp(socketserver.BaseRequestHandler):
    """An RTSP camera of one visitor at a time: H.264 in RTP, interleaved, behind a password."""

    def handle(self):
        packets = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        packets.bind(("127.0.0.1", 0))
        packets.settimeout(0.2)
        port, asked = packets.getsockname()[1], self.request.makefile("rb")
        end = time.monotonic() + self.server.seconds
        while line := asked.readline():
            kind, headers = line.split()[0].decode(), {}
            while line := asked.readline().strip():
                name, _, value = line.decode().partition(": ")
                headers[name.lower()] = value
            more, body, code = "", "", "200 OK"
            if kind == "DESCRIBE" and headers.get("authorization") != self.server.expected:
                code, more = "401 Unauthorized", 'WWW-Authenticate: Basic realm="camera"\r\n'
            elif kind == "DESCRIBE":
                body = ("v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nt=0 0\r\n"
                        "m=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n"
                        "a=fmtp:96 packetization-mode=1\r\n"
                        "a=framerate:20\r\na=control:trackID=0\r\n")  # fmt: skip
                more = f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n"
            elif kind == "SETUP":
                more = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n"
            answer = f"RTSP/1.0 {code}\r\nCSeq: {headers['cseq']}\r\n{more}\r\n{body}"
            self.request.sendall(answer.encode())
            if kind == "PLAY":
                break
        else:
            return
        card = threading.Thread(target=self.film, args=(port, end), daemon=True)
        card.start()
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                data = packets.recv(65536)
                try:
                    self.request.sendall(b"$\0" + len(data).to_bytes(2, "big") + data)
                except OSError:
                    break
        card.join(5)

    def film(self, port: int, end: float) -> None:
        url = f"rtp://127.0.0.1:{port}?pkt_size=1200"
        with av.open(url, "w", format="rtp") as out:
            stream = out.add_stream("libx264", rate=20)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.options = {"preset": "ultrafast", "tune": "zerolatency", "g": "10"}
            for number in range(1000):
                if time.monotonic() > end:
                    return
                picture = np.full((48, 64, 3), 2 * number % 256, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, "rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 20)
                out.mux(stream.encode(frame))
                time.sleep(0.05)


@pytest.fixture
def rtsp():
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Rtsp)
    server.daemon_threads, server.seconds = True, 2.0
    server.expected = "Basic " + base64.b64encode(b"admin:hunter2").decode()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_rtsp_camera_is_found_again_and_its_password_is_nowhere(
    rtsp, backbone, tmp_path, capfd, monkeypatch
):
    where = f"127.0.0.1:{rtsp.server_address[1]}"
    out = tmp_path / "out"
    opened = predict.open_camera

    def open_camera(*given):
        camera = opened(*given, again=(0.2,))

        def stop_after_two_bouts():
            while not camera.newest.over and (out / "bouts.csv").read_text().count("\n") < 3:
                time.sleep(0.1)
            camera.stop()

        timer = threading.Timer(1.0, stop_after_two_bouts)
        timer.daemon = True
        timer.start()
        return camera

    monkeypatch.setattr(predict, "open_camera", open_camera)
    flags = {"out": str(out), "num_workers": 0, "seconds": 60.0, "shortest": 0.2}
    address = f"rtsp://admin:hunter2@{where}/live?pw=topsecret"
    content = predict.main(configure(predict.Config, str(backbone), (address,), **flags))
    assert len(content["lost"]) >= 1 and not content["given_up"] and len(content["bouts"]) >= 2
    assert content["bouts"][1]["start"] > content["bouts"][0]["end"] + 0.1
    assert all(b["source"] == f"rtsp://{where}" for b in content["bouts"])
    wrong = f"rtsp://admin:topsecret@{where}/live"
    flags["out"] = str(tmp_path / "wrong")
    with pytest.raises(ValueError, match=f"{where} cannot be opened: .*401") as refused:
        predict.main(configure(predict.Config, str(backbone), (wrong,), **flags))
    said = "".join((*capfd.readouterr(), str(refused.value)))
    files = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert not any(secret in said + files for secret in SECRETS)


@pytest.mark.slow
def test_ctrl_c_leaves_whole_files(backbone, tmp_path):
    out = tmp_path / "out"
    script = (
        "import sys\nfrom pretrain.data.live import Source\nfrom recipes import predict\n"
        f"predict.live_source = lambda _: Source(*{(CLOCK.name, CLOCK.format, CLOCK.address)!r})\n"
        "from recipes.options.predict import command\ncommand(predict.main)\n"
    )
    words = ["--backbone", str(backbone), "--video", "rtsp://host/", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words, "--num-workers", "0"], cwd=ROOT,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if "Ctrl-C" in line:
            break
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "1 bout" in rest, rest
    content = json.loads((out / "bouts.json").read_text())
    (row,) = csv.DictReader((out / "bouts.csv").open(newline=""))
    assert float(row["end"]) == content["bouts"][0]["end"] > 1


def test_bouts_of_files_are_those_of_detect(backbone, tmp_path, capsys):
    write_video(tmp_path / "a.mp4", draw_motion("right", 0, 0, 64, 32))
    (tmp_path / "text.mp4").write_text("not a film at all, but a text")
    given = {"out": str(tmp_path / "out"), "num_workers": 0, "bouts": True}
    content = predict.main(configure(predict.Config, str(backbone), (str(tmp_path),), **given))
    assert {(b["source"], b["label"], b["start"], b["end"]) for b in content["bouts"]} == {
        ("a.mp4", "a", 0.0, 4.0)
    }
    assert "text" in json.loads((tmp_path / "out" / "refused.json").read_text())["text.mp4"]
    rows = (tmp_path / "out" / "bouts.csv").read_text().splitlines()
    assert rows[0] == "source,start,end,label,score" and len(rows) == 2
    with pytest.raises(ValueError, match="not a video: text"):
        predict.main(
            configure(predict.Config, str(backbone), (str(tmp_path / "text.mp4"),), **given)
        )
