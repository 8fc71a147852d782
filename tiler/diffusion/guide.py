"""The guide, a picture of the whole scene at the model's native size, and its enlargement to the canvas's reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_BLUR = 1.0  # px of the source, the standard deviation of the unsharp mask's blur
_BLUR_REACH = 3  # px that Pillow's approximation of it, three box blurs, sees


class GuideSize(NamedTuple):
    """The size of the guide pass in latent pixels, and the size of its centred part that has the canvas's aspect
    ratio."""

    height: int
    width: int
    shown_height: float
    shown_width: float


def guide_size(
    canvas: tuple[int, int], native: int, granularity: int, wraps: tuple[bool, bool] = (False, False),
    longest: int | None = None,
) -> GuideSize | None:  # fmt: skip
    """The guide of a canvas of (height, width) latents: the native area with the canvas's aspect, sides rounded up to
    what the denoiser takes, and no more than the canvas's own; no side above `longest`, a multiple of `granularity`.
    None when the canvas is no larger than the native square: it needs no guide. A side that wraps cannot be cut: all of
    it is shown, stretched by less than half a granule."""
    height, width = canvas
    if height <= native and width <= native:
        return None
    factor = min(1.0, native / math.sqrt(height * width), (longest or math.inf) / max(height, width))
    shown = height * factor, width * factor
    granules = [
        round(s / granularity) if w else math.ceil(s / granularity - 1e-9) for s, w in zip(shown, wraps, strict=True)
    ]
    sides = [granularity * max(1, n) for n in granules]
    seen = (side if w else s for s, side, w in zip(shown, sides, wraps, strict=True))
    return GuideSize(sides[0], sides[1], *seen)


@dataclass(frozen=True)
class LazyResize:
    """A part of a picture, sharpened and then resized by Lanczos; slicing it computes the requested rows. A canvas for
    print has hundreds of megabytes of pixels, its source about one."""

    source: np.ndarray  # (h, w, 3) uint8
    box: tuple[float, float, float]  # of the source: top, left, right
    step: float  # source rows for each row
    shape: tuple[int, int, int]
    wraps: bool  # rows beyond the source are the other side's
    sharpen: int = 0  # percent of what a blur takes away, added again

    def __getitem__(self, rows: slice) -> np.ndarray:
        """(n, W, 3) uint8."""
        from PIL import Image, ImageFilter

        first, last, _ = rows.indices(self.shape[0])
        top, left, right = self.box
        above, below = top + first * self.step, top + last * self.step
        reach = _reach(self.step, self.sharpen)
        start, stop = math.floor(above) - reach, math.ceil(below) + reach
        height = len(self.source)
        if not self.wraps:
            start, stop, below = max(0, start), min(stop, height), min(below, height)
        seen = Image.fromarray(self.source[np.arange(start, stop) % height])
        if self.sharpen:
            seen = seen.filter(ImageFilter.UnsharpMask(_BLUR, self.sharpen, threshold=0))
        # In two calls: left to itself Pillow chooses the first direction by the strip's shape, and clips in between.
        wide = seen.resize((self.shape[1], seen.height), Image.Resampling.LANCZOS, box=(left, 0, right, seen.height))
        box = 0, above - start, wide.width, below - start
        return np.asarray(wide.resize((wide.width, last - first), Image.Resampling.LANCZOS, box=box))


def _reach(step: float, sharpen: int) -> int:
    """The support of the Lanczos window (three lobes) in source pixels, and of the blur before it if there is one."""
    return math.ceil(3 * max(1.0, step)) + 1 + (_BLUR_REACH if sharpen else 0)


def crop_to_aspect(
    picture: np.ndarray,
    height: int,
    width: int,
    box: tuple[float, float] | None = None,
    wraps: tuple[bool, bool] = (False, False),
    margin: tuple[int, int] = (0, 0),
    sharpen: int = 0,
) -> LazyResize:
    """The centred part of `picture`, (h, w, 3) uint8, that has the requested aspect ratio, or that of `box` = (height,
    width), resized to height × width pixels. `margin` pixels are added at top and bottom, left and right; on sides that
    wrap they repeat the opposite side. A picture that becomes larger is sharpened first: an unsharp mask of `sharpen`
    percent."""
    sides = picture.shape[:2]
    if box is None:
        factor = min(sides[0] / height, sides[1] / width)
        box = height * factor, width * factor
    steps = box[0] / height, box[1] / width
    top, left = ((side - part) / 2 - n * step for side, part, n, step in zip(sides, box, margin, steps, strict=True))
    sharpen = sharpen if max(steps) < 1 else 0
    shape = height + 2 * margin[0], width + 2 * margin[1], 3
    right = left + steps[1] * shape[1]
    if wraps[1]:
        pad = math.ceil(margin[1] * steps[1]) + _reach(steps[1], sharpen)
        picture, left, right = np.pad(picture, ((0, 0), (pad, pad), (0, 0)), mode="wrap"), left + pad, right + pad
    # Rounding must not lead out of a picture that does not go on.
    within = top if wraps[0] else max(0.0, top), max(0.0, left), min(right, picture.shape[1])
    return LazyResize(picture, within, steps[0], shape, wraps[0], sharpen)


def upscale(
    latents: Tensor, size: GuideSize, canvas: tuple[int, int], wraps: tuple[bool, bool], rows: slice = slice(None)
) -> Tensor:
    """Resize the visible part of the guide's latents, (1, C, h, w), to `canvas` (height, width) by bicubic
    interpolation; only these `rows` of the result are computed."""
    import torch
    import torch.nn.functional as F

    axes = []
    for side, shown, length, wrap in zip(latents.shape[2:], size[2:], canvas, wraps, strict=True):
        pad = 2 if wrap else 0  # the filter sees the other side
        at = (side - shown) / 2 + (torch.arange(length, dtype=torch.float64) + 0.5) * shown / length + pad
        axes.append((2 * at / (side + 2 * pad) - 1).float())
        latents = latents.index_select(1 + len(axes), torch.arange(-pad, side + pad) % side)
    down, across = axes[0][rows], axes[1]
    sides = len(down), len(across)
    grid = torch.stack([across.expand(sides), down[:, None].expand(sides)], dim=-1)[None]
    return F.grid_sample(latents, grid, mode="bicubic", padding_mode="border", align_corners=False)
