"""A convolution of parts that are joined along channels and normalised, a strip of rows at a time.

Neither the joined tensor nor its normalised copy is ever whole: the norm's statistics are taken of each part by itself. For the
few places where these two would be the largest tensors of a pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tiler.compute import onednn
from tiler.compute.kernels import activated, joined

# Joined tensors above this go by strips: 63 MB where SDXL's last level begins (960 × 128 × 128). SD 1.x and 2.x have 39 MB at
# most, unless a guide is nine times as long as high, and keep the bits that the norm of a whole tensor gives.
WHOLE_ELEMENTS = 12 * 2**20
STRIP_ELEMENTS = 2**21
ROWS_TOGETHER = 8  # so that convolutions that compute some rows at once cut a strip as they cut the whole


class Strip(NamedTuple):
    """Rows [top, last) of a tensor, of which those from `fresh` on belong to no strip before it."""

    top: int
    fresh: int
    last: int


def is_large(parts: tuple[Tensor, ...]) -> bool:
    """Whether parts (n, C, h, w) are to be worked on in strips: never by the ceiling, for the bits of a result depend on it."""
    return len(parts) > 1 and sum(part[0].numel() for part in parts) > WHOLE_ELEMENTS


def strips(channels: int, height: int, width: int) -> Iterator[Strip]:
    """`height` rows in strips of one size, the last of which may begin in the one before: products of one size have weights of
    one order."""
    rows = min(height, max(1, STRIP_ELEMENTS // (channels * width) // ROWS_TOGETHER) * ROWS_TOGETHER)
    for fresh in range(0, height, rows):
        top = min(fresh, height - rows)
        yield Strip(top, fresh, top + rows)


def convolve(conv: Any, *parts: Tensor, norm: Any, activation: nn.Module) -> Tensor:
    """`conv`, 3 × 3 of stride 1, of the parts (n, C, h, w) joined, normed and activated → (n, C', h, w)."""
    height, width = parts[0].shape[2:]
    halo = conv.kernel_size[0] // 2
    assert conv.stride == (1, 1) and conv.padding == (halo, halo)
    by_rows = copy.copy(conv)  # its rows are padded here; the layer itself is its owner's
    by_rows.padding = (0, halo)
    out = _empty(len(parts[0]), conv.out_channels, height, width, like=parts[0])
    for i, result in enumerate(out.split(1)):
        sample = tuple(part[i : i + 1] for part in parts)
        scale, shift = _scale_and_shift(norm, sample)
        for top, _, last in strips(norm.num_channels, height, width):
            rows = _normed_rows(sample, scale, shift, activation, top - halo, last + halo)
            result[:, :, top:last] = by_rows(rows)
    return out


def add_pointwise(conv: Any, parts: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Add `conv`, 1 × 1, of the joined parts (n, C, h, w) to `out` (n, C', h, w)."""
    channels, (height, width) = sum(part.shape[1] for part in parts), parts[0].shape[2:]
    for i, result in enumerate(out.split(1)):
        for top, fresh, last in strips(channels, height, width):
            made = conv(joined(tuple(part[i : i + 1, :, top:last] for part in parts)))
            result[:, :, fresh:last] += made[:, :, fresh - top :]
    return out


def _empty(*shape: int, like: Tensor) -> Tensor:
    layout = torch.channels_last if onednn.prepacks() else torch.contiguous_format
    return torch.empty(shape, device=like.device, memory_format=layout)


def _scale_and_shift(norm: Any, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """A GroupNorm of the joined parts (1, C, h, w) as x · scale + shift, (C,) fp32 each; sums are fp64."""
    if parts[0].is_meta:
        return norm.weight.new_empty(norm.num_channels), norm.weight.new_empty(norm.num_channels)
    sums = torch.cat([_moments(part) for part in parts], dim=1)
    mean, squares = sums.unflatten(1, (norm.num_groups, -1)).mean(2) / parts[0].shape[2:].numel()
    scale = torch.rsqrt((squares - mean.square()).clamp_min_(0) + norm.eps)
    mean, scale = (x.repeat_interleave(norm.num_channels // norm.num_groups) for x in (mean, scale))
    scale = norm.weight * scale.float()
    return scale, norm.bias - mean.float() * scale


def _moments(part: Tensor) -> Tensor:
    """Of (1, C, h, w): each channel's sum and sum of squares, (2, C) fp64."""
    sums = torch.zeros(2, part.shape[1], dtype=torch.float64)
    for _, fresh, last in strips(*part.shape[1:]):
        rows = part[:, :, fresh:last]
        sums[0] += rows.sum((0, 2, 3))
        sums[1] += rows.square().sum((0, 2, 3))
    return sums


def _normed_rows(
    parts: tuple[Tensor, ...], scale: Tensor, shift: Tensor, activation: nn.Module, first: int, last: int
) -> Tensor:
    """Rows [first, last) of the joined, normed and activated parts, (1, C, last − first, w); zeros beyond their ends."""
    height, width = parts[0].shape[2:]
    top, bottom = max(0, first), min(height, last)
    out = _empty(1, len(scale), last - first, width, like=parts[0])
    out[:, :, : top - first] = 0
    out[:, :, bottom - first :] = 0
    inside, channel = out[:, :, top - first : bottom - first], 0
    for part in parts:
        own = slice(channel, channel + part.shape[1])
        torch.mul(part[:, :, top:bottom], scale[own, None, None], out=inside[:, own])
        inside[:, own] += shift[own, None, None]
        channel = own.stop
    activated(activation, inside)
    return out
