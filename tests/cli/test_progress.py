"""The progress bar in a terminal of 80 columns, and plain lines on a stream that breaks."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from tiler.cli.progress import ProgressPrinter
from tiler.events import Event, Note, PhaseDone, PhaseStarted, Progress
from tiler.memory.budget import Budget
from tiler.planning.table import MemoryPlan, PhasePlan, Term

LONG = [
    PhaseStarted(name="guide picture", total=100),
    PhaseDone(name="guide picture", seconds=12345.6, peak_rss_bytes=1_799_000_000),
    PhaseStarted(name="canvas", total=1000),
    Progress(name="canvas", done=500, total=1000, detail="step 11/20, 16/25 tile passes"),
]


@pytest.mark.parametrize("columns", [80, 100, 160])
@pytest.mark.parametrize("ceiling", ["800MB", "16GB"])
def test_a_row_is_whole_in_80_columns(columns: int, ceiling: str) -> None:
    out = io.StringIO()
    printer = ProgressPrinter(Budget(ceiling), quiet=False)
    printer._show(Console(file=out, width=columns, force_terminal=False, color_system=None))
    for event in LONG:
        printer(event)
    assert printer._bar is not None
    out.truncate(0)
    printer._bar.console.print(printer._bar.get_renderable())
    guide, canvas = (line for line in out.getvalue().splitlines() if line.strip())
    assert max(len(guide), len(canvas)) <= columns
    for part in ("canvas", "step 11/20, tile", "16/25", " of ", f"{Budget(ceiling).max_bytes // 10**6:,} MB"):
        assert part in canvas
    assert canvas.count("━") + canvas.count("╸") + canvas.count("╺") >= 5  # half of ten
    assert "-:--:--" in canvas or "0:00" in canvas  # the remaining time
    assert "…" not in guide + canvas and "12345.6 s" in guide


def test_a_stderr_that_nobody_reads_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Broken())
    printer = ProgressPrinter(Budget("1GB"), quiet=False)
    events: list[Event] = [Note(text="x"), *LONG]
    for event in events:
        printer(event)


@pytest.mark.parametrize("scale", [1, 1000])
def test_the_plans_table_fits_80_columns(scale: int) -> None:
    names = [
        "python + libraries",
        "canvas",
        "activations",
        "weights, resident",
        "arena",
        "picture",
        "scratch rows",
        "guide",
    ]
    terms = tuple(Term(name=name, nbytes=scale * 10**6 * (n + 1)) for n, name in enumerate(names))
    phases = tuple(PhasePlan(name=name, terms=terms) for name in ("encode prompts", "guide picture", "decode"))
    table = MemoryPlan(max_bytes=10**12, phases=phases, smallest_bytes=1).table()
    assert max(map(len, table.splitlines())) <= 80
    for phase in phases:
        assert f"\n{phase.name}" in table
    for term in terms:
        assert table.count(f"{term.name} {term.nbytes / 1e6:,.0f}") == 3  # in one piece
    assert f"{36 * scale:,} MB" in table
