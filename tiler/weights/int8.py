"""Products of 8-bit integers by oneDNN: weights with a scale for each output channel, activations scaled as they come.

A token of a linear layer has a scale of its own, a convolution's input one scale and zero point for each sample. The sums
are exact in 32 bits, so nothing depends on how weights are cut. Knows nothing of files.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tiler.memory import cpu

LEVELS, MIDDLE = 255, 128  # of an activation: 1 to 255
ONE = 1  # a zero point that is not zero: oneDNN packs what it needs to take one off


class Packed(NamedTuple):
    """Rows [first, last) of a layer's weight in oneDNN's own order, and their scales (last − first,) fp32."""

    first: int
    last: int
    weight: Tensor
    scale: Tensor


class Quantized(NamedTuple):
    """One sample: `values` uint8, (tokens, in) or (1, in, h, w), real value = scale × (value − zero)."""

    values: Tensor
    scale: Tensor  # (tokens, 1), or a scalar
    zero: int

    def restored(self) -> Tensor:
        """The values as fp32 again."""
        return (self.values.float() - self.zero) * self.scale


def quantize_rows(weight: Tensor, largest: int = 0) -> tuple[Tensor, Tensor]:
    """weight: (out, ...) fp32 → (int8 of the same shape in ±`largest` (default: the processor's), scale (out,) fp32):
    symmetric, absmax of each row."""
    scale = weight.flatten(1).abs().amax(1) / (largest or cpu.int8().largest)
    scale[scale == 0] = 1
    return (weight / scale.view(-1, *(1,) * (weight.ndim - 1))).round_().to(torch.int8), scale


def pack(layer: nn.Module, first: int, rows: Tensor, scale: Tensor) -> Packed:
    """Rows of an int8 weight in the order oneDNN computes with."""
    op = torch.ops.onednn
    last = first + len(rows)
    if isinstance(layer, nn.Conv2d) and not is_pointwise(layer):
        ones = torch.ones(len(rows))
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        return Packed(first, last, op.qconv_prepack(rows, ones, 1.0, ONE, *geometry, None), scale)
    return Packed(first, last, op.qlinear_prepack(rows.flatten(1), None), scale)


def is_pointwise(layer: nn.Conv2d) -> bool:
    """Whether a convolution is a linear layer of its pixels."""
    return layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1


def quantize_tokens(x: Tensor) -> Quantized:
    """x: (..., in) fp32 → symmetric around MIDDLE, each token by its absmax."""
    rows = x.reshape(-1, x.shape[-1])
    if x.is_meta:
        return Quantized(_planned(rows), rows.new_empty(len(rows), 1), MIDDLE)
    low, high = rows.aminmax(dim=1, keepdim=True)
    scale = torch.maximum(-low, high).div_(MIDDLE - 1).clamp_min_(1e-30)
    values = torch.addcmul(torch.tensor(MIDDLE + 0.5), rows, 1 / scale)  # + 0.5: the cast cuts off
    return Quantized(values.to(torch.uint8), scale, MIDDLE)


def quantize_pixels(x: Tensor) -> Quantized:
    """x: (in, h, w) fp32 → (h·w, in): each pixel is a token."""
    return quantize_tokens(x.flatten(1).T)


def quantize_image(x: Tensor) -> Quantized:
    """x: (in, h, w) fp32 → one scale and zero point for all of it, channels last."""
    x = x[None]
    if x.is_meta:
        return Quantized(_planned(x), x.new_empty(()), ONE)
    low, high = x.aminmax()
    low, high = low.clamp_max(0), high.clamp_min(0)  # zero, the padding, is always exact
    scale = ((high - low) / (LEVELS - 2)).clamp_min(1e-30)
    zero = ONE + int((-low / scale).round().nan_to_num())  # of NaN the scale stays NaN: so is the product
    values = torch.add(torch.tensor(zero + 0.5), x, alpha=float(1 / scale)).to(torch.uint8)
    return Quantized(values.contiguous(memory_format=torch.channels_last), scale, zero)


def _planned(x: Tensor) -> Tensor:
    between = x.new_empty(x.shape)  # counted by whoever plans
    values = x.new_empty(x.shape, dtype=torch.uint8)
    del between
    return values


def linear(x: Quantized, weight: Packed, bias: Tensor | None) -> Tensor:
    """(tokens, last − first) fp32."""
    if x.values.is_meta:
        return x.scale.new_empty(len(x.values), weight.last - weight.first)
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        x.values, 1.0, x.zero, weight.weight, weight.scale, torch.zeros(len(weight.scale), dtype=torch.int64), None,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    out.mul_(x.scale)
    return out if bias is None else out.add_(bias)


def conv2d(x: Quantized, weight: Packed, bias: Tensor | None, layer: nn.Conv2d) -> Tensor:
    """(1, last − first, h', w') fp32, channels last."""
    if x.values.is_meta:
        return x.scale.new_empty(1, weight.last - weight.first, *conv_sides(layer, x.values.shape[2:]))
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    out: Tensor = torch.ops.onednn.qconv2d_pointwise(
        x.values, float(x.scale), x.zero, weight.weight, weight.scale, torch.zeros(len(weight.scale), dtype=torch.int64), bias,
        *geometry, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return out


def conv_sides(layer: nn.Conv2d, sides: torch.Size) -> list[int]:
    """Height and width of a convolution's result."""
    assert not isinstance(layer.padding, str)
    geometry = zip(sides, layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in geometry]
