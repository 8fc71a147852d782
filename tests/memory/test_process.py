"""What the kernel reports about this process, and the release of memory and code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tiler.jobs.drawing import OWN_BYTES
from tiler.memory import process
from tiler.memory.budget import Budget
from tiler.memory.policy import at_rows
from tiler.memory.process import _untouched_code, read_rss


def fresh(code: str) -> str:
    """The output of a new process."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout


LINUX = "Name:\tpython\nVmHWM:\t  2000 kB\nVmRSS:\t 1500 kB\nRssAnon:\t 900 kB\nRssFile:\t 500 kB\nRssShmem:\t 100 kB\nVmSwap:\t 70 kB\n"
GVISOR = "Name:\tpython\nState:\tR (running)\nVmSize:\t 90000 kB\nVmRSS:\t 1500 kB\nThreads:\t4\n"


@pytest.mark.parametrize(
    ("status", "want"),
    [
        (LINUX, (1500, 2000, 900, 600, 70)),
        (GVISOR, (1500, 0, 1500, 0, 0)),
        (LINUX.replace("RssAnon", "Other").replace("VmSwap", "Other"), (1500, 2000, 900, 600, 0)),
        (LINUX.replace("VmHWM:\t  2000 kB", "VmHWM:\t kB"), (1500, 0, 900, 600, 70)),
    ],
)
def test_a_kernel_may_say_less(tmp_path: Path, status: str, want: tuple[int, ...]) -> None:
    (tmp_path / "status").write_text(status)
    if "\t kB" in status:  # a line that cannot be read ends the reading
        (tmp_path / "status").write_text("".join(sorted(status.splitlines(True), key=lambda line: "VmHWM" in line)))
    assert read_rss(tmp_path) == tuple(1024 * kb for kb in want)


@pytest.mark.parametrize("status", [None, "", "Name:\tpython\n"])
def test_a_kernel_that_says_nothing(tmp_path: Path, status: str | None) -> None:
    if status is not None:
        (tmp_path / "status").write_text(status)
    rss = read_rss(tmp_path)
    assert rss.now == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert (rss.peak, rss.anon, rss.file, rss.swapped) == (0, rss.now, 0, 0)


@pytest.fixture
def family() -> Iterator[tuple[int, int]]:
    """The ids of a child and of its child."""
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); input(); p.kill()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    yield child.pid, grandchild
    child.communicate("\n", timeout=60)


@pytest.mark.parametrize("lists", [True, False])
def test_children_and_their_children_count(
    family: tuple[int, int], monkeypatch: pytest.MonkeyPatch, lists: bool
) -> None:
    """Where the kernel lists them, other processes are not looked at: on a machine with hundreds of them, that takes a
    part of each of the sampler's 50 ms."""
    if lists and not process._lists_children():
        pytest.skip("this kernel keeps no lists of children")
    monkeypatch.setattr(process, "_lists_children", lambda: lists)
    if lists:
        monkeypatch.setattr(psutil.Process, "children", None)
    want = sum(psutil.Process(pid).memory_info().rss for pid in family)
    assert process.children_rss() == pytest.approx(want, rel=0.2)


@pytest.mark.parametrize("lists", [True, False])
def test_children_that_cannot_be_listed_count_for_nothing(monkeypatch: pytest.MonkeyPatch, lists: bool) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError if lists else psutil.AccessDenied

    monkeypatch.setattr(process, "_lists_children", lambda: lists)
    monkeypatch.setattr(psutil.Process, "children", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    assert process.children_rss() == 0


def test_a_machine_without_a_load_average(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("Load averages are unobtainable")

    monkeypatch.setattr(os, "getloadavg", refuse)
    process.frugal_allocator()


@pytest.mark.parametrize(
    ("setting", "knows_flags", "on"),
    [
        ("always [madvise] never", False, (False, 0)),
        ("[always] madvise never", True, (True, 2)),
        ("[always] madvise never", False, None),
        ("always madvise [never]", True, None),
        (None, True, None),
    ],
)
def test_huge_pages_are_for_tensors_alone(
    setting: str | None,
    knows_flags: bool,
    on: tuple[bool, int] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`on`: what PR_SET_THP_DISABLE is when they are used; its flag 2, except where advised, is new in Linux 6.18."""
    if setting is not None:
        (tmp_path / "enabled").write_text(setting + "\n")
    states: list[tuple[bool, int]] = []

    def disable(state: tuple[bool, int]) -> bool:
        if state[1] and not knows_flags:
            return False
        states.append(tuple(state))
        return True

    monkeypatch.setattr(process, "_set_thp_disabled", disable)
    monkeypatch.setattr(process, "_huge_pages", None)
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert process.prepare_huge_pages(tmp_path / "enabled") is (on is not None)
    assert states[-1] == (True, 0)
    assert os.environ.pop("THP_MEM_ALLOC_ENABLE", None) == (None if on is None else "1")
    for wanted in (True, False):
        process.use_huge_pages(wanted)
        assert states[-1] == (on if wanted and on is not None else (True, 0))


def test_tensors_are_in_huge_pages_while_a_roomy_ceiling_decodes() -> None:
    """Of two mappings of 64 MB, the program's own and a tensor's: in no phase is the first in huge pages."""
    code = """
import mmap
from collections.abc import Iterator
from pathlib import Path
from tiler.memory import process
process.frugal_allocator()
import torch
from tiler.memory.budget import Budget
from tiler.memory.policy import at_layer, at_rows
def huge():
    own = mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    own[:] = bytes(len(own))
    tensor = torch.ones(16 * 2**20)
    return int(Path("/proc/self/smaps_rollup").read_text().split("AnonHugePages:")[1].split()[0])
print(process.prepare_huge_pages())
for phase, ceiling in (at_rows, 10**9), (at_layer, 10**9), (at_rows, 5 * 10**8):
    phase(Budget(ceiling), 4 * 10**8)
    print(huge())
"""
    able, roomy, denoiser, tight = fresh(code).split()
    assert able == "False" or 56 * 1024 <= int(roomy) <= 64 * 1024
    assert (denoiser, tight) == ("0", "0")


def test_the_pictures_of_a_queue_have_huge_pages_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the default ceiling, of which the queue's own process takes a part."""
    on: list[bool] = []
    monkeypatch.setattr(process, "use_huge_pages", on.append)
    for beside in (0, OWN_BYTES, 400_000_000):
        at_rows(Budget("800MB", beside_bytes=beside), 300_000_000)
    assert on == [True, True, False]


def test_code_that_ran_leaves_memory_and_returns() -> None:
    code = """
from tiler.memory import process
import torch
x = torch.arange(64.).view(8, 8)
before, product = process.read_rss(), x @ x
process.release_code()
after = process.read_rss()
print(before.file > 2 * after.file, torch.equal(x @ x, product), after.anon >= before.anon - 2**20)
"""
    assert fresh(code).strip() == "True True True"


def test_only_code_that_can_be_had_from_its_file_is_released() -> None:
    def mapping(span: str, rights: str, path: str, anonymous: int) -> str:
        return f"{span} {rights} 00000000 08:01 123 {path}\nSize: 4 kB\nAnonymous:           {anonymous} kB\nVmFlags: rd ex mr\n"

    smaps = (
        mapping("1000-3000", "r-xp", "/usr/lib/a.so", 0)
        + mapping("4000-5000", "r-xp", "/usr/lib/patched.so", 4)
        + mapping("6000-7000", "rw-p", "/usr/lib/a.so", 0)
        + mapping("8000-9000", "r-xp", "", 0)
        + mapping("a000-b000", "r-xp", "[vdso]", 0)
        + mapping("c000-f000", "r-xp", "/usr/lib/b c.so", 0)
    )
    assert list(_untouched_code(smaps)) == [(0x1000, 0x3000), (0xC000, 0xF000)]


@pytest.mark.skipif(process._mallinfo() is None, reason="this C library reports no freed memory")
def test_freed_memory_that_was_returned_counts_no_longer() -> None:
    """A hole of 64 MB below a block in use: freed, returned, used and freed again, while other memory comes and
    goes."""
    code = """
import ctypes, mmap
from tiler.memory import process
process.frugal_allocator()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def fill():
    blocks = [libc.malloc(2**20) for _ in range(64)]
    for block in blocks:
        ctypes.memset(block, 1, 2**20)
    return blocks
def clear(blocks):
    for block in blocks:
        libc.free(block)
blocks, last = fill(), libc.malloc(2**20)
clear(blocks)
other = mmap.mmap(-1, 2**26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for i in range(0, 2**26, 4096):
    other[i] = 1
process.release_heap()
print(process.free_heap())
other.close()
blocks = fill()
print(process.free_heap())
clear(blocks)
print(process.free_heap())
process.release_heap()
print(process.free_heap())
"""
    returned, in_use, freed, again = (int(n) / 2**20 for n in fresh(code).split())
    assert max(returned, in_use, again) < 4
    assert 60 < freed < 70
