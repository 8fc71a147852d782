"""The table of the memory of each phase, and the refusal if it is too much. Knows sums, not their meaning."""

from __future__ import annotations

from dataclasses import dataclass

from tiler.errors import BudgetRefused
from tiler.memory.budget import format_mb, name_ceiling
from tiler.memory.tuning import MARGIN

WIDTH = 80  # columns of a terminal
FREE_HEAP = "free heap"  # the term of freed memory that stays, to be used again
# The memory of a process may differ by so much from that of the next one: by 140 kB among six (`tiler plan --json`).
_SPREAD_BYTES = 250_000


def whole_mb(nbytes: int) -> int:
    """A ceiling of `nbytes` in MB as people are told it: rounded up, and so that it suits the next process too."""
    return -(-(nbytes + _SPREAD_BYTES) // 10**6)


@dataclass(frozen=True, kw_only=True)
class Term:
    """One named part of a phase's peak, in bytes."""

    name: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """A phase, and the terms that are in memory together at its peak; `advice` tells the user what to do if the sum is
    too large."""

    name: str
    terms: tuple[Term, ...]
    advice: str = ""

    @property
    def peak_bytes(self) -> int:
        return sum(term.nbytes for term in self.terms)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """All phases under one ceiling. `smallest_bytes` is the lowest ceiling that can make the same picture;
    `beside_bytes` of the requested ceiling are used by other processes."""

    max_bytes: int
    phases: tuple[PhasePlan, ...]
    smallest_bytes: int
    beside_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        return max(phase.peak_bytes for phase in self.phases)

    def peak_of(self, name: str) -> int:
        """The peak of the phase with this name, in bytes."""
        return self._phase(name).peak_bytes

    def heap_of(self, name: str) -> int:
        """The freed memory that may stay in the phase with this name, in bytes."""
        return sum(term.nbytes for term in self._phase(name).terms if term.name == FREE_HEAP)

    def _phase(self, name: str) -> PhasePlan:
        return next(phase for phase in self.phases if phase.name == name)

    @property
    def fits(self) -> bool:
        """Whether the render may start: a plan may fill MARGIN of the ceiling."""
        return self.peak_bytes <= self.max_bytes * MARGIN

    def check(self, *, table: bool = True, advice: str = "") -> None:
        """Raise BudgetRefused if the plan does not fit, with the smallest ceiling that would, `advice` on other
        options, and the table."""
        if not self.fits:
            worst = max(self.phases, key=lambda p: p.peak_bytes)
            raise BudgetRefused(
                f"the phase '{worst.name}' needs {format_mb(worst.peak_bytes)}, and a plan may fill {MARGIN:.0%} of "
                f"{name_ceiling(self.max_bytes, self.beside_bytes)}; the smallest --max-ram that works is "
                + self.smallest_text
                + (f"; {worst.advice}" if worst.advice else advice),
                self.smallest_bytes,
                self.table() if table else "",
            )

    @property
    def smallest_text(self) -> str:
        """`smallest_bytes` plus the memory of other processes under the ceiling, as a value for --max-ram, rounded up
        to MB."""
        return f"{whole_mb(self.smallest_bytes + self.beside_bytes)}MB"

    def table(self) -> str:
        """One row per phase with its peak and its terms, largest first, within 80 columns; MB of 10^6 bytes."""
        first = max(len("phase"), *(len(phase.name) for phase in self.phases))
        lines = [f"{'phase':{first}}  {'peak':>8}  of which (MB)"]
        for phase in self.phases:
            terms = [
                f"{term.name} {term.nbytes / 1e6:,.0f}"
                for term in sorted(phase.terms, key=lambda term: -term.nbytes)
                if term.nbytes >= 500_000
            ]
            line = f"{phase.name:{first}}  {format_mb(phase.peak_bytes):>8}  "
            indent, start = " " * len(line), len(line)
            for term in terms:
                if len(line) > start and len(line) + 2 + len(term) > WIDTH - 1:
                    lines.append(line + ",")
                    line = indent
                line += (", " if len(line) > start else "") + term
            lines.append(line)
        return "\n".join(lines)
