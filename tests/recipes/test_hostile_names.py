"""Class and file names that steer terminals, spreadsheets, Markdown and formulas, through the
recipes that show names.
"""

import csv
import json
import os
import re
from pathlib import Path

import pytest

from downstream.claims import read_predictions
from recipes import compare, finetune, linear_probe, predict, retrieval, visualize, zero_shot
from tests.conftest import MOTIONS, draw_motion, write_video
from tests.recipes.runs import configure
from tests.unit.test_names import steers

NAMES = [
    "a\x1b[2J\x1b]0;pwned\x07",
    '=cmd|"C calc"!A0',
    "@SUM(1+1)",
    os.fsdecode(b"\xff\xfe"),
    r"$\frac{1}$^2",
    "<script>![x](y)",
    "two\nlines|`\u202ecod",
    "l" * 240,
]

DRAWS = True  # names may be what no figure can hold


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A folder SPLIT/CLASS/NAME.mp4: every class has two videos to train with and one to test."""
    folder = tmp_path_factory.mktemp("videos")
    for i, name in enumerate(NAMES):
        for number, split in enumerate(("train", "train", "test")):
            path = folder / split / name / f"{number}{NAMES[i - 1]}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, draw_motion([*MOTIONS][i % 4], i, number, 16, 32))
    return folder


def all_clean(capsys, out: Path, csv_file: bool = True) -> None:
    """Nothing printed, no card and no cell of a csv steers anything."""
    printed = capsys.readouterr()
    for line in (printed.out + printed.err).split("\n"):
        assert not steers(line.replace("\r", "").replace("\t", "")), repr(line)
    if not csv_file:
        return
    text = (out / "CARD.md").read_text(encoding="utf-8")
    assert not steers(text.replace("\n", "")) and "<script" not in text.replace("\\<", "")
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [c for c in cells if re.match(r"\s*[=+@]", c) or steers(c)]
    assert {Path(source).parent.name for source in read_predictions(out)} == set(NAMES)
    assert (out / "confusion.png").is_file()


def test_names_in_a_data_set(videos, tiny_pair, tiny_backbone, tmp_path, capsys):
    about = {"data": str(videos), "num_clips": 1, "num_workers": 0, "precision": "fp32"}
    out = {name: tmp_path / name for name in ("zero", "found", "probe", "tuned", "table")}
    zero_shot.main(configure(zero_shot.Config, str(tiny_pair), out=str(out["zero"]), **about))
    all_clean(capsys, out["zero"])
    assert set(json.loads((out["zero"] / "results.json").read_text())["per_class"]) == set(NAMES)

    query = f"{NAMES[0]}{NAMES[3]}{NAMES[4]}{NAMES[6]}"
    retrieval.main(
        configure(retrieval.Config, str(tiny_pair), query=query, out=str(out["found"]), **about)
    )
    all_clean(capsys, out["found"], False)
    assert json.loads((out["found"] / "search.json").read_text())["query"] == query
    assert (out["found"] / "contact_sheet.png").is_file()

    linear_probe.main(
        configure(
            linear_probe.Config, str(tiny_backbone), out=str(out["probe"]), attentive="off", **about
        )
    )
    all_clean(capsys, out["probe"])

    finetune.main(
        configure(finetune.Config,
            preset="test", model="frame_early", network="test_resnet", frames=3, stride=4, size=32,
            steps=2, batch_size=4, micro_batch=4, threads=1, log_seconds=0.0, out=str(out["tuned"]),
            val="off", **about,
        )
    )  # fmt: skip
    all_clean(capsys, out["tuned"])
    assert json.loads((out["tuned"] / "backbone" / "config.json").read_text())

    (videos / "test" / NAMES[0] / f"{NAMES[0]}.mp4").write_text("no video")
    answers = predict.main(
        configure(predict.Config,
            str(out["tuned"] / "backbone"), (str(videos / "test"),), out=str(tmp_path / "said"),
            num_workers=0, num_clips=1, precision="fp32",
        )
    )  # fmt: skip
    all_clean(capsys, tmp_path, False)
    assert len(answers) == len(NAMES) and {a["label"] for r in answers.values() for a in r} <= set(
        NAMES
    )
    assert len(json.loads((tmp_path / "said" / "refused.json").read_text())) == 1

    (tmp_path / NAMES[5].replace("/", "")).symlink_to(out["tuned"])
    given = (str(tmp_path / NAMES[5].replace("/", "")), str(out["tuned"]))
    compare.main(
        configure(compare.Config, str(videos), models="", results=given, out=str(out["table"]))
    )
    all_clean(capsys, tmp_path, False)
    for name in ("compare.md", "compare.html"):
        text = (out["table"] / name).read_text(encoding="utf-8")
        assert "<script" not in text.replace("\\<", "") and not steers(text.replace("\n", ""))


@pytest.mark.parametrize("name", [NAMES[i] for i in (0, 3, 4, 7)])
def test_names_of_one_video(name, videos, tiny_pair, tmp_path, capsys, monkeypatch):
    """The result's folder is called after the video, and the classes come from a file."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"{name}.mp4"
    path.symlink_to(next((videos / "train" / NAMES[1]).iterdir()))
    classes = [c for c in NAMES if "\n" not in c and "\udcff" not in c and "," not in c]
    (tmp_path / "classes.txt").write_text("\n".join(classes), encoding="utf-8")
    result = zero_shot.main(
        configure(zero_shot.Config,
            str(tiny_pair), video=str(path), classes="classes.txt", num_clips=1, num_workers=0,
            precision="fp32", templates="plain",
        )
    )  # fmt: skip
    all_clean(capsys, tmp_path, False)
    (out,) = (tmp_path / "runs").iterdir()
    assert not steers(out.name) and len(os.fsencode(out.name)) < 120
    assert json.loads((out / "prediction.json").read_text()) == result
    assert result["video"] == str(path) and {r["class"] for r in result["ranking"]} == set(classes)
    assert (out / "filmstrip.png").is_file()


def test_a_picture_that_fails_costs_no_answer(
    videos, tiny_pair, tiny_backbone, tmp_path, monkeypatch, capsys
):
    from matplotlib.figure import Figure

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    about = {"data": str(videos), "num_clips": 1, "num_workers": 0, "precision": "fp32"}
    zero_shot.main(configure(zero_shot.Config, str(tiny_pair), out=str(tmp_path / "zero"), **about))
    retrieval.main(
        configure(retrieval.Config, str(tiny_pair), query="a", out=str(tmp_path / "found"), **about)
    )
    path = next((videos / "train" / NAMES[1]).iterdir())
    visualize.main(visualize.Config(str(tiny_backbone), str(path), out=str(tmp_path / "seen")))
    for name in ("zero/predictions.csv", "zero/CARD.md", "found/search.json", "seen/attention.gif"):
        assert (tmp_path / name).is_file()
    said = capsys.readouterr()
    for name in ("confusion.png", "contact_sheet.png", "attention.png"):
        assert f"{name}: OSError: [Errno 28] No space" in said.err
        assert f"/{name}" not in said.out
