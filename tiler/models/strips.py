"""Convolutions that process a strip of rows at a time, for inputs that are computed on demand: parts joined along
channels and normalised, or enlarged.

The complete input never exists: the statistics of the norm are computed for each part separately. Used in the few
places where it would be the largest tensor of a pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiler.compute import onednn
from tiler.compute.steps import activated, joined

STRIP_ELEMENTS = 2**20
ROWS_TOGETHER = 8  # so that convolutions that compute some rows at once cut a strip as they cut the whole


class Strip(NamedTuple):
    """Rows [top, last) of a tensor; rows from `fresh` on are not in any earlier strip."""

    top: int
    fresh: int
    last: int


def are_large(parts: Sequence[Tensor], whole_elements: int | None) -> bool:
    """Whether parts (n, C, h, w) have more than `whole_elements` elements when joined; always false without a limit."""
    return whole_elements is not None and len(parts) > 1 and sum(part[0].numel() for part in parts) > whole_elements


def strips(channels: int, height: int, width: int) -> Iterator[Strip]:
    """Cut `height` rows into strips of one size, of which the last may overlap the one before: products of one size use
    one order of the weights."""
    rows = min(height, max(1, STRIP_ELEMENTS // (channels * width) // ROWS_TOGETHER) * ROWS_TOGETHER)
    for fresh in range(0, height, rows):
        top = min(fresh, height - rows)
        yield Strip(top, fresh, top + rows)


def convolve(conv: Any, *parts: Tensor, norm: Any, activation: nn.Module) -> Tensor:
    """`conv`, 3 × 3 of stride 1, of the parts (n, C, h, w) joined, normed and activated → (n, C', h, w)."""
    results = []
    for i in range(len(parts[0])):
        sample = tuple(part[i : i + 1] for part in parts)
        scale, shift = _scale_and_shift(norm, sample)
        rows = partial(_normed_rows, sample, scale, shift, activation)
        results.append(_convolved(conv, rows, *parts[0].shape[2:]))
    return results[0] if len(results) == 1 else torch.cat(results)


class Enlarged(nn.Module):
    """An Upsample2D with a convolution: both sides are doubled by nearest neighbours."""

    def __init__(self, upsampler: Any) -> None:
        super().__init__()
        self.conv = upsampler.conv

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, C, h, w) → (n, C', 2h, 2w)."""
        height, width = (2 * side for side in x.shape[2:])
        results = [_convolved(self.conv, partial(_enlarged_rows, one), height, width) for one in x.split(1)]
        return results[0] if len(results) == 1 else torch.cat(results)


def _convolved(conv: Any, rows: Callable[[int, int], Tensor], height: int, width: int) -> Tensor:
    """`conv`, of stride 1 and an odd kernel, of one sample of (height, width), of which `rows` gives those asked for,
    zeros beyond its ends → (1, C', height, width)."""
    halo = conv.kernel_size[0] // 2
    assert conv.stride == (1, 1) and conv.padding == (halo, halo)
    by_rows = copy.copy(conv)  # its rows are padded here; the layer itself is its owner's
    by_rows.padding = (0, halo)
    out: Tensor | None = None
    for top, _, last in strips(conv.in_channels, height, width):
        made = by_rows(rows(top - halo, last + halo))
        out = _empty(1, conv.out_channels, height, width, like=made) if out is None else out
        out[:, :, top:last] = made
    assert out is not None
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
    layout = torch.channels_last if onednn.convolves() else torch.contiguous_format
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
        sums[0] += rows.sum((0, 2, 3), dtype=torch.float64)
        sums[1] += rows.double().square_().sum((0, 2, 3))
    return sums


def _enlarged_rows(x: Tensor, first: int, last: int) -> Tensor:
    """Rows [first, last) of (1, C, h, w) with twice its sides, zeros beyond its ends."""
    height = 2 * x.shape[2]
    top, bottom = max(0, first), min(height, last)
    above = top // 2
    seen = F.interpolate(x[:, :, above : -(-bottom // 2)], scale_factor=2.0, mode="nearest")
    out = _empty(1, x.shape[1], last - first, seen.shape[3], like=x)
    out[:, :, : top - first] = 0
    out[:, :, bottom - first :] = 0
    out[:, :, top - first : bottom - first] = seen[:, :, top - 2 * above : bottom - 2 * above]
    return out


def _normed_rows(
    parts: tuple[Tensor, ...], scale: Tensor, shift: Tensor, activation: nn.Module, first: int, last: int
) -> Tensor:
    """Rows [first, last) of the joined, normed and activated parts, (1, C, last − first, w); zeros beyond their
    ends."""
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
