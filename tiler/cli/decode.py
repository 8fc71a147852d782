"""`tiler decode`: latents from --save-latents (or another tool) → picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tiler.cli import options as o
from tiler.memory.budget import Budget, format_mb
from tiler.request import Decode, ScratchDtype, Wrap


def command(
    latents: Annotated[
        Path, typer.Argument(help="safetensors file with a tensor `latents`, [1, C, height/8, width/8], scaled.")
    ],
    output: o.Output = Path("tiler.png"),
    model: o.Model = "mini",
    variant: o.Variant = None,
    revision: o.Revision = None,
    decode: o.DecodeKind = Decode.AUTO,
    scratch: o.ScratchFolder = None,
    scratch_dtype: o.ScratchKind = ScratchDtype.FP16,
    tiny_vae: o.TinyVae = None,
    wrap: o.WrapAxes = Wrap.NONE,
    dpi: o.Dpi = None,
    max_ram: o.MaxRam = "800MB",
    threads: o.Threads = None,
    report: o.Report = None,
    force: o.Force = False,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Decode latents into a picture with a model's autoencoder under the memory ceiling."""
    budget = Budget(max_ram)
    o.prepare_process(threads)
    from tiler.cli.progress import ProgressPrinter
    from tiler.pipeline import decode_file

    with ProgressPrinter(budget, quiet=quiet) as printer:
        result = decode_file(
            latents, model, output, budget=budget, variant=variant, revision=revision, decode=decode, scratch=scratch,
            scratch_dtype=scratch_dtype, tiny_vae=tiny_vae, wrap=wrap, dpi=dpi, force=force, on_event=printer,
        )  # fmt: skip
    o.write_report(report, result.report)
    if json_output:
        typer.echo(json.dumps({"output": str(result.output), **result.report}))
    elif not quiet:
        typer.echo(
            f"{result.output}: {result.report['width']}×{result.report['height']}, peak {format_mb(budget.peak_rss_bytes)}"
        )
