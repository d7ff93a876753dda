"""One style of progress: a bar on a terminal, a line now and then in a file."""

import contextlib
import io
import re
from collections.abc import Iterator

import pytest

from pretrain.data import progress
from recipes import videomae
from tests.recipes.runs import ROOT, stop_in_step
from tests.recipes.test_videomae import config


class Terminal(io.StringIO):
    """Shows what a terminal would: a carriage return goes back to the start of the line."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        shown = []
        for line in self.getvalue().split("\n"):
            cells: list[str] = []
            for part in line.split("\r"):
                cells[: len(part)] = part
            shown.append("".join(cells).rstrip())
        return shown


@contextlib.contextmanager
def terminal() -> Iterator[Terminal]:
    """What is printed meanwhile is on it."""
    screen = Terminal()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        yield screen


def test_training_has_a_bar_under_its_lines(tiny_pack, tmp_path, monkeypatch):
    cfg = config(tiny_pack, tmp_path, steps=40, log_seconds=0.1, knn_every=20)
    with terminal() as screen:
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_in_step(patch, videomae, 30)
            videomae.main(cfg)
        videomae.main(cfg)
    lines = screen.lines()
    steps = [line for line in lines if "step " in line and "clips/s" in line]
    assert len(steps) >= 4 and all(re.match(r"step \d+/40  loss", line) for line in steps)
    bars = [line for line in lines if "training:" in line]
    assert all(line.startswith("training:") and "step/s" in line for line in bars)
    assert "40/40" in bars[-1] and "training:" in screen.getvalue().split("40/40")[0]
    assert any(line.startswith("stopped after step 30") for line in lines)
    assert "30/40 [00:00" in screen.getvalue()  # where it goes on


def test_in_a_file_there_are_only_the_lines(tiny_pack, tmp_path, capsys):
    videomae.main(config(tiny_pack, tmp_path, knn_every=0))
    said = capsys.readouterr()
    assert "training:" not in said.out + said.err and said.out.count("clips/s") == 8


def test_what_is_counted_is_shown_as_it_is_done(capsys, monkeypatch):
    with terminal() as screen:
        assert list(progress.counting(range(3), "probing", "fold")) == [0, 1, 2]
    (line,) = filter(None, screen.lines())
    assert line.startswith("probing: 100%|") and "3/3" in line and "fold/s" in line
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert list(progress.counting("abc", "probing", "fold")) == [*"abc"]
    assert not list(progress.counting("", "probing", "fold", shown=False))
    first, _, last = capsys.readouterr().err.splitlines()
    assert first.startswith("probing: 1/3 folds, ") and last == "probing: 3/3 folds"


def test_nothing_else_draws_bars():
    files = [
        path
        for room in ("pretrain", "downstream", "recipes")
        for path in (ROOT / room).rglob("*.py")
    ]
    draw = [p for p in files if re.search(r"^\s*(from|import) tqdm", p.read_text(), re.M)]
    assert draw == [ROOT / "pretrain" / "data" / "progress.py"]
