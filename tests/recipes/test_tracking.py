"""--track: what a tracker of accelerate gets of a run, and that none of them can end one."""

import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from recipes import videomae
from tests.recipes.runs import change, stop_in_step
from tests.recipes.test_videomae import config

NAMES = ["tensorboard", "wandb", "trackio", "mlflow"]


class Picture:
    """Stands for an image of trackio, which is a value like any other."""

    def __init__(self, picture):
        assert picture.mode == "RGB"


class Recorder:
    """Stands for a tracker; each remembers what it was given."""

    made: ClassVar[list["Recorder"]] = []
    fails_at = 0

    def __init__(self, project, **arguments):
        self.project, self.arguments, self.about = project, arguments, None
        self.values, self.pictures, self.ended = {}, [], 0
        self.tracker = self.info = self
        self.run_id = arguments.get("run_id") or f"given-{len(self.made)}"
        self.made.append(self)

    def start(self):
        self.started = True

    def store_init_configuration(self, values):
        assert self.started and self.about is None
        self.about = values

    def log(self, values, step=None):
        if step == self.fails_at:
            raise ConnectionError("gone \x1b[2J\nsecond line")
        self.pictures += [name for name, value in values.items() if isinstance(value, Picture)]
        numbers = {n: value for n, value in values.items() if not isinstance(value, Picture)}
        self.values.setdefault(step, {}).update(numbers)

    def log_images(self, values, step=None, **_):
        self.pictures += [*values]

    def log_artifact(self, path):
        assert Path(path).is_file()
        self.pictures.append(Path(path).stem)

    def finish(self):
        self.ended += 1


@pytest.fixture
def recorders(monkeypatch):
    """All trackers are recorders, and their packages are there."""
    monkeypatch.setattr(Recorder, "made", [])
    for name in NAMES:
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, Recorder)
        package = ModuleType(name)
        package.__spec__ = ModuleSpec(name, None)
        package.Image = Picture
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr(os, "environ", os.environ | {})
    return Recorder.made


def lines(run: Path) -> dict[int, dict]:
    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line.pop("step"): {n: v for n, v in line.items() if v is not None} for line in found}


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_goes_on_under_the_same_run_of_the_tracker(
    name, recorders, tiny_pack, tmp_path, monkeypatch, capsys
):
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    cfg = config(tiny_pack, tmp_path / "run \x1b[2J", track=name)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_step(patch, videomae, 5)
        videomae.main(cfg)
    videomae.main(change(cfg, log_seconds=0.5, save_every=2))
    first, second = recorders
    assert first.values | second.values == (logged := lines(Path(cfg.out)))
    assert list(first.values) == [1, 2, 3, 4, 5] and logged[8]["loss"] > 0
    assert sorted(second.pictures) == ["curve", "reconstruction"]
    assert (first.ended, second.ended) == (1, 1) and second.about is None
    assert first.about["steps"] == 8 and first.about["base_lr"] == 0.05
    assert first.about["micro_batch"] == 4 and first.about["num_clips"] == 32
    kinds = {type(value) for value in first.about.values()}
    assert kinds <= {bool, int, float, str} and "\x1b" not in str([*first.about.values()])
    one, other = first.arguments, second.arguments
    if name == "tensorboard":
        assert (one["purge_step"], other["purge_step"]) == (1, 6)
        assert first.project == "tensorboard" and one["logging_dir"] == cfg.out
        return
    assert first.project == second.project == "muybridge"
    assert "\x1b" not in str(one)
    if name == "mlflow":
        assert one["run_id"] is None and other["run_id"] == "given-0"
        return
    key = "id" if name == "wandb" else "name"
    assert one[key] == other[key] and (one["resume"], other["resume"]) == ("never", "allow")
    assert name != "wandb" or (one["mode"] == "offline" and one["dir"] == cfg.out)


def test_another_run_is_another_run_of_the_tracker(recorders, tiny_pack, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")  # as the user says
    for out in ("a", "b"):
        videomae.main(config(tiny_pack, tmp_path / out, steps=1, knn_every=0, track="wandb"))
    one, other = (made.arguments for made in recorders)
    assert one["id"] != other["id"] and one["mode"] == "online"


@pytest.mark.parametrize(
    "kept", ["{", "[]", '{"wandb": 3}', '{"wandb": "../x\\n"}', '{"mlflow": "a"}']
)
def test_a_damaged_name_begins_a_new_run_of_the_tracker(
    kept, recorders, tiny_pack, tmp_path, monkeypatch
):
    cfg = config(tiny_pack, tmp_path, steps=2, knn_every=0, save_every=1, track="wandb")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_step(patch, videomae, 1)
        videomae.main(cfg)
    (tmp_path / "track.json").write_text(kept)
    videomae.main(cfg)
    one, other = recorders
    assert one.arguments["id"] != other.arguments["id"] and other.about
    if "mlflow" in kept:  # the run of another tracker, which may go on later
        assert json.loads((tmp_path / "track.json").read_text())["mlflow"] == "a"


@pytest.mark.parametrize("when", ["start", "middle", "figures", "end"])
def test_a_tracker_that_fails_is_named_once_and_training_goes_on(
    when, recorders, tiny_pack, tmp_path, monkeypatch, capsys
):
    def fail(*_, **__):
        raise ConnectionError("gone \x1b[2J\nsecond line")

    broken = {"start": "start", "figures": "log_images", "end": "finish"}
    if when == "middle":
        monkeypatch.setattr(Recorder, "fails_at", 3)
    else:
        monkeypatch.setattr(Recorder, broken[when], fail)
    state = videomae.main(config(tiny_pack, tmp_path, track="wandb"))
    assert state["step"] == 8 and list(lines(tmp_path)) == list(range(1, 9))
    error = capsys.readouterr().err
    assert (
        error.count("--track wandb fails") == 1 and "\x1b[" not in error and "second" not in error
    )
    assert len(recorders[0].values) == {"start": 0, "middle": 2}.get(when, 8)


def test_without_track_there_is_none(recorders, tiny_pack, tmp_path):
    videomae.main(config(tiny_pack, tmp_path, steps=1, knn_every=0))
    assert not recorders and not (tmp_path / "track.json").exists()


# ------------------------------------------------------------------------------------ the real ones


@pytest.fixture
def tracked(tiny_pack, tmp_path, monkeypatch):
    """Run with a tracker, interrupted and continued; gives the folder and its log."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ | {})

    def go(name: str) -> tuple[Path, dict[int, dict]]:
        cfg = config(tiny_pack, tmp_path / "run", track=name)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_in_step(patch, videomae, 5)
            videomae.main(cfg)
        videomae.main(cfg)
        return tmp_path / "run", lines(tmp_path / "run")

    return go


def test_event_files_hold_what_the_log_does(tracked, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, logged = tracked("tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in ("loss", "lr", "knn", "clips_per_s"):
        found = {event.step: event.value for event in events.Scalars(name)}
        expected = {step: values[name] for step, values in logged.items() if name in values}
        assert found == pytest.approx(expected, rel=1e-5), name
    assert sorted(events.Tags()["images"]) == ["curve", "reconstruction"]
    assert "--track" not in capsys.readouterr().err
    (kept,) = (run / "tensorboard").glob("*/hparams.yml")
    assert "base_lr: 0.05" in kept.read_text()


def test_mlflow_holds_what_the_log_does(tracked, tmp_path, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")  # mlflow-skinny comes without it
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'kept.db'}")
    run, logged = tracked("mlflow")
    assert "--track" not in capsys.readouterr().err
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("muybridge").experiment_id])
    history = {x.step: x.value for x in client.get_metric_history(found.info.run_id, "loss")}
    assert history == pytest.approx({step: values["loss"] for step, values in logged.items()})
    assert found.data.params["base_lr"] == "0.05" and found.info.status == "FINISHED"
    assert found.info.run_id in (run / "track.json").read_text()
    names = {Path(item.path).stem for item in client.list_artifacts(found.info.run_id)}
    assert names == {"curve", "reconstruction"}


def test_trackio_holds_what_the_log_does(tracked, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage")
    _, logged = tracked("trackio")
    assert "--track" not in capsys.readouterr().err
    (found,) = trackio.Api().runs("muybridge")
    rows = storage.SQLiteStorage.get_logs("muybridge", found.name)
    history = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert history == pytest.approx({step: values["loss"] for step, values in logged.items()})


def test_wandb_stays_on_this_machine(tracked, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run, _ = tracked("wandb")
    assert "--track" not in capsys.readouterr().err
    key = json.loads((run / "track.json").read_text())["wandb"]
    kept = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len(kept) == 2 and all(name.endswith(key) for name in kept)
