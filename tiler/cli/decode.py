"""`tiler decode`: turn latents from --save-latents (or another tool) into a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiler.cli import options as o
from tiler.memory.budget import Budget, format_mb
from tiler.request import DecodeRequest


def run(
    request: DecodeRequest,
    *,
    max_ram: o.MaxRam = "800MB",
    threads: o.Threads = None,
    report: o.Report = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Decode latents into a picture with a model's autoencoder under the memory ceiling."""
    o.check_stdout(request.output, json_output=json_output)
    o.check_report(report, request.output or Path("tiler.png"), request.latents, force=request.force)
    budget = Budget(max_ram)
    o.prepare_process(threads)
    from tiler.cli.progress import ProgressPrinter
    from tiler.pipeline import decode

    with ProgressPrinter(budget, quiet=quiet) as printer:
        result = decode(request, budget, printer)

    def say(facts: dict[str, Any]) -> str:
        peak, ceiling = format_mb(budget.peak_rss_bytes), format_mb(budget.max_bytes)
        return f"{o.name_of(result.output)}: {facts['width']}×{facts['height']}, peak {peak} of {ceiling}"

    o.finish(result, say, report=report, quiet=quiet, json_output=json_output)


command = o.command_of(DecodeRequest, run)
