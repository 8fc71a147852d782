"""Where tiles lie and how their predictions are weighted. All positions are latent pixels.

Mixture of Diffusers (Jiménez 2023, arXiv:2302.02412): the canvas takes ε̂ = Σ m_r ε_r / Σ m_r per latent pixel.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tiler.errors import UsageError
from tiler.request import MAX_STEPS, Layout, Mask, ResolvedRequest, Wrap

FACTOR = 8  # pixels of a latent's side
VARIANCE = 0.01  # of the gaussian mask, relative to the squared side; the method's own value


@dataclass(frozen=True, kw_only=True, eq=False)
class Text2ImageRegion:
    """One tile of the canvas under one prompt.

    `condition` indexes the encoded (prompt, negative prompt) pairs. `weights` is the normalised mask m_r / Σ m_r:
    (tile height, tile width) fp32; over all tiles they sum to 1 at every canvas pixel. A tile that reaches beyond
    the border goes on at the other side of `canvas`, (height, width).
    """

    top: int
    left: int
    height: int
    width: int
    condition: int
    guidance_scale: float
    weights: Tensor
    canvas: tuple[int, int]

    @property
    def samples(self) -> int:
        """UNet samples a step: without guidance there is no unconditional half."""
        return 2 if self.guidance_scale > 1 else 1

    @property
    def crop(self) -> tuple[Tensor, Tensor]:
        """Indexes the last two dimensions of a canvas."""
        return _crop(self.top, self.left, (self.height, self.width), self.canvas)


def _crop(top: int, left: int, tile: tuple[int, int], canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    rows, cols = torch.arange(top, top + tile[0]) % canvas[0], torch.arange(left, left + tile[1]) % canvas[1]
    return rows[:, None], cols


def even_starts(length: int, tile: int, overlap: int, wraps: bool = False) -> list[int]:
    """First positions of the fewest tiles that cover `length` with at least `overlap` between neighbours, evenly spaced.
    The last neighbour of an axis that `wraps` is the first."""
    if wraps:
        count = math.ceil(length / (tile - overlap))
        return [round(i * length / count) for i in range(count)]
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
    request: ResolvedRequest, *, canvas: tuple[int, int], tile: tuple[int, int], overlap: int
) -> list[Text2ImageRegion]:
    """Every tile of the canvas with its normalised mask, in the order they are computed.

    `canvas` and `tile` are (height, width), `overlap` the least overlap (of GRID), all in latent pixels. Condition 0 is the
    top-level prompt when there is one; the regions follow. Inside a region the top-level prompt only speaks within
    `overlap` of the region's border, fading inwards: it covers the rest of the canvas.
    Raises UsageError for regions that are too small or leave a hole.
    """
    if overlap >= min(tile):
        raise UsageError(f"overlap = {8 * overlap} must be smaller than a tile ({8 * min(tile)} pixels)")
    base = 0 if request.prompt is None else 1
    placed: list[_Placed] = []
    if request.prompt is not None:
        rest = _rest_of_canvas(request, canvas, overlap)
        mask = _mask(request.mask, tile)
        spacing = (0, Wrap.XY) if request.layout is Layout.SHIFT else (overlap, request.wrap)
        for top, left in _grid(canvas, tile, *spacing):
            part = rest[_crop(top, left, tile, canvas)]
            if bool((part > 0).any()):
                placed.append(_Placed(top, left, 0, request.guidance_scale, mask * part))
    for number, region in enumerate(request.regions):
        rows, cols = [v // 8 for v in region.rows], [v // 8 for v in region.cols]
        height, width = rows[1] - rows[0], cols[1] - cols[0]
        if height < tile[0] or width < tile[1]:
            raise UsageError(
                f"region {region.prompt!r} is {8 * width}×{8 * height} pixels, smaller than a tile of this model "
                f"({8 * tile[1]}×{8 * tile[0]}); enlarge it"
            )
        mask = _mask(region.mask or request.mask, tile) * region.mask_weight
        scale = request.guidance_scale if region.guidance_scale is None else region.guidance_scale
        for top, left in _grid((height, width), tile, overlap):
            placed.append(_Placed(rows[0] + top, cols[0] + left, base + number, scale, mask))
    return _normalise(placed, tile, canvas)


def guide_tiles(size: tuple[int, int], wrap: Wrap, guidance_scale: float) -> list[Text2ImageRegion]:
    """The guide's canvas of `size` (height, width), under the first prompt: one tile as large as itself. Along an axis that
    wraps there are two, half a picture apart, so that each hides the other's border."""
    mask = _mask(Mask.CONSTANT if wrap is Wrap.NONE else Mask.GAUSSIAN, size)
    starts = _grid(size, size, min(size) // 4, wrap)
    return _normalise([_Placed(top, left, 0, guidance_scale, mask) for top, left in starts], size, size)


def tiles_of_step(
    regions: Sequence[Text2ImageRegion], request: ResolvedRequest, number: int
) -> tuple[Text2ImageRegion, ...]:
    """The tiles of step `number` of the schedule, from 0.

    Outside the request's guidance interval they have no guidance (Kynkäänniemi et al. 2024, arXiv:2404.07724). In the layout
    SHIFT they are moved around the canvas by an offset drawn from seed and number (Frolov et al. 2024, arXiv:2407.15507);
    an axis of a single tile stays.
    """
    low, high = request.guidance_interval
    guided = low <= number / request.num_inference_steps < high
    down = across = 0
    if request.layout is Layout.SHIFT:
        height, width = regions[0].canvas
        rng = random.Random(request.seed * MAX_STEPS + number)
        down, across = rng.randrange(height), rng.randrange(width)
        down, across = down if regions[0].height < height else 0, across if regions[0].width < width else 0
    return tuple(
        replace(
            region, top=region.top + down, left=region.left + across,
            guidance_scale=region.guidance_scale if guided else 1.0,
        )
        for region in regions
    )  # fmt: skip


class _Placed(NamedTuple):
    top: int
    left: int
    condition: int
    guidance_scale: float
    mask: Tensor  # unnormalised, fp64


def _grid(
    canvas: tuple[int, int], tile: tuple[int, int], overlap: int, wrap: Wrap = Wrap.NONE
) -> list[tuple[int, int]]:
    rows, cols = (even_starts(canvas[i], tile[i], overlap, wrap.axes[i]) for i in (0, 1))
    return [(top, left) for top in rows for left in cols]


def _mask(kind: Mask, tile: tuple[int, int]) -> Tensor:
    return torch.outer(mask_profile(kind, tile[0]), mask_profile(kind, tile[1]))


def _normalise(placed: list[_Placed], tile: tuple[int, int], canvas: tuple[int, int]) -> list[Text2ImageRegion]:
    """Raises UsageError where no mask reaches."""
    total = torch.zeros(canvas, dtype=torch.float64)
    for p in placed:
        total[_crop(p.top, p.left, tile, canvas)] += p.mask
    if not bool((total > 0).all()):
        row, col = (total <= 0).nonzero()[0].tolist()
        raise UsageError(
            f"no region covers the canvas at row {8 * row}, column {8 * col}; add a top-level prompt or another region"
        )
    return [
        Text2ImageRegion(
            top=p.top, left=p.left, height=tile[0], width=tile[1], canvas=canvas, condition=p.condition,
            guidance_scale=p.guidance_scale, weights=(p.mask / total[_crop(p.top, p.left, tile, canvas)]).float(),
        )
        for p in placed
    ]  # fmt: skip


def _rest_of_canvas(request: ResolvedRequest, canvas: tuple[int, int], ramp: int) -> Tensor:
    """How far the top-level prompt speaks: 1 outside all regions, falling to 0 over `ramp` latents inside. fp64."""
    rest = torch.ones(canvas, dtype=torch.float64)
    far = float(max(canvas) + ramp)
    for region in request.regions:
        depth = []  # distance from the region's border along each axis; the edge of a canvas that does not wrap is no border
        spans = zip((region.rows, region.cols), canvas, request.wrap.axes, strict=True)
        for (first, last), length, wraps in spans:
            first, last = first // 8, last // 8
            at, whole = torch.arange(last - first, dtype=torch.float64), last - first == length
            low = at + 1 if first > 0 or (wraps and not whole) else torch.full_like(at, far)
            high = (last - first) - at if last < length or (wraps and not whole) else torch.full_like(at, far)
            depth.append(torch.minimum(low, high))
        inside = torch.minimum(depth[0][:, None], depth[1][None, :])
        fade = (1 - inside / (ramp + 1)).clamp_min(0)
        crop = slice(region.rows[0] // 8, region.rows[1] // 8), slice(region.cols[0] // 8, region.cols[1] // 8)
        rest[crop] = torch.minimum(rest[crop], fade)
    return rest
