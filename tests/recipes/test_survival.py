"""Kills, damage and disks outside the save: the same command goes on, or says in words why not."""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from downstream.models import load_backbone
from pretrain import checkpoint, log, weights
from pretrain.folders import claim
from recipes import videomae
from tests.recipes.runs import (
    BESIDE,
    ROOT,
    change,
    equal,
    final_weights,
    launch,
    stop_in_step,
)
from tests.recipes.test_videomae import config


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Which take half of the time of such short runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(videomae, "reconstruction_figure", lambda *_: "")
        patch.setattr(log, "curve_figure", lambda *_: "")
        yield


def survive_fail_points(tmp_path: Path, data: Path, points: list[int]) -> list[Path]:
    """Runs killed at the n-th operation on the disk (negative: from the last) and then run again,
    to the end.
    """
    cfg = config(data, "", steps=4, save_every=2, knn_every=0)

    def run(name: str, kill_at: int = 0) -> int:
        plan = {"die_in_operation": kill_at, "operations": str(tmp_path / f"{name}.json")}
        done = launch(tmp_path, change(cfg, out=str(tmp_path / name)), plan)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
        return done.returncode

    assert run("calm") == 0
    operations = len(json.loads((tmp_path / "calm.json").read_text()))
    for n in points or range(1, operations + 1):
        n = n if n > 0 else operations + 1 + n
        assert run(f"kill-{n}", n) == -signal.SIGKILL
        assert run(f"kill-{n}") == 0
    calm = final_weights(tmp_path / "calm")
    backbone = load_backbone(str(tmp_path / "calm" / "backbone")).state_dict()
    killed = sorted(tmp_path.glob("kill-*[0-9]"))
    for run in killed:
        assert equal(final_weights(run), calm), run
        found = load_backbone(str(run / "backbone")).state_dict()
        assert equal(dict(found), dict(backbone)), run
        steps = [json.loads(x)["step"] for x in (run / "log.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4], run
        assert json.loads((run / "config.json").read_text())["config"]["steps"] == 4
        assert not list(run.rglob("tmp-*")), run
    return killed


def test_killed_around_the_save(tiny_pack, tmp_path):
    """config.json written aside, and the export."""
    assert len(survive_fail_points(tmp_path, tiny_pack, [3, -2])) == 2


@pytest.mark.slow
def test_killed_at_every_operation_on_the_disk(tiny_pack, tmp_path):
    assert len(survive_fail_points(tmp_path, tiny_pack, [])) > 25


@pytest.fixture(scope="module")
def halfway(tiny_pack, tmp_path_factory) -> Path:
    """A run that was stopped after 3 of 6 steps."""
    run = tmp_path_factory.mktemp("halfway") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, videomae, 3, signal.SIGTERM)
        with pytest.raises(SystemExit):
            videomae.main(config(tiny_pack, run, steps=6, knn_every=0))
    return run


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to, symlinks=True))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "\0" * 100, '{"config": 3}', '{"config": {}}', "9" * 5000, None]
)
def test_a_damaged_config_is_written_again_from_the_checkpoint(
    halfway, tiny_pack, tmp_path, capsys, content
):
    run = copied(halfway, tmp_path / "run")
    before = json.loads((run / "config.json").read_text())
    (run / "config.json").unlink()
    if content is not None:
        (run / "config.json").write_text(content)
    (run / "tmp-config.json").write_text('{"conf')
    state = videomae.main(config(tiny_pack, run, steps=6, knn_every=0))
    said = capsys.readouterr()
    assert "config.json" in said.err and "continuing from" in said.out and state["step"] == 6
    after = json.loads((run / "config.json").read_text())
    assert after["config"] == before["config"]
    (run / "config.json").write_text("")
    with pytest.raises(ValueError, match="seed: 0 -> 5"):
        videomae.main(config(tiny_pack, run, steps=6, knn_every=0, seed=5))


@pytest.mark.parametrize("content", ["", '{"config": {"see', "\0" * 10])
def test_a_damaged_config_without_a_checkpoint_starts_anew(tiny_pack, tmp_path, capsys, content):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "log.jsonl").write_text("")
    (tmp_path / ".DS_Store").touch()
    state = videomae.main(config(tiny_pack, tmp_path, steps=2, knn_every=0))
    assert state["step"] == 2 and "starts anew" in capsys.readouterr().err


def test_another_folder_with_a_config_is_refused(tiny_pack, tmp_path):
    for name, content in (("a", '{"model_type": "bert"}'), ("b", "")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(content)
        (folder / "weights.bin").write_text("years of work")
        with pytest.raises(ValueError, match="another --out"):
            videomae.main(config(tiny_pack, folder))
        assert (folder / "config.json").read_text() == content


@pytest.mark.parametrize(
    ("name", "value"), [("skipped", -1), ("bad_clips", "0"), ("loss", [1]), ("skipped_in_row", 1.5)]
)
def test_a_state_of_other_kinds_is_refused(halfway, tiny_pack, tmp_path, name, value):
    run = copied(halfway, tmp_path / "run")
    newest = checkpoint.checkpoints(run)[0]
    state = json.loads((newest / "state.json").read_text()) | {name: value}
    (newest / "state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["state.json"] = hashlib.sha256((newest / "state.json").read_bytes()).hexdigest()
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"state\.json is damaged: {name}"):
        videomae.main(config(tiny_pack, run, steps=6, knn_every=0))


def test_a_second_run_in_a_folder_is_refused_and_writes_nothing(halfway, tiny_pack, tmp_path):
    run = copied(halfway, tmp_path / "run")
    beside = subprocess.Popen(
        [sys.executable, "-c", BESIDE, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert beside.stdout.readline() == "mine\n"
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    with pytest.raises(ValueError, match="in use"):
        videomae.main(config(tiny_pack, run, steps=6, knn_every=0))
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    beside.communicate("")
    assert videomae.main(config(tiny_pack, run, steps=6, knn_every=0))["step"] == 6
    claim(run).release(force=True)


def test_two_processes_of_one_launch_share_the_folder_and_a_second_launch_is_refused(
    halfway, tiny_pack, tmp_path
):
    run = copied(halfway, tmp_path / "run")
    lock = claim(run)
    cfg = config(tiny_pack, run, steps=6, knn_every=0)
    refused = launch(tmp_path, cfg, {}, 2)
    assert refused.returncode != 0 and "is in use" in refused.stderr
    assert refused.stderr.count("is in use: another") == 1  # and no noise of the others
    lock.release(force=True)


@pytest.mark.parametrize("broken", ["parent", "log", "export"])
def test_a_disk_that_refuses_is_said(halfway, tiny_pack, tmp_path, broken):
    run = copied(halfway, tmp_path / "run")
    cfg = config(tiny_pack, run, steps=6, knn_every=0)
    if broken == "parent":
        cfg = change(cfg, out=str(run / "config.json" / "run"))
    elif broken == "log":
        (run / "log.jsonl").unlink()
        (run / "log.jsonl").mkdir()
    else:
        (run / "tmp-backbone").mkdir()
        (run / "backbone").symlink_to("/proc/nothing/here")
    if broken == "export":
        videomae.main(cfg)  # a link is replaced, what it points to is not touched
        assert (run / "backbone").is_dir() and not (run / "backbone").is_symlink()
        return
    with pytest.raises(ValueError, match=r"cannot (write|be read)|not a regular file"):
        videomae.main(cfg)
    assert checkpoint.newest_valid(run)[0].name == "step-00000003"


class Ended(io.StringIO):
    """Standard output whose reader ended, as `tee` does at a Ctrl-C: steps cannot be printed."""

    def write(self, text: str) -> int:
        if text.startswith(("step ", "stopped ")):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return len(text)


@pytest.mark.parametrize("number", [0, signal.SIGTERM])
def test_a_run_whose_output_nobody_reads_is_saved(tiny_pack, tmp_path, monkeypatch, number):
    """By itself, or where the signal that ends the run ended the reader, too."""
    cfg = config(tiny_pack, tmp_path / "run", steps=6, knn_every=0)
    cfg = change(cfg, log_seconds=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Ended())
        if number:
            patch.setattr(sys, "stderr", Ended())
            step = videomae.train_step
            kill = lambda *given: (os.kill(os.getpid(), number), step(*given))[1]
            patch.setattr(videomae, "train_step", kill)
        with pytest.raises(SystemExit) as end:
            videomae.main(cfg)
    assert end.value.code == 128 + (number or signal.SIGPIPE)
    saved = checkpoint.newest_valid(tmp_path / "run")[0].name
    assert saved == ("step-00000001" if number else "step-00000002")
    assert videomae.main(cfg)["step"] == 6


def kill_worker(monkeypatch, nth: int, number: signal.Signals) -> None:
    real, count = videomae.train_step, 0

    def step(*args):
        nonlocal count
        count += 1
        if count == nth:
            os.kill(multiprocessing.active_children()[0].pid, number)
        return real(*args)

    monkeypatch.setattr(videomae, "train_step", step)


@pytest.fixture(scope="module")
def calm(tiny_pack, tmp_path_factory) -> tuple[videomae.Config, dict]:
    """A run with a decoding process of its own that nothing disturbed, and its last weights."""
    run = tmp_path_factory.mktemp("calm") / "run"
    cfg = config(tiny_pack, run, steps=12, save_every=100, knn_every=0, num_workers=1)
    videomae.main(cfg)
    return cfg, final_weights(run)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_decoding_process_is_said_and_nothing_is_lost(
    calm, tmp_path, monkeypatch, capsys, number
):
    cfg = change(calm[0], out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        kill_worker(patch, 2, number)
        with pytest.raises(ValueError, match=rf"{number.name}.*--num-workers"):
            videomae.main(cfg)
    assert "saved; the same command" in capsys.readouterr().out
    assert checkpoint.newest_valid(tmp_path / "run")[0] is not None
    videomae.main(cfg)
    assert equal(final_weights(tmp_path / "run"), calm[1])


@pytest.mark.slow
def test_two_processes_stop_together_when_a_decoding_process_of_one_is_killed(tiny_pack, tmp_path):
    cfg = config(
        tiny_pack, tmp_path / "run", steps=200, save_every=1000, knn_every=0, num_workers=1
    )
    ended = launch(tmp_path, cfg, {"kill_worker_in_step": 3, "rank": "1"}, 2)
    assert ended.returncode != 0 and "Give fewer --num-workers" in ended.stderr
    assert "saved; the same command" in ended.stdout and "hung" not in ended.stderr
    assert checkpoint.newest_valid(tmp_path / "run")[0] is not None


def test_a_gradient_not_finite_on_one_process_of_two_skips_the_step_on_both(tiny_pack, tmp_path):
    cfg = config(tiny_pack, tmp_path / "run", steps=5, knn_every=0)
    done = launch(tmp_path, cfg, {"nan_in_step": 3, "rank": "1", "hashes": str(tmp_path)}, 2)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / f"hashes-{rank}.json").read_text()) for rank in (0, 1))
    assert one == two and len(one) == 5  # weights after each step, alike on both
    assert one[2] == one[1] and len(set(one)) == 4  # that step left them alone, and no other
    found, _ = checkpoint.newest_valid(tmp_path / "run")
    assert checkpoint.read_state(found)["skipped"] == 1


def test_a_first_save_that_never_came_is_not_promised(tiny_pack, tmp_path, monkeypatch):
    real = videomae.train_step

    def step(model, *rest):
        model.head.bias.register_hook(lambda g: g * float("inf"))
        return real(model, *rest)

    monkeypatch.setattr(videomae, "train_step", step)
    with pytest.raises(ValueError, match=r"5 steps in a row.*nothing was saved"):
        videomae.main(config(tiny_pack, tmp_path / "run", steps=20, save_every=100, knn_every=0))


@pytest.mark.parametrize("number", [signal.SIGTERM, 0])
def test_a_run_that_saves_in_the_background_ends_saved(calm, tmp_path, monkeypatch, number):
    """A signal, and the end, wait for what is being written; the next run continues to the bit."""
    cfg = change(calm[0], out=str(tmp_path / "run"), save_every=3, async_save=True)
    real = weights.save_file
    monkeypatch.setattr(weights, "save_file", lambda *given: (time.sleep(0.2), real(*given))[1])
    if number:
        with monkeypatch.context() as patch:
            stop_in_step(patch, videomae, 5, number)
            with pytest.raises(SystemExit):
                videomae.main(cfg)
        assert checkpoint.newest_valid(tmp_path / "run")[0].name == "step-00000005"
    videomae.main(cfg)
    assert checkpoint.newest_valid(tmp_path / "run") == (
        tmp_path / "run" / "checkpoints" / "step-00000012", []
    )  # fmt: skip
    assert equal(final_weights(tmp_path / "run"), calm[1])


def test_a_save_in_the_background_that_fails_ends_the_run_in_words(calm, tmp_path, monkeypatch):
    cfg = change(calm[0], out=str(tmp_path / "run"), save_every=3, async_save=True)
    real, count = weights.save_file, 0

    def save_file(tensors, path):
        nonlocal count
        count += 1
        if count > 2:  # the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", save_file)
        with pytest.raises(ValueError, match="No space left"):
            videomae.main(cfg)
    assert checkpoint.newest_valid(tmp_path / "run")[0].name == "step-00000003"
    videomae.main(cfg)
    assert equal(final_weights(tmp_path / "run"), calm[1])
