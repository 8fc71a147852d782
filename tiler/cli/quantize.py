"""`tiler quantize`: a checkpoint's int8 weights, ahead of the first render that wants them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tiler.cli import options as o
from tiler.memory.budget import Budget, format_mb


def command(
    model: Annotated[str, typer.Argument(help="`mini`, a folder in diffusers layout, or a hub id like org/name.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            "--cache-dir",
            help="Folder for the file.  [default: ~/.cache/tiler/packed]",
            show_default=False,
        ),
    ] = None,
    variant: o.Variant = None,
    revision: o.Revision = None,
    max_ram: o.MaxRam = "800MB",
    threads: o.Threads = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Write a model's weights in int8, half the bytes of fp16, ahead of `render --cache-dir FOLDER`.

    `render` does the same by itself when the file is not there yet. The name of the file says which weights it is made of.
    """
    budget = Budget(max_ram)
    o.prepare_process(threads)
    from tiler.cli.progress import ProgressPrinter
    from tiler.pipeline import quantize_model

    with ProgressPrinter(budget, quiet=quiet) as printer:
        result = quantize_model(model, output, budget=budget, variant=variant, revision=revision, on_event=printer)
    if json_output:
        typer.echo(json.dumps({"output": str(result.output), **result.report}))
    elif not quiet:
        size, share = result.report["bytes"], result.report["int8_share"]
        typer.echo(
            f"{result.output}: {format_mb(size)}, {share:.1%} of the weights in int8, peak {format_mb(budget.peak_rss_bytes)}"
        )
