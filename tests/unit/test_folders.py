"""Folders: whose they are, one writer at a time, and refusals in words."""

import errno
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from pretrain.data import progress
from pretrain.files import read_json
from pretrain.folders import claim, holds_nothing, try_folder
from pretrain.log import RunLog, write_json
from tests.conftest import SYNC

# Takes a folder and forks a process that outlives it. The child says when both are there: by then
# it has closed its copy of the lock; the parent might say so before the child has run at all.
HOLDER = """
import os, sys
from pathlib import Path
from pretrain.folders import claim
lock = claim(Path(sys.argv[1]))
if os.fork() == 0:
    print("mine", flush=True)
    os.close(1); os.close(2)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("names", "nothing"),
    [
        ([], True),
        (["tmp-config.json", ".lock", ".DS_Store"], True),
        (["thesis.txt"], False),
        ([".lock", "thesis.txt"], False),
        ([".git"], False),
    ],
)
def test_what_is_nothing(tmp_path, names, nothing):
    assert holds_nothing(tmp_path / "missing")
    for name in names:
        (tmp_path / name).touch()
        assert not holds_nothing(tmp_path / name)  # a file is something
    assert holds_nothing(tmp_path) == nothing


def test_one_writer_at_a_time_and_no_lock_outlives_sigkill(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match=r"in use"):
            claim(folder)
        holder.kill()
        holder.wait()
        lock = claim(folder)  # though a child of the killed one lives on
        claim(folder)  # the same process is no other
        lock.release(force=True)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


CLAIMS = """
import sys
from pathlib import Path
from pretrain.folders import claim
lock = claim(Path(sys.argv[1]))
if sys.argv[2]:
    (Path(sys.argv[1]) / "result").touch()
raise ValueError("refused")
"""


@pytest.mark.parametrize(("made", "there", "left"), [("", 0, 0), ("result", 0, 1), ("", 1, 1)])
def test_a_refusal_leaves_no_folder_that_was_made_for_it(tmp_path, made, there, left):
    folder = tmp_path / "out"
    if there:  # somebody made it
        folder.mkdir()
    command = [sys.executable, "-c", CLAIMS, str(folder), made]
    assert "refused" in subprocess.run(command, capture_output=True, text=True).stderr
    assert folder.exists() == left and (folder / "result").exists() == bool(made)


def test_what_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"cannot write .*file"):
            claim(folder)
    if Path("/proc/self").exists():
        with pytest.raises(ValueError, match="cannot write /proc"):
            claim(Path("/proc/run"))


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("there", "there/new", "a/b/c"):
        try_folder(tmp_path / name)
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_disk_without_locks_is_said(tmp_path, monkeypatch, capsys, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = claim(tmp_path / "run")
    assert "without locks" in capsys.readouterr().err
    lock.release(force=True)


def test_json_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    real_sync, real_replace = SYNC, os.replace
    paths = lambda handle: os.readlink(f"/proc/self/fd/{handle}")
    monkeypatch.setattr(os, "fsync", lambda h: (events.append(paths(h)), real_sync(h)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("->"), real_replace(a, b)))
    write_json(tmp_path / "config.json", {"a": 1})
    assert events == [str(tmp_path / "tmp-config.json"), "->", str(tmp_path)]
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"1", b"\0" * 50, b'{"step": ' + b"9" * 5000 + b"}", b"[" * 100_000,
     b"\xff{}"],
)  # fmt: skip
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.json"):
        read_json(tmp_path / "state.json")


def test_a_short_file_takes_little_memory(tmp_path):
    (tmp_path / "state.json").write_text('{"a": NaN}')
    tracemalloc.start()
    try:
        assert math.isnan(read_json(tmp_path / "state.json")["a"])
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/full", "."])
def test_what_is_no_file_is_not_read(tmp_path, target):
    (tmp_path / "state.json").symlink_to(target)
    with pytest.raises(ValueError, match=r"state\.json"):
        read_json(tmp_path / "state.json")


def test_damaged_lines_of_a_log_are_dropped_and_counted(tmp_path, capsys):
    good = [json.dumps({"step": s, "loss": float("nan") if s == 2 else 0.5}) for s in (1, 2, 3, 9)]
    bad = ["", '{"step": 4, "lo', "\0" * 20, "[4]", '{"loss": 1}', '{"step": "4"}', "null",
           '{"step": 4, "loss": {}}', '{"step": ' + "9" * 5000 + "}", "[" * 50_000]  # fmt: skip
    lines = [x for pair in zip(good, bad, strict=False) for x in pair] + bad[len(good) :]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    log = RunLog(tmp_path, 3)
    assert f"{len(bad)} damaged lines" in capsys.readouterr().err
    log.write(4, {"loss": 0.25})
    left = [json.loads(x)["step"] for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert left == [1, 2, 3, 4]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_full_disk_while_logging_is_said(tmp_path):
    log = RunLog(tmp_path, 0)
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"cannot write .*log\.jsonl: No space left.*intact"):
        log.write(1, {"loss": 0.5})


def test_a_full_disk_keeps_the_older_json(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"a": 1})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot write .*a\.json: No space left"):
        write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_a_file_gets_lines_and_not_the_movements_of_a_bar(capsys, monkeypatch):
    with progress.Bar(1000, "videos", "clip") as bar:
        for _ in range(1000):
            bar.say(about="step 1/2")
            bar.update()
    said = capsys.readouterr().err
    assert said.splitlines() == ["videos: 1000/1000 clips, step 1/2"] and "\r" not in said
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.Bar(3, "runs", "run") as bar:
        bar.say("first")
        bar.say(about="step 1/2")
        bar.write("failed: second")
        bar.update()
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == ["first: 0/3 runs", "first: 0/3 runs, step 1/2", "failed: second"]
    with progress.Bar(3, "", "clip", shown=False) as bar:
        bar.update(3)
    assert not capsys.readouterr().err
