"""The phases of a render, one function each, in the order in which `pipeline` calls them.

Each phase opens the weights it needs, works under the budget, and lets the weights go when it ends.
"""

from __future__ import annotations

import math
import re
import shlex
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tiler import events, packing
from tiler.compute.stream import Streamer
from tiler.decoding import FACTOR, method
from tiler.decoding.method import DecodePlan
from tiler.decoding.rows import Latents, to_uint8
from tiler.diffusion import canvas, guide
from tiler.diffusion.guide_picture import GuidePicture
from tiler.diffusion.runner import Conditions, LocalRunner
from tiler.diffusion.tiles import Steps, region_span
from tiler.errors import NameTaken, NumericalError, StorageError
from tiler.events import OnEvent, percent
from tiler.files import check_writable
from tiler.memory.budget import Budget
from tiler.memory.limits import memory_warning
from tiler.memory.policy import at_layer, at_rows
from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.family import Family, Guidance, Options, Part, Role, VaeSpec
from tiler.models.samples import Sample
from tiler.output.latents import save_latents
from tiler.output.picture import check_picture
from tiler.planning.peaks import bf16_keys
from tiler.planning.render import RenderPlan, build_schedule, plan_render
from tiler.planning.resolve import resolve
from tiler.planning.tiling import pixels_of, plan_tiling
from tiler.request import GuideUpscale, Precision, RenderRequest, ResolvedRequest
from tiler.run import Names, Run, measure, streamed
from tiler.weights import checkpoint
from tiler.weights.index import TensorInfo
from tiler.weights.packed import default_cache

_MARKUP = re.compile(r"\([^()]+:\s*[\d.]+\s*\)|<(lora|lyco|hypernet):[^>]+>")  # of AUTOMATIC1111's prompts


@dataclass(kw_only=True)
class RenderRun(Run):
    """One render under way: what was asked, how it is carried out, and what has been counted so far."""

    request: ResolvedRequest
    plan: RenderPlan
    weights: dict[str, tuple[dict[str, TensorInfo], Names]]  # by part: where its parameters lie, and their names there
    prepared: Any = None  # by the family, for guide and canvas
    texts: dict[str, str] = field(default_factory=dict)  # what the picture will say of itself
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("denoiser_calls", "denoiser_samples", "denoiser_bytes_read", "weight_bytes_read"), 0
        )
    )

    @contextmanager
    def streamed(
        self, module: Any, stored: dict[str, TensorInfo], names: Names,
        resident: dict[str, torch.dtype] | None = None, **options: Any,
    ) -> Iterator[Streamer]:  # fmt: skip
        """With the bytes read added to the counts."""
        with streamed(module, stored, names, resident, **options) as streamer:
            try:
                yield streamer
            finally:
                assert streamer.store is not None
                self.counts["weight_bytes_read"] += streamer.store.bytes_read

    @property
    def decoding(self) -> Decoding:
        plan = self.plan
        return Decoding(
            plan.decoder, plan.methods["decode"], plan.resident["decode"], plan.memory.peak_of("decode"), plan.crop
        )


class Decoding(NamedTuple):
    """How a run's last phase decodes its latents. `crop`: pixels above and left of the picture."""

    vae: VaeSpec
    plan: DecodePlan
    resident: dict[str, torch.dtype]
    planned_bytes: int
    crop: tuple[int, int]


def start(request: RenderRequest, budget: Budget, on_event: OnEvent, *, planning: bool = False) -> RenderRun:
    """Fill the request, check that its files can be written and its guide read, build the models, and plan. Raises TilerError.

    `planning` an output that was not named need not be free.
    """
    family = families.read_family(checkpoint.resolve(request.model, variant=request.variant, revision=request.revision))
    found = family.checkpoint
    settings = resolve(request, family)
    if not planning or request.output is not None:
        check_picture(settings.output, force=settings.force)
    if settings.save_latents is not None:
        check_writable(settings.save_latents, force=settings.force, option="--save-latents")
    models = open_models(family, settings.tiny_vae)
    plan = make_plan(settings, models, budget.max_bytes)
    run = RenderRun(
        request=settings, plan=plan, models=models, budget=budget, on_event=on_event,
        weights={part.name: (found.weights(part.name), part.aliases) for part in packing.packed_parts(family)},
    )  # fmt: skip
    texts = [
        settings.prompt,
        settings.negative_prompt,
        *(t for r in settings.regions for t in (r.prompt, r.negative_prompt)),
    ]
    if any(text and _MARKUP.search(text) for text in texts):
        run.note("weights like (word:1.4) and tags like <lora:name:1> are not understood: they are read as plain words")
    negative = settings.negative_prompt, *(r.negative_prompt for r in settings.regions)
    if any(negative) and family.traits.guidance is not Guidance.CFG:
        run.note(f"the negative prompt has no effect: {family.traits.title} takes none")
    if any(plan.crop):
        height, width = pixels_of(plan.canvas)
        run.note(f"this model makes no picture as small as that: it is the middle of one of {width}×{height}")
    for note in (*found.notes, *family.notes, *plan.notes, memory_warning(budget.max_bytes)):
        if note is not None:
            run.note(note)
    return run


def open_models(family: Family, tiny_vae: str | None = None) -> Models:
    """The family's models, and the tiny decoder in the folder `tiny_vae`, to be built once for all that follows. Raises
    ModelError."""
    return Models(family, None if tiny_vae is None else families.read_tiny(checkpoint.resolve_part(tiny_vae), family))


def make_plan(request: ResolvedRequest, models: Models, max_bytes: int) -> RenderPlan:
    """Cut the work, build the models, look at the process and plan. Raises TilerError."""
    tiling = plan_tiling(request, models.family)
    models.build()
    with ExitStack() as stack:
        path, canvas = request.guide_image, pixels_of(tiling.canvas)
        picture = None if path is None else stack.enter_context(GuidePicture(path, canvas))
        facts = measure(request.scratch_folder, picture)
    return plan_render(request, models, tiling, facts, max_bytes)


def prepare_weights(run: RenderRun) -> None:
    """Say what was decided; quantise the weights where int8 was, unless an earlier run did."""
    run.note(f"seed {run.request.seed}")
    run.note(f"denoiser in {run.plan.precision} ({run.plan.precision_why})")
    if run.plan.precision is Precision.INT8:
        cache = run.request.cache_dir or default_cache()
        index = packing.prepare_int8(run.models, cache, run.budget, run.on_event)
        parts = packing.packed_parts(run.plan.family)
        run.weights = {part.name: (index, packing.packed_names(part)) for part in parts}


def load_guide(run: RenderRun) -> np.ndarray | None:
    """The user's guide, (h, w, 3) uint8 sRGB, no larger than the canvas has use for; None where none was given."""
    path = run.request.guide_image
    if path is None:
        return None
    with run.phase("load guide", 1), GuidePicture(path, pixels_of(run.plan.canvas)) as picture:
        return picture.load(run.note)


def encode_prompts(run: RenderRun) -> Conditions:
    """Every prompt and its negative prompt, each text once."""
    request, family = run.request, run.plan.family
    pairs = [] if request.prompt is None else [(request.prompt, request.negative_prompt)]
    for r in request.regions:
        pairs.append((r.prompt, request.negative_prompt if r.negative_prompt is None else r.negative_prompt))
    if family.traits.guidance is not Guidance.CFG:
        pairs = [(prompt, prompt) for prompt, _ in pairs]  # what is never used is not encoded

    @contextmanager
    def opened(part: Part) -> Iterator[Any]:
        module = run.models.module(part)
        with run.streamed(module, *run.weights[part.name], int8_products=False, arena_bytes=part.arena_bytes):
            yield module

    with run.phase("encode prompts", 1):
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        encoded = dict(zip(texts, family.encode(texts, opened, run.note), strict=True))
        return Conditions([encoded[prompt] for prompt, _ in pairs], [encoded[negative] for _, negative in pairs])


def make_guide(run: RenderRun, conditions: Conditions) -> Tensor | None:
    """Denoise the guide at the model's native resolution → its latents, (1, C, h, w) fp32 scaled; None where there is none."""
    plan = run.plan
    if plan.guide is None:
        return None
    with run.phase("guide", plan.guide_samples):
        return _denoise(run, "guide", plan.guide_steps, conditions, None, 0, plan.guide_batch)


def make_reference(run: RenderRun, picture: np.ndarray | None, guide_latents: Tensor | None) -> Tensor | None:
    """The user's `picture`, or the guide, as latents of the canvas's size, (1, C, H, W) fp32 scaled; None without either."""
    request, plan = run.request, run.plan
    if guide_latents is None and picture is None:
        return None
    height, width = pixels_of(plan.canvas)
    spec, wraps = plan.family.autoencoder, request.wrap.axes
    if guide_latents is not None and request.guide_upscale is GuideUpscale.LATENT:
        assert plan.guide is not None
        return guide.upscale(guide_latents, plan.guide, plan.canvas, wraps)
    vae, name = run.models.vae(spec), "guide picture"
    with run.phase(name, 100), run.streamed(vae, spec.weights, families.vae_names, plan.resident[name]) as streamer:
        box: tuple[float, float] | None
        check, tell = at_rows(run.budget, plan.memory.peak_of(name)), percent(run.on_event, name)
        if guide_latents is not None:
            assert plan.guide is not None
            unscaled = spec.unscale_(guide_latents)
            picture = np.concatenate(
                list(decode_pixels(plan.methods["guide decoded"], vae, streamer, unscaled, check, tell))
            )
            box = (FACTOR * plan.guide.shown_height, FACTOR * plan.guide.shown_width)
        else:
            assert picture is not None
            box = None
        encoder = plan.methods[name]
        pixels = guide.crop_to_aspect(picture, height, width, box, wraps, encoder.margin_pixels)
        progress = percent(run.on_event, name)
        return spec.scale(method.encode(encoder, vae, streamer, pixels, check=check, progress=progress))


def denoise_canvas(run: RenderRun, conditions: Conditions, reference: Tensor | None) -> Tensor:
    """Mixture of Diffusers on the whole canvas: its final latents, (1, C, H, W) fp32 scaled."""
    plan = run.plan
    if plan.begin == run.request.num_inference_steps and run.request.strength > 0:
        run.note("no step is left for the canvas: it is the enlarged guide; raise --steps or --strength")
    elif plan.begin:
        run.note(f"the guide takes the place of the first {plan.begin} of {run.request.num_inference_steps} steps")
    with run.phase("canvas", plan.canvas_samples):
        return _denoise(run, "canvas", plan.canvas_steps, conditions, reference, plan.begin, plan.batch)


def _denoise(
    run: RenderRun, phase: str, tiles: Steps, conditions: Conditions, reference: Tensor | None, begin: int, batch: int
) -> Tensor:  # fmt: skip
    request, plan, steps = run.request, run.plan, run.request.num_inference_steps
    height, width = plan.canvas if phase == "canvas" or plan.guide is None else plan.guide[:2]
    spans = ((region_span(r, plan.family.traits.patch), r.seed) for r in request.regions if phase == "canvas")
    reseeded = [((slice(*rows), slice(*cols)), seed) for (rows, cols), seed in spans if seed is not None]
    noise, generator = canvas.initial_noise((1, plan.family.latent_channels, height, width), request.seed, reseeded)
    schedule = build_schedule(request, plan.family)
    latents = schedule.start(noise, reference, begin)
    if begin == steps:
        return latents
    family, part = plan.family, plan.family.part(Role.DENOISER)
    denoiser, short = run.models.module(part), partial(run.budget.short, plan.sample_bytes)
    halves = bf16_keys(part, denoiser, plan.precision)
    held = dict[str, Any](bf16_keys=halves, arena_bytes=plan.arena_bytes, transform=True, short=short)
    with run.streamed(denoiser, *run.weights[part.name], plan.resident[phase], **held) as streamer:
        check = at_layer(run.budget, plan.memory.peak_bytes)
        scales = {request.guidance_scale, *(r.guidance_scale for r in request.regions if r.guidance_scale is not None)}
        options = Options(
            attention_window=request.attention_window, seed=request.seed, tile_conditioning=request.tile_conditioning,
            guidance=tuple(sorted(scales)), scratch=request.scratch_folder,
        )  # fmt: skip
        if run.prepared is None:
            prompts = [prompt for side in conditions for prompt in side]
            run.prepared = family.prepare(denoiser, streamer, schedule.timesteps, prompts, options)

        def predict(samples: Sequence[Sample], step: int) -> Tensor:
            run.counts["denoiser_calls"] += 1
            run.counts["denoiser_samples"] += len(samples)
            return family.predict(denoiser, streamer, samples, step, run.prepared, check)

        denoising = canvas.Denoising(latents, tiles, schedule, generator, begin=begin, phase=phase)
        loop = denoising.run(LocalRunner(predict, conditions, batch))
        begun, total = run.counts["denoiser_samples"], tiles.samples
        for state in loop:
            done = run.counts["denoiser_samples"] - begun
            detail = f"step {state.step + 1}/{steps}, {state.samples}/{state.total} tile passes"
            run.on_event(events.Progress(name=phase, done=done, total=total, detail=detail))
        assert streamer.store is not None
        run.counts["denoiser_bytes_read"] += streamer.store.bytes_read
    return denoising.latents


@contextmanager
def kept_canvas(run: RenderRun, latents: Tensor) -> Iterator[None]:
    """Whatever ends this block early, the finished canvas becomes a file, and the error says how to go on from it."""
    request, saved = run.request, None
    try:
        if request.save_latents is not None:
            save_latents(request.save_latents, latents, picture_facts(run), force=request.force)
            saved = request.save_latents
        yield
    except NameTaken:
        raise  # finished, under another name
    except BaseException as error:
        name = f"{request.output.name}.latents.safetensors"
        for path in (saved, request.output.parent / name, Path(tempfile.gettempdir()) / name):
            if path is None:
                continue
            try:
                if path != saved:
                    save_latents(path, latents, picture_facts(run))
            except StorageError:
                continue
            error.add_note(
                f"the finished canvas is in {path}; this makes the picture of it:\n{_decode_command(run, path)}"
            )
            break
        raise


def _decode_command(run: RenderRun, path: Path) -> str:
    request = run.request
    words = ["tiler", "decode", str(path), "--model", request.model, "-o", str(request.output)]
    for flag, value in (
        ("--variant", request.variant),
        ("--revision", request.revision),
        ("--tiny-vae", request.tiny_vae),
    ):
        words += [] if value is None else [flag, value]
    if request.tiny_vae is not None:
        words += ["--decode", "tiny"]
    words += [] if not any(request.wrap.axes) else ["--wrap", request.wrap.value]
    words += [] if request.dpi is None else ["--dpi", f"{request.dpi:g}"]
    return shlex.join(words)


def picture_facts(run: RenderRun) -> dict[str, str]:
    """What a latents file says of its picture: the asked size in pixels, and the picture's own texts."""
    box = zip(("width", "height", "top", "left"), (run.request.width, run.request.height, *run.plan.crop), strict=True)
    return {name: str(pixels) for name, pixels in box} | run.texts


def decode(run: Run, decoding: Decoding, latents: Latents) -> Generator[np.ndarray]:
    """The picture's rows, (n, W, 3) uint8, top first; `latents` (1, C, h, w) are unscaled."""
    spec, plan, resident, planned_bytes, crop = decoding
    vae = run.models.vae(spec)
    run.note(f"decoder: {plan}")
    with run.phase("decode", 100), run.streamed(vae, spec.weights, families.vae_names, resident) as streamer:
        check = at_rows(run.budget, planned_bytes)
        yield from cropped(decode_pixels(plan, vae, streamer, latents, check, percent(run.on_event, "decode")), *crop)


class Unscaled:
    """Scaled latents (1, C, h, w) whose rows are unscaled as they are read: the latents themselves stay as they are."""

    def __init__(self, latents: Tensor, spec: VaeSpec) -> None:
        self._latents, self._spec, self.shape = latents, spec, latents.shape

    def __getitem__(self, rows: tuple[slice, slice, slice]) -> Tensor:
        return self._spec.unscale_(self._latents[rows].clone())


def decode_pixels(
    plan: DecodePlan, vae: Any, streamer: Streamer, unscaled: Latents, check: Callable[[str], None],
    progress: Callable[[float], None],
) -> Generator[np.ndarray]:  # fmt: skip
    """Decode (1, C, h, w) fp32 latents into rows (n, FACTOR·w, 3) uint8. Raises NumericalError rather than give a black picture."""
    row = 0
    with closing(method.decode(plan, vae, streamer, unscaled, check=check, progress=progress)) as strips:
        for strip in strips:
            if not math.isfinite(float(strip.sum())):
                raise NumericalError(
                    f"NaN or Inf in the decoder at row {row}; compare the checksum of the VAE's weights with the original's"
                )
            yield to_uint8(strip)
            row += strip.shape[1]


def cropped(rows: Generator[np.ndarray], top: int, left: int) -> Generator[np.ndarray]:
    """`rows` without the first `top` rows and `left` columns."""
    with closing(rows):
        for strip in rows:
            above, top = min(top, len(strip)), max(0, top - len(strip))
            if above < len(strip):
                yield strip[above:, left:]
