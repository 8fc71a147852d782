"""From a request, a checkpoint's configs and a ceiling: how the work is cut, and what each phase will need.

Nothing is read but JSON and the weight files' headers, and nothing is computed: the phases' own code runs on meta
tensors under a `MetaMeter`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from tiler.compute import onednn
from tiler.decoding.method import DecodePlan, choose
from tiler.diffusion import flow, schedulers
from tiler.diffusion.guide_picture import GuidePicture
from tiler.diffusion.masks import MASKS_KEPT
from tiler.diffusion.schedulers import DiffusersSchedule
from tiler.errors import UsageError
from tiler.memory.budget import MARGIN
from tiler.models import family as families
from tiler.models.family import Family, Role, VaeSpec
from tiler.planning.fit import largest_batch, with_resident
from tiler.planning.peaks import DenoiserPeaks, VaePeaks, libraries, text_phase
from tiler.planning.table import MemoryPlan, PhasePlan, Term
from tiler.planning.tiling import Tiling, pixels_of, plan_tiling
from tiler.request import Decode, GuideUpscale, Precision, ResolvedRequest, Scheduler, ScratchDtype, Wrap
from tiler.weights.checkpoint import resolve_part

MAX_BATCH = 16
# Where a ceiling leaves no room to hold SD 1.5's larger resnets and feed-forwards: their layers one by one, the rest whole.
TIGHT_ARENA_BYTES = 12 * 2**20
INT8_CHANNELS = 192  # of a denoiser's highest resolution: with fewer, quantising takes about what 8-bit products save


@dataclass(frozen=True, kw_only=True)
class RenderPlan(Tiling):
    """How a request is carried out. Sizes in latent pixels."""

    family: Family
    batch: int
    resident: dict[str, dict[str, torch.dtype]]  # by phase: weights that stay in memory, by parameter name
    decoder: VaeSpec  # what makes the picture: the checkpoint's own, or a tiny one
    methods: dict[str, DecodePlan]  # how the autoencoder works for "guide decoded", "guide picture" and "decode"
    memory: MemoryPlan
    guide_batch: int
    arena_bytes: int  # for the denoiser's weights in use
    sample_bytes: int  # what one sample alone takes in the denoiser, the weights in use included
    precision: Precision  # fp32 or int8
    precision_why: str
    scheduler: Scheduler  # never AUTO
    notes: tuple[str, ...]  # on the scheduler, for the user

    @property
    def denoiser_calls(self) -> int:
        """Passes over the denoiser's weights."""
        both = (self.guide_steps, self.guide_batch), (self.canvas_steps, self.batch)
        return sum(math.ceil(step.samples / batch) for steps, batch in both for step in steps)

    @property
    def upscale_flops(self) -> int:
        """What bringing the guide to the canvas's size costs in the autoencoder."""
        return sum(m.flops + m.attention_flops for name, m in self.methods.items() if name != "decode")


def plan_render(request: ResolvedRequest, family: Family, max_bytes: int) -> RenderPlan:
    """Cut the work so that it fits. The memory plan may still be over the ceiling: `plan.memory.check()` refuses.

    Raises UsageError for sizes, overlaps, regions and numbers of steps that do not go with the model, and ModelError for a
    scheduler config that no work should begin with.
    """
    if request.attention_window is not None and family.traits.patch > 1:
        raise UsageError(f"--attention-window is for UNets, and {family.traits.title} is a transformer; leave it out")
    schedule = build_schedule(request, family)
    cut = plan_tiling(request, family)
    tile = cut.regions.tile
    canvas, guide, guide_steps, canvas_steps = cut.canvas, cut.guide, cut.guide_steps, cut.canvas_steps
    guided = guide is not None or request.guide_image is not None
    # Of the step with most: the tile of each sample.
    fullest = (max(steps, key=lambda step: step.samples, default=None) for steps in (canvas_steps, guide_steps))
    canvas_samples, guide_samples = ([0] if step is None else step.sample_numbers() for step in fullest)
    per_step = len(canvas_samples)

    precision, precision_why = choose_precision(request.precision, family)
    int8 = precision is Precision.INT8
    sampler = DenoiserPeaks(family, int8=int8)
    tight = DenoiserPeaks(family, int8=int8, arena_bytes=TIGHT_ARENA_BYTES)
    vae = decoder = VaePeaks(family.autoencoder)
    if request.tiny_vae is not None:
        decoder = VaePeaks(families.read_tiny(resolve_part(request.tiny_vae), family))
    fixed = [libraries()]
    folder = request.scratch_folder

    def method(coder: VaePeaks, wanted: Decode, latents: tuple[int, int], encoding: bool = False) -> DecodePlan:
        options = coder.module, coder.streamer, latents
        return choose(
            wanted, *options, encoding=encoding, folder=folder, dtype=request.scratch_dtype, wrap=request.wrap
        )

    methods = {"decode": method(decoder, request.decode, canvas)}
    decoding = [decoder.phase("decode", canvas, methods["decode"])]
    pixels = loading = 0
    own = Decode.AUTO if request.decode is Decode.TINY else request.decode  # the guide's way
    if guided and request.guide_upscale is GuideUpscale.PIXEL:
        methods["guide picture"] = method(vae, own, canvas, encoding=True)
        if request.guide_image is not None:
            with GuidePicture(request.guide_image, pixels_of(canvas)) as source:
                pixels, loading = math.prod(source.shape[:2]), source.peak_bytes
        elif guide is not None:
            pixels = math.prod(pixels_of(guide[:2]))
        picture = [vae.phase("guide picture", canvas, methods["guide picture"], pixels)]
        if guide is not None:  # the same phase decodes the guide first
            methods["guide decoded"] = method(vae, own, (guide.height, guide.width))
            picture.append(vae.phase("guide picture", (guide.height, guide.width), methods["guide decoded"]))
        decoding.append(max(picture, key=lambda p: p.peak_bytes))
    masks = min(MASKS_KEPT, max(map(len, (cut.regions, *canvas_steps[-1:]))))
    canvas_bytes = 4 * family.latent_channels * canvas[0] * canvas[1] * 6 + 4 * math.prod(tile) * masks

    denoising = [*fixed, Term(name="canvas", nbytes=canvas_bytes)]

    def sampling(by: DenoiserPeaks, name: str, batch: int = 1) -> PhasePlan:
        if name == "canvas" or guide is None:
            return by.phase(name, denoising, canvas_samples, batch, *tile)
        return by.phase(name, denoising, guide_samples, batch, guide.height, guide.width)

    most = family.traits.samples or MAX_BATCH
    names = ["canvas"] if guide is None else ["canvas", "guide"]
    smallest = [sampling(tight, name).peak_bytes for name in names]
    if max(sampling(sampler, name).peak_bytes for name in names) > max_bytes * MARGIN:
        sampler = tight
    batch = largest_batch(
        lambda b: sampling(sampler, "canvas", b).peak_bytes, int(max_bytes * MARGIN), min(most, per_step)
    )
    batch = math.ceil(per_step / math.ceil(per_step / batch))  # passes of equal size
    phases = [text_phase(family, fixed), sampling(sampler, "canvas", batch), *decoding]
    if loading:  # the user's picture is loaded first, and waits while prompts are encoded
        phases[0] = PhasePlan(name=phases[0].name, terms=(*phases[0].terms, Term(name="picture", nbytes=3 * pixels)))
        phases.append(PhasePlan(name="load guide", terms=(*fixed, Term(name="picture", nbytes=loading))))
    guide_batch = 1
    if guide is not None:
        guide_batch = largest_batch(
            lambda b: sampling(sampler, "guide", b).peak_bytes,
            int(max_bytes * MARGIN),
            min(most, len(guide_samples)),
        )
        phases.append(sampling(sampler, "guide", guide_batch))
    least = [p.peak_bytes for p in phases if p.name not in ("guide", "canvas")]
    resident: dict[str, dict[str, torch.dtype]] = {}
    for i, phase in enumerate(phases):
        part, files = vae.module, vae.kind.weights
        if phase.name in ("guide", "canvas"):
            once = family.part(Role.DENOISER).once
            part, files = sampler.module, {name: info for name, info in sampler.stored.items() if not once(name)}
        if phase.name == "decode":
            part, files = decoder.module.decoder, decoder.kind.weights
        how = methods.get(phase.name)
        if phase.name in ("load guide", "encode prompts"):
            resident[phase.name] = {}
        else:
            phases[i], resident[phase.name] = with_resident(phase, part, files, how, max_bytes)
    order = ["load guide", "encode prompts", "guide", "guide picture", "canvas", "decode"]
    phases.sort(key=lambda p: order.index(p.name))
    return RenderPlan(
        **vars(cut),
        family=family,
        batch=batch,
        resident=resident,
        decoder=decoder.kind,
        methods=methods,
        guide_batch=guide_batch,
        precision=precision,
        precision_why=precision_why,
        scheduler=schedule.name,
        notes=schedule.notes,
        sample_bytes=sampler.activations((0,), *tile),
        arena_bytes=sampler.streamer.arena_bytes,
        memory=MemoryPlan(
            max_bytes=max_bytes, phases=tuple(phases), smallest_bytes=int(max(least + smallest) / MARGIN) + 1
        ),
    )


def build_schedule(request: ResolvedRequest, family: Family) -> DiffusersSchedule:
    """The schedule of a render, checked to the end. Raises UsageError, ModelError."""
    asked, config, steps, traits = request.scheduler, family.scheduler, request.num_inference_steps, family.traits
    if not traits.flow:
        return schedulers.build(asked, config, steps, correct=traits.old_schedulers)
    return flow.build(asked, config, steps, tokens=traits.tokens, even_sigmas=traits.even_sigmas)


def choose_precision(wanted: Precision, family: Family) -> tuple[Precision, str]:
    """Int8 or fp32, and why: AUTO is int8 where processor and model gain by it, whatever the ceiling."""
    if wanted is not Precision.AUTO:
        return wanted, "as asked"
    if (width := family.traits.width) < INT8_CHANNELS:
        return Precision.FP32, f"int8 is no faster with {width} channels at the first level"
    return Precision.INT8 if onednn.int8().dot else Precision.FP32, onednn.int8().auto


def plan_decode(
    kind: VaeSpec,
    latents: tuple[int, int],
    max_bytes: int,
    *,
    decode: Decode,
    scratch: Path,
    scratch_dtype: ScratchDtype,
    wrap: Wrap,
) -> tuple[DecodePlan, MemoryPlan, dict[str, torch.dtype]]:
    """How latents of (height, width) are decoded, the memory plan, and the weights that stay. Raises StorageError."""
    vae = VaePeaks(kind)
    method = choose(
        decode, vae.module, vae.streamer, latents, encoding=False, folder=scratch, dtype=scratch_dtype, wrap=wrap
    )
    phase = vae.phase("decode", latents, method, held=0)
    smallest = int(phase.peak_bytes / MARGIN) + 1
    phase, resident = with_resident(phase, vae.module.decoder, kind.weights, method, max_bytes)
    return method, MemoryPlan(max_bytes=max_bytes, phases=(phase,), smallest_bytes=smallest), resident
