"""Prepare the inputs of products for tiler's own library: join, normalise, activate, and quantise or cast them in two
passes; and compute the statistics of rows."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tiler.compute.kernels import HeldNorm
from tiler.native import library
from tiler.native.library import Type

MIDDLE = 128  # the quantised zero of a token's values
_ZERO = torch.tensor([MIDDLE], dtype=torch.int32)
_DTYPES = {Type.UINT8: torch.uint8, Type.BF16: torch.bfloat16, Type.FP32: torch.float32}


class Quantized(NamedTuple):
    """Samples as uint8, real value = scale × (value − zero). Either a matrix (rows, inputs) with one scale per row and
    one zero, or images (n, h, w, inputs) with a frame of zeros and one scale and one zero per image."""

    values: Tensor
    scale: Tensor
    zero: Tensor


def quantize_tokens(
    x: Tensor, norm: nn.Module | None = None, out_type: Type = Type.UINT8, *, rotated: bool = False
) -> Quantized:
    """x: (..., inputs) fp32 → a matrix. Each row is normalised, `rotated` if requested, and quantised symmetrically
    around MIDDLE by its absmax. Types other than uint8 are cast without a scale."""
    rows = x.reshape(-1, x.shape[-1])
    count, width = rows.shape
    values, scale = rows.new_empty(count, width, dtype=_DTYPES[out_type]), rows.new_empty(count)
    if not x.is_meta:
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        call = library.Rows(
            x=rows.data_ptr(), rows=count, width=width, step=rows.stride(0), out_type=out_type,
            out=values.data_ptr(), out_bytes=values[:1].nbytes, scale=scale.data_ptr(), rotated=rotated,
        )  # fmt: skip
        if isinstance(norm, nn.LayerNorm):
            call.norm, call.eps = True, norm.eps
            call.gamma, call.beta = address(norm.weight), address(norm.bias)
        needed_library().rows(call, torch.get_num_threads())
    return Quantized(values, scale, _ZERO)


def quantize_images(
    parts: tuple[Tensor, ...], padding: tuple[int, ...], norm: nn.Module | None, *, silu: bool, each_place: bool = False,
    out_type: Type = Type.UINT8,
) -> Quantized:  # fmt: skip
    """Join, normalise and activate one or two parts (n, C, h, w) fp32 → images with a frame of `padding` rows and
    columns and one scale each. With `each_place`, each pixel becomes a row of a matrix, as in `quantize_tokens`."""
    parts = tuple(part.contiguous(memory_format=torch.channels_last) for part in parts)
    count, _, height, width = parts[0].shape
    channels = [part.shape[1] for part in parts]
    total, (down, across) = sum(channels), padding
    sides = count, height + 2 * down, width + 2 * across, total
    values = parts[0].new_empty(sides, dtype=_DTYPES[out_type])
    scale = parts[0].new_empty(count * height * width if each_place else count)
    zero = _ZERO if each_place else parts[0].new_empty(count, dtype=torch.int32)
    scratch = parts[0].new_empty(library.scratch_floats(count, height * width, total))
    if not values.is_meta:
        call = library.Image(
            x=(ctypes.c_void_p * 2)(*(part.data_ptr() for part in parts)), channels=(ctypes.c_int64 * 2)(*channels),
            images=count, height=height, width=width, padding=across, padding_lines=down, silu=silu,
            each_place=each_place, out_type=out_type, out=values.data_ptr(), place_bytes=total * values.element_size(),
            scale=scale.data_ptr(), zero=zero.data_ptr(), scratch=scratch.data_ptr(),
        )  # fmt: skip
        if isinstance(norm, nn.GroupNorm):
            call.groups, call.eps = norm.num_groups, norm.eps
            call.gamma, call.beta = address(norm.weight), address(norm.bias)
        needed_library().image(call, torch.get_num_threads())
    return Quantized(values.view(-1, total) if each_place else values, scale, zero)


def write_lines(x: Tensor, lines: Tensor, norm: HeldNorm | None, *, silu: bool) -> None:
    """Fill `lines` (n, width + frame, C), fp32 or bf16, with the normalised and activated rows of x, (1, C, n, width)
    fp32, and with zeros to their left and right."""
    x = x.contiguous(memory_format=torch.channels_last)
    _, channels, height, width = x.shape
    if x.is_meta or not height:
        return
    factors = None if norm is None else norm.factors
    scratch = x.new_empty(2 * channels)
    call = library.Image(
        x=(ctypes.c_void_p * 2)(x.data_ptr()), channels=(ctypes.c_int64 * 2)(channels), images=1, height=height,
        width=width, padding=(lines.shape[1] - width) // 2, silu=silu, given=address(factors),
        out_type=Type.FP32 if lines.dtype == torch.float32 else Type.BF16, out=lines.data_ptr(),
        place_bytes=channels * lines.element_size(), scratch=scratch.data_ptr(),
    )  # fmt: skip
    needed_library().image(call, torch.get_num_threads())


class Moments(NamedTuple):
    """The mean and the sum of squared differences from it for each group of channels, (groups,) fp64 each; and the
    smallest and largest of all values. NaN or Inf among the values shows up in the mean."""

    mean: Tensor
    squares: Tensor
    least: float
    most: float


def moments(x: Tensor, groups: int) -> Moments:
    """The moments of x, (1, C, n, W) fp32."""
    x = x.contiguous(memory_format=torch.channels_last)
    _, channels, height, width = x.shape
    found = torch.empty(2 * groups + 2, dtype=torch.float64)
    scratch = x.new_empty(library.scratch_floats(1, height * width, channels))
    call = library.Moments(
        x=x.data_ptr(), places=height * width, channels=channels, groups=groups, scratch=scratch.data_ptr(),
        out=found.data_ptr(),
    )  # fmt: skip
    needed_library().moments(call, torch.get_num_threads())
    return Moments(found[:groups], found[groups:-2], float(found[-2]), float(found[-1]))


def address(tensor: Tensor | None, first: int = 0) -> int | None:
    """The address of element `first` of a contiguous tensor; None without a tensor."""
    return None if tensor is None else tensor.data_ptr() + first * tensor.element_size()


def needed_library() -> library.Library:
    """The library, for a kernel that is chosen only if the library exists."""
    found = library.library()
    assert found is not None
    return found
