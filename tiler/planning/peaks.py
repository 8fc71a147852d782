"""The memory that each part of a checkpoint takes while it works, found by running its own code on meta tensors under a
`MetaMeter`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from tiler.compute.choose import KERNELS
from tiler.compute.kernels import Kernel
from tiler.compute.layers import StreamedLayer, streamed_layers
from tiler.compute.lending import lent
from tiler.compute.native_float import packs_layers
from tiler.compute.native_winograd import NativeWinogradBf16
from tiler.compute.shapes import MetaMeter
from tiler.compute.stream import Streamer
from tiler.compute.tuning import (
    ARENA_BYTES,
    HEAP_SLACK,
    MAPPED_HEAP_SLACK,
    PACKED_HEAP_SLACK,
    PACKED_RESIDENT_SLACK,
    RESIDENT_SLACK,
    TIGHT_HEAP_SLACK,
)
from tiler.decoding import tiny
from tiler.decoding.method import DecodePlan, ScratchSpace, choose
from tiler.events import Phase
from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.chunks import CLIP_TOKENS
from tiler.models.family import Options, Part, Role, VaeSpec
from tiler.models.samples import Sample, empty
from tiler.planning.facts import Facts
from tiler.planning.fit import Weight
from tiler.planning.table import PhasePlan, Term
from tiler.request import Decode, Precision, Wrap
from tiler.weights.changes import STEP_ELEMENTS, Changes, rank_beside
from tiler.weights.grouped import is_read
from tiler.weights.index import TensorInfo
from tiler.weights.store import PIECE_ELEMENTS, READ_AHEAD, match_index

ACTIVATIONS = "activations + weights in use"


class VaeStreaming(NamedTuple):
    """Options of the Streamer for an autoencoder's weights."""

    bf16_keys: frozenset[str]
    prefer: tuple[Kernel, ...]


def vae_streaming(spec: VaeSpec, vae: Any, precision: Precision) -> VaeStreaming:
    """Options for fp32 or bf16. In bf16, the layers with the fewest pixels stay in fp32: all later layers inherit their
    error, and they are a tenth of the work. A tiny autoencoder stays in fp32 as well, because it is fast anyway."""
    if precision is not Precision.BF16 or spec.tiny:
        return VaeStreaming(frozenset(), ())
    smallest = ("decoder.up_blocks.0.", f"encoder.down_blocks.{len(vae.encoder.down_blocks) - 1}.")
    names = (name for name, weight in vae.named_parameters() if weight.ndim > 1)
    keys = frozenset(name for name in names if ".mid_block." not in name and not name.startswith(smallest))
    return VaeStreaming(keys, (KERNELS[NativeWinogradBf16.name],))


def bf16_keys(part: Part, module: nn.Module, precision: Precision) -> frozenset[str]:
    """The denoiser's weights that are multiplied in bf16. There are none beside int8: the remaining layers would save a
    fortieth of a pass, and add a thirtieth to its error."""
    return part.bf16_weights(module) if precision is Precision.BF16 else frozenset()


def streamed_weights(module: nn.Module) -> list[Weight]:
    """The streamed weights of a lent module, in the order of its module tree."""
    return [Weight(layer.key, layer.weight.numel()) for layer in streamed_layers(module)]


def weights_terms(module: nn.Module, stored: Mapping[str, TensorInfo]) -> list[Term]:
    """The memory that a lent module keeps all the time: read buffers, norms and biases."""
    pieces = (
        int(info.nbytes * min(1, PIECE_ELEMENTS / math.prod(info.shape)))
        for info in stored.values()
        if is_read(info) and info.nbytes
    )
    small = sum(
        p.numel() * 4
        for m in module.modules()
        for n, p in m.named_parameters(recurse=False)
        if not (n == "weight" and isinstance(m, StreamedLayer))
    )
    return [
        Term(name="norms + biases", nbytes=small),
        Term(name="read buffers", nbytes=(READ_AHEAD + 1) * max(pieces, default=0)),
    ]


def ranks_beside(changes: Changes, int8: frozenset[str]) -> dict[str, int]:
    """For each `int8` weight with a low-rank path beside it, the rank of that path."""
    ranks = {name: rank_beside(some) for name, some in changes.items() if name in int8}
    return {name: rank for name, rank in ranks.items() if rank}


def changes_terms(changes: Changes) -> list[Term]:
    """The memory that LoRAs need while the weights of one layer are changed: all factors of the largest layer, again as
    stored, and the difference for a few rows."""
    if not changes:
        return []
    most = max(sum(change.factor_elements for change in some) for some in changes.values())
    return [Term(name="LoRA", nbytes=6 * most + 3 * 4 * STEP_ELEMENTS)]


def text_phase(models: Models, fixed: list[Term]) -> PhasePlan:
    """The phase that encodes the prompts. One encoder is in memory at a time, so the largest one counts."""
    phases = [_encoder_phase(models, part, fixed) for part in models.family.encoders]
    return max(phases, key=lambda phase: phase.peak_bytes)


def _encoder_phase(models: Models, part: Part, fixed: list[Term]) -> PhasePlan:
    encoder, streamer = models.module(part), Streamer(None, arena_bytes=part.arena_bytes)
    stored = models.family.checkpoint.weights(part.name)
    match_index(encoder, stored, part.aliases)
    with lent(encoder, streamer):
        assert part.example is not None, part.name
        if part.name not in models.rehearsed:
            with MetaMeter() as meter, torch.no_grad():
                part.example(encoder)
            models.rehearsed[part.name] = meter.peak_bytes
        own = [*weights_terms(encoder, stored), *changes_terms(models.changes(part))]
        terms = [*fixed, *own, Term(name=ACTIVATIONS, nbytes=models.rehearsed[part.name])]
    return PhasePlan(name=Phase.ENCODE_PROMPTS, terms=tuple(terms))


class DenoiserPeaks:
    """The phases that use a family's denoiser, with weights held in `arena_bytes` for arithmetic in `precision`, and
    prompts of up to `chunks` chunks. `in_place`: all int8 weights stay in memory, so those that are multiplied there
    are not held as well."""

    def __init__(
        self, models: Models, precision: Precision, *, arena_bytes: int | None = None, chunks: int = 1,
        in_place: bool = False,
    ) -> None:  # fmt: skip
        self.family, part = models.family, models.family.part(Role.DENOISER)
        self.module, self.stored = models.module(part), dict(self.family.checkpoint.weights(part.name))
        match_index(self.module, self.stored, part.aliases)  # missing or misshapen weights are found before any work
        quantised = part.int8_weights(self.module) if precision is Precision.INT8 else frozenset[str]()
        self.stored |= {
            name: self.stored[name]._replace(dtype="I8", nbytes=math.prod(self.stored[name].shape))
            for name in quantised & self.stored.keys()
        }
        arena_bytes = arena_bytes or part.arena_bytes
        self._changes = models.changes(part)
        self.streamer = Streamer(
            None, int8_keys=quantised, bf16_keys=bf16_keys(part, self.module, precision), arena_bytes=arena_bytes,
            transform=True, ranks=ranks_beside(self._changes, quantised), in_place=in_place,
        )  # fmt: skip
        self._more_tokens = CLIP_TOKENS * (chunks - 1)
        self._activations: dict[tuple[tuple[int, ...], int, int], int] = {}
        self._is_open = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Lend the module once for all questions in this context, instead of for each. Not for two at a time."""
        with lent(self.module, self.streamer):
            self._is_open = True
            try:
                yield
            finally:
                self._is_open = False

    def _lent(self) -> AbstractContextManager[None]:
        return nullcontext() if self._is_open else lent(self.module, self.streamer)

    @cached_property
    def terms(self) -> list[Term]:
        with self._lent():
            return [*weights_terms(self.module, self.stored), *changes_terms(self._changes)]

    @cached_property
    def weights(self) -> list[Weight]:
        with self._lent():
            return streamed_weights(self.module)

    def activations(self, tiles: tuple[int, ...], height: int, width: int) -> int:
        """Bytes of one pass over samples of `tiles` (equal neighbours share their first layers), each of (height,
        width) latents."""
        key = tiles, height, width
        if key not in self._activations:
            with self._lent(), MetaMeter() as meter, torch.no_grad():
                timesteps = torch.empty(1, device="meta")
                samples = self._examples(tiles, height, width)
                prompts = [sample.prompt for sample in samples]
                prepared = self.family.prepare(self.module, self.streamer, timesteps, prompts, Options())
                self.family.predict(self.module, self.streamer, samples, 0, prepared)
            self._activations[key] = meter.peak_bytes
        return self._activations[key]

    def _examples(self, tiles: tuple[int, ...], height: int, width: int) -> list[Sample]:
        """The family's example samples, with prompts of the full number of chunks."""
        samples = self.family.example(tiles, (height, width))
        if not self._more_tokens:
            return samples
        longer = {}
        for prompt in (sample.prompt for sample in samples):
            _, length, wide = prompt.tokens.shape
            longer[id(prompt)] = prompt._replace(tokens=empty(1, length + self._more_tokens, wide))
        return [sample._replace(prompt=longer[id(sample.prompt)]) for sample in samples]

    @cached_property
    def prompt_bytes(self) -> int:
        """The embeddings of one prompt of the greatest length."""
        side = self.family.granularity
        (sample,) = self._examples((0,), side, side)
        return sum(part.nbytes for part in sample.prompt if part is not None)

    @property
    def packs_floats(self) -> bool:
        """Whether fp32 or bf16 weights are repacked for tiler's own kernels when they are read, so that nothing is
        freed unit by unit."""
        return not self.streamer.int8_keys and packs_layers()

    @property
    def resident_slack(self) -> float:
        """The overhead of resident weights, as a share of their size."""
        return PACKED_RESIDENT_SLACK if self.packs_floats else RESIDENT_SLACK

    def phase(self, name: str, fixed: list[Term], tiles: list[int], batch: int, height: int, width: int) -> PhasePlan:
        """The phase that denoises `tiles`, one entry for each sample, with `batch` samples for each read of the
        weights."""
        groups = [tuple(tiles[i : i + batch]) for i in range(0, len(tiles), batch)]
        group = max(groups, key=lambda g: (len(set(g)), len(g)))  # both samples of one tile share their first layers
        group = tuple(sorted(set(group)).index(tile) for tile in group)
        tight = self.streamer.arena_bytes < ARENA_BYTES
        mapped = self.family.traits.large_blocks
        in_place = bool(self.streamer.int8_keys)  # nothing is then packed and freed unit by unit
        roomy = PACKED_HEAP_SLACK if self.packs_floats else HEAP_SLACK
        slack = MAPPED_HEAP_SLACK if mapped else TIGHT_HEAP_SLACK if tight or in_place else roomy
        work = self.activations(group, height, width) + int(slack * self.activations((0,), height, width))
        return PhasePlan(name=name, terms=(*fixed, *self.terms, Term(name=ACTIVATIONS, nbytes=work)))


class VaePeaks:
    """The phases that use one of a run's autoencoders."""

    def __init__(self, models: Models, spec: VaeSpec, facts: Facts, precision: Precision = Precision.FP32) -> None:
        self.spec, self.module = spec, models.vae(spec)
        self._rehearsed = models.rehearsed.setdefault(spec.part, {})
        self._streamer = Streamer(None, **vae_streaming(spec, self.module, precision)._asdict())
        match_index(self.module, spec.weights, families.vae_names)
        with lent(self.module, self._streamer):
            self.weights = streamed_weights(self.module)
            self.terms = [facts.libraries, *weights_terms(self.module, spec.weights)]
            self.decoder_weights = streamed_weights(self.module.decoder)

    def choose(
        self,
        wanted: Decode,
        latents: tuple[int, int],
        space: ScratchSpace,
        *,
        encoding: bool = False,
        wrap: Wrap,
    ) -> DecodePlan:
        """The method to decode (or encode) latents of (height, width). Raises StorageError."""
        with lent(self.module, self._streamer):
            return choose(
                wanted, self.module, self._streamer, latents, space,
                encoding=encoding, wrap=wrap, rehearsed=self._rehearsed,
            )  # fmt: skip

    def phase(
        self,
        name: str,
        latents: tuple[int, int],
        method: DecodePlan,
        source_pixels: int = 0,
        *,
        held: int = 1,
        stored: bool = False,
    ) -> PhasePlan:
        """The phase that decodes latents of (height, width), or encodes a picture of `source_pixels` enlarged to their
        size. The large picture exists only as rows. The latents are held `held` times (0 if they are elsewhere),
        and once more if they have a margin or are assembled from bands and scaled; where they are `stored` in files,
        bands are read and written."""
        area = math.prod(n + 2 * m for n, m in zip(latents, method.margin, strict=True))
        copies = 3 * min(held, 1) if method.encoding else 2 if any(method.margin) else held
        if stored and not (method.encoding and method.by_layers):
            copies = 0
        terms = [
            Term(name=ACTIVATIONS, nbytes=method.memory_bytes),
            Term(name="latents", nbytes=4 * copies * self.module.config.latent_channels * area),
            Term(name="picture", nbytes=3 * source_pixels),
        ]
        return PhasePlan(name=name, terms=(*self.terms, *(term for term in terms if term.nbytes)))


def tiny_preview_bytes(models: Models, spec: VaeSpec, facts: Facts) -> int:
    """The memory that a tiny autoencoder takes to decode a preview of the largest size."""
    peaks, side = VaePeaks(models, spec, facts), (tiny.PREVIEW_SIDE, tiny.PREVIEW_SIDE)
    with lent(peaks.module, Streamer(None)), MetaMeter() as meter, torch.no_grad():
        tiny.rehearse(peaks.module, side, tiny.PREVIEW_ROWS)
    return meter.peak_bytes + sum(term.nbytes for term in peaks.terms) - facts.libraries.nbytes


def in_place_of_activations(phase: PhasePlan, name: str, nbytes: int) -> PhasePlan:
    """A phase that also holds `nbytes` at times when the memory for its activations is free, like previews between the
    passes of a denoiser."""
    free = sum(term.nbytes for term in phase.terms if term.name == ACTIVATIONS)
    return phase if nbytes <= free else replace(phase, terms=(*phase.terms, Term(name=name, nbytes=nbytes - free)))
