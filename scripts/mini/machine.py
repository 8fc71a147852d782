"""The machine that trains and judges: CUDA where there is one, bf16 where it is fast, and never in another program's
way."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def norms_in_bf16(net: nn.Module) -> None:
    """Let autocast's bf16 through GroupNorm and LayerNorm, whose kernels for CUDA compute in fp32 within. Autocast
    would have them read and write fp32, twice the bytes."""
    for part in net.modules():
        if isinstance(part, nn.GroupNorm | nn.LayerNorm):
            part.forward = partial(_norm, part)  # type: ignore[method-assign]


def _norm(part: nn.GroupNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    with torch.autocast(DEVICE.type, enabled=False):
        weight, bias = part.weight.to(x.dtype), part.bias.to(x.dtype)
        if isinstance(part, nn.GroupNorm):
            return F.group_norm(x, part.num_groups, weight, bias, part.eps)
        return F.layer_norm(x, part.normalized_shape, weight, bias, part.eps)


def prepare(threads: int) -> None:
    """For a long run beside others: `threads` of torch (0: its own choice), the lowest priority, freed memory kept."""
    if threads:
        torch.set_num_threads(threads)
    os.nice(19 - os.nice(0))
    torch.backends.cudnn.benchmark = True
    _keep_heap()


def _keep_heap() -> None:
    """Let glibc keep freed memory. It would map every activation anew, which takes a tenth of a training step and three
    quarters of the time of encoding."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28)):
            libc.mallopt(option, value)
