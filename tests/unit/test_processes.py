"""Cores and threads: what a process may use, shared with those beside it."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain import device, processes
from pretrain.data.pool import usable_cores
from pretrain.settings import Machine
from tests.recipes.runs import in_processes


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


def count_faults() -> None:
    """Print the page faults of using 64 MB again: before this process keeps memory, and after."""

    def touch() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        memory = bytearray(b"x") * 2**26
        del memory
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    for prepare in (lambda: None, device.keep_memory):
        prepare()
        touch()
        print(touch())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_kept_memory_is_not_cleared_again(tmp_path):
    done = in_processes(tmp_path, 1, "tests.unit.test_processes", "count_faults")
    given_back, kept = map(int, done.stdout.split())
    assert kept < 100 < given_back


def test_an_evaluation_under_a_launcher_is_refused(monkeypatch):
    """Every process would score the same videos and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes.start_evaluation(Machine()).type in ("cpu", "cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        processes.start_evaluation(Machine())


# As /proc/cpuinfo has them: a Skylake or Zen 3 on the left of what has units for bf16.
@pytest.mark.parametrize(
    ("system", "machine", "flags", "precision"),
    [
        ("Linux", "x86_64", "fma avx2 avx512f avx512bw avx512_vnni", "medium"),
        ("Linux", "x86_64", "fma avx2 ssse3", "medium"),
        ("Linux", "x86_64", "avx2 avx512f avx512_bf16", "highest"),
        ("Linux", "x86_64", "avx512f avx512_bf16 amx_bf16 amx_tile", "highest"),
        ("Linux", "x86_64", "avx2 avx_vnni avx_ne_convert", "highest"),
        ("Linux", "aarch64", "asimd bf16 svebf16", "highest"),
        ("Linux", "aarch64", "asimd", "highest"),
        ("Darwin", "x86_64", "avx2", "highest"),
    ],
)
def test_onednn_computes_float32_only_where_it_cannot_round(
    system, machine, flags, precision, monkeypatch
):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(device.Path, "read_text", lambda _: f"vendor_id : x\nflags : {flags}\n")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        device.use_exact_onednn()
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("wish", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_threads_that_wait_soon_sleep_unless_somebody_wants_it_otherwise(wish, expected):
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not libraries:
        pytest.skip("this torch has another OpenMP than libgomp")
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    environment |= wish | {"OMP_DISPLAY_ENV": "verbose"}
    # As torch loads it.
    code = f"import ctypes, pretrain.threads; ctypes.CDLL({str(libraries[0])!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr
