"""The order of the phases: plan → encode prompts → guide → canvas → decode → write.

A low-resolution pass makes a guide image. The canvas is denoised in overlapping regions whose noise predictions are
blended on one latent canvas (Mixture of Diffusers). A decoder that works row by row makes the picture. Weights are
streamed from disk, and the whole process stays under the budget. This module knows the order of the phases, not how
they work.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tiler import decode_run, encode_run, packing, phases, pixels, progressive, quantising, repainting, reports
from tiler.cluster import run as cluster
from tiler.diffusion.poster import Poster
from tiler.events import Event, OnEvent
from tiler.jobs.folder import Job
from tiler.memory import lean_imports, process
from tiler.memory.budget import Budget
from tiler.models import family as families
from tiler.output.picture import write_picture
from tiler.planned import Planned, speed_of
from tiler.reference import make_reference
from tiler.render_run import RenderRun
from tiler.request import DecodeRequest, EncodeRequest, QuantizeRequest, RenderRequest
from tiler.weights.packed import default_cache


@dataclass(frozen=True, kw_only=True)
class Result:
    """The file that was written, and the report in the form that --report writes."""

    output: Path
    report: dict[str, Any]


def _ignore(event: Event) -> None:
    pass


@torch.no_grad()
def render(
    request: RenderRequest, budget: Budget | None = None, on_event: OnEvent = _ignore, *, inside: Job | None = None
) -> Result:
    """Render `request` under `budget` (default 800 MB of RSS), `inside` a larger one's job. Raises TilerError."""
    with budget or Budget() as budget, Job(request, on_event, inside=inside) as job:
        cluster.wake(request)
        run = phases.start(request, budget, on_event, job)
        run.plan.memory.check(advice=phases.advice(run))
        workers = cluster.workers_of(run)
        lean_imports.freeze_imports()
        # Holes in the heap count as data although none of their pages is resident: 315 MB were seen under a ceiling of
        # 800 MB.
        with run.files, process.limit_data(max(0, budget.max_bytes - process.read_rss().now) + budget.max_bytes):
            run.texts = reports.texts(run)  # before the first step, so that errors come early
            reports.begin_job(run)
            if job.is_finished:
                return Result(output=run.request.output, report=reports.of_render(run))
            progressive.render_first(run, render)
            with repainting.poster_of(run, run.request) as poster:
                _paint(run, poster, workers)
        return Result(output=run.request.output, report=reports.of_render(run))


def _paint(run: RenderRun, poster: Poster | None, workers: AbstractContextManager[cluster.Workers]) -> None:
    """Run all phases from the guide to the finished file."""
    picture = phases.load_guide(run)
    phases.prepare_weights(run)
    with workers as greeted:
        prompts = phases.encode_prompts(run)
        with greeted(prompts) as ready:
            guide = phases.make_guide(run, prompts)
            reference = make_reference(run, poster if picture is None else picture, guide, ready.encoders)
            del picture, guide
            latents = phases.denoise_canvas(run, prompts, reference, ready.open_runner)
            del prompts, reference
    run.prepared = None  # frees what the family made of the prompts
    phases.save_canvas(run, latents)
    # If the writer fails, the decoder's scratch files must still be closed.
    unscaled = pixels.unscaled(latents, run.plan.decoder)
    decoded = pixels.decode(run, run.decoding, unscaled, phases.remembered(run, latents), cluster.decoders_of(run))
    with closing(repainting.whole_picture(run.request, decoded, poster, run.plan.spot)) as rows:
        wanted = run.request
        write_picture(
            wanted.output, rows, wanted.width, wanted.height, run.texts, wanted.dpi, wanted.bleed_mm,
            force=wanted.force, format=wanted.format, quality=wanted.quality, on_whole=run.job.note_finished,
        )  # fmt: skip


@torch.no_grad()
def plan(request: RenderRequest, budget: Budget | None = None, on_event: OnEvent = _ignore) -> Planned:
    """Plan a render from configs and headers, without computing anything. `.plan.memory.check()` raises if it does not
    fit. Raises TilerError for anything that `render` would refuse before its first step."""
    with budget or Budget() as budget:
        cluster.prepare(request)
        run = phases.start(request, budget, on_event, planning=True)
        cluster.workers_of(run)  # refuses a render that a cluster cannot share
        speed = speed_of(run.models) if request.cluster is not None and run.plan.memory.fits else None
        outlook = None if speed is None else cluster.outlook(run, speed)
        return Planned(
            said=request, request=run.request, plan=run.plan, models=run.models, advice=phases.advice(run),
            replan=partial(phases.replan, run), cluster=outlook, speed=speed, smaller=progressive.plan_first(run, plan),
        )  # fmt: skip


@torch.no_grad()
def decode(request: DecodeRequest, budget: Budget | None = None, on_event: OnEvent = _ignore) -> Result:
    """Decode saved latents into a picture with a checkpoint's autoencoder under `budget`. Raises TilerError."""
    with budget or Budget() as budget, decode_run.start(request, budget, on_event) as run:
        run.plan.check()
        lean_imports.freeze_imports()
        with closing(pixels.decode(run, run.decoding, run.latents)) as rows:
            write_picture(
                run.output, rows, run.width, run.height, run.texts, request.dpi,
                force=request.force, format=request.format, quality=request.quality,
            )  # fmt: skip
        return Result(output=run.output, report=reports.of_decode(run))


@torch.no_grad()
def encode(request: EncodeRequest, budget: Budget | None = None, on_event: OnEvent = _ignore) -> Result:
    """Encode prompts into a file for `RenderRequest.prompt_embeds`. Raises TilerError."""
    with budget or Budget() as budget:
        run = encode_run.start(request, budget, on_event)
        run.plan.check()
        lean_imports.freeze_imports()
        encode_run.encode(run)
        return Result(output=run.output, report=reports.of_encode(run))


@torch.no_grad()
def quantize(request: QuantizeRequest, budget: Budget | None = None, on_event: OnEvent = _ignore) -> Result:
    """Write a folder of quantised weights, or add a checkpoint's int8 weights to its cache folder if they are missing.
    Raises TilerError."""
    with budget or Budget() as budget:
        models = phases.open_models(families.open_family(request))
        lean_imports.freeze_imports()
        if request.output is not None:
            sizes = quantising.write_folder(request, models, budget, on_event)
            return Result(output=request.output, report=reports.of_folder(sizes, budget))
        index = packing.prepare_int8(models, request.cache_dir or default_cache(), budget, on_event)
        path = next(iter(index.values())).path
        return Result(output=path, report=reports.of_packed(path, index, budget))
