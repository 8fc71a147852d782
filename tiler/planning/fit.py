"""Find what fits under a ceiling: the largest batch, and the weights that stay in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from tiler.compute.tuning import RESIDENT_SLACK
from tiler.decoding.method import DecodePlan
from tiler.decoding.scratch import STRIP_BYTES
from tiler.memory.tuning import HEAP_KEPT, HEAP_SAMPLES, NEAR, RESIDENT_MARGIN
from tiler.planning.table import FREE_HEAP, PhasePlan, Term
from tiler.weights.index import TensorInfo
from tiler.weights.store import TORCH_DTYPES


def _with(phase: PhasePlan, name: str, nbytes: int) -> PhasePlan:
    return PhasePlan(name=phase.name, terms=(*phase.terms, Term(name=name, nbytes=nbytes))) if nbytes > 0 else phase


class Weight(NamedTuple):
    """A streamed weight: its parameter's name and number of elements."""

    name: str
    elements: int


class Streamed(NamedTuple):
    """The streamed weights of a phase in the order of use, where they are stored, whether int8 weights are multiplied
    as int8, and the overhead of keeping weights resident."""

    weights: Sequence[Weight]
    stored: Mapping[str, TensorInfo]
    int8_products: bool = False
    slack: float = RESIDENT_SLACK  # freed blocks between resident ones, as a share of their size


def with_resident(
    phase: PhasePlan, streamed: Streamed, method: DecodePlan | None, max_bytes: int
) -> tuple[PhasePlan, dict[str, torch.dtype]]:
    """`phase` with the resident weights that the ceiling has room for; `method` is given for an autoencoder's phase."""
    # An autoencoder's strips come and go between the figures of the plan: with less room, 784 and 791 MB of 800 were
    # measured.
    fill = RESIDENT_MARGIN if method is None else NEAR
    room = int((max_bytes * fill - phase.peak_bytes) / (1 + streamed.slack))
    # Layer by layer, every weight is read once, so nothing is gained by keeping it.
    chosen = {} if method is not None and method.by_layers else _choose_resident(streamed, room)
    nbytes = sum(_resident_bytes(streamed.stored[name], dtype) for name, dtype in chosen.items())
    phase = _with(phase, "resident weights", int((1 + streamed.slack) * nbytes))
    return phase if method is None else _with_strips(phase, method, max_bytes), chosen


def _resident_bytes(info: TensorInfo, dtype: torch.dtype) -> int:
    """The bytes of a resident weight, in fp32 or as stored."""
    return 4 * math.prod(info.shape) if dtype == torch.float32 else info.nbytes


def with_heap(phase: PhasePlan, nbytes: int) -> PhasePlan:
    """`phase` with so many freed bytes that stay in the heap, to be used again."""
    return _with(phase, FREE_HEAP, nbytes)


def _with_strips(phase: PhasePlan, method: DecodePlan, max_bytes: int) -> PhasePlan:
    """Add the freed memory of an autoencoder's strips that the heap may keep, as far as the ceiling has room for it. It
    can be reused, since the blocks of one strip fit where those of the previous one were."""
    freed = min(HEAP_KEPT, method.memory_bytes - STRIP_BYTES)
    return with_heap(phase, min(freed, int(max_bytes * NEAR) - phase.peak_bytes))


def batch_and_heap(peak: Callable[[int], int], room: int, most: int, samples: int, heap: int) -> tuple[int, int]:
    """The largest batch whose predicted peak fits, in passes of equal size over `samples`, and the freed bytes that it
    may reuse: `heap`, if each read of the weights then still serves HEAP_SAMPLES, else 0."""

    def equal(batch: int) -> int:
        return math.ceil(samples / math.ceil(samples / batch))

    batch = equal(largest_batch(peak, room, min(most, samples)))
    fewer = equal(largest_batch(peak, room - heap, batch))
    return (fewer, heap) if fewer >= HEAP_SAMPLES else (batch, 0)


def largest_batch(peak: Callable[[int], int], room: int, most: int) -> int:
    """The largest batch whose predicted peak fits, at least 1. Peaks grow almost linearly, so the search starts from a
    linear estimate and steps down."""
    if most == 1 or peak(most) <= room:
        return most
    slope = (peak(most) - peak(1)) / (most - 1)
    batch = max(1, min(most - 1, 1 + int((room - peak(1)) / slope) + 1))
    while batch > 1 and peak(batch) > room:
        batch -= 1
    return batch


def _choose_resident(streamed: Streamed, room: int) -> dict[str, torch.dtype]:
    """Choose the weights that the remaining memory can hold: all of them in compute format if they fit, else a fixed
    subset as stored.

    Access is cyclic, so the choice does not affect the number of bytes read; the first weights in the order of use are
    taken.
    """
    weights, stored, int8 = (
        [w for w in streamed.weights if w.name in streamed.stored],
        streamed.stored,
        streamed.int8_products,
    )
    computed = {w.name: torch.int8 if int8 and stored[w.name].dtype == "I8" else torch.float32 for w in weights}
    if sum(w.elements * computed[w.name].itemsize for w in weights) <= room:
        return computed
    chosen: dict[str, torch.dtype] = {}
    for weight in weights:
        info = stored[weight.name]
        if info.nbytes <= room:
            chosen[weight.name] = TORCH_DTYPES.get(info.dtype, torch.uint8)
            room -= info.nbytes
    return chosen
