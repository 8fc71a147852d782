"""The ceiling: units, what a budget measures and reports, and when freed memory leaves the process."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from tiler.errors import BudgetExceeded, UsageError
from tiler.memory import process
from tiler.memory.budget import Budget, parse_bytes
from tiler.memory.policy import at_layer
from tiler.memory.process import Rss, read_rss, trim


def fresh(code: str) -> str:
    """The output of a new process."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.mark.parametrize(
    ("text", "want"),
    [("800MB", 800_000_000), ("1.5 GiB", 3 * 2**29), ("760mib", 760 * 2**20), (123, 123), ("2g", 2 * 10**9)],
)
def test_amounts(text: str | int, want: int) -> None:
    assert parse_bytes(text) == want


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "800XB", "1e9", "nan"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(UsageError, match="800MB"):
        parse_bytes(text)


def test_budget_measures_a_spike_between_two_samples() -> None:
    trim()  # a phase begins with that
    with Budget("10GB") as budget:
        before = budget.peak_rss_bytes
        with budget.phase("spike") as use:
            block = torch.ones(50_000_000)  # 200 MB, gone at once
            del block
    assert 190e6 < budget.peak_rss_bytes - before < 260e6
    assert use.peak_rss_bytes == budget.peak_rss_bytes
    assert not budget.peak_sampled


def test_a_phase_tells_what_its_peak_consists_of() -> None:
    with Budget("10GB") as budget, budget.phase("held") as use:
        block = torch.ones(50_000_000)
        budget.check("now")
        peak, now = budget.peak_rss_bytes, read_rss()
        del block
    assert use.peak_rss_bytes > peak - 1e6 and peak > now.now - 1e6  # the kernel counts some pages late
    assert use.anon_bytes == pytest.approx(now.anon, abs=4e6)
    assert use.file_bytes == pytest.approx(now.file, abs=4e6)
    assert use.anon_bytes > 200e6


def test_a_second_run_under_a_budget_reports_itself_alone() -> None:
    budget = Budget("10GB")
    with budget:
        with budget.phase("large"):
            block = torch.ones(50_000_000)
            del block
        first = budget.peak_rss_bytes
    with budget, budget.phase("small"):
        pass
    assert [phase.name for phase in budget.phases] == ["small"]
    assert budget.peak_rss_bytes < first - 100_000_000
    with budget:  # the caller measures several runs together
        for name in ("large", "small"):
            with budget, budget.phase(name):
                block = torch.ones(50_000_000 if name == "large" else 1)
                del block
        assert [phase.name for phase in budget.phases] == ["small"]
        assert budget.peak_rss_bytes >= first - 20_000_000


def test_budget_raises_at_the_ceiling_with_the_place() -> None:
    with Budget(read_rss().now + 60_000_000) as budget:
        budget.check("before")
        block = torch.ones(40_000_000)
        with pytest.raises(BudgetExceeded, match=r"unet\.up_blocks\.1") as caught:
            budget.check("unet.up_blocks.1")
        del block
    assert caught.value.exit_code == 5
    named = re.search(r"--max-ram (\d+MB) would have been enough", str(caught.value))
    assert (
        named is not None and budget.peak_rss_bytes <= 0.97 * Budget(named[1]).max_bytes < 1.1 * budget.peak_rss_bytes
    )


def test_34_the_soft_limit_warns_once_and_only_where_nothing_can_be_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "trim", lambda: None)  # nothing can be
    now = read_rss().now
    with Budget(int(now / 0.99)) as budget:
        budget.max_bytes = int(budget.rss_bytes / 0.99)
        budget.check("here")
        assert budget.take_tight() and not budget.take_tight()
    with Budget(2 * now) as budget:
        budget.check("here")
        assert not budget.take_tight()


def test_budget_counts_children() -> None:
    code = "x = bytearray(b'1') * 80_000_000; print(1, flush=True); input()"
    with Budget("10GB") as budget:
        before = budget.rss_bytes
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"1\n"
            give_up = time.monotonic() + 60
            while budget.rss_bytes - before < 60_000_000 and time.monotonic() < give_up:
                time.sleep(0.01)  # until the sampler's next look
            seen = budget.rss_bytes - before
            child.communicate(b"\n", timeout=60)
        finally:
            child.kill()
            child.wait(60)
    assert seen >= 60_000_000
    assert budget.peak_rss_bytes - before >= 60_000_000


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set what the kernel reports from now on."""

    def report(now: int, peak: int = 0, swapped: int = 0, *, resets: bool = False) -> None:
        monkeypatch.setattr(process, "read_rss", lambda: Rss(now, peak, now, 0, swapped))
        monkeypatch.setattr(process, "reset_peak", lambda: resets)
        monkeypatch.setattr(process, "children_rss", lambda: 0)
        monkeypatch.setattr(Budget, "rss_bytes", now)

    return report


def test_a_kernel_without_a_mark_is_sampled_and_the_budget_says_so(kernel: Callable[..., None]) -> None:
    kernel(300_000_000)
    with Budget("800MB") as budget:
        kernel(500_000_000)
        assert budget.peak_rss_bytes == 500_000_000
        kernel(400_000_000)
        assert budget.peak_rss_bytes == 500_000_000
    assert budget.peak_sampled


def test_a_mark_of_before_that_cannot_be_reset_is_not_ours(kernel: Callable[..., None]) -> None:
    """A program that once held 2 GB can still render under 800 MB, even if /proc is read-only."""
    kernel(300_000_000, 2_000_000_000)
    with Budget("800MB") as budget:
        budget.check("start")
        assert budget.peak_rss_bytes == 300_000_000
        kernel(500_000_000, 2_100_000_000)  # this mark is of our own making
        assert budget.peak_rss_bytes == 2_100_000_000
        with pytest.raises(BudgetExceeded):
            budget.check("middle")
    assert budget.peak_sampled
    kernel(300_000_000, 300_000_000, resets=True)
    with Budget("800MB") as budget:
        budget.check("start")
    assert not budget.peak_sampled


def test_swapping_is_said_once(kernel: Callable[..., None]) -> None:
    kernel(300_000_000, 300_000_000, 1_000_000, resets=True)
    with Budget("800MB") as budget:
        assert budget.swap_warning() is None
        for swapped in (90_000_000, 40_000_000):
            kernel(300_000_000, 300_000_000, swapped)
            assert budget.peak_rss_bytes == 300_000_000  # which looks at all of it
        assert "90 MB" in str(budget.swap_warning())
        assert budget.swap_warning() is None
    assert budget.swapped_bytes == 90_000_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are glibc's")
@pytest.mark.parametrize(("planned", "stays"), [("100MB", True), ("1900MB", False)])
def test_freed_memory_stays_only_under_a_roomy_ceiling(planned: str, stays: bool) -> None:
    """A layer's 40 MB are faulted in again at every call unless the ceiling is far above the plan."""
    code = f"""
import resource
from tiler import Budget
from tiler.memory import process
from tiler.memory.budget import parse_bytes
from tiler.memory.policy import at_layer
process.frugal_allocator()
check = at_layer(Budget("2GB"), parse_bytes({planned!r}))
faults = []
for _ in range(6):
    block = bytearray(40 * 2**20)
    for i in range(0, len(block), 4096):
        block[i] = 1
    del block
    check("layer")
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print((faults[-1] - faults[0]) * resource.getpagesize(), process.read_rss().now)
"""
    faulted, now = map(int, fresh(code).split())
    assert (faulted < 10 * 2**20) == stays
    assert (now > 40 * 2**20) == stays


@pytest.mark.parametrize(
    ("planned", "freed", "stays"), [("1500MB", 40, True), ("1500MB", 80, False), ("1700MB", 40, False)]
)
def test_freed_heap_stays_where_the_plan_leaves_room(
    monkeypatch: pytest.MonkeyPatch, planned: str, freed: int, stays: bool
) -> None:
    released = []
    monkeypatch.setattr(process, "free_heap", lambda: freed * 2**20)
    monkeypatch.setattr(process, "release_heap", lambda: released.append(freed))
    at_layer(Budget("2GB"), parse_bytes(planned))("layer")
    assert (not released) == stays


@pytest.mark.parametrize(("freed", "stays"), [(80, True), (90, False)])
def test_freed_heap_stays_that_the_plan_has(monkeypatch: pytest.MonkeyPatch, freed: int, stays: bool) -> None:
    """Under a ceiling that leaves no room above the plan."""
    released = []
    monkeypatch.setattr(process, "free_heap", lambda: freed * 2**20)
    monkeypatch.setattr(process, "release_heap", lambda: released.append(freed))
    at_layer(Budget("2GB"), parse_bytes("1700MB"), heap_bytes=88 * 2**20)("layer")
    assert (not released) == stays


def test_memory_is_short_when_what_comes_would_not_fit() -> None:
    budget = Budget("10GB")
    assert not budget.short(1_000_000_000)
    assert budget.short(9_700_000_000)
