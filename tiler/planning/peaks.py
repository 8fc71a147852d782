"""What each part of a checkpoint takes in memory while it works: its own code, run on meta tensors under a `MetaMeter`."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import nn

from tiler.compute.layers import StreamedLayer, stream_layers, streamed_layers
from tiler.compute.shapes import MetaMeter
from tiler.compute.stream import Streamer
from tiler.compute.tuning import ARENA_BYTES, HEAP_SLACK, INT8_HOLES_BYTES, LIBRARIES_BYTES, TIGHT_HEAP_SLACK
from tiler.decoding.method import DecodePlan
from tiler.memory import process
from tiler.models import family as families
from tiler.models.family import Family, Options, Part, Role, VaeSpec
from tiler.planning.table import PhasePlan, Term
from tiler.weights.codecs import CODECS
from tiler.weights.index import TensorInfo
from tiler.weights.store import PIECE_ELEMENTS, READ_AHEAD, match_index

ACTIVATIONS = "activations + weights in use"


def libraries() -> Term:
    """What the process has without the code it ran so far: to be asked once the models are built, which imports most of it."""
    process.release_code()
    return Term(name="python + libraries", nbytes=process.read_rss().now + LIBRARIES_BYTES)


def weights_terms(module: nn.Module, stored: dict[str, TensorInfo]) -> list[Term]:
    """What a streamed `module` keeps in memory all the time: read buffers, norms and biases."""
    pieces = (
        int(info.nbytes * min(1, PIECE_ELEMENTS / math.prod(info.shape)))
        for info in stored.values()
        if info.dtype in CODECS and info.nbytes
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


def text_phase(family: Family, fixed: list[Term]) -> PhasePlan:
    """Encoding the prompts; one encoder is in memory at a time, and the largest counts."""
    phases = [_encoder_phase(family, part, fixed) for part in family.encoders]
    return max(phases, key=lambda phase: phase.peak_bytes)


def _encoder_phase(family: Family, part: Part, fixed: list[Term]) -> PhasePlan:
    encoder, streamer = part.build(), Streamer(None, arena_bytes=part.arena_bytes)
    match_index(encoder, family.checkpoint.weights(part.name), part.aliases)
    stream_layers(encoder, streamer)
    units = (4 * sum(layer.weight.numel() for layer in streamed_layers(m)) for m in encoder.modules())
    used = part.activation_bytes + max(n for n in units if n <= streamer.arena_bytes)
    terms = [
        *fixed,
        *weights_terms(encoder, family.checkpoint.weights(part.name)),
        Term(name=ACTIVATIONS, nbytes=used),
    ]
    return PhasePlan(name="encode prompts", terms=tuple(terms))


class DenoiserPeaks:
    """A family's denoiser on the meta device, whose weights are held in `arena_bytes`, in int8 or not, and the phases that
    use it."""

    def __init__(self, family: Family, *, int8: bool, arena_bytes: int | None = None) -> None:
        part = family.part(Role.DENOISER)
        self.family, self.module, self.stored = family, part.build(), family.checkpoint.weights(part.name)
        match_index(self.module, self.stored, part.aliases)  # what is missing or misshapen is found before any work
        quantised = part.int8_weights(self.module) if int8 else frozenset[str]()
        self.stored |= {
            name: self.stored[name]._replace(dtype="I8", nbytes=math.prod(self.stored[name].shape))
            for name in quantised & self.stored.keys()
        }
        arena_bytes = arena_bytes or part.arena_bytes
        self.streamer = Streamer(None, int8_keys=quantised, arena_bytes=arena_bytes, transform=True)
        stream_layers(self.module, self.streamer)
        self._activations: dict[tuple[tuple[int, ...], int, int], int] = {}

    @cached_property
    def terms(self) -> list[Term]:
        return weights_terms(self.module, self.stored)

    def activations(self, tiles: tuple[int, ...], height: int, width: int) -> int:
        """Bytes of one pass over samples of `tiles`, of which neighbours may be the same, each (height, width) latents."""
        key = tiles, height, width
        if key not in self._activations:
            with MetaMeter() as meter, torch.no_grad():
                timesteps = torch.empty(1, device="meta")
                samples = self.family.example(tiles, (height, width))
                prompts = [sample.prompt for sample in samples]
                prepared = self.family.prepare(self.module, self.streamer, timesteps, prompts, Options())
                self.family.predict(self.module, self.streamer, samples, 0, prepared)
            self._activations[key] = meter.peak_bytes
        return self._activations[key]

    def phase(self, name: str, fixed: list[Term], tiles: list[int], batch: int, height: int, width: int) -> PhasePlan:
        """Denoising `tiles`, one for each sample, `batch` of them for each read of the weights."""
        groups = [tuple(tiles[i : i + batch]) for i in range(0, len(tiles), batch)]
        group = max(groups, key=lambda g: (len(set(g)), len(g)))  # halves of one tile share their first layers
        group = tuple(sorted(set(group)).index(tile) for tile in group)
        tight = self.streamer.arena_bytes < ARENA_BYTES
        slack = TIGHT_HEAP_SLACK if tight else HEAP_SLACK
        work = self.activations(group, height, width) + int(slack * self.activations((0,), height, width))
        if not tight:
            integers = sum(math.prod(self.stored[name].shape) for name in self.streamer.int8_keys & self.stored.keys())
            work += min(INT8_HOLES_BYTES, integers)
        return PhasePlan(name=name, terms=(*fixed, *self.terms, Term(name=ACTIVATIONS, nbytes=work)))


class VaePeaks:
    """An autoencoder on the meta device, and the phases that use it."""

    def __init__(self, kind: VaeSpec) -> None:
        self.kind, self.module, self.streamer = kind, families.build_vae(kind), Streamer(None)
        match_index(self.module, kind.weights, families.vae_names)
        stream_layers(self.module, self.streamer)
        self.terms = [libraries(), *weights_terms(self.module, kind.weights)]

    def phase(
        self, name: str, latents: tuple[int, int], method: DecodePlan, source_pixels: int = 0, *, held: int = 1
    ) -> PhasePlan:
        """Decoding latents of (height, width), or encoding a picture of `source_pixels` enlarged to their size. Rows of the
        large picture come and go; the latents are `held` once, or not where a file has them, also with a margin, or being
        put together of bands and scaled."""
        area = math.prod(n + 2 * m for n, m in zip(latents, method.margin, strict=True))
        copies = 3 if method.encoding else 2 if any(method.margin) else held
        terms = [
            Term(name=ACTIVATIONS, nbytes=method.memory_bytes),
            Term(name="latents", nbytes=4 * copies * self.module.config.latent_channels * area),
            Term(name="picture", nbytes=3 * source_pixels),
        ]
        return PhasePlan(name=name, terms=(*self.terms, *(term for term in terms if term.nbytes)))
