"""Memory as the kernel reports it for this process, and settings that make the allocator return freed memory. Imports
no torch."""

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

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_HEAP, _NEVER = 8 * 2**20, 2**31 - 1  # block size from which malloc maps a block by itself
_PR_SET_THP_DISABLE, _EXCEPT_ADVISED = 41, 2  # linux/prctl.h
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class _Thp(NamedTuple):
    """Whether and how transparent huge pages are disabled for this process."""

    disabled: bool
    flags: int


_NO_HUGE_PAGES = _Thp(True, 0)
_huge_pages: _Thp | None = (
    None  # the state in which tensors and arrays alone have huge pages, if the system has such a state
)
_threshold: int | None = None  # the one in effect, if this module set the allocator's thresholds
_beside_heap: int | None = None  # the least of `_beside` since the last `release_heap`


class Rss(NamedTuple):
    """Resident memory in bytes: the current value, the high-water mark (0 if the kernel keeps none), the anonymous and
    file-backed parts of the current value, and the amount that is swapped out."""

    now: int
    peak: int
    anon: int
    file: int
    swapped: int = 0


def read_rss(proc: Path = Path("/proc/self")) -> Rss:
    """Read /proc/self/status, as far as the kernel fills it in (gVisor reports little); without it, use psutil's
    figure."""
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
    """Reset the high-water mark (VmHWM) to the current use. Returns False if the kernel refuses."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def children_rss() -> int:
    """The resident bytes of all child processes, which count under the ceiling. Takes 0.05 ms; if the kernel keeps no
    lists of children, 4 ms for each hundred processes of the machine."""
    total = 0
    with suppress(psutil.Error, OSError):
        children = _descendants("self") if _lists_children() else _children_by_psutil()
        for pid in children:
            with suppress(psutil.Error):
                total += psutil.Process(pid).memory_info().rss
    return total


@cache
def _lists_children() -> bool:
    """Whether the kernel lists the children of each thread."""
    return Path("/proc/thread-self/children").exists()


def _descendants(pid: str) -> list[int]:
    """The processes that `pid` ("self" or a number) has started, and those that they have started."""
    found: list[int] = []
    with suppress(OSError):  # it has ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                for child in file.read().split():
                    found += [int(child), *_descendants(child)]
    return found


def _children_by_psutil() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True)]


def trim() -> None:
    """Collect garbage, and return freed memory and the pages of code that may not run again to the system."""
    gc.collect()
    release_heap()
    release_code()


def release_code() -> None:
    """Unmap the resident pages of programs and libraries (10 ms). Pages that are used again come back from the page
    cache.

    Importing torch and building models touches 85 MB of code, computing touches 40 MB. Only mappings that nothing has
    written to are dropped, since their files still hold them.
    """
    with suppress(OSError):
        maps = Path("/proc/self/smaps").read_text()
        for first, last in _untouched_code(maps):
            _madvise()(first, last - first, mmap.MADV_DONTNEED)


def _untouched_code(smaps: str) -> Iterator[tuple[int, int]]:
    """Yield (first address, last + 1) of the private executable file mappings that have no modified page."""
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
    """glibc's malloc_trim; with other C libraries, a function that does nothing."""
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
    """glibc's mallinfo2; None with other C libraries."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = _MallInfo
    return function


def free_heap() -> int:
    """The freed bytes of the heap that are still resident; 0 if the C library does not report freed bytes.

    glibc's own figure counts freed memory that `release_heap` has returned too, so a heap that was once large would
    always seem to have some. It is therefore at most what has become resident since then, beside the memory in use.
    Other memory that has become resident counts as well, until the next release.
    """
    global _beside_heap
    if (mallinfo := _mallinfo()) is None:
        return 0
    info = mallinfo()
    if _beside_heap is None:
        return int(info.fordblks)
    beside = _beside(info)
    _beside_heap = min(_beside_heap, beside)  # other memory was returned
    return min(int(info.fordblks), beside - _beside_heap)


def _beside(info: _MallInfo) -> int:
    """The resident anonymous bytes, less the blocks in use."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0) - info.uordblks - info.hblkhd)


def release_heap() -> None:
    """Return freed heap memory to the system (about 5 ms)."""
    global _beside_heap
    _malloc_trim()(0)
    if (mallinfo := _mallinfo()) is not None:
        _beside_heap = _beside(mallinfo())


def frugal_allocator() -> None:
    """Make the allocator return freed memory, and idle threads release their cores. Call it when a program starts,
    before torch is imported; a library must not do this.

    glibc raises its mmap threshold as blocks are freed, up to 32 MB, and keeps freed blocks below the threshold. A low
    fixed threshold returns everything at once, but then every temporary is mapped and faulted in again: with 128 KiB an
    SD 1.5 UNet pass took 8.3 s a sample; with 8 MiB and `release_heap` between layers it took 7.2 s and 20 MB more
    (`scripts/bench.py unet`).
    """
    global _threshold
    # OpenMP's threads wait for each other by spinning, 300,000 turns by default. If other programs use the cores, they
    # spin for a thread that has no core, and small layers took thirty times as long. On an idle machine they occupy the
    # cores that the threads of tiler's library need: a pass of SD 1.5 in int8 takes 6–9 % longer with two threads
    # (scripts/README.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((_M_MMAP_THRESHOLD, _HEAP), (_M_TRIM_THRESHOLD, 64 * 2**20), (_M_ARENA_MAX, 2)):
            libc.mallopt(option, value)
        _threshold = _HEAP
    prepare_huge_pages()


def prepare_huge_pages(setting: Path = _HUGE_PAGES) -> bool:
    """Prepare huge pages for tensors of 2 MB and numpy's arrays of 4 MB and more, for `use_huge_pages`; none are used
    until then. Returns whether the system can limit them to these, by its `setting`. Call it before torch allocates its
    first tensor."""
    global _huge_pages
    try:
        modes = setting.read_text()
    except OSError:
        modes = ""
    if "[madvise]" in modes:
        _huge_pages = _Thp(False, 0)  # torch and numpy ask for them
    elif "[always]" in modes and _set_thp_disabled(_Thp(True, _EXCEPT_ADVISED)):
        _huge_pages = _Thp(True, _EXCEPT_ADVISED)
    else:
        _huge_pages = None
    _set_thp_disabled(_NO_HUGE_PAGES)
    if _huge_pages is not None:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for them
    return _huge_pages is not None


def use_huge_pages(on: bool) -> None:
    """Use huge pages for large tensors and arrays from now on, if they were prepared, or none.

    Each freed tensor is mapped and faulted in again. Decoding 512² at SD 1.5's size in bf16 had 0.25 instead of 0.49
    million page faults, and took 8.4 instead of 9.4 s, with 17 MB more; a pass of the UNet took as long as before. Huge
    pages everywhere, heap and stacks included, would take far more memory.
    """
    if _huge_pages is not None:
        _set_thp_disabled(_huge_pages if on else _NO_HUGE_PAGES)


def _set_thp_disabled(state: _Thp) -> bool:
    """Returns False if the system does not know this state: Linux before 6.18 has no flags."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    return prctl is not None and prctl(_PR_SET_THP_DISABLE, int(state.disabled), state.flags, 0, 0) == 0


def generous_allocator() -> None:
    """Let freed memory stay in the process and be reused from now on, if `frugal_allocator` was called.

    Under 6 GB, an SD 1.5 UNet pass then has a twentieth of the page faults and takes a tenth less time, with 160 MB
    more (`scripts/bench.py unet --ceiling 6000000000`).
    """
    global _threshold
    if _threshold is not None:
        libc = ctypes.CDLL(None)
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(option, _NEVER)
        _threshold = _NEVER


@contextmanager
def limit_data(extra_bytes: int) -> Iterator[None]:
    """Make a runaway allocation of more than `extra_bytes` beyond the current data fail as an allocator error
    (RLIMIT_DATA)."""
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
