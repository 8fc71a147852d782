"""`tiler plan`: show what `tiler render` would do and need. Reads configs and headers only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from tiler.cli import options as o
from tiler.cli.terminal import harmless, wrapped
from tiler.errors import BudgetRefused
from tiler.memory.budget import Budget, format_mb
from tiler.planning.table import whole_mb
from tiler.request import RenderRequest


def run(
    request: RenderRequest, *, max_ram: o.MaxRam = "800MB", threads: o.Threads = None, json_output: o.Json = False
) -> None:
    """Show the phases of a render, their predicted memory and the expected time, without running it.

    Takes the options of `render` that decide the work, and refuses what `render` would refuse, except a missing prompt.
    """
    if request.prompt is None and not request.regions and request.prompt_embeds is None:
        request = replace(request, prompt="")  # the plan does not depend on the words
    budget = Budget(max_ram)
    o.prepare_process(threads)
    from tiler.cli.progress import ProgressPrinter
    from tiler.pipeline import plan

    with ProgressPrinter(budget, quiet=False) as printer:
        planned = plan(request, budget, printer)
    facts = planned.facts()
    if not json_output:
        tight = next((one.plan for one in planned.pictures if not one.plan.memory.fits), planned.plan)
        _print(facts, planned.plan, tight.memory)
    try:
        planned.check()
    except BudgetRefused as error:
        error.facts = facts
        raise
    if json_output:
        o.tell(facts)


def _print(facts: dict[str, Any], plan: Any, memory: Any) -> None:
    peak, smallest = facts["predicted_peak_bytes"], facts["smallest_max_ram_bytes"]
    said = f"predicted peak {format_mb(peak)} of {format_mb(memory.max_bytes)}"
    typer.echo(f"{'' if memory.fits else 'does not fit: '}{said}; smallest ceiling {_floor(smallest)}")
    if memory.fits:
        typer.echo(f"expected time on this machine: {_hours(facts)}")
    typer.echo()
    _say(f"canvas {facts['canvas']}, guide {_guide(facts)}, {_count(facts['tiles'], 'tile')}")
    if smaller := facts["smaller"]:
        _say(f"pictures that come first, each the guide of the next: {', '.join(smaller)}")
    if (box := facts["repaint"]) is not None:
        typer.echo(f"repainted: a part of the picture, starting at row {box['top']}, column {box['left']}")
    _say(
        f"denoiser: {plan.precision} ({plan.precision_why}), {_count(facts['denoiser_samples'], 'sample')}, {_tflop(facts)}, "
        f"{_count(facts['denoiser_calls'], 'read')} of the weights for {_count(plan.batch, 'sample')} each"
    )
    *encoders, denoiser = (f"{name} {nbytes / 1e9:.2g} GB" for name, nbytes in facts["read_bytes"].items())
    read = ", ".join(encoders) or "nothing for the prompts, which are encoded already"
    _say(f"reads: {read}; {denoiser} in each read of the weights, less what stays in memory")
    one = facts["pass"]
    _say(
        f"one read: {one['read_bytes'] / 1e9:.2g} GB in {one['read_seconds']:.3g} s, arithmetic meanwhile "
        f"{one['arithmetic_seconds']:.3g} s: the {one['bound']} bounds it"
    )
    if plan.upscale_flops:
        encoder = plan.methods["guide picture"]
        _say(f"guide: enlarged as a picture, {plan.upscale_flops / 1e12:.3g} TFLOP; encoder: {encoder}")
    _say(f"decoder: {plan.methods['decode']}")
    typer.echo()
    if "cluster" in facts:
        for line in _cluster(facts["cluster"]):
            _say(line)
        typer.echo()
    for name, work in facts["presets"].items():
        typer.echo(
            f"--preset {name:9}{_count(work['denoiser_samples'], 'sample'):>14}, {_tflop(work):>12}, {_hours(work)}"
        )
    if facts["hints"]:
        typer.echo("\nwhat would help:" + " " * 25 + "smallest ceiling")
    for hint in facts["hints"]:
        typer.echo(f"  {hint['choice']:40}{_floor(hint['smallest_max_ram_bytes']):>14}, {_hours(hint)}")
    typer.echo("\n" + memory.table())


def _say(text: str) -> None:
    typer.echo(wrapped(text, 2))


def _guide(facts: dict[str, Any]) -> str:
    """The guide's size in pixels: of the pass that makes it, or of the user's picture, with its name."""
    picture = facts.get("guide_image")
    if picture is None:
        return facts["guide"] or "none"
    return f"{harmless(Path(picture['path']).name)} ({picture['width']}×{picture['height']})"


def _cluster(facts: dict[str, Any]) -> Iterator[str]:
    """What each worker would do, and the gain from rendering a second canvas at the same time."""
    able = [worker for worker in facts["workers"] if not worker["problem"]]
    if able:
        took = f"the canvas takes {_span(facts['canvas_seconds'])}, or {_span(facts['alone_seconds'])} without workers"
        for what, name in (("encoding the guide", "encode"), ("decoding", "decode")):
            together, alone = facts[f"{name}_seconds"], facts[f"{name}_alone_seconds"]
            if together < alone:
                took += f"; {what} {_span(together)}, or {_span(alone)}"
        yield f"cluster: {_hours(facts)} in all; {took}"
    else:
        yield "cluster: no worker can do this; after a minute, this process would continue alone"
    for worker in facts["workers"]:
        did = f"{worker['seconds_per_tile']:.1f} s a tile, {_count(worker['tiles'], 'tile')}, idle {worker['idle']:.0%}"
        yield f"  {worker['name'][:24]:24}  {'left out: ' + worker['problem'] if worker['problem'] else did}"
    if able:
        less = 1 - facts["pair_seconds"] / (2 * facts["canvas_seconds"])
        bring = f"{less:.0%} less than in sequence" if less >= 0.005 else "no less than in sequence"
        yield f"  two canvases at the same time: {_span(facts['pair_seconds'])} for both, {bring}"


def _floor(nbytes: int) -> str:
    return f"{whole_mb(nbytes):,} MB"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _tflop(work: dict[str, Any]) -> str:
    tflop = work["denoiser_tflop"]
    return f"{tflop:,.0f} TFLOP" if tflop >= 1000 else f"{tflop:.3g} TFLOP"


def _hours(work: dict[str, Any]) -> str:
    """The expected time, in a unit that suits people."""
    return f"about {_span(work['expected_seconds'])}"


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


command = o.command_of(
    RenderRequest,
    run,
    repeats=True,
    leave_out=("save_latents", "preview", "preview_interval", "metadata", "force", "restart", "keep_job", "job_dir"),
)
