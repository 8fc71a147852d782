"""Shows events on stderr: a rich bar on a terminal, plain lines elsewhere, or JSON for programs."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tiler.cli import age
from tiler.cli.terminal import duration, harmless
from tiler.events import (
    Event,
    Note,
    PhaseDone,
    PhaseStarted,
    Progress,
    Saved,
    Shown,
    Workers,
    WorkerState,
    Working,
)
from tiler.memory.budget import Budget, format_mb

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from tiler.cli.graphics import Drawn, Screen

_LINE_EVERY = 30.0  # seconds between plain lines


class Remaining:
    """The remaining time of a phase, from its share of the work that was done since the work began: calls of a denoiser
    finish many tiles at once, so that the last few events say little."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None
        self._end: float | None = None

    def begin(self, done: int) -> None:
        """The work goes on after so many units."""
        self._began, self._end = (time.monotonic(), done), None

    def note(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._began is None:
            self.begin(done)
            return
        start, before = self._began
        if done > before:
            self._end = now + (now - start) * (total - done) / (done - before)

    @property
    def seconds(self) -> float | None:
        """None until something is known."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())


class ProgressPrinter:
    """Prints the events that it is called with. A context manager, because a terminal must be restored at the end."""

    def __init__(self, budget: Budget, *, quiet: bool) -> None:
        self.budget, self.quiet = budget, quiet
        self._printed = 0.0
        self._remaining = Remaining()
        self._saved = ""
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._workers: dict[str, TaskID] = {}  # their rows below the bar
        self._told_workers = 0.0
        self._screen: Screen | None = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console

            self._show(Console(stderr=True))

    def _show(self, console: Console) -> None:
        """Lay out name, bar, step, remaining time and memory: they fit in 80 columns, and a wider terminal gets a
        longer bar. Below them is a line with the peak, and with what is saved."""
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column
        from rich.text import Text

        printer = self

        class Bars(Bar):
            def get_renderables(self) -> Iterator[RenderableType]:
                yield from super().get_renderables()
                if self.tasks:
                    yield Text(printer._status(), no_wrap=True, overflow="ellipsis")

        def text(field: str, width: int) -> TextColumn:
            return TextColumn(field, markup=False, table_column=Column(width=width, no_wrap=True, overflow="ellipsis"))

        bar_width = max(10, min(40, console.width - 70))
        self._bar = Bars(
            text("{task.description}", 14),
            BarColumn(bar_width=bar_width),
            text("{task.fields[detail]}", 25),
            text("{task.fields[left]}", 8),
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
            if kind is None:
                self._saved = ""  # the picture is there
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Shown):
            self._show_picture(event)
        elif self.quiet:
            return
        elif isinstance(event, Note):
            self._say(f"note: {event.text}")
        elif isinstance(event, Working):
            self._remaining.begin(event.done)
        elif isinstance(event, Saved):
            self._saved = f", saved at {event.where}"
        elif isinstance(event, Workers):
            self._show_workers(event.workers)
        elif self._bar is not None:
            self._draw(event)
        else:
            self._print(event)

    def _memory(self) -> str:
        return f"{format_mb(self.budget.rss_bytes)} now, {format_mb(self.budget.peak_rss_bytes)} peak of {format_mb(self.budget.asked_bytes)}"

    def _status(self) -> str:
        return f"peak {format_mb(self.budget.peak_rss_bytes)}{self._saved}"

    def _of(self) -> str:
        return f"{self.budget.rss_bytes / 1e6:,.0f} of {format_mb(self.budget.asked_bytes)}"

    def _draw(self, event: Event) -> None:
        assert self._bar is not None
        if isinstance(event, PhaseStarted):
            self._remaining = Remaining()
            left = _Left(self._remaining)
            self._task = self._bar.add_task(event.name, total=event.total, detail="", left=left, memory=self._of())
        elif isinstance(event, Progress) and self._task is not None:
            self._remaining.note(event.done, event.total)
            self._bar.update(
                self._task, completed=event.done, total=event.total, detail=_short(event.detail), memory=self._of()
            )
        elif isinstance(event, PhaseDone) and self._task is not None:
            self._show_workers(())
            detail = f"{event.seconds:.1f} s, peak {format_mb(event.peak_rss_bytes)}"
            task = next(t for t in self._bar.tasks if t.id == self._task)
            self._bar.update(self._task, completed=task.total, detail=detail, left="", memory="")

    def _show_workers(self, workers: Sequence[WorkerState]) -> None:
        """A row for each worker below the bar, for as long as it is there; elsewhere a line for each from time to
        time."""
        if self._bar is None:
            now = time.monotonic()
            if workers and now - self._told_workers > _LINE_EVERY:
                self._told_workers = now
                for worker in workers:
                    self._say(f"worker {worker.name}: {_doing(worker)}, {_memory_of(worker)}")
            return
        most = max((worker.tiles for worker in workers), default=0)
        for name in self._workers.keys() - {worker.name for worker in workers}:
            self._bar.remove_task(self._workers.pop(name))
        for worker in workers:
            if worker.name not in self._workers:
                named = f" {worker.name}"
                self._workers[worker.name] = self._bar.add_task(named, total=None, detail="", left="", memory="")
            self._bar.update(
                self._workers[worker.name], completed=worker.tiles, total=max(1, most), detail=_doing(worker),
                memory=_memory_of(worker),
            )  # fmt: skip

    def _print(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, PhaseStarted):
            self._printed, self._remaining = now, Remaining()
        elif isinstance(event, Progress):
            self._remaining.note(event.done, event.total)
            if now - self._printed > _LINE_EVERY and (left := self._remaining.seconds) is not None:
                self._printed = now
                self._say(f"{event.name}: {event.detail}, about {duration(left)} left, {self._memory()}{self._saved}")
        elif isinstance(event, PhaseDone):
            self._say(f"{event.name}: done in {event.seconds:.1f} s, peak {format_mb(event.peak_rss_bytes)}")

    def _show_picture(self, event: Shown) -> None:
        """Above the bar, where it stays when the next one comes."""
        if not sys.stderr.isatty():  # of a job that goes on elsewhere
            return
        if self._screen is None:
            from tiler.cli.graphics import screen_of

            self._screen = screen_of(sys.stderr.fileno())
        self._write(self._screen.draw(event.pixels))

    def _say(self, text: str) -> None:
        self._write(harmless(text))

    def _write(self, what: str | Drawn) -> None:
        with suppress(OSError, ValueError):  # stderr may have no reader (`2>&1 | head`); the picture is still wanted
            if self._bar is not None:
                self._bar.console.print(what, markup=False, highlight=False)
            else:
                sys.stderr.write(f"{what}\n" if isinstance(what, str) else what.plain())
                sys.stderr.flush()


class _Left:
    """What a bar shows of the remaining time, whenever it is drawn."""

    def __init__(self, remaining: Remaining) -> None:
        self.remaining = remaining

    def __str__(self) -> str:
        if (seconds := self.remaining.seconds) is None:
            return "-:--:--"
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _short(detail: str) -> str:
    """ "step 3/20, 7/25 tile passes" → "step 3/20, tile 7/25"."""
    return re.sub(r", (\d+/\d+) tile passes$", r", tile \1", detail)


def _doing(worker: WorkerState) -> str:
    """Its speed and its tiles, in 25 columns: "4.1 s each, 25, late"."""
    late = ", late" if worker.is_late else ""
    return f"{worker.seconds_per_tile:.1f} s each, {worker.tiles:,}{late}"


def _memory_of(worker: WorkerState) -> str:
    return f"{worker.peak_rss_bytes / 1e6:,.0f} of {format_mb(worker.max_ram_bytes)}"


class JsonPrinter:
    """Prints each event as a JSON object on a line, with the seconds since the program was started and the memory in
    use."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Shown):  # in a terminal alone
            return
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(event).__name__).lower()
        facts = {
            "event": kind, "time": round(age(), 3), **asdict(event),
            "rss_bytes": self.budget.rss_bytes, "max_ram_bytes": self.budget.max_bytes,
        }  # fmt: skip
        with suppress(OSError, ValueError):
            sys.stderr.write(json.dumps(facts) + "\n")
            sys.stderr.flush()


def printer_of(budget: Budget, *, quiet: bool, log_json: bool) -> ProgressPrinter | JsonPrinter:
    """The printer for the events of a run."""
    return JsonPrinter(budget) if log_json else ProgressPrinter(budget, quiet=quiet)
