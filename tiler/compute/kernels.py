"""An operation as data, and what a kernel has to answer to run it.

An `Op` says all of it: how its input is put together, normalised and activated, which weights it takes, and what follows
the product. A kernel takes as much of that in one go as it can; the functions at the end do the rest step by step. Kernels
are chosen by choose.py; the streamer (stream.py) owns the memory that they prepare weights in.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiler.compute.onednn import Geometry
from tiler.weights.store import PIECE_ELEMENTS, Piece, WeightStore, piece_rows

Shape = Sequence[int]


class Kind(StrEnum):
    LINEAR = "linear"
    CONVOLUTION = "convolution"
    ATTENTION = "attention"


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """The weights of an operation: the tensor's name in the store, and its shape (outputs, inputs, *taps) on the meta device;
    `first` is the tensor's row where they begin, if they are a part of it."""

    name: str
    meta: Tensor
    first: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.meta.shape)

    @property
    def row(self) -> int:
        """Elements of what makes one output."""
        return math.prod(self.shape[1:])

    @property
    def numel(self) -> int:
        return self.meta.numel()


@dataclass(frozen=True, kw_only=True)
class Input:
    """`parts` tensors are joined along channels, then normalised, then activated."""

    parts: int = 1
    norm: nn.Module | None = None
    activation: nn.Module | None = None


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What follows the product, in this order: bias (outputs,), the low-rank path `up · (down · input)` from (down (rank, in),
    up (outputs, rank)), `activation` or GEGLU (first half × gelu(second half)), and the residual that comes with the input."""

    bias: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    activation: nn.Module | None = None
    geglu: bool = False
    residual: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Op:
    """One operation. Attention has no weights; its parts are queries, keys and values, (n, heads, tokens, width) each."""

    kind: Kind
    weights: Group | None = None
    geometry: Geometry | None = None  # of a convolution
    input: Input = field(default_factory=Input)
    epilogue: Epilogue = field(default_factory=Epilogue)

    @property
    def group(self) -> Group:
        assert self.weights is not None, self.kind
        return self.weights


class Operands(NamedTuple):
    """What an operation is applied to. `shared` is what the kernel's `share` made of the parts, if that was done before."""

    parts: tuple[Tensor, ...]
    residual: Tensor | None = None
    shared: Any = None


class Prepared(NamedTuple):
    """Outputs [first, last) of a weight as a kernel computes with them."""

    first: int
    last: int
    tensors: tuple[Tensor, ...]


class Place(Protocol):
    """Where a weight is prepared. What is prepared in a place that `stays` lasts until its unit is done; elsewhere the next
    piece may overwrite this one."""

    stays: bool
    arena_bytes: int

    def room(self, count: int, dtype: torch.dtype, *, behind: int = 0) -> Tensor:
        """`count` undefined elements, `behind` bytes after what stays already."""

    def keep(self, nbytes: int) -> None:
        """The next `nbytes` stay."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What decides between kernels beside the operation, its shape and the processor."""

    int8: frozenset[str] = frozenset()  # names of the weights whose products are of 8-bit integers
    winograd: bool = False  # whether convolutions may be transformed
    one_size: bool = False  # inputs are whole and of one size: preparation may depend on it
    prefer: tuple[Kernel, ...] = ()  # asked before the table's


class Kernel(ABC):
    """How an operation runs. Shapes are those of the joined input; None stands for any. Everything works on meta tensors, with
    `store` None, and then counts what it would take."""

    name: str
    in_arena = True  # whether what it prepares lies in the arena, or beside it
    takes_resident = False  # whether it computes with an fp32 weight in memory as it lies there
    rows_together = 1  # of an image: inputs should be cut at multiples of them
    holds_alone = True  # whether a layer that runs by itself gains by having its weight held for all samples

    @abstractmethod
    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        """Whether it can run the operation, with gain for that shape."""

    def held_bytes(self, op: Op, shape: Shape | None) -> int:
        """What the prepared weights take."""
        return 4 * op.group.numel if op.weights else 0

    def transient_bytes(self, op: Op, shape: Shape | None) -> int:
        """What is needed beside them while they are being prepared."""
        return 0

    def flops(self, op: Op, shape: Shape) -> int:
        """The operation's arithmetic, two for each multiply-add, as if no kernel saved any."""
        if op.kind is Kind.ATTENTION:
            return 4 * math.prod(shape) * shape[-2]
        channel = 1 if op.kind is Kind.CONVOLUTION else -1
        places = math.prod(output_shape(op, shape)) // output_shape(op, shape)[channel]
        return 2 * places * op.group.numel

    @abstractmethod
    def prepare(self, store: WeightStore | None, op: Op, shape: Shape, place: Place) -> Iterable[Prepared]:
        """The weights in pieces; for a place that stays, all of them at once may be asked for."""

    def empty(self, op: Op, x: Tensor, shape: Shape) -> Tensor:
        """What `apply` fills for a joined input of `shape` like `x`."""
        return torch.empty(output_shape(op, shape), device=x.device)

    def share(self, op: Op, parts: tuple[Tensor, ...]) -> Any:
        """What several operations on the same parts can make once; None where there is nothing."""
        return None

    def begin(self, op: Op, x: Operands) -> Operands:
        """What is done before weights are fetched: the whole input, by a kernel that does not fuse it."""
        return x._replace(parts=(made_input(op, x.parts),))

    @abstractmethod
    def apply(self, op: Op, x: Operands, prepared: Iterable[Prepared], out: Tensor) -> Tensor:
        """The result: `out` filled, or the operator's own tensor. Never depends on how many samples `x` holds."""


def output_shape(op: Op, shape: Shape) -> tuple[int, ...]:
    """The product's shape: of (n, in, h, w) for a convolution, (..., in) for a linear layer."""
    if op.kind is Kind.ATTENTION:
        return tuple(shape)
    if op.geometry is None:
        return (*shape[:-1], op.group.shape[0])
    padding, stride, dilation, _ = op.geometry
    taps = op.group.shape[2:]
    sides = zip(shape[2:], padding, dilation, taps, stride, strict=True)
    return (shape[0], op.group.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sides))


def input_shape(op: Op, parts: Sequence[Tensor]) -> tuple[int, ...]:
    """The joined input's shape."""
    if len(parts) == 1 or op.kind is Kind.ATTENTION:
        return tuple(parts[0].shape)
    return (len(parts[0]), sum(part.shape[1] for part in parts), *parts[0].shape[2:])


def step_rows(store: WeightStore | None, group: Group) -> int:
    """Outputs of a piece: the same cuts held or streamed, so the arithmetic is the same."""
    return piece_rows(group.row, PIECE_ELEMENTS if store is None else store.piece_elements)


def pieces(store: WeightStore, group: Group) -> list[Piece]:
    """The group's rows of its tensor, cut as they are read."""
    step, end = step_rows(store, group), group.first + group.shape[0]
    return [Piece(group.name, first, min(first + step, end)) for first in range(group.first, end, step)]


def read_pieces(
    store: WeightStore, group: Group, place: Place, dtype: torch.dtype = torch.float32, *, channels_last: bool = False
) -> Iterator[tuple[int, int, Tensor]]:
    """First, last + 1 and the rows themselves in fp32 or int8, piece by piece in the same room."""
    for piece in pieces(store, group):
        shape = piece.last - piece.first, *group.shape[1:]
        rows = place.room(math.prod(shape), dtype)
        rows = rows.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if channels_last else rows.view(shape)
        store.fetch(piece, rows)
        yield piece.first - group.first, piece.last - group.first, rows


def made_input(op: Op, parts: tuple[Tensor, ...]) -> Tensor:
    """The parts joined, normalised and activated, step by step."""
    x = joined(parts)
    if op.input.norm is not None:
        x = normed(op.input.norm, x)
    if op.input.activation is not None:
        # In place only where the tensor is ours.
        x = activated(op.input.activation, x.clone() if x is parts[0] else x)
    return x


def finished(op: Op, x: Tensor, out: Tensor, residual: Tensor | None) -> Tensor:
    """`out` with all that follows the bias, step by step; x: the input of the product."""
    after = op.epilogue
    if after.low_rank is not None:
        down, up = after.low_rank
        out += F.linear(F.linear(x, down), up)
    if after.geglu:
        hidden, gate = out.chunk(2, dim=-1)
        out = hidden * F.gelu(gate)
    elif after.activation is not None:
        out = activated(after.activation, out)
    if residual is not None:
        out += residual
    return out


def joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """A GroupNorm of each sample by itself: of several, torch cuts its sums between threads where that depends on their number."""
    if len(x) == 1:
        first: Tensor = norm(x)
        return first
    out = torch.empty_like(x)
    for sample, filled in zip(x.split(1), out.split(1), strict=True):
        filled.copy_(norm(sample))
    return out


def activated(act: nn.Module, x: Tensor) -> Tensor:
    """`x` activated in place, each sample by itself: torch computes the last few values of a thread's share in another way,
    and shares depend on the number of samples."""
    for sample in x.split(1):
        if isinstance(act, nn.SiLU):
            F.silu(sample, inplace=True)
        else:
            sample.copy_(act(sample))
    return x
