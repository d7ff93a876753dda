"""What fine-tuning asks of a task, of both there are."""

from types import SimpleNamespace

import numpy as np
import pytest

from downstream.segments import UNLABELLED
from downstream.tasks import Clips, Frames, LabelOfView

NUMBERS = ["down", "up"]


def record(label: str | None, segments: str = "") -> dict:
    extra = {"segments": segments} if segments else {}
    about = {"source": f"{label}{segments}", "subject": None, "split": "train", "extra": extra}
    return about | {"label": label, "frames": 4, "fps": 2.0, "start": 0.0}


def a_pack(*records: dict) -> SimpleNamespace:
    return SimpleNamespace(
        name="DATA", where=lambda **_: "DATA", records=lambda: iter(records),
        record=lambda i: records[i], near_duplicates=lambda: None
    )  # fmt: skip


@pytest.mark.parametrize(
    "task, row, labels",
    [
        (Clips(), record("up"), 1),
        (Frames(), record("up"), [1, 1]),
        (Frames(), record(None, "0-1 up; 1.5-2 down"), [1, UNLABELLED]),
    ],
)
def test_a_view_has_the_labels_of_its_task(task, row, labels):
    view = LabelOfView(task, NUMBERS)
    found = view(np.random.default_rng(0), row, np.array([1, 2]))
    assert found["labels"].tolist() == labels


def test_classes_and_their_numbers_are_of_videos_or_of_frames():
    test = [row | {"split": "test"} for row in (record("up"), record("down", "0-0.5 down"))]
    pack = a_pack(record("up"), record("down"), record("up", "0-1 up; 1-1.5 down"), *test)
    for task, counts, said in ((Clips(), [1, 2], 0), (Frames(), [5, 6], 0)):
        train, tested, classes, notes = task.split(pack, "train", "test", 0)
        assert (len(train), len(tested), classes) == (3, 2, NUMBERS)
        assert task.counts(pack, train, classes).tolist() == counts
        assert len([note for note in notes if "no segments" in note]) == said
    *_, notes = Frames().split(a_pack(record("up"), record("down"), *test), "train", "test", 0)
    assert any("no segments" in note for note in notes)
