"""Statistics of a picture that is processed strip by strip: its size, and each group's mean and variance."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


class Pooled:
    """Mean and variance of each group over a picture seen strip by strip, pooled in fp64 (Chan, Golub & LeVeque
    1979)."""

    def __init__(self, groups: int) -> None:
        self.groups, self.count = groups, 0
        self.mean = torch.zeros(groups, dtype=torch.float64)
        self.m2 = torch.zeros(groups, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """x: (1, C, n, W) fp32."""
        if not x.shape[2]:
            return
        if x.is_meta:
            x.new_empty(x.shape)  # planning: what is squared
            return
        # Two sums down the columns of (pixels, C): an eighth of torch.var_mean's time.
        values = x[0].permute(1, 2, 0).flatten(0, 1)
        mean = values.mean(0).view(self.groups, -1).mean(1)
        each = mean.repeat_interleave(x.shape[1] // self.groups)
        var = (values - each).square_().mean(0).view(self.groups, -1).mean(1)
        n = x.numel() // self.groups
        delta, total = mean.double() - self.mean, self.count + n
        self.m2 += var.double() * n + delta.square() * (self.count * n / total)
        self.mean += delta * (n / total)
        self.count = total

    def told(self) -> tuple[int, list[str], list[str]]:
        """The statistics in the form that a spool stores, exact to the last bit."""
        return self.count, [x.hex() for x in self.mean.tolist()], [x.hex() for x in self.m2.tolist()]

    def recall(self, told: tuple[int, list[str], list[str]]) -> None:
        """The inverse of `told`."""
        self.count, mean, m2 = told
        self.mean = torch.tensor([float.fromhex(x) for x in mean], dtype=torch.float64)
        self.m2 = torch.tensor([float.fromhex(x) for x in m2], dtype=torch.float64)

    @property
    def var(self) -> Tensor:
        return self.m2 / max(1, self.count)


class Frame(NamedTuple):
    """The input's size, and the margin on each side (above and below, left and right) that repeats the opposite side.
    The margin is for convolutions only: statistics and attention see every pixel once."""

    height: int
    width: int
    y: int = 0
    x: int = 0

    def inner(self, part: Tensor, row: int) -> Tensor:
        """The part of `part` without the margin. `part` contains complete rows from `row` on, (1, C, n, W), at any
        scale of the input."""
        scale = Fraction(part.shape[3], self.width)
        y, x, bottom = int(self.y * scale), int(self.x * scale), int((self.height - self.y) * scale)
        return part[:, :, max(0, y - row) : max(0, bottom - row), x : part.shape[3] - x]
