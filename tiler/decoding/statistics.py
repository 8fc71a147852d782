"""Statistics of a picture that is processed strip by strip: its size, and each group's mean and variance."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from tiler.compute.native_inputs import Moments, moments
from tiler.native import library


class Pooled:
    """Mean and variance of each group over a picture seen strip by strip, pooled in fp64 (Chan, Golub & LeVeque
    1979)."""

    def __init__(self, groups: int) -> None:
        self.groups, self.count = groups, 0
        self.mean = torch.zeros(groups, dtype=torch.float64)
        self.m2 = torch.zeros(groups, dtype=torch.float64)

    def add(self, x: Tensor) -> float | None:
        """x: (1, C, n, W) fp32. Returns the largest magnitude, NaN where a value is not finite; None where it was not
        found out on the way."""
        if not x.shape[2]:
            return None
        if x.is_meta:
            x.new_empty(x.shape)  # planning: what is squared
            return None
        found = moments(x, self.groups) if library.library() is not None else _moments(x, self.groups)
        self.fold(x.numel() // self.groups, found.mean, found.squares)
        return max(-found.least, found.most) if math.isfinite(float(found.mean.sum())) else math.nan

    def fold(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Add `count` values of each group: their mean, and the sum of squared differences from it, (groups,) fp64."""
        delta, total = mean - self.mean, self.count + count
        self.m2 += squares + delta.square() * (self.count * count / total)
        self.mean += delta * (count / total)
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


def _moments(x: Tensor, groups: int) -> Moments:
    """By torch: two sums down the columns of (pixels, C), an eighth of torch.var_mean's time."""
    values = x[0].permute(1, 2, 0).flatten(0, 1)
    mean = values.mean(0).view(groups, -1).mean(1)
    each = mean.repeat_interleave(x.shape[1] // groups)
    var = (values - each).square_().mean(0).view(groups, -1).mean(1)
    low, high = torch.aminmax(values)
    return Moments(mean.double(), var.double() * (x.numel() // groups), float(low), float(high))


class Noted(Pooled):
    """The moments of each strip, not pooled, for whoever pools those of several processes in the picture's order."""

    def __init__(self, groups: int) -> None:
        super().__init__(groups)
        self.counts: list[int] = []
        self.moments: list[Tensor] = []  # (2, groups) fp64 each: means, and sums of squares

    def fold(self, count: int, mean: Tensor, squares: Tensor) -> None:
        self.counts.append(count)
        self.moments.append(torch.stack([mean, squares]))


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
        y, x, bottom = self.bounds(part.shape[3])
        return part[:, :, max(0, y - row) : max(0, bottom - row), x : part.shape[3] - x]

    def bounds(self, width: int) -> tuple[int, int, int]:
        """The first row and column without the margin, and the row after the last one, at the scale of rows of `width`:
        (top, left, bottom)."""
        scale = Fraction(width, self.width)
        return int(self.y * scale), int(self.x * scale), int((self.height - self.y) * scale)
