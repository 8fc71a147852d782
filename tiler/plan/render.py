"""From a request, a checkpoint's configs and a ceiling: how the work is cut, and what each phase will need.

Nothing is read but JSON and the weight files' headers, and nothing is computed: the phases' own code runs on meta
tensors under a `MetaMeter`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from tiler.compute import cpu
from tiler.compute.layers import streamed_layers
from tiler.decode.method import DecodePlan, choose
from tiler.decode.scratch import STRIP_BYTES
from tiler.diffusion.canvas import first_step
from tiler.diffusion.guide import GuideSize, guide_size, picture_pixels
from tiler.diffusion.tiles import Text2ImageRegion, guide_tiles, plan_tiles, tiles_of_step
from tiler.errors import UsageError
from tiler.memory import process
from tiler.memory.budget import MARGIN, NEAR
from tiler.models import family as families
from tiler.models.family import Family, VaeSpec
from tiler.models.unet import int8_weights
from tiler.plan.peaks import DenoiserPeaks, VaePeaks, libraries, text_phase
from tiler.plan.table import MemoryPlan, PhasePlan, Term
from tiler.request import Decode, GuideUpscale, Layout, Precision, RenderRequest, ScratchDtype, Wrap
from tiler.weights.checkpoint import resolve_part
from tiler.weights.index import TensorInfo
from tiler.weights.store import TORCH_DTYPES

MAX_BATCH = 16
# Where a ceiling leaves no room to hold SD 1.5's larger resnets and feed-forwards: their layers one by one, the rest whole.
TIGHT_ARENA_BYTES = 12 * 2**20
INT8_CHANNELS = 192  # of a UNet's first level: with fewer, quantising takes about what 8-bit products save
RESIDENT_SLACK = 0.18  # measured: freed blocks between live ones, as a share of resident weights
RESIDENT_MARGIN = 0.95  # of the ceiling: weights that merely save reading leave more room than the batch does


Steps = tuple[tuple[Text2ImageRegion, ...], ...]
"""The tiles of each step."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut into tiles and steps. Sizes in latent pixels."""

    canvas: tuple[int, int]
    guide: GuideSize | None
    regions: tuple[Text2ImageRegion, ...]
    begin: int
    guide_steps: Steps
    canvas_steps: Steps

    @property
    def guide_samples(self) -> int:
        return sum(tile.samples for step in self.guide_steps for tile in step)

    @property
    def canvas_samples(self) -> int:
        return sum(tile.samples for step in self.canvas_steps for tile in step)

    @property
    def unet_samples(self) -> int:
        return self.guide_samples + self.canvas_samples


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
    arena_bytes: int  # for the UNet's weights in use
    sample_bytes: int  # what one sample alone takes in the UNet, the weights in use included
    precision: Precision  # fp32 or int8
    precision_why: str

    @property
    def unet_calls(self) -> int:
        """Passes over the UNet's weights."""
        both = (self.guide_steps, self.guide_batch), (self.canvas_steps, self.batch)
        return sum(math.ceil(sum(tile.samples for tile in step) / batch) for steps, batch in both for step in steps)

    @property
    def upscale_flops(self) -> int:
        """What bringing the guide to the canvas's size costs in the autoencoder."""
        return sum(m.flops + m.attention_flops for name, m in self.methods.items() if name != "decode")


def plan_tiling(request: RenderRequest, family: Family) -> Tiling:
    """The tiles of every step. Raises UsageError for sizes, overlaps and regions that do not go with the model."""
    canvas = request.canvas_size[0] // 8, request.canvas_size[1] // 8
    side = family.native
    if min(canvas) < side:
        raise UsageError(
            f"{request.width}×{request.height} is smaller than a tile of this model; both sides must be at least {8 * side} pixels"
        )
    overlap = side // 4 if request.overlap is None else request.overlap // 8
    regions = plan_tiles(request, canvas=canvas, tile=(side, side), overlap=overlap)
    # Nothing comes after the last step to hide its borders: there the tiles overlap in every layout.
    grid, last = replace(request, layout=Layout.GRID), regions
    if request.layout is not Layout.GRID:
        last = plan_tiles(grid, canvas=canvas, tile=(side, side), overlap=overlap)
    wanted = request.guide and request.guide_image is None and request.prompt is not None
    guide = guide_size(canvas, side, family.granularity, request.wrap.axes) if wanted else None
    guide_regions = guide_tiles(guide[:2], request.wrap, request.guidance_scale) if guide is not None else []
    guided = guide is not None or request.guide_image is not None
    begin = first_step(request.num_inference_steps, request.strength) if guided else 0
    steps = request.num_inference_steps
    guide_steps = tuple(tiles_of_step(guide_regions, request, n) for n in range(steps) if guide_regions)
    canvas_steps = tuple(tiles_of_step(regions, request, n) for n in range(begin, steps - 1))
    canvas_steps += tuple(tiles_of_step(last, grid, n) for n in range(max(begin, steps - 1), steps))
    return Tiling(
        canvas=canvas,
        guide=guide,
        regions=tuple(regions),
        begin=begin,
        guide_steps=guide_steps,
        canvas_steps=canvas_steps,
    )


def plan_render(request: RenderRequest, family: Family, max_bytes: int) -> RenderPlan:
    """Cut the work so that it fits. The memory plan may still be over the ceiling: `plan.memory.check()` refuses.

    Raises UsageError for sizes, overlaps and regions that do not go with the model.
    """
    cut, side = plan_tiling(request, family), family.native
    canvas, guide, guide_steps, canvas_steps = cut.canvas, cut.guide, cut.guide_steps, cut.canvas_steps
    guided = guide is not None or request.guide_image is not None
    # Of the step with most: the tile of each sample.
    canvas_samples, guide_samples = (
        max(([i for i, r in enumerate(step) for _ in range(r.samples)] for step in steps), key=len, default=[0])
        for steps in (canvas_steps, guide_steps)
    )
    per_step = len(canvas_samples)

    stored = family.checkpoint.weights("unet")
    precision, precision_why = choose_precision(request.precision, family)
    quantised = int8_weights(families.build_unet(family)) if precision is Precision.INT8 else frozenset[str]()
    stored |= {
        name: stored[name]._replace(dtype="I8", nbytes=math.prod(stored[name].shape))
        for name in quantised & stored.keys()
    }
    sampler, tight = (
        DenoiserPeaks(family, stored, quantised),
        DenoiserPeaks(family, stored, quantised, TIGHT_ARENA_BYTES),
    )
    vae = decoder = VaePeaks(family.autoencoder)
    if request.tiny_vae is not None:
        decoder = VaePeaks(families.read_tiny(resolve_part(request.tiny_vae), family))
    fixed = [libraries()]
    folder = request.scratch or request.output.parent

    def method(coder: VaePeaks, wanted: Decode, latents: tuple[int, int], encoding: bool = False) -> DecodePlan:
        options = coder.module, coder.streamer, latents
        return choose(
            wanted, *options, encoding=encoding, folder=folder, dtype=request.scratch_dtype, wrap=request.wrap
        )

    methods = {"decode": method(decoder, request.decode, canvas)}
    decoding = [decoder.phase("decode", canvas, methods["decode"])]
    own = Decode.AUTO if request.decode is Decode.TINY else request.decode  # the guide's way
    if guided and request.guide_upscale is GuideUpscale.PIXEL:
        methods["guide picture"] = method(vae, own, canvas, encoding=True)
        if request.guide_image is not None:
            pixels = picture_pixels(request.guide_image)
        elif guide is not None:
            pixels = 64 * guide.height * guide.width
        picture = [vae.phase("guide picture", canvas, methods["guide picture"], pixels)]
        if guide is not None:  # the same phase decodes the guide first
            methods["guide decoded"] = method(vae, own, (guide.height, guide.width))
            picture.append(vae.phase("guide picture", (guide.height, guide.width), methods["guide decoded"]))
        decoding.append(max(picture, key=lambda p: p.peak_bytes))
    masks = len({id(tile.weights) for step in (cut.regions, *canvas_steps) for tile in step})
    canvas_bytes = 4 * family.latent_channels * canvas[0] * canvas[1] * 6 + 4 * side * side * masks

    denoising = [*fixed, Term(name="canvas", nbytes=canvas_bytes)]

    def sampling(by: DenoiserPeaks, name: str, batch: int = 1) -> PhasePlan:
        if name == "canvas" or guide is None:
            return by.phase(name, denoising, canvas_samples, batch, side, side)
        return by.phase(name, denoising, guide_samples, batch, guide.height, guide.width)

    names = ["canvas"] if guide is None else ["canvas", "guide"]
    smallest = [sampling(tight, name).peak_bytes for name in names]
    if max(sampling(sampler, name).peak_bytes for name in names) > max_bytes * MARGIN:
        sampler = tight
    batch = _largest_batch(
        lambda b: sampling(sampler, "canvas", b).peak_bytes, int(max_bytes * MARGIN), min(MAX_BATCH, per_step)
    )
    batch = math.ceil(per_step / math.ceil(per_step / batch))  # passes of equal size
    phases = [text_phase(family, fixed), sampling(sampler, "canvas", batch), *decoding]
    guide_batch = 1
    if guide is not None:
        guide_batch = _largest_batch(
            lambda b: sampling(sampler, "guide", b).peak_bytes,
            int(max_bytes * MARGIN),
            len(guide_samples),
        )
        phases.append(sampling(sampler, "guide", guide_batch))
    least = [p.peak_bytes for p in phases if p.name not in ("guide", "canvas")]
    resident: dict[str, dict[str, torch.dtype]] = {}
    for i, phase in enumerate(phases):
        part, files = (sampler.unet, stored) if phase.name in ("guide", "canvas") else (vae.module, vae.kind.weights)
        if phase.name == "decode":
            part, files = decoder.module.decoder, decoder.kind.weights
        how = methods.get(phase.name)
        if phase.name == "encode prompts":
            resident[phase.name] = {}
        else:
            phases[i], resident[phase.name] = _with_resident(phase, part, files, how, max_bytes)
    order = ["encode prompts", "guide", "guide picture", "canvas", "decode"]
    phases.sort(key=lambda p: order.index(p.name))
    return RenderPlan(
        **vars(cut), family=family, batch=batch, resident=resident, decoder=decoder.kind, methods=methods, guide_batch=guide_batch, precision=precision, precision_why=precision_why,
        sample_bytes=sampler.activations((0,), side, side), arena_bytes=sampler.streamer.arena_bytes,
        memory=MemoryPlan(max_bytes=max_bytes, phases=tuple(phases), smallest_bytes=int(max(least + smallest) / MARGIN) + 1),
    )  # fmt: skip


def choose_precision(wanted: Precision, family: Family) -> tuple[Precision, str]:
    """Int8 or fp32, and why: AUTO is int8 where processor and model gain by it, whatever the ceiling."""
    if wanted is not Precision.AUTO:
        return wanted, "as asked"
    if (width := family.unet["block_out_channels"][0]) < INT8_CHANNELS:
        return Precision.FP32, f"int8 is no faster with {width} channels at the first level"
    return Precision.INT8 if cpu.int8().dot else Precision.FP32, cpu.int8().auto


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
    phase, resident = _with_resident(phase, vae.module.decoder, kind.weights, method, max_bytes)
    return method, MemoryPlan(max_bytes=max_bytes, phases=(phase,), smallest_bytes=smallest), resident


def _with(phase: PhasePlan, name: str, nbytes: int) -> PhasePlan:
    return PhasePlan(name=phase.name, terms=(*phase.terms, Term(name=name, nbytes=nbytes))) if nbytes > 0 else phase


def _with_resident(
    phase: PhasePlan, part: nn.Module, files: dict[str, TensorInfo], method: DecodePlan | None, max_bytes: int
) -> tuple[PhasePlan, dict[str, torch.dtype]]:
    """`phase` with the weights of `part` that stay in what the ceiling leaves; `method` of an autoencoder's phase."""
    # An autoencoder's strips come and go between the plan's figures: with less room 784 and 791 MB of 800 were measured.
    fill = RESIDENT_MARGIN if method is None else NEAR
    room = int((max_bytes * fill - phase.peak_bytes) / (1 + RESIDENT_SLACK))
    # Layer by layer every weight is read once: nothing is gained by keeping any.
    chosen = {} if method is not None and method.by_layers else _choose_resident(part, files, room)
    nbytes = sum(math.prod(files[n].shape) * dtype.itemsize for n, dtype in chosen.items())
    phase = _with(phase, "resident weights", int((1 + RESIDENT_SLACK) * nbytes))
    return phase if method is None else _with_heap(phase, method, max_bytes), chosen


def _with_heap(phase: PhasePlan, method: DecodePlan, max_bytes: int) -> PhasePlan:
    """What the heap keeps of the memory that an autoencoder's strips free, as far as the ceiling leaves room. The blocks of
    one strip fit where those of the last one were."""
    freed = min(process.HEAP_KEPT, method.memory_bytes - STRIP_BYTES)
    return _with(phase, "free heap", min(freed, int(max_bytes * NEAR) - phase.peak_bytes))


def _largest_batch(peak: Callable[[int], int], room: int, most: int) -> int:
    """The largest batch whose predicted peak fits, at least 1. Peaks grow almost linearly: guess, then step down."""
    if most == 1 or peak(most) <= room:
        return most
    slope = (peak(most) - peak(1)) / (most - 1)
    batch = max(1, min(most - 1, 1 + int((room - peak(1)) / slope) + 1))
    while batch > 1 and peak(batch) > room:
        batch -= 1
    return batch


def _choose_resident(part: nn.Module, stored: dict[str, TensorInfo], room: int) -> dict[str, torch.dtype]:
    """What the ceiling leaves over holds weights: all as they are computed with if they fit, else a fixed subset as stored.

    Access is cyclic, so which ones does not matter for the bytes read; the first in the order of use are taken.
    """
    layers = [layer for layer in streamed_layers(part) if layer.key in stored]
    int8 = {layer.key for layer in layers if stored[layer.key].dtype == "I8" and cpu.int8().products}
    computed = {layer.key: torch.int8 if layer.key in int8 else torch.float32 for layer in layers}
    if sum(layer.weight.numel() * computed[layer.key].itemsize for layer in layers) <= room:
        return computed
    chosen: dict[str, torch.dtype] = {}
    for layer in layers:
        info = stored[layer.key]
        if info.nbytes <= room:
            chosen[layer.key] = TORCH_DTYPES[info.dtype]
            room -= info.nbytes
    return chosen
