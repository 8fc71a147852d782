"""The open denoiser of a run, which predicts the tiles of guide and canvas in this process or in a worker of a
cluster."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tiler import packing
from tiler.compute.stream import Streamer
from tiler.diffusion.prompts import Prompts
from tiler.diffusion.runner import Conditions, LocalRunner
from tiler.events import Phase
from tiler.memory.policy import at_layer
from tiler.models.built import Models
from tiler.models.family import Options, Part, Role, VaeSpec
from tiler.models.samples import Sample
from tiler.planning.peaks import bf16_keys
from tiler.planning.render import RenderPlan, build_schedule
from tiler.request import Precision, ResolvedRequest
from tiler.run import Names, Run, streamed
from tiler.weights.changes import Changes
from tiler.weights.identity import model_id
from tiler.weights.index import TensorInfo
from tiler.weights.packed import default_cache


@dataclass(kw_only=True)
class DenoiserRun(Run):
    """A run that uses a denoiser: the request, the plan, and the counts so far."""

    request: ResolvedRequest
    plan: RenderPlan
    weights: dict[str, tuple[dict[str, TensorInfo], Names]]  # by part: its parameters' places in files and names there
    prepared: Any = None  # what `Family.prepare` returned, for guide and canvas
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("denoiser_calls", "denoiser_samples", "denoiser_bytes_read", "weight_bytes_read"), 0
        )
    )

    def changes(self, part: Part) -> Changes:
        """What LoRAs change in a part's weights when they are read."""
        if self.plan.precision is Precision.INT8 and part.role is Role.DENOISER:
            return packing.beside_packed(self.models, part)
        return self.models.changes(part)

    @contextmanager
    def streamed(
        self, module: Any, stored: dict[str, TensorInfo], names: Names,
        resident: dict[str, torch.dtype] | None = None, **options: Any,
    ) -> Iterator[Streamer]:  # fmt: skip
        """`run.streamed`, with the bytes read added to the counts."""
        with streamed(module, stored, names, resident, **options) as streamer:
            try:
                yield streamer
            finally:
                assert streamer.store is not None
                self.counts["weight_bytes_read"] += streamer.store.bytes_read


def prepare_weights(run: DenoiserRun) -> None:
    """Quantise the weights if the plan uses int8 and no earlier run has done so."""
    if run.plan.precision is Precision.INT8:
        cache = run.request.cache_dir or default_cache()
        index = packing.prepare_int8(run.models, cache, run.budget, run.on_event)
        parts = packing.packed_parts(run.plan.family)
        run.weights = {part.name: (index, packing.packed_names(part)) for part in parts}


def denoiser_id(models: Models) -> str:
    """A string that identifies the denoiser's weights and config, the scheduler's config, and the LoRAs. All processes
    that predict tiles of one canvas must agree on it."""
    family, loras = models.family, [(lora.strength, digests) for lora, digests in models.loras.files]
    own = model_id(family.checkpoint, [family.part(Role.DENOISER).name])
    return own if not loras else f"{own}-{hashlib.sha256(repr(loras).encode()).hexdigest()[:16]}"


def vae_id(spec: VaeSpec) -> str:
    """Tells the weights and the config of an autoencoder."""
    return model_id(spec.checkpoint, [spec.part])


@contextmanager
def open_denoiser(run: DenoiserRun, prompts: Prompts, phase: Phase = Phase.CANVAS) -> Iterator[LocalRunner]:
    """Open a runner that predicts the tiles of `phase` in this process until the block ends. Raises TilerError."""
    with open_weights(run, phase) as streamer:
        yield runner_on(streamer, run, prompts, phase)
        assert streamer.store is not None
        run.counts["denoiser_bytes_read"] += streamer.store.bytes_read


@contextmanager
def open_weights(run: DenoiserRun, phase: Phase = Phase.CANVAS) -> Iterator[Streamer]:
    """Open the denoiser's weights until the block ends. Raises TilerError."""
    plan, part = run.plan, run.plan.family.part(Role.DENOISER)
    denoiser, short = run.models.module(part), partial(run.budget.short, plan.sample_bytes)
    held = dict[str, Any](
        changes=run.changes(part), bf16_keys=bf16_keys(part, denoiser, plan.precision), arena_bytes=plan.arena_bytes,
        transform=True, short=short,
    )  # fmt: skip
    with run.streamed(denoiser, *run.weights[part.name], plan.resident[phase], **held) as streamer:
        yield streamer


def runner_on(streamer: Streamer, run: DenoiserRun, prompts: Prompts, phase: Phase = Phase.CANVAS) -> LocalRunner:
    """A runner on weights that are already open; runs with the same plan may share them. Raises TilerError."""
    request, plan, family = run.request, run.plan, run.plan.family
    denoiser = run.models.module(family.part(Role.DENOISER))
    check = at_layer(run.budget, plan.memory.peak_bytes, plan.memory.heap_of(phase))
    scales = {request.guidance_scale, *(r.guidance_scale for r in request.regions if r.guidance_scale is not None)}
    options = Options(
        attention_window=request.attention_window, seed=request.seed, tile_conditioning=request.tile_conditioning,
        guidance=tuple(sorted(scales)), scratch=request.scratch_folder,
    )  # fmt: skip
    if run.prepared is None:
        wordings = [w for w in (plan.guide_wording, plan.canvas_wording) if w is not None]
        timesteps = build_schedule(request, family).timesteps
        run.prepared = family.prepare(denoiser, streamer, timesteps, prompts.all_of(wordings), options)

    def predict(samples: Sequence[Sample], step: int) -> Tensor:
        run.counts["denoiser_calls"] += 1
        run.counts["denoiser_samples"] += len(samples)
        return family.predict(denoiser, streamer, samples, step, run.prepared, check)

    wording, begin, batch = plan.canvas_wording, plan.begin, plan.batch
    if phase == Phase.GUIDE:
        assert plan.guide_wording is not None
        wording, begin, batch = plan.guide_wording, 0, plan.guide_batch

    def conditions(step: int) -> Conditions:
        return prompts.conditions(wording, plan.calls.step_of(step) - begin)

    def tell_smaller(batch: int) -> None:
        run.note(f"memory is close to the ceiling: from here on the denoiser takes at most {batch} samples at a time")

    return LocalRunner(
        predict, conditions, batch, is_tight=run.budget.take_tight, on_smaller=tell_smaller,
        guided_channels=family.traits.guided_channels,
    )  # fmt: skip
