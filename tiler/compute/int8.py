"""8-bit integer products by oneDNN. Weights have a scale for each output channel, activations are scaled as they
arrive.

Each token of a linear layer has its own scale; a convolution's input has one scale and zero point per sample. A
convolution is computed as a linear layer of its windows, which is as fast as oneDNN's own, whose weight order takes ten
times as long to make. The sums are exact in 32 bits, so the result does not depend on how weights or tokens are cut.
Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tiler.compute import cpu, onednn
from tiler.compute.kernels import (
    Kernel,
    Kind,
    Op,
    Operands,
    Place,
    Policy,
    Prepared,
    Shape,
    read_pieces,
)
from tiler.compute.steps import add_low_rank, finished, made_input
from tiler.compute.tuning import INT8_BAND_ROWS as BAND_ROWS
from tiler.compute.tuning import INT8_BAND_SUMS as BAND_SUMS
from tiler.compute.tuning import INT8_CHUNK as CHUNK
from tiler.compute.tuning import INT8_WINDOWS_BYTES as WINDOWS_BYTES
from tiler.memory import process
from tiler.weights.rotation import rotate_
from tiler.weights.store import PIECE_ELEMENTS, WeightStore, piece_rows

STEPS = 254  # of an activation in 0 to 255, one of them for rounding
MIDDLE = 128


class Packed(NamedTuple):
    """Rows [first, last) of a layer's weight as oneDNN's plain matrix (taps × in, rows), and their scales (rows,)
    fp32."""

    first: int
    last: int
    weight: Tensor
    scale: Tensor


class Quantized(NamedTuple):
    """One sample: `values` uint8, (tokens, in) or (h, w, in), real value = scale × (value − zero)."""

    values: Tensor
    scale: Tensor  # (tokens, 1), or a scalar
    zero: int

    def restored(self) -> Tensor:
        """The values in fp32 again."""
        return (self.values.float() - self.zero) * self.scale


def quantize_rows(weight: Tensor, largest: int = 0) -> tuple[Tensor, Tensor]:
    """weight: (out, ...) fp32 → (int8 of the same shape in ±`largest` (default: the processor's), scale (out,) fp32):
    symmetric, absmax of each row."""
    scale = weight.flatten(1).abs().amax(1) / (largest or cpu.int8().largest)
    scale[scale == 0] = 1
    return (weight / scale.view(-1, *(1,) * (weight.ndim - 1))).round_().to(torch.int8), scale


def pack(first: int, rows: Tensor, scale: Tensor) -> Packed:
    """Arrange rows (n, in, ...) of an int8 weight for oneDNN."""
    n = len(rows)
    with process.mapped_blocks():
        return Packed(first, first + n, onednn.matrix(rows), scale)


def quantize_tokens(x: Tensor, *, rotated: bool = False) -> Quantized:
    """x: (..., in) fp32 → `rotated`, then symmetric around MIDDLE, each token scaled by its largest absolute value."""
    rows = x.reshape(-1, x.shape[-1])
    values, chunk = rows.new_empty(rows.shape, dtype=torch.uint8), max(1, CHUNK // rows.shape[1])
    if x.is_meta:
        return Quantized(values, rows.new_empty(len(rows), 1), MIDDLE)
    scale = rows.new_empty(len(rows), 1)
    for some, into, its in zip(rows.split(chunk), values.split(chunk), scale.split(chunk), strict=True):
        some = rotate_(some.clone(memory_format=torch.contiguous_format)) if rotated else some
        torch.maximum(some.amax(1, keepdim=True), some.amin(1, keepdim=True).neg_(), out=its)
        its.div_(MIDDLE - 1).clamp_min_(1e-30)
        _quantize(some, 1 / its, MIDDLE, into)
    return Quantized(values, scale, MIDDLE)


def quantize_pixels(x: Tensor) -> Quantized:
    """x: (in, h, w) fp32 → (h·w, in): each pixel is a token."""
    return quantize_tokens(x.flatten(1).T)


def quantize_image(x: Tensor, padding: int = 0, across: int | None = None) -> Quantized:
    """x: (in, h, w) fp32 → (h + 2·padding, w + 2·across, in), zero around it; one scale and zero point for all of it.
    Where `across` is not given, it is `padding`."""
    x = x.permute(1, 2, 0)
    height, width, channels = x.shape
    across = padding if across is None else across
    sides = height + 2 * padding, width + 2 * across, channels
    if x.is_meta:
        return Quantized(x.new_empty(sides, dtype=torch.uint8), x.new_empty(()), 0)
    low, high = x.aminmax()
    low, high = low.clamp_max(0), high.clamp_min(0)  # zero, the padding, is always exact
    scale = ((high - low) / STEPS).clamp_min(1e-30)
    zero = int((-low / scale).round().nan_to_num())  # of NaN the scale stays NaN: so is the product
    values = x.new_full(sides, zero, dtype=torch.uint8)
    inside, chunk = values[padding : padding + height, across : across + width], max(1, CHUNK // (width * channels))
    for some, into in zip(x.split(chunk), inside.split(chunk), strict=True):
        _quantize(some, 1 / scale, zero, into)
    return Quantized(values, scale, zero)


def _quantize(x: Tensor, inverse: Tensor, zero: int, out: Tensor) -> None:
    # + 0.5: the cast cuts off. In steps that torch vectorises: neither addcmul along a row nor fp32 to uint8 is (2.8
    # times).
    out.copy_(torch.mul(x, inverse).add_(zero + 0.5).to(torch.int16))


def linear(x: Quantized, weight: Packed, bias: Tensor | None, out: Tensor) -> None:
    """Fill `out`, (..., last − first) fp32, whose leading axes together are the tokens."""
    rows = out.view(-1, out.shape[-1])
    band = _even(len(rows), max(BAND_ROWS, BAND_SUMS // rows.shape[1]))
    for first in range(0, len(rows), band):
        band_of = slice(first, first + band)
        sums = _product(x.values[band_of], x.zero, weight)
        scale = x.scale[band_of] if x.scale.ndim else x.scale
        if out.is_meta:
            continue
        if bias is None:
            torch.mul(sums, scale, out=rows[band_of])
        else:
            torch.addcmul(bias, sums, scale, out=rows[band_of])


def conv2d(
    x: Quantized, weight: Packed, bias: Tensor | None, out: Tensor, *, taps: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    """Fill `out`, (h', w', last − first) fp32. `x` is padded already; `taps` and `stride` are (down, across)."""
    windows = x.values.unfold(0, taps[0], stride[0]).unfold(1, taps[1], stride[1])
    windows = windows.permute(0, 1, 3, 4, 2)  # (h', w', taps, taps, in)
    step = _even(len(windows), max(1, WINDOWS_BYTES // windows[0].numel()))
    for some, into in zip(windows.split(step), out.split(step), strict=True):
        taken = some.reshape(-1, some.shape[2:].numel())
        linear(Quantized(taken, x.scale, x.zero), weight, bias, into)


def _even(length: int, most: int) -> int:
    """The size of the equal parts, as few as possible with at most `most` each."""
    return -(-length // -(-length // most))


def _product(values: Tensor, zero: int, weight: Packed) -> Tensor:
    """(tokens, last − first) fp32: sums of products × the weight's scales."""
    count = weight.last - weight.first
    if values.is_meta:
        return values.new_empty(len(values), count, dtype=torch.float32)
    return onednn.product(values, zero, weight.weight, weight.scale)


class Int8(Kernel):
    """Weights stored as int8 and packed beside the arena; each sample is quantised once for all pieces of the
    weight."""

    name = "int8"
    in_arena = False

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        return op.weights is not None and policy.int8.issuperset(op.weights.names)

    def held_bytes(self, op: Op, shape: Shape | None) -> int:
        return op.group.numel

    def transient_bytes(self, op: Op, shape: Shape | None) -> int:
        """A piece as it is stored."""
        most = max(weight.outputs for weight in op.group.weights)
        return op.group.row * min(most, piece_rows(op.group.row, PIECE_ELEMENTS))

    def prepare(self, store: WeightStore | None, op: Op, shape: Shape, place: Place) -> Iterator[Prepared]:
        for number, weight in enumerate(op.group.weights):
            if store is None:
                # As stored, copied and packed: counted.
                transient = 0 if place.stays else 3 * self.transient_bytes(op, None)
                planned = weight.meta.new_empty(transient, dtype=torch.int8)
                yield Prepared(0, weight.outputs, (weight.meta, weight.meta), number)
                del planned
                continue
            scale = store.scale(weight.name)[weight.first :]
            for first, last, rows in read_pieces(store, weight, place, torch.int8):
                packed = pack(first, rows, scale[first:last])
                yield Prepared(first, last, (packed.weight, packed.scale), number)

    def begin(self, op: Op, x: Operands) -> Operands:
        """`made`: the quantised samples, and their fp32 input if a low-rank path needs it."""
        whole = made_input(op.input, x.parts)
        if op.kind is Kind.LINEAR:  # a token has a scale of its own: samples are tokens like others
            samples = [quantize_tokens(whole, rotated=op.group.rotated)]
        elif op.geometry is not None and op.geometry.is_pointwise(op.group.shape):  # then each pixel is a token
            samples = [quantize_pixels(sample) for sample in whole]
        else:
            assert op.geometry is not None and op.geometry.groups == 1 and op.geometry.dilation == (1, 1)
            samples = [quantize_image(sample, *op.geometry.padding) for sample in whole]
        low_rank = any(weight.low_rank is not None for weight in op.group.weights)
        return x._replace(parts=(), made=(samples, tuple(whole.shape), whole if low_rank else None))

    def apply(self, op: Op, x: Operands, prepared: Iterable[Prepared]) -> tuple[Tensor, ...]:
        samples, shape, whole = x.made
        # Output channels are the last axis in memory.
        layout = torch.channels_last if op.kind is Kind.CONVOLUTION else torch.contiguous_format
        device = samples[0].values.device
        outs = [
            torch.empty(op.output_shape(shape, weight.outputs), device=device, memory_format=layout)
            for weight in op.group.weights
        ]
        for first, last, (weight, scale), number in prepared:
            out, bias = outs[number], op.group.weights[number].bias
            packed, part = Packed(first, last, weight, scale), None if bias is None else bias[first:last]
            planes = out[None] if op.kind is Kind.LINEAR else out.permute(0, 2, 3, 1)
            for sample, filled in zip(samples, planes, strict=True):
                into = filled[..., first:last]
                if op.geometry is None or op.geometry.is_pointwise(op.group.shape):
                    linear(sample, packed, part, into)
                else:
                    conv2d(sample, packed, part, into, taps=op.group.shape[2:], stride=op.geometry.stride)
        add_low_rank(op, whole, outs)
        return finished(op.epilogue, outs, x.residual)
