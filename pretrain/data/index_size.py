"""What the index of a large pack costs: time to open it and memory of all processes of a machine.

    python -m pretrain.data.index_size
    python -m pretrain.data.index_size --clips 10000000 --processes 8 --workers 4

An index of so many clips is generated; its shards are holes in files. Each process opens the pack
and chooses the clips of training, its workers read records in the order of an epoch. "memory" is
the proportional set size of all of them, without what they have before the pack is opened.
"""

import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO

from pretrain.data.columns import columns_file, make_columns
from pretrain.data.index import COLUMNS, FORMAT, json_line
from pretrain.data.shards import Pack, TrainClips
from pretrain.flags import Count
from pretrain.log import cli
from pretrain.spec import InputSpec

IN_SHARD, BYTES, SLOT = 10_000, 25_600, 28_672  # clips; bytes of a clip, and with its two headers
CLASSES = [f"class {i:03d}" for i in range(400)]
TEXT = "somebody walks slowly along a busy street while others look on"


@dataclass(frozen=True)
class Config:
    """Configuration of the measurement."""

    clips: Count = 1_000_000
    """In the pack."""
    processes: Count = 2
    """That train on this machine."""
    workers: Count = 2
    """Of each, which decode."""
    reads: Count = 20_000
    """Records that each worker reads."""


def _row(number: int) -> dict:
    shard, place = divmod(number, IN_SHARD)
    name = f"{number * 2654435761 % 2**64:016x}"
    return {
        "key": f"{name}-0", "shard": shard, "offset": 512 + place * SLOT, "bytes": BYTES,
        "sha256": name * 4, "frames": 120 + number % 60, "fps": 12.0, "width": 340, "height": 256,
        "source": f"videos/{number % 1000:03d}/{name}.mp4", "clip": 0, "start": 0.0,
        "label": CLASSES[number % len(CLASSES)], "captions": [f"{TEXT} {number}", TEXT],
        "split": "train" if number % 50 else "val", "subject": f"person {number % 100_000}",
        "extra": {},
    }  # fmt: skip


def write_index(folder: Path, num_clips: int) -> None:
    """Write a pack of so many clips into an empty folder; nothing can be decoded."""
    digest = hashlib.sha256()

    def lines(file: BinaryIO) -> Iterator[tuple[bytes, dict]]:
        for row in map(_row, range(num_clips)):
            line = json_line(row).encode()
            file.write(line)
            digest.update(line)
            yield line[:-1], row

    with open(folder / "clips.jsonl", "wb") as file:
        columns = make_columns(lines(file), CLASSES)
    (folder / COLUMNS).write_bytes(columns_file(columns, digest.hexdigest()))
    shards = []
    for start in range(0, num_clips, IN_SHARD):
        count = min(IN_SHARD, num_clips - start)
        name = f"shard-{start // IN_SHARD:05d}-00000000.tar"
        with open(folder / name, "wb") as file:
            file.truncate(count * SLOT)
        about = {"name": name, "sha256": "0" * 64, "bytes": count * SLOT, "num_clips": count}
        shards.append(about)
    held_out = -(-num_clips // 50)
    index = {
        "format": FORMAT, "num_sources": num_clips, "num_clips": num_clips, "num_refused": 0,
        "settings": {}, "classes": CLASSES, "splits": {"train": num_clips - held_out,
        "val": held_out}, "shards": shards, "clips_sha256": digest.hexdigest(),
        "fingerprint": digest.hexdigest(),
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))


def _process(folder: str, workers: int, reads: int, number: int, pipe: Connection) -> None:
    """One process that trains: says what it took, step by step, and waits for a word each time."""
    fork = multiprocessing.get_context("fork")
    with ExitStack() as stack:

        def work(read: bool, seed: int, done: Connection) -> None:
            for position in range(seed * reads, (seed + 1) * reads) if read else ():
                pack.record(clips.sample_at(0, position % len(clips.ids)))
            done.send(True)
            time.sleep(1e6)

        def start(read: bool) -> list[int]:
            ids, pipes = [os.getpid()], []
            for worker in range(workers):
                ours, theirs = fork.Pipe()
                each = fork.Process(target=work, args=(read, number * workers + worker, theirs))
                each.start()
                stack.callback(each.kill)
                ids.append(each.pid or 0)
                pipes.append(ours)
            for ours in pipes:
                ours.recv()
            return ids

        def say(pids: list[int], **seconds: float) -> None:
            pipe.send((pids, seconds))
            pipe.recv()
            stack.close()

        say(start(False))
        began = time.monotonic()
        pack = Pack(folder)
        opened = time.monotonic()
        ids = pack.split("train")
        clips = TrainClips(pack, ids, InputSpec(16, 4, 224), 0, 1, None, lambda *_: {})
        chosen = time.monotonic()
        pids = start(True)
        seconds = {"open": opened - began, "choose": chosen - opened}
        say(pids, **seconds, read=time.monotonic() - chosen)


def _memory(pids: list[int]) -> float:
    """The proportional set size of processes, GB."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024 / 1e9


def main(config: Config) -> dict[str, float]:
    """Generate an index, open it in all processes, and print what that took."""
    if not Path("/proc/self/smaps_rollup").exists():
        raise ValueError("the memory of several processes together is known on Linux alone")
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        write_index(Path(folder), config.clips)
        print(f"{config.clips} clips, generated in {time.monotonic() - began:.0f} s", flush=True)
        pipes, processes = [], []
        for number in range(config.processes):
            ours, theirs = spawn.Pipe()
            args = (folder, config.workers, config.reads, number, theirs)
            processes.append(spawn.Process(target=_process, args=args))
            processes[-1].start()
            pipes.append(ours)
        found: dict[str, float] = {}
        memory = []
        for _ in ("before", "after"):
            told = [pipe.recv() for pipe in pipes]
            memory.append(_memory([pid for pids, _ in told for pid in pids]))
            for _, seconds in told:
                found |= {name: max(s, found.get(name, 0.0)) for name, s in seconds.items()}
            for pipe in pipes:
                pipe.send(True)
        for process in processes:
            process.join()
    found["memory"] = memory[1] - memory[0]
    print(f"{config.processes} processes with {config.workers} workers each")
    print(f"opened in       {found['open']:8.2f} s (the slowest)")
    print(f"clips chosen in {found['choose']:8.2f} s")
    print(f"records read in {found['read']:8.2f} s ({config.reads} by each worker)")
    print(f"memory          {found['memory']:8.2f} GB, all processes together")
    return found


if __name__ == "__main__":
    cli(main, Config)
