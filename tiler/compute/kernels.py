"""Operations as data, and the interface of the kernels that run them.

An `Op` describes the complete operation: how its input is joined, normalised and activated, which weights it uses, and
what follows the product. A kernel fuses as much of this as it can; steps.py does the rest step by step. choose.py
chooses kernels; the streamer (stream.py) owns the memory in which they prepare weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tiler.compute.onednn import Geometry
from tiler.weights.changes import LowRank
from tiler.weights.store import PIECE_ELEMENTS, Piece, WeightStore, piece_rows

Shape = Sequence[int]


class Kind(StrEnum):
    LINEAR = "linear"
    CONVOLUTION = "convolution"
    ATTENTION = "attention"


@dataclass(frozen=True, kw_only=True, eq=False)
class Weight:
    """A tensor's name in the store and its shape (outputs, inputs, *taps) on the meta device; `first` is the row where
    these outputs start, if they are a part of it.

    It comes with its bias (outputs,), and with a low-rank path, which adds `up · (down · input)` if the weight is
    multiplied as int8; a weight that is read in fp32 already includes the change. If an int8 weight is `rotated`
    (weights/rotation.py), so is the input of its product.
    """

    name: str
    meta: Tensor
    first: int = 0
    bias: Tensor | None = None
    low_rank: LowRank | None = None
    rotated: bool = False

    # Asked often, and a tensor under a planner's modes answers slowly.
    @cached_property
    def outputs(self) -> int:
        return self.meta.shape[0]

    @cached_property
    def row(self) -> int:
        """The number of elements that make one output."""
        return math.prod(self.meta.shape[1:])


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """The weights of an operation, with one input and equal taps. Several weights act like one that has all their
    outputs."""

    weights: tuple[Weight, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(weight.name for weight in self.weights)

    @cached_property
    def key(self) -> tuple[tuple[str, int, int], ...]:
        """Identifies the group."""
        return tuple((weight.name, weight.first, weight.outputs) for weight in self.weights)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return (sum(weight.outputs for weight in self.weights), *self.weights[0].meta.shape[1:])

    @property
    def row(self) -> int:
        return self.weights[0].row

    @property
    def rotated(self) -> bool:
        """Whether all of them are, or none."""
        (found,) = {weight.rotated for weight in self.weights}
        return found

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class HeldNorm(nn.Module):
    """A GroupNorm whose statistics are known: x · scale + shift, which are the rows of `factors`, (2, C) fp32."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, C, h, w) fp32."""
        scale, shift = self.factors.view(2, 1, -1, 1, 1)
        return (x * scale).add_(shift)


@dataclass(frozen=True, kw_only=True)
class Input:
    """`parts` tensors are joined along channels, then enlarged (both sides doubled, nearest neighbour), normalised and
    activated."""

    parts: int = 1
    enlarged: bool = False
    norm: nn.Module | None = None
    activation: nn.Module | None = None


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """The operations after the product and its bias, in this order: `activation`, then the residual given with the
    input. A `glu` halves the outputs (in a group of two weights: those of each weight) to first ·
    activation(second)."""

    activation: nn.Module | None = None
    glu: bool = False
    residual: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Op:
    """One operation. Attention has no weights; its parts are queries, keys and values, (n, heads, tokens, width)
    each."""

    kind: Kind
    weights: Group | None = None
    geometry: Geometry | None = None  # of a convolution
    input: Input = field(default_factory=Input)
    epilogue: Epilogue = field(default_factory=Epilogue)

    @property
    def group(self) -> Group:
        assert self.weights is not None, self.kind
        return self.weights

    def output_shape(self, shape: Shape, outputs: int | None = None) -> tuple[int, ...]:
        """The product's shape for a joined input (n, in, h, w) of a convolution, or (n, ..., in) of a linear layer,
        with all outputs of the group or with `outputs` of them."""
        if self.kind is Kind.ATTENTION:
            return tuple(shape)
        channels = self.group.shape[0] if outputs is None else outputs
        if self.geometry is None:
            return (*shape[:-1], channels)
        padding, stride, dilation, _ = self.geometry
        sides = zip(shape[2:], padding, dilation, self.group.shape[2:], stride, strict=True)
        return (shape[0], channels, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sides))

    def flops(self, shape: Shape) -> int:
        """The product's arithmetic, two operations for each multiply-add, as if no kernel saved any."""
        if self.kind is Kind.ATTENTION:
            return 4 * math.prod(shape) * shape[-2]
        return 2 * math.prod(self.output_shape(shape, 1)) * self.group.numel


class Operands(NamedTuple):
    """The inputs of an operation. `made` is the kernel's `begin` result for the parts; `out` is where a convolution's
    result goes, if its place exists already."""

    parts: tuple[Tensor, ...]
    residual: Tensor | None = None
    made: Any = None
    out: Tensor | None = None


class Some(NamedTuple):
    """Attention to some of the keys: the result, and for each query the largest score in base 2 and the sum of
    2^(score − top), (n, heads, tokens, 1) each."""

    out: Tensor
    top: Tensor
    total: Tensor


class Prepared(NamedTuple):
    """Outputs [first, last) of the group's weight with that index, in the form that a kernel needs. Only the kernel
    that prepared it looks inside."""

    first: int
    last: int
    tensors: tuple[Tensor, ...]
    weight: int = 0


class Place(Protocol):
    """The memory in which a weight is prepared. In a place that `stays`, prepared weights last until the unit is done;
    in another, the next piece may overwrite this one."""

    stays: bool
    arena_bytes: int

    def room(self, count: int, dtype: torch.dtype, *, behind: int = 0) -> Tensor:
        """`count` undefined elements, `behind` bytes after those that stay already."""

    def keep(self, nbytes: int) -> None:
        """Keep the next `nbytes`."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The settings that influence the choice of a kernel, besides the operation, its shape and the processor."""

    int8: frozenset[str] = frozenset()  # names of the weights whose products are of 8-bit integers
    bf16: frozenset[str] = frozenset()  # of those whose products may be of values rounded to bf16
    winograd: bool = False  # whether convolutions may be transformed
    one_size: bool = False  # inputs are whole and of one size: preparation may depend on it
    prefer: tuple[Kernel, ...] = ()  # asked before the table's


class Kernel(ABC):
    """A way to run an operation: `begin` does what needs no weights, `prepare` prepares the weights, `apply` computes.
    Shapes are those of the joined input; None stands for any shape.

    Everything also works on meta tensors, with `store` None, and then counts the memory it would take. When memory is
    planned, the kernel and memory of a weight are determined for each layer alone (without norm, epilogue or group);
    the answers must be the same, and a group's must be their sum.
    """

    name: str
    takes_resident = False  # whether it computes with an fp32 weight in memory as it lies there
    multiplies_in_place = False  # the same for a packed int8 weight
    rows_together = 1  # of an image's result: inputs should be cut at multiples of them
    enlarges = False  # whether `begun` takes lines of the small image where the input is one that is enlarged first

    @abstractmethod
    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        """Whether the kernel can run the operation and is worthwhile for that shape."""

    def held_bytes(self, op: Op, shape: Shape | None) -> int:
        """The size of the prepared weights."""
        return 4 * op.group.numel if op.weights else 0

    def beside_bytes(self, op: Op) -> int:
        """The part of `held_bytes` that is held even if the weights stay in memory: low-rank paths."""
        return 0

    def transient_bytes(self, op: Op, shape: Shape | None) -> int:
        """The memory needed in addition while the weights are being prepared."""
        return 0

    @abstractmethod
    def prepare(self, store: WeightStore | None, op: Op, shape: Shape, place: Place) -> Iterable[Prepared]:
        """Yield the weights in prepared pieces. For a place that stays, the caller may take all of them at once."""

    @abstractmethod
    def begin(self, op: Op, x: Operands) -> Operands:
        """Join, normalise, activate and quantise the input: everything before the weights are needed. The result, in
        `made`, serves every operation with this input, whatever its weights and epilogue."""

    def some(self, x: Operands) -> Some:
        """Attention to some of the keys, by a kernel of attention."""
        raise AssertionError(f"{self.name} computes no attention")

    @abstractmethod
    def apply(self, op: Op, x: Operands, prepared: Iterable[Prepared]) -> tuple[Tensor, ...]:
        """The result for each weight of the group, in new tensors; one for a `glu`. x: the result of `begin`. Must not
        depend on the number of samples."""


def input_shape(op: Op, parts: Sequence[Tensor]) -> tuple[int, ...]:
    """The joined input's shape."""
    if op.input.enlarged:
        return (*parts[0].shape[:2], *(2 * side for side in parts[0].shape[2:]))
    if len(parts) == 1 or op.kind is Kind.ATTENTION:
        return tuple(parts[0].shape)
    return (len(parts[0]), sum(part.shape[1] for part in parts), *parts[0].shape[2:])


def step_rows(store: WeightStore | None, row: int) -> int:
    """The number of outputs in a piece, if each output has `row` elements. Cuts are the same for held and streamed
    weights, so the arithmetic is the same."""
    return piece_rows(row, PIECE_ELEMENTS if store is None else store.piece_elements)


def weight_pieces(store: WeightStore, weight: Weight, elements: int | None = None) -> Iterator[tuple[int, Piece]]:
    """Yield the weight as it is read, up to `elements` at a time: the first output of each piece, and its rows in the
    store."""
    step = piece_rows(weight.row, min(elements or store.piece_elements, store.piece_elements))
    for first in range(0, weight.outputs, step):
        last = min(first + step, weight.outputs)
        yield first, Piece(weight.name, weight.first + first, weight.first + last)


def read_pieces(store: WeightStore, weight: Weight, place: Place) -> Iterator[tuple[int, int, Tensor]]:
    """Yield first, last + 1 and the rows in fp32 of each piece, all in the same buffer."""
    for first, piece in weight_pieces(store, weight):
        shape = piece.last - piece.first, *weight.meta.shape[1:]
        rows = place.room(math.prod(shape), torch.float32).view(shape)
        store.fetch(piece, rows)
        yield first, first + shape[0], rows
