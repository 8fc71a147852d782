"""Products in fp32, and of values rounded to bf16, by tiler's own library, with the same loop and the same rows as for
int8. Weights are rearranged for the library as they are read, a few rows at a time.

Every output is computed by one loop in a fixed order, so the bytes do not depend on threads, samples, or how weights
are cut. Knows nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tiler.compute import cpu, shapes
from tiler.compute.kernels import (
    Input,
    Kernel,
    Kind,
    Op,
    Operands,
    Place,
    Policy,
    Prepared,
    Shape,
    Weight,
    input_shape,
    step_rows,
    weight_pieces,
)
from tiler.compute.native import (
    Made,
    activation_of,
    empty_result,
    gated,
    is_fused,
    is_of_pixels,
    multiply,
    product_call,
    residual_like,
    together,
)
from tiler.compute.native_inputs import Quantized, needed_library, quantize_images, quantize_tokens
from tiler.compute.steps import finished, made_input
from tiler.compute.tuning import KERNELS_OF
from tiler.native import library
from tiler.native.library import Activation, Type
from tiler.weights.blocks import OUTPUTS
from tiler.weights.store import WeightStore

PACKED_ELEMENTS = 2**19  # weight elements packed at a time: 2 MB of fp32 beside the arena. A choice, no measurement
# Rows of a sample: with fewer, packing a weight takes as long as the product. A choice, no measurement.
FEW_ROWS = 8


def packs_layers() -> bool:
    """Whether the library computes fp32 layers, so that their weights are rearranged as they are read."""
    return library.library() is not None and NativeFp32.name in KERNELS_OF[cpu.isa()][Kind.LINEAR]


class NativeFp32(Kernel):
    """Products in fp32; equal to torch's within rounding."""

    name = "native-fp32"
    kind, out_type, dtype, values_a_lane = library.Kind.FP32, Type.FP32, torch.float32, 1

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        if op.weights is None or library.library() is None:
            return False
        outputs, inputs = op.group.shape[:2]
        whole = all(w.outputs % OUTPUTS == 0 for w in op.group.weights) and inputs % self.values_a_lane == 0
        if op.geometry is None:
            return whole and (shape is None or math.prod(shape[1:-1]) >= FEW_ROWS)
        is_plain = op.geometry.groups == 1 and op.geometry.dilation == (1, 1) and outputs >= OUTPUTS
        return whole and is_plain and math.prod(op.group.shape[2:]) <= library.MOST_TAPS

    def held_bytes(self, op: Op, shape: Shape | None) -> int:
        return 4 * op.group.numel // self.values_a_lane

    def prepare(self, store: WeightStore | None, op: Op, shape: Shape, place: Place) -> Iterable[Prepared]:
        pieces = self._planned(op, place) if store is None else self._fetched(store, op, place)
        return list(pieces) if place.stays else pieces

    def _planned(self, op: Op, place: Place) -> Iterator[Prepared]:
        for number, weights in together(op):
            row, outputs = weights[0].row, weights[0].outputs
            most = 0 if place.stays else len(weights) * min(outputs, step_rows(None, len(weights) * row))
            planned = weights[0].meta.new_empty(most * row // self.values_a_lane)
            beside = weights[0].meta.new_empty(min(PACKED_ELEMENTS, outputs * row))
            yield Prepared(0, outputs, (), number)
            del planned, beside

    def _fetched(self, store: WeightStore, op: Op, place: Place) -> Iterator[Prepared]:
        """Yield each weight, complete if it stays, else in pieces; the lanes of its outputs are followed by those of
        its gates."""
        for number, weights in together(op):
            outputs, row = weights[0].outputs, weights[0].row
            step = outputs if place.stays else step_rows(store, row * len(weights))
            for first in range(0, outputs, step):
                last = min(first + step, outputs)
                lanes = place.room(len(weights) * (last - first) * row // self.values_a_lane, torch.float32)
                place.keep(lanes.nbytes)
                parts = lanes.chunk(len(weights))
                for weight, part in zip(weights, parts, strict=True):
                    some = replace(weight, first=weight.first + first, meta=weight.meta[first:last])
                    pack(store, some, part, self.kind)
                yield Prepared(first, last, parts, number)

    def begin(self, op: Op, x: Operands) -> Operands:
        shape, made_of, parts = input_shape(op, x.parts), op.input, x.parts
        if not (is_fused(op) or _is_joined(op)):
            parts, made_of = (made_input(made_of, parts),), Input()
        values = self._values(op, parts, made_of)
        return x._replace(parts=(), made=Made(Quantized(values, values, values), shape))

    def _values(self, op: Op, parts: tuple[Tensor, ...], made_of: Input) -> Tensor:
        """The input as rows of a matrix, or as images with their frame."""
        plain = made_of == Input()
        if op.geometry is None or (is_of_pixels(op) and plain):
            tokens = parts[0] if op.geometry is None else parts[0].permute(0, 2, 3, 1)
            if plain and self.out_type is Type.FP32:
                rows = tokens.reshape(-1, tokens.shape[-1])
                return rows if rows.stride(1) == 1 else rows.contiguous()
            return quantize_tokens(tokens, made_of.norm, self.out_type).values
        silu, frame = made_of.activation is not None, op.geometry.padding
        images = quantize_images(parts, frame, made_of.norm, silu=silu, out_type=self.out_type).values
        return images.flatten(0, 2) if is_of_pixels(op) else images

    def begun(self, op: Op, lines: Tensor) -> Operands:
        """The operands that `begin` would return for an input whose rows are `lines`, (n, places, inputs), frame
        included."""
        assert op.geometry is not None
        count, places, inputs = lines.shape
        shape = 1, inputs, count, places - 2 * op.geometry.padding[1]
        return Operands((), made=Made(Quantized(lines[None], lines, lines), shape))

    def apply(self, op: Op, x: Operands, prepared: Iterable[Prepared]) -> tuple[Tensor, ...]:
        made: Made = x.made
        halves = gated(op)
        outputs = [halves[0].outputs] if halves is not None else [weight.outputs for weight in op.group.weights]
        outs = tuple(empty_result(op, made, count) for count in outputs) if x.out is None else (x.out,)
        after = activation_of(op.epilogue.activation)
        fused = halves is not None or (after is not None and not op.epilogue.glu)
        residual = residual_like(outs[0], x.residual) if fused else None
        if outs[0].is_meta:
            shapes.count(op.flops(made.shape), linear=op.kind is Kind.LINEAR)
        for piece in prepared:
            self._multiply(op, made, piece, outs[piece.weight], after if fused else Activation.NONE, residual)
        if fused:
            return outs
        return finished(op.epilogue, outs, x.residual)

    def _multiply(
        self, op: Op, made: Made, piece: Prepared, out: Tensor, activation: Activation | None, residual: Tensor | None
    ) -> None:
        if out.is_meta:
            return
        call = product_call(op, made.input.values, piece, out, activation, residual)
        call.kind, call.steps = self.kind, op.group.shape[1] // self.values_a_lane
        call.weights = piece.tensors[0].data_ptr()
        if len(piece.tensors) > 1:
            call.gate_weights = piece.tensors[1].data_ptr()
        multiply(op, call, made.input.values, out)


class NativeBf16(NativeFp32):
    """Products of values rounded to bf16, with sums in fp32; the error is 2e-3 of a layer's result."""

    name = "native-bf16"
    kind, out_type, dtype, values_a_lane = library.Kind.BF16, Type.BF16, torch.bfloat16, 2

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        if op.weights is None or not policy.bf16.issuperset(op.weights.names):
            return False
        return library.has_bf16() and super().suits(op, shape, policy)


def pack(
    store: WeightStore, weight: Weight, out: Tensor, kind: library.Kind, *, point_bytes: int = 0, enlarged: bool = False
) -> None:
    """Fill `out`, 32-bit lanes, with a weight in the library's order; the weight is transformed if `point_bytes`, the
    distance between two points, is given, for images that are `enlarged` first if so."""
    inputs, *sides = weight.meta.shape[1:]
    taps, at = math.prod(sides), out.data_ptr()
    block = (point_bytes * OUTPUTS // weight.outputs) if point_bytes else out.nbytes * OUTPUTS // weight.outputs
    for first, piece in weight_pieces(store, weight, PACKED_ELEMENTS):
        rows = torch.empty(piece.last - piece.first, *weight.meta.shape[1:])
        store.fetch(piece, rows)
        call = library.Pack(
            kind=kind, is_transformed=point_bytes > 0, enlarged=enlarged, outputs=len(rows), inputs=inputs, taps=taps,
            rows=rows.data_ptr(), out=at + first // OUTPUTS * block, point_bytes=point_bytes,
        )  # fmt: skip
        needed_library().pack(call, torch.get_num_threads())


def _is_joined(op: Op) -> bool:
    """Whether a convolution's input is two concatenated parts and nothing else."""
    return op.geometry is not None and op.input == Input(parts=2)
