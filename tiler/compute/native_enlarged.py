"""3 × 3 convolutions of images that are enlarged first, both sides doubled by nearest neighbours, as four 2 × 2
convolutions of the images themselves: one for the places of the result with an even line and an even place, and so on.
Weights that meet the same pixel are added up as they are prepared, so there are 4/9 of the multiplications.

In bf16 only, which takes the weights of int8 files too: rounded to int8 once more, a call of SD 1.5 lost 1.46 % instead
of 1.40. In fp32 transformed convolutions (native_winograd_enlarged.py) save more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tiler.compute import shapes
from tiler.compute.kernels import (
    Epilogue,
    Input,
    Op,
    Operands,
    Place,
    Policy,
    Prepared,
    Shape,
    input_shape,
    step_rows,
    weight_pieces,
)
from tiler.compute.native import Made, empty_result
from tiler.compute.native_float import PACKED_ELEMENTS, NativeBf16
from tiler.compute.native_inputs import Quantized, address, needed_library, quantize_images
from tiler.compute.onednn import Geometry
from tiler.native import library
from tiler.native.library import Type
from tiler.weights.blocks import OUTPUTS
from tiler.weights.store import WeightStore

_GEOMETRY = Geometry((1, 1), (1, 1), (1, 1), 1)
_TAPS, _PARITIES = 4, 4
_GROWTH = _TAPS * _PARITIES  # weights of an input and an output, instead of 9


def can_run(op: Op) -> bool:
    """Whether the operation is such a convolution and nothing else."""
    return (
        op.input == Input(enlarged=True)
        and op.epilogue == Epilogue()
        and op.geometry == _GEOMETRY
        and op.group.shape[2:] == (3, 3)
        and len(op.group.weights) == 1
        and op.group.weights[0].low_rank is None
    )


class EnlargedBf16(NativeBf16):
    name = "native-enlarged-bf16"

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        if op.weights is None or not can_run(op):
            return False
        return super().suits(op, shape, replace(policy, bf16=policy.bf16 | policy.int8))

    def held_bytes(self, op: Op, shape: Shape | None) -> int:
        return super().held_bytes(op, shape) // 9 * _GROWTH

    def _planned(self, op: Op, place: Place) -> Iterator[Prepared]:
        (weight,) = op.group.weights
        most = 0 if place.stays else min(weight.outputs, step_rows(None, weight.row))
        planned = weight.meta.new_empty(most * weight.row // 9 * _GROWTH // self.values_a_lane)
        beside = weight.meta.new_empty(min(PACKED_ELEMENTS, op.group.numel) * (9 + _GROWTH) // 9)
        yield Prepared(0, weight.outputs, ())
        del planned, beside

    def _fetched(self, store: WeightStore, op: Op, place: Place) -> Iterator[Prepared]:
        (weight,), inputs = op.group.weights, op.group.shape[1]
        step = weight.outputs if place.stays else step_rows(store, weight.row)
        for first in range(0, weight.outputs, step):
            last = min(first + step, weight.outputs)
            lanes = place.room(_GROWTH * inputs * (last - first) // self.values_a_lane, torch.float32)
            lanes = lanes.view(_PARITIES, -1)
            place.keep(lanes.nbytes)
            block = lanes[0].nbytes * OUTPUTS // (last - first)
            some = replace(weight, first=weight.first + first, meta=weight.meta[first:last])
            for number, piece in weight_pieces(store, some, PACKED_ELEMENTS):
                rows = torch.empty(piece.last - piece.first, *weight.meta.shape[1:])
                store.fetch(piece, rows)
                for parity, taps in enumerate(_by_parity(rows)):
                    call = library.Pack(
                        kind=self.kind, outputs=len(rows), inputs=inputs, taps=_TAPS, rows=taps.data_ptr(),
                        out=lanes[parity].data_ptr() + number // OUTPUTS * block,
                    )  # fmt: skip
                    needed_library().pack(call, torch.get_num_threads())
            yield Prepared(first, last, (lanes,))

    def begin(self, op: Op, x: Operands) -> Operands:
        values = quantize_images(x.parts, _GEOMETRY.padding, None, silu=False, out_type=Type.BF16).values
        return x._replace(parts=(), made=Made(Quantized(values, values, values), input_shape(op, x.parts)))

    def apply(self, op: Op, x: Operands, prepared: Iterable[Prepared]) -> tuple[Tensor, ...]:
        made: Made = x.made
        out = empty_result(op, made, op.group.shape[0])
        if out.is_meta:
            shapes.count(op.flops(made.shape), linear=False)
        for piece in prepared:
            for parity in range(_PARITIES if not out.is_meta else 0):
                weights = piece.tensors[0][parity]
                steps = op.group.shape[1] // self.values_a_lane
                call = library.Product(kind=self.kind, steps=steps, weights=weights.data_ptr())
                _multiply(op, call, made.input.values, piece, parity, out)
        return (out,)


def _by_parity(rows: Tensor) -> Iterator[Tensor]:
    """Rows (n, inputs, 3, 3) fp32 → (n, inputs, 2, 2) for each parity of line and place."""

    def merged(x: Tensor, dim: int, parity: int) -> Tensor:
        first, second, third = x.unbind(dim)
        pair = (first, second + third) if parity == 0 else (first + second, third)
        return torch.stack(pair, dim)

    return (merged(merged(rows, 2, i), 3, j) for i in (0, 1) for j in (0, 1))


def _multiply(op: Op, call: library.Product, images: Tensor, piece: Prepared, parity: int, out: Tensor) -> None:
    """Fill the places of that parity of the piece's outputs. images: (n, h + 2, w + 2, inputs), with a frame."""
    image, line, place = (step * images.element_size() for step in images.stride()[:3])
    count, height, width = len(images), images.shape[1] - 2, images.shape[2] - 2
    channels, (down, across) = out.shape[1], divmod(parity, 2)
    taps = (ctypes.c_int64 * _TAPS)(*((down + i) * line + (across + j) * place for i in (0, 1) for j in (0, 1)))
    call.out_type, call.taps, call.tap = Type.FP32, _TAPS, ctypes.addressof(taps)
    call.rows, call.outputs = count * height * width, piece.last - piece.first
    call.a, call.image_bytes, call.line_bytes, call.place_bytes = images.data_ptr(), image, line, place
    call.per_image = call.scale_rows = height * width
    call.width, call.zero_step = width, 1
    call.bias = address(op.group.weights[0].bias, piece.first)
    call.out = address(out, (down * 2 * width + across) * channels + piece.first)
    call.out_width, call.out_step, call.out_line = width, 2 * channels, 4 * width * channels
    needed_library().product(call, torch.get_num_threads())
