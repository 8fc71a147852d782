"""The operations around a product, one after another in fp32, for layers that are not streamed and kernels that do not
fuse them.

No value depends on the number of samples or threads. torch's own operators do not all guarantee this: a GroupNorm's
sums are divided among threads, and the last few values of a thread's share of an activation are computed by another
formula.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiler.compute import onednn
from tiler.compute.kernels import Epilogue, Input
from tiler.compute.native_inputs import quantize_images
from tiler.compute.tuning import NORM_ELEMENTS
from tiler.native.library import Type, library

_SHARE = 2**16  # values of an activation for each thread at a time: whole vectors, in the cache
_ALONE = 2**14  # values up to which torch uses one thread, whatever the activation
_ROWS = 16  # of a matrix product: with as many MKL's order is one, for every number of threads
_VECTOR = 64  # values: a multiple of what any processor computes at once


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of x, (..., in) fp32. A few rows are padded with zero rows: with 5, 6, 7 or 9 rows, MKL uses
    another order of operations for one thread than for several."""
    count = x.numel() // x.shape[-1]
    if x.is_meta or not 1 < count < _ROWS:
        return F.linear(x, weight, bias)
    padded = F.pad(x.reshape(count, -1), (0, 0, 0, _ROWS - count))
    return F.linear(padded, weight, bias)[:count].view(*x.shape[:-1], -1)


def made_input(made_of: Input, parts: tuple[Tensor, ...]) -> Tensor:
    """Join, enlarge, normalise and activate the parts."""
    x = joined(parts)
    if made_of.enlarged:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    if made_of.norm is not None:
        x = normed(made_of.norm, x)
    if made_of.activation is not None:
        # In place only where the tensor is ours.
        x = activated(made_of.activation, x.clone() if x is parts[0] else x)
    return x


def finished(after: Epilogue, products: Sequence[Tensor], residual: Tensor | None) -> tuple[Tensor, ...]:
    """Apply the epilogue to the products, one for each weight, after their bias; in place if possible."""
    outs = list(products)
    if after.glu:
        assert after.activation is not None
        first, second = outs if len(outs) == 2 else outs.pop().chunk(2, dim=-1)
        outs = [activated(after.activation, second.contiguous()).mul_(first)]
    elif after.activation is not None:
        outs = [activated(after.activation, out) for out in outs]
    if residual is not None:
        (out,) = outs
        out += residual
    return tuple(outs)


def joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.GroupNorm):
        return group_norm(norm, x)
    out: Tensor = norm(x)  # of each token by itself
    return out


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """torch's GroupNorm of x, (n, C, ...). Where oneDNN wants images in channels-last, those in fp32, (n, C, h, w), go
    through tiler's library, and the result is in channels-last too. Otherwise it is in the layout of x: the sums of a
    channel are taken over a few pixels at a time, of differences to its first pixel, and combined in fp64 (Chan, Golub
    & LeVeque 1979)."""
    if x.ndim == 4 and x.dtype == torch.float32 and onednn.convolves() and library() is not None:
        return quantize_images((x,), (0, 0), norm, silu=False, out_type=Type.FP32).values.permute(0, 3, 1, 2)
    out = torch.empty_like(x)
    if x.is_meta:
        return out
    step = max(1, NORM_ELEMENTS // x.shape[1])
    for sample, filled in zip(x, out, strict=True):
        pixels = sample.flatten(1).T  # a view, as `filled` is seen through
        scale, shift = _scale_and_shift(norm, pixels, step)
        for some, into in zip(pixels.split(step), filled.flatten(1).T.split(step), strict=True):
            torch.mul(some, scale, out=into).add_(shift)
    return out


def _scale_and_shift(norm: nn.GroupNorm, pixels: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """(C,) fp32 each, for pixels (n, C) fp32: normalised is pixel · scale + shift."""
    first, count = pixels[0], len(pixels)
    sums, squares = torch.zeros(2, len(first), dtype=torch.float64)
    for some in pixels.split(step):
        difference = some - first
        sums += difference.sum(0)
        squares += difference.square_().sum(0)
    means = (first + sums / count).view(norm.num_groups, -1)
    variances = ((squares - sums.square() / count) / count).view(norm.num_groups, -1)
    mean = means.mean(1, keepdim=True)
    variance = (variances + (means - mean).square()).mean(1, keepdim=True)
    scale = torch.rsqrt(variance + norm.eps).expand_as(means).flatten()
    shift = -mean.expand_as(means).flatten() * scale
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    return scale.float(), shift.float()


def activated(act: nn.Module, x: Tensor) -> Tensor:
    """Activate `x`, dense in memory, in place."""
    if x.is_meta:
        return x
    flat = (x if x.is_contiguous() else x.movedim(1, -1)).view(-1)
    share = _SHARE * torch.get_num_threads()
    whole = len(flat) // share * share
    for some in (*flat[:whole].split(share), *flat[whole:].split(_ALONE)):
        if missing := -len(some) % _VECTOR:
            some.copy_(act(F.pad(some, (0, missing)))[: len(some)])
        elif isinstance(act, nn.SiLU):
            F.silu(some, inplace=True)
        else:
            some.copy_(act(some))
    return x
