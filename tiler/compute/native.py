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

from tiler.compute import cpu
from tiler.compute.kernels import (
    Group,
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
from tiler.compute.onednn import Geometry
from tiler.compute.steps import activated, add_low_rank, add_product, finished, made_input, product
from tiler.compute.tuning import KERNELS_OF
from tiler.native import library
from tiler.native.library import Activation, Type
from tiler.weights.blocks import INPUTS, OUTPUTS, blocked, can_block
from tiler.weights.store import Piece, WeightStore

MOST_INPUTS = 2**31 // (255 * 127)  # a sum of products fits 32 bits
# Tokens of a GLU with low-rank paths at a time. With 64, which fit a smaller cache, the weights are read too often.
_TOKENS = 512


class Made(NamedTuple):
    """The result of `begin`: the quantised input, its shape, and the fp32 input if a low-rank path needs it."""

    input: Quantized
    shape: tuple[int, ...]
    whole: Tensor | None


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
        return op.group.numel

    def prepare(self, store: WeightStore | None, op: Op, shape: Shape, place: Place) -> Iterable[Prepared]:
        pieces = _planned(op, place) if store is None else _fetched(store, op, place)
        return list(pieces) if place.stays else pieces

    def begin(self, op: Op, x: Operands) -> Operands:
        shape, made_of, parts = input_shape(op, x.parts), op.input, x.parts
        low_rank = any(weight.low_rank is not None for weight in op.group.weights)
        if low_rank or not is_fused(op):
            parts, made_of = (made_input(made_of, parts),), Input()
        if op.geometry is None:
            made = quantize_tokens(parts[0], made_of.norm, rotated=op.group.rotated)
        elif is_of_pixels(op) and made_of == Input():
            made = quantize_tokens(parts[0].permute(0, 2, 3, 1))
        else:
            silu = made_of.activation is not None
            made = quantize_images(parts, op.geometry.padding, made_of.norm, silu=silu, each_place=is_of_pixels(op))
        return x._replace(parts=(), made=Made(made, shape, parts[0] if low_rank else None))

    def apply(self, op: Op, x: Operands, prepared: Iterable[Prepared]) -> tuple[Tensor, ...]:
        made: Made = x.made
        if (halves := gated(op)) is not None:
            outs: tuple[Tensor, ...] = (empty_result(op, made, halves[0].outputs),)
        else:
            outs = tuple(empty_result(op, made, weight.outputs) for weight in op.group.weights)
        if halves is not None and made.whole is not None:
            _multiply_gated(op, made, prepared, outs[0])
            return outs if x.residual is None else (outs[0].add_(x.residual),)
        after = None if made.whole is not None else activation_of(op.epilogue.activation)
        fused = halves is not None or (after is not None and not op.epilogue.glu)
        residual = residual_like(outs[0], x.residual) if fused else None
        for piece in prepared:
            _multiply(op, made, piece, outs[piece.weight], after if fused else Activation.NONE, residual)
        if fused:
            return outs
        if made.whole is not None:
            add_low_rank(op, made.whole, outs)
        return finished(op.epilogue, outs, x.residual)


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


def _planned(op: Op, place: Place) -> Iterator[Prepared]:
    for number, weights in together(op):
        most = min(weights[0].outputs, step_rows(None, weights[0].row * len(weights)))
        count = 0 if place.stays else most * len(weights)
        planned = weights[0].meta.new_empty(count * weights[0].row, dtype=torch.int8)
        yield Prepared(0, weights[0].outputs, (), number)
        del planned


def _fetched(store: WeightStore, op: Op, place: Place) -> Iterator[Prepared]:
    """Yield each weight, complete if it stays or is resident, else in pieces: values, scales and sums of its outputs,
    followed by those of its gates."""
    for number, weights in together(op):
        outputs, row = weights[0].outputs, weights[0].row
        step = outputs if place.stays else step_rows(store, row * len(weights))
        for first in range(0, outputs, step):
            last = min(first + step, outputs)
            tensors: list[Tensor] = []
            room = place.room(len(weights) * (last - first) * row, torch.int8).view(len(weights), last - first, row)
            for weight, rows in zip(weights, room, strict=True):
                piece = Piece(weight.name, weight.first + first, weight.first + last)
                tensors += [
                    _fetch(store, piece, weight, rows),
                    store.scale(weight.name)[piece.first : piece.last],
                ]
                tensors.append(_sums(store, piece, tensors[-2]))
            place.keep(room.nbytes)
            yield Prepared(first, last, tuple(tensors), number)


def _fetch(store: WeightStore, whole: Piece, weight: Weight, into: Tensor) -> Tensor:
    """Rows in blocks, read `into` a buffer or taken from resident weights. Rows that the file stores in plain order are
    rearranged here."""
    is_blocked, kept = store.index[whole.name].blocked, store.resident.get(whole.name)
    if is_blocked and kept is not None and kept.dtype == torch.int8:
        return kept.view(-1, weight.row)[whole.first : whole.last]
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
        known = torch.empty(len(rows), dtype=torch.int32)
        lanes = rows[0].numel() // INPUTS
        call = library.Sums(rows.data_ptr(), len(rows) // OUTPUTS, lanes, known.data_ptr())
        needed_library().sums(call, torch.get_num_threads())
        store.sums[piece] = known
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


def _multiply(
    op: Op, made: Made, piece: Prepared, out: Tensor, activation: Activation | None, residual: Tensor | None
) -> None:
    """Compute the piece's outputs of `out`."""
    if out.is_meta:
        return
    call = product_call(op, made.input.values, piece, out, activation, residual)
    call.kind, call.steps = library.Kind.INT8, op.group.shape[1] // INPUTS
    call.scale, call.zero = made.input.scale.data_ptr(), made.input.zero.data_ptr()
    call.weights, call.weight_scale, call.weight_sum = (tensor.data_ptr() for tensor in piece.tensors[:3])
    if len(piece.tensors) > 3:
        call.gate_weights, call.gate_scale, call.gate_sum = (tensor.data_ptr() for tensor in piece.tensors[3:])
    multiply(op, call, made.input.values, out)


def _multiply_gated(op: Op, made: Made, prepared: Iterable[Prepared], out: Tensor) -> None:
    """Compute a GLU whose weights have low-rank paths, some tokens at a time, so that both halves of them stay in the
    cache until the gates are applied."""
    halves, act = gated(op), op.epilogue.activation
    assert halves is not None and act is not None and made.whole is not None
    tokens, filled = made.whole.flatten(0, -2), out.view(-1, out.shape[-1])
    paths: list[tuple[Tensor, Tensor] | None] = []  # of each half: its tokens in few dimensions, and the way back
    for weight in op.group.weights:
        parts = 2 // len(op.group.weights)
        if weight.low_rank is None:
            paths += [None] * parts
            continue
        down, up = weight.low_rank.load()
        lines = product(tokens, down, None)
        paths += [(lines, rows) for rows in up.chunk(parts)]
    for piece in prepared:
        rows = slice(piece.first, piece.last)
        for some in (slice(i, min(i + _TOKENS, len(tokens))) for i in range(0, len(tokens), _TOKENS)):
            made_some = made._replace(input=Quantized(made.input.values[some], made.input.scale[some], made.input.zero))
            both = []
            for number, half in enumerate(halves):
                bias = None if half.bias is None else half.bias[rows]
                alone = Op(kind=op.kind, weights=Group(weights=(replace(half, meta=half.meta[rows], bias=bias),)))
                made_of = out.new_empty(some.stop - some.start, piece.last - piece.first)
                of_it = Prepared(0, made_of.shape[1], piece.tensors[3 * number : 3 * number + 3])
                _multiply(alone, made_some, of_it, made_of, Activation.NONE, None)
                if (path := paths[number]) is not None:
                    add_product(path[0][some], path[1][rows], made_of)
                both.append(made_of)
            torch.mul(both[0], activated(act, both[1]), out=filled[some, rows])


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
