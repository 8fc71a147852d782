"""The phases of a render, one function each, in the order in which `pipeline` calls them.

Each phase opens the weights it needs, works under the budget, and lets the weights go when it ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from functools import partial

import numpy as np
from torch import Tensor

from tiler import denoiser, encoding, events, interrupts, packing, previewing, repainting
from tiler.decoding.spool import Spool
from tiler.denoiser import open_denoiser
from tiler.diffusion import canvas
from tiler.diffusion.guide_picture import GuidePicture, png_load_bytes
from tiler.diffusion.layouts import Steps, region_span
from tiler.diffusion.poster import load_bytes
from tiler.diffusion.prompts import Prompts
from tiler.diffusion.runner import Runner
from tiler.diffusion.schedulers import Schedule
from tiler.diffusion.spot import AroundSpot
from tiler.diffusion.stored import StoredArray
from tiler.diffusion.stored_canvas import Seeded, StoredDenoising
from tiler.events import OnEvent, Phase
from tiler.files import check_writable
from tiler.jobs.folder import Job
from tiler.jobs.passes import remember
from tiler.memory.budget import Budget
from tiler.memory.limits import memory_warning
from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.embeds import read_words
from tiler.models.family import Family
from tiler.models.loras import apply_loras, find_loras, notes_on_loras
from tiler.models.prompting import notes_on_prompts
from tiler.models.tiny_vae import open_tiny
from tiler.native import library
from tiler.output.latents import save_latents
from tiler.output.picture import check_picture, check_size
from tiler.planning.advice import advise
from tiler.planning.render import RenderPlan, build_schedule, plan_render
from tiler.planning.resolve import resolve
from tiler.planning.tiling import Tiling, pixels_of, plan_tiling
from tiler.render_run import RenderRun
from tiler.request import Decode, Precision, RenderRequest, ResolvedRequest
from tiler.run import measure


def start(
    request: RenderRequest, budget: Budget, on_event: OnEvent, job: Job | None = None, *, planning: bool = False
) -> RenderRun:
    """Fill the request's gaps, check that its files can be written and its guide read, build the models, and plan. If
    `job` continues an earlier run, choices left open then are taken as that run made them. Raises TilerError.

    With `planning`, the default output may already exist.
    """
    job = job or Job(request)
    words = None if request.prompt_embeds is None else read_words(request.prompt_embeds)
    request = encoding.with_words(job.adopt(request), words)
    family = families.open_family(request, reads_text=words is None)
    found = family.checkpoint
    loras = find_loras(request)
    settings = resolve(request, family, loras)
    if not planning or request.output is not None:
        check_picture(settings.output, settings.format, force=settings.force or job.is_finished)
    check_size(settings.output, settings.format, settings.width, settings.height)
    if settings.save_latents is not None:
        check_writable(settings.save_latents, force=settings.force or job.resumed, option="--save-latents")
    models = open_models(family, settings.tiny_vae, settings.preview_vae)
    models.loras = apply_loras(loras, models)
    begun = settings if job.manifest is None else job.manifest.as_begun(settings)
    tiling = plan_tiling(settings, family)
    spoken = encoding.find_prompts(begun, models, tiling.texts, words)
    embeds = bool(spoken.read_as.embeddings)
    plan = make_plan(begun, models, budget.max_bytes, job, tiling, encoded=spoken.all_encoded, embeds=embeds)
    plan = replace(plan, memory=replace(plan.memory, beside_bytes=budget.beside_bytes))
    run = RenderRun(
        said=request, request=settings, plan=plan, models=models, budget=budget, on_event=on_event, job=job,
        spoken=spoken, preview=previewing.open_preview(settings, models),
        weights={part.name: (found.weights(part.name), part.aliases) for part in packing.packed_parts(family)},
    )  # fmt: skip
    if any(plan.crop):
        height, width = pixels_of(plan.canvas)
        run.note(f"this model makes no picture that small: {width}×{height} is rendered, and its middle kept")
    if request.prompt is None and settings.prompt is not None and not request.regions:
        run.note(f"no prompt was given; this is the model's own: {settings.prompt}")
    on_prompts = notes_on_prompts(settings, family, has_guide=plan.guide is not None or plan.smaller is not None)
    on_loras = *notes_on_loras(settings, models, spoken.read_as), *models.loras.notes
    warning = memory_warning(budget.max_bytes, beside_bytes=budget.beside_bytes)
    slow = f"torch computes, not tiler's own kernels: {why}" if (why := library.fault_of_file()) else None
    others = repainting.note_on_format(settings), warning, slow
    run.tell((*on_prompts, *on_loras, *found.notes, *family.notes, *plan.notes, *others))
    return run


def open_models(family: Family, tiny_vae: str | None = None, preview_vae: str | None = None) -> Models:
    """The family's models, with a tiny decoder for the picture, for previews or for both if one is given. Everything
    that follows uses this one set. Raises ModelError."""
    given = tiny_vae or preview_vae
    return Models(family, None if given is None else open_tiny(given, family), previews_only=tiny_vae is None)


def make_plan(
    request: ResolvedRequest,
    models: Models,
    max_bytes: int,
    job: Job | None = None,
    tiling: Tiling | None = None,
    *,
    encoded: bool = False,
    embeds: bool = False,
    rss_bytes: int | None = None,
) -> RenderPlan:
    """Cut the canvas into tiles unless `tiling` is given, build the models, measure the process, and plan. Prompts that
    are already `encoded` need no text encoder; prompts that name embeddings (`embeds`) may be longer than their words.
    The decoding methods that a job started with are kept. A second plan is given the `rss_bytes` of the first one,
    which has left memory behind. Raises TilerError."""
    tiling = tiling or plan_tiling(request, models.family)
    # packing int8 weights reads all parts
    models.build(encoders=not encoded or encoding.precision_of(request, models.family) is Precision.INT8)
    with ExitStack() as stack:
        path, canvas = request.guide_image, pixels_of(tiling.canvas)
        whole = path is not None and tiling.spot is None
        picture = stack.enter_context(GuidePicture(path, canvas)) if path is not None and whole else None
        facts = measure(request.scratch_folder, picture)
        if path is not None and not whole:
            facts = replace(facts, guide_load_bytes=load_bytes(path))
    if tiling.smaller is not None:
        pixels = math.prod(tiling.smaller)
        facts = replace(facts, guide_pixels=pixels, guide_load_bytes=png_load_bytes(pixels))
    if rss_bytes is not None:
        facts = replace(facts, rss_bytes=rss_bytes)
    if job is not None:  # the job's own files count as free space: they are replaced or reused
        held = job.held_bytes(request.scratch_folder)
        facts = replace(facts, scratch_free_bytes=facts.scratch_free_bytes + held)
    if job is None or (begun := job.manifest) is None:
        return plan_render(request, models, tiling, facts, max_bytes, encoded=encoded, embeds=embeds)
    methods = {name: Decode(kind) for name, kind in begun.methods.items()}
    plan = plan_render(request, models, tiling, facts, max_bytes, methods, encoded=encoded, embeds=embeds)
    return replace(plan, precision_why="as the job started")


def advice(run: RenderRun) -> str:
    """What would need less memory, if the plan does not fit and no job has fixed the choices; else ""."""
    if run.plan.memory.fits or run.job.manifest is not None:
        return ""
    return advise(run.request, run.plan, lambda request: replan(run, request).memory)


def replan(run: RenderRun, request: ResolvedRequest) -> RenderPlan:
    """The plan for another request with the run's models and budget. Raises TilerError."""
    embeds, encoded = bool(run.spoken.read_as.embeddings), run.plan.encoded
    plan = make_plan(
        request, run.models, run.budget.max_bytes, encoded=encoded, embeds=embeds, rss_bytes=run.plan.rss_bytes
    )
    return replace(plan, memory=replace(plan.memory, beside_bytes=run.budget.beside_bytes))


def prepare_weights(run: RenderRun) -> None:
    """Report the seed and the precision; quantise the weights if the plan uses int8 and no earlier run has done so."""
    run.note(f"seed {run.request.seed}")
    run.note(f"denoiser in {run.plan.precision} ({run.plan.precision_why})")
    denoiser.prepare_weights(run)


def load_guide(run: RenderRun) -> np.ndarray | None:
    """The user's guide or the smaller picture, (h, w, 3) uint8 sRGB, no larger than the canvas can use; None if there
    is none, or if a spot of it is to be repainted."""
    path = run.request.guide_image if run.plan.smaller is None else run.smaller_picture
    if path is None or run.plan.spot is not None or run.job.has_reference:
        return None
    with run.phase(Phase.LOAD_GUIDE, 1), GuidePicture(path, pixels_of(run.plan.canvas)) as picture:
        return picture.load(run.note)


def encode_prompts(run: RenderRun) -> Prompts:
    """Encode every text that any step uses, each once."""
    with run.phase(Phase.ENCODE_PROMPTS, 1):
        encoded = encoding.encode_prompts(run, run.weights, run.spoken)
        return Prompts(run.plan.family, {text: found.prompt for text, found in encoded.items()})


def make_guide(run: RenderRun, prompts: Prompts) -> Tensor | None:
    """Denoise the guide at the model's native resolution. Return its latents, (1, C, h, w) fp32 scaled; None if the
    plan has no guide."""
    plan = run.plan
    if plan.guide is None or run.job.has_reference:
        return None
    with run.phase(Phase.GUIDE, plan.guide_samples):
        return _denoise(run, Phase.GUIDE, plan.guide_steps, prompts, None, 0, partial(open_denoiser, phase=Phase.GUIDE))


OpenRunner = Callable[[RenderRun, Prompts], AbstractContextManager[Runner]]
"""Opens the runner of a phase."""


def denoise_canvas(
    run: RenderRun, prompts: Prompts, reference: Tensor | StoredArray | None, open_runner: OpenRunner = open_denoiser
) -> Tensor | StoredArray:
    """Denoise the whole canvas with Mixture of Diffusers. Return its final latents, (1, C, H, W) fp32 scaled."""
    plan = run.plan
    if plan.begin == run.request.num_inference_steps and run.request.strength > 0:
        run.note("no step is left for the canvas: it is the enlarged guide; raise --steps or --strength")
    elif plan.begin:
        first = "step" if plan.begin == 1 else f"{plan.begin} steps"
        run.note(f"the guide takes the place of the first {first} of {run.request.num_inference_steps}")
    if not plan.stored:  # a stored canvas has no preview
        previewing.learn_by_decoding(run, run.preview, run.request, plan.memory.peak_of(Phase.DECODE))
    with run.phase(Phase.CANVAS, plan.canvas_samples):
        if plan.stored:
            assert not isinstance(reference, Tensor)
            return _denoise_stored(run, prompts, reference, open_runner)
        assert not isinstance(reference, StoredArray)
        return _denoise(run, Phase.CANVAS, plan.canvas_steps, prompts, reference, plan.begin, open_runner)


def _denoise(
    run: RenderRun, phase: Phase, tiles: Steps, prompts: Prompts, reference: Tensor | None, begin: int, open_runner: OpenRunner
) -> Tensor:  # fmt: skip
    request, plan, steps = run.request, run.plan, run.request.num_inference_steps
    height, width = plan.canvas if phase == Phase.CANVAS or plan.guide is None else plan.guide[:2]
    reseeded = [((part.rows, part.cols), part.seed) for part in _reseeded(run) if phase == Phase.CANVAS]
    noise, generator = canvas.initial_noise((1, plan.family.latent_channels, height, width), request.seed, reseeded)
    schedule = build_schedule(request, plan.family)
    first = plan.calls.first_of(begin)
    latents = schedule.start(noise, reference, first)
    if begin == steps:
        return latents
    if phase == Phase.CANVAS:
        previewing.watch(run, run.preview, schedule, begin)
    around: Schedule = schedule
    if plan.spot is not None and reference is not None:
        around = AroundSpot(schedule, plan.spot, reference, noise)
    denoising = canvas.Denoising(latents, tiles, around, generator, begin=first, phase=phase)
    if not denoising.take_up(run.job):  # the job has already finished this phase: no weights are needed
        return denoising.latents
    with interrupts.deferred(), open_runner(run, prompts) as runner:
        _advance(run, phase, denoising, runner, tiles.samples)
    return denoising.latents


def _denoise_stored(
    run: RenderRun, prompts: Prompts, reference: StoredArray | None, open_runner: OpenRunner
) -> StoredArray:
    request, plan = run.request, run.plan
    if run.preview is not None:
        run.note("a canvas that is stored in files has no preview")
    denoising = run.files.enter_context(
        StoredDenoising(
            run.stored_folder, plan.shape, plan.canvas_steps, build_schedule(request, plan.family), request.seed,
            reseeded=_reseeded(run), reference=reference, begin=plan.calls.first_of(plan.begin),
        )
    )  # fmt: skip
    if denoising.step < denoising.end:
        with interrupts.deferred(), open_runner(run, prompts) as runner:
            _advance(run, Phase.CANVAS, denoising, runner, plan.canvas_samples)
    return denoising.latents


def _reseeded(run: RenderRun) -> list[Seeded]:
    spans = ((region_span(r, run.plan.family.traits.patch), r.seed) for r in run.request.regions)
    return [Seeded(slice(*rows), slice(*cols), seed) for (rows, cols), seed in spans if seed is not None]


def _advance(
    run: RenderRun, phase: Phase, denoising: canvas.Denoising | StoredDenoising, runner: Runner, total: int
) -> None:
    """Denoise to the end, reporting each tile."""
    steps = run.request.num_inference_steps
    run.on_event(events.Working(name=phase, done=denoising.samples_done))
    with closing(denoising.run(runner, run.job)) as loop:
        for state in loop:
            step = run.plan.calls.step_of(state.step)
            detail = f"step {step + 1}/{steps}, {state.samples}/{state.total} tile passes"
            run.on_event(events.Progress(name=phase, done=denoising.samples_done, total=total, detail=detail))


def save_canvas(run: RenderRun, latents: Tensor | StoredArray) -> None:
    """Write the file of --save-latents, if asked for."""
    if (path := run.request.save_latents) is not None:
        save_latents(path, latents, picture_facts(run), force=run.request.force or run.job.resumed)


def picture_facts(run: RenderRun) -> dict[str, str]:
    """The facts that a latents file carries about its picture: the requested size in pixels, and the picture's own
    texts."""
    box = zip(("width", "height", "top", "left"), (run.request.width, run.request.height, *run.plan.crop), strict=True)
    return {name: str(pixels) for name, pixels in box} | run.texts


def remembered(run: RenderRun, latents: Tensor | StoredArray) -> Spool | None:
    """The spool in which the run's job keeps the passes of decoding `latents`; None if it cannot."""
    return remember(run.job.spool, "the decoder", run.plan.methods["decode"], latents, run.on_event, run.note)
