"""`tiler quantize`: write a model's folder with fewer bits per weight, or make its int8 weights before the first render
that needs them."""

from __future__ import annotations

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
    """Write a model with fewer bits per weight: `--weights int8 -o FOLDER` halves the bytes of fp16, for `render
    --model FOLDER`.

    Without --weights, make the int8 weights that `render --precision int8` uses and store them in --cache-dir; `render`
    makes the same file itself if it is missing.
    """
    budget = Budget(max_ram)
    o.prepare_process(threads)
    from tiler.cli.progress import ProgressPrinter
    from tiler.pipeline import quantize

    with ProgressPrinter(budget, quiet=quiet) as printer:
        result = quantize(request, budget, printer)
    facts = result.report
    if request.output is not None:
        what = ", ".join(f"{name} {format_mb(size)}" for name, size in facts["part_bytes"].items())
    else:
        what = f"{format_mb(facts['bytes'])}, {facts['int8_share']:.1%} of the weights in int8"
    said = f"{result.output}: {what}, peak {format_mb(budget.peak_rss_bytes)}"
    o.finish(result, lambda facts: said, quiet=quiet, json_output=json_output)


command = o.command_of(QuantizeRequest, run)
