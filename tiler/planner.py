"""From a request, a checkpoint's configs and a ceiling: how the work is cut, and what each phase will need.

Nothing is read but JSON and the weight files' headers, and nothing is computed: the phases' own code runs on meta
tensors under a `MetaMeter`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

from tiler.decode.method import Method, choose
from tiler.decode.scratch import STRIP_BYTES
from tiler.diffusion.canvas import first_step
from tiler.diffusion.guide import GuideSize, guide_size, picture_pixels
from tiler.diffusion.tiles import Text2ImageRegion, guide_tiles, plan_tiles, tiles_of_step
from tiler.errors import UsageError
from tiler.memory import cpu, process
from tiler.memory.budget import MARGIN, NEAR
from tiler.memory.meter import MetaMeter
from tiler.memory.plan import MemoryPlan, PhasePlan, Term
from tiler.models import family as families
from tiler.models.family import Autoencoder, Family
from tiler.models.unet import int8_weights, predict_noise
from tiler.request import Decode, GuideUpscale, Layout, Precision, RenderRequest, ScratchDtype, Wrap
from tiler.weights.checkpoint import resolve_part
from tiler.weights.index import TensorInfo
from tiler.weights.layers import StreamedLayer, stream_layers, streamed_layers
from tiler.weights.store import PIECE_ELEMENTS, READ_AHEAD, TORCH_DTYPES
from tiler.weights.stream import Streamer

MAX_BATCH = 16
WORK = "activations, weights in use"
# Measured: freed blocks between live ones, as a share of one sample's activations (40–57 MB of 139 for SD 1.5, 65–89 of 230
# for SD 2.1, whatever the batch), and of resident weights.
HEAP_SLACK, RESIDENT_SLACK = 0.37, 0.18
# Measured: what int8 weights, packed and freed unit by unit, leave of holes (SD 1.5, 1024² under 600 MB: 595 MB, 570 planned
# without it).
INT8_HOLES_BYTES = 27_000_000
RESIDENT_MARGIN = 0.95  # of the ceiling: weights that merely save reading leave more room than the batch does
LIBRARIES_BYTES = 86_000_000  # measured: code of torch, oneDNN and MKL, and the kernels these compile at first use


Steps = tuple[tuple[Text2ImageRegion, ...], ...]
"""The tiles of each step."""


@dataclass(frozen=True, kw_only=True)
class Cut:
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
class RenderPlan(Cut):
    """How a request is carried out. Sizes in latent pixels."""

    family: Family
    batch: int
    resident: dict[str, dict[str, torch.dtype]]  # by phase: weights that stay in memory, by parameter name
    decoder: Autoencoder  # what makes the picture: the checkpoint's own, or a tiny one
    methods: dict[str, Method]  # how the autoencoder works for "guide decoded", "guide picture" and "decode"
    memory: MemoryPlan
    guide_batch: int
    sample_bytes: int  # what one sample alone takes in the UNet, the weights in use included
    precision: Precision  # fp32 or int8

    @property
    def unet_calls(self) -> int:
        """Passes over the UNet's weights."""
        both = (self.guide_steps, self.guide_batch), (self.canvas_steps, self.batch)
        return sum(math.ceil(sum(tile.samples for tile in step) / batch) for steps, batch in both for step in steps)

    @property
    def upscale_flops(self) -> int:
        """What bringing the guide to the canvas's size costs in the autoencoder's convolutions."""
        return sum(method.flops for name, method in self.methods.items() if name != "decode")


def cut_work(request: RenderRequest, family: Family) -> Cut:
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
    return Cut(
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
    cut, side = cut_work(request, family), family.native
    canvas, guide, guide_steps, canvas_steps = cut.canvas, cut.guide, cut.guide_steps, cut.canvas_steps
    guided = guide is not None or request.guide_image is not None
    # Of the step with most: the tile of each sample.
    canvas_samples, guide_samples = (
        max(([i for i, r in enumerate(step) for _ in range(r.samples)] for step in steps), key=len, default=[0])
        for steps in (canvas_steps, guide_steps)
    )
    per_step = len(canvas_samples)

    unet = families.build_unet(family)
    stored = family.checkpoint.weights("unet")
    precision = choose_precision(request.precision)
    quantised = int8_weights(unet) if precision is Precision.INT8 else frozenset[str]()
    stored |= {
        name: stored[name]._replace(dtype="I8", nbytes=math.prod(stored[name].shape))
        for name in quantised & stored.keys()
    }
    streamer = Streamer(None, int8_keys=quantised)
    stream_layers(unet, streamer)
    unet_terms = _weights_terms(unet, stored)
    holes = min(INT8_HOLES_BYTES, sum(math.prod(stored[name].shape) for name in streamer.int8_keys & stored.keys()))
    width = family.text["hidden_size"]

    @cache
    def activations(tiles: tuple[int, ...], height: int, breadth: int) -> int:
        meta = torch.device("meta")
        with MetaMeter() as meter, torch.no_grad():
            latents = {tile: torch.empty(1, family.latent_channels, height, breadth, device=meta) for tile in tiles}
            texts = [torch.empty(1, 77, width, device=meta) for _ in tiles]
            predict_noise(unet, streamer, [latents[tile] for tile in tiles], torch.empty((), device=meta), texts)
        return meter.peak_bytes

    vae = decoder = _Coder(family.autoencoder)
    if request.tiny_vae is not None:
        decoder = _Coder(families.read_tiny(resolve_part(request.tiny_vae), family))
    fixed = [_libraries()]
    folder = request.scratch or request.output.parent

    def method(coder: _Coder, wanted: Decode, latents: tuple[int, int], encoding: bool = False) -> Method:
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

    def sampling(name: str, batch: int, height: int, breadth: int) -> PhasePlan:
        samples = canvas_samples if name == "canvas" else guide_samples
        groups = [tuple(samples[i : i + batch]) for i in range(0, len(samples), batch)]
        group = max(groups, key=lambda g: (len(set(g)), len(g)))  # halves of one tile share their first layers
        group = tuple(sorted(set(group)).index(tile) for tile in group)
        work = activations(group, height, breadth) + int(HEAP_SLACK * activations((0,), height, breadth))
        terms = [
            *fixed,
            *unet_terms,
            Term(name=WORK, nbytes=work + holes),
            Term(name="canvas", nbytes=canvas_bytes),
        ]
        return PhasePlan(name=name, terms=tuple(terms))

    batch = _largest_batch(
        lambda b: sampling("canvas", b, side, side).peak_bytes, int(max_bytes * MARGIN), min(MAX_BATCH, per_step)
    )
    batch = math.ceil(per_step / math.ceil(per_step / batch))  # passes of equal size
    phases = [_text_phase(family, fixed), sampling("canvas", batch, side, side), *decoding]
    guide_batch = 1
    if guide is not None:
        guide_batch = _largest_batch(
            lambda b: sampling("guide", b, guide.height, guide.width).peak_bytes,
            int(max_bytes * MARGIN),
            len(guide_samples),
        )
        phases.append(sampling("guide", guide_batch, guide.height, guide.width))
    least = [p.peak_bytes for p in phases if p.name not in ("guide", "canvas")]
    resident: dict[str, dict[str, torch.dtype]] = {}
    for i, phase in enumerate(phases):
        part, files = (unet, stored) if phase.name in ("guide", "canvas") else (vae.module, vae.kind.weights)
        if phase.name == "decode":
            part, files = decoder.module.decoder, decoder.kind.weights
        how = methods.get(phase.name)
        if phase.name == "encode prompts":
            resident[phase.name] = {}
        else:
            phases[i], resident[phase.name] = _with_resident(phase, part, files, how, max_bytes)
    order = ["encode prompts", "guide", "guide picture", "canvas", "decode"]
    phases.sort(key=lambda p: order.index(p.name))
    least.append(sampling("canvas", 1, side, side).peak_bytes)
    if guide is not None:
        least.append(sampling("guide", 1, guide.height, guide.width).peak_bytes)
    return RenderPlan(
        **vars(cut), family=family, batch=batch, resident=resident, decoder=decoder.kind, methods=methods, guide_batch=guide_batch, precision=precision,
        sample_bytes=activations((0,), side, side),
        memory=MemoryPlan(max_bytes=max_bytes, phases=tuple(phases), smallest_bytes=int(max(least) / MARGIN) + 1),
    )  # fmt: skip


def choose_precision(wanted: Precision) -> Precision:
    """AUTO is int8 where the processor has instructions made for it."""
    if wanted is Precision.AUTO:
        return Precision.INT8 if cpu.int8().dot else Precision.FP32
    return wanted


def plan_decode(
    kind: Autoencoder,
    latents: tuple[int, int],
    max_bytes: int,
    *,
    decode: Decode,
    scratch: Path,
    scratch_dtype: ScratchDtype,
    wrap: Wrap,
) -> tuple[Method, MemoryPlan, dict[str, torch.dtype]]:
    """How latents of (height, width) are decoded, the memory plan, and the weights that stay. Raises StorageError."""
    vae = _Coder(kind)
    method = choose(
        decode, vae.module, vae.streamer, latents, encoding=False, folder=scratch, dtype=scratch_dtype, wrap=wrap
    )
    phase = vae.phase("decode", latents, method, held=0)
    smallest = int(phase.peak_bytes / MARGIN) + 1
    phase, resident = _with_resident(phase, vae.module.decoder, kind.weights, method, max_bytes)
    return method, MemoryPlan(max_bytes=max_bytes, phases=(phase,), smallest_bytes=smallest), resident


def _libraries() -> Term:
    """What the process has without the code it ran so far: to be asked once the models are built, which imports most of it."""
    process.release_code()
    return Term(name="python, libraries", nbytes=process.read_rss().now + LIBRARIES_BYTES)


def _with(phase: PhasePlan, name: str, nbytes: int) -> PhasePlan:
    return PhasePlan(name=phase.name, terms=(*phase.terms, Term(name=name, nbytes=nbytes))) if nbytes > 0 else phase


def _with_resident(
    phase: PhasePlan, part: nn.Module, files: dict[str, TensorInfo], method: Method | None, max_bytes: int
) -> tuple[PhasePlan, dict[str, torch.dtype]]:
    """`phase` with the weights of `part` that stay in what the ceiling leaves; `method` of an autoencoder's phase."""
    # An autoencoder's strips come and go between the plan's figures: with less room 784 and 791 MB of 800 were measured.
    fill = RESIDENT_MARGIN if method is None else NEAR
    room = int((max_bytes * fill - phase.peak_bytes) / (1 + RESIDENT_SLACK))
    # The exact method reads every weight once: nothing is gained by keeping any.
    chosen = {} if method is not None and method.exact else _choose_resident(part, files, room)
    nbytes = sum(math.prod(files[n].shape) * dtype.itemsize for n, dtype in chosen.items())
    phase = _with(phase, "resident weights", int((1 + RESIDENT_SLACK) * nbytes))
    return phase if method is None else _with_heap(phase, method, max_bytes), chosen


def _with_heap(phase: PhasePlan, method: Method, max_bytes: int) -> PhasePlan:
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


def _weights_terms(module: nn.Module, stored: dict[str, TensorInfo]) -> list[Term]:
    """What a streamed `module` keeps in memory all the time: read buffers, norms and biases."""
    pieces = (
        min(math.prod(info.shape), PIECE_ELEMENTS) * TORCH_DTYPES[info.dtype].itemsize
        for info in stored.values()
        if info.dtype in TORCH_DTYPES
    )
    small = sum(
        p.numel() * 4
        for m in module.modules()
        for n, p in m.named_parameters(recurse=False)
        if not (n == "weight" and isinstance(m, StreamedLayer))
    )
    return [
        Term(name="norms, biases", nbytes=small),
        Term(name="read buffers", nbytes=(READ_AHEAD + 1) * max(pieces, default=0)),
    ]


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


def _text_phase(family: Family, fixed: list[Term]) -> PhasePlan:
    encoder, streamer = families.build_text_encoder(family), Streamer(None)
    stream_layers(encoder, streamer)
    stored = family.checkpoint.weights("text_encoder")
    tokens = 77 * 2
    activations = 4 * tokens * (family.text["intermediate_size"] * 3 + family.text["hidden_size"] * 8)
    units = (4 * sum(layer.weight.numel() for layer in streamed_layers(m)) for m in encoder.modules())
    terms = [
        *fixed,
        *_weights_terms(encoder, stored),
        Term(name=WORK, nbytes=activations + max(n for n in units if n <= streamer.arena_bytes)),
    ]
    return PhasePlan(name="encode prompts", terms=tuple(terms))


class _Coder:
    """An autoencoder on the meta device, and the phases that use it."""

    def __init__(self, kind: Autoencoder) -> None:
        self.kind, self.module, self.streamer = kind, families.build_vae(kind), Streamer(None)
        stream_layers(self.module, self.streamer)
        self.terms = [_libraries(), *_weights_terms(self.module, kind.weights)]

    def phase(
        self, name: str, latents: tuple[int, int], method: Method, source_pixels: int = 0, *, held: int = 1
    ) -> PhasePlan:
        """Decoding latents of (height, width), or encoding a picture of `source_pixels` enlarged to their size. Rows of the
        large picture come and go; the latents are `held` once, or not where a file has them, also with a margin, or being
        put together of bands and scaled."""
        area = math.prod(n + 2 * m for n, m in zip(latents, method.margin, strict=True))
        copies = 3 if method.encoding else 2 if any(method.margin) else held
        terms = [
            Term(name=WORK, nbytes=method.memory_bytes),
            Term(name="latents", nbytes=4 * copies * self.module.config.latent_channels * area),
            Term(name="picture", nbytes=3 * source_pixels),
        ]
        return PhasePlan(name=name, terms=(*self.terms, *(term for term in terms if term.nbytes)))
