"""8-bit products by tiler's own library (tiler/native/): the input is joined, normalised, activated and quantised in
two passes; bias, activation, gates and residual are fused with the product.

Each token of a linear layer and each pixel of a 1 × 1 convolution has its own scale; the input of other convolutions
has one scale and zero point per image. Sums are exact, and every output is computed by one loop in a fixed order, so
the bytes do not depend on threads, samples, or how weights are cut. Knows nothing of files.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

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
from tiler.compute.native_inputs import Quantized, address, needed_library, quantize_images, quantize_tokens
from tiler.compute.native_low_rank import (
    Beside,
    Weights,
    factor_bytes,
    factors,
    making_bytes,
    product_beside,
    rank_of,
    sums_of,
    way_down,
)
from tiler.compute.onednn import Geometry
from tiler.compute.steps import finished, made_input
from tiler.compute.tuning import KERNELS_OF
from tiler.native import library
from tiler.native.library import Activation, Type
from tiler.weights.blocks import INPUTS, OUTPUTS, blocked, can_block
from tiler.weights.store import Piece, WeightStore

MOST_INPUTS = 2**31 // (255 * 127)  # a sum of products fits 32 bits


class Made(NamedTuple):
    """The result of `begin`: the quantised input and its shape."""

    input: Quantized
    shape: tuple[int, ...]


def reads_blocks() -> bool:
    """Whether packed files should store weights in blocks: if the library multiplies them."""
    return library.library() is not None and NativeInt8.name in KERNELS_OF[cpu.isa()][Kind.LINEAR]


class NativeInt8(Kernel):
    """Weights stored as int8, held as in the packed file."""

    name = "native-int8"
    multiplies_in_place = True

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        if op.weights is None or not policy.int8.issuperset(op.weights.names) or library.library() is None:
            return False
        plain = op.geometry is None or (
            op.geometry.groups == 1 and op.geometry.dilation == (1, 1) and len(set(op.geometry.padding)) == 1
        )
        whole = all(can_block(w.meta.shape) and w.first % OUTPUTS == 0 for w in op.weights.weights)
        return plain and whole and op.weights.row <= MOST_INPUTS

    def held_bytes(self, op: Op, shape: Shape | None) -> int:
        return op.group.numel + self.beside_bytes(op)

    def beside_bytes(self, op: Op) -> int:
        return sum(factor_bytes(_owners(op, number)) for number, _ in together(op))

    def prepare(self, store: WeightStore | None, op: Op, shape: Shape, place: Place) -> Iterable[Prepared]:
        pieces = _planned(op, place) if store is None else _fetched(store, op, place)
        return list(pieces) if place.stays else pieces

    def begin(self, op: Op, x: Operands) -> Operands:
        shape, made_of, parts = input_shape(op, x.parts), op.input, x.parts
        if not is_fused(op):
            parts, made_of = (made_input(made_of, parts),), Input()
        if op.geometry is None:
            made = quantize_tokens(parts[0], made_of.norm, rotated=op.group.rotated)
        elif is_of_pixels(op) and made_of == Input():
            made = quantize_tokens(parts[0].permute(0, 2, 3, 1))
        else:
            silu = made_of.activation is not None
            made = quantize_images(parts, op.geometry.padding, made_of.norm, silu=silu, each_place=is_of_pixels(op))
        return x._replace(parts=(), made=Made(made, shape))

    def apply(self, op: Op, x: Operands, prepared: Iterable[Prepared]) -> tuple[Tensor, ...]:
        made: Made = x.made
        if (halves := gated(op)) is not None:
            outs: tuple[Tensor, ...] = (empty_result(op, made, halves[0].outputs),)
        else:
            outs = tuple(empty_result(op, made, weight.outputs) for weight in op.group.weights)
        after = activation_of(op.epilogue.activation)
        fused = halves is not None or (after is not None and not op.epilogue.glu)
        residual = residual_like(outs[0], x.residual) if fused else None
        beside: Beside | None = None
        for piece in prepared:
            if piece.last == 0:
                beside = _narrowed(op, made, piece)
                continue
            _multiply(op, made, piece, outs[piece.weight], after if fused else Activation.NONE, residual, beside)
        return outs if fused else finished(op.epilogue, outs, x.residual)


def activation_of(module: nn.Module | None) -> Activation | None:
    """The library's activation for this function; None if it has none."""
    if module is None:
        return Activation.NONE
    if isinstance(module, nn.SiLU):
        return Activation.SILU
    if isinstance(module, nn.GELU):
        return Activation.GELU if module.approximate == "none" else Activation.GELU_TANH
    return None


def is_of_pixels(op: Op) -> bool:
    """Whether a convolution is a linear layer of its pixels, each with its own scale."""
    return op.geometry is not None and op.geometry.is_pointwise(op.group.shape)


def is_fused(op: Op) -> bool:
    """Whether the library joins, normalises and activates the parts of the operation's input."""
    parts, norm, activation = op.input.parts, op.input.norm, op.input.activation
    if op.input.enlarged:
        return False
    if op.geometry is None:
        return activation is None and (norm is None or isinstance(norm, nn.LayerNorm))
    if is_of_pixels(op) and norm is None:  # a scale for each pixel
        return parts <= 2 and activation is None
    return (
        parts <= 2
        and (norm is None or isinstance(norm, nn.GroupNorm))
        and (activation is None or isinstance(activation, nn.SiLU))
    )


def gated(op: Op) -> tuple[Weight, Weight] | None:
    """The halves of a GLU that is computed in one step, which are prepared together; None for other operations. A
    low-rank path is that of the complete weight."""
    weights = op.group.weights
    if not op.epilogue.glu or activation_of(op.epilogue.activation) is None:
        return None
    if len(weights) == 2:
        return weights[0], weights[1]
    (weight,), half = weights, weights[0].outputs // 2
    if half % OUTPUTS:
        return None

    def rows(at: slice) -> Weight:
        bias = None if weight.bias is None else weight.bias[at]
        return replace(weight, meta=weight.meta[at], first=weight.first + at.start, bias=bias)

    return rows(slice(0, half)), rows(slice(half, weight.outputs))


def together(op: Op) -> list[tuple[int, tuple[Weight, ...]]]:
    """The weights of each result, by the result's index: two if it has gates, else one."""
    halves = gated(op)
    return [(0, halves)] if halves is not None else [(i, (weight,)) for i, weight in enumerate(op.group.weights)]


def _owners(op: Op, number: int) -> Weights:
    """The weights whose low-rank paths are beside result `number`."""
    return op.group.weights if gated(op) is not None else op.group.weights[number : number + 1]


def _planned(op: Op, place: Place) -> Iterator[Prepared]:
    for number, weights in together(op):
        beside = weights[0].meta.new_empty(0 if place.stays else factor_bytes(_owners(op, number)), dtype=torch.int8)
        if rank_of(_owners(op, number)):
            made = weights[0].meta.new_empty(making_bytes(_owners(op, number)), dtype=torch.int8)
            del made
            yield Prepared(0, 0, (), number)
        most = min(weights[0].outputs, step_rows(None, weights[0].row * len(weights)))
        count = 0 if place.stays else most * len(weights)
        planned = weights[0].meta.new_empty(count * weights[0].row, dtype=torch.int8)
        yield Prepared(0, weights[0].outputs, (), number)
        del planned, beside


def _fetched(store: WeightStore, op: Op, place: Place) -> Iterator[Prepared]:
    """Yield each weight, complete if it stays, else in pieces: values, scales and sums of its outputs, followed by
    those of its gates. Resident weights take no room in `place`. A low-rank path, whose factors take none either, comes
    before its weights."""
    for number, weights in together(op):
        if rank_of(_owners(op, number)):
            yield factors(_owners(op, number), number, rotated=op.group.rotated)
        outputs, row = weights[0].outputs, weights[0].row
        step = outputs if place.stays else step_rows(store, row * len(weights))
        for first in range(0, outputs, step):
            last = min(first + step, outputs)
            tensors: list[Tensor] = []
            count = sum(store.blocks(weight.name) is None for weight in weights)
            room = place.room(count * (last - first) * row, torch.int8).view(count, last - first, row)
            free = iter(room)
            for weight in weights:
                piece = Piece(weight.name, weight.first + first, weight.first + last)
                if (kept := store.blocks(weight.name)) is not None:
                    rows = kept.view(-1, row)[piece.first : piece.last]
                else:
                    rows = _fetch(store, piece, weight, next(free))
                tensors += [rows, store.scale(weight.name)[piece.first : piece.last], _sums(store, piece, rows)]
            place.keep(room.nbytes)
            yield Prepared(first, last, tuple(tensors), number)


def _fetch(store: WeightStore, whole: Piece, weight: Weight, into: Tensor) -> Tensor:
    """Rows in blocks, read `into` a buffer. Rows that the file stores in plain order are rearranged here."""
    is_blocked = store.index[whole.name].blocked
    for first, piece in weight_pieces(store, replace(weight, first=whole.first, meta=weight.meta[: len(into)])):
        rows = into[first : first + piece.last - piece.first]
        if is_blocked:
            store.fetch(piece, rows, in_blocks=True)
        else:
            plain = rows.new_empty(len(rows), *weight.meta.shape[1:])
            store.fetch(piece, plain)
            rows.copy_(blocked(plain).view_as(rows))
    return into


def _sums(store: WeightStore, piece: Piece, rows: Tensor) -> Tensor:
    """The sum of each output's values, (outputs,) int32, computed in the first pass and cached."""
    known = store.sums.get(piece)
    if known is None:
        known = store.sums[piece] = sums_of(rows, len(rows))
    return known


def empty_result(op: Op, made: Made, outputs: int) -> Tensor:
    """An uninitialised result; output channels are its last axis in memory."""
    layout = torch.channels_last if op.kind is Kind.CONVOLUTION else torch.contiguous_format
    shape = op.output_shape(made.shape, outputs)
    return torch.empty(shape, device=made.input.values.device, memory_format=layout)


def residual_like(out: Tensor, residual: Tensor | None) -> Tensor | None:
    """The residual in the result's memory order."""
    layout = torch.channels_last if out.ndim == 4 and not out.is_contiguous() else torch.contiguous_format
    return None if residual is None else residual.contiguous(memory_format=layout)


def _narrowed(op: Op, made: Made, path: Prepared) -> Beside:
    """Compute the way down of a low-rank path."""
    owners = _owners(op, path.weight)
    down = way_down(op, rank_of(owners))
    lines = empty_result(down, made, down.group.shape[0])
    if lines.is_meta:
        shapes.count(down.flops(made.shape), linear=op.kind is Kind.LINEAR)
        shapes.count(2 * lines.numel() * sum(weight.outputs for weight in owners), linear=True)
        up: tuple[Tensor, ...] = (lines, lines, lines)
    else:
        _multiply(down, made, Prepared(0, down.group.shape[0], path.tensors[:3]), lines, Activation.NONE, None)
        up = path.tensors[3:]
    return Beside(path.weight, quantize_tokens(lines if op.kind is Kind.LINEAR else lines.movedim(1, -1)), *up)


def _multiply(
    op: Op, made: Made, piece: Prepared, out: Tensor, activation: Activation | None, residual: Tensor | None,
    beside: Beside | None = None,
) -> None:  # fmt: skip
    """Compute the piece's outputs of `out`."""
    if out.is_meta:
        return
    call = product_call(op, made.input.values, piece, out, activation, residual)
    call.kind, call.steps = library.Kind.INT8, op.group.shape[1] // INPUTS
    call.scale, call.zero = made.input.scale.data_ptr(), made.input.zero.data_ptr()
    call.weights, call.weight_scale, call.weight_sum = (tensor.data_ptr() for tensor in piece.tensors[:3])
    if len(piece.tensors) > 3:
        call.gate_weights, call.gate_scale, call.gate_sum = (tensor.data_ptr() for tensor in piece.tensors[3:])
    if beside is not None and beside.number == piece.weight:
        path = product_beside(beside, piece.first, piece.last - piece.first, gated=len(piece.tensors) > 3)
        call.beside = ctypes.addressof(path)
    multiply(op, call, made.input.values, out)


def product_call(
    op: Op, values: Tensor, piece: Prepared, out: Tensor, activation: Activation | None, residual: Tensor | None
) -> library.Product:
    """The arguments of a piece's product that do not depend on the format of the weights; `values`: rows of a matrix,
    or images."""
    first, channels = piece.first, out.shape[1 if op.kind is Kind.CONVOLUTION else -1]
    weights = (gated(op) or op.group.weights)[piece.weight :]
    call = library.Product(
        activation=activation, out_type=Type.FP32, taps=1, rows=out.numel() // channels, outputs=piece.last - first,
        a=values.data_ptr(), row_bytes=values.stride(0) * values.element_size(), scale_rows=1,
        bias=address(weights[0].bias, first), residual=address(residual, first), out=address(out, first),
        out_step=channels, residual_step=channels,
    )  # fmt: skip
    if gated(op) is not None:
        call.gate_bias = address(weights[1].bias, first)
    return call


def multiply(op: Op, call: library.Product, values: Tensor, out: Tensor) -> None:
    """Run a product, as a convolution if its input is images."""
    if op.geometry is not None and values.ndim == 4:
        taps = _images(call, op.geometry, op.group.shape[2:], values, out)
        call.tap = ctypes.addressof(taps)
    needed_library().product(call, torch.get_num_threads())


def _images(
    call: library.Product, geometry: Geometry, sides: tuple[int, ...], values: Tensor, out: Tensor
) -> ctypes.Array[ctypes.c_int64]:
    """Describe how a convolution moves over images (n, h, w, inputs). Returns the taps, which must stay alive until the
    call is done."""
    image, line, place = (step * values.element_size() for step in values.stride()[:3])
    down, across = geometry.stride
    call.per_image = call.scale_rows = out.shape[2] * out.shape[3]
    call.taps, call.width, call.zero_step = math.prod(sides), out.shape[3], 1
    call.image_bytes, call.line_bytes, call.place_bytes = image, down * line, across * place
    taps = [i * line + j * place for i in range(sides[0]) for j in range(sides[1])]
    return (ctypes.c_int64 * len(taps))(*taps)
