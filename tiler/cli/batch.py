"""`tiler batch`: a file full of pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tiler.cli import options as o
from tiler.errors import UsageError
from tiler.jobs.queue import DONE, Queue, lower_priority
from tiler.jobs.rows import output_of, read_rows
from tiler.memory.budget import Budget
from tiler.memory.process import read_rss

_OWN_BYTES = 5_000_000  # what this process may grow by


def command(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="jobs.toml with [[image]] tables, jobs.jsonl with an object a line, or a text with a prompt a line.",
        ),
    ],
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", metavar="PATH", help="Where the pictures go.", show_default="FILE's folder")
    ] = None,
    max_ram: o.MaxRam = "800MB",
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="End with the first row that fails.")] = False,
    nice: Annotated[int, typer.Option("--nice", metavar="N", min=0, max=19, help="Let other programs go first.")] = 10,
) -> None:  # fmt: skip
    """Render all pictures of a file, one process for each, under one memory ceiling.

    Keys of a row are the long options of `tiler render`; those given here hold for rows that do not say otherwise. A row that
    fails stops no other. The same command again goes on: what is done is skipped, what was interrupted continues.
    """
    if not file.is_file():
        raise UsageError(f"{file}: no such file; tiler batch takes one with a picture a row")
    root = output_dir or file.parent
    if not root.is_dir():
        raise UsageError(f"{root} does not exist; create it first")
    if file.suffix.lower() == ".toml":
        _check(file, root)
    queue = Queue(
        root=root,
        results=file.with_name(f"{file.name}.results.jsonl"),
        defaults=tuple(context.args),
        max_ram_bytes=Budget(max_ram).max_bytes - read_rss().now - _OWN_BYTES,
        fail_fast=fail_fast,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    lower_priority(nice)
    tally = queue.run(read_rows(file))
    typer.echo(", ".join(f"{number} {status}" for status, number in tally.statuses.items()) or f"{file}: no rows")
    if tally.statuses[DONE]:
        typer.echo(f"results: {queue.results}")
    raise SystemExit(tally.exit_code)


def _check(file: Path, root: Path) -> None:
    """A file that does not grow is right as a whole before any work begins. Raises UsageError."""
    taken: dict[Path, int] = {}
    for row in read_rows(file):
        output = output_of(row, root)
        if taken.setdefault(output, row.index) != row.index:
            raise UsageError(f"{file}: images {taken[output]} and {row.index} have the same output, {output}")
