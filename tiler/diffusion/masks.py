"""Masks that weight a tile's prediction, and their normalisation over all tiles of a canvas.

Mixture of Diffusers (Jiménez 2023, arXiv:2302.02412): the canvas takes ε̂ = Σ m_r ε_r / Σ m_r per latent pixel. A mask
is the outer product of two profiles, so no table is larger than a tile: Σ m_r is summed over one tile, from the
neighbours that overlap it. Tiles with the same arrangement of neighbours share one mask. All positions are latent
pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tiler.request import Mask

VARIANCE = 0.01  # of the gaussian mask, relative to the squared side; the method's own value
MASKS_KEPT = 64  # normalised masks in memory; a regular grid has fewer kinds of neighbourhoods


class Neighbours(NamedTuple):
    """The tiles of one prompt that overlap a tile: their offsets along each axis, in all combinations, and the kind and
    weight of their mask. If it `fades`, the mask is multiplied by the share of the top-level prompt."""

    downs: tuple[int, ...]
    acrosses: tuple[int, ...]
    kind: Mask
    weight: float
    fades: bool


class Border(NamedTuple):
    """A region along one axis: [first, last), and whether each end lies inside the canvas."""

    first: int
    last: int
    low: bool
    high: bool


def mask_profile(kind: Mask, n: int) -> Tensor:
    """One axis of a mask, (n,) fp64. The mask of a tile is the outer product of the profiles of its axes."""
    k = torch.arange(n, dtype=torch.float64)
    match kind:
        case Mask.CONSTANT:
            return torch.ones(n, dtype=torch.float64)
        case Mask.GAUSSIAN:
            # exp(−(k − (n−1)/2)² / (2·v·n²)) / √(2πv): each axis has its own length and its true midpoint.
            return torch.exp(-((k - (n - 1) / 2) ** 2) / (2 * VARIANCE * n * n)) / math.sqrt(2 * math.pi * VARIANCE)
        case Mask.QUARTIC:
            u = 1.99 * k / max(1, n - 1) - 0.995
            return 15 / 16 * (1 - u * u) ** 2


@lru_cache(maxsize=4096)
def offsets(starts: tuple[int, ...], start: int, side: int, length: int) -> tuple[int, ...]:
    """The offsets of those tiles of `side` at `starts` that overlap the tile at `start`, in order. An axis with a
    `length` is a ring, on which a tile may overlap another on both sides."""
    ahead = ((other - start) % length for other in starts)
    return tuple(offset for d in ahead for offset in (d, d - length) if -side < offset < side)


def normalised(
    own: tuple[Mask, float, bool], neighbours: tuple[Neighbours, ...], tile: tuple[int, int], rest: Tensor | None
) -> Tensor:
    """m_r / Σ m_r on one tile, (height, width) fp32. `own` are its mask's kind and weight, and whether it fades; the
    tile is among its neighbours; `rest`, (height, width) fp64, is how far the top-level prompt speaks, None where it
    does all over."""
    return _normalised(own, neighbours, tile) if rest is None else _divide(own, neighbours, tile, rest)


@lru_cache(maxsize=MASKS_KEPT)
def _normalised(own: tuple[Mask, float, bool], neighbours: tuple[Neighbours, ...], tile: tuple[int, int]) -> Tensor:
    return _divide(own, neighbours, tile, None)


def _divide(
    own: tuple[Mask, float, bool], neighbours: tuple[Neighbours, ...], tile: tuple[int, int], rest: Tensor | None
) -> Tensor:
    kind, weight, fades = own
    mask = torch.outer(mask_profile(kind, tile[0]), mask_profile(kind, tile[1])) * weight
    mask = mask if rest is None or not fades else mask * rest
    return (mask / _total(neighbours, tile, rest)).float()


def _total(neighbours: tuple[Neighbours, ...], tile: tuple[int, int], rest: Tensor | None) -> Tensor:
    """Σ m_r on one tile, (height, width) fp64, summed in the order of the tiles."""
    total = torch.zeros(tile, dtype=torch.float64)
    for n in neighbours:
        vertical, horizontal = (mask_profile(n.kind, side) for side in tile)
        for down in n.downs:
            rows, its_rows = _overlap(down, tile[0])
            for across in n.acrosses:
                cols, its_cols = _overlap(across, tile[1])
                mask = torch.outer(vertical[its_rows], horizontal[its_cols]) * n.weight
                total[rows, cols] += mask * rest[rows, cols] if n.fades and rest is not None else mask
    return total


def _overlap(offset: int, side: int) -> tuple[slice, slice]:
    """The rows (or columns) of a tile and of its neighbour at `offset` that overlap."""
    return slice(max(0, offset), min(side, side + offset)), slice(max(0, -offset), min(side, side - offset))


def rest_of_canvas(borders: Sequence[tuple[Border, Border]], rows: Tensor, cols: Tensor, ramp: int) -> Tensor:
    """The share of the top-level prompt at rows (h,) and columns (w,) of the canvas, (h, w) fp64: 1 outside all
    regions, falling to 0 over `ramp` latents inside them."""
    rest = torch.ones(len(rows), len(cols), dtype=torch.float64)
    for vertical, horizontal in borders:
        depths, inside = [], []  # distance from the region's border along each axis
        for at, border in ((rows, vertical), (cols, horizontal)):
            within = ((at >= border.first) & (at < border.last)).nonzero()[:, 0]
            position = (at[within] - border.first).double()
            far = torch.full_like(position, math.inf)
            low = position + 1 if border.low else far
            high = (border.last - border.first) - position if border.high else far
            depths.append(torch.minimum(low, high))
            inside.append(within)
        depth = torch.minimum(depths[0][:, None], depths[1][None, :])
        crop = inside[0][:, None], inside[1]
        rest[crop] = torch.minimum(rest[crop], (1 - depth / (ramp + 1)).clamp_min(0))
    return rest
