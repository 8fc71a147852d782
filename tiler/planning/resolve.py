"""Fill the gaps of a request from, in this order: the option, the preset, the model folder's tiler.toml, the family's
defaults."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tiler.diffusion.guide_picture import size_of
from tiler.diffusion.poster import size_of as poster_size
from tiler.errors import UsageError
from tiler.models.family import Family
from tiler.models.lora_kinds import few_steps
from tiler.models.own_defaults import read_defaults
from tiler.request import MAX_SIDE, PRESETS, Decode, GuideUpscale, Layout, RenderRequest, ResolvedRequest, Scheduler
from tiler.request.loras import Lora
from tiler.request.paper import parse_length, sheet_pixels

_ROW: Mapping[str, Any] = {
    "num_inference_steps": 20, "guidance_scale": 7.5, "guidance_interval": (0.0, 1.0), "strength": 0.5,
    "scheduler": Scheduler.AUTO, "layout": Layout.GRID,
    "guide_upscale": GuideUpscale.PIXEL, "guide_sharpen": 0,
}  # fmt: skip


def resolve(request: RenderRequest, family: Family, loras: Sequence[Lora] = ()) -> ResolvedRequest:
    """The request without gaps; `loras` are the files that it names (`find_loras`), of which one may be for few steps.
    A missing seed is drawn at random. Raises UsageError and ModelError."""
    own = {} if family.checkpoint.file is not None else read_defaults(family.checkpoint.folder)
    few = few_steps(loras, flow=family.traits.flow)
    recipe = {} if few is None else dict(few[1].defaults)
    if request.scheduler is not None:
        recipe.pop("schedule_type", None)  # it belongs to the recipe's own scheduler
    return fill(request, dict(_ROW) | dict(family.traits.defaults) | own | recipe)


def fill_again(
    request: RenderRequest, before: ResolvedRequest, family: Family, loras: Sequence[Lora] = ()
) -> ResolvedRequest:
    """Like `resolve`, for a variation of the request that became `before`. Random choices stay the same."""
    return resolve(replace(request, seed=before.seed), family, loras)


def fill(request: RenderRequest, defaults: Mapping[str, Any] = _ROW) -> ResolvedRequest:
    """Fill the request with `defaults` where neither the request nor its preset gives a value. If the default prompt is
    a tuple, the seed chooses one of its prompts. Raises UsageError."""
    said = {f.name: getattr(request, f.name) for f in fields(request)}
    preset = dict(PRESETS[request.preset]) if request.preset is not None else {}
    if request.regions or request.overlap is not None or request.repaint is not None:
        preset.pop("layout", None)  # these options exclude shifted tiles
    defaults = dict(defaults)
    if (few := defaults.get("num_inference_steps")) is not None and "num_inference_steps" in preset:
        preset["num_inference_steps"] = min(preset["num_inference_steps"], few)  # few-step models take no more
    if request.regions:
        defaults.pop("prompt", None)  # the regions say what to draw
    stays = request.regions or request.repaint is not None  # the tiles under a mask are chosen once for all steps
    if "layout" in defaults and (stays or (request.overlap is not None and defaults["layout"] is Layout.SHIFT)):
        defaults["layout"] = Layout.GRID  # the model's layout is only a default; the options of this picture win
    if request.guide_image is not None:
        defaults["guide_upscale"] = GuideUpscale.PIXEL
    filled: dict[str, Any] = {"seed": secrets.randbelow(2**32), "output": Path("tiler.png")} | defaults | preset
    filled |= {name: value for name, value in said.items() if value is not None or name not in filled}
    if isinstance(prompts := filled["prompt"], tuple):
        filled["prompt"] = prompts[filled["seed"] % len(prompts)]
    if request.preview is not None:
        filled["preview_vae"] = request.tiny_vae
        if request.decode is not Decode.TINY:  # nothing of the picture depends on it
            filled["tiny_vae"] = None
    width, height, dpi, bleed_mm = _sheet(request)
    return ResolvedRequest(**filled | {"width": width, "height": height, "dpi": dpi, "bleed_mm": bleed_mm})


def _sheet(request: RenderRequest) -> tuple[int, int, float | None, float]:
    """Width and height in pixels, dpi, and bleed in mm."""
    if request.repaint is not None and request.guide_image is not None:
        height, width = poster_size(request.guide_image)
        return width, height, request.dpi, 0.0
    bleed_mm = 0.0 if request.bleed is None else parse_length(request.bleed)
    if request.scale is not None and request.guide_image is not None:
        return *_scaled(request.guide_image, request.scale), request.dpi, bleed_mm
    if request.paper is None:
        side = 2048 if request.size is None else request.size
        width, height = (side if said is None else said for said in (request.width, request.height))
        return width, height, request.dpi, bleed_mm
    dpi = request.dpi or 300
    return *sheet_pixels(request.paper, dpi, landscape=request.landscape, bleed_mm=bleed_mm), dpi, bleed_mm


def _scaled(guide: Path, scale: float) -> tuple[int, int]:
    """The width and height of the user's picture after enlargement by --scale. Raises UsageError."""
    width, height = (round(side * scale) for side in size_of(guide))
    if max(width, height) > MAX_SIDE:
        raise UsageError(f"--scale {scale:g} makes {width}×{height} of {guide}; a side has at most {MAX_SIDE:,} pixels")
    return width, height
