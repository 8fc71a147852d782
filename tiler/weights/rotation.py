"""The rotation that spreads outliers before values are rounded to 8 bits: groups of 64 inputs by the matrix of Walsh
and Hadamard over its root, which is orthogonal and its own inverse (Ashkboos et al. 2024, QuaRot, arXiv:2404.00456).

Trained transformers have a few channels some thirty times as large as the rest, which beside them would have few steps.
A weight whose inputs were rotated gives the same products with inputs that were.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

ROTATED_SCALE = ".rotated_scale"  # under this ending the factors of an int8 tensor's rows tell that they are rotated
GROUP = 64  # a power of 4, whose root is exact


def can_rotate(shape: Sequence[int]) -> bool:
    """Whether a weight of `shape` is that of a linear layer and divides into whole groups of inputs."""
    return len(shape) == 2 and shape[1] % GROUP == 0


def rotate_(rows: Tensor) -> Tensor:
    """`rows`, (..., inputs) fp32 and contiguous, rotated in place. The kernels in C add in the same order."""
    distance = 1
    while distance < GROUP:
        first, second = rows.view(-1, GROUP // distance // 2, 2, distance).unbind(2)
        difference = first - second
        first += second
        second.copy_(difference)
        distance *= 2
    return rows.mul_(GROUP**-0.5)
