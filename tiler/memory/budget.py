"""A memory ceiling that is measured and obeyed.

    with Budget("800MB") as budget:
        work()
    assert budget.peak_rss_bytes < budget.max_bytes

Works for any program: it knows nothing of rendering. MB is 10^6 bytes and MiB 2^20.
"""

from __future__ import annotations

import re
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import psutil

from tiler import interrupts
from tiler.errors import BudgetExceeded, UsageError
from tiler.memory import process
from tiler.memory.tuning import ALMOST, MARGIN, NEAR

_UNITS = {
    "": 1,
    "B": 1,
    "K": 10**3,
    "KB": 10**3,
    "KIB": 2**10,
    "M": 10**6,
    "MB": 10**6,
    "MIB": 2**20,
    "G": 10**9,
    "GB": 10**9,
    "GIB": 2**30,
}
_SAMPLE_SECONDS = 0.05
_SOFT = (1 + MARGIN) / 2  # of the ceiling
_ROUND = 10**7  # bytes: messages round a ceiling up to a multiple of this
_SWAPPED = 16 * 10**6  # below this, swapping is normal on a busy machine


def parse_bytes(text: str | int) -> int:
    """ "800MB", "1.5 GiB", "800000000" → bytes. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or match[2].upper() not in _UNITS:
        raise UsageError(f"{text!r} is not an amount of memory; write it like 800MB, 1.5GB or 760MiB, or auto")
    if isinstance(text, str) and not match[2] and 0 < float(match[1]) < 10**6:
        raise UsageError(f"{text!r} is an amount of bytes; did you mean {match[1]}MB?")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


def name_ceiling(max_bytes: int, beside_bytes: int = 0) -> str:
    """How messages name a process's ceiling of `max_bytes`; the ceiling that the user gave covers `beside_bytes` of
    other processes too."""
    if not beside_bytes:
        return f"the ceiling of {format_mb(max_bytes)}"
    whole, others = format_mb(max_bytes + beside_bytes), format_mb(beside_bytes)
    return f"{format_mb(max_bytes)} (the ceiling of {whole} less {others} for the queue's other processes)"


def _ceiling(max_ram: str | int) -> int:
    """Parse a ceiling into bytes; "auto" takes nine tenths of the memory that is free now. Raises UsageError."""
    if str(max_ram).strip().lower() == "auto":
        from tiler.memory.limits import ceiling_for_us  # which imports format_mb from this module

        return ceiling_for_us()
    try:
        return parse_bytes(max_ram)
    except UsageError as error:
        raise UsageError(f"--max-ram {error}") from None


@dataclass(kw_only=True)
class PhaseUse:
    """The resources that one phase used: wall seconds and the highest RSS, with its anonymous and file-backed parts as
    last sampled near the peak."""

    name: str
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    anon_bytes: int = 0
    file_bytes: int = 0


class Budget:
    """A memory ceiling for this process and its children, in bytes of RSS; "auto" is nine tenths of the free memory.

    A context manager that may be entered again: each run starts with an empty list of phases, and with its own peak
    unless the caller has already entered the budget.

    `check` raises BudgetExceeded at the ceiling, and `take_tight` warns before that; `phase` attributes the peak to a
    phase. `peak_rss_bytes` is the highest RSS while the budget was open: the kernel's high-water mark (VmHWM), reset on
    entry and between phases and combined here. If the kernel keeps no mark or does not allow a reset, RSS is sampled
    every 50 ms instead and `peak_sampled` is true. `swapped_bytes` is the largest amount of this process that was
    swapped out. `beside_bytes` of the ceiling belong to other processes and are not measured here.
    """

    def __init__(self, max_ram: str | int = "800MB", *, beside_bytes: int = 0) -> None:
        self.max_bytes, self.beside_bytes = _ceiling(max_ram) - beside_bytes, beside_bytes
        if self.max_bytes <= 0:
            raise UsageError(f"the memory ceiling must be positive, not {max_ram!r}")
        self.phases: list[PhaseUse] = []
        self.swapped_bytes = 0
        self.peak_sampled = False
        self._peak = 0
        self._stale_peak = 0  # an earlier mark that could not be reset
        self._swap_told = self._tight = False
        self._children = 0
        self._depth = 0
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._depth += 1
        self.phases = []
        if self._depth > 1:  # render() enters a budget that its caller may have entered already
            return self
        self._peak = self.swapped_bytes = self._children = 0
        self.peak_sampled = self._swap_told = self._tight = False
        self._reset_peak()
        self._note_peak()
        self._stop.clear()
        self._sampler = threading.Thread(target=self._sample, name="tiler-rss-sampler", daemon=True)
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._stop.set()
        if self._sampler is not None:
            self._sampler.join()
        self._note_peak()

    @property
    def peak_rss_bytes(self) -> int:
        """The highest RSS so far. Children are included as sampled."""
        self._note_peak()
        return self._peak

    @property
    def asked_bytes(self) -> int:
        """The ceiling that the user gave for all processes together."""
        return self.max_bytes + self.beside_bytes

    @property
    def rss_bytes(self) -> int:
        """The RSS now. Children are included as last sampled."""
        return int(self._process.memory_info().rss) + self._children

    def room(self, planned_bytes: int, most: int) -> int:
        """How many freed bytes the process may keep above a plan: `most` if there are at least twice as many between
        the plan and NEAR, else none."""
        return most if int(NEAR * self.max_bytes) - planned_bytes >= 2 * most else 0

    def short(self, coming_bytes: int) -> bool:
        """Whether `coming_bytes` more would exceed the share of the ceiling that a plan may fill."""
        return self.rss_bytes + coming_bytes >= MARGIN * self.max_bytes

    def check(self, where: str) -> None:
        """Compare the current RSS with the ceiling (14 µs). Near the ceiling, collect garbage and trim the heap; at the
        ceiling, raise BudgetExceeded. A pending stop signal is handled here as well."""
        interrupts.check()
        if self.rss_bytes >= ALMOST * self.max_bytes:
            process.trim()
            self._note_peak()
            self._tight = self._tight or self.rss_bytes >= _SOFT * self.max_bytes
        # A spike between two checks is a breach as well, though it is over.
        if max(self.rss_bytes, self._peak) >= self.max_bytes:
            would_do = -(-int(self.peak_rss_bytes / MARGIN + self.beside_bytes) // _ROUND) * _ROUND
            raise BudgetExceeded(
                f"{name_ceiling(self.max_bytes, self.beside_bytes)} was reached at {where} "
                f"(peak {format_mb(self.peak_rss_bytes)}); "
                f"--max-ram {would_do // 10**6}MB would have been enough, and a smaller --size needs less"
            )

    def take_tight(self) -> bool:
        """Whether memory reached the soft limit, halfway between the planned share and the ceiling, and could not be
        freed, so that the remaining work should take smaller batches. Reading the flag clears it."""
        tight, self._tight = self._tight, False
        return tight

    @contextmanager
    def phase(self, name: str) -> Iterator[PhaseUse]:
        """Attribute time and peak memory to the phase `name`. Memory is trimmed when the phase starts, because the
        previous phase may only now have released its last references, and when it ends."""
        use = PhaseUse(name=name)
        process.trim()
        self._note_peak()
        self._reset_peak()
        self.phases.append(use)
        start = time.monotonic()
        try:
            yield use
        finally:
            self._note_peak()
            use.seconds = time.monotonic() - start
            process.trim()

    def swap_warning(self) -> str | None:
        """A warning with advice, returned once, after more than 16 MB of this process were swapped out."""
        self._note_peak()
        if self._swap_told or self.swapped_bytes < _SWAPPED:
            return None
        self._swap_told = True
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        return (
            f"the system has swapped out {format_mb(self.swapped_bytes)} of this run ({faults:,} page faults wait for the "
            "disk): it will be far slower than it could be; end other programs, or lower --max-ram"
        )

    def _reset_peak(self) -> None:
        done = process.reset_peak()
        mark = process.read_rss().peak
        self._stale_peak = 0 if done else mark
        self.peak_sampled = self.peak_sampled or not done or not mark

    def _note_peak(self) -> None:
        rss = process.read_rss()
        self.swapped_bytes = max(self.swapped_bytes, rss.swapped)
        peak = max(rss.peak if rss.peak > self._stale_peak else 0, rss.now) + self._children
        self._peak = max(self._peak, peak)
        if self.phases and peak >= self.phases[-1].peak_rss_bytes:
            use = self.phases[-1]
            use.peak_rss_bytes = peak
            if rss.anon + rss.file > use.anon_bytes + use.file_bytes:
                use.anon_bytes, use.file_bytes = rss.anon, rss.file

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._children = process.children_rss()
            self._note_peak()
