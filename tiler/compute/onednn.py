"""oneDNN operators that are private in torch: convolutions with prepacked weights, and products of 8-bit integers. No
other module of tiler calls such operators.

torch may change them or be built without them, so each is tried once on a small input with a known result. If that
fails, another kernel does the work, and `notes` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiler.compute import cpu

Pair = tuple[int, ...]


class Geometry(NamedTuple):
    """How a convolution's kernel moves over its input, in the order of oneDNN's arguments."""

    padding: Pair
    stride: Pair
    dilation: Pair
    groups: int

    @classmethod
    def of(cls, layer: nn.Conv2d) -> Geometry:
        assert not isinstance(layer.padding, str)
        return cls(layer.padding, layer.stride, layer.dilation, layer.groups)

    def is_pointwise(self, shape: Sequence[int]) -> bool:
        """Whether a convolution with a weight of `shape` is a linear layer of its pixels."""
        return tuple(shape[2:]) == (1, 1) and self == Geometry((0, 0), (1, 1), (1, 1), 1)


def reorder(weight: Tensor, geometry: Geometry, sides: Sequence[int]) -> Tensor:
    """Rearrange rows of a convolution's weight (n, in, ...) fp32 into oneDNN's own order for an input of `sides`
    (height, width)."""
    channels = weight.shape[1] * geometry.groups
    out: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, (1, channels, *sides))
    return out


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """x: (1, in, h, w) fp32, with a weight that was reordered for its size → (1, n, h', w')."""
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, "none", [], "")
    return out


def plain_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """x: (n, in, h, w) fp32, with a plain weight. torch uses oneDNN for some convolutions, small ones and 1 × 1, only
    with several threads, and then rounds differently."""
    if prepacks() and not x.is_meta:
        out: Tensor = torch.mkldnn_convolution(x, weight, bias, *geometry)
        return out
    padding, stride, dilation, groups = geometry
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def matrix(rows: Tensor) -> Tensor:
    """Rows (n, in, ...) of an int8 weight as oneDNN's plain matrix (taps × in, n). oneDNN's own transposition is the
    fastest."""
    n = len(rows)
    return rows.reshape(n, rows.shape[1], -1).to_mkldnn().transpose(0, 2).reshape(-1, n)


def product(values: Tensor, zero: int, weight: Tensor, scale: Tensor) -> Tensor:
    """(values − zero) · weight × scale: values (tokens, k) uint8, weight a `matrix` (k, n), scale (n,) → (tokens, n)
    fp32."""
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        values, 1.0, zero, weight, scale, torch.zeros(len(scale), dtype=torch.int64), None,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return out


def _try_convolution() -> bool:
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    x = torch.ones(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(8, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    plain = torch.mkldnn_convolution(x, weight, None, *geometry)
    out = convolution(x, reorder(weight, geometry, (4, 4)), None, geometry)
    inside, corners = out[..., 1:3, 1:3], out[..., ::3, ::3]
    return bool((inside == 72).all()) and bool((corners == 32).all()) and torch.equal(out, plain)


def _try_product() -> bool:
    values, weight = torch.full((4, 32), 3, dtype=torch.uint8), torch.full((16, 32), -2, dtype=torch.int8)
    return bool((product(values, 1, matrix(weight), torch.full((16,), 0.5)) == -64).all())


def _fault(attempt: Callable[[], bool]) -> str:
    """The reason why an operator cannot be used, or ""."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    try:
        with torch.no_grad():
            return "" if attempt() else "its result is wrong"
    except (AttributeError, RuntimeError, TypeError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]


@cache
def convolution_fault() -> str:
    """The reason why convolutions with prepacked weights cannot be used here, or ""."""
    return _fault(_try_convolution)


@cache
def product_fault() -> str:
    """The reason why 8-bit products cannot be used here, or ""."""
    return _fault(_try_product)


def prepacks() -> bool:
    """Whether convolution weights are rearranged into oneDNN's order once for all samples."""
    return cpu.prepacks() and not convolution_fault()


def int8() -> cpu.Int8:
    """The form of int8 on this processor with this torch. Weights are quantised in the same way whether products work
    or not."""
    means = cpu.int8()
    if not means.products or not (fault := product_fault()):
        return means
    why = f"{means.largest.bit_length()}-bit weights, fp32 arithmetic, oneDNN's 8-bit products fail: {fault}"
    return cpu.Int8(means.largest, False, False, why)


def notes() -> list[str]:
    """A sentence for each operator that would help on this processor but does not work in this torch."""
    found = []
    if cpu.prepacks() and (fault := convolution_fault()):
        found.append(f"convolutions reorder their weights at every call: {fault}")
    if cpu.int8().products and (fault := product_fault()):
        found.append(f"int8 weights are multiplied in fp32: {fault}")
    return found
