"""report.html of a training run: its state, what it learned from, its course, what comes next."""

import re
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest

from pretrain import log, run_report
from pretrain.auto import explain
from recipes import clip, finetune, videomae
from tests.recipes import test_clip, test_finetune
from tests.recipes.runs import change, stop_in_step
from tests.recipes.test_videomae import config

HOSTILE = "a<script>alert(1)</script>&amp; b"


def text_of(run: Path) -> str:
    """The words of a report."""
    page = (run / "report.html").read_text()
    assert "<script" not in page and "default-src 'none'" in page
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.S).split())


@pytest.fixture
def finished(monkeypatch):
    """How each report that was written says the run is."""
    hows, write = [], run_report.RunReport.write

    def note(report, how, *arguments, **named):
        hows.append(how)
        return write(report, how, *arguments, **named)

    monkeypatch.setattr(run_report.RunReport, "write", note)
    return hows


def test_an_interrupted_run_has_one_and_the_finished_one_replaces_it(
    tiny_pack, tmp_path, monkeypatch, finished
):
    cfg = config(tiny_pack, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("sys.argv", ["muybridge videomae", "--data", "my clips"])
        stop_in_step(patch, videomae, 5)
        videomae.main(cfg)
    said = text_of(tmp_path / "run")
    assert "Interrupted after 5 of 8 steps" in said
    assert "muybridge videomae --data &#x27;my clips&#x27;" in said
    assert "online kNN" in said and "chance 25.0" in said and "effective rank" in said
    assert "curve.png" not in said and (tmp_path / "run" / "curve.png").is_file()
    videomae.main(cfg)
    said = text_of(tmp_path / "run")
    assert "Finished after 8 of 8 steps" in said and "continues it" not in said
    assert f"muybridge linear-probe --backbone {tmp_path}/run/backbone" in said
    assert "32 clips of" in said and "clips a second" in said
    assert (tmp_path / "run" / "report.html").read_text().count("<img") == 2
    assert finished == ["interrupted", "finished"]


@pytest.mark.parametrize(("classes", "then"), [(["run"], "linear-probe"), ([], "look")])
def test_the_next_command_takes_the_data_as_they_were_given(monkeypatch, tmp_path, classes, then):
    said: list[str] = []
    monkeypatch.setattr(videomae.backbones, "export_backbone", lambda *_: None)
    made, shown = MagicMock(), MagicMock(classes=classes)
    made.folder, made.print_done = tmp_path, lambda _, command: said.append(command)
    cfg = change(config(tmp_path, tmp_path), data="my clips", reconstruct=False)
    model = MagicMock(spec=videomae.VideoMAE, encoder=None)
    videomae.finish(cfg, model, shown, np.zeros(1, int), made, MagicMock())
    assert said == [f"muybridge {then} --backbone {tmp_path}/backbone --data 'my clips'"]


@pytest.mark.parametrize(
    ("recipe", "of"), [(clip, test_clip), (finetune, test_finetune)], ids=["clip", "finetune"]
)
def test_every_recipe_that_trains_writes_one(recipe, of, tiny_pack, tmp_path):
    texts = {"text": "label"} if recipe is clip else {}
    recipe.main(change(of.config(tiny_pack, tmp_path / "run"), steps=2, **texts))
    said = text_of(tmp_path / "run")
    assert "Finished after 2 of 2 steps" in said and "muybridge " in said
    assert (tmp_path / "run" / "report.html").read_text().count("<img") == 1


def test_a_killed_run_has_one_from_its_last_score(tiny_pack, tmp_path, monkeypatch, finished):
    monkeypatch.setattr(run_report, "SECONDS", 0.0)
    kept, real = tmp_path / "kept", videomae.train_step
    steps = []

    def step(*arguments):
        steps.append(1)
        if len(steps) == 6:
            shutil.copytree(tmp_path / "run", kept)
        return real(*arguments)

    monkeypatch.setattr(videomae, "train_step", step)
    videomae.main(config(tiny_pack, tmp_path / "run", guard=True))
    assert finished == ["under way", "finished"]
    said = text_of(kept)
    assert "Under way after 4 of 8 steps" in said and "if nothing runs any more" in said
    assert "rebuilt after 4 steps" in said and "the guard has seen the best" in said
    assert (kept / "report.html").read_text().count("<img") == 2


def test_a_run_that_ends_by_an_error_says_it(tiny_pack, tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        videomae.main(config(tiny_pack, tmp_path, base_lr=1e30, knn_every=0, steps=30))
    said = text_of(tmp_path)
    assert "Stopped after" in said and "not finite in 5 steps in a row" in said
    assert "5 steps skipped" in said


def test_a_run_whose_features_collapse_says_what_to_do(tiny_pack, tmp_path):
    planted = {"steps": 20, "batch_size": 16, "micro_batch": 16, "knn_every": 10}
    videomae.main(config(tiny_pack, tmp_path, base_lr=20.0, **planted))
    said = text_of(tmp_path)
    assert "Its features have collapsed" in said
    assert "collapsing: the features of different clips become alike" in said
    assert "lower --base-lr" in said
    videomae.main(config(tiny_pack, tmp_path, base_lr=20.0, **planted))  # nothing is left to do
    assert "Its features have collapsed." in text_of(tmp_path)


def test_names_from_outside_are_text(tiny_pack, tmp_path, monkeypatch):
    run = tmp_path / HOSTILE.replace("/", "_")
    data = tmp_path / f"{HOSTILE.replace('/', '_')} data"
    shutil.copytree(tiny_pack, data)
    monkeypatch.setattr("sys.argv", ["recipes/videomae.py", "--out", f"{HOSTILE}\x1b[2J\u202e"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_step(patch, videomae, 2)
        videomae.main(config(data, run))
    page = (run / "report.html").read_text()
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
    assert page.count("&lt;script&gt;") >= 3 and "python recipes/videomae.py --out" in page


def test_a_report_that_cannot_be_written_is_a_warning(tiny_pack, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_report.Page, "write", refuse)
    state = videomae.main(config(tiny_pack, tmp_path, steps=2, knn_every=0))
    said = capsys.readouterr()
    assert state["step"] == 2 and "warning: no report" in said.err
    assert "report.html" not in said.out and (tmp_path / "backbone").is_dir()


def test_what_the_data_decided_is_kept_with_the_reasons(tiny_pack, tmp_path, capsys):
    chosen = {"stride": (3, "a view spans 2 s"), "small": (True, "on a CPU"),
              "dual_mask": (False, "few tokens: none")}  # fmt: skip
    cfg = explain(config(tiny_pack, tmp_path, steps=1), {"the clips": "48 clips"}, chosen)
    printed = capsys.readouterr().out
    assert (
        "--stride" in printed and "3: a view spans 2 s" in printed and "--no-dual-mask" in printed
    )
    assert cfg.reasons == (
        "the clips: 48 clips", "--stride 3: a view spans 2 s", "--small: on a CPU",
        "--no-dual-mask: few tokens: none",
    )  # fmt: skip
    videomae.main(change(cfg, knn_every=0))
    said = text_of(tmp_path)
    assert "--stride 3 a view spans 2 s" in said and "--no-dual-mask few tokens: none" in said
    videomae.main(change(cfg, knn_every=0, reasons=()))  # it decides no number


def test_many_scores_are_thinned_and_the_last_is_there(tmp_path):
    lines = [f'{{"step": {i}, "knn": {i / 1000}, "clips_per_s": {i}}}\n' for i in range(1, 202)]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    report = run_report.RunReport(tmp_path, 201)
    report.write("finished", {"step": 201, "seconds": 3.0, "skipped": 0, "bad_clips": 0})
    rows = re.findall(r"<tr><td>(\d+)</td>", (tmp_path / "report.html").read_text())
    assert len(rows) <= run_report.MOST_SCORES and rows[-1] == "201"
    assert "101.0, the median" in text_of(tmp_path) and log.read_log(tmp_path / "log.jsonl")
