"""fp32 arithmetic with torch's public operators, which every processor supports."""

from __future__ import annotations

import math
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
    Some,
    Weight,
    read_pieces,
    step_rows,
    weight_pieces,
)
from tiler.compute.steps import finished, made_input, product
from tiler.weights.store import WeightStore


class Fp32(Kernel):
    """Computes the product of one sample at a time, with pieces of the weight cut at fixed rows."""

    name = "fp32"
    takes_resident = True

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        return True

    def prepare(self, store: WeightStore | None, op: Op, shape: Shape, place: Place) -> Iterator[Prepared]:
        for number, weight in enumerate(op.group.weights):
            pieces = (
                self._planned(weight, shape, place) if store is None else self._pieces(store, op, weight, shape, place)
            )
            for first, last, rows in pieces:
                yield Prepared(first, last, (rows,), number)

    def _pieces(
        self, store: WeightStore, op: Op, weight: Weight, shape: Shape, place: Place
    ) -> Iterable[tuple[int, int, Tensor]]:
        """Yield first, last + 1 and the rows of each piece of a weight."""
        whole = store.resident.get(weight.name)
        if whole is None or whole.dtype != torch.float32:
            if not place.stays:
                return read_pieces(store, weight, place)
            whole = self._fetched(store, weight, place)
        else:
            whole = whole[weight.first : weight.first + weight.outputs]
        step, total = step_rows(store, weight.row), weight.outputs
        return [(i, min(i + step, total), whole[i : i + step]) for i in range(0, total, step)]

    def _fetched(self, store: WeightStore, weight: Weight, place: Place) -> Tensor:
        """The complete weight, which stays; a convolution's is channels-last."""
        rows, *others = weight.meta.shape
        whole = place.room(weight.meta.numel(), torch.float32).view(rows, *others[1:], others[0]).movedim(-1, 1)
        for first, piece in weight_pieces(store, weight):
            store.fetch(piece, whole[first : first + piece.last - piece.first])
        place.keep(whole.nbytes)
        return whole

    @staticmethod
    def _planned(weight: Weight, shape: Shape, place: Place) -> Iterator[tuple[int, int, Tensor]]:
        total = weight.outputs
        step = min(step_rows(None, weight.row), total)
        alone = shape[0] == 1 and step == total
        planned = None  # counted: the piece in the arena
        if not place.stays and not alone:
            planned = torch.empty(step * weight.row, device="meta")
        for first in range(0, total, step):
            last = min(first + step, total)
            yield first, last, weight.meta if alone else weight.meta[first:last]
        del planned

    def begin(self, op: Op, x: Operands) -> Operands:
        if op.kind is Kind.ATTENTION:
            return x
        return x._replace(parts=(), made=made_input(op.input, x.parts))

    def apply(self, op: Op, x: Operands, prepared: Iterable[Prepared]) -> tuple[Tensor, ...]:
        if op.kind is Kind.ATTENTION:
            queries, keys, values = x.parts
            return (F.scaled_dot_product_attention(queries, keys, values),)
        products = self._products(op, x.made, prepared)
        return finished(op.epilogue, products, x.residual)

    def some(self, x: Operands) -> Some:
        queries, keys, values = x.parts
        scores = (queries * (math.log2(math.e) / math.sqrt(queries.shape[-1]))) @ keys.transpose(-1, -2)
        top = scores.amax(-1, keepdim=True)
        powers = scores.sub_(top).exp2_()
        total = powers.sum(-1, keepdim=True)
        return Some((powers @ values).div_(total), top, total)

    def _products(self, op: Op, x: Tensor, prepared: Iterable[Prepared]) -> list[Tensor]:
        axis, outs = (1 if op.kind is Kind.CONVOLUTION else -1), {}
        for first, last, (rows,), number in prepared:
            weight = op.group.weights[number]
            bias = None if weight.bias is None else weight.bias[first:last]
            if len(x) == 1 and last - first == weight.outputs:
                outs[number] = self._product(op, x, rows, bias)
                continue
            if number not in outs:
                outs[number] = self._empty(op, x, weight)
            for i in range(1 if x.is_meta else len(x)):
                part = self._product(op, x[i : i + 1], rows, bias)
                outs[number][i : i + 1].narrow(axis, first, last - first).copy_(part)
        return [outs[number] for number in range(len(op.group.weights))]

    @staticmethod
    def _empty(op: Op, x: Tensor, weight: Weight) -> Tensor:
        layout = torch.contiguous_format
        if op.kind is Kind.CONVOLUTION and onednn.convolves():
            layout = torch.channels_last
        return torch.empty(op.output_shape(x.shape, weight.outputs), device=x.device, memory_format=layout)

    def _product(self, op: Op, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        if op.geometry is None:
            return product(x, rows, bias)
        return onednn.plain_convolution(x, rows, bias, op.geometry)
