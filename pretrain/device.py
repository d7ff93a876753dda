"""The device and its capabilities."""

import ctypes
import platform
from functools import cache
from pathlib import Path

import torch

from pretrain.names import counted


def keep_memory() -> None:
    """Have glibc keep the memory that this process frees, instead of returning it to the system.

    Otherwise every activation of more than a few hundred kilobytes is a memory mapping of its own,
    whose pages the system has to clear again at each step. The process then holds its peak memory
    until it ends. Without glibc, nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def free_memory() -> int | None:
    """Bytes that new work may take, as Linux estimates them; None: not known here."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvail")))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def use_exact_onednn() -> None:
    """Have float32 matrix products on the CPU computed by oneDNN, where that is still float32.

    torch's name for it is "medium" precision: oneDNN may round to bf16, which it does on CPUs that
    have units for it. There, and on other processors than x86, nothing is changed.
    """
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        flags = set(Path("/proc/cpuinfo").read_text().split())
        if not any("bf16" in flag or flag == "avx_ne_convert" for flag in flags):
            torch.set_float32_matmul_precision("medium")


@cache
def has_bf16(device: torch.device) -> bool:
    """Whether `device` has bfloat16 matrix products; emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if platform.system() != "Linux":
        return False  # there is no portable way to ask; float32 always works
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags  # the last: Arm


def autocast_dtype(device: torch.device, precision: str = "auto") -> torch.dtype | None:
    """The autocast dtype of a run: bfloat16, or None for plain float32.

    Args:
        device: where it runs.
        precision: "auto" (bfloat16 where the device has it), "bf16" or "fp32".

    Raises:
        ValueError: another precision.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"precision {precision!r} is not one of auto, bf16, fp32")
    if precision == "fp32" or (precision == "auto" and not has_bf16(device)):
        return None
    return torch.bfloat16


def describe(device: torch.device) -> str:
    """The device in words, for logs and cards."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}"
