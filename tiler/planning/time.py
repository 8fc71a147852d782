"""Count the arithmetic of a render, and estimate its time on this machine. Reads no weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch

from tiler.compute import cpu
from tiler.compute.kernels import Kind
from tiler.compute.lending import lent
from tiler.compute.measure import TableShape, attention_speed, call_seconds, chosen_speed
from tiler.compute.shapes import MetaMeter
from tiler.compute.stream import Streamer
from tiler.compute.tuning import (
    GROUP_ELEMENTS,
    LOAD_CALLS,
    NARROW,
    OVERHEAD_BF16,
    OVERHEAD_BY_LAYERS,
    OVERHEAD_BY_LAYERS_BF16,
    OVERHEAD_BY_ROWS,
    OVERHEAD_BY_ROWS_BF16,
    OVERHEAD_FP32,
    OVERHEAD_INT8,
    OVERHEAD_NARROW,
    OVERHEAD_NARROW_DENOISER,
    RUN_CALLS,
)
from tiler.decoding.method import DecodePlan
from tiler.models.built import Models
from tiler.models.family import Options, Role
from tiler.planning.peaks import ranks_beside
from tiler.planning.tiling import Tiling
from tiler.request import Precision
from tiler.weights.disk import disk_speed

_CONVOLUTION = TableShape(Kind.CONVOLUTION, (320, 320, 3, 3), (1, 320, 32, 32))
_ROUNDS = 3  # of each measurement: an estimate of minutes does not need the fifth


class Flops(NamedTuple):
    """Floating-point operations, two for each multiply-add: of layers with weights, and of attention; how many `runs`
    of a layer, for a sample or for small ones together, they are spread over; how often the weights of a layer are
    prepared for these (`loads`); and the extra operations that narrow layers count as (`narrow`)."""

    layers: int
    attention: int
    runs: int = 0
    loads: int = 0
    narrow: float = 0.0

    @property
    def tflop(self) -> float:
        return (self.layers + self.attention) / 1e12

    def plus(self, other: Flops) -> Flops:
        return Flops(
            self.layers + other.layers, self.attention + other.attention, self.runs + other.runs,
            self.loads + other.loads, self.narrow + other.narrow,
        )  # fmt: skip


class Batches(NamedTuple):
    """Samples that share a read of the denoiser's weights, of the guide and of the canvas."""

    guide: int
    canvas: int


ONE = Batches(1, 1)


class Speed:
    """Operations per second of this machine: of the kernels chosen for a 3×3 convolution of 320 channels in each
    precision, and for attention of 2,048 tokens; the time of a `call` of a layer without arithmetic; and the bytes per
    second at which the file `weights` is read. Each is measured when it is first asked for, in a fifth of a second."""

    def __init__(self, weights: Path) -> None:
        self._weights = weights
        self._chosen = cache(partial(chosen_speed, _CONVOLUTION, rounds=_ROUNDS))
        self._attention = cache(partial(attention_speed, rounds=_ROUNDS))

    @property
    def fp32(self) -> float:
        return self._chosen("fp32")

    @property
    def bf16(self) -> float:
        return self._chosen("bf16" if cpu.int8().products else "fp32")

    @property
    def int8(self) -> float:
        """Without 8-bit products, int8 is only the storage format of weights."""
        return self._chosen("int8" if cpu.int8().products else "fp32")

    @property
    def attention(self) -> float:
        return self._attention("fp32")

    @property
    def half_attention(self) -> float:
        """Beside bf16 and int8 weights."""
        return self._attention("int8" if cpu.int8().products else "fp32")

    @cached_property
    def call(self) -> float:
        """Seconds."""
        return call_seconds(_ROUNDS)

    @cached_property
    def disk(self) -> float:
        return disk_speed(self._weights)


class Counter:
    """Counts the work of a family's samples. Each kind of sample is run once on shapes alone, by `streamer` if
    given."""

    def __init__(self, models: Models, streamer: Streamer | None = None) -> None:
        self.family, self.streamer = models.family, streamer or Streamer(None)
        self.module = models.module(self.family.part(Role.DENOISER))
        self._layers = sum("weight" in dict(layer.named_parameters(recurse=False)) for layer in self.module.modules())
        self._narrow = _narrow_overhead(self.family.traits.width, OVERHEAD_NARROW_DENOISER)
        self.known: dict[tuple[int, int, int, int | None], Flops] = {}

    def count(self, cut: Tiling, attention_window: int | None, batches: Batches = ONE) -> Flops:
        """The work of all denoiser samples of `cut`, of which as many as `batches` says share a read of the weights."""
        total, tile = Flops(0, 0), cut.regions.tile
        guide = tile if cut.guide is None else (cut.guide.height, cut.guide.width)
        for steps, sides, batch in (
            (cut.guide_steps, guide, batches.guide),
            (cut.canvas_steps, tile, batches.canvas),
        ):
            for step in steps:
                reads, runs = (math.ceil(step.samples / n) for n in (batch, min(batch, self._together(*sides))))
                total = total.plus(Flops(0, 0, runs * self._layers, reads * self._layers))
                for samples, tiles in step.counts():
                    one = self._tile(samples, *sides, attention_window)
                    total = total.plus(
                        Flops(tiles * one.layers, tiles * one.attention, narrow=tiles * one.layers * self._narrow)
                    )
        return total

    def _together(self, height: int, width: int) -> int:
        """The samples of that many latents that run together at the highest resolution."""
        return max(1, GROUP_ELEMENTS // (self.family.traits.width * height * width))

    def _tile(self, samples: int, height: int, width: int, window: int | None) -> Flops:
        key = samples, height, width, window
        if key not in self.known:
            inputs, timesteps = self.family.example([0] * samples, (height, width)), torch.empty(1, device="meta")
            prompts, options = [sample.prompt for sample in inputs], Options(attention_window=window)
            with lent(self.module, self.streamer), MetaMeter() as meter, torch.no_grad():
                prepared = self.family.prepare(self.module, self.streamer, timesteps, prompts, options)
                self.family.predict(self.module, self.streamer, inputs, 0, prepared)
            self.known[key] = Flops(meter.flops + meter.linear_flops, meter.attention_flops)
        return self.known[key]


class LoraCounter:
    """Counts the work that LoRAs add to a family's samples in `precision`: with int8 products, a low-rank path for each
    sample; otherwise a difference for each read of a weight, which serves `batch` samples."""

    def __init__(self, models: Models, precision: Precision, batch: int) -> None:
        part = models.family.part(Role.DENOISER)
        module, changes, self._batch = models.module(part), models.changes(part), batch
        int8 = part.int8_weights(module) if changes and precision is Precision.INT8 else frozenset[str]()
        ranks = ranks_beside(changes, int8)
        streamers = [Streamer(None, int8_keys=int8, ranks=some) for some in (ranks, {})] if ranks else []
        self._counters = [Counter(models, streamer) for streamer in streamers]
        read = [name for name in changes if name not in int8]
        self._read_flops = sum(
            module.get_parameter(name).numel() * sum(one.flops_of_weight for one in changes[name]) for name in read
        )

    def count(self, cut: Tiling, attention_window: int | None) -> Flops:
        """The additional work of all samples of `cut`."""
        reads = math.ceil(cut.denoiser_samples / self._batch)
        beside = [counter.count(cut, attention_window).layers for counter in self._counters]
        return Flops(reads * self._read_flops + (beside[0] - beside[1] if beside else 0), 0)


def seconds(
    work: Flops, methods: Iterable[DecodePlan], speed: Speed, precision: Precision, read_bytes: float = 0
) -> float:
    """The expected time of a render: that of its samples in `precision` or of the reads for them, whichever is longer,
    plus that of the autoencoder's `methods`."""
    coding = sum(coding_seconds(method, speed) for method in methods)
    return max(arithmetic_seconds(work, speed, precision), read_bytes / speed.disk) + coding


def coding_seconds(method: DecodePlan, speed: Speed) -> float:
    """The expected time of one of the autoencoder's methods."""
    if method.precision is Precision.BF16:
        by_layers, by_rows, attention = OVERHEAD_BY_LAYERS_BF16, OVERHEAD_BY_ROWS_BF16, speed.half_attention
    else:
        by_layers, by_rows, attention = OVERHEAD_BY_LAYERS, OVERHEAD_BY_ROWS, speed.attention
    overhead = by_layers if method.by_layers else by_rows
    overhead += _narrow_overhead(method.width, OVERHEAD_NARROW)
    return overhead * method.flops / speed.fp32 + method.attention_flops / attention


def _narrow_overhead(width: int, channels: float) -> float:
    """The overhead of layers with `width` channels at the highest resolution, if they are narrow; `channels` is one of
    the constants OVERHEAD_NARROW."""
    return channels * max(0.0, 1 / width - 1 / NARROW)


def arithmetic_seconds(work: Flops, speed: Speed, precision: Precision) -> float:
    """The expected time of samples in `precision`."""
    if precision is Precision.INT8:
        layers, attention, overhead = speed.int8, speed.half_attention, OVERHEAD_INT8
    elif precision is Precision.BF16:
        layers, attention, overhead = speed.bf16, speed.half_attention, OVERHEAD_BF16
    else:
        layers, attention, overhead = speed.fp32, speed.attention, OVERHEAD_FP32
    small = (RUN_CALLS * work.runs + LOAD_CALLS * work.loads) * speed.call + work.narrow / speed.fp32
    return overhead * (work.layers / layers + work.attention / attention) + small
