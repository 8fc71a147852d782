"""`tiler quantize`: a model's folder with fewer bits a weight, or its int8 weights ahead of the first render that wants them."""

from __future__ import annotations

import json

import typer

from tiler.cli import options as o
from tiler.memory.budget import Budget, format_mb
from tiler.request import QuantizeRequest


def run(
    request: QuantizeRequest,
    *,
    max_ram: o.MaxRam = "800MB",
    threads: o.Threads = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Write a model with fewer bits a weight: `--weights int8 -o FOLDER` is half the bytes of fp16, for `render --model FOLDER`.

    Without --weights the int8 weights that `render --precision int8` computes with are made ahead, in --cache-dir; `render` makes
    the same file by itself when it is not there yet.
    """
    budget = Budget(max_ram)
    o.prepare_process(threads)
    from tiler.cli.progress import ProgressPrinter
    from tiler.pipeline import quantize

    with ProgressPrinter(budget, quiet=quiet) as printer:
        result = quantize(request, budget, printer)
    if json_output:
        typer.echo(json.dumps({"output": str(result.output), **result.report}))
    elif request.output is not None and not quiet:
        parts = ", ".join(f"{name} {format_mb(size)}" for name, size in result.report["part_bytes"].items())
        typer.echo(f"{result.output}: {parts}, peak {format_mb(budget.peak_rss_bytes)}")
    elif not quiet:
        size, share = result.report["bytes"], result.report["int8_share"]
        typer.echo(
            f"{result.output}: {format_mb(size)}, {share:.1%} of the weights in int8, peak {format_mb(budget.peak_rss_bytes)}"
        )


command = o.command_of(QuantizeRequest, run)
