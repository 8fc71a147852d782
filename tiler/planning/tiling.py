"""Cut a request into tiles and steps for a model family: the tile positions at every step, and the steps that the guide
replaces. Sizes are in latent pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from tiler.decoding import FACTOR
from tiler.diffusion import flow, schedulers
from tiler.diffusion.calls import Calls
from tiler.diffusion.canvas import first_step
from tiler.diffusion.guide import GuideSize, guide_size
from tiler.diffusion.guide_picture import MAX_GUIDE_PIXELS
from tiler.diffusion.layouts import Steps, guide_tiles, latents_of, plan_tiles
from tiler.diffusion.poster import mask_cells
from tiler.diffusion.spot import Spot, find_spot
from tiler.diffusion.tiles import Tiles, Whole
from tiler.errors import UsageError
from tiler.models.family import Family, Guidance
from tiler.request import GuideUpscale, Layout, ResolvedRequest
from tiler.request.prompt import Stage
from tiler.request.wording import Wording, canvas_conditions, guide_conditions

_ROUNDING = 0.05  # doublings: a factor of 2.07 counts as 2, because sides are rounded
_STRETCHED = 1.1  # the most by which a smaller picture's proportions differ from the canvas's
SMALLEST = 4  # granules along a tile's side: below 256 px Stable Diffusion draws nothing of use


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """The tiles and steps of a render. Sizes are in latent pixels. If a `spot` of a finished picture is repainted, the
    canvas is the part of the picture around it."""

    canvas: tuple[int, int]
    crop: tuple[int, int]  # pixels: the picture's first row and column on the canvas
    guide: GuideSize | None
    smaller: tuple[int, int] | None  # pixels of the picture that is rendered first and takes the guide's place
    regions: Tiles
    begin: int
    calls: Calls  # of the denoiser, in the complete schedule
    guide_steps: Steps  # one item for each call
    canvas_steps: Steps
    guide_wording: Wording | None
    canvas_wording: Wording
    spot: Spot | None = None

    @property
    def guide_samples(self) -> int:
        """Denoiser samples of all steps of the guide."""
        return self.guide_steps.samples

    @property
    def canvas_samples(self) -> int:
        """Denoiser samples of all steps of the canvas."""
        return self.canvas_steps.samples

    @property
    def denoiser_samples(self) -> int:
        """Denoiser samples of guide and canvas together."""
        return self.guide_samples + self.canvas_samples

    @property
    def texts(self) -> list[str | None]:
        """The distinct texts of all steps. None stands for a negative prompt that was not given."""
        both = (wording for wording in (self.guide_wording, self.canvas_wording) if wording is not None)
        return list(dict.fromkeys(text for wording in both for text in wording.texts()))


def plan_tiling(request: ResolvedRequest, family: Family) -> Tiling:
    """Plan the tiles of every step. Raises UsageError for sizes, overlaps, regions and schedulers that do not suit the
    model, and for a mask that does not suit the picture."""
    patch = family.traits.patch
    step = math.lcm(family.granularity, patch)
    native = _side(request, family, step)
    canvas, tile, crop = _canvas(request, native, step, patch, family.traits.longest)
    spot = None
    if request.repaint is not None:
        cells = mask_cells(request.repaint, (request.height, request.width), canvas, crop)
        spot = find_spot(cells, tile, patch, crop)
        canvas, crop = (spot.height, spot.width), (0, 0)
    overlap = min(native, 2 * min(tile)) // 4 if request.overlap is None else latents_of(request.overlap)
    where: dict[str, Any] = {"canvas": canvas, "tile": tile, "overlap": -(-overlap // patch) * patch, "patch": patch}
    regions = plan_tiles(request, **where)
    last = None
    if request.layout is Layout.SHIFT:
        last = plan_tiles(replace(request, layout=Layout.GRID), **where)
    unconditional = family.traits.guidance is Guidance.CFG
    regions = replace(regions, unconditional=unconditional)
    if spot is not None:
        regions = regions.over(spot.cells, Whole(spot.top, spot.left, *spot.whole))
    last = None if last is None else replace(last, unconditional=unconditional)
    wanted = request.guide and request.guide_image is None and request.prompt is not None
    guide = None
    if wanted and tile != canvas:
        guide = guide_size(canvas, native, step, request.wrap.axes, family.traits.longest)
    is_drawn = guide is not None
    smaller = None
    if guide is not None and request.guide_upscale is GuideUpscale.PROGRESSIVE:
        smaller = smaller_picture(canvas, guide, patch, native, step, request.wrap.axes)
    guide = guide if smaller is None else None
    guided = is_drawn or request.guide_image is not None
    steps = request.num_inference_steps
    begin = first_step(steps, request.strength) if guided else 0
    choose = flow.choose if family.traits.flow else schedulers.choose
    calls = Calls(steps=steps, order=choose(request.scheduler, family.scheduler).order)
    numbers = [calls.step_of(call) for call in range(calls.count)]
    guide_steps = Steps(regions, request, ())
    if guide is not None:
        prompts = len(guide_conditions(request)[0].prompts)
        tiles = guide_tiles(guide[:2], request.wrap, request.guidance_scale, patch, prompts)
        guide_steps = Steps(replace(tiles, unconditional=unconditional), request, numbers)
    return Tiling(
        canvas=canvas,
        crop=crop,
        guide=guide,
        smaller=smaller,
        regions=regions,
        begin=begin,
        calls=calls,
        guide_steps=guide_steps,
        canvas_steps=Steps(regions, request, numbers[calls.first_of(begin) :], last),
        guide_wording=None if not is_drawn else Wording(guide_conditions(request), Stage(steps), unconditional),
        canvas_wording=Wording(
            canvas_conditions(request), Stage(steps - begin, steps if is_drawn else 0), unconditional
        ),
        spot=spot,
    )


def smaller_picture(
    canvas: tuple[int, int], guide: GuideSize, patch: int, native: int = 0, step: int = 1,
    wraps: tuple[bool, bool] = (False, False),
) -> tuple[int, int] | None:  # fmt: skip
    """Height and width in pixels of the last of the pictures between a guide and a canvas, whose sides grow by an equal
    factor of at most 2 from each to the next, or by more from the largest picture that can be a guide; None if one
    factor reaches, or if no picture has about the canvas's proportions: sides that wrap and are shorter than `native`
    are multiples of `step`. This is the progressive upscaling of DemoFusion (Du et al. 2023, arXiv:2311.16973), in
    pixels."""
    whole = math.sqrt(math.prod(canvas) / (guide.shown_height * guide.shown_width))
    factor = whole ** (1 / max(1, math.ceil(math.log2(whole) - _ROUNDING)))
    if factor == whole:
        return None
    least = math.sqrt(math.prod(pixels_of(canvas)) / MAX_GUIDE_PIXELS)
    rounded = round if factor > least else math.floor
    factor = max(factor, least)
    sides = []
    for side, wraps_here in zip(canvas, wraps, strict=True):
        own = patch * max(1, rounded(side / factor / patch))
        if wraps_here and own < native:
            own = min(native, step * max(SMALLEST, rounded(side / factor / step)))
        sides.append(FACTOR * own)
    stretched = sides[0] / sides[1] * canvas[1] / canvas[0]
    return None if max(stretched, 1 / stretched) > _STRETCHED else (sides[0], sides[1])


def pixels_of(sides: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in latents → in pixels."""
    return FACTOR * sides[0], FACTOR * sides[1]


def _side(request: ResolvedRequest, family: Family, step: int) -> int:
    """The side of the area that the model processes at once: the model's own, or a smaller one that was asked for.
    Raises UsageError."""
    if (asked := request.tile_size) is None:
        return family.native
    pixels, least = FACTOR * step, FACTOR * min(family.native, step * SMALLEST)
    if asked % pixels or not least <= asked <= FACTOR * family.native:
        raise UsageError(
            f"--tile-size {asked}: {family.traits.title} takes multiples of {pixels} from {least} to "
            f"{FACTOR * family.native} pixels"
        )
    return asked // FACTOR


def _canvas(
    request: ResolvedRequest, native: int, step: int, patch: int, longest: int | None
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(height, width) of the canvas and of a tile, and the number of pixels above and left of the picture.

    Each side of the canvas is the requested side, rounded up to a multiple of `patch`. If that is less than `native`,
    one tile covers it: both are rounded up to a multiple of `step`, of at least SMALLEST steps, and the picture is
    their middle. So it is with both sides of a picture with no more pixels than a native one, if it is no longer than
    twice its other side nor than `longest`. Raises UsageError if a larger canvas cannot be cropped.
    """
    canvas, tile, crop = [], [], []
    sides = request.height, request.width
    rounded = [step * max(SMALLEST, -(-latents_of(side, patch) // step)) for side in sides]
    cut = request.tile_size is not None or request.repaint is not None or request.regions or any(request.wrap.axes)
    whole = not cut and math.prod(rounded) <= native**2 and max(rounded) <= min(longest or math.inf, 2 * min(rounded))
    for side, up, wraps in zip(sides, rounded, request.wrap.axes, strict=True):
        asked, own = latents_of(side, patch), up if whole else min(native, up)
        length = max(asked, own)
        cannot = f"--wrap {request.wrap}" if wraps and FACTOR * length != side else None
        if request.regions and length > asked:
            cannot = "--regions"
        if cannot is not None:
            raise UsageError(
                f"{request.width}×{request.height}: with {cannot}, this model cannot make a side of {side} pixels; "
                f"take {FACTOR * length}"
            )
        canvas.append(length)
        tile.append(own)
        crop.append((FACTOR * length - side) // 2 if length > asked else 0)
    return (canvas[0], canvas[1]), (tile[0], tile[1]), (crop[0], crop[1])
