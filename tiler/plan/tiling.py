"""From a request and a family: where tiles lie at every step, and which steps the guide replaces. Sizes in latent pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tiler.diffusion.canvas import first_step
from tiler.diffusion.guide import GuideSize, guide_size
from tiler.diffusion.tiles import Text2ImageRegion, guide_tiles, plan_tiles, tiles_of_step
from tiler.errors import UsageError
from tiler.models.family import Family
from tiler.request import Layout, ResolvedRequest

Steps = tuple[tuple[Text2ImageRegion, ...], ...]
"""The tiles of each step."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut into tiles and steps. Sizes in latent pixels."""

    canvas: tuple[int, int]
    guide: GuideSize | None
    regions: tuple[Text2ImageRegion, ...]
    begin: int
    guide_steps: Steps
    canvas_steps: Steps

    @property
    def guide_samples(self) -> int:
        return sum(tile.samples for step in self.guide_steps for tile in step)

    @property
    def canvas_samples(self) -> int:
        return sum(tile.samples for step in self.canvas_steps for tile in step)

    @property
    def denoiser_samples(self) -> int:
        return self.guide_samples + self.canvas_samples


def plan_tiling(request: ResolvedRequest, family: Family) -> Tiling:
    """The tiles of every step. Raises UsageError for sizes, overlaps and regions that do not go with the model."""
    canvas = request.canvas_size[0] // 8, request.canvas_size[1] // 8
    side = family.native
    if min(canvas) < side:
        raise UsageError(
            f"{request.width}×{request.height} is smaller than a tile of this model; both sides must be at least {8 * side} pixels"
        )
    overlap = side // 4 if request.overlap is None else request.overlap // 8
    regions = plan_tiles(request, canvas=canvas, tile=(side, side), overlap=overlap)
    # Nothing comes after the last step to hide its borders: there the tiles overlap in every layout.
    grid, last = replace(request, layout=Layout.GRID), regions
    if request.layout is not Layout.GRID:
        last = plan_tiles(grid, canvas=canvas, tile=(side, side), overlap=overlap)
    wanted = request.guide and request.guide_image is None and request.prompt is not None
    guide = guide_size(canvas, side, family.granularity, request.wrap.axes) if wanted else None
    guide_regions = guide_tiles(guide[:2], request.wrap, request.guidance_scale) if guide is not None else []
    guided = guide is not None or request.guide_image is not None
    begin = first_step(request.num_inference_steps, request.strength) if guided else 0
    steps = request.num_inference_steps
    guide_steps = tuple(tiles_of_step(guide_regions, request, n) for n in range(steps) if guide_regions)
    canvas_steps = tuple(tiles_of_step(regions, request, n) for n in range(begin, steps - 1))
    canvas_steps += tuple(tiles_of_step(last, grid, n) for n in range(max(begin, steps - 1), steps))
    return Tiling(
        canvas=canvas,
        guide=guide,
        regions=tuple(regions),
        begin=begin,
        guide_steps=guide_steps,
        canvas_steps=canvas_steps,
    )
