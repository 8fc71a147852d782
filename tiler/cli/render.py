"""`tiler render`: the main job."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from tiler.cli import options as o
from tiler.memory.budget import Budget, format_mb
from tiler.request import RenderRequest


def run(
    request: RenderRequest,
    *,
    max_ram: o.MaxRam = "800MB",
    threads: o.Threads = None,
    report: o.Report = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Render a picture of any size under a memory ceiling.

    A low-resolution pass makes a guide; the canvas is then denoised tile by tile under it, and decoded without tiles.
    """
    o.check_report(report, request.output or Path("tiler.png"), request.save_latents, force=request.force)
    budget = Budget(max_ram)
    o.prepare_process(threads)
    from tiler.cli.progress import ProgressPrinter
    from tiler.pipeline import render

    with ProgressPrinter(budget, quiet=quiet) as printer:
        result = render(request, budget, printer)
    o.write_report(report, result.report)
    if json_output:
        typer.echo(json.dumps({"output": str(result.output), **result.report}))
    elif not quiet:
        facts = result.report
        typer.echo(
            f"{result.output}: {facts['width']}×{facts['height']}, seed {facts['seed']}, "
            f"peak {format_mb(budget.peak_rss_bytes)} of {format_mb(budget.max_bytes)}"
        )


command = o.command_of(RenderRequest, run, repeats=True)
