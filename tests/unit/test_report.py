"""What is written beside a number."""

import csv
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from downstream import report
from downstream.report import confusion_figure, write_predictions
from pretrain.log import clips_figure, curve_figure


def test_predictions_are_in_order_of_score(tmp_path):
    classes = ["a", "b", "c", "d", "e", "f"]
    scores = np.array([[0.1, 0.3, 0.05, 0.25, 0.2, 0.1], [0.9, 0.1, 0, 0, 0, 0]])
    write_predictions(tmp_path / "p.csv", ["x, y.mp4", "z.mp4"], ["b", "f"], scores, classes)
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert first["source"] == "x, y.mp4" and (first["label"], first["predicted"]) == ("b", "b")
    assert first["top5"] == "b|d|e|a|f" and first["top5_scores"].startswith("0.3000|0.2500|")
    assert (second["label"], second["predicted"]) == ("f", "a")


def test_confusion_figure_is_dark_where_videos_are(tmp_path):
    counts = np.array([[0, 9, 0], [0, 0, 0], [0, 9, 0]])
    confusion_figure(tmp_path / "f.png", counts, ["a", "b", "c" * 40], "title")
    with Image.open(tmp_path / "f.png") as picture:
        dark = np.asarray(picture.convert("RGB")).astype(int)[:, : picture.width * 7 // 10]
    blue = (dark[..., 2] > 80) & (dark[..., 0] < 30)  # the darkest of the colour map
    columns, rows = np.flatnonzero(blue.any(0)), np.flatnonzero(blue.any(1))
    # One column of cells, in the first and the last row of three.
    assert np.ptp(columns) < 1.2 * np.ptp(rows) / 3
    assert (np.diff(rows) > 20).sum() == 1


PICTURES = np.zeros((4, 8, 8, 3), np.uint8)
SECONDS = np.arange(4) / 2
LONG = "a title that is far too long for the width of any figure here, " * 3


def a_log(folder):
    lines = [
        {"step": i, "loss": 1 / i, "knn": 0.3 + i / 50, "knn_chance": 0.125} for i in range(1, 9)
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "log.jsonl"


# What is drawn, and words that have to be readable in it.
DRAWN = {
    "confusion": (
        lambda p, _: confusion_figure(
            p, np.array([[3, 1], [0, 4]]), ["a", "b"], "probe of M on D", "frames"),
        ["probe of M on D", "8 frames", "75 %", "per cent of the true class",
         "true (number of frames)"],
    ),
    "confusion of long names": (
        lambda p, _: confusion_figure(p, np.eye(2, dtype=int), [f"{i} {LONG}" for i in range(2)],
                                      LONG),
        ["a title that is", "predicted", "100 %"],
    ),
    "filmstrip": (
        lambda p, _: report.filmstrip_figure(
            p, [(0.5, PICTURES[0])] * 4, ["a"], np.array([1.0]), "c.mp4, by M"),
        ["c.mp4, by M", "0.5 s", "100 %", "per cent"],
    ),
    "contact sheet": (
        lambda p, _: report.contact_sheet_figure(
            p, [("similarity 0.3, c.mp4", PICTURES, SECONDS)], "q, by M"),
        ["q, by M", "similarity 0.3", "0.5 s", "1.5 s"],
    ),
    "timeline": (
        lambda p, _: report.timeline_figure(
            p, [("c.mp4", [{"start": 0, "end": 1, "label": "a"}])], ["a"], "1 video, by M"),
        ["1 video, by M", "c.mp4", "seconds"],
    ),
    "cost": (
        lambda p, _: report.cost_figure(
            p, [("lstm", 1e9, 0.5, 0.4, 0.6)] * 12, 0.125, "on D, 9 test videos"),
        ["on D, 9 test videos", "chance", "12.5 %", "lstm", "GFLOPs", "per cent"],
    ),
    "growth": (
        lambda p, _: report.growth_figure(
            p, (8, 16), {"m": {"gflops": [1, 2], "mib": [1, 2], "clips_per_s": [2, 1]}},
            "a step on CPU"),
        ["a step on CPU", "GFLOPs", "MiB", "clips a second", "frames", "m"],
    ),
    "curve": (
        lambda p, folder: curve_figure(p, a_log(folder), ("loss",), ("knn",), "M on D, 9 clips"),
        ["M on D, 9 clips", "step", "loss", "per cent", "chance", "12.5 %"],
    ),
    "attention": (
        lambda p, _: clips_figure(
            p, [("clip", PICTURES)], SECONDS, "M on c.mp4", "red",
            ("share of it", [(0, 0, 0), (1, 0, 0)], (0.25, 0.75)), 8,
            ("of the time", np.array([0.2, 0.8]))),
        ["M on c.mp4", "frame 1, 0.50 s", "share of it", "red", "of the time", "0.6"],
    ),
    "long": (
        lambda p, _: clips_figure(p, [("clip", PICTURES)], SECONDS, LONG, LONG),
        ["a title that is"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_figures_say_what_they_show(name, tmp_path, monkeypatch):
    """Names, units, seconds; legends, and the name of chance, off the curves; nothing beyond the
    edge.
    """
    draw, words = DRAWN[name]
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k)
    )
    assert draw(tmp_path / "f.png", tmp_path) == str(tmp_path / "f.png")
    (figure,) = figures
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    said = "\n".join(t.get_text() for t in texts)
    assert not [w for w in words if w not in said]
    drawn = [axes.get_window_extent() for axes in figure.axes if axes.lines]
    apart = [t.get_window_extent() for t in texts if "chance" in t.get_text()]
    apart += [legend.get_window_extent() for legend in figure.legends]
    assert not [box for box in apart if any(box.overlaps(area) for area in drawn)]
    assert not [axes for axes in figure.axes if axes.get_legend()]
    with Image.open(tmp_path / "f.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    edges = (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:])
    assert all((edge == 255).all() for edge in edges)


def test_curves_are_named_in_words_and_steps_are_whole(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k)
    )
    names = ("video_to_text", "text_to_video", "val_t2v_r1", "val_t2v_r10", "knn")
    for last in (1, 2, 3, 5, 7):
        steps = range(1, last + 1)
        lines = [{"step": i, "loss": 1.0, **dict.fromkeys(names, 0.5)} for i in steps]
        (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        curve_figure(tmp_path / "f.png", tmp_path / "log.jsonl", ("loss",), names, "M")
        ticks = figures[-1].axes[0].get_xticklabels()
        assert not [t.get_text() for t in ticks if "." in t.get_text()]
        (legend,) = figures[-1].legends
        assert legend.get_window_extent().x0 >= 0
        said = "\n".join(text.get_text() for text in legend.get_texts())
        assert "text to video R@10" in said and "t2v" not in said and "knn" not in said


def test_chance_is_named_in_the_legend_of_a_curve(tmp_path, monkeypatch):
    """Not far off at the right, beyond the axis."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k)
    )
    curve_figure(tmp_path / "f.png", a_log(tmp_path), ("loss",), ("knn",), "M")
    (legend,) = figures[0].legends
    assert any("chance 12.5 %" in text.get_text() for text in legend.get_texts())
