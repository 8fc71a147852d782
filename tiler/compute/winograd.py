"""3 × 3 convolutions with a quarter of the multiplications: Winograd's F(4 × 4, 3 × 3).

Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2015, arXiv:1509.09308): an output of 4 × 4 pixels is
Aᵀ[(G w Gᵀ) ⊙ (Bᵀ x B)]A of the 6 × 6 pixels x below it, the points of interpolation being 0, ±1, ±2 and infinity. Over
all channels and places the products in the middle are 36 matrix products. Rounding is 3e-6 of the result, a direct
convolution's 1e-6. Half oneDNN's time at 320 and at 640 channels with AVX-512, 0.4 of it with AVX2. Knows nothing of
files.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from tiler.compute.kernels import Kernel, Kind, Op, Operands, Place, Policy, Prepared, Shape, weight_pieces
from tiler.compute.onednn import Geometry, convolves
from tiler.compute.steps import finished, made_input
from tiler.compute.tuning import ARENA_BYTES
from tiler.compute.tuning import WINOGRAD_CHANNELS as CHANNELS
from tiler.compute.tuning import WINOGRAD_PLACES as PLACES
from tiler.weights.store import PIECE_ELEMENTS, WeightStore, piece_rows

SIDE, TILE = 4, 6  # of the outputs computed together, and of what they see
GROWTH = TILE * TILE // 9  # of a weight
_TRANSFORM_BYTES = 4 * (1 + GROWTH)  # of an element of a weight, transformed beside what it was

_G = torch.tensor([[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
                   [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]])  # fmt: skip


def suits(shape: Sequence[int], geometry: Geometry, channels: int | None = None) -> bool:
    """Whether a convolution with a weight of `shape`, of at least so many `channels`, can be computed in this way, and
    gains by it if its input is large enough."""
    return (
        tuple(shape[2:]) == (3, 3)
        and geometry.stride == geometry.dilation == (1, 1)
        and geometry.padding in ((1, 1), (0, 1))
        and geometry.groups == 1
        and min(shape[:2]) >= (channels or CHANNELS)
    )


def pays(height: int, width: int) -> bool:
    """Whether a result of that size is large enough."""
    return height * width >= PLACES * SIDE**2


def transform(taps: Tensor, out: Tensor) -> Tensor:
    """Fill `out` (36, in, n), the 36 by column, then row of the 6 × 6, from a weight's taps (3, 3, in, n), both
    fp32."""
    kernel = torch.einsum("ja,ib->jiba", _G, _G).reshape(TILE**2, 9)
    torch.mm(kernel, taps.view(9, -1), out=out.view(TILE**2, -1))
    return out


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, padding: int = 1) -> None:
    """Fill `out` (n, h, w) from x (in, h + 2 − 2·padding, w) and a transformed weight (36, in, n): fp32, fastest
    channels-last. There are `padding` rows of zeros above and below, and a column left and right."""
    pixels, filled = x.permute(1, 2, 0), out.permute(1, 2, 0)
    channels, (tall, wide) = len(x), (-(-n // SIDE) for n in out.shape[1:])
    over = -(-wide // -(-wide // PLACES))
    down = min(max(1, PLACES // over), tall)  # places at a time, rows and columns of them
    padded = x.new_empty(down * SIDE + 2, over * SIDE + 2, channels)
    by_rows = x.new_empty(TILE, down, over * SIDE + 2, channels)
    seen = x.new_empty(TILE, TILE, down, over, channels)
    # The last ones may be made twice: products are of one size.
    tops, lefts = ([min(i, n - k) for i in range(0, n, k)] for n, k in ((tall, down), (wide, over)))
    for top, left in itertools.product(tops, lefts):
        y, z = top * SIDE - padding, left * SIDE - 1
        rows, cols = slice(max(0, y), y + len(padded)), slice(max(0, z), z + padded.shape[1])
        inside = pixels[rows, cols]
        if inside.shape != padded.shape:
            padded.zero_()
        padded[rows.start - y :, cols.start - z :][: len(inside), : inside.shape[1]] = inside
        _input_transform([padded[i : i + (down - 1) * SIDE + 1 : SIDE] for i in range(TILE)], by_rows)
        _input_transform([by_rows[:, :, j : j + (over - 1) * SIDE + 1 : SIDE] for j in range(TILE)], seen)
        products = torch.bmm(seen.view(TILE**2, -1, channels), weight).view(TILE, TILE, down, over, -1)
        if bias is not None:
            products[1, 1] += bias  # Aᵀ of the second unit vector is 1 everywhere
        half = products.new_empty(SIDE, *products.shape[1:])
        _output_transform(products, half)
        part = filled[top * SIDE : (top + down) * SIDE, left * SIDE : (left + over) * SIDE]
        cut = part.shape[:2] != (down * SIDE, over * SIDE)
        whole = x.new_empty(down * SIDE, over * SIDE, len(out)) if cut else part
        _output_transform(
            half.unbind(1), whole.unflatten(1, (over, SIDE)).unflatten(0, (down, SIDE)).permute(1, 3, 0, 2, 4)
        )
        if cut:
            part.copy_(whole[: len(part), : part.shape[1]])


def _input_transform(x: Sequence[Tensor], out: Tensor) -> None:
    """Bᵀ x: six of the input's rows or columns → out (6, ...)."""
    even, odd = torch.sub(x[4], x[2], alpha=4), torch.sub(x[3], x[1], alpha=4)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.sub(x[4], x[2], out=even)
    torch.sub(x[3], x[1], out=odd)
    torch.add(even, odd, alpha=2, out=out[3])
    torch.sub(even, odd, alpha=2, out=out[4])
    for first, into in (0, out[0]), (1, out[5]):
        torch.sub(x[first + 4], x[first + 2], alpha=5, out=into).add_(x[first], alpha=4)


def _output_transform(m: Sequence[Tensor] | Tensor, out: Tensor) -> None:
    """Aᵀ m: six rows or columns of products → four of the output."""
    near, near_odd, far, far_odd = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    torch.add(m[0], near, out=out[0]).add_(far)
    torch.add(near_odd, far_odd, alpha=2, out=out[1])
    torch.add(near, far, alpha=4, out=out[2])
    torch.add(near_odd, far_odd, alpha=8, out=out[3]).add_(m[5])


class Winograd(Kernel):
    """Transformed weights are held complete if weights are held, else as far as the arena has room. The sum of a column
    of a matrix product does not depend on where the matrix is cut."""

    name = "winograd"
    rows_together = SIDE

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        """If an arena of the usual size has room for a weight and its transform, at any ceiling."""
        return (
            policy.winograd
            and op.kind is Kind.CONVOLUTION
            and op.geometry is not None
            and suits(op.group.shape, op.geometry)
            and _TRANSFORM_BYTES * op.group.numel <= ARENA_BYTES
            and (shape is None or pays(*op.output_shape(shape)[2:]))
        )

    def held_bytes(self, op: Op, shape: Shape | None) -> int:
        return 4 * GROWTH * op.group.numel

    def transient_bytes(self, op: Op, shape: Shape | None) -> int:
        return 4 * op.group.numel

    def prepare(self, store: WeightStore | None, op: Op, shape: Shape, place: Place) -> Iterator[Prepared]:
        (weight,) = op.group.weights
        most = PIECE_ELEMENTS if store is None else store.piece_elements
        elements = op.group.numel if place.stays else min(most, place.arena_bytes // _TRANSFORM_BYTES)
        total, inputs, *taps = op.group.shape
        step = total if place.stays else min(total, piece_rows(weight.row, elements))
        if store is None:
            count = 0 if place.stays else step * weight.row  # counted: the taps and what becomes of them
            planned = weight.meta.new_empty((1 + GROWTH) * count)
            yield Prepared(0, step, (weight.meta.new_empty(1).expand(TILE**2, inputs, step),))
            del planned
            return
        for start in range(0, total, step):
            rows = min(step, total - start)
            made = place.room(GROWTH * rows * weight.row, torch.float32)
            plane = place.room(rows * weight.row, torch.float32, behind=made.nbytes).view(*taps, inputs, rows)
            for first, piece in weight_pieces(store, weight, elements):
                if start <= first < start + rows:
                    store.fetch(piece, plane[..., first - start :][..., : piece.last - piece.first].permute(3, 2, 0, 1))
            made = transform(plane, made.view(-1, inputs, rows))
            place.keep(made.nbytes)
            yield Prepared(start, start + rows, (made,))

    def begin(self, op: Op, x: Operands) -> Operands:
        return x._replace(parts=(), made=made_input(op.input, x.parts))

    def apply(self, op: Op, x: Operands, prepared: Iterable[Prepared]) -> tuple[Tensor, ...]:
        assert op.geometry is not None
        (weight,), made = op.group.weights, x.made
        layout = torch.channels_last if convolves() else torch.contiguous_format
        out = torch.empty(op.output_shape(made.shape), device=made.device, memory_format=layout)
        for first, last, (transformed,), _ in prepared:
            part = None if weight.bias is None else weight.bias[first:last]
            for sample, filled in zip(made, out, strict=True):
                conv2d(sample, transformed, part, filled[first:last], op.geometry.padding[0])
        return finished(op.epilogue, [out], x.residual)
