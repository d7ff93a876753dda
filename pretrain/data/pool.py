"""A pool of worker processes that may hang, crash or eat memory without harm to the others.

A worker is a program that reads one job a line (JSON) and writes one message a line: `ready` once,
`beat` while it makes progress, then an answer. It is a plain subprocess, not a fork and not a
multiprocessing spawn: those would bring torch, or the caller's script, into every decoder.
"""

import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

INGEST = (sys.executable, "-P", "-m", "pretrain.data.ingest")
ACQUIRE = (sys.executable, "-P", "-m", "pretrain.data.acquire")
START_SECONDS = 120.0  # a cold start from a slow network disk


def usable_cores() -> int:
    """Cores this process may run on; fewer than the machine's where it was confined to some."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Worker:
    """One process and the thread that listens to it."""

    def __init__(self, command: tuple[str, ...], messages: queue.SimpleQueue):
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=worker_environment(),
                text=True,
            )
        except OSError as error:
            raise ValueError(
                f"cannot start a decoding process: {error.strerror}; give fewer --workers"
            ) from error
        self.job: int | None = None
        self.ready = False
        self.heard = self.began = time.monotonic()
        threading.Thread(target=self._listen, args=(messages,), daemon=True).start()

    def _listen(self, messages: queue.SimpleQueue) -> None:
        assert self.process.stdout is not None  # a pipe
        for line in self.process.stdout:
            try:
                messages.put((self, json.loads(line)))
            except ValueError:
                break  # a line cut off by a crash
        messages.put((self, None))

    def give(self, number: int, job: dict) -> None:
        """Send a job, of this number."""
        assert self.process.stdin is not None  # a pipe
        self.job = number
        self.heard = self.began = time.monotonic()
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: its listener hears that too, and answers "decoder died"

    def stop(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()


def worker_environment() -> dict[str, str]:
    """Ours, so that the worker finds this package, and with no threads beside those of the pool."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def run_jobs(
    jobs: list[dict],
    workers: int,
    timeout: float,
    command: tuple[str, ...] = INGEST,
    limits: list[float] | None = None,
    at_work: Callable[[dict[int, float]], None] = lambda seconds: None,
) -> Generator[tuple[int, dict], None, None]:
    """Run every job once, whatever becomes of the process that runs it.

    Args:
        jobs: what to send, one JSON object a job.
        workers: how many processes.
        timeout: seconds without a sign of progress before a worker is killed.
        command: the worker program.
        limits: seconds that each job may take in all, however lively its worker is; None for no
            limit.
        at_work: called about once a second with the jobs at work and their seconds so far.

    Yields:
        (number of the job, answer), in the order in which they finish. Where the worker had to be
        killed, or died, the answer is {"refused": reason, "retry": True}; after its whole time it
        is {"refused": reason, "seconds": that time}.

    Raises:
        RuntimeError: the worker program does not start.
        ValueError: the machine has no room for another process.
    """
    messages: queue.SimpleQueue = queue.SimpleQueue()
    waiting = list(reversed(range(len(jobs))))
    crew: set[Worker] = set()
    reported = time.monotonic()
    try:
        while waiting or any(worker.job is not None for worker in crew):
            while waiting and len(crew) < min(workers, len(jobs)):
                crew.add(Worker(command, messages))
            try:
                worker, message = messages.get(timeout=min(1.0, timeout / 4))
            except queue.Empty:
                worker = message = None
            answer = None
            if worker in crew:
                worker.heard = time.monotonic()
                if message is None:
                    worker.stop()
                    if not worker.ready:
                        raise RuntimeError(
                            f"the ingest worker does not start: {_complaint(command)}"
                        )
                    answer = {"refused": f"decoder died: {_death(worker)}", "retry": True}
                elif "ready" in message:
                    worker.ready = True
                elif "beat" not in message:
                    answer = message
                if answer is not None:
                    number, worker.job = worker.job, None
                    if message is None or answer.pop("retire", False):
                        worker.stop()
                        crew.discard(worker)
                    if number is not None:
                        yield number, answer
            now = time.monotonic()
            if now - reported >= 1:
                reported = now
                at_work({w.job: now - w.began for w in crew if w.job is not None})
            for worker in list(crew):
                silent = now - worker.heard
                limit = limits[worker.job] if limits and worker.job is not None else math.inf
                if worker.ready and worker.job is None and waiting:
                    number = waiting.pop()
                    worker.give(number, jobs[number])
                elif worker.job is not None and silent > timeout and messages.empty():
                    worker.stop()
                    crew.discard(worker)
                    reason = f"decoder made no progress for {timeout:g} s"
                    yield worker.job, {"refused": reason, "retry": True}
                elif worker.job is not None and now - worker.began > limit:
                    worker.stop()
                    crew.discard(worker)
                    reason = (
                        f"was not decoded within {limit:.4g} s: if the file is good, raise "
                        "--file-timeout"
                    )
                    yield worker.job, {"refused": reason, "seconds": limit}
                elif not worker.ready and silent > max(timeout, START_SECONDS):
                    raise RuntimeError("the ingest worker does not start: no sign of life")
    finally:
        for worker in crew:
            worker.stop()


def _death(worker: Worker) -> str:
    code = worker.process.returncode
    if code >= 0:
        return f"exit code {code}"
    hint = ", out of memory?" if -code == signal.SIGKILL else ""
    return f"signal {-code} ({signal.Signals(-code).name}{hint})"


def _complaint(command: tuple[str, ...]) -> str:
    """Run the worker once more without a job, to hear why it does not start."""
    result = subprocess.run(
        command, input="", capture_output=True, text=True, env=worker_environment()
    )
    return result.stderr.strip()[-2000:] or f"exit code {result.returncode}"
