"""`muybridge runs`: what it lists and compares, and folders that somebody else made."""

import errno
import json
import os

import numpy as np
import pytest

from downstream.fusion import Scored, scores_csv, write_scores
from downstream.report import write_results
from downstream.results import Data, Metric, Model, Results
from pretrain.folders import claim
from recipes import runs, videomae
from tests.recipes import test_videomae

VIDEOS = 40


def train(folder, step=20, done=True, **settings):
    """A folder as a training run leaves it."""
    folder.mkdir(parents=True)
    config = {"data": "mine", "preset": "tiny", "model": "vit_xs", "steps": 20} | settings
    about = {"config": config, "data_fingerprint": "a" * 64, "num_clips": 100}
    (folder / "config.json").write_text(json.dumps(about))
    lines = [{"step": 10, "loss": 0.9, "knn": 0.5, "knn_clips": 40}, {"step": step, "loss": 0.25}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done:
        (folder / "backbone").mkdir()
        (folder / "backbone" / "config.json").write_text("{}")
    return folder


def evaluate(folder, right, name="video", kind="probe"):
    """A folder as a linear probe leaves it that is right in the first `right` videos."""
    folder.mkdir(parents=True)
    metrics = {"top1": Metric(right / VIDEOS, VIDEOS, (0.1, 0.9), 0.5)}
    data = Data("mine", "b" * 64, "test", VIDEOS, VIDEOS, 2)
    model = Model("backbone", "c" * 64, 3, {}, "unknown")
    results = Results("linear_probe", data, model, {"kind": kind}, {}, metrics, 0, "command", {})
    truth = [i % 2 for i in range(VIDEOS)]
    said = [t if i < right else 1 - t for i, t in enumerate(truth)]
    sources = [f"{name} {i}" for i in range(VIDEOS)]
    people = [f"person {i // 2}" for i in range(VIDEOS)]
    scored = Scored(sources, people, ["ab"[t] for t in truth], np.eye(2)[said] * 0.8 + 0.1)
    write_scores(folder, scores_csv({"test": scored}, ["a", "b"], results))
    write_results(folder, results)
    return folder


def listed(top, **given) -> dict[str, dict]:
    rows = runs.main(runs.Config(str(top), json=True, **given))
    return {row["run"]: row for row in rows}


def test_runs_are_listed_with_state_loss_and_score(tmp_path, capsys):
    train(tmp_path / "done")
    evaluate(tmp_path / "done" / "probe-mine", 30)
    evaluate(tmp_path / "done" / "probe-other", 10)
    train(tmp_path / "stopped", step=12, done=False, steps=None, epochs=4, batch_size=20)
    lock = claim(train(tmp_path / "deep" / "er" / "going", done=False))
    evaluate(tmp_path / "alone", 20)
    for name in ("done/report.html", "done/probe-mine/report.html"):
        (tmp_path / name).write_text("<!doctype html>")
    found = listed(tmp_path)
    assert found["done"]["report"] == "report.html, probe-mine/report.html"
    assert found["stopped"]["report"] == ""
    assert [*found] == ["alone", "deep/er/going", "done", "stopped"]
    assert {n: r["state"] for n, r in found.items()} == {
        "done": "finished", "stopped": "interrupted", "deep/er/going": "running",
        "alone": "evaluated",
    }  # fmt: skip
    assert found["done"]["steps"] == "20/20" and found["stopped"]["steps"] == "12/20"
    assert found["done"]["loss"] == "0.25" and found["done"]["data"] == "mine"
    assert "75.0 % (10.0 to 90.0)" in found["done"]["score"]
    assert "kNN 50.0 % of 40 clips" in found["stopped"]["score"]
    lock.release()
    assert listed(tmp_path)["deep/er/going"]["state"] == "interrupted"
    capsys.readouterr()
    runs.main(runs.Config(str(tmp_path)))
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 5 and "finished" in table[3]
    with pytest.raises(ValueError, match="no folder of runs"):
        listed(tmp_path / "nowhere")


def test_where_locks_do_not_tell_nothing_is_said_to_run(tmp_path, monkeypatch):
    """As on NFS, where a lock of a file that is only read is refused."""
    fcntl = pytest.importorskip("fcntl")
    lock = claim(train(tmp_path / "going", done=False))
    train(tmp_path / "done")
    (tmp_path / "done" / ".lock").touch()

    def refuse(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert {n: r["state"] for n, r in listed(tmp_path).items()} == {
        "going": "unknown", "done": "finished",
    }  # fmt: skip
    monkeypatch.undo()
    lock.release(force=True)


def test_a_real_run_is_read(tiny_pack, tmp_path):
    videomae.main(test_videomae.config(tiny_pack, tmp_path / "mine", steps=2))
    row = listed(tmp_path)["mine"]
    assert row["state"] == "finished" and row["steps"] == "2/2" and float(row["loss"]) > 0
    assert row["score"].startswith("kNN") and str(tiny_pack) in row["data"]


@pytest.mark.parametrize(
    "right, words", [((36, 12), "the first is better"), ((20, 20), "not shown which is better")]
)
def test_two_runs_are_compared(tmp_path, capsys, right, words):
    folders = [train(tmp_path / n, seed=i, given=[n]) for i, n in enumerate(("one", "two"))]
    for folder, good in zip(folders, right, strict=True):
        evaluate(folder / "probe-mine", good)
    evaluate(folders[0] / "probe-other", 10, kind="another protocol")
    rows = runs.main(runs.Config(compare=(str(folders[0]), str(folders[1]))))
    assert rows == [{"setting": "seed", "first": "0", "second": "1"}]
    said = capsys.readouterr().out
    assert words in said and said.count("first minus second") == 1
    assert f"{100 * (right[0] - right[1]) / VIDEOS:+.1f} points" in said


def test_other_videos_are_no_pair(tmp_path, capsys):
    ours, theirs = evaluate(tmp_path / "a", 30), evaluate(tmp_path / "b", 30, "other")
    runs.main(runs.Config(compare=(str(ours), str(theirs))))
    assert "no paired difference" in capsys.readouterr().out
    (theirs / "scores.csv").unlink()
    runs.main(runs.Config(compare=(str(ours), str(theirs))))
    assert "scores.csv" in capsys.readouterr().out
    with pytest.raises(ValueError, match="neither a run"):
        runs.main(runs.Config(compare=(str(ours), str(tmp_path))))
    with pytest.raises(ValueError, match="no run at"):
        runs.main(runs.Config(compare=(str(ours), str(tmp_path / "none"))))


def test_hostile_folders_are_named_and_end_nothing(tmp_path, capsys):
    good = train(tmp_path / "a good one")
    for i, content in enumerate((b"\0" * 99, b"[" * 10**5, b"[]", b"9" * 10**5, b'{"a": ')):
        train(tmp_path / f"broken {i}")
        (tmp_path / f"broken {i}" / "config.json").write_bytes(content)
    evil = train(tmp_path / "\x1b[2J\n$(rm)", data=["\x1b[31m", {"a": 1}], model=10**400, steps="x")
    (evil / "log.jsonl").write_bytes(
        b'{"step": 1e400}\n{"step": 3, "loss": "x", "knn": [], "knn_clips": 1e999}\nnot json\n'
    )
    (evil / "results.json").write_text('{"format": "muybridge-results-1"}')
    if hasattr(os, "mkfifo"):
        pipe = train(tmp_path / "pipe")
        (pipe / "log.jsonl").unlink()
        os.mkfifo(pipe / "log.jsonl")
        os.mkfifo(pipe / ".lock")
    (tmp_path / "loop").symlink_to(tmp_path)
    kept = tmp_path / "kept"
    kept.write_text("mine")
    (good / ".lock").symlink_to(kept)
    with open(good / "log.jsonl", "ab") as file:  # 100 GB, of nothing
        file.truncate(10**11)
        file.seek(0, 2)
        file.write(b'\n{"step": 20, "loss": 0.5}\n')
    runs.main(runs.Config(str(tmp_path)))
    said = capsys.readouterr().out
    assert "\x1b" not in said and kept.read_text() == "mine"
    row = next(line for line in said.splitlines() if line.startswith("a good one"))
    assert "finished" in row and "20/20" in row and "0.5" in row
    for i in range(5):
        assert f"broken {i}" in said
    assert r"\x1b[2J\x0a$(rm)" in said and said.count("loop") == 0
    runs.main(runs.Config(compare=(str(good), str(evil))))
    assert "\x1b" not in capsys.readouterr().out


def test_only_so_many_folders_are_looked_into(tmp_path, capsys):
    for i in range(30):
        train(tmp_path / f"run {i:02}")
    assert len(listed(tmp_path, most=11)) == 10
    assert "11 folders" in capsys.readouterr().out
    deep = tmp_path
    for _ in range(50):
        deep = deep / "d"
    train(deep)
    assert len(listed(tmp_path)) == 30
