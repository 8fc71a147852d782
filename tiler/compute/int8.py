"""Weights in 8 bits, with a scale for each output."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiler.compute import cpu
from tiler.native.library import Quantise, library
from tiler.weights.blocks import INPUTS


def quantize_rows(weight: Tensor, largest: int = 0) -> tuple[Tensor, Tensor]:
    """weight: (out, in, ...) fp32 → (int8 of the same shape, scale (out,) fp32), symmetric. By default as the processor
    multiplies them, else the largest absolute value of a row becomes `largest`."""
    found = library()
    if not largest and cpu.int8().adds_fours and found is not None and weight.shape[1] % INPUTS == 0:
        weight = weight.contiguous()
        values, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
        call = Quantise(
            x=weight.data_ptr(), outputs=weight.shape[0], inputs=weight.shape[1], taps=math.prod(weight.shape[2:]),
            out=values.data_ptr(), scale=scale.data_ptr(),
        )  # fmt: skip
        found.quantise(call, torch.get_num_threads())
        return values, scale
    scale = weight.flatten(1).abs().amax(1) / (largest or 127)
    scale[scale == 0] = 1
    return (weight / scale.view(-1, *(1,) * (weight.ndim - 1))).round_().to(torch.int8), scale
