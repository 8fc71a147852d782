"""What the kernel says of this process and this machine, and what keeps the allocator honest. Imports no torch."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import platform
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil

# Of freed memory, the holes between live blocks included.

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_MAPPED, _HEAP, _NEVER = 2**20, 8 * 2**20, 2**31 - 1  # from which size on a block is mapped
_threshold: int | None = None  # which of these holds, if the allocator's thresholds are ours


class Rss(NamedTuple):
    """Resident memory in bytes: now, the high-water mark (0 where the kernel keeps none), the anonymous and file-backed
    parts of now, and what of this process is swapped out."""

    now: int
    peak: int
    anon: int
    file: int
    swapped: int = 0


def read_rss(proc: Path = Path("/proc/self")) -> Rss:
    """From /proc/self/status, as far as the kernel reports it (gVisor's says little); elsewhere psutil's figure."""
    kb: dict[str, int] = {}
    with suppress(OSError, ValueError, IndexError):
        for line in (proc / "status").read_text().splitlines():
            key, _, rest = line.partition(":")
            if rest.endswith(" kB"):
                kb[key] = 1024 * int(rest.split()[0])
    now = kb["VmRSS"] if "VmRSS" in kb else psutil.Process().memory_info().rss
    file = kb.get("RssFile", 0) + kb.get("RssShmem", 0)
    return Rss(now, kb.get("VmHWM", 0), kb.get("RssAnon", max(0, now - file)), file, kb.get("VmSwap", 0))


def reset_peak() -> bool:
    """Set the high-water mark (VmHWM) to the present use. False where the kernel refuses."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def children_rss() -> int:
    """The resident bytes of all child processes: they count under the ceiling."""
    total = 0
    with suppress(psutil.Error, OSError):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                total += child.memory_info().rss
    return total


def trim() -> None:
    """Collect garbage, and give back to the system freed memory and the code that may not run again."""
    gc.collect()
    release_heap()
    release_code()


def release_code() -> None:
    """Unmap the resident pages of programs and libraries (10 ms); what is used again returns from the page cache.

    Importing torch and building models touches 85 MB of code, computing 40 MB. Only mappings that nothing wrote to are
    dropped: they can be had from their files at any time.
    """
    with suppress(OSError):
        maps = Path("/proc/self/smaps").read_text()
        for first, last in _untouched_code(maps):
            _madvise()(first, last - first, mmap.MADV_DONTNEED)


def _untouched_code(smaps: str) -> Iterator[tuple[int, int]]:
    """(first address, last + 1) of private executable mappings of files, without a page of the process's own."""
    found: tuple[int, int] | None = None
    for line in smaps.splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            first, last = (int(number, 16) for number in key.split("-"))
            found = (first, last) if rest.startswith("r-xp") and "/" in rest else None
        elif key == "Anonymous:" and found is not None:
            if rest.split() == ["0", "kB"]:
                yield found
            found = None


@cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


@cache
def _malloc_trim() -> Callable[[int], int]:
    """glibc's malloc_trim; elsewhere nothing."""
    return ctypes.CDLL(None).malloc_trim if platform.libc_ver()[0] == "glibc" else lambda pad: 0


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of glibc ≥ 2.33, malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


@cache
def _mallinfo() -> Callable[[], _MallInfo] | None:
    """glibc's mallinfo2, None elsewhere."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = _MallInfo
    return function


def free_heap() -> int:
    """Bytes that the program freed and the heap keeps, 0 where nobody knows."""
    info = _mallinfo()
    return int(info().fordblks) if info is not None else 0


def release_heap() -> None:
    """Give freed heap memory back to the system (about 5 ms)."""
    _malloc_trim()(0)


def frugal_allocator() -> None:
    """Make freed memory leave the process, and waiting threads leave the cores. For a program's start, before torch is
    imported; a library must not do this.

    glibc raises its mmap threshold as blocks are freed, up to 32 MB, and keeps what is freed below it. A low fixed one
    gives everything back at once, but then every temporary is mapped and faulted in anew: with 128 KiB an SD 1.5 UNet
    pass took 8.3 s a sample, with 8 MiB and `release_heap` between layers 7.2 s and 20 MB more (`scripts/bench.py
    unet`).
    """
    global _threshold
    busy = False
    # OpenMP's threads wait for each other by spinning, 300,000 turns unless told otherwise. On a free machine that is 6
    # % faster than sleeping; where other programs share the cores it is waiting for a thread that has none: small
    # layers then took thirty times as long.
    with suppress(OSError):
        busy = os.getloadavg()[0] > (os.cpu_count() or 1) / 2
    if busy:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((_M_MMAP_THRESHOLD, _HEAP), (_M_TRIM_THRESHOLD, 64 * 2**20), (_M_ARENA_MAX, 2)):
            libc.mallopt(option, value)
        _threshold = _HEAP
        pr_set_thp_disable = 41
        libc.prctl(pr_set_thp_disable, 1, 0, 0, 0)


def generous_allocator() -> None:
    """Where `frugal_allocator` was called: freed memory stays in the process from now on and is used again.

    Under 6 GB an SD 1.5 UNet pass then has a twentieth of the page faults and takes a tenth less time, with 160 MB more
    (`scripts/bench.py unet --ceiling 6000000000`).
    """
    global _threshold
    if _threshold is not None:
        libc = ctypes.CDLL(None)
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(option, _NEVER)
        _threshold = _NEVER


@contextmanager
def mapped_blocks() -> Iterator[None]:
    """Where `frugal_allocator` was called, and freed memory is to leave: blocks from 1 MiB are mapped by themselves, so
    that none of them leaves a hole between others."""
    if _threshold != _HEAP:
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _HEAP)


@contextmanager
def limit_data(extra_bytes: int) -> Iterator[None]:
    """A runaway allocation of more than `extra_bytes` from here on fails as an error of the allocator (RLIMIT_DATA)."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    data = 0
    with suppress(OSError):
        data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    if not data:
        yield
        return
    cap = data + extra_bytes
    resource.setrlimit(
        resource.RLIMIT_DATA, (cap if before[1] == resource.RLIM_INFINITY else min(cap, before[1]), before[1])
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
