"""Cores and threads: what a process may use, shared with those beside it."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from pretrain import processes
from pretrain.data.pool import usable_cores
from pretrain.settings import Machine


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_cores_are_those_this_process_may_use():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cores() == len(before)


@pytest.mark.parametrize(
    ("asked", "beside", "expected"),
    [(None, 1, 6), (None, 2, 3), (None, 4, 1), (None, 9, 1), (5, 2, 5)],
)
def test_processes_share_the_cores(asked, beside, expected, threads, monkeypatch):
    monkeypatch.setattr(processes, "usable_cores", lambda: 6)
    monkeypatch.setattr(processes, "asked_processes", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(beside))
    processes.start_accelerator(Machine("fp32", threads=asked))
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(
    ("asked", "launcher", "expected"), [(None, False, 2), (None, True, 6), (5, False, 5)]
)
def test_threads_of_the_environment_count_without_a_launcher(
    asked, launcher, expected, threads, monkeypatch
):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    if launcher:  # which sets one thread by itself
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    monkeypatch.setattr(processes, "usable_cores", lambda: 6)
    monkeypatch.setattr(processes, "asked_processes", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    processes.start_accelerator(Machine("fp32", threads=asked))
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(
    ("asked", "gpu", "expected"), [(None, True, 5), (None, False, 1), (3, True, 3), (0, False, 0)]
)
def test_what_decodes_goes_by_the_machine(asked, gpu, expected, monkeypatch):
    monkeypatch.setattr(processes, "usable_cores", lambda: 6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert processes.loader_workers(Machine(num_workers=asked), on_cpu=1) == expected


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"2 processes need a GPU each and there are 1.*CUDA_VISIB"
    ):
        processes.start_accelerator(Machine())


def test_asked_to_stay_on_the_cpu_it_does(threads, monkeypatch):
    """launch/cpu.yaml beside a GPU: no CUDA, and the precision is the CPU's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes, "asked_processes", lambda: 1)
    monkeypatch.setattr("pretrain.device.has_bf16", lambda device: device.type == "cuda")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator = processes.start_accelerator(Machine(threads=1))
    assert accelerator.device.type == "cpu" and accelerator.mixed_precision == "no"


FAULTS = """
import resource, sys
from pretrain.device import keep_memory

def touch():  # 64 MB and a page of four kilobytes at a time
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = bytearray(b"x") * 2**26
    del memory
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    keep_memory()
touch()
print(touch())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_kept_memory_is_not_cleared_again():
    def faults(how):
        answer = subprocess.run(
            [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True
        )
        return int(answer.stdout)

    assert faults("keep") < 100 < faults("give back")


def test_an_evaluation_under_a_launcher_is_refused(monkeypatch):
    """Every process would score the same videos and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes.start_evaluation(Machine()).type in ("cpu", "cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        processes.start_evaluation(Machine())
