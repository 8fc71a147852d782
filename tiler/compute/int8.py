"""Weights in 8 bits, with a scale for each output."""

from __future__ import annotations

import torch
from torch import Tensor

from tiler.compute import cpu


def quantize_rows(weight: Tensor, largest: int = 0) -> tuple[Tensor, Tensor]:
    """weight: (out, ...) fp32 → (int8 of the same shape in ±`largest` (default: the processor's), scale (out,) fp32):
    symmetric, absmax of each row."""
    scale = weight.flatten(1).abs().amax(1) / (largest or cpu.int8().largest)
    scale[scale == 0] = 1
    return (weight / scale.view(-1, *(1,) * (weight.ndim - 1))).round_().to(torch.int8), scale
