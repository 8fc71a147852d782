"""3 × 3 convolutions in fp32 with a quarter of the multiplications, by tiler's own library
(tiler/native/winograd.h).

The rounding error is 3e-7 of the result; a direct convolution's is 2e-7. The result for a tile of 4 × 4 pixels does not
depend on other tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tiler.compute import shapes
from tiler.compute.kernels import Op, Operands, Place, Policy, Prepared, Shape
from tiler.compute.native import Made, empty_result, residual_like
from tiler.compute.native_float import NativeFp32, pack
from tiler.compute.native_inputs import address, needed_library
from tiler.compute.steps import finished
from tiler.compute.tuning import (
    ARENA_BYTES,
    NATIVE_WINOGRAD_BF16_CHANNELS,
    NATIVE_WINOGRAD_CHANNELS,
    NATIVE_WINOGRAD_PIXELS,
)
from tiler.compute.winograd import suits as can_transform
from tiler.native import library
from tiler.native.library import WINOGRAD_POINTS, WINOGRAD_SIDE, WINOGRAD_TILES
from tiler.weights.blocks import OUTPUTS
from tiler.weights.store import WeightStore


class NativeWinograd(NativeFp32):
    """`points` are the products of a tile, `seen` the values that they multiply."""

    name = "native-winograd"
    rows_together = WINOGRAD_SIDE
    transforms_before = True  # weights when they are read, not at each call
    points, seen = WINOGRAD_POINTS, WINOGRAD_POINTS

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        """Whether the kernel can run the operation. An arena of the usual size must have room for the transformed
        weight, whatever the memory ceiling."""
        return self._can_transform(op, shape, policy) and self.held_bytes(op, shape) <= ARENA_BYTES

    def _can_transform(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        return (
            policy.winograd
            and super().suits(op, shape, policy)
            and op.geometry is not None
            and len(op.group.weights) == 1
            and can_transform(op.group.shape, op.geometry, _least_channels(op, policy))
            and (shape is None or math.prod(op.output_shape(shape)[2:]) >= NATIVE_WINOGRAD_PIXELS)
        )

    def held_bytes(self, op: Op, shape: Shape | None) -> int:
        return 4 * self.points * op.group.numel // 9 // self.values_a_lane

    def _steps(self, store: WeightStore | None, op: Op, place: Place) -> range:
        """The first outputs of the weight's pieces, whose size fits the arena."""
        total, point_bytes = op.group.shape[0], 4 * self.points * op.group.shape[1] // self.values_a_lane
        rows = total if place.stays else min(total, max(OUTPUTS, place.arena_bytes // point_bytes // OUTPUTS * OUTPUTS))
        return range(0, total, rows)

    def _planned(self, op: Op, place: Place) -> Iterator[Prepared]:
        (weight,), steps = op.group.weights, self._steps(None, op, place)
        rows = 0 if place.stays else min(steps.step, weight.outputs)
        planned = weight.meta.new_empty(self.points * op.group.shape[1] * rows // self.values_a_lane)
        yield Prepared(0, weight.outputs, ())
        del planned

    def _fetched(self, store: WeightStore, op: Op, place: Place) -> Iterator[Prepared]:
        (weight,), steps, lanes = (
            op.group.weights,
            self._steps(store, op, place),
            op.group.shape[1] // self.values_a_lane,
        )
        for first in steps:
            last = min(first + steps.step, weight.outputs)
            points = place.room(self.points * lanes * (last - first), torch.float32).view(self.points, -1)
            place.keep(points.nbytes)
            some = replace(weight, first=weight.first + first, meta=weight.meta[first:last])
            pack(store, some, points, self.kind, point_bytes=points[0].nbytes, enlarged=self.enlarges)
            yield Prepared(first, last, (points,))

    def apply(self, op: Op, x: Operands, prepared: Iterable[Prepared]) -> tuple[Tensor, ...]:
        made: Made = x.made
        out = empty_result(op, made, op.group.shape[0]) if x.out is None else x.out
        residual = residual_like(out, x.residual) if op.epilogue.activation is None else None
        if out.is_meta:
            shapes.count(op.flops(made.shape), linear=False)
        for piece in prepared:
            self._convolve(op, made, piece, out, residual)
        return (out,) if residual is not None else finished(op.epilogue, (out,), x.residual)

    def _convolve(self, op: Op, made: Made, piece: Prepared, out: Tensor, residual: Tensor | None) -> None:
        images, first, outputs = made.input.values, piece.first, piece.last - piece.first
        count, lines, places, channels = images.shape
        seen = images.new_empty(self.seen * WINOGRAD_TILES * channels // self.values_a_lane)
        products = images.new_empty(self.points * WINOGRAD_TILES * outputs)
        if out.is_meta:
            return
        (points,), (weight,) = piece.tensors, op.group.weights
        call = library.Winograd(
            kind=self.kind, enlarged=self.enlarges, images=count, lines=lines, places=places, channels=channels,
            height=out.shape[2], width=out.shape[3], outputs=outputs, a=images.data_ptr(), image_step=images.stride(0),
            weights=points.data_ptr(), point_bytes=points[0].nbytes if self.transforms_before else 0,
            bias=address(weight.bias, first), residual=address(residual, first), out=address(out, first),
            out_step=out.shape[1], residual_step=out.shape[1], seen=seen.data_ptr(), products=products.data_ptr(),
        )  # fmt: skip
        needed_library().winograd(call, torch.get_num_threads())


class NativeWinogradLate(NativeWinograd):
    """The same convolutions, with the same bits, where an arena has no room for the transformed weight: it is held as
    for a direct convolution, and each call transforms it."""

    name = "native-winograd-late"
    transforms_before = False

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        return self._can_transform(op, shape, policy)

    held_bytes, _planned, _fetched = NativeFp32.held_bytes, NativeFp32._planned, NativeFp32._fetched


class NativeWinogradBf16(NativeWinograd):
    """The same convolutions with the transformed values rounded to bf16 and sums in fp32."""

    name = "native-winograd-bf16"
    kind, values_a_lane = library.Kind.BF16, 2

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        if op.weights is None or not policy.bf16.issuperset(op.weights.names):
            return False
        return library.has_bf16() and super().suits(op, shape, policy)


def _least_channels(op: Op, policy: Policy) -> int:
    """The least inputs and outputs of a convolution that is transformed: more where bf16 would be the alternative."""
    return NATIVE_WINOGRAD_BF16_CHANNELS if policy.bf16.issuperset(op.group.names) else NATIVE_WINOGRAD_CHANNELS
