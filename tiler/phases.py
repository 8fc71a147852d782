"""The phases of a render, one function each, in the order in which `pipeline` calls them.

Each phase opens the weights it needs, works under the budget, and lets the weights go when it ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tiler import denoiser, encoding, events, interrupts, packing, previewing
from tiler.decoding import FACTOR, method
from tiler.decoding.frozen import Part
from tiler.decoding.spool import Spool, bytes_in
from tiler.denoiser import DenoiserRun, open_denoiser
from tiler.diffusion import canvas, guide, stored, stored_files
from tiler.diffusion.guide_picture import GuidePicture
from tiler.diffusion.prompts import Prompts
from tiler.diffusion.runner import Runner
from tiler.diffusion.stored import StoredArray
from tiler.diffusion.stored_canvas import Seeded, StoredDenoising
from tiler.diffusion.tiles import Steps, region_span
from tiler.encoding import Spoken
from tiler.errors import StorageError
from tiler.events import OnEvent, percent
from tiler.files import check_writable
from tiler.jobs.folder import Job
from tiler.jobs.passes import remember
from tiler.memory.budget import Budget
from tiler.memory.limits import memory_warning
from tiler.memory.policy import at_rows
from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.embeds import read_words
from tiler.models.family import Family
from tiler.models.loras import apply_loras, find_loras, notes_on_loras
from tiler.models.prompting import notes_on_prompts
from tiler.models.tiny_vae import open_tiny
from tiler.output.latents import save_latents
from tiler.output.picture import check_picture, check_size
from tiler.pixels import Decoding, decode_pixels
from tiler.planning.advice import advise
from tiler.planning.render import RenderPlan, build_schedule, plan_render
from tiler.planning.resolve import resolve
from tiler.planning.tiling import Tiling, pixels_of, plan_tiling
from tiler.previewing import Preview
from tiler.request import Decode, GuideUpscale, Precision, RenderRequest, ResolvedRequest
from tiler.run import WorkerUse, measure
from tiler.weights.identity import model_id


@dataclass(kw_only=True)
class RenderRun(DenoiserRun):
    """One render under way."""

    said: RenderRequest
    job: Job
    spoken: Spoken
    texts: dict[str, str] = field(default_factory=dict)  # what the picture will say of itself
    workers: list[WorkerUse] = field(default_factory=list)  # of a cluster, that predicted tiles
    preview: Preview | None = None
    files: ExitStack = field(default_factory=ExitStack)  # open until the picture is written

    @cached_property
    def stored_folder(self) -> Path:
        """Where a canvas lies that memory does not hold: in the job, or, without one, in a folder that goes."""
        folder = self.job.canvas_folder
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="tiler-canvas-", dir=self.request.scratch_folder))
            self.files.callback(stored_files.clear, folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder}: cannot be made ({error.strerror}); choose another --scratch") from error
        return folder

    @cached_property
    def model_id(self) -> str:
        """Of the checkpoint's weights and configs."""
        return model_id(self.plan.family.checkpoint, [part.name for part in self.plan.family.parts])

    @property
    def decoding(self) -> Decoding:
        plan = self.plan
        return Decoding(
            plan.decoder, plan.methods["decode"], plan.resident["decode"], plan.memory.peak_of("decode"), plan.crop
        )


def start(
    request: RenderRequest, budget: Budget, on_event: OnEvent, job: Job | None = None, *, planning: bool = False
) -> RenderRun:
    """Fill the request, check that its files can be written and its guide read, build the models, and plan; of a `job`
    to be continued what was left open then is as it was. Raises TilerError.

    `planning` an output that was not named need not be free.
    """
    job = job or Job(request)
    words = None if request.prompt_embeds is None else read_words(request.prompt_embeds)
    request = encoding.with_words(job.adopt(request), words)
    family = families.open_family(request, reads_text=words is None)
    found = family.checkpoint
    settings = resolve(request, family)
    if not planning or request.output is not None:
        check_picture(settings.output, settings.format, force=settings.force or job.is_finished)
    check_size(settings.output, settings.format, settings.width, settings.height)
    if settings.save_latents is not None:
        check_writable(settings.save_latents, force=settings.force or job.resumed, option="--save-latents")
    models = open_models(family, settings.tiny_vae)
    loras = find_loras(settings)
    models.loras = apply_loras(loras, models)
    begun = settings if job.manifest is None else replace(settings, precision=Precision(job.manifest.precision))
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
        run.note(f"this model makes no picture as small as that: it is the middle of one of {width}×{height}")
    if request.prompt is None and settings.prompt is not None and not request.regions:
        run.note(f"no prompt was given; this is the model's own: {settings.prompt}")
    on_prompts = notes_on_prompts(settings, family, has_guide=plan.guide is not None)
    on_loras = *notes_on_loras(settings, loras, models, spoken.read_as), *models.loras.notes
    run.tell((*on_prompts, *on_loras, *found.notes, *family.notes, *plan.notes, memory_warning(budget.max_bytes)))
    return run


def open_models(family: Family, tiny_vae: str | None = None) -> Models:
    """The family's models, and the tiny decoder in the folder `tiny_vae`, to be built once for all that follows. Raises
    ModelError."""
    return Models(family, None if tiny_vae is None else open_tiny(tiny_vae, family))


def make_plan(
    request: ResolvedRequest,
    models: Models,
    max_bytes: int,
    job: Job | None = None,
    tiling: Tiling | None = None,
    *,
    encoded: bool = False,
    embeds: bool = False,
) -> RenderPlan:
    """Cut the work, unless its `tiling` is known, build the models, look at the process and plan; no text encoder is
    needed for prompts that are `encoded`, and those that name embeddings (`embeds`) may be longer than their words. The
    ways that a job was begun with hold. Raises TilerError."""
    tiling = tiling or plan_tiling(request, models.family)
    # int8 weights are made of all parts
    models.build(encoders=not encoded or encoding.precision_of(request, models.family) is Precision.INT8)
    with ExitStack() as stack:
        path, canvas = request.guide_image, pixels_of(tiling.canvas)
        picture = None if path is None else stack.enter_context(GuidePicture(path, canvas))
        facts = measure(request.scratch_folder, picture)
    if job is not None:  # what it holds already is room that it has
        held = bytes_in(job.spool_folder(request.scratch_folder))
        facts = replace(facts, scratch_free_bytes=facts.scratch_free_bytes + held)
    if job is None or (begun := job.manifest) is None:
        return plan_render(request, models, tiling, facts, max_bytes, encoded=encoded, embeds=embeds)
    methods = {name: Decode(kind) for name, kind in begun.methods.items()}
    plan = plan_render(request, models, tiling, facts, max_bytes, methods, encoded=encoded, embeds=embeds)
    return replace(plan, precision_why="as the job was begun")


def advice(run: RenderRun) -> str:
    """What would need less memory, where the plan does not fit and nothing of it is fixed by a job; else ""."""
    if run.plan.memory.fits or run.job.manifest is not None:
        return ""
    return advise(run.request, run.plan, lambda request: replan(run, request).memory)


def replan(run: RenderRun, request: ResolvedRequest) -> RenderPlan:
    """How another request would be carried out instead of the run's. Raises TilerError."""
    embeds, encoded = bool(run.spoken.read_as.embeddings), run.plan.encoded
    plan = make_plan(request, run.models, run.budget.max_bytes, encoded=encoded, embeds=embeds)
    return replace(plan, memory=replace(plan.memory, beside_bytes=run.budget.beside_bytes))


def prepare_weights(run: RenderRun) -> None:
    """Say what was decided; quantise the weights where int8 was, unless an earlier run did."""
    run.note(f"seed {run.request.seed}")
    run.note(f"denoiser in {run.plan.precision} ({run.plan.precision_why})")
    denoiser.prepare_weights(run)


def load_guide(run: RenderRun) -> np.ndarray | None:
    """The user's guide, (h, w, 3) uint8 sRGB, no larger than the canvas has use for; None where none was given."""
    path = run.request.guide_image
    if path is None or run.job.has_reference:
        return None
    with run.phase("load guide", 1), GuidePicture(path, pixels_of(run.plan.canvas)) as picture:
        return picture.load(run.note)


def encode_prompts(run: RenderRun) -> Prompts:
    """Every text that is said at any step, once."""
    with run.phase("encode prompts", 1):
        encoded = encoding.encode_prompts(run, run.weights, run.spoken)
        return Prompts(run.plan.family, {text: found.prompt for text, found in encoded.items()})


def make_guide(run: RenderRun, prompts: Prompts) -> Tensor | None:
    """Denoise the guide at the model's native resolution → its latents, (1, C, h, w) fp32 scaled; None where there is
    none."""
    plan = run.plan
    if plan.guide is None or run.job.has_reference:
        return None
    with run.phase("guide", plan.guide_samples):
        return _denoise(run, "guide", plan.guide_steps, prompts, None, 0, partial(open_denoiser, phase="guide"))


def make_reference(
    run: RenderRun, picture: np.ndarray | None, guide_latents: Tensor | None
) -> Tensor | StoredArray | None:
    """The user's `picture`, or the guide, as latents of the canvas's size, (1, C, H, W) fp32 scaled; None without
    either."""
    if run.plan.stored:
        return _stored_reference(run, picture, guide_latents)
    if run.job.has_reference:
        return run.job.load_reference()
    if guide_latents is None and picture is None:
        return None
    (_, _, reference), *more = _reference_parts(run, picture, guide_latents)
    assert not more, "a canvas in memory has one part"
    run.job.save_reference(reference)
    run.job.clear_spool()
    return reference


def _stored_reference(run: RenderRun, picture: np.ndarray | None, guide_latents: Tensor | None) -> StoredArray | None:
    place = run.stored_folder / stored_files.REFERENCE
    if not place.exists():
        if guide_latents is None and picture is None:
            return None
        new = place.with_suffix(".new")
        with StoredArray(new, run.plan.shape, new=True) as array:
            for top, left, part in _reference_parts(run, picture, guide_latents):
                array.put(part, top, left)
            array.sync()
        new.replace(place)
        run.job.clear_spool()
    return run.files.enter_context(StoredArray(place, run.plan.shape, new=False))


def _reference_parts(run: RenderRun, picture: np.ndarray | None, guide_latents: Tensor | None) -> Iterator[Part]:
    request, plan = run.request, run.plan
    height, width = pixels_of(plan.canvas)
    spec, wraps = plan.family.autoencoder, request.wrap.axes
    if guide_latents is not None and request.guide_upscale is GuideUpscale.LATENT:
        assert plan.guide is not None
        rows = stored.band_rows(plan.shape) if plan.stored else plan.canvas[0]
        for top in range(0, plan.canvas[0], rows):
            seen = slice(top, top + rows)
            yield Part(top, 0, guide.upscale(guide_latents, plan.guide, plan.canvas, wraps, seen))
        return
    vae, name = run.models.vae(spec), "guide picture"
    begin = picture if guide_latents is None else guide_latents
    assert begin is not None
    spool = remember(run.job.spool, "the guide's picture", plan.methods[name], begin, run.on_event, run.note)
    with (
        interrupts.deferred(),
        run.phase(name, 100),
        run.streamed(vae, spec.weights, families.vae_names, plan.resident[name]) as streamer,
    ):
        box: tuple[float, float] | None
        check, tell = at_rows(run.budget, plan.memory.peak_of(name)), percent(run.on_event, name)
        if guide_latents is not None:
            assert plan.guide is not None
            unscaled = spec.unscale_(guide_latents)
            picture = np.concatenate(
                list(decode_pixels(plan.methods["guide decoded"], vae, streamer, unscaled, check, tell))
            )
            previewing.learn(run.preview, spec.scale(unscaled), picture)
            box = (FACTOR * plan.guide.shown_height, FACTOR * plan.guide.shown_width)
        else:
            assert picture is not None
            box = None
        encoder = plan.methods[name]
        pixels = guide.crop_to_aspect(picture, height, width, box, wraps, encoder.margin_pixels)
        progress = percent(run.on_event, name)
        held = dict[str, Any](check=check, progress=progress, spool=spool)
        if not plan.stored:
            yield Part(0, 0, spec.scale(method.encode(encoder, vae, streamer, pixels, **held)))
            return
        for top, left, part in method.encode_parts(encoder, vae, streamer, pixels, **held):
            yield Part(top, left, spec.scale(part))


OpenRunner = Callable[[RenderRun, Prompts], AbstractContextManager[Runner]]
"""What opens the runner of a phase."""


def denoise_canvas(
    run: RenderRun, prompts: Prompts, reference: Tensor | StoredArray | None, open_runner: OpenRunner = open_denoiser
) -> Tensor | StoredArray:
    """Mixture of Diffusers on the whole canvas: its final latents, (1, C, H, W) fp32 scaled."""
    plan = run.plan
    if plan.begin == run.request.num_inference_steps and run.request.strength > 0:
        run.note("no step is left for the canvas: it is the enlarged guide; raise --steps or --strength")
    elif plan.begin:
        run.note(f"the guide takes the place of the first {plan.begin} of {run.request.num_inference_steps} steps")
    previewing.learn_by_decoding(run, run.preview, run.request, plan.memory.peak_of("decode"))
    with run.phase("canvas", plan.canvas_samples):
        if plan.stored:
            assert not isinstance(reference, Tensor)
            return _denoise_stored(run, prompts, reference, open_runner)
        assert not isinstance(reference, StoredArray)
        return _denoise(run, "canvas", plan.canvas_steps, prompts, reference, plan.begin, open_runner)


def _denoise(
    run: RenderRun, phase: str, tiles: Steps, prompts: Prompts, reference: Tensor | None, begin: int, open_runner: OpenRunner
) -> Tensor:  # fmt: skip
    request, plan, steps = run.request, run.plan, run.request.num_inference_steps
    height, width = plan.canvas if phase == "canvas" or plan.guide is None else plan.guide[:2]
    reseeded = [((part.rows, part.cols), part.seed) for part in _reseeded(run) if phase == "canvas"]
    noise, generator = canvas.initial_noise((1, plan.family.latent_channels, height, width), request.seed, reseeded)
    schedule = build_schedule(request, plan.family)
    first = plan.calls.first_of(begin)
    latents = schedule.start(noise, reference, first)
    if begin == steps:
        return latents
    if phase == "canvas":
        previewing.watch(run.preview, schedule, begin, run.note)
    denoising = canvas.Denoising(latents, tiles, schedule, generator, begin=first, phase=phase)
    if not denoising.take_up(run.job):  # a job that has this phase opens no weights for it
        return denoising.latents
    with interrupts.deferred(), open_runner(run, prompts) as runner:
        _advance(run, phase, denoising, runner, tiles.samples)
    return denoising.latents


def _denoise_stored(
    run: RenderRun, prompts: Prompts, reference: StoredArray | None, open_runner: OpenRunner
) -> StoredArray:
    request, plan = run.request, run.plan
    if run.preview is not None:
        run.note("no preview is shown of a canvas that lies in files")
    denoising = run.files.enter_context(
        StoredDenoising(
            run.stored_folder, plan.shape, plan.canvas_steps, build_schedule(request, plan.family), request.seed,
            reseeded=_reseeded(run), reference=reference, begin=plan.calls.first_of(plan.begin),
        )
    )  # fmt: skip
    if denoising.step < denoising.end:
        with interrupts.deferred(), open_runner(run, prompts) as runner:
            _advance(run, "canvas", denoising, runner, plan.canvas_samples)
    return denoising.latents


def _reseeded(run: RenderRun) -> list[Seeded]:
    spans = ((region_span(r, run.plan.family.traits.patch), r.seed) for r in run.request.regions)
    return [Seeded(slice(*rows), slice(*cols), seed) for (rows, cols), seed in spans if seed is not None]


def _advance(
    run: RenderRun, phase: str, denoising: canvas.Denoising | StoredDenoising, runner: Runner, total: int
) -> None:
    """To the end, telling of each tile."""
    steps = run.request.num_inference_steps
    with closing(denoising.run(runner, run.job)) as loop:
        for state in loop:
            step = run.plan.calls.step_of(state.step)
            detail = f"step {step + 1}/{steps}, {state.samples}/{state.total} tile passes"
            run.on_event(events.Progress(name=phase, done=denoising.samples_done, total=total, detail=detail))


def save_canvas(run: RenderRun, latents: Tensor | StoredArray) -> None:
    """Write --save-latents' file, where one was asked for."""
    if (path := run.request.save_latents) is not None:
        save_latents(path, latents, picture_facts(run), force=run.request.force or run.job.resumed)


def picture_facts(run: RenderRun) -> dict[str, str]:
    """What a latents file says of its picture: the asked size in pixels, and the picture's own texts."""
    box = zip(("width", "height", "top", "left"), (run.request.width, run.request.height, *run.plan.crop), strict=True)
    return {name: str(pixels) for name, pixels in box} | run.texts


def remembered(run: RenderRun, latents: Tensor | StoredArray) -> Spool | None:
    """Where the run's job keeps the passes of decoding `latents`, if it can."""
    return remember(run.job.spool, "the decoder", run.plan.methods["decode"], latents, run.on_event, run.note)
