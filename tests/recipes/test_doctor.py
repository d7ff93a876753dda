"""`muybridge doctor`: what works, what does not, and the exit status."""

import http.server
import json
import socket
import threading
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import av
import pytest
from packaging.requirements import Requirement

from pretrain.data import codecs
from recipes import doctor
from tests.conftest import motion_rows, write_videos


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))


def look(**given) -> dict[str, doctor.Finding]:
    return {f"{f.area} {f.name}": f for f in doctor.look(doctor.Config(**given))}


def test_this_machine_works(capsys, monkeypatch):
    """What the suite runs on has what the basic commands need; nothing is sent."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network"))
    findings = doctor.main(doctor.Config(json=True))
    printed = json.loads(capsys.readouterr().out)
    assert [f["name"] for f in printed] == [f.name for f in findings]
    states = {f.name: f.state for f in findings}
    assert states["h264"] == states["cpu"] == states["torch"] == states["folder"] == "works"
    assert states["hub"] == "not tried"
    assert {"cores", "python", "hevc", "vp9", "av1", "mjpeg"} <= states.keys()
    for finding in findings:
        assert finding.said and (finding.remedy or finding.state != "does not work"), finding


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_a_codec_is_tried_with_a_clip(codec, monkeypatch):
    here = [name for name in codecs.CODECS[codec] if name in av.codecs_available]
    assert codecs.try_codec(codec)[0] is (True if here else None)
    with monkeypatch.context() as patch:
        patch.setattr(codecs, "tiny_clip", lambda *_: b"not a clip")
        assert codecs.try_codec(codec)[0] is False
    monkeypatch.setitem(codecs.CODECS, codec, {"no_such_encoder": {}})
    works, said = codecs.try_codec(codec)
    assert works is None and "no_such_encoder" in said


def test_other_frames_are_not_taken_for_the_clip(monkeypatch):
    monkeypatch.setattr(codecs, "moving_edge", lambda real=codecs.moving_edge: 255 - real())
    inverted = codecs.tiny_clip("h264", "libx264")
    monkeypatch.undo()
    monkeypatch.setattr(codecs, "tiny_clip", lambda *_: inverted)
    assert codecs.try_codec("h264")[0] is False


def test_only_what_the_basic_commands_need_ends_with_status_1(monkeypatch, capsys):
    real = codecs.tiny_clip

    def broken(codec, encoder):
        return b"not a clip" if codec == lost else real(codec, encoder)

    monkeypatch.setattr(codecs, "tiny_clip", broken)
    lost = "hevc"
    doctor.main(doctor.Config())
    assert "convert such files" in capsys.readouterr().out
    lost = "h264"
    with pytest.raises(SystemExit) as end:
        doctor.main(doctor.Config())
    *_, empty, last = capsys.readouterr().out.splitlines()
    assert end.value.code == 1 and last.startswith("needed") and "h264" in last and not empty


def test_a_package_is_held_against_its_bounds(monkeypatch):
    wanted = Requirement("some>=2.10,<3")
    fits = ("2.10.0+cpu", "2.11.0.dev1")
    for found in (*fits, "2.9", "3.0", "", None):
        state = "works" if found in fits else "does not work"
        monkeypatch.setattr(doctor, "version", lambda _, found=found: found)
        finding = doctor.find_package(wanted, "environment", True)
        assert finding.state == state and ("some" in finding.remedy) == (state != "works"), found

    def nowhere(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", nowhere)
    assert "not installed" in doctor.find_package(wanted, "environment", True).said
    monkeypatch.setattr(
        doctor, "requires", lambda _: ["a", "b; extra == 'x'", "c; python_version<'3'"]
    )
    assert [r.name for r in doctor.requirements()] == ["a"]
    assert [r.name for r in doctor.requirements("x")] == ["b"]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "file" / "cache"))
    (finding,) = doctor.look_at_cache()
    assert finding.state == "does not work" and finding.needed
    assert "MUYBRIDGE_CACHE" in finding.remedy and "file" in finding.said


@pytest.mark.parametrize("server", ["http://a:b", "http://a b", "https://", "http://[::1", "chat"])
def test_a_broken_address_of_the_hub_is_told(monkeypatch, server):
    """Also one behind which no web server answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if server == "chat":
            say = lambda: listener.accept()[0].sendall(b"hello\n")
            threading.Thread(target=say, daemon=True).start()
            server = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setenv("HF_ENDPOINT", server)
        found = doctor.look_at_network()
    assert found.state == "does not work" and server in found.said


def test_every_extra_is_explained():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert {*project["optional-dependencies"]} == {*doctor.EXTRAS}


def test_the_network_gets_one_request_if_asked(monkeypatch):
    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.command)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert doctor.look_at_network().state == "works"
        server.shutdown()
    assert asked == ["HEAD"]
    assert doctor.look_at_network().state == "does not work"
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc/passwd")
    assert "HF_ENDPOINT" in doctor.look_at_network().said


def test_data_are_described_and_not_packed(tmp_path, tiny_pack, monkeypatch):
    rows = motion_rows(range(2), 1, "train") + motion_rows(range(2, 3), 1, "test")
    folder = tmp_path / "videos"
    folder.mkdir()
    listed = write_videos(folder, rows)
    (folder / "broken.csv").write_text("path,label\nnot_there.mp4,a\n")
    before = sorted(tmp_path.rglob("*"))
    found = doctor.look_at_data(str(listed))
    assert found.state == "works" and f"{len(rows)} video" in found.said, found
    assert "train" in found.said and "test" in found.said and "3 subjects" in found.said
    assert "12 of 12 videos were read, all are whole" in found.said
    (folder / "text.mp4").write_text("not a video")
    before = sorted(tmp_path.rglob("*"))
    found = doctor.look_at_data(str(folder))
    assert "13 of 13 videos were read, 1 cannot be used: text.mp4: not a video" in found.said
    monkeypatch.setattr(doctor, "MOST_OPENED", 5)
    assert "containers of 5 of 13 videos" in doctor.look_at_data(str(folder)).said
    found = doctor.look_at_data(str(folder / "broken.csv"))
    assert found.state == "does not work" and "not_there.mp4" in found.said and found.needed
    assert doctor.look_at_data(str(tmp_path / "nowhere")).state == "does not work"
    assert "pack of" in doctor.look_at_data(str(tiny_pack)).said
    assert "36 clips" in doctor.look_at_data("synthetic:36").said
    assert doctor.look_at_data("s3://bucket/pack").state == "not tried"
    for odd in ("synthetic:none", "s3://user:secret@bucket/pack"):
        assert doctor.look_at_data(odd).state == "does not work"
        assert "secret" not in doctor.look_at_data(odd).said
    assert sorted(tmp_path.rglob("*")) == before


def test_hostile_names_stay_in_their_line(tmp_path, capsys):
    folder = tmp_path / "evil\n\x1b[2J"
    folder.mkdir()
    (folder / "a\x1b[1A.flv").write_bytes(b"FLV\x01")
    (folder / "b\x1b[1A.mp4").write_bytes(b"\0")
    with pytest.raises(SystemExit):
        doctor.main(doctor.Config(data=str(folder / "\x1b[31mnone")))
    doctor.main(doctor.Config(data=str(folder)))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "muybridge look" in printed.splitlines()[-1]
