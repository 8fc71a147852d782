"""The progress bar in a terminal of 80 columns, and plain lines on a stream that breaks."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest
from rich.console import Console

from tiler.cli.progress import ProgressPrinter, Remaining
from tiler.events import Event, Note, PhaseDone, PhaseStarted, Progress, Saved, Workers, WorkerState
from tiler.memory.budget import Budget
from tiler.planning.table import MemoryPlan, PhasePlan, Term

LONG = [
    PhaseStarted(name="guide picture", total=100),
    PhaseDone(name="guide picture", seconds=12345.6, peak_rss_bytes=1_799_000_000),
    PhaseStarted(name="canvas", total=1000),
    Progress(name="canvas", done=500, total=1000, detail="step 11/20, 16/25 tile passes"),
    Saved(where="canvas step 11/20"),
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
    guide, canvas, status = (line for line in out.getvalue().splitlines() if line.strip())
    assert max(map(len, (guide, canvas, status))) <= columns
    assert re.fullmatch(r"peak [\d,]+ MB, saved at canvas step 11/20 *", status)
    for part in ("canvas", "step 11/20, tile", "16/25", " of ", f"{Budget(ceiling).max_bytes // 10**6:,} MB"):
        assert part in canvas
    assert canvas.count("━") + canvas.count("╸") + canvas.count("╺") >= 5  # half of ten
    assert "-:--:--" in canvas or "0:00" in canvas  # the remaining time
    assert "…" not in guide + canvas and "12345.6 s" in guide


def test_each_worker_has_a_row_while_it_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Its speed, tiles and memory, and whether it is late."""
    one = WorkerState(
        name="raspberry-pi-4-in-the-attic", tiles=1250, seconds_per_tile=68.4, peak_rss_bytes=654_000_000,
        max_ram_bytes=700_000_000, is_late=True,
    )  # fmt: skip
    two = WorkerState(name="laptop", tiles=0, seconds_per_tile=4.1, peak_rss_bytes=0, max_ram_bytes=800_000_000)
    plain = ProgressPrinter(Budget("1GB"), quiet=False)
    for _ in range(3):
        plain(Workers(workers=(one, two)))
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "worker raspberry-pi-4-in-the-attic: 68.4 s each, 1,250, late, 654 of 700 MB",
        "worker laptop: 4.1 s each, 0, 0 of 800 MB",
    ]
    out = io.StringIO()
    printer = ProgressPrinter(Budget("800MB"), quiet=False)
    printer._show(Console(file=out, width=80, force_terminal=False, color_system=None))
    rows: list[int] = []
    for event in (
        *LONG[2:],
        Workers(workers=(one, two)),
        Workers(workers=(two,)),
        PhaseDone(name="canvas", seconds=1, peak_rss_bytes=1),
    ):
        printer(event)
        assert printer._bar is not None
        out.seek(0)
        out.truncate(0)
        printer._bar.console.print(printer._bar.get_renderable())
        *lines, peak = [line for line in out.getvalue().splitlines() if line.strip()]
        assert peak.startswith("peak ")
        rows.append(len(lines))
        assert max(map(len, lines)) <= 80
        if len(lines) == 3:
            assert "68.4 s each, 1,250, late" in lines[1] and "654 of 700 MB" in lines[1]
    assert rows[-3:] == [3, 2, 1]


@pytest.mark.parametrize("before", [0, 120])
def test_remaining_time_is_known_after_a_tenth(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 tiles, 8 of which come every 10 seconds; some were done by an earlier run."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    remaining = Remaining()
    remaining.begin(before)
    assert remaining.seconds is None
    for done in range(before + 1, 401):
        now += 10 * ((done - before) % 8 == 1)
        remaining.note(done, 400)
        if (done - before) % 8 == 0:
            assert remaining.seconds == pytest.approx((400 - done) / 8 * 10)
    now += 5
    assert remaining.seconds == 0


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
