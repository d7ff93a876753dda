"""What is written beside a number."""

import csv

import numpy as np
from PIL import Image

from downstream.report import confusion_figure, software, write_card, write_predictions


def test_predictions_are_in_order_of_score(tmp_path):
    classes = ["a", "b", "c", "d", "e", "f"]
    scores = np.array([[0.1, 0.3, 0.05, 0.25, 0.2, 0.1], [0.9, 0.1, 0, 0, 0, 0]])
    write_predictions(tmp_path / "p.csv", ["x, y.mp4", "z.mp4"], ["b", "f"], scores, classes)
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert first["source"] == "x, y.mp4" and (first["label"], first["predicted"]) == ("b", "b")
    assert first["top5"] == "b|d|e|a|f" and first["top5_scores"].startswith("0.3000|0.2500|")
    assert (second["label"], second["predicted"]) == ("f", "a")


def test_card_shows_notes_first_and_every_value(tmp_path):
    card = {"views": {"num_clips": 2, "subjects": None}, "linear": {"C": {"1": 0.5}, "l": [1, 2]}}
    write_card(tmp_path / "c.md", "Title", ["mind this"], card)
    lines = (tmp_path / "c.md").read_text().splitlines()
    assert lines[:3] == ["# Title", "", "> mind this"]
    for line in ("## Views", "- num clips: 2", "- subjects: unknown", "- C: 1=0.5", "- l: 1, 2"):
        assert line in lines


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


def test_software_names_versions():
    assert {"commit", "python", "torch", "scikit-learn"} <= software().keys()
