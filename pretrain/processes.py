"""Processes: launch checks, devices, and stopping at a signal without losing work."""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator

from pretrain.data.pool import usable_cores
from pretrain.device import autocast_dtype, keep_memory, use_exact_onednn
from pretrain.environment import count_of, flag_of
from pretrain.settings import Machine


def asked_processes() -> int:
    """The number of processes that the launcher was asked for, as far as it can be known.

    Under torchrun that is WORLD_SIZE. `accelerate launch --cpu --num_processes 2` sets nothing and
    silently starts a single process, so there the launcher's own command line is read.
    """
    if "WORLD_SIZE" in os.environ:
        return count_of("WORLD_SIZE")
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    try:
        words = parent.read_bytes().decode(errors="replace").split("\0")
    except OSError:  # not Linux, or the parent is gone: nothing to learn
        return 1
    if not any("accelerate" in word for word in words[:3]):
        return 1
    for i, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes"):
            value = value or words[i + 1]
            return int(value) if re.fullmatch("[0-9]{1,9}", value) else 1
    return 1


def is_first() -> bool:
    """Whether this is the main process of its launch, known before `start_accelerator`.

    Data are packed in between, and the process group would not wait that long.
    """
    return os.environ.get("RANK", "0") == "0"


def start_accelerator(machine: Machine) -> Accelerator:
    """Join the process group: on the GPU if there is one and nobody chose the CPU, else with gloo.

    `accelerate launch` silently sets one CPU thread, however many cores there are; so the number is
    that of `machine`, or all cores. Without a launcher OMP_NUM_THREADS is somebody's wish, and
    stands in for a missing --threads.

    Raises:
        ValueError: several processes were asked for and this one would train alone, or there are
            more processes than GPUs.
    """
    on_gpu, alone = computes_on_gpu(), not launched()
    here = count_of("LOCAL_WORLD_SIZE")
    if on_gpu and here > torch.cuda.device_count():
        raise ValueError(
            f"{here} processes need a GPU each and there are {torch.cuda.device_count()}: give "
            "--num_processes to `accelerate launch`, or put CUDA_VISIBLE_DEVICES= before it to "
            "stay on the CPU"
        )
    dtype = autocast_dtype(torch.device("cuda" if on_gpu else "cpu"), machine.precision)
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision="bf16" if dtype else "no")
    asked = asked_processes()
    if asked != accelerator.num_processes:
        raise ValueError(
            f"{asked} processes were asked for and this one would train alone: on CPU launch with "
            "`accelerate launch --config_file launch/cpu_2.yaml`, on GPUs with launch/gpus.yaml"
        )
    if on_gpu and accelerator.num_processes == 1 and torch.cuda.device_count() > 1:
        print(
            f"note: one of {torch.cuda.device_count()} GPUs is used; `accelerate launch` with "
            "launch/gpus.yaml uses them all",
            file=sys.stderr,
            flush=True,
        )
    if not on_gpu:
        keep_memory()
        use_exact_onednn()
        if machine.threads or not (alone and os.environ.get("OMP_NUM_THREADS")):
            torch.set_num_threads(machine.threads or cores_of_a_process())
    return accelerator


def launched() -> bool:
    """Whether a launcher started this process: torchrun, `accelerate launch` or DeepSpeed."""
    marks = "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_DYNAMO_BACKEND"
    return any(name in os.environ for name in marks)


def cores_of_a_process() -> int:
    """The cores that this process may use, its part of those of the launch on this machine."""
    beside = count_of("LOCAL_WORLD_SIZE")
    return max(1, usable_cores() // beside)


def loader_workers(machine: Machine, on_cpu: int) -> int:
    """The number of data-loading processes of this process.

    Args:
        machine: its `num_workers` if it is given; else up to 8 beside a GPU.
        on_cpu: else the number where the CPU trains, whose cores are all busy already.
    """
    if machine.num_workers is not None:
        return machine.num_workers
    return min(8, cores_of_a_process() - 1) if computes_on_gpu() else on_cpu


def computes_on_gpu() -> bool:
    """Whether there is a GPU and nobody chose the CPU, as `--cpu` and launch/cpu.yaml do."""
    return not flag_of("ACCELERATE_USE_CPU") and torch.cuda.is_available()


def start_evaluation(machine: Machine) -> torch.device:
    """The device on which a recipe of one process evaluates: the GPU if there is one, else the CPU.

    On the CPU, the threads of `machine` are set.

    Raises:
        ValueError: a launcher started several processes.
    """
    if count_of("WORLD_SIZE") > 1:
        raise ValueError("this runs in one process: start it with python, not with a launcher")
    if torch.cuda.is_available():
        return torch.device("cuda")
    use_exact_onednn()
    if machine.threads:
        torch.set_num_threads(machine.threads)
    return torch.device("cpu")


SHARE = 8  # items of a batch that is scored: few, so that few items too are shared out


def sum_of_shares(
    accelerator: Accelerator, count: int, work: Callable[[list[np.ndarray]], np.ndarray]
) -> np.ndarray:
    """Share out items to be scored among all processes; every process gets the sum of the work.

    Batches of `SHARE` items are dealt out in turn. They are the same for any number of processes,
    and so is the result, to the bit where each process fills rows of its own in an array of zeros.

    Args:
        accelerator: the processes; all have to take part.
        count: the number of items.
        work: takes the batches of this process, which are arrays of item numbers and may be none;
            its result has one shape and type in all processes.

    Raises:
        ValueError: `work` raised it in some process; all raise it, and nobody waits for that one.
        RuntimeError: it raised something else in another process.
    """
    turns = accelerator.num_processes
    batches = [np.arange(i, min(i + SHARE, count)) for i in range(0, count, SHARE)]
    mine = batches[accelerator.process_index :: turns]
    if turns == 1:
        return work(mine)
    found, error = None, None
    try:
        found = work(mine)
    except Exception as problem:  # raised again, once the others know
        error = problem
    _fail_together(accelerator, error)
    total = torch.from_numpy(found).to(accelerator.device)
    dist.all_reduce(total)
    return total.cpu().numpy()


def _fail_together(accelerator: Accelerator, error: Exception | None) -> None:
    """Raise the error of a process in all of them; every process has to call this."""
    words = (str(error) or repr(error)).encode() if error else b""
    told = torch.zeros(accelerator.num_processes, 2, dtype=torch.int64)
    told[accelerator.process_index] = torch.tensor([len(words), isinstance(error, ValueError)])
    told = told.to(accelerator.device)
    dist.all_reduce(told)
    failed = told[:, 0].nonzero().flatten().tolist()
    if not failed:
        return
    length, foreseen = told[failed[0]].tolist()
    text = torch.zeros(length, dtype=torch.uint8)
    if accelerator.process_index == failed[0]:
        text = torch.tensor(list(words), dtype=torch.uint8)
    text = text.to(accelerator.device)
    dist.broadcast(text, failed[0])
    if error:
        raise error
    message = bytes(text.tolist()).decode(errors="replace")
    raise ValueError(message) if foreseen else RuntimeError(f"process {failed[0]}: {message}")


class StopFlag:
    """Inside `with`, notes SIGTERM and SIGINT, so that the loop saves at the end of its step.

    A second signal of the same kind acts at once.

    Attributes:
        signal: the number of the signal that came, 0 before; SIGPIPE where `say` failed.
    """

    def __init__(self):
        self.signal = 0
        self._before = {}

    def __enter__(self) -> "StopFlag":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def leave(self, step: int, first: bool, lost: str) -> NoReturn:
        """End a process of a run that was stopped and saved.

        Args:
            step: the last one.
            first: whether to say so.
            lost: the error of this process that stopped the run, in words; "": none.

        Raises:
            ValueError: there was one.
        """
        if first:
            self.say(f"stopped after step {step}, saved; the same command continues from there")
        if lost:
            raise ValueError(lost)
        sys.exit(128 + (self.signal or signal.SIGTERM))

    def say(self, line: str) -> None:
        """Print a line on standard output; a run that can print no more is saved and ends.

        It is `tee` that Ctrl-C ended, too, or a full disk.
        """
        try:
            print(line, flush=True)
        except OSError as error:
            if not self.signal:
                self.signal = signal.SIGPIPE
                _warn(f"standard output takes no more ({error.strerror}): saving ...")

    def _note(self, number: int, _) -> None:
        self.signal = number
        signal.signal(number, self._before[number])
        _warn(f"\n{signal.Signals(number).name}: saving at the end of this step ...")


def _warn(line: str) -> None:
    """Print a line on standard error, if that can be written."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
