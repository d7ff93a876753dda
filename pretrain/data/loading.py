"""Batches of clips, loaded by other processes if asked, for one process of a launch."""

import contextlib
import copy
import itertools
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from pretrain.data.remote import ReadAhead, Unreachable
from pretrain.data.samples import EvalClips, Mixture, TrainClips

Batch = TypeVar("Batch")


class Positions:
    """The positions that one process reads, micro-batch by micro-batch.

    The global batch of step s is positions [s G, (s + 1) G) whatever the number of processes and of
    accumulation passes; pass a of process r takes the r-th part of the a-th part of it.

    Args:
        start_step: the first step to read for.
        num_steps: the step to stop before.
        batch: positions in one micro-batch of one process.
        accumulate: micro-batches in a step.
        world: number of processes.
        rank: this process.
        lane: of a position, where it lies among the sub-lists of an epoch that is streamed: the
            process then takes its part of the global batch in that order, so that it reads few of
            the sub-lists; None: nothing is streamed.
    """

    def __init__(
        self, start_step: int, num_steps: int, batch: int, accumulate: int, world: int, rank: int,
        lane: Callable[[int], float] | None = None,
    ):  # fmt: skip
        self.steps = range(start_step, num_steps)
        self.batch, self.accumulate, self.world, self.rank = batch, accumulate, world, rank
        self.lane = lane

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            if self.lane:
                own = self.batch * self.accumulate
                whole = range(step * own * self.world, (step + 1) * own * self.world)
                mine = sorted(whole, key=self.lane)[self.rank * own : (self.rank + 1) * own]
                yield from (mine[i : i + self.batch] for i in range(0, own, self.batch))
                continue
            for a in range(self.accumulate):
                part = (step * self.accumulate + a) * self.world + self.rank
                yield list(range(part * self.batch, (part + 1) * self.batch))

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate


def collate_views(items: list[dict]) -> dict:
    """Stack training items: views of a clip become neighbouring rows, `clips` says whose."""
    names = [name for name, value in items[0].items() if isinstance(value, Tensor)]
    batch: dict[str, Any] = {name: torch.cat([item[name] for item in items]) for name in names}
    batch["samples"] = [item["sample"] for item in items]
    views = len(items[0][names[0]])  # every tensor of an item has one row a view
    batch["clips"] = torch.tensor(batch["samples"]).repeat_interleave(views)
    batch["errors"] = [error for item in items for error in item["errors"]]
    if get_worker_info():
        # Where the others see it, as torch's own collation does: left to the thread that sends it,
        # a failure would lose the batch, and who waits for it would wait for ever.
        for name in [*names, "clips"]:
            batch[name].share_memory_()
    return batch


def start_worker(_: int) -> None:
    """Let signals be the main process's business: it saves a checkpoint, workers just go on."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


class WorkerKilled(ValueError):
    """A process that decodes clips was killed; the message says how and what to do."""


class NoSharedMemory(WorkerKilled):
    """A process that decodes clips can hand none over; the message says why and what to do."""


def _start(loader: DataLoader) -> Iterator:
    """Start the processes of a loader, if it has any."""
    batches = iter(loader)
    if loader.num_workers and threading.current_thread() is threading.main_thread():
        # torch's handler raises as soon as a worker dies, in the middle of a step or of a save.
        # Without it, the next batch that is waited for says so.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches


def _next(batches: Iterator[Batch]) -> Batch:
    """The next batch of what `_start` returned.

    Raises:
        NoSharedMemory: one of its processes finds no room in the memory that it shares with this
            one.
        Unreachable: clips far away cannot be had.
        WorkerKilled: one of its processes is dead.
    """
    try:
        return next(batches)
    except Unreachable as error:  # of another process, whose traceback is no help
        raise Unreachable(str(error).strip().rpartition("Unreachable: ")[2]) from error
    except (RuntimeError, OSError, EOFError) as error:
        if full := re.search(r"</?torch_\w+>.*: ([^:\n]+) \(\d+\)", str(error)):
            raise NoSharedMemory(
                f"the memory that decoding processes share (/dev/shm) takes no batch: {full[1]}. "
                "Give --num-workers 0 or a smaller --batch-size, or make it larger (a container: "
                "--shm-size), and start the same command again"
            ) from error
        workers = getattr(batches, "_workers", [])
        deadline = time.monotonic() + 1  # a pipe breaks before its process is known to have ended
        while (
            not (ends := [w.exitcode for w in workers if w.exitcode])
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        if not ends:
            raise
        how = signal.Signals(-ends[0]).name if ends[0] < 0 else f"exit status {ends[0]}"
        raise WorkerKilled(
            f"a process that decodes clips was killed ({how}); most often the machine ran out of "
            "memory. Give fewer --num-workers (0: none) or make memory free, and start the same "
            "command again"
        ) from error


class TrainBatches:
    """The batches of the whole rest of a run, as `collate_views` makes them.

    If a process that loads them is killed, another one takes over, once, so that the step at hand
    can be ended and saved; this process itself, if there is no room for handing them over.

    Attributes:
        lost: that it happened, or that data far away cannot be had, in words; empty before.
        waited: seconds spent in waiting for batches.
        errors: clips of the batches given that could not be decoded, and were replaced.
    """

    def __init__(self, dataset: TrainClips | Mixture, positions: Positions, num_workers: int):
        self.lost, self.waited = "", 0.0
        self.errors: list[dict[str, str]] = []
        self._positions, self._given, self._num_workers = positions, 0, num_workers
        self._loader = partial(
            DataLoader,
            dataset,
            collate_fn=collate_views,
            worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
        )
        prefetch = 4 if num_workers else None
        self._batches = _start(
            self._loader(batch_sampler=positions, num_workers=num_workers, prefetch_factor=prefetch)
        )
        # Behind the processes: while they were forked there were no threads.
        streamed = isinstance(dataset, TrainClips | Mixture) and dataset.streamed
        self._ahead = ReadAhead(map(_apart(dataset).needs, positions)) if streamed else None
        self._waiting: deque[dict] = deque()

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> dict:
        batch = self._waiting.popleft() if self._waiting else self._load()
        self.errors += batch.pop("errors")
        return batch

    def look_ahead(self, count: int) -> None:
        """Have so many batches, those of the next step, here before they are asked for.

        Only where clips come from far away: the step at hand can then still be saved if the next
        one cannot be taken, which `lost` says.
        """
        if not self._ahead or self.lost:
            return
        try:
            while len(self._waiting) < count:
                self._waiting.append(self._load())
        except Unreachable as error:
            self.lost = str(error)
            told = "data far away cannot be had: saving at the end of this step ..."
            print(told, file=sys.stderr, flush=True)

    def _load(self) -> dict:
        before = time.monotonic()
        try:
            batch = _next(self._batches)
        except WorkerKilled as error:
            if self.lost:
                raise
            self.lost = str(error)
            alone = isinstance(error, NoSharedMemory)
            what = "hands none over" if alone else "was killed"
            told = f"a process that decodes clips {what}: saving at the end of this step ..."
            print(told, file=sys.stderr, flush=True)
            self.close()
            rest = itertools.islice(self._positions, self._given, None)
            workers = 0 if alone else 1
            self._batches = _start(
                self._loader(
                    batch_sampler=rest, num_workers=workers, prefetch_factor=workers or None
                )
            )
            batch = _next(self._batches)
        self.waited += time.monotonic() - before
        self._given += 1
        if self._ahead:
            self._ahead.given = self._given
        return batch

    def close(self) -> None:
        """End the processes, and bring nothing more."""
        if self._ahead:
            self._ahead.close()
        # Said in so many words, because an exception on its way out keeps the iterator alive, and
        # Python would then wait at exit for workers that ignore its SIGTERM.
        if isinstance(self._batches, _MultiProcessingDataLoaderIter):
            self._batches._shutdown_workers()


def _apart(dataset: TrainClips | Mixture) -> TrainClips | Mixture:
    """The same clips, for a thread: the order of an epoch, which is kept, is its own."""
    other = copy.copy(dataset)
    if isinstance(other, Mixture):
        other.parts = [copy.copy(part) for part in other.parts]
    return other


def train_batches(
    dataset: TrainClips | Mixture, positions: Positions, num_workers: int
) -> contextlib.closing[TrainBatches]:
    """Load the batches of the whole rest of a run, inside `with`."""
    return contextlib.closing(TrainBatches(dataset, positions, num_workers))


def eval_loader(
    dataset: EvalClips, batch_size: int, num_workers: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Batches of (sample ids (B,), views {stream: (B, V, C, T, H, W)}) in the order of the ids.

    The global generator is left alone: a score while a model trains changes no later step.

    Raises:
        WorkerKilled: a process that decodes was killed.
    """
    batches = _start(
        DataLoader(
            dataset,
            batch_size=batch_size,
            num_workers=num_workers,
            worker_init_fn=start_worker,
            generator=torch.Generator(),
        )
    )
    with contextlib.suppress(StopIteration):
        while True:
            yield _next(batches)
