"""The one way through the house: plan → encode prompts → guide → canvas → decode → write.

A low-resolution pass makes a guide image; the canvas pipeline denoises overlapping regions whose noise predictions are
blended on one latent canvas (Mixture of Diffusers); a decoder that works row by row makes the picture. Weights are
streamed from disk, and the whole process stays under the budget. Knows the order of the phases, not how they work.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiler import events
from tiler.compute.layers import stream_layers
from tiler.compute.stream import Streamer
from tiler.decode import method as method
from tiler.decode.method import DecodePlan
from tiler.decode.rows import Latents, to_uint8
from tiler.diffusion import canvas, guide, schedulers
from tiler.errors import NumericalError
from tiler.events import OnEvent, percent
from tiler.files import check_writable
from tiler.memory import lean_imports, process
from tiler.memory.budget import Budget, at_layer, at_rows
from tiler.models import family as families
from tiler.models.family import Options, Part, Role
from tiler.models.samples import Place, Prompt, Sample
from tiler.output.latents import LatentsFile, save_latents
from tiler.output.picture import check_picture, write_picture
from tiler.output.png import infotext
from tiler.packing import packed_names, prepare_int8
from tiler.plan.render import RenderPlan, plan_decode, plan_render
from tiler.plan.tiling import Steps
from tiler.request import Decode, GuideUpscale, Precision, RenderRequest, ScratchDtype, Wrap, check_decode, check_dpi
from tiler.weights.checkpoint import resolve, resolve_part
from tiler.weights.index import TensorInfo
from tiler.weights.packed import default_cache
from tiler.weights.store import WeightStore, match_index


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out: the file, and the report as written by --report."""

    output: Path
    report: dict[str, Any]


def render(request: RenderRequest, budget: Budget | None = None, on_event: OnEvent = lambda event: None) -> Result:
    """Render `request` into its output file under `budget` (default 800 MB of RSS). Raises TilerError."""
    with _inference(), budget or Budget() as budget:
        check_picture(request.output, force=request.force)
        if request.save_latents is not None:
            check_writable(request.save_latents, force=request.force)
        if request.guide_image is not None:
            guide.load_picture(request.guide_image)  # before any work: is it a picture at all?
        plan = plan_render(
            request,
            families.read_family(resolve(request.model, variant=request.variant, revision=request.revision)),
            budget.max_bytes,
        )
        plan.memory.check()
        lean_imports.freeze_imports()
        work = _Work(request, plan, budget, on_event)
        # Holes in the heap count as data though no page of them is resident: 315 MB were seen under a ceiling of 800 MB.
        with process.limit_data(max(0, budget.max_bytes - process.read_rss().now) + budget.max_bytes):
            work.prepare_weights()
            conditions = work.encode_prompts()
            guide_latents = work.guide_pass(conditions) if plan.guide is not None else None
            reference = work.reference(guide_latents)
            latents = work.canvas_pass(conditions, reference)
            if request.save_latents is not None:
                save_latents(request.save_latents, latents)
            write_picture(
                request.output, work.decode(latents), request.width, request.height, work.texts(), request.dpi,
                request.bleed_mm,
            )  # fmt: skip
    return Result(output=request.output, report=work.report())


class _Work:
    """The phases of one render. Each lets its weights go when it ends."""

    def __init__(self, request: RenderRequest, plan: RenderPlan, budget: Budget, on_event: OnEvent) -> None:
        self.request, self.plan, self.family, self.budget, self.on_event = request, plan, plan.family, budget, on_event
        self.scheduler_name = schedulers.choose(request.scheduler, plan.family.scheduler)
        self.denoiser = plan.family.part(Role.DENOISER)
        parts = (self.denoiser, *plan.family.encoders)
        self.weights = {part.name: (plan.family.checkpoint.weights(part.name), part.aliases) for part in parts}
        self.unet_calls = self.unet_samples = self.weight_bytes_read = self.unet_bytes_read = 0

    def prepare_weights(self) -> None:
        """The UNet's and the text encoder's weights in int8, where they are asked for: quantised now, or at an earlier run."""
        self._note(f"seed {self.request.seed}")
        self._note(f"UNet in {self.plan.precision} ({self.plan.precision_why})")
        if self.plan.precision is Precision.INT8:
            cache = self.request.cache_dir or default_cache()
            index = prepare_int8(self.family, cache, self.budget, self.on_event)
            parts = (self.denoiser, *self.family.encoders)
            self.weights = {part.name: (index, packed_names(part)) for part in parts}

    def encode_prompts(self) -> canvas.Conditions:
        """Every prompt with its negative prompt, once."""
        request = self.request
        pairs = [] if request.prompt is None else [(request.prompt, request.negative_prompt)]
        for r in request.regions:
            pairs.append((r.prompt, request.negative_prompt if r.negative_prompt is None else r.negative_prompt))
        with self._phase("encode prompts", 1):
            texts = list(dict.fromkeys(text for pair in pairs for text in pair))
            encoded = dict(zip(texts, self.family.encode(texts, self._opened, self._note), strict=True))
            return canvas.Conditions(
                torch.cat([encoded[prompt].tokens for prompt, _ in pairs]),
                torch.cat([encoded[negative].tokens for _, negative in pairs]),
            )

    @contextmanager
    def _opened(self, part: Part) -> Iterator[Any]:
        """A text encoder with its weights."""
        module = part.build()
        with self._streamed(module, *self.weights[part.name], int8_products=False, arena_bytes=part.arena_bytes):
            yield module

    def guide_pass(self, conditions: canvas.Conditions) -> Tensor:
        """A picture of the whole at the model's native size: its latents, (1, C, h, w) fp32 scaled."""
        plan = self.plan
        with self._phase("guide", plan.guide_samples):
            return self._sample("guide", plan.guide_steps, conditions, None, 0, plan.guide_batch)

    def reference(self, guide_latents: Tensor | None) -> Tensor | None:
        """What rules the first part of the canvas's schedule: the guide's picture, or the user's, at the canvas's size."""
        if guide_latents is None and self.request.guide_image is None:
            return None
        height, width = (8 * n for n in self.plan.canvas)
        kind, wraps = self.family.autoencoder, self.request.wrap.axes
        if guide_latents is not None and self.request.guide_upscale is GuideUpscale.LATENT:
            assert self.plan.guide is not None
            return guide.upscale(guide_latents, self.plan.guide, self.plan.canvas, wraps)
        vae = families.build_vae(kind)
        with (
            self._phase("guide picture", 100),
            self._streamed(vae, kind.weights, families.vae_names, self.plan.resident["guide picture"]) as streamer,
        ):
            if guide_latents is not None:
                assert self.plan.guide is not None
                how = self.plan.methods["guide decoded"]
                strips = self._decode_strips(how, vae, streamer, kind.unscale_(guide_latents), "guide picture")
                picture = np.concatenate(list(strips))
                box: tuple[float, float] | None = (8 * self.plan.guide.shown_height, 8 * self.plan.guide.shown_width)
            else:
                assert self.request.guide_image is not None
                picture, box = guide.load_picture(self.request.guide_image), None
            how = self.plan.methods["guide picture"]
            mean = method.encode(
                how, vae, streamer, guide.crop_to_aspect(picture, height, width, box, wraps, how.margin_pixels),
                check=at_rows(self.budget, self.plan.memory.peak_of("guide picture")),
                progress=self._percent("guide picture"),
            )  # fmt: skip
            return kind.scale(mean)

    def canvas_pass(self, conditions: canvas.Conditions, reference: Tensor | None) -> Tensor:
        """Mixture of Diffusers on the whole canvas: latents as the scheduler left them, (1, C, h, w) fp32."""
        plan = self.plan
        with self._phase("canvas", plan.canvas_samples):
            return self._sample("canvas", plan.canvas_steps, conditions, reference, plan.begin, plan.batch)

    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """The picture's rows, (n, W, 3) uint8, top first."""
        kind, how = self.plan.decoder, self.plan.methods["decode"]
        vae = families.build_vae(kind)
        self._note(f"decoder: {how}")
        with (
            self._phase("decode", 100),
            self._streamed(vae, kind.weights, families.vae_names, self.plan.resident["decode"]) as streamer,
        ):
            yield from self._decode_strips(how, vae, streamer, kind.unscale_(latents), "decode")

    def _sample(
        self,
        phase: str,
        tiles: Steps,
        conditions: canvas.Conditions,
        reference: Tensor | None,
        begin: int,
        batch: int,
    ) -> Tensor:
        request, steps = self.request, self.request.num_inference_steps
        guide = self.plan.guide if phase == "guide" else None
        height, width = self.plan.canvas if guide is None else guide[:2]
        reseeded = [] if phase == "guide" else [
            ((slice(r.rows[0] // 8, r.rows[1] // 8), slice(r.cols[0] // 8, r.cols[1] // 8)), r.seed)
            for r in request.regions if r.seed is not None
        ]  # fmt: skip
        noise, generator = canvas.initial_noise((1, self.family.latent_channels, height, width), request.seed, reseeded)
        scheduler = schedulers.build(self.scheduler_name, self.family.scheduler, steps)
        latents = canvas.start_latents(scheduler, noise, reference, begin)
        if begin == steps:
            return latents
        unet, family = self.denoiser.build(), self.family
        with self._streamed(
            unet,
            *self.weights[self.denoiser.name],
            self.plan.resident[phase],
            arena_bytes=self.plan.arena_bytes,
            transform=True,
        ) as streamer:
            streamer.short = partial(self.budget.short, self.plan.sample_bytes)
            check = at_layer(self.budget, self.plan.memory.peak_bytes)
            options = Options(attention_window=request.attention_window, seed=request.seed)
            prompts = [Prompt(row) for rows in conditions for row in rows.split(1)]
            prepared = family.prepare(unet, streamer, scheduler.timesteps, prompts, options)
            numbers = {float(timestep): number for number, timestep in enumerate(scheduler.timesteps)}

            def predict(inputs: list[Tensor], timestep: Tensor, embeds: list[Tensor]) -> Tensor:
                self.unet_calls += 1
                self.unet_samples += len(inputs)
                place = Place(0, 0, 8 * inputs[0].shape[2], 8 * inputs[0].shape[3], (8 * height, 8 * width))
                pairs = zip(inputs, embeds, strict=True)
                samples = [Sample(x, Prompt(tokens), place, request.guidance_scale) for x, tokens in pairs]
                return family.predict(unet, streamer, samples, numbers[float(timestep)], prepared, check)

            loop = canvas.denoise(latents, tiles, conditions, scheduler, predict, generator, begin=begin, batch=batch)
            begun, total = self.unet_samples, sum(tile.samples for step in tiles for tile in step)
            for state in loop:
                done = self.unet_samples - begun
                detail = f"step {state.step + 1}/{steps}, {state.samples}/{state.total} tile passes"
                self.on_event(events.Progress(name=phase, done=done, total=total, detail=detail))
                if state.latents is not None:
                    latents = state.latents
            assert streamer.store is not None
            self.unet_bytes_read += streamer.store.bytes_read
        return latents

    def _decode_strips(
        self, how: DecodePlan, vae: Any, streamer: Streamer, unscaled: Tensor, phase: str
    ) -> Iterator[np.ndarray]:
        check = at_rows(self.budget, self.plan.memory.peak_of(phase))
        return decode_pixels(how, vae, streamer, unscaled, check, self._percent(phase))

    def _percent(self, phase: str) -> Callable[[float], None]:
        return percent(self.on_event, phase)

    @contextmanager
    def _streamed(
        self,
        module: Any,
        stored: dict[str, TensorInfo],
        rename: Callable[[str], list[str]],
        resident: dict[str, torch.dtype] | None = None,
        **options: Any,
    ) -> Iterator[Streamer]:
        with streamed(module, stored, rename, resident, **options) as streamer:
            try:
                yield streamer
            finally:
                assert streamer.store is not None
                self.weight_bytes_read += streamer.store.bytes_read

    @contextmanager
    def _phase(self, name: str, total: int) -> Iterator[None]:
        self.on_event(events.PhaseStarted(name=name, total=total))
        with self.budget.phase(name) as use:
            yield
            self.budget.check(name)
        self.on_event(events.PhaseDone(name=name, seconds=use.seconds, peak_rss_bytes=use.peak_rss_bytes))

    def _note(self, text: str) -> None:
        self.on_event(events.Note(text=text))

    def report(self) -> dict[str, Any]:
        """What --report writes."""
        return report(self.budget, self.plan.memory.peak_bytes) | {
            "unet_calls": self.unet_calls, "unet_samples": self.unet_samples, "tiles": len(self.plan.regions),
            "tile_batch": self.plan.batch, "precision": self.plan.precision.value, "decode": self.plan.methods["decode"].name, "weight_bytes_read": self.weight_bytes_read, "unet_bytes_read": self.unet_bytes_read, "seed": self.request.seed,
            "width": self.request.width, "height": self.request.height, "model": self.family.checkpoint.name,
            "revision": self.family.checkpoint.revision,
        }  # fmt: skip

    def texts(self) -> dict[str, str]:
        """The PNG's text chunks: AUTOMATIC1111's `parameters`, and the whole request as JSON under `tiler`."""
        r = self.request
        fields: dict[str, object] = {
            "Steps": r.num_inference_steps, "Sampler": self.scheduler_name.value.removesuffix(" Karras"),
            **({"Schedule type": "Karras"} if self.scheduler_name.value.endswith("Karras") else {}),
            "CFG scale": r.guidance_scale, "Seed": r.seed, "Size": f"{r.width}x{r.height}", "Model": self.family.checkpoint.name,
            **({"Denoising strength": r.strength} if self.plan.begin else {}), "Version": f"tiler {metadata.version('tiler')}",
        }  # fmt: skip
        request = {k: v for k, v in asdict(r).items() if k not in ("output", "save_latents", "cache_dir", "force")}
        found = {"precision": self.plan.precision.value, "peak_rss_bytes": self.budget.peak_rss_bytes}
        data = json.dumps(request | found, default=str, ensure_ascii=False)
        prompt = r.prompt if r.prompt is not None else " | ".join(region.prompt for region in r.regions)
        return {"parameters": infotext(prompt, r.negative_prompt, fields), "tiler": data}


def decode_file(
    latents_file: Path, model: str, output: Path, *, budget: Budget | None = None, variant: str | None = None,
    revision: str | None = None, decode: Decode = Decode.AUTO, scratch: Path | None = None,
    scratch_dtype: ScratchDtype = ScratchDtype.FP16, tiny_vae: str | None = None, wrap: Wrap = Wrap.NONE,
    dpi: float | None = None, force: bool = False, on_event: OnEvent = lambda event: None,
) -> Result:  # fmt: skip
    """Decode the scaled latents in a safetensors file, (1, C, h, w), with a checkpoint's autoencoder into a picture.
    `scratch` None is the folder of `output`. Raises TilerError."""
    with _inference(), budget or Budget() as budget:
        check_picture(output, force=force)
        check_decode(decode, tiny_vae)
        check_dpi(dpi)
        family = families.read_family(resolve(model, variant=variant, revision=revision))
        kind = family.autoencoder if tiny_vae is None else families.read_tiny(resolve_part(tiny_vae), family)
        with LatentsFile(latents_file, kind.unscale_) as latents:
            latents.check(family.latent_channels, family.checkpoint.name)
            height, width = latents.shape[2:]
            how, plan, resident = plan_decode(
                kind, (height, width), budget.max_bytes,
                decode=decode, scratch=scratch or output.parent, scratch_dtype=scratch_dtype, wrap=wrap,
            )  # fmt: skip
            plan.check()
            lean_imports.freeze_imports()
            vae = families.build_vae(kind)
            on_event(events.PhaseStarted(name="decode", total=100))
            on_event(events.Note(text=f"decoder: {how}"))
            with budget.phase("decode") as use, streamed(vae, kind.weights, families.vae_names, resident) as streamer:
                check = at_rows(budget, plan.peak_bytes)
                rows = decode_pixels(how, vae, streamer, latents, check, percent(on_event, "decode"))
                write_picture(output, rows, 8 * width, 8 * height, {}, dpi)
        on_event(events.PhaseDone(name="decode", seconds=use.seconds, peak_rss_bytes=use.peak_rss_bytes))
    told = {"decode": how.name, "width": 8 * width, "height": 8 * height}
    return Result(output=output, report=report(budget, plan.peak_bytes) | told)


def quantize_model(
    model: str, cache: Path | None, *, budget: Budget | None = None, variant: str | None = None,
    revision: str | None = None, on_event: OnEvent = lambda event: None,
) -> Result:  # fmt: skip
    """Write the int8 weights of a checkpoint into `cache` (None: the user's) unless they are there. Raises TilerError."""
    with _inference(), budget or Budget() as budget:
        family = families.read_family(resolve(model, variant=variant, revision=revision))
        index = prepare_int8(family, cache or default_cache(), budget, on_event)
    path = next(iter(index.values())).path
    counts = {
        kind: sum(math.prod(i.shape) for i in index.values() if (i.dtype == "I8") is kind) for kind in (True, False)
    }
    told = {"bytes": path.stat().st_size, "int8_share": counts[True] / sum(counts.values())}
    return Result(output=path, report=report(budget, 0) | told)


def decode_pixels(
    how: DecodePlan,
    vae: Any,
    streamer: Streamer,
    unscaled: Latents,
    check: Callable[[str], None],
    progress: Callable[[float], None],
) -> Iterator[np.ndarray]:
    """Decode (1, C, h, w) fp32 latents into rows (n, 8w, 3) uint8. Raises NumericalError rather than give a black picture."""
    row = 0
    for strip in method.decode(how, vae, streamer, unscaled, check=check, progress=progress):
        if not math.isfinite(float(strip.sum())):
            raise NumericalError(f"NaN or Inf in the decoder at row {row}; the VAE's weights may be damaged")
        yield to_uint8(strip)
        row += strip.shape[1]


@contextmanager
def streamed(
    module: Any,
    stored: dict[str, TensorInfo],
    rename: Callable[[str], list[str]],
    resident: dict[str, torch.dtype] | None = None,
    **options: Any,
) -> Iterator[Streamer]:
    """The weights of one part of a checkpoint behind a meta-device module, for as long as the block lasts. `resident` ones
    stay in memory; `options` are the Streamer's."""
    index = match_index(module, stored, rename)
    with WeightStore(index) as store:
        streamer = Streamer(store, **options)
        stream_layers(module, streamer)
        for name, dtype in (resident or {}).items():
            store.keep(name, dtype)
        yield streamer


def report(budget: Budget, predicted: int) -> dict[str, Any]:
    """The part of a report that every command has."""
    return {
        "schema": 1, "peak_rss_bytes": budget.peak_rss_bytes, "predicted_peak_bytes": predicted, "max_ram_bytes": budget.max_bytes,
        "phases": [asdict(phase) for phase in budget.phases], "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{n: metadata.version(n) for n in ("tiler", "torch", "diffusers", "transformers")}},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


@contextmanager
def _inference() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield
