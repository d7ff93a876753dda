"""Tasks of a classifier: a label for every video, or one for every frame.

`Task` is all that fine-tuning needs of one. Another task is another class with its methods, chosen
in `task_of`.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from downstream.classifier import Classifier, score, score_frames
from downstream.features import Extraction
from downstream.results import Predictions
from downstream.segments import (
    UNLABELLED,
    classes_of_frames,
    frame_classes,
    labelled_frames,
    segment_scores,
)
from downstream.splits import (
    Videos,
    choose_splits,
    few_shots,
    hold_out,
    refuse_nobody,
    subset,
)
from pretrain.data.cache import how_to_label, raw_sources
from pretrain.data.shards import Pack, no_split, refuse_raw_streams
from pretrain.data.sources import list_sources
from pretrain.names import counted
from pretrain.processes import sum_of_shares
from pretrain.spec import InputSpec


class Task(Protocol):
    """A task.

    Attributes:
        kind: its name in a protocol.
        unit: what is classified.
        per_frame: every frame has a label; else a video has one, so it can be mixed with another,
            seen in several views and drawn by its class.
        pooling: how the predictions of views and clips become one, in words.
    """

    kind: str
    unit: str
    per_frame: bool
    pooling: str

    def split(
        self, pack: Pack, train: str, test: str, seed: int, leave_out: str | None = None
    ) -> tuple[Videos, Videos, list[str], list[str]]:
        """Training and test videos, the classes, and sentences a reader of the result must see.

        Args:
            pack: the data.
            train: the split to learn from.
            test: the split to be scored.
            seed: of a draw.
            leave_out: instead of both: the subject to be scored, after learning from all others.

        Raises:
            ValueError: the splits or labels cannot be used.
        """

    def label(self, record: dict, frames: np.ndarray, numbers: dict[str, int]) -> Tensor:
        """The labels of a view of a clip, () or (T,); `UNLABELLED` where there is none.

        Args:
            record: index entry of the clip.
            frames: (T,) their numbers.
            numbers: class -> number.
        """

    def counts(self, pack: Pack, videos: Videos, classes: list[str]) -> np.ndarray:
        """How often each class occurs (K,)."""

    def predict(
        self, model: Classifier, pack: Pack, videos: Videos, how: Extraction,
        title: str | None = None,
    ) -> Predictions:  # fmt: skip
        """Predictions for videos; those without a label are left out.

        Args:
            model: the classifier.
            pack: where the videos are.
            videos: to predict.
            how: views of a clip, device and precision.
            title: of the progress bar; None: no bar.
        """


class Clips:
    """One label a video."""

    kind, unit, per_frame = "fine-tune", "videos", False
    pooling = "probabilities averaged over the views, then over the clips of a video"

    def split(
        self, pack: Pack, train: str, test: str, seed: int, leave_out: str | None = None
    ) -> tuple[Videos, Videos, list[str], list[str]]:
        """See `Task`."""
        learned, tested, notes = choose_splits(pack, train, test, seed, True, leave_out)
        return learned, tested, sorted({label for label in learned.labels if label}), notes

    def label(self, record: dict, frames: np.ndarray, numbers: dict[str, int]) -> Tensor:
        """See `Task`."""
        return torch.tensor(numbers[record["label"]])

    def counts(self, pack: Pack, videos: Videos, classes: list[str]) -> np.ndarray:
        """See `Task`."""
        return np.bincount(videos.numbers(classes), minlength=len(classes))

    def predict(
        self, model: Classifier, pack: Pack, videos: Videos, how: Extraction,
        title: str | None = None,
    ) -> Predictions:  # fmt: skip
        """See `Task`."""
        scores = score(model, pack, videos, how, title)
        truth = videos.numbers(model.classes)
        return Predictions(
            model.classes, truth, scores.argmax(1), videos.subjects, scores, videos.sources
        )


class Frames:
    """A label for every frame: of the column `segments`, or the clip's own."""

    kind, unit, per_frame = "per-frame", "frames", True
    pooling = "windows of half overlap, probabilities averaged"

    def split(
        self, pack: Pack, train: str, test: str, seed: int, leave_out: str | None = None
    ) -> tuple[Videos, Videos, list[str], list[str]]:
        """See `Task`."""
        learned, tested, notes = choose_splits(pack, train, test, seed, False, leave_out)
        classes = classes_of_frames(pack, learned, tested)
        if not any(pack.record(i)["extra"].get("segments") for i in learned.samples):
            notes.append("the data have no segments: every frame was given its clip's label")
        return learned, tested, classes, notes

    def label(self, record: dict, frames: np.ndarray, numbers: dict[str, int]) -> Tensor:
        """See `Task`."""
        return torch.from_numpy(frame_classes(record, numbers)[frames])

    def counts(self, pack: Pack, videos: Videos, classes: list[str]) -> np.ndarray:
        """See `Task`."""
        numbers = {name: i for i, name in enumerate(classes)}
        frames = np.concatenate([frame_classes(pack.record(i), numbers) for i in videos.samples])
        return np.bincount(frames[frames != UNLABELLED], minlength=len(classes))

    def predict(
        self, model: Classifier, pack: Pack, videos: Videos, how: Extraction,
        title: str | None = None,
    ) -> Predictions:  # fmt: skip
        """See `Task`; with the scores of segments."""
        sequences, subjects = score_frames(model, pack, videos, how.device, how.precision)
        truth, predicted = labelled_frames(sequences)
        more = segment_scores(sequences) if sequences else {}
        named = "videos" if None in videos.subjects else "subjects"
        return Predictions(
            model.classes, truth, predicted, subjects, unit=self.unit, more=more, named=named
        )


def task_of(per_frame: bool) -> Task:
    """The task: a label for every frame, or for every video."""
    return Frames() if per_frame else Clips()


class LabelOfView:
    """The labels of a training view, for `TrainClips`."""

    def __init__(self, task: Task, classes: list[str]):
        self.task, self.numbers = task, {name: i for i, name in enumerate(classes)}

    def __call__(
        self, _: np.random.Generator, record: dict, frames: np.ndarray
    ) -> dict[str, Tensor]:
        """The labels of a view of the clip that shows these frames."""
        return {"labels": self.task.label(record, frames, self.numbers)}


NO_VALIDATION = (
    "--patience needs validation videos: name a split val in the list, or give --val hold-out"
)


def refuse_raw(
    task: Task, source: str, train_split: str, test_split: str,
    validation: Literal["auto", "hold-out", "off"], patience: int | None, spec: InputSpec, who: str,
    leave_out: str | None = None,
) -> None:  # fmt: skip
    """Refuse raw data that cannot be trained on, before they are packed; packed ones pass.

    Args:
        task: whose labels count.
        source: the data, as `open_data` takes them.
        train_split: to learn from.
        test_split: to be scored.
        validation: see `choose_videos`.
        patience: of early stopping.
        spec: the clip that the backbone takes.
        who: what it is called in a message.
        leave_out: see `choose_splits`.

    Raises:
        ValueError: there is nothing of the kind, a split or subject is not there, nothing has a
            label, a stream does not come with it, or there are no validation videos to be patient
            with.
    """
    listed = raw_sources(source, "all")
    if not listed:
        return
    splits = {s.split for s in listed if s.split}
    for name in (train_split, test_split) if splits and leave_out is None else ():
        if name not in splits:
            raise no_split(source, name, splits)
    has = lambda s: s.label is not None or (task.per_frame and s.extra.get("segments"))
    labelled = [s for s in listed if has(s)]
    if not labelled:
        raise ValueError(f"{source}: no video has a label: {how_to_label(list_sources(source))}")
    if leave_out is not None:
        refuse_nobody(source, [s.subject for s in labelled], leave_out)
    if patience and validation == "auto" and (leave_out is not None or "val" not in splits):
        raise ValueError(NO_VALIDATION)
    refuse_raw_streams(listed, spec, source, who)


@dataclass(frozen=True)
class Chosen:
    """The videos of a run.

    Attributes:
        train: to learn from.
        val: for validation; None: there are none.
        test: to be scored.
        classes: names of the classes.
        rule: which are for validation, in words.
        notes: sentences a reader of the result must see.
    """

    train: Videos
    val: Videos | None
    test: Videos
    classes: list[str]
    rule: str
    notes: list[str]

    @property
    def samples(self) -> np.ndarray:
        """The clips of all of them."""
        parts = [self.train, self.test, *([self.val] if self.val else [])]
        return np.concatenate([part.samples for part in parts])


def choose_videos(
    task: Task, pack: Pack, train_split: str, test_split: str, shots: int | None,
    validation: Literal["auto", "hold-out", "off"], patience: int | None, seed: int,
    leave_out: str | None = None,
) -> Chosen:  # fmt: skip
    """Choose training, validation and test videos.

    Args:
        task: whose labels count.
        pack: the data.
        train_split: to learn from.
        test_split: to be scored.
        shots: training videos of each class, drawn; None: all.
        validation: "auto": the split "val" if there is one; "hold-out": about a quarter of the
            training videos, subjects apart; "off".
        patience: of early stopping, which needs validation videos.
        seed: of both draws.
        leave_out: see `choose_splits`; there is no split "val" then.

    Raises:
        ValueError: the splits or labels cannot be used.
    """
    train, test, classes, notes = task.split(pack, train_split, test_split, seed, leave_out)
    if shots:
        if None in train.labels:
            raise ValueError("--shots counts videos of a class, and these videos have several")
        keep = few_shots(train.known_labels, shots, seed)
        notes.append(
            f"{shots} training videos of each class, drawn with seed {seed}: {keep.sum()} of "
            f"{len(train)}"
        )
        train = subset(train, keep)
    val, rule = None, "none: the exported weights are the last ones"
    if validation == "hold-out":
        if None in train.labels:
            raise ValueError(
                "--val hold-out needs a label for every video; name a split val in the list"
            )
        held, how = hold_out(train, seed)
        if not held.any():
            raise ValueError(f"--val hold-out: nothing can be held out, {how}")
        rule = f"{counted(held.sum(), 'training video')}, {how}"
        train, val = subset(train, ~held), subset(train, held)
    elif (
        validation == "auto"
        and leave_out is None
        and "val" in pack.index["splits"]
        and "val" not in (train_split, test_split)
    ):
        _, val, _, more = task.split(pack, train_split, "val", seed)
        rule = f"the split val, {counted(len(val), 'video')}"
        notes += [n for n in more if n not in notes]
    if patience and val is None:
        raise ValueError(NO_VALIDATION)
    return Chosen(train, val, test, classes, rule, notes)


def validate(
    task: Task,
    model: Classifier,
    pack: Pack,
    val: Videos,
    batch_size: int,
    precision: str,
    accelerator: Accelerator,
) -> float:
    """Top-1 accuracy on validation videos (or their frames), one view each.

    Every process takes a share.

    Args:
        task: whose labels count.
        model: the classifier.
        pack: where the videos are.
        val: the validation videos.
        batch_size: views in one forward pass.
        precision: see `pretrain.device.autocast_dtype`.
        accelerator: device and processes; all have to take part.

    Raises:
        ValueError: a clip cannot be decoded; in all processes.
    """
    how = Extraction(1, 1, 1, batch_size, 0, accelerator.device, precision)
    everyone = np.arange(len(val))

    def count(batches: list[np.ndarray]) -> np.ndarray:
        counts = np.zeros(2, np.int64)
        for batch in batches:
            said = task.predict(model, pack, subset(val, np.isin(everyone, batch)), how)
            counts += (said.truth == said.predicted).sum(), len(said.truth)
        return counts

    correct, total = sum_of_shares(accelerator, len(val), count).tolist()
    return correct / max(total, 1)
