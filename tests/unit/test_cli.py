"""The end of every command that prints."""

import runpy
import subprocess
import sys
from functools import partial

import pytest

from pretrain.log import print_notes
from tests import forked

PRINTS = """
import sys
from dataclasses import dataclass
from pretrain.log import cli

@dataclass(frozen=True)
class Config:
    lines: int

def main(config):
    for _ in range(config.lines):
        print("a line of some length")
    if config.lines == 2:
        raise ValueError("two")

cli(main, Config)
"""


@pytest.mark.parametrize(
    "command, status, words",
    [
        (["-c", PRINTS, "--lines", "1"], 0, ""),
        (["-c", PRINTS, "--lines", "2"], 2, "error: two"),
        (["-c", PRINTS, "--lines", "99999"], 141, "error: "),
        (["-c", PRINTS, "--help"], 0, ""),
        (["downstream.models"], 0, ""),
    ],
)
def test_a_reader_that_ends_early_gets_no_traceback(command, status, words, monkeypatch):
    """As `head` does: what was done is done, and a mistake is still said."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    if command[0] == "-c":
        started = subprocess.Popen([sys.executable, *command], **streams)
    else:  # a module that imports torch, which this process has
        monkeypatch.setattr(sys, "argv", command)
        started = forked.start(partial(runpy.run_module, *command, run_name="__main__"), **streams)
    with started as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == status
    assert said.startswith(words) and len(said.splitlines()) == bool(words)


def test_a_warning_is_no_note(capsys):
    print_notes(["WARNING: all is lost", "split train: WARNING: the rest", "one is\x1b[2J broken"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["WARNING: all is lost", "note: split train: WARNING: the rest"]
    assert lines[2].startswith("note: one is") and "\x1b" not in lines[2]
