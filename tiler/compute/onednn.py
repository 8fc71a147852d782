"""Convolutions in fp32 by oneDNN, as torch contains it."""

from __future__ import annotations

from collections.abc import Sequence
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


def convolves() -> bool:
    """Whether oneDNN computes convolutions, whose images are then best in channels-last; measured on x86 only."""
    return cpu.has_avx2() and torch.backends.mkldnn.is_available()


def plain_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """x: (n, in, h, w) fp32. torch uses oneDNN for some convolutions, small ones and 1 × 1, only with several threads,
    and then rounds differently."""
    if convolves() and not x.is_meta:
        out: Tensor = torch.mkldnn_convolution(x, weight, bias, *geometry)
        return out
    padding, stride, dilation, groups = geometry
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
