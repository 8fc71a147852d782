"""The order in which the native kernels read int8 weights: [outputs / 16][tap][inputs / 4][16 outputs][4 inputs].

A packed file may store weights in this order, so that a pass only reads them. The file's header then gives these five
sides as the tensor's shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

OUTPUTS, INPUTS = 16, 4


def can_block(shape: Sequence[int]) -> bool:
    """Whether a weight (outputs, inputs, *taps) can be divided into complete blocks."""
    return len(shape) >= 2 and shape[0] % OUTPUTS == 0 and shape[1] % INPUTS == 0


def block_sides(shape: Sequence[int]) -> tuple[int, ...]:
    """The five sides of a weight (outputs, inputs, *taps)."""
    return shape[0] // OUTPUTS, math.prod(shape[2:]), shape[1] // INPUTS, OUTPUTS, INPUTS


def blocked(rows: Tensor) -> Tensor:
    """The rows (outputs, inputs, *taps) of a weight in the order of blocks, contiguous."""
    outputs, inputs = rows.shape[:2]
    split = rows.reshape(outputs // OUTPUTS, OUTPUTS, inputs // INPUTS, INPUTS, -1)
    return split.permute(0, 4, 2, 1, 3).contiguous()


def unblocked(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `blocked`, for rows of `shape`."""
    return blocks.view(block_sides(shape)).permute(0, 3, 2, 4, 1).reshape(tuple(shape))
