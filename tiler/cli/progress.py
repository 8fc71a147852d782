"""Shows events on stderr: a rich bar on a terminal, plain lines elsewhere, or JSON for programs."""

from __future__ import annotations

import json
import re
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tiler.cli.terminal import harmless
from tiler.events import Event, Note, PhaseDone, PhaseStarted, Progress, Saved
from tiler.memory.budget import Budget, format_mb

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_LINE_EVERY = 30.0  # seconds between plain lines


class ProgressPrinter:
    """Prints the events that it is called with. A context manager, because a terminal must be restored at the end."""

    def __init__(self, budget: Budget, *, quiet: bool) -> None:
        self.budget, self.quiet = budget, quiet
        self._started = self._printed = 0.0
        self._began = 0  # units that were already done when the phase continued
        self._saved = ""
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console

            self._show(Console(stderr=True))

    def _show(self, console: Console) -> None:
        """Lay out name, bar, step, remaining time and memory: they fit in 80 columns, and a wider terminal gets a
        longer bar."""
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        def text(field: str, width: int) -> TextColumn:
            return TextColumn(field, markup=False, table_column=Column(width=width, no_wrap=True, overflow="ellipsis"))

        bar_width = max(10, min(40, console.width - 70))
        self._bar = Bar(
            text("{task.description}", 14),
            BarColumn(bar_width=bar_width),
            text("{task.fields[detail]}", 25),
            TimeRemainingColumn(table_column=Column(width=8, no_wrap=True)),
            text("{task.fields[memory]}", 19),
            console=console,
            expand=False,
        )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        if self.quiet:
            return
        if isinstance(event, Note):
            self._say(f"note: {event.text}")
        elif isinstance(event, Saved):
            self._saved = f", saved at {event.where}"
        elif self._bar is not None:
            self._draw(event)
        else:
            self._print(event)

    def _memory(self) -> str:
        return f"{format_mb(self.budget.rss_bytes)} now, {format_mb(self.budget.peak_rss_bytes)} peak of {format_mb(self.budget.max_bytes)}"

    def _of(self) -> str:
        return f"{self.budget.rss_bytes / 1e6:,.0f} of {format_mb(self.budget.max_bytes)}"

    def _draw(self, event: Event) -> None:
        assert self._bar is not None
        if isinstance(event, PhaseStarted):
            self._task = self._bar.add_task(event.name, total=event.total, detail="", memory=self._of())
        elif isinstance(event, Progress) and self._task is not None:
            self._bar.update(
                self._task, completed=event.done, total=event.total, detail=_short(event.detail), memory=self._of()
            )
        elif isinstance(event, PhaseDone) and self._task is not None:
            detail = f"{event.seconds:.1f} s, peak {format_mb(event.peak_rss_bytes)}"
            task = next(t for t in self._bar.tasks if t.id == self._task)
            self._bar.update(self._task, completed=task.total, detail=detail, memory="")

    def _print(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, PhaseStarted):
            self._started = self._printed = now
            self._began = -1
        elif isinstance(event, Progress) and (self._began < 0 or now - self._printed > _LINE_EVERY):
            if self._began < 0:  # a resumed phase starts with units already done
                self._began, self._started = event.done, now
                return
            self._printed = now
            left = (now - self._started) * (event.total - event.done) / max(1, event.done - self._began)
            self._say(f"{event.name}: {event.detail}, about {_duration(left)} left, {self._memory()}{self._saved}")
        elif isinstance(event, PhaseDone):
            self._say(f"{event.name}: done in {event.seconds:.1f} s, peak {format_mb(event.peak_rss_bytes)}")

    def _say(self, text: str) -> None:
        text = harmless(text)
        with suppress(OSError, ValueError):  # stderr may have no reader (`2>&1 | head`); the picture is still wanted
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False)
            else:
                sys.stderr.write(text + "\n")
                sys.stderr.flush()


def _short(detail: str) -> str:
    """ "step 3/20, 7/25 tile passes" → "step 3/20, tile 7/25"."""
    return re.sub(r", (\d+/\d+) tile passes$", r", tile \1", detail)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


class JsonPrinter:
    """Prints each event as a JSON object on a line, with the seconds since the start and the memory in use."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self._start = budget, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def __call__(self, event: Event) -> None:
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(event).__name__).lower()
        facts = {
            "event": kind, "time": round(time.monotonic() - self._start, 3), **asdict(event),
            "rss_bytes": self.budget.rss_bytes, "max_ram_bytes": self.budget.max_bytes,
        }  # fmt: skip
        with suppress(OSError, ValueError):
            sys.stderr.write(json.dumps(facts) + "\n")
            sys.stderr.flush()


def printer_of(budget: Budget, *, quiet: bool, log_json: bool) -> ProgressPrinter | JsonPrinter:
    """The printer for the events of a run."""
    return JsonPrinter(budget) if log_json else ProgressPrinter(budget, quiet=quiet)
