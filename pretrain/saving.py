"""Writing a run's checkpoints, between two steps or in the background.

A checkpoint is written to a temporary folder, synced, hashed and renamed, and only then are older
ones removed, so there is a valid one at every moment. Where the model is sharded each process
writes what it holds into that folder; the first makes it, and renames it when all have written.
"""

import copy
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.checkpoint import checkpoints, problem_of
from pretrain.files import sync
from pretrain.folders import remove
from pretrain.names import for_screen
from pretrain.sharded import Part, write_parts
from pretrain.weights import (
    CheckpointError,
    file_of,
    filling,
    seal_folder,
    size_of,
    write_tensors,
)

KEEP = 2  # complete checkpoints that stay
KINDS = ("model", "optimizer")
DIGEST = 32  # bytes of a file's hash


class Saver:
    """Writes the checkpoints of a run; all but the `KEEP` newest that verify are removed.

    A damaged one does not count and is replaced; it is named on the screen.

    Args:
        run: the run's folder.
        group: of the processes of which each writes what it holds. It has to be gloo's, and
            nothing else may use it: a thread does. None: this process writes all.
        background: copy what is to be saved, 12 bytes a parameter with AdamW, and write it in a
            thread while training goes on. There is one save at a time: the next waits for it.
    """

    def __init__(self, run: Path, group: dist.ProcessGroup | None = None, background: bool = False):
        self._root, self._group = run / "checkpoints", group
        self._place = dist.get_rank(group) if group else 0
        self._processes = dist.get_world_size(group) if group else 1
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future | None = None

    def save(self, weights: dict[str, Part], moments: dict[str, Part], state: dict) -> None:
        """Write one checkpoint, or begin to.

        Args:
            weights: what this process has to write of the model's, by name; alone: all, whole.
            moments: the same of what the optimizers remember, by `parameter.key`.
            state: JSON-able; `state["step"]` counts finished optimizer steps, `state["model"]` has
                the model's arguments.

        Raises:
            CheckpointError: this save or the one before failed: the disk is full or not writable,
                or a weight is not finite; the checkpoints that were there are untouched.
            SystemExit: another process failed, and says why.
        """
        self.wait()
        parts = {
            kind: {name: self._on_cpu(part) for name, part in held.items()}
            for kind, held in zip(KINDS, (weights, moments), strict=True)
        }
        if self._thread:
            self._pending = self._thread.submit(self._write, parts, copy.deepcopy(state))
        else:
            self._write(parts, state)

    def check(self) -> None:
        """Raise what `save` does, if a save in the background has failed by now."""
        if self._pending and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save has ended, and raise what `save` does."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _on_cpu(self, part: Part) -> Part:
        values = part.values.detach().to("cpu", copy=self._thread is not None).contiguous()
        return Part(values, part.start, part.shape)

    def _write(self, parts: dict[str, dict[str, Part]], state: dict) -> None:
        final = self._root / f"step-{state['step']:08d}"
        aside = self._root / f"tmp-{final.name}"
        if self._together(partial(self._prepare, aside, final))[0] == b"there":
            return
        try:
            digests = self._together(partial(self._fill, aside, parts))
            self._together(partial(self._finish, aside, final, digests, state))
        except (CheckpointError, SystemExit):
            if self._place == 0:  # no other writes there any more
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _names(self, place: int) -> list[str]:
        """The files of a process."""
        if self._group is None:
            return [f"{kind}.safetensors" for kind in KINDS]
        return [file_of(kind, place, self._processes) for kind in KINDS]

    def _prepare(self, aside: Path, final: Path) -> bytes:
        """Make the folder to write to, in the first process; b"there" where nothing is to do."""
        if self._place:
            return b""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            for leftover in self._root.glob("tmp-*"):  # of a run that was killed while saving
                remove(leftover)
            if os.path.lexists(final) and not problem_of(final):
                return b"there"
            aside.mkdir()
        except OSError as error:
            raise CheckpointError(f"cannot write {self._root}: {error}") from error
        return b""

    def _fill(self, aside: Path, parts: dict[str, dict[str, Part]]) -> bytes:
        """Write the files of this process and return their hashes."""
        for name, part in parts["model"].items():
            if not torch.isfinite(part.values).all():
                raise CheckpointError(f"not saved: {name} holds values that are not finite")
        if not aside.is_dir():
            raise CheckpointError(
                f"not saved: process {self._place} does not find {aside}, which the first one has "
                "made: all machines of a launch have to share a disk that has the run's folder"
            )
        needed = size_of(part.values for held in parts.values() for part in held.values())
        digests = b""
        with filling(aside, needed * self._processes):  # the others write about as much
            for name, held in zip(self._names(self._place), parts.values(), strict=True):
                if self._group is None:
                    tensors = {key: part.values for key, part in held.items()}
                    digest = write_tensors(aside / name, tensors)
                else:
                    digest = write_parts(aside / name, held)
                digests += bytes.fromhex(digest)
        return digests

    def _together(self, work: Callable[[], bytes]) -> list[bytes]:
        """Do this process's part of something, and learn what all others answered.

        Raises:
            CheckpointError: this part failed, or another process is gone.
            SystemExit: another's part failed.
        """
        answer, failed = b"", None
        try:
            answer = work()
        except CheckpointError as error:
            failed = error
        if self._group is None:
            if failed:
                raise failed
            return [answer]
        # Whether it went well, the length of the answer, the answer.
        said = bytes([failed is None, len(answer)]) + answer.ljust(DIGEST * len(KINDS), b"\0")
        mine = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        heard = [torch.empty_like(mine) for _ in range(self._processes)]
        try:
            dist.all_gather(heard, mine, group=self._group)
        except RuntimeError as error:
            raise failed or CheckpointError(
                "not saved: another process has ended meanwhile. What was saved before is intact: "
                "start the same command again"
            ) from error
        if failed:
            raise failed
        answers = [bytes(other.tolist()) for other in heard]
        if not all(other[0] for other in answers):
            sys.exit(2)  # the process that failed says why
        return [other[2 : 2 + other[1]] for other in answers]

    def _finish(self, aside: Path, final: Path, digests: list[bytes], state: dict) -> bytes:
        """Make a checkpoint of what all have written, in the first process."""
        if self._place == 0:
            self._seal(aside, digests, state)
            self._commit(aside, final)
        return b""

    def _seal(self, aside: Path, digests: list[bytes], state: dict) -> None:
        """Write what goes with the files of all processes, given their hashes."""
        hashes = {
            name: both[DIGEST * i : DIGEST * (i + 1)].hex()
            for place, both in enumerate(digests)
            for i, name in enumerate(self._names(place))
        }
        with filling(aside, 0):
            seal_folder(aside, {"state": state}, hashes)

    def _commit(self, aside: Path, final: Path) -> None:
        """Give a checkpoint that is written its name, and remove older ones."""
        try:
            if os.path.lexists(final):
                _warn(f"{problem_of(final)}; it is replaced")
                remove(final)
            os.replace(aside, final)
            sync(self._root)
            whole = 0
            for old in checkpoints(self._root.parent):
                # The new one was hashed while it was written; an older one may be damaged since.
                problem = "" if old == final or whole == KEEP else problem_of(old)
                if problem:
                    _warn(f"{problem}; it is removed")
                if problem or whole == KEEP:
                    remove(old)
                else:
                    whole += 1
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._root}: {error}. What was saved before is intact: mend that "
                "and start the same command again"
            ) from error


def _warn(text: str) -> None:
    print(f"warning: {for_screen(text)}", file=sys.stderr, flush=True)
