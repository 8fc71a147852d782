"""Low-rank paths beside int8 weights, `up · (down · input)`, in int8 too.

`down` is multiplied by the quantised input that the weight takes. The result, the lines, is quantised again with a
scale for each row, and the product that follows adds `up · lines` before its bias. The scale of each row of `down` is
moved to a column of `up`, so that the lines have comparable sizes wherever the factors come from. The error of the
path, about 2 % of what it adds where weights are limited (int8.py), is bounded in tests/compute/test_layers.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tiler.compute.int8 import quantize_rows
from tiler.compute.kernels import Group, Op, Prepared, Weight
from tiler.compute.native_inputs import Quantized, address, needed_library
from tiler.native import library
from tiler.weights.blocks import INPUTS, OUTPUTS, blocked
from tiler.weights.rotation import rotate_

Weights = tuple[Weight, ...]
"""The weights of one result: several if one of them has the gates."""


class Beside(NamedTuple):
    """The path beside the weights of result `number`, of which only the way back is left to compute: the lines, (rows,
    rank), and `up` with its scales and sums, (outputs,), gates last."""

    number: int
    lines: Quantized
    up: Tensor
    scale: Tensor
    sums: Tensor


def rank_of(weights: Weights) -> int:
    """The rank of the path beside the weights, each filled up to whole blocks; 0 without one."""
    return sum(-(-weight.low_rank.rank // OUTPUTS) * OUTPUTS for weight in weights if weight.low_rank is not None)


def factor_bytes(weights: Weights) -> int:
    """The memory of the prepared factors beside the weights of one result: int8 values, and a scale and a sum for each
    row."""
    if not (rank := rank_of(weights)):
        return 0
    outputs = sum(weight.outputs for weight in weights)
    return rank * (weights[0].row + outputs) + 8 * (rank + outputs)


def making_bytes(weights: Weights) -> int:
    """The most memory that `factors` takes in addition: three copies of the factors in fp32."""
    return 3 * 4 * rank_of(weights) * (weights[0].row + sum(weight.outputs for weight in weights))


def factors(weights: Weights, number: int, *, rotated: bool) -> Prepared:
    """The path beside the weights of result `number`, as a piece without outputs: `down`, then `up`, as rows in blocks
    with their scales and sums. If `rotated`, for inputs that are."""
    downs, ups = zip(*map(_loaded, weights), strict=True)
    down, up = (downs[0], ups[0]) if len(weights) == 1 else (torch.cat(downs), torch.block_diag(*ups))
    rows, scale = quantize_rows(rotate_(down) if rotated else down)
    # A row of zeros has a scale that would outweigh the others in `up`.
    scale = scale.masked_fill(rows.flatten(1).abs().amax(1) == 0, 0)
    return Prepared(0, 0, (*_in_blocks(rows, torch.ones_like(scale)), *_in_blocks(*quantize_rows(up * scale))), number)


def _loaded(weight: Weight) -> tuple[Tensor, Tensor]:
    """`down` and `up` with zeros up to whole blocks; of rank 0 without a path."""
    inputs = weight.meta.shape[1:]
    if weight.low_rank is None:
        return torch.empty(0, *inputs), torch.empty(weight.outputs, 0)
    down, up = weight.low_rank.load()
    missing = rank_of((weight,)) - len(down)
    return torch.cat([down, down.new_zeros(missing, *inputs)]), torch.cat([up, up.new_zeros(len(up), missing)], dim=1)


def _in_blocks(rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = blocked(rows)
    return values, scale, sums_of(values, len(rows))


def sums_of(values: Tensor, outputs: int) -> Tensor:
    """The sum of each output's values, (outputs,) int32. values: int8 in blocks."""
    sums = torch.empty(outputs, dtype=torch.int32)
    lanes = values.numel() // (outputs * INPUTS)
    call = library.Sums(values.data_ptr(), outputs // OUTPUTS, lanes, sums.data_ptr())
    needed_library().sums(call, torch.get_num_threads())
    return sums


def way_down(op: Op, rank: int) -> Op:
    """The product that makes the lines, of the operation's input as it is made."""
    weight = op.group.weights[0]
    down = Weight(name=weight.name, meta=weight.meta[:1].expand(rank, *weight.meta.shape[1:]))
    return Op(kind=op.kind, weights=Group(weights=(down,)), geometry=op.geometry)


def product_beside(beside: Beside, first: int, outputs: int, *, gated: bool) -> library.Product:
    """The way back to `outputs` from `first` on, and to their gates if there are any. The path must stay alive until
    the call is done."""
    values, scale, zero = beside.lines
    rank, gates = values.shape[1], first + len(beside.scale) // 2
    call = library.Product(
        kind=library.Kind.INT8, taps=1, outputs=outputs, steps=rank // INPUTS, a=values.data_ptr(), row_bytes=rank,
        scale=scale.data_ptr(), zero=zero.data_ptr(), scale_rows=1, weights=address(beside.up, first * rank),
        weight_scale=address(beside.scale, first), weight_sum=address(beside.sums, first),
    )  # fmt: skip
    if gated:
        call.gate_weights = address(beside.up, gates * rank)
        call.gate_scale, call.gate_sum = address(beside.scale, gates), address(beside.sums, gates)
    return call
