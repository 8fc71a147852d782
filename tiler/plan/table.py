"""The table of what each phase will need, and the refusal when it is too much. Knows sums, not what they are for."""

from __future__ import annotations

from dataclasses import dataclass

from tiler.errors import BudgetRefused
from tiler.memory.budget import MARGIN, format_mb


@dataclass(frozen=True, kw_only=True)
class Term:
    """One named part of a phase's peak, in bytes."""

    name: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """A phase and the terms that are in memory together at its peak."""

    name: str
    terms: tuple[Term, ...]

    @property
    def peak_bytes(self) -> int:
        return sum(term.nbytes for term in self.terms)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """All phases under one ceiling. `smallest_bytes` is the lowest ceiling with which the same picture can be made."""

    max_bytes: int
    phases: tuple[PhasePlan, ...]
    smallest_bytes: int

    @property
    def peak_bytes(self) -> int:
        return max(phase.peak_bytes for phase in self.phases)

    def peak_of(self, name: str) -> int:
        return next(phase.peak_bytes for phase in self.phases if phase.name == name)

    def check(self, *, table: bool = True) -> None:
        """Raises BudgetRefused with the smallest ceiling that would do, and the table."""
        if self.peak_bytes > self.max_bytes * MARGIN:
            worst = max(self.phases, key=lambda p: p.peak_bytes)
            raise BudgetRefused(
                f"the plan needs {format_mb(worst.peak_bytes / MARGIN)} in the phase {worst.name!r}, the ceiling is "
                f"{format_mb(self.max_bytes)}; the smallest --max-ram that would do is {self.smallest_text}"
                + (f"\n{self.table()}" if table else "")
            )

    @property
    def smallest_text(self) -> str:
        return f"{-(-self.smallest_bytes // 10**6)}MB"

    def table(self) -> str:
        """One line a phase, one column a term; MB of 10^6 bytes."""
        names = list(dict.fromkeys(term.name for phase in self.phases for term in phase.terms))
        rows = [["phase", *names, "peak"]]
        for phase in self.phases:
            by_name = {term.name: term.nbytes for term in phase.terms}
            rows.append(
                [
                    phase.name,
                    *(f"{by_name[n] / 1e6:.0f}" if n in by_name else "–" for n in names),
                    f"{phase.peak_bytes / 1e6:.0f} MB",
                ]
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        )
