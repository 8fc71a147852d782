"""`tiler batch`: a file full of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiler.cli import options as o
from tiler.cli import queues, render
from tiler.errors import UsageError
from tiler.jobs.queue import DONE, Queue, lower_priority
from tiler.jobs.rows import NAME, Row, read_rows


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
        Path | None,
        typer.Option(
            "--output-dir", metavar="PATH", show_default=False,
            help=r"Where the pictures go. [dim]\[default: FILE's folder][/dim]",
        ),
    ] = None,
    max_ram: o.MaxRam = "800MB",
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="End with the first row that fails.")] = False,
    nice: Annotated[int, typer.Option("--nice", metavar="N", min=0, max=19, help="Let other programs go first.")] = 10,
    quiet: o.Quiet = False,
) -> None:  # fmt: skip
    """Render all pictures of a file, one process for each, under one memory ceiling.

    Every option of `tiler render` may be given too, and holds for rows that do not say otherwise; a row's keys are
    their long names. A row that fails stops no other. The same command again goes on: what is done is skipped, what was
    interrupted continues.
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
        max_ram_bytes=queues.ceiling_of_pictures(max_ram),
        check=queues.parser(render.run),
        name=output,
        fail_fast=fail_fast,
        say=queues.speaker(quiet=quiet),
    )
    queue.check(queue.defaults)
    queue.ask(Row(0, "x", (), None))
    if file.suffix.lower() == ".toml":
        queues.check_outputs(read_rows(file), queue, f"{file}: ")
    lower_priority(nice)
    tally = queue.run(read_rows(file))
    if not quiet:
        typer.echo(str(tally) or f"{file}: no rows")
        if tally.statuses[DONE]:
            typer.echo(f"results: {queue.results}")
    raise SystemExit(tally.exit_code)
