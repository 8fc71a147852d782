"""The mid-block attention of a picture whose keys and values lie in the scratch.

Some or all tokens are seen, with keys and values in chunks and a running softmax (Milakov & Gimelshein 2018,
arXiv:1805.02867).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tiler.compute.layers import attend_in_parts
from tiler.decoding.rows import MidAttention, Stage
from tiler.decoding.scratch import Rows
from tiler.decoding.statistics import Frame

KEYS = 4096  # tokens of keys and values in memory at a time
QUERIES = 1024


class Attend(Stage):
    """The mid-block attention of some rows to all tokens of the picture, stored as `memory` (keys above values)."""

    growth = 4.0  # the scores exist beside the queries

    def __init__(self, stage: MidAttention, memory: Rows) -> None:
        self.stage, self.memory = stage, memory

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        if x is None:
            return None
        a = self.stage.attention
        tokens = self.stage.norm.apply(x).flatten(2).transpose(1, 2)
        queries = a.to_q(tokens).unflatten(-1, (a.heads, -1)).transpose(1, 2)  # (1, heads, rows·W, d)
        del tokens
        mixed = torch.cat(
            [attend_in_parts(part, self._parts(), a.to_q) for part in queries.split(QUERIES, dim=2)], dim=2
        )
        out = a.to_out[0](mixed.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)
        return (out + x).div_(a.rescale_output_factor)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the keys and values of some tokens at a time, (1, heads, n, d) each."""
        heads, memory = self.stage.attention.heads, self.memory
        for strip in memory.strips(KEYS * 4 * memory.channels):
            keys, values = (
                strip.flatten(2).transpose(1, 2).unflatten(-1, (2 * heads, -1)).transpose(1, 2).chunk(2, dim=1)
            )
            yield keys, values
            if strip.is_meta:  # planning: one chunk of the memory suffices
                return
            del strip, keys, values  # freed before the next ones


def spacing(height: int, width: int, most: int | None) -> int:
    """The distance along rows and columns between the tokens that attention sees, such that about `most` remain; 1 if
    `most` is None."""
    return 1 if most is None else math.ceil(math.sqrt(height * width / most))


def tokens_above(row: int, frame: Frame, width: int, step: int) -> int:
    """How many rows of the tokens that attention sees, each `step`-th, lie above `row` of a picture of `width`."""
    top, _, bottom = frame.bounds(width)
    return len(range(step // 2, max(0, min(row, bottom) - top), step))


def keys_and_values_of(stage: MidAttention, strip: Tensor, frame: Frame, row: int, step: int) -> Tensor | None:
    """The keys and values, (1, 2C, n', w'), of each `step`-th token in both directions of a strip, (1, C, n, w), whose
    first row is `row`; None if it has none. Tokens in the frame's margin are not seen."""
    a, x = stage.attention, frame.inner(strip, row)
    top, _, bottom = frame.bounds(strip.shape[3])
    seen = max(0, min(row, bottom) - top)
    x = x[:, :, (step // 2 - seen) % step :: step, step // 2 :: step]
    if not x.shape[2]:
        return None
    tokens = stage.norm.apply(x).flatten(2).transpose(1, 2)
    both = torch.cat([a.to_k(tokens), a.to_v(tokens)], dim=2)
    return both.transpose(1, 2).unflatten(2, tuple(x.shape[2:]))
