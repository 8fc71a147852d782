"""`tiler plan`: what `tiler render` would do and need. Reads configs and headers only."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

import typer

from tiler.cli import options as o
from tiler.cli import render
from tiler.memory.budget import Budget, format_mb
from tiler.request import Preset, RenderRequest

if TYPE_CHECKING:
    from tiler.plan.tiling import Tiling


def command(**given: Any) -> None:
    """Show the phases, their predicted peaks and the work of a render, without running it. Takes render's options."""
    if given["prompt"] is None and given["regions"] is None:
        given["prompt"] = ""
    request = o.request_from(given)
    budget = Budget(given["max_ram"])
    o.prepare_process(given["threads"])
    from tiler.models.family import read_family
    from tiler.plan import time as estimate
    from tiler.plan.render import choose_precision, plan_render
    from tiler.plan.tiling import plan_tiling
    from tiler.weights.checkpoint import resolve

    family = read_family(resolve(request.model, variant=request.variant, revision=request.revision))
    planned = plan_render(request, family, budget.max_bytes)
    memory = planned.memory
    speed, counter = estimate.measure(), estimate.Counter(family)

    def work_of(asked: RenderRequest, cut: Tiling) -> dict[str, Any]:
        work = counter.count(cut, asked.attention_window)
        precision, _ = choose_precision(asked.precision, family)
        return {
            "unet_samples": cut.unet_samples, "precision": precision.value, "unet_tflop": round(work.tflop, 3),
            "expected_seconds": round(estimate.seconds(work, planned.methods.values(), speed, precision)),
        }  # fmt: skip

    presets = {}
    for preset in Preset:
        asked = o.request_from(given | {"preset": preset})
        presets[preset.value] = work_of(asked, plan_tiling(asked, family))
    facts = {
        "canvas": f"{8 * planned.canvas[1]}×{8 * planned.canvas[0]}",
        "guide": None if planned.guide is None else f"{8 * planned.guide.width}×{8 * planned.guide.height}",
        "tiles": len(planned.regions), "samples_per_pass": planned.batch, "unet_calls": planned.unet_calls,
        **work_of(request, planned), "presets": presets, "decode": planned.methods["decode"].name, "decode_why": planned.methods["decode"].why,
        "guide_upscale_flops": planned.upscale_flops,
        "scratch_bytes": max(m.scratch_bytes for m in planned.methods.values()), "predicted_peak_bytes": memory.peak_bytes, "max_ram_bytes": memory.max_bytes,
        "smallest_max_ram_bytes": memory.smallest_bytes,
        "phases": [{"name": p.name, "peak_bytes": p.peak_bytes, "terms": {t.name: t.nbytes for t in p.terms}} for p in memory.phases],
    }  # fmt: skip
    if given["json_output"]:
        typer.echo(json.dumps(facts))
    else:
        typer.echo(
            f"canvas {facts['canvas']}, guide {facts['guide'] or 'none'}, {facts['tiles']} tiles, {planned.batch} samples for each read of "
            f"the weights, {planned.unet_calls} reads, {planned.unet_samples} UNet samples\n"
        )
        typer.echo(memory.table())
        if planned.upscale_flops:
            encoder = planned.methods["guide picture"]
            typer.echo(
                f"\nguide upscale: pixel, {planned.upscale_flops / 1e12:.2g} TFLOP (latent: none); encoder: {encoder}"
            )
        typer.echo(
            f"\nUNet in {planned.precision} ({planned.precision_why}): {_tflop(facts)}; expected time on this machine, decoding included: {_hours(facts)}"
        )
        for name, work in presets.items():
            typer.echo(f"  --preset {name:9} {work['unet_samples']:5} UNet samples, {_tflop(work)}, {_hours(work)}")
        typer.echo(f"decoder: {planned.methods['decode']}")
        typer.echo(
            f"predicted peak {format_mb(memory.peak_bytes)}, ceiling {format_mb(memory.max_bytes)}, smallest ceiling {memory.smallest_text}"
        )
    memory.check(table=False)


def _tflop(work: dict[str, Any]) -> str:
    return f"{work['unet_tflop']:.3g} TFLOP"


def _hours(work: dict[str, Any]) -> str:
    """About how long, in the unit a person would use."""
    seconds = work["expected_seconds"]
    if seconds < 90:
        return f"about {seconds} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


# typer reads a command's options from its signature.
command.__signature__ = inspect.signature(render.command, eval_str=True)  # type: ignore[attr-defined]
command.__annotations__ = inspect.get_annotations(render.command, eval_str=True)
