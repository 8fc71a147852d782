"""From a request and a family: where tiles lie at every step, and which steps the guide replaces. Sizes in latent pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tiler.diffusion.canvas import first_step
from tiler.diffusion.guide import GuideSize, guide_size
from tiler.diffusion.tiles import Steps, Tiles, guide_tiles, plan_tiles
from tiler.errors import UsageError
from tiler.models.family import Family, Guidance
from tiler.request import PIXEL_STEP, Layout, ResolvedRequest


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut into tiles and steps. Sizes in latent pixels."""

    canvas: tuple[int, int]
    crop: tuple[int, int]  # pixels: where the picture's first row and column lie on the canvas
    guide: GuideSize | None
    regions: Tiles
    begin: int
    guide_steps: Steps
    canvas_steps: Steps

    @property
    def guide_samples(self) -> int:
        return self.guide_steps.samples

    @property
    def canvas_samples(self) -> int:
        return self.canvas_steps.samples

    @property
    def denoiser_samples(self) -> int:
        return self.guide_samples + self.canvas_samples


def plan_tiling(request: ResolvedRequest, family: Family) -> Tiling:
    """The tiles of every step. Raises UsageError for sizes, overlaps and regions that do not go with the model."""
    asked = request.canvas_size[0] // PIXEL_STEP, request.canvas_size[1] // PIXEL_STEP
    side = family.native
    canvas, crop = _at_least_a_tile(request, asked, side)
    overlap = side // 4 if request.overlap is None else request.overlap // 8
    regions = plan_tiles(request, canvas=canvas, tile=(side, side), overlap=overlap)
    last = None
    if request.layout is not Layout.GRID:
        last = plan_tiles(replace(request, layout=Layout.GRID), canvas=canvas, tile=(side, side), overlap=overlap)
    unconditional = family.traits.guidance is Guidance.CFG
    regions = replace(regions, unconditional=unconditional)
    last = None if last is None else replace(last, unconditional=unconditional)
    wanted = request.guide and request.guide_image is None and request.prompt is not None
    guide = guide_size(canvas, side, family.granularity, request.wrap.axes) if wanted else None
    guided = guide is not None or request.guide_image is not None
    steps = request.num_inference_steps
    begin = first_step(steps, request.strength) if guided else 0
    guide_steps = Steps(regions, request, range(0))
    if guide is not None:
        tiles = guide_tiles(guide[:2], request.wrap, request.guidance_scale)
        guide_steps = Steps(replace(tiles, unconditional=unconditional), request, range(steps))
    return Tiling(
        canvas=canvas,
        crop=crop,
        guide=guide,
        regions=regions,
        begin=begin,
        guide_steps=guide_steps,
        canvas_steps=Steps(regions, request, range(begin, steps), last),
    )


def _at_least_a_tile(
    request: ResolvedRequest, asked: tuple[int, int], side: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The canvas of (height, width) latents, no side of it below a tile's, and the pixels above and left of the picture: it is the
    middle of a larger canvas along such a side. Raises UsageError where that cannot be."""
    if min(asked) >= side:
        return asked, (0, 0)
    if request.regions or any(wraps and length < side for wraps, length in zip(request.wrap.axes, asked, strict=True)):
        option = "--regions" if request.regions else f"--wrap {request.wrap}"
        raise UsageError(
            f"{request.width}×{request.height} is smaller than a tile of this model, and {option} needs at least "
            f"{side * PIXEL_STEP} pixels along both sides; enlarge the picture"
        )
    canvas = max(asked[0], side), max(asked[1], side)
    above, left = (
        (n * PIXEL_STEP - m) // 2 if n > a else 0
        for n, a, m in zip(canvas, asked, (request.height, request.width), strict=True)
    )
    return canvas, (above, left)
