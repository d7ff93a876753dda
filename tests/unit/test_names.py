"""Names from outside are shown, stored and read back whatever they hold, and steer nothing."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from downstream import report
from downstream.claims import read_predictions
from downstream.results import Data, Metric, Model, Results
from pretrain import log
from pretrain.names import (
    clean_screen,
    counted,
    file_name,
    first_of,
    for_csv,
    for_figure,
    for_html,
    for_markdown,
    for_screen,
    from_csv,
)
from pretrain.run import restore

HOSTILE = (
    "a\x1b[2J\x1b]0;pwned\x07.mp4",
    "a\x9b31mb\x7f\x00",
    '=cmd|"/C calc"!A0',
    "@SUM(1+1)",
    "  -2+3",
    "\t=1+1",
    "\r+1+1",
    "＝1+1",
    "'=1+1",
    "''",
    os.fsdecode(b"\xff\xfe.mp4"),
    r"$\frac{1}$^2",
    "$a^^b$",
    "<script>alert(1)</script>",
    "![x](http://y)",
    "[x]: http://y",
    "`code` **b** _i_ ~~s~~ &lt;",
    "a|b",
    "two\nlines\r\nand\u2028more\x85",
    "\u202etxt.exe\u2066",
    "tag\U000e0041, \ue000, \ufeff",
    r"\x1b C:\new\user\x1b",
    "\\",
    "x" * 10_000,
    "",
    "-1",
)
HONEST = (
    "sit down",
    "गाड़ी चलाना",
    "می‌خواهم",
    "Zoë's 3×4 (b)",
    "跑步　快",
    "👩‍👧",
    "clip-01_b.mp4",
    "n\u0303",
)


def steers(text: str) -> bool:
    """Whether a terminal would do more than show it; joiners are spelling."""
    return any(
        unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        for c in text
        if c not in "\u200c\u200d"
    )


def test_a_long_list_is_cut_and_counted():
    assert first_of(["a", "b\x1b[2J"], 2) == "a, b\\x1b[2J"
    assert first_of(["a", "b", "c", "d"], 2, "; ") == "a; b and 2 more"
    assert first_of([], 2) == ""


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_steers(name):
    shown = [
        for_screen(name),
        str(for_csv(name)),
        for_markdown(name),
        for_html(name),
        for_figure(name),
    ]
    assert not any(map(steers, shown))
    assert for_screen(for_screen(name)) == for_screen(name)
    assert len(for_screen(name, 40)) <= 40 and len(for_figure(name)) <= 150
    for text in shown:
        text.encode()


@pytest.mark.parametrize("name", HONEST)
def test_names_of_real_languages_stay(name):
    assert for_screen(name) == for_csv(name) == for_html(name).replace("&#x27;", "'") == name
    assert for_figure(name) == for_markdown(name) == name


def test_what_is_hidden_becomes_visible():
    assert for_screen("a\x1b[1mb\u202e\udcff") == r"a\x1b[1mb\u202e\udcff"
    assert for_screen("first" + "x" * 100 + "last", 12).startswith("first")
    assert for_screen("first" + "x" * 100 + "last", 12).endswith("last")


@pytest.mark.parametrize("name", [*HOSTILE, *HONEST, "a caption of http://me:word@host/a"])
def test_csv_is_no_formula_and_reads_back(name):
    cell = for_csv(name)
    assert from_csv(cell) == name
    assert not re.match(r"\s*[=+@＝＋－＠\t\r]", cell)
    assert not re.match(r"\s*-", cell) or name == "-1"


def test_numbers_stay_numbers_in_csv():
    assert for_csv(-0.25) == -0.25 and for_csv("-0.25") == "-0.25" and for_csv("+1e-3") == "+1e-3"
    assert for_csv("-1+cmd") == "'-1+cmd" and for_csv("-1\n") != "-1\n"


def test_different_cells_of_different_names():
    names = ["\x1b", r"\x1b", r"\x5cx1b", "'=a", "=a", "''=a", "\\\x1b", r"\\x1b"]
    assert len({for_csv(n) for n in names}) == len(names)
    assert from_csv(r"\Uffffffff \U0010ffff") == "\\Uffffffff \U0010ffff"  # a csv of others


def test_predictions_of_hostile_names_are_read_again(tmp_path):
    classes = [n for n in HOSTILE if n]
    sources = [f"{n}/{n}" for n in classes]
    scores = np.roll(np.eye(len(classes)), 1, 1)  # all wrong
    scores[3] = np.eye(len(classes))[3]
    report.write_predictions(tmp_path / "predictions.csv", sources, classes, scores, classes)
    with open(tmp_path / "predictions.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for cell in (row["source"], row["label"], row["predicted"], row["top5"]):
                assert not re.match(r"\s*[=+@＝＋－＠\t\r]", cell) and not steers(cell)
            assert len(row["top5"].split("|")) == 5
            assert from_csv(row["top5"].split("|")[0]) in classes
    answers = read_predictions(tmp_path)
    assert list(answers) == sources and [s for s in answers if answers[s]] == [sources[3]]
    for damage in (b"\xff", b"x,y\n1,2\n", b"source\n" + b"x" * 200_000):
        (tmp_path / "predictions.csv").write_bytes(damage)
        with pytest.raises(ValueError, match=r"predictions\.csv"):
            read_predictions(tmp_path)


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_shows_the_text(name):
    assert "\n" not in for_markdown(name)
    plain = re.sub(r"\\(?=[`*\[\]<>|~$&_#+\-.)\\])", "", for_markdown(name))
    assert plain.replace("\\", "") == for_screen(name).replace("\\", "")
    for mark in "`*[]<>|":
        assert not re.search(rf"(?:^|[^\\])(?:\\\\)*{re.escape(mark)}", for_markdown(name))


def test_markdown_starts_no_heading_or_list():
    for plain in ("0.5, 0.67", "-0.5, 1", "+1.2 points", "3x4", "#12", "a - b # c = d"):
        assert for_markdown(plain) == plain
    for marked in ("# a", "### a", "- a", "+ a", "---", "===", "1. a", "12) a"):
        assert for_markdown(marked).replace("\\", "", 1) == marked != for_markdown(marked)


def test_a_card_of_hostile_names():
    data = Data("x\n# y", "f", "![a](http://b)", 3, 3)
    model = Model("t\n# u", "h", 1, {"<b>": 0.5}, "<script>")
    details = {"t\n## v": {"a|b": ["![a](http://b)", "\n> q"]}}
    metrics = {"<script>": Metric(0.5, 3, of="a|b\n")}
    text = report.card(
        Results(
            "probe\n# z",
            data,
            model,
            {},
            {},
            metrics,
            0,
            "c\n# d",
            {},
            ["n\n\n> m", "<script>"],
            details,
        )
    )
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert len(heads) == 5 and "<script>" not in text and "![a](" not in text
    assert sum(line.startswith(">") for line in text.splitlines()) == 2
    assert (
        len(
            {
                line.count("|") - line.count("\\|")
                for line in text.splitlines()
                if line.startswith("|")
            }
        )
        == 1
    )


# ------------------------------------------------------------------------------------------ figures


def test_figures_of_hostile_names(tmp_path, capsys, recwarn):
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    names = [*HOSTILE, *HONEST]
    num, title = len(names), "$".join(names)
    parts = [{"start": i, "end": i + 1, "label": n} for i, n in enumerate(names)]
    drawn = {
        "confusion": (report.confusion_figure, np.eye(num, dtype=int), names, title),
        "filmstrip": (report.filmstrip_figure, [(0.5, frames[0])], names, np.ones(num) / num,
                      title),
        "contact": (report.contact_sheet_figure, [(n, frames[:1], [0]) for n in names],
                    title),
        "reconstruction": (
            log.clips_figure, [("clip", frames)], np.arange(len(frames)), title, title,
        ),
        "timeline": (report.timeline_figure, [(".", parts), *((n, parts[:1]) for n in names if n)],
                     names, title),
        "cost": (report.cost_figure, [(n, 1e9, 0.5, 0.4, 0.6) for n in names], 0.1, title),
        "growth": (
            report.growth_figure, (1, 2),
            {n: {"gflops": [1, 2], "mib": [1, 2], "clips_per_s": [1, 2]} for n in names}, title,
        ),
    }  # fmt: skip
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    drawn["curve"] = (log.curve_figure, tmp_path / "log.jsonl", ("loss",), (), title)
    for name, (figure, *arguments) in drawn.items():
        path = tmp_path / f"{name}.png"
        assert figure(path, *arguments) == str(path), capsys.readouterr().err
        with Image.open(path) as picture:
            picture.load()
            assert max(picture.size) < 8000  # a label of 10,000 letters is cut
    assert not capsys.readouterr().err and not [w for w in recwarn if "Glyph" in str(w.message)]


def test_a_figure_that_fails_is_a_warning(tmp_path, capsys):
    (tmp_path / "old.png").write_text("of an earlier run")
    told = report.confusion_figure(tmp_path / "old.png", np.eye(3), ["a", object], "\x1b")
    assert "old.png" in told and not (tmp_path / "old.png").exists()
    report.confusion_figure(tmp_path / "none" / "f.png", np.eye(2, dtype=int), ["a", "b"], "t")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("warning" in line for line in said)
    assert "old.png" in said[0] and "f.png" in said[1]


# --------------------------------------------------------------------------------------- file names


def test_file_names_are_safe_and_different():
    names = [*HOSTILE, "../../etc", "..", "-rf", ".hidden", "a?b", "a*b", "x" * 9_999, "跑" * 60]
    made = [file_name(name) for name in names]
    assert len(set(made)) == len(names)
    for name in made:
        assert 0 < len(name.encode()) <= 100 and name[0] not in ".-"
        assert not set(name) & set("/\\:\0\n") and not steers(name)
    assert [file_name(n) for n in ("clip_1.b", "跑步", "hf:a/b", "my clips")] == [
        "clip_1.b", "跑步", "hf-a-b", "my-clips",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------- screen


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_move_and_names_do_not(monkeypatch):
    from tqdm import tqdm

    for kind in (Terminal, io.StringIO):
        monkeypatch.setattr(sys, "stderr", kind())
        monkeypatch.setattr(sys, "stdout", kind())
        clean_screen()
        with tqdm(total=2, desc="outer\x1b[2J", position=1) as bar:
            bar.update()
        print("a\x1b[Ab\x9b\tc")
        assert "\r" in sys.stderr.getvalue() and "\x1b[2J" not in sys.stderr.getvalue()
        assert ("\x1b[A" in sys.stderr.getvalue()) == (kind is Terminal)
        assert sys.stdout.getvalue() == "a\\x1b[Ab\\x9b\tc\n"


SCRIPT = r"""
import dataclasses, os, sys, warnings
from pretrain.log import cli
@dataclasses.dataclass
class Config:
    name: str
    count: int = 1
def main(config):
    print("of a name", config.name, "é", "\udcff", flush=True)
    warnings.warn(config.name)
    if config.count:
        error = ValueError(f"no {config.name}")
        error.add_note(f"nor {config.name}")
        raise error
    raise RuntimeError(config.name)
cli(main, Config)
"""


def test_passwords_of_addresses_are_not_printed():
    told = for_screen("error: rtsp://me:p@ss@host/a and https://me:word@b/c@d, s3://bucket/a@b")
    assert told == "error: rtsp://***@host/a and https://***@b/c@d, s3://bucket/a@b"
    words = ["--name", "x", "rtsp://me:hunter2@host/a"]  # a flag is missing before it
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode and "***@host" in done.stdout + done.stderr
    assert "hunter2" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["--count", "0"], ["--bogus\x1b[2J"], ["--count", "x\x1b[2J"]]
)
def test_whatever_is_printed_passes_the_screen(arguments):
    hostile = b"n\x1b[2J\xff\xe2\x80\xae\nall is well"
    command = [sys.executable, "-c", SCRIPT, "--name", hostile, *arguments]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == (1 if arguments == ["--count", "0"] else 2)
    assert done.stdout.isascii() and b"\x1b" not in done.stdout + done.stderr
    assert b"UnicodeEncodeError" not in done.stderr and len(done.stderr) > 10
    if not arguments:
        shown = rb"n\x1b[2J\udcff\u202e\x0aall is well"
        assert done.stderr.splitlines()[-2:] == [b"error: no " + shown, b"nor " + shown]
        assert b"of a name" in done.stdout


def test_names_that_a_manifest_gives(tmp_path, capsys):
    """A checkpoint of somebody else: what is wrong with it is said, in its own names."""
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / HOSTILE[0]).write_text("x")
    (folder / "manifest.json").write_text(json.dumps({HOSTILE[0]: "0" * 64}))
    with pytest.raises(ValueError, match="verifies"):
        restore(tmp_path, lambda _: {}, {}, True)
    said = capsys.readouterr().err
    assert "step-00000001" in said and not steers(said.replace("\n", ""))


def test_one_is_not_plural():
    assert [counted(n, "test video") for n in (0, 1, 2)] == [
        "0 test videos", "1 test video", "2 test videos",
    ]  # fmt: skip
    assert [counted(1, w) for w in ("class", "person")] == ["1 class", "1 person"]
    assert [counted(3, w) for w in ("class", "batch", "person")] == [
        "3 classes", "3 batches", "3 people",
    ]  # fmt: skip
