"""The machine that trains and judges: CUDA where there is one, bf16 where it is fast, and never in another program's
way."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is Arm's
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


@cache
def has_bf16() -> bool:
    """Whether products in bf16 are faster than in fp32. Without such instructions torch emulates them, slowly."""
    if DEVICE.type == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = Path("/proc/cpuinfo")
    return flags.exists() and not _BF16_FLAGS.isdisjoint(flags.read_text().split())


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=has_bf16())


def prepare(threads: int) -> None:
    """For a long run beside others: `threads` of torch (0: its own choice), the lowest priority, freed memory kept."""
    if threads:
        torch.set_num_threads(threads)
    os.nice(19 - os.nice(0))
    _keep_heap()


def _keep_heap() -> None:
    """Let glibc keep freed memory. It would map every activation anew, which takes a tenth of a training step and three
    quarters of the time of encoding."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28)):
            libc.mallopt(option, value)
