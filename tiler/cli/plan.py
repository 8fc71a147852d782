"""`tiler plan`: what `tiler render` would do and need. Reads configs and headers only."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from tiler.cli import options as o
from tiler.memory.budget import Budget, format_mb
from tiler.request import Decode, Mask, ScratchDtype


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
    steps: o.Steps = 20,
    guidance_scale: o.Guidance = 7.5,
    seed: o.Seed = -1,
    strength: o.Strength = 0.5,
    scheduler: o.SchedulerName = "auto",
    guide: o.Guide = None,
    no_guide: o.NoGuide = False,
    overlap: o.Overlap = None,
    mask: o.MaskKind = Mask.GAUSSIAN,
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
    """Show the phases, their predicted peaks and the work of a render, without running it. Takes render's options."""
    sheet = o.sheet_from(size, width, height, paper, landscape, dpi, bleed)
    request = o.request_from(
        "" if prompt is None and regions is None else prompt, output, model, variant, revision, sheet, negative_prompt,
        steps, guidance_scale, seed, strength, scheduler, guide, no_guide, overlap, mask, regions, decode, scratch, scratch_dtype, tiny_vae, save_latents, force,
    )  # fmt: skip
    budget = Budget(max_ram)
    o.prepare_process(threads)
    from tiler.models.family import read_family
    from tiler.planner import plan_render
    from tiler.weights.checkpoint import resolve

    planned = plan_render(request, read_family(resolve(model, variant=variant, revision=revision)), budget.max_bytes)
    memory = planned.memory
    facts = {
        "canvas": f"{8 * planned.canvas[1]}×{8 * planned.canvas[0]}",
        "guide": None if planned.guide is None else f"{8 * planned.guide.width}×{8 * planned.guide.height}",
        "tiles": len(planned.regions), "samples_per_pass": planned.batch, "unet_calls": planned.unet_calls,
        "unet_samples": planned.unet_samples, "decode": planned.methods["decode"].name, "decode_why": planned.methods["decode"].why,
        "scratch_bytes": max(m.scratch_bytes for m in planned.methods.values()), "predicted_peak_bytes": memory.peak_bytes, "max_ram_bytes": memory.max_bytes,
        "smallest_max_ram_bytes": memory.smallest_bytes,
        "phases": [{"name": p.name, "peak_bytes": p.peak_bytes, "terms": {t.name: t.nbytes for t in p.terms}} for p in memory.phases],
    }  # fmt: skip
    if json_output:
        typer.echo(json.dumps(facts))
    else:
        typer.echo(
            f"canvas {facts['canvas']}, guide {facts['guide'] or 'none'}, {facts['tiles']} tiles, {planned.batch} samples for each read of "
            f"the weights, {planned.unet_calls} reads, {planned.unet_samples} UNet samples\n"
        )
        typer.echo(memory.table())
        typer.echo(f"\ndecoder: {planned.methods['decode']}")
        typer.echo(
            f"predicted peak {format_mb(memory.peak_bytes)}, ceiling {format_mb(memory.max_bytes)}, smallest ceiling {memory.smallest_text}"
        )
    memory.check(table=False)
