"""Plan a render from a request, a checkpoint's models and a ceiling: the needs of each phase, and the choices that make
it fit.

Only the headers of weight files are read, the process is not measured, and nothing is computed: the phases' own code
runs on meta tensors under a `MetaMeter`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import torch

from tiler.compute.tuning import TIGHT_ARENA_BYTES
from tiler.decoding import lockstep
from tiler.decoding.apart import DECODERS, held_bytes
from tiler.decoding.frozen import HELD_TOKENS, bands
from tiler.decoding.method import DecodePlan, ScratchSpace
from tiler.diffusion import flow, schedulers
from tiler.diffusion.masks import MASKS_KEPT
from tiler.diffusion.schedulers import DiffusersSchedule
from tiler.diffusion.stored import Shape
from tiler.diffusion.stored_canvas import bytes_of
from tiler.errors import StorageError, UsageError
from tiler.events import Phase
from tiler.files import named
from tiler.memory.budget import format_mb
from tiler.memory.tuning import HEAP_REUSED, MARGIN
from tiler.models.built import Models
from tiler.models.chunks import MOST_CHUNKS
from tiler.models.family import Family, Role, VaeSpec
from tiler.planning.facts import Facts
from tiler.planning.fit import Streamed, batch_and_heap, with_heap, with_resident
from tiler.planning.peaks import DenoiserPeaks, VaePeaks, in_place_of_activations, text_phase, tiny_preview_bytes
from tiler.planning.precision import choose_decode_precision, choose_precision
from tiler.planning.table import MemoryPlan, PhasePlan, Term
from tiler.planning.tiling import Tiling, pixels_of
from tiler.planning.whole import WholePicture, whole_picture
from tiler.request import Decode, GuideUpscale, Precision, ResolvedRequest, Scheduler, Wrap
from tiler.request.cluster import Where, parse_cluster
from tiler.request.wording import most_chunks

# Samples that share a read of the weights. Chosen, not measured: for SD 1.5, each sample's share of a read is then
# 0.1 GB, compared with seconds of arithmetic.
MAX_BATCH = 16
_ARRAYS = 6  # of the canvas's size: latents before and after, their sum, the scheduler's memory, a reference
# A larger canvas is stored in files. This depends on the size alone, since it affects the last bits of one scheduler.
IN_MEMORY_BYTES = 128_000_000
_STORED_BYTES = 24_000_000  # the parts of a stored canvas that are in memory
TILES_AHEAD = 256  # with a cluster: from the first tile without a prediction to the last handed out, at least
CONNECTIONS_BYTES = (
    16_000_000  # memory of dask's scheduler and client while they work (`scripts/bench_cluster.py scale`)
)
JOINED_BYTES = 4_000_000  # the same while workers open the model: 0.5 MB for a client, 2.7 MB for a scheduler with it
# Copies of the prompts for workers: to be sent; on their way to a worker, and to one that does not answer; and sent but
# not yet released.
SENT_PROMPTS = 4


@dataclass(frozen=True, kw_only=True)
class RenderPlan(Tiling):
    """The choices for carrying out a request. Sizes are in latent pixels."""

    family: Family
    batch: int
    resident: dict[str, dict[str, torch.dtype]]  # by phase: the weights that stay in memory, by parameter name
    decoder: VaeSpec  # the decoder of the picture: the checkpoint's own, or a tiny one
    methods: dict[str, DecodePlan]  # of the autoencoder, for "guide decoded", "guide picture" and "decode"
    memory: MemoryPlan
    guide_batch: int
    arena_bytes: int  # for the denoiser's weights in use
    sample_bytes: int  # for one sample alone in the denoiser, including the weights in use
    preview_bytes: int  # for a tiny autoencoder's preview of the canvas, which takes the place of activations
    precision: Precision  # fp32, bf16 or int8
    precision_why: str
    decode_precision: Precision  # of the autoencoder: fp32 or bf16
    scheduler: Scheduler  # never AUTO
    notes: tuple[str, ...]  # for the user, on the scheduler and on where the canvas is stored
    encoded: bool  # whether all prompts are already encoded, and no text encoder is read
    stored: bool  # whether the canvas is stored in files
    rss_bytes: int  # of the process, which the plan started from

    @property
    def shape(self) -> Shape:
        """The shape of the canvas, (1, C, h, w)."""
        return 1, self.family.latent_channels, *self.canvas

    @property
    def denoiser_calls(self) -> int:
        """The number of passes over the denoiser's weights."""
        both = (self.guide_steps, self.guide_batch), (self.canvas_steps, self.batch)
        return sum(math.ceil(step.samples / batch) for steps, batch in both for step in steps)

    @property
    def upscale_flops(self) -> int:
        """The floating-point operations of the autoencoder for enlarging the guide to the canvas's size."""
        return sum(m.flops + m.attention_flops for name, m in self.methods.items() if name != Phase.DECODE)


def plan_render(
    request: ResolvedRequest,
    models: Models,
    tiling: Tiling,
    facts: Facts,
    max_bytes: int,
    methods: Mapping[str, Decode] = MappingProxyType({}),
    *,
    encoded: bool = False,
    embeds: bool = False,
    tiles_only: bool = False,
    prompt_sets: int = 1,
) -> RenderPlan:
    """Plan a render whose work is cut into `tiling`. The memory plan may exceed the ceiling `max_bytes`; its `check()`
    then refuses. `methods` are the autoencoder's methods chosen by an earlier run, by the names in
    `RenderPlan.methods`. Prompts that are already `encoded` need no text encoder. Prompts that name embeddings
    (`embeds`) may be longer than their words suggest. With `tiles_only`, the process predicts tiles for a canvas held
    elsewhere, has no other phase, and holds the prompts of so many such renders at a time: `prompt_sets`.

    Raises UsageError for step counts that do not suit the scheduler, and ModelError for a scheduler config or weights
    that are unusable.
    """
    family = models.family
    if request.attention_window is not None and family.traits.patch > 1:
        raise UsageError(f"--attention-window is for UNets, and {family.traits.title} is a transformer; leave it out")
    schedule = build_schedule(request, family)
    guide, tile = tiling.guide, tiling.regions.tile
    # For the step with the most samples: the tile of each sample.
    fullest = (
        max(steps, key=lambda step: step.samples, default=None) for steps in (tiling.canvas_steps, tiling.guide_steps)
    )
    canvas_samples, guide_samples = ([0] if step is None else step.sample_numbers() for step in fullest)
    per_step = len(canvas_samples)

    precision, precision_why = choose_precision(request.precision, family.traits.width, facts.arithmetic)
    chunks = most_chunks(tiling.texts, MOST_CHUNKS) if family.traits.chunked else 1
    chunks += embeds  # the words do not show the embeddings' length
    sampler = DenoiserPeaks(models, precision, chunks=chunks)
    tight = DenoiserPeaks(models, precision, arena_bytes=TIGHT_ARENA_BYTES, chunks=chunks)
    fixed = [facts.libraries]
    masks = min(MASKS_KEPT, max(map(len, (tiling.regions, *tiling.canvas_steps[-1:]))))
    canvas_bytes = _ARRAYS * 4 * family.latent_channels * math.prod(tiling.canvas) + 4 * math.prod(tile) * masks
    on_disk = canvas_bytes > IN_MEMORY_BYTES and not tiles_only
    if on_disk and tiling.spot is not None:
        height, width = pixels_of(tiling.canvas)
        raise UsageError(
            f"{request.repaint}: the masked spot takes {width}×{height} pixels, which is too large; mask a smaller part"
        )
    if on_disk:
        needed, place = (
            bytes_of((1, family.latent_channels, *tiling.canvas), len(tiling.regions), tile),
            request.scratch_folder,
        )
        if facts.scratch_free_bytes < needed:
            raise StorageError(
                f"{named(place)} has {format_mb(facts.scratch_free_bytes)} free, but the canvas takes {format_mb(needed)}; free some "
                "space, or give another folder with --scratch"
            )
        canvas_bytes = _STORED_BYTES + 4 * math.prod(tile) * masks
    if tiles_only:
        tiling, guide, canvas_bytes = replace(tiling, guide=None), None, 0
    decode_precision, coding = Precision.FP32, _Coding({}, [], None)
    if not tiles_only:
        decode_precision = choose_decode_precision(request.decode_precision, precision, bf16=facts.arithmetic.bf16)
        coding = _plan_coding(request, models, tiling, facts, methods, decode_precision, stored=on_disk)
    prompts = Term(name="prompts", nbytes=len(tiling.texts) * sampler.prompt_bytes)
    others_bytes = prompts.nbytes - sampler.prompt_bytes  # the denoiser's own figure includes one prompt
    if tiles_only:  # a worker has one set twice: as it arrived, and as it is used
        others_bytes += prompt_sets * prompts.nbytes
    denoising = [*fixed, Term(name="canvas", nbytes=canvas_bytes), Term(name="prompts", nbytes=others_bytes)]
    clustered, joined, greeting = [], [], []
    if request.cluster is not None and not tiles_only:
        sent = SENT_PROMPTS * prompts.nbytes
        if parse_cluster(request.cluster).where is not Where.LOCAL:
            joined = [Term(name="cluster", nbytes=JOINED_BYTES)]
            greeting = [Term(name="cluster", nbytes=JOINED_BYTES + sent)]
        waiting = 2 * tile_bytes(family, tile) * min(TILES_AHEAD, len(tiling.regions))  # tiles, and their predictions
        clustered = [Term(name="cluster", nbytes=CONNECTIONS_BYTES + sent + waiting)]
    preview_bytes = 0
    if request.preview_vae is not None and models.tiny is not None:
        preview_bytes = tiny_preview_bytes(models, models.tiny, facts)

    def sampling(by: DenoiserPeaks, name: Phase, batch: int = 1) -> PhasePlan:
        if name == Phase.CANVAS or guide is None:
            phase = by.phase(name, [*denoising, *clustered], canvas_samples, batch, *tile)
            return in_place_of_activations(phase, "preview", preview_bytes)
        return by.phase(name, [*denoising, *greeting], guide_samples, batch, guide.height, guide.width)

    most = family.traits.samples or MAX_BATCH
    names = [Phase.CANVAS] if guide is None else [Phase.CANVAS, Phase.GUIDE]
    with tight.open():
        smallest = [sampling(tight, name).peak_bytes for name in names]
    with sampler.open():
        if max(sampling(sampler, name).peak_bytes for name in names) > max_bytes * MARGIN:
            sampler = tight

    def batch_of(name: Phase, samples: int) -> tuple[int, int]:
        """The samples of one read, and the freed bytes that they may reuse."""
        heap = min(HEAP_REUSED, sample_bytes)
        return batch_and_heap(
            lambda b: sampling(sampler, name, b).peak_bytes, int(max_bytes * MARGIN), most, samples, heap
        )

    with sampler.open():
        areas = [tile] if guide is None else [tile, (guide.height, guide.width)]
        sample_bytes = max(sampler.activations((0,), *area) for area in areas)
        batch, heap = batch_of(Phase.CANVAS, per_step)
        guide_batch, guide_heap = (1, 0) if guide is None else batch_of(Phase.GUIDE, len(guide_samples))
    while_encoding = [facts.text_libraries, prompts, *joined]
    encoding = PhasePlan(name=Phase.ENCODE_PROMPTS, terms=tuple(while_encoding))
    if not encoded:
        encoding = text_phase(models, while_encoding)
    if facts.guide_load_bytes:  # the user's picture is loaded first, and stays in memory while prompts are encoded
        picture = Term(name="picture", nbytes=3 * facts.guide_pixels)
        loading = Term(name="picture", nbytes=facts.guide_load_bytes)
        others = [
            PhasePlan(name=Phase.LOAD_GUIDE, terms=(*fixed, loading)),
            PhasePlan(name=encoding.name, terms=(*encoding.terms, picture)),
        ]
    else:
        others = [encoding]
    if coding.whole is not None:
        others.append(coding.whole.writing(facts.libraries, max_bytes))
    if tiles_only:
        others = []
    resident: dict[str, dict[str, torch.dtype]] = {phase.name: {} for phase in others}
    once = family.part(Role.DENOISER).once  # these weights are not read at every step
    stored = {name: info for name, info in sampler.stored.items() if not once(name)}
    streamed = Streamed(sampler.weights, stored, facts.arithmetic.int8.products, sampler.resident_slack)

    def filling(name: Phase, n: int, freed: int) -> tuple[PhasePlan, dict[str, torch.dtype]]:
        def filled_by(peaks: DenoiserPeaks) -> tuple[PhasePlan, dict[str, torch.dtype]]:
            return with_resident(with_heap(sampling(peaks, name, n), freed), streamed, None, max_bytes)

        phase, chosen = filled_by(sampler)
        if not (int8 := sampler.streamer.int8_keys) or int8 - chosen.keys():
            return phase, chosen
        in_place = DenoiserPeaks(
            models, precision, arena_bytes=sampler.streamer.arena_bytes, chunks=chunks, in_place=True
        )
        again, more = filled_by(in_place)
        # With more room, a large fp32 weight may come in and an int8 one go, which would then be held after all.
        return (phase, chosen) if int8 - more.keys() else (again, more)

    batches = ((Phase.GUIDE, guide_batch, guide_heap), (Phase.CANVAS, batch, heap))
    filled = [filling(*of_phase) for of_phase in batches if of_phase[0] in names]
    coding_phases = [c.holding(prompts, *greeting) if c.phase.name == Phase.GUIDE_PICTURE else c for c in coding.phases]
    filled += [with_resident(c.phase, c.streamed, coding.methods[c.phase.name], max_bytes) for c in coding_phases]
    resident |= {phase.name: chosen for phase, chosen in filled}
    least = [phase.peak_bytes for phase in (*others, *(c.phase for c in coding_phases))]
    return RenderPlan(
        **vars(tiling),
        family=family,
        encoded=encoded,
        stored=on_disk,
        rss_bytes=facts.rss_bytes,
        batch=batch,
        resident=resident,
        decoder=models.decoder,
        methods=coding.methods,
        guide_batch=guide_batch,
        precision=precision,
        precision_why=precision_why,
        decode_precision=decode_precision,
        scheduler=schedule.name,
        notes=(
            *schedule.notes,
            *([f"the canvas lies in files, in {named(request.scratch_folder)}"] if on_disk else []),
        ),
        sample_bytes=sample_bytes,
        arena_bytes=sampler.streamer.arena_bytes,
        preview_bytes=preview_bytes,
        memory=MemoryPlan(
            max_bytes=max_bytes,
            phases=tuple(
                sorted((*others, *(phase for phase, _ in filled)), key=lambda p: list(Phase).index(Phase(p.name)))
            ),
            smallest_bytes=int(max(least + smallest) / MARGIN) + 1,
        ),
    )


def tile_bytes(family: Family, tile: tuple[int, int]) -> int:
    """The bytes of the latents of a tile of (height, width), fp32."""
    return 4 * family.latent_channels * math.prod(tile)


class _CodingPhase(NamedTuple):
    """A phase of the autoencoder, and the weights that it reads."""

    phase: PhasePlan
    streamed: Streamed

    def holding(self, *terms: Term) -> _CodingPhase:
        """The phase with other terms that stay in memory meanwhile."""
        return self._replace(phase=PhasePlan(name=self.phase.name, terms=(*self.phase.terms, *terms)))


class _Coding(NamedTuple):
    """The autoencoder's work in a render: its methods, by the names of RenderPlan.methods, and its phases."""

    methods: dict[str, DecodePlan]
    phases: list[_CodingPhase]
    whole: WholePicture | None  # the complete picture, for formats that need it


def _beside_workers(phase: PhasePlan, method: DecodePlan, spec: VaeSpec, canvas: tuple[int, int]) -> PhasePlan:
    """The phase of a process whose workers decode bands of `canvas` latents, (height, width), or decode or encode
    slabs."""
    if method.kind is Decode.TINY or (method.encoding and not method.by_layers):
        return phase
    channels, held = spec.config["latent_channels"], 0
    if method.by_layers:
        slabs = min(DECODERS, lockstep.slabs_in(canvas[0] + 2 * method.margin[0]))
        phase = in_place_of_activations(phase, "slabs", lockstep.held_bytes(slabs))
    else:
        cut = bands(canvas[1])
        band_bytes = 4 * channels * canvas[0] * max(band.last - band.first for band in cut)
        held = held_bytes(band_bytes, len(cut), 8 * HELD_TOKENS * max(spec.config["block_out_channels"]))
    return replace(phase, terms=(*phase.terms, Term(name="cluster", nbytes=CONNECTIONS_BYTES + held)))


def _plan_coding(
    request: ResolvedRequest, models: Models, tiling: Tiling, facts: Facts, chosen: Mapping[str, Decode],
    precision: Precision, *, stored: bool,
) -> _Coding:  # fmt: skip
    space = ScratchSpace(request.scratch_folder, facts.scratch_free_bytes, request.scratch_dtype)
    own = models.family.autoencoder
    vae = VaePeaks(models, own, facts, precision)
    decoder = vae if models.decoder is own else VaePeaks(models, models.decoder, facts, precision)
    canvas, guide, wrap = tiling.canvas, tiling.guide, request.wrap
    methods: dict[str, DecodePlan] = {
        Phase.DECODE: decoder.choose(chosen.get(Phase.DECODE, request.decode), canvas, space, wrap=wrap)
    }
    decoding = decoder.phase(Phase.DECODE, canvas, methods[Phase.DECODE], held=0 if stored else 1, stored=stored)
    whole = whole_picture(request.output, request.format, request.width, request.height)
    if whole is not None:
        decoding = whole.while_decoding(decoding)
    is_shared = request.cluster is not None and parse_cluster(request.cluster).decodes
    if is_shared:
        decoding = _beside_workers(decoding, methods[Phase.DECODE], decoder.spec, canvas)
    phases = [_CodingPhase(decoding, Streamed(decoder.decoder_weights, decoder.spec.weights))]
    has_picture = request.guide_image is not None or tiling.smaller is not None
    if (guide is None and not has_picture) or request.guide_upscale is GuideUpscale.LATENT:
        return _Coding(methods, phases, whole)
    wanted = Decode.AUTO if request.decode is Decode.TINY else request.decode
    encoding = chosen.get(Phase.GUIDE_PICTURE, wanted)
    methods[Phase.GUIDE_PICTURE] = vae.choose(encoding, canvas, space, encoding=True, wrap=wrap)
    pixels = facts.guide_pixels if guide is None else math.prod(pixels_of(guide[:2]))
    pictures = [vae.phase(Phase.GUIDE_PICTURE, canvas, methods[Phase.GUIDE_PICTURE], pixels, stored=stored)]
    if guide is not None:  # the same phase decodes the guide first
        methods["guide decoded"] = vae.choose(chosen.get("guide decoded", wanted), guide[:2], space, wrap=wrap)
        pictures.append(vae.phase(Phase.GUIDE_PICTURE, guide[:2], methods["guide decoded"]))
    if is_shared:
        pictures[0] = _beside_workers(pictures[0], methods[Phase.GUIDE_PICTURE], own, canvas)
    largest = max(pictures, key=lambda phase: phase.peak_bytes)
    return _Coding(methods, [*phases, _CodingPhase(largest, Streamed(vae.weights, vae.spec.weights))], whole)


def build_schedule(request: ResolvedRequest, family: Family) -> DiffusersSchedule:
    """The complete, validated schedule of a render. Raises UsageError and ModelError."""
    asked, config, steps, traits = request.scheduler, family.scheduler, request.num_inference_steps, family.traits
    if not traits.flow:
        return schedulers.build(
            asked, config, steps, correct=traits.old_schedulers, schedule_type=request.schedule_type
        )
    if request.schedule_type is not None:
        raise UsageError(f"--schedule-type {request.schedule_type} is not for flow-matching models; leave it out")
    return flow.build(asked, config, steps, tokens=traits.tokens, even_sigmas=traits.even_sigmas)


def plan_decode(
    models: Models,
    latents: tuple[int, int],
    facts: Facts,
    max_bytes: int,
    *,
    decode: Decode,
    precision: Precision,
    space: ScratchSpace,
    wrap: Wrap,
    whole: WholePicture | None = None,
    encoding: bool = False,
) -> tuple[DecodePlan, MemoryPlan, dict[str, torch.dtype]]:
    """Plan to decode (or encode) latents of (height, width), of which this process holds none: the method, the memory
    plan, and the resident weights. Raises StorageError."""
    vae = VaePeaks(models, models.decoder, facts, precision)
    method = vae.choose(decode, latents, space, encoding=encoding, wrap=wrap)
    phase = vae.phase(Phase.DECODE, latents, method, held=0)
    writing = [] if whole is None else [whole.writing(facts.libraries, max_bytes)]
    phase = phase if whole is None else whole.while_decoding(phase)
    smallest = int(max(p.peak_bytes for p in (phase, *writing)) / MARGIN) + 1
    phase, resident = with_resident(phase, Streamed(vae.decoder_weights, vae.spec.weights), method, max_bytes)
    return method, MemoryPlan(max_bytes=max_bytes, phases=(phase, *writing), smallest_bytes=smallest), resident
