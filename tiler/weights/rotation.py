"""The rotation that spreads outliers before values are rounded to 8 bits. Groups of 64 inputs are multiplied by the
Walsh–Hadamard matrix divided by √64, which is orthogonal and its own inverse (Ashkboos et al. 2024, QuaRot,
arXiv:2404.00456).

Trained transformers have a few channels some thirty times as large as the rest, which would leave the rest few
quantisation steps. A rotated weight gives the same products with rotated inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

ROTATED_SCALE = ".rotated_scale"  # suffix of the factors of an int8 tensor's rows that mark it as rotated
GROUP = 64  # a power of 4, whose root is exact


def can_rotate(shape: Sequence[int]) -> bool:
    """Whether a weight of `shape` belongs to a linear layer and divides into complete groups of inputs."""
    return len(shape) == 2 and shape[1] % GROUP == 0


def rotate_(rows: Tensor) -> Tensor:
    """Rotate `rows`, (..., inputs) fp32 and contiguous, in place. The kernels in C add in the same order."""
    distance = 1
    while distance < GROUP:
        first, second = rows.view(-1, GROUP // distance // 2, 2, distance).unbind(2)
        difference = first - second
        first += second
        second.copy_(difference)
        distance *= 2
    return rows.mul_(GROUP**-0.5)
