"""`tiler render`: the main job."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from tiler.cli import options as o
from tiler.memory.budget import Budget, format_mb
from tiler.request import Decode, GuideUpscale, Mask, Precision, Preset, ScratchDtype, Wrap


def command(
    prompt: o.Prompt = None,
    output: o.Output = Path("tiler.png"),
    model: o.Model = "mini",
    variant: o.Variant = None,
    revision: o.Revision = None,
    size: o.Size = None,
    width: o.Width = None,
    height: o.Height = None,
    paper: o.Paper = None,
    landscape: o.Landscape = False,
    dpi: o.Dpi = None,
    bleed: o.Bleed = "0mm",
    negative_prompt: o.Negative = "",
    preset: o.PresetName = Preset.QUALITY,
    steps: o.Steps = None,
    guidance_scale: o.Guidance = 7.5,
    guidance_interval: o.Interval = None,
    seed: o.Seed = -1,
    strength: o.Strength = None,
    scheduler: o.SchedulerName = "auto",
    guide: o.Guide = None,
    guide_upscale: o.UpscaleKind = GuideUpscale.PIXEL,
    no_guide: o.NoGuide = False,
    layout: o.TileLayout = None,
    attention_window: o.AttentionWindow = None,
    precision: o.PrecisionKind = Precision.AUTO,
    cache_dir: o.CacheDir = None,
    overlap: o.Overlap = None,
    mask: o.MaskKind = Mask.GAUSSIAN,
    wrap: o.WrapAxes = Wrap.NONE,
    regions: o.RegionsFile = None,
    decode: o.DecodeKind = Decode.AUTO,
    scratch: o.ScratchFolder = None,
    scratch_dtype: o.ScratchKind = ScratchDtype.FP16,
    tiny_vae: o.TinyVae = None,
    max_ram: o.MaxRam = "800MB",
    threads: o.Threads = None,
    save_latents: o.Latents = None,
    report: o.Report = None,
    force: o.Force = False,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Render a picture of any size under a memory ceiling.

    A low-resolution pass makes a guide; the canvas is then denoised tile by tile under it, and decoded without tiles.
    """
    request = o.request_from(locals())
    from tiler.files import check_writable

    if report is not None:
        check_writable(report, force=True, option="--report")
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
        typer.echo(
            f"{result.output}: {request.width}×{request.height}, seed {request.seed}, peak {format_mb(budget.peak_rss_bytes)} of {format_mb(budget.max_bytes)}"
        )
