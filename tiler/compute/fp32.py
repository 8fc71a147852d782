"""Everything in fp32 by torch's public operators: what every processor can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tiler.compute import onednn
from tiler.compute.kernels import (
    Kernel,
    Kind,
    Op,
    Operands,
    Place,
    Policy,
    Prepared,
    Shape,
    finished,
    output_shape,
    pieces,
    read_pieces,
    step_rows,
)
from tiler.weights.store import WeightStore


class Fp32(Kernel):
    """One sample's product at a time, of pieces cut at the same rows."""

    name = "fp32"
    takes_resident = True

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        return True

    def prepare(self, store: WeightStore | None, op: Op, shape: Shape, place: Place) -> Iterable[Prepared]:
        if store is None:
            return self._planned(op, shape, place)
        whole = store.resident.get(op.group.name)
        if whole is None or whole.dtype != torch.float32:
            if not place.stays:
                return (Prepared(first, last, (rows,)) for first, last, rows in read_pieces(store, op.group, place))
            whole = self._fetched(store, op, place)
        else:
            whole = whole[op.group.first : op.group.first + op.group.shape[0]]
        step, total = step_rows(store, op.group), len(whole)
        return [Prepared(i, min(i + step, total), (whole[i : i + step],)) for i in range(0, total, step)]

    def _fetched(self, store: WeightStore, op: Op, place: Place) -> Tensor:
        """The whole weight, which stays; a convolution's channels-last."""
        rows, *others = op.group.shape
        weight = place.room(op.group.numel, torch.float32).view(rows, *others[1:], others[0]).movedim(-1, 1)
        for piece in pieces(store, op.group):
            store.fetch(piece, weight[piece.first - op.group.first : piece.last - op.group.first])
        place.keep(weight.nbytes)
        return weight

    @staticmethod
    def _planned(op: Op, shape: Shape, place: Place) -> Iterator[Prepared]:
        step, total = min(step_rows(None, op.group), op.group.shape[0]), op.group.shape[0]
        alone = shape[0] == 1 and step == total
        planned = None  # counted: the piece in the arena
        if not place.stays and not alone:
            planned = torch.empty(step * op.group.row, device="meta")
        for first in range(0, total, step):
            last = min(first + step, total)
            yield Prepared(first, last, (op.group.meta if alone else op.group.meta[first:last],))
        del planned

    def empty(self, op: Op, x: Tensor, shape: Shape) -> Tensor:
        layout = torch.contiguous_format
        if op.kind is Kind.CONVOLUTION and onednn.prepacks():
            layout = torch.channels_last
        return torch.empty(output_shape(op, shape), device=x.device, memory_format=layout)

    def begin(self, op: Op, x: Operands) -> Operands:
        return x if op.kind is Kind.ATTENTION else super().begin(op, x)

    def apply(self, op: Op, x: Operands, prepared: Iterable[Prepared], out: Tensor) -> Tensor:
        if op.kind is Kind.ATTENTION:
            queries, keys, values = x.parts
            return F.scaled_dot_product_attention(queries, keys, values)
        (made,) = x.parts
        return finished(op, made, self._products(op, made, prepared, out), x.residual)

    def _products(self, op: Op, x: Tensor, prepared: Iterable[Prepared], out: Tensor) -> Tensor:
        axis, bias = (1 if op.kind is Kind.CONVOLUTION else -1), op.epilogue.bias
        for first, last, (rows,) in prepared:
            part = None if bias is None else bias[first:last]
            if len(x) == 1 and last - first == op.group.shape[0]:
                return self._product(op, x, rows, part)
            for i in range(1 if x.is_meta else len(x)):
                out[i : i + 1].narrow(axis, first, last - first).copy_(self._product(op, x[i : i + 1], rows, part))
        return out

    def _product(self, op: Op, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        if op.geometry is None:
            return F.linear(x, rows, bias)
        padding, stride, dilation, groups = op.geometry
        return F.conv2d(x, rows, bias, stride, padding, dilation, groups)


class Prepacked(Fp32):
    """Convolutions whose weights oneDNN has in its own order, once for all samples. A plain convolution reorders them at every
    call (1280 channels, 8 × 8: 46 ms beside 24)."""

    name = "onednn"
    holds_alone = False

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        return op.kind is Kind.CONVOLUTION and policy.one_size and shape is not None and onednn.prepacks()

    def prepare(self, store: WeightStore | None, op: Op, shape: Shape, place: Place) -> Iterable[Prepared]:
        if store is None:
            return self._planned(op, shape, place)
        assert op.geometry is not None
        geometry = op.geometry
        # oneDNN reorders from channels-last: cast into that at once (9.0 → 6.6 ms for 352 × 1280 × 3 × 3).
        return (
            Prepared(first, last, (onednn.reorder(rows, geometry, shape[2:]),))
            for first, last, rows in read_pieces(store, op.group, place, channels_last=True)
        )

    def _product(self, op: Op, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        if x.is_meta:
            return super()._product(op, x, rows, bias)
        assert op.geometry is not None
        return onednn.convolution(x, rows, bias, op.geometry)
