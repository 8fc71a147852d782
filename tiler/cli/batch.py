"""`tiler batch`: a file full of pictures."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tiler.cli import options as o
from tiler.cli import render
from tiler.errors import UsageError
from tiler.jobs.queue import DONE, Queue, lower_priority
from tiler.jobs.rows import NAME, read_rows
from tiler.memory.budget import Budget
from tiler.memory.process import read_rss
from tiler.request import RenderRequest

_OWN_BYTES = 5_000_000  # what this process may grow by


def command(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help=r"jobs.toml with \[\[image]] tables, jobs.jsonl with an object a line, or a text with a prompt a line.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="NAME", show_default=False,
            help=rf"Name of pictures whose row has none; {{seed}} may stand in it too. [dim]\[default: {NAME}][/dim]",
        ),
    ] = NAME,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", metavar="PATH", help="Where the pictures go.", show_default="FILE's folder")
    ] = None,
    max_ram: o.MaxRam = "800MB",
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="End with the first row that fails.")] = False,
    nice: Annotated[int, typer.Option("--nice", metavar="N", min=0, max=19, help="Let other programs go first.")] = 10,
    quiet: o.Quiet = False,
) -> None:  # fmt: skip
    """Render all pictures of a file, one process for each, under one memory ceiling.

    Every option of `tiler render` may be given too, and holds for rows that do not say otherwise; a row's keys are their long
    names. A row that fails stops no other. The same command again goes on: what is done is skipped, what was interrupted
    continues.
    """
    if not file.is_file():
        raise UsageError(f"{file}: no such file; tiler batch takes one with a picture a row")
    root = output_dir or file.parent
    if not root.is_dir():
        raise UsageError(f"{root} does not exist; create it first")
    queue = Queue(
        root=root,
        results=file.with_name(f"{file.name}.results.jsonl"),
        defaults=(*context.args, *["--quiet"] * quiet),
        max_ram_bytes=ceiling_of_pictures(max_ram),
        check=parser(),
        name=output,
        fail_fast=fail_fast,
        say=speaker(quiet=quiet),
    )
    queue.check(queue.defaults)
    if file.suffix.lower() == ".toml":
        _check(file, queue)
    lower_priority(nice)
    tally = queue.run(read_rows(file))
    if not quiet:
        typer.echo(str(tally) or f"{file}: no rows")
        if tally.statuses[DONE]:
            typer.echo(f"results: {queue.results}")
    raise SystemExit(tally.exit_code)


def parser() -> Callable[[Sequence[str]], RenderRequest]:
    """What makes a request of words of `tiler render`, and raises UsageError."""
    found: list[RenderRequest] = []

    def note(request: RenderRequest, **rest: Any) -> None:
        found.append(request)

    note.__signature__ = inspect.signature(render.run, eval_str=True)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(o.command_of(RenderRequest, note, repeats=True))
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
    """What is left of the ceiling for the process of a picture, in bytes."""
    return Budget(max_ram).max_bytes - read_rss().now - _OWN_BYTES


def speaker(*, quiet: bool) -> Callable[[str], None]:
    """Tells people on stderr."""
    return (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))


def _check(file: Path, queue: Queue) -> None:
    """A file that does not grow is right as a whole before any work begins. Raises UsageError."""
    taken: dict[Path, int] = {}
    for row in read_rows(file):
        try:
            output = queue.output_of(row)
        except UsageError as error:
            raise UsageError(f"{file}: image {row.index}: {error}") from error
        if taken.setdefault(output, row.index) != row.index:
            raise UsageError(f"{file}: images {taken[output]} and {row.index} have the same output, {output}")
