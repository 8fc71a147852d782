"""What the commands that draw several pictures share: words made requests, names checked, the ceiling divided."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from tiler.cli import options as o
from tiler.cli.terminal import harmless
from tiler.errors import UsageError
from tiler.jobs.queue import Queue
from tiler.jobs.rows import Row
from tiler.memory.budget import Budget, format_mb
from tiler.memory.process import read_rss
from tiler.request import MAX_SEED, RenderRequest

MOST = 10_000  # pictures of one command
_OWN_BYTES = 5_000_000  # what this process may grow by


def parse_seeds(text: str | None) -> list[int | None]:
    """ "1,2,3" → [1, 2, 3]; None is a random one. Raises UsageError."""
    seeds: list[int | None] = []
    for part in (text or "-1").split(","):
        try:
            number = int(part)
        except ValueError:
            raise UsageError(f"seed = {text!r} is no whole number, and no list of them like 1,2,3") from None
        if not -1 <= number <= MAX_SEED:
            raise UsageError(f"seed = {number} is out of range: 0–{MAX_SEED}, or -1 for a random one")
        seeds.append(None if number == -1 else number)
    if len(seeds) > MOST:
        raise UsageError(f"--seed names {len(seeds)} seeds; at most {MOST} at a time")
    return seeds


def parser(run: Callable[..., None]) -> Callable[[Sequence[str]], RenderRequest]:
    """What makes one picture's request of the words of `tiler render`, whose function is `run`, and raises
    UsageError."""
    found: list[RenderRequest] = []

    def note(request: RenderRequest, **rest: Any) -> None:
        seeds = parse_seeds(rest["seeds"])
        if rest["count"] != 1 or len(seeds) != 1:
            raise UsageError("a row has one picture, or several by a `count` and one seed of its own")
        found.append(replace(request, seed=seeds[0]))

    note.__signature__ = inspect.signature(run, eval_str=True)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(o.command_of(RenderRequest, note, leave_out=("seed",), repeats=True))
    command = typer.main.get_command(app)

    def parse(words: Sequence[str]) -> RenderRequest:
        try:
            command.main([*words], prog_name="tiler render", standalone_mode=False)
        except Exception as error:
            if hasattr(error, "format_message"):  # click's
                raise UsageError(error.format_message().rstrip(".")) from error
            raise
        return found.pop()

    return parse


def ceiling_of_pictures(max_ram: str) -> int:
    """What is left of the ceiling for the process of a picture, in bytes. Raises UsageError where that is nothing."""
    ceiling, own = Budget(max_ram).max_bytes, read_rss().now + _OWN_BYTES
    if ceiling <= own:
        raise UsageError(f"--max-ram {max_ram}: the process that starts the pictures takes {format_mb(own)}; give more")
    return ceiling - own


def speaker(*, quiet: bool) -> Callable[[str], None]:
    """Tells people on stderr."""
    return (lambda text: None) if quiet else (lambda text: print(harmless(text), file=sys.stderr, flush=True))


def check_outputs(rows: Iterable[Row], queue: Queue, where: str = "") -> None:
    """Pictures that are known as a whole are right as a whole before any work begins. Raises UsageError."""
    taken: dict[Path, int] = {}
    for row in rows:
        try:
            output = queue.output_of(row, queue.ask(row))
        except UsageError as error:
            raise UsageError(f"{where}image {row.index}: {error}") from error
        if taken.setdefault(output, row.index) != row.index:
            raise UsageError(f"{where}images {taken[output]} and {row.index} have the same output, {output}")
