"""Where tiles lie and how their predictions are weighted. All positions are latent pixels.

Mixture of Diffusers (Jiménez 2023, arXiv:2302.02412): the canvas takes ε̂ = Σ m_r ε_r / Σ m_r per latent pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tiler.errors import UsageError
from tiler.request import Mask, RenderRequest

VARIANCE = 0.01  # of the gaussian mask, relative to the squared side; the method's own value


@dataclass(frozen=True, kw_only=True, eq=False)
class Text2ImageRegion:
    """One tile of the canvas under one prompt.

    `condition` indexes the encoded (prompt, negative prompt) pairs. `weights` is the normalised mask m_r / Σ m_r:
    (tile height, tile width) fp32; over all tiles they sum to 1 at every canvas pixel.
    """

    top: int
    left: int
    height: int
    width: int
    condition: int
    guidance_scale: float
    weights: Tensor

    @property
    def crop(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def even_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First positions of the fewest tiles that cover `length` with at least `overlap` between neighbours, evenly spaced."""
    if length == tile:
        return [0]
    count = math.ceil((length - tile) / (tile - overlap)) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def mask_profile(kind: Mask, n: int) -> Tensor:
    """One axis of a mask: (n,) fp64. The mask of a tile is the outer product of its axes' profiles."""
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


def plan_tiles(
    request: RenderRequest, *, canvas: tuple[int, int], tile: tuple[int, int], overlap: int
) -> list[Text2ImageRegion]:
    """Every tile of the canvas with its normalised mask, in the order they are computed.

    `canvas` and `tile` are (height, width), `overlap` the least overlap, all in latent pixels. Condition 0 is the
    top-level prompt when there is one; the regions follow. Inside a region the top-level prompt only speaks within
    `overlap` of the region's border, fading inwards: it covers the rest of the canvas.
    Raises UsageError for regions that are too small or leave a hole.
    """
    if overlap >= min(tile):
        raise UsageError(f"overlap = {8 * overlap} must be smaller than a tile ({8 * min(tile)} pixels)")
    base = 0 if request.prompt is None else 1
    placed: list[
        tuple[int, int, int, float, Tensor]
    ] = []  # top, left, condition, guidance_scale, unnormalised mask (fp64)
    if request.prompt is not None:
        rest = _rest_of_canvas(request, canvas, overlap)
        mask = torch.outer(mask_profile(request.mask, tile[0]), mask_profile(request.mask, tile[1]))
        for top in even_starts(canvas[0], tile[0], overlap):
            for left in even_starts(canvas[1], tile[1], overlap):
                part = rest[top : top + tile[0], left : left + tile[1]]
                if bool((part > 0).any()):
                    placed.append((top, left, 0, request.guidance_scale, mask * part))
    for number, region in enumerate(request.regions):
        rows, cols = [v // 8 for v in region.rows], [v // 8 for v in region.cols]
        height, width = rows[1] - rows[0], cols[1] - cols[0]
        if height < tile[0] or width < tile[1]:
            raise UsageError(
                f"region {region.prompt!r} is {8 * width}×{8 * height} pixels, smaller than a tile of this model "
                f"({8 * tile[1]}×{8 * tile[0]}); enlarge it"
            )
        kind = region.mask or request.mask
        mask = torch.outer(mask_profile(kind, tile[0]), mask_profile(kind, tile[1])) * region.mask_weight
        scale = request.guidance_scale if region.guidance_scale is None else region.guidance_scale
        for top in even_starts(height, tile[0], overlap):
            for left in even_starts(width, tile[1], overlap):
                placed.append((rows[0] + top, cols[0] + left, base + number, scale, mask))
    total = torch.zeros(canvas, dtype=torch.float64)
    for top, left, _, _, mask in placed:
        total[top : top + tile[0], left : left + tile[1]] += mask
    if not bool((total > 0).all()):
        row, col = (total <= 0).nonzero()[0].tolist()
        raise UsageError(
            f"no region covers the canvas at row {8 * row}, column {8 * col}; add a top-level prompt or another region"
        )
    regions = []
    for top, left, condition, scale, mask in placed:
        weights = (mask / total[top : top + tile[0], left : left + tile[1]]).float()
        regions.append(
            Text2ImageRegion(
                top=top,
                left=left,
                height=tile[0],
                width=tile[1],
                condition=condition,
                guidance_scale=scale,
                weights=weights,
            )
        )
    return regions


def _rest_of_canvas(request: RenderRequest, canvas: tuple[int, int], ramp: int) -> Tensor:
    """How far the top-level prompt speaks: 1 outside all regions, falling to 0 over `ramp` latents inside. fp64."""
    rest = torch.ones(canvas, dtype=torch.float64)
    far = float(max(canvas) + ramp)
    for region in request.regions:
        depth = []  # distance from the region's border along each axis; a side on the canvas's edge is no border
        for (first, last), length in ((region.rows, canvas[0]), (region.cols, canvas[1])):
            first, last = first // 8, last // 8
            at = torch.arange(last - first, dtype=torch.float64)
            low = at + 1 if first > 0 else torch.full_like(at, far)
            high = (last - first) - at if last < length else torch.full_like(at, far)
            depth.append(torch.minimum(low, high))
        inside = torch.minimum(depth[0][:, None], depth[1][None, :])
        fade = (1 - inside / (ramp + 1)).clamp_min(0)
        crop = slice(region.rows[0] // 8, region.rows[1] // 8), slice(region.cols[0] // 8, region.cols[1] // 8)
        rest[crop] = torch.minimum(rest[crop], fade)
    return rest
