"""The limits that others set for this process: its control groups (cgroup v2 and v1), its user's limits, and the
machine's memory. Imports no torch."""

from __future__ import annotations

import errno
import math
import os
import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from tiler.errors import BudgetExceeded
from tiler.memory.budget import format_mb, name_ceiling

_PROC = Path("/proc/self")
_LEAST = (
    240 * 10**6
)  # torch alone has 143 MB of data, and mini cannot be rendered with 260; below 170 its libraries abort
_OURS = 0.9  # share of the free memory under `auto`; the rest is for other programs and the page cache
_NONE = 2**60  # bytes; version 1 writes about this number for "no limit"


def cgroup_limit(proc: Path = _PROC) -> int | None:
    """The memory limit of this process in bytes: the smallest limit of its control group and all enclosing groups. None
    if there is no limit."""
    return min((limit for limit, _ in _memory_groups(proc)), default=None)


def available_ram(proc: Path = _PROC) -> tuple[int, int]:
    """(bytes available now, total bytes), within the limits of the control groups and without the memory that other
    processes in these groups use."""
    memory = psutil.virtual_memory()
    available, total = memory.available, memory.total
    for limit, used in _memory_groups(proc):
        available, total = min(available, max(0, limit - used)), min(total, limit)
    return available, total


def ceiling_for_us(proc: Path = _PROC) -> int:
    """The ceiling for `auto` in bytes, rounded down to whole MB: a share of the memory that machine, control groups and
    user limits leave now, including the memory that this process already uses."""
    free = available_ram(proc)[0] + psutil.Process().memory_info().rss
    return int(_OURS * min([free, *(allowed for _, allowed in _user_limits())]) / 1e6) * 10**6


def memory_warning(ceiling: int, proc: Path = _PROC, *, beside_bytes: int = 0) -> str | None:
    """A warning if something is likely to end the run below a ceiling of `ceiling` bytes, beside which other processes
    have `beside_bytes`: a lower limit, or too little free memory. None otherwise."""
    named = name_ceiling(ceiling, beside_bytes)
    if (limit := cgroup_limit(proc)) is not None and limit < ceiling:
        return (
            f"this container or control group may use {format_mb(limit)} of memory, less than {named}: a run "
            f"that needs more is killed without a word; raise that limit, or give --max-ram {int(0.95 * limit / 1e6)}MB"
        )
    for name, allowed in _user_limits():
        if allowed < ceiling:
            return f"{name} is {format_mb(allowed)}, less than {named}: allocations may be refused; raise it"
    free = (
        available_ram(proc)[0] + psutil.Process().memory_info().rss
    )  # our own memory counts under the ceiling already
    if free < ceiling:
        return (
            f"{format_mb(free)} of memory are free, less than {named}: the run may swap or be killed; "
            "end other programs, or lower --max-ram"
        )
    return None


def check_user_limits() -> None:
    """Raise BudgetExceeded if the user's limits are too low even to import torch, whose libraries abort the process
    when they get no memory."""
    for name, allowed in _user_limits():
        if allowed < _LEAST:
            raise BudgetExceeded(
                f"{name} is {format_mb(allowed)}; no run fits in less than {format_mb(_LEAST)}; raise it"
            )


def _user_limits() -> Iterator[tuple[str, int]]:
    for name, kind in (
        ("RLIMIT_DATA (ulimit -d)", resource.RLIMIT_DATA),
        ("RLIMIT_AS (ulimit -v)", resource.RLIMIT_AS),
    ):
        if (allowed := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY:
            yield name, allowed


def usable_cpus(proc: Path = _PROC) -> int:
    """The number of threads that can run at once: the cores that this process may use, but no more than its control
    groups' share of CPU time, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [share for folder, version in _folders("cpu", proc) if (share := _cpu_share(folder, version)) is not None]
    return max(1, min([cores, *(math.ceil(share) for share in shares)]))


def limited_cpus(proc: Path = _PROC) -> int | None:
    """`usable_cpus` if a control group's share of CPU time makes it smaller than the number of cores, which torch would
    use; None otherwise, so that torch decides."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    usable = usable_cpus(proc)
    return usable if usable < cores else None


_REFUSED = re.compile(
    r"can(?:no|')t allocate memory|not enough memory|out of memory|bad_alloc|bad allocation|failed to map segment|"
    r"can't start new thread|unable to mmap|failed to allocate",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or an error that caused it, means that the system, the C library or torch refused an
    allocation."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if isinstance(error, RuntimeError | ImportError | SystemError) and _REFUSED.search(str(error)):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _folders(controller: str, proc: Path) -> Iterator[tuple[Path, int]]:
    """Yield the folder and the cgroup version of this process's control group and of each enclosing group that is
    visible, innermost first. A hybrid system may have groups of both versions."""
    try:
        groups, mounts = (proc / "cgroup").read_text(), (proc / "mountinfo").read_text()
    except OSError:
        return
    for line in groups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        for root, point in _mounts(mounts, controller, version):
            # Without a namespace of its own, a container sees its group's path from the host's root, but mounts that
            # group.
            inside = path.removeprefix(root) if path == root or path.startswith(root.rstrip("/") + "/") else ""
            folder = point / inside.strip("/") if ".." not in inside.split("/") else point
            while True:
                yield folder, version
                if folder == point or point not in folder.parents:
                    break
                folder = folder.parent


def _mounts(mountinfo: str, controller: str, version: int) -> Iterator[tuple[str, Path]]:
    """Yield each mounted control group file system: the group at its root, and the mount point (proc(5))."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or kind[0] != ("cgroup2" if version == 2 else "cgroup"):
            continue
        if version == 2 or controller in kind[-1].split(","):
            yield fields[3], Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields[4]))


def _memory_groups(proc: Path) -> Iterator[tuple[int, int]]:
    """Yield the limit of each control group that has one, and the memory used in it without the page cache, which can
    be dropped."""
    for folder, version in _folders("memory", proc):
        names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
        limits = [n for name in names if (n := _number(folder / name)) is not None and n < _NONE]
        if not limits:
            continue
        used = _number(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")) or 0
        yield min(limits), max(0, used - _page_cache(folder / "memory.stat", "file" if version == 2 else "total_cache"))


def _page_cache(stat: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        for line in stat.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def _cpu_share(folder: Path, version: int) -> float | None:
    """The number of processors whose time a control group may use; None if there is no limit."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        if version == 2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:
            return int(quota) / int(period)
    return None


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):  # "max" is not a number either
        return int(path.read_text())
    return None
