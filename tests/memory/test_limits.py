"""Limits of control groups and users, in trees of files as the kernel shows them; refused allocations."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from tiler.errors import BudgetExceeded, ModelError
from tiler.memory import limits

MB = 10**6


class Kernel:
    """A /proc/self and control groups of version 1 or 2, as files in a folder."""

    def __init__(self, base: Path, version: int, group: str, root: str = "/") -> None:
        self.proc, self.version = base / "proc", version
        self.points = {name: base / "cgroup" / ("" if version == 2 else name) for name in ("memory", "cpu")}
        self.proc.mkdir(parents=True)
        if version == 2:
            lines, kinds = [f"0::{group}"], {"memory": ("cgroup2", "rw,nsdelegate")}
        else:
            lines = [f"4:memory:{group}", f"3:cpu,cpuacct:{group}", "2:name=systemd:/", "0::/"]
            kinds = {name: ("cgroup", f"rw,{name}") for name in ("memory", "cpu")}
        (self.proc / "cgroup").write_text("\n".join(lines) + "\n")
        mounts = [f"23 1 0:21 / {base} rw,relatime - tmpfs tmpfs rw"]
        for number, (name, (kind, options)) in enumerate(kinds.items()):
            point = str(self.points[name]).replace(" ", r"\040")
            mounts.append(f"3{number} 23 0:2{number} {root} {point} rw,relatime shared:9 - {kind} cgroup {options}")
        (self.proc / "mountinfo").write_text("\n".join(mounts) + "\n")

    def write(self, controller: str, folder: str, **files: object) -> None:
        """Write files; `memory_max=1` is the file memory.max."""
        path = self.points[controller] / folder.strip("/")
        path.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (path / name.replace("_", ".", 1)).write_text(f"{value}\n")


def test_the_least_of_all_groups_around_a_process_holds(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path / "a b", 2, "/pods/pod1/app")
    kernel.write("memory", "/pods", memory_max="max")
    kernel.write("memory", "/pods/pod1", memory_max=600 * MB, memory_high=500 * MB)
    kernel.write("memory", "/pods/pod1/app", memory_max=700 * MB, memory_high="max")
    kernel.write("memory", "/pods/pod2", memory_max=1 * MB)  # a neighbour's
    assert limits.cgroup_limit(kernel.proc) == 500 * MB
    kernel.write("memory", "/pods/pod1/app", memory_max=400 * MB)
    assert limits.cgroup_limit(kernel.proc) == 400 * MB
    kernel.write("memory", "/", memory_max=300 * MB)  # the root of a container's own namespace
    assert limits.cgroup_limit(kernel.proc) == 300 * MB


def test_auto_is_nine_tenths_of_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process, tiny: Path
) -> None:
    """Nine tenths of the least that groups, user limits and the machine leave, including this process's own use; the
    plan states the number."""
    own = psutil.Process().memory_info().rss
    machine = SimpleNamespace(available=3000 * MB, total=8000 * MB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    kernel = Kernel(tmp_path, 2, "/app")
    assert limits.ceiling_for_us(kernel.proc) == pytest.approx(0.9 * (3000 * MB + own), abs=30 * MB)
    kernel.write("memory", "/app", memory_max=900 * MB + own, memory_current=300 * MB + own)
    assert limits.ceiling_for_us(kernel.proc) == pytest.approx(0.9 * (600 * MB + own), abs=30 * MB)
    monkeypatch.setattr(limits, "_user_limits", lambda: iter([("RLIMIT_AS", 500 * MB)]))
    assert limits.ceiling_for_us(kernel.proc) == 450 * MB
    monkeypatch.setattr(limits, "_user_limits", lambda: iter([("RLIMIT_AS", 7001 * MB)]))
    machine.available = 16000 * MB
    monkeypatch.setattr(limits, "_memory_groups", lambda proc: iter(()))
    ran = in_process("plan", "--model", tiny, "--size", 64, "--max-ram", "auto", "--json")
    assert ran.json["max_ram_bytes"] == 6300 * MB, ran.err


def test_groups_of_version_1(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, 1, "/docker/abc")
    kernel.write("memory", "/docker/abc", memory_limit_in_bytes=2**63 - 4096)
    assert limits.cgroup_limit(kernel.proc) is None
    kernel.write("memory", "/docker", memory_limit_in_bytes=512 * MB)
    assert limits.cgroup_limit(kernel.proc) == 512 * MB


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_that_sees_the_hosts_path_of_its_group(tmp_path: Path, version: int) -> None:
    """Docker without a namespace of its own: /proc gives the path from the host's root, but the group itself is
    mounted."""
    kernel = Kernel(tmp_path, version, "/docker/abc/inner", root="/docker/abc")
    key = "memory_max" if version == 2 else "memory_limit_in_bytes"
    kernel.write("memory", "/", **{key: 900 * MB})
    kernel.write("memory", "/inner", **{key: 800 * MB})
    assert limits.cgroup_limit(kernel.proc) == 800 * MB


@pytest.mark.parametrize("group", ["/../../other", "/gone", "/"])
def test_a_group_that_cannot_be_seen(tmp_path: Path, group: str) -> None:
    kernel = Kernel(tmp_path, 2, group)
    kernel.write("memory", "/", memory_max=900 * MB)
    assert limits.cgroup_limit(kernel.proc) == 900 * MB


@pytest.mark.parametrize("content", [None, "", "nonsense", "1:2"])
def test_a_system_without_control_groups(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "cgroup").write_text(content)
        (tmp_path / "mountinfo").write_text(content)
    assert limits.cgroup_limit(tmp_path) is None
    assert limits.limited_cpus(tmp_path) is None
    assert limits.usable_cpus(tmp_path) == len(os.sched_getaffinity(0))
    assert limits.available_ram(tmp_path)[1] == psutil.virtual_memory().total


@pytest.mark.parametrize("version", [1, 2])
def test_what_others_use_in_a_group_is_not_free_and_page_cache_is(tmp_path: Path, version: int) -> None:
    kernel = Kernel(tmp_path, version, "/app")
    if version == 2:
        kernel.write(
            "memory", "/app", memory_max=1000 * MB, memory_current=700 * MB, memory_stat=f"anon 1\nfile {300 * MB}"
        )
    else:
        kernel.write("memory", "/app", memory_limit_in_bytes=1000 * MB, memory_usage_in_bytes=700 * MB)
        kernel.write("memory", "/app", memory_stat=f"cache 5\ntotal_cache {300 * MB}")
    available, total = limits.available_ram(kernel.proc)
    assert (min(available, 600 * MB), total) == (600 * MB, 1000 * MB)


CPUS = [(150_000, 100_000, 2), (100_000, 100_000, 1), (50_000, 100_000, 1), (6_300_000, 100_000, 63), (1000, 0, 64),
        ("max", 100_000, 64), (-1, 100_000, 64), (10**9, 100_000, 64)]  # fmt: skip


@pytest.mark.parametrize(("quota", "period", "want"), CPUS)
@pytest.mark.parametrize("version", [1, 2])
def test_a_share_of_processor_time_is_rounded_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, quota: object, period: int, want: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    kernel = Kernel(tmp_path, version, "/outer/inner")
    if version == 2:
        kernel.write("cpu", "/outer", cpu_max=f"{quota} {period}")
        kernel.write("cpu", "/outer/inner", cpu_max="max 100000")
    else:
        kernel.write("cpu", "/outer", cpu_cfs_quota_us=quota, cpu_cfs_period_us=period)
        kernel.write("cpu", "/outer/inner", cpu_cfs_quota_us=-1, cpu_cfs_period_us=100_000)
    assert limits.usable_cpus(kernel.proc) == want
    assert limits.limited_cpus(kernel.proc) == (want if want < 64 else None)


def test_a_warning_names_what_lies_below_the_ceiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(tmp_path, 2, "/app")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64_000 * MB, total=64_000 * MB))
    assert limits.memory_warning(800 * MB, kernel.proc) is None
    kernel.write("memory", "/app", memory_max=700 * MB)
    assert "700 MB" in str(limits.memory_warning(800 * MB, kernel.proc))
    assert "--max-ram 665MB" in str(limits.memory_warning(800 * MB, kernel.proc))
    assert limits.memory_warning(700 * MB, kernel.proc) is None
    kernel.write("memory", "/app", memory_max="max")
    own = psutil.Process().memory_info().rss
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * MB, total=64_000 * MB))
    assert "are free" in str(limits.memory_warning(own + 300 * MB, kernel.proc))
    assert limits.memory_warning(own + 50 * MB, kernel.proc) is None


def test_a_users_own_limits_are_warned_of_and_the_least_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not list(limits._user_limits()), "these tests run without ulimit -d and -v"
    infinite = resource.RLIM_INFINITY
    for kind, name in ((resource.RLIMIT_DATA, "ulimit -d"), (resource.RLIMIT_AS, "ulimit -v")):
        for allowed, refused in ((500 * MB, False), (40 * MB, True)):
            monkeypatch.setattr(
                resource,
                "getrlimit",
                lambda k, kind=kind, allowed=allowed: (allowed if k == kind else infinite, infinite),
            )
            assert name in str(limits.memory_warning(800 * MB, tmp_path))
            if refused:
                with pytest.raises(BudgetExceeded, match=name):
                    limits.check_user_limits()
            else:
                limits.check_user_limits()


REFUSED = [
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"
    ),
    RuntimeError("std::bad_alloc"),
    RuntimeError("could not execute: Out of memory"),
    torch.OutOfMemoryError("allocation"[:0] + "out of memory"),
    RuntimeError("can't start new thread"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
]


@pytest.mark.parametrize("error", REFUSED, ids=repr)
def test_memory_that_is_refused_is_known_in_every_form(error: Exception) -> None:
    assert limits.is_out_of_memory(error)
    wrapped = ModelError("no model can be built from it")
    wrapped.__cause__ = error
    assert limits.is_out_of_memory(wrapped)
    beside = ValueError("raised while that was handled")
    beside.__context__ = error
    assert limits.is_out_of_memory(beside)
    beside.__suppress_context__ = True
    assert not limits.is_out_of_memory(beside)


@pytest.mark.parametrize(
    "error",
    [None, RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "No space left on device"), ValueError("out of memory"),
     ModelError("x: out of memory"), KeyError("can't allocate memory")],
)  # fmt: skip
def test_other_errors_are_not_taken_for_it(error: Exception | None) -> None:
    assert not limits.is_out_of_memory(error)


def test_an_error_that_causes_itself_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not limits.is_out_of_memory(first)


def test_torchs_own_refusal_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert limits.is_out_of_memory(caught.value)


@pytest.mark.parametrize(("kind", "megabytes"), [("DATA", 100), ("DATA", 250), ("AS", 300)])
def test_a_run_without_memory_is_exit_5_and_one_line(tmp_path: Path, kind: str, megabytes: int) -> None:
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_{kind}, ({megabytes * MB},) * 2)
from tiler.cli.main import main
main()
"""
    options = ["--model", "mini", "--size", "256", "--steps", "1", "-q"]
    ran = subprocess.run(
        [sys.executable, "-c", code, "render", "x", *options], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert ran.returncode == 5, ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    assert "ulimit" in ran.stderr


@pytest.mark.parametrize(("given", "variable", "want"), [("None", None, 1), ("2", None, 2), ("None", "2", 2)])
def test_torch_gets_as_many_threads_as_a_container_has_processors(given: str, variable: str | None, want: int) -> None:
    """Unless the user sets the number."""
    code = f"""
from tiler.memory import limits
limits.limited_cpus = lambda: 1
from tiler.cli.options import prepare_process
prepare_process({given})
import torch
print(torch.get_num_threads())
"""
    known = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    env = known if variable is None else known | {"OMP_NUM_THREADS": variable}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, timeout=120)
    assert int(ran.stdout) == want
