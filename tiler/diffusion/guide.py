"""The guide: a picture of the whole at the model's native size, and how it becomes the canvas's reference."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiler.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

MAX_GUIDE_PIXELS = 4096 * 4096


class GuideSize(NamedTuple):
    """Latent pixels of the guide pass, and the centred part of it that has the canvas's aspect."""

    height: int
    width: int
    shown_height: float
    shown_width: float


def guide_size(
    canvas: tuple[int, int], native: int, granularity: int, wraps: tuple[bool, bool] = (False, False)
) -> GuideSize | None:
    """The guide of a canvas of (height, width) latents: the native area with the canvas's aspect, sides rounded up to
    what the UNet takes. None when the canvas is no larger than the native square: it needs no guide. A side that wraps
    cannot be cut: all of it is shown, stretched by less than half a granule."""
    height, width = canvas
    if height <= native and width <= native:
        return None
    factor = native / math.sqrt(height * width)
    shown = height * factor, width * factor
    granules = [
        round(s / granularity) if w else math.ceil(s / granularity - 1e-9) for s, w in zip(shown, wraps, strict=True)
    ]
    sides = [granularity * max(1, n) for n in granules]
    seen = (side if w else s for s, side, w in zip(shown, sides, wraps, strict=True))
    return GuideSize(sides[0], sides[1], *seen)


def load_picture(path: Path) -> Image.Image:
    """A user's picture as RGB, EXIF rotation applied. Raises UsageError; never decodes more than 4096² pixels."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise UsageError(f"{path}: no such file; --guide takes an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                if opened.width * opened.height > MAX_GUIDE_PIXELS:
                    raise UsageError(
                        f"{path}: {opened.width}×{opened.height} pixels is too large for a guide; shrink it to at most 4096×4096"
                    )
                picture: Image.Image = ImageOps.exif_transpose(opened)
                if picture.mode in ("I;16", "I;16B", "I"):
                    picture = Image.fromarray(
                        (np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
                    )
                return picture.convert("RGB")
    except UsageError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError, EOFError) as error:
        raise UsageError(f"{path}: cannot be read as a picture ({str(error).splitlines()[0]})") from error


def fit(
    picture: Image.Image,
    height: int,
    width: int,
    box: tuple[float, float] | None = None,
    wraps: tuple[bool, bool] = (False, False),
) -> np.ndarray:
    """The centred part of `picture` with the asked aspect, or of `box` = (height, width), resized by Lanczos: (H, W, 3) uint8."""
    from PIL import Image

    if box is None:
        factor = min(picture.height / height, picture.width / width)
        box = height * factor, width * factor
    if any(wraps):  # the filter sees the other side
        reach = (math.ceil(3 * max(1.0, b / n)) + 1 for b, n in zip(box, (height, width), strict=True))
        y, x = (r if w else 0 for r, w in zip(reach, wraps, strict=True))
        picture = Image.fromarray(np.pad(np.asarray(picture), ((y, y), (x, x), (0, 0)), mode="wrap"))
    top, left = (picture.height - box[0]) / 2, (picture.width - box[1]) / 2
    resized = picture.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + box[1], top + box[0]))
    return np.asarray(resized)


def upscale(latents: Tensor, size: GuideSize, canvas: tuple[int, int], wraps: tuple[bool, bool]) -> Tensor:
    """The shown part of the guide's latents (1, C, h, w), resized to `canvas` (height, width) by bicubic interpolation."""
    import torch
    import torch.nn.functional as F

    axes = []
    for side, shown, length, wrap in zip(latents.shape[2:], size[2:], canvas, wraps, strict=True):
        pad = 2 if wrap else 0  # the filter sees the other side
        at = (side - shown) / 2 + (torch.arange(length, dtype=torch.float64) + 0.5) * shown / length + pad
        axes.append((2 * at / (side + 2 * pad) - 1).float())
        latents = latents.index_select(1 + len(axes), torch.arange(-pad, side + pad) % side)
    grid = torch.stack([axes[1].expand(canvas), axes[0][:, None].expand(canvas)], dim=-1)[None]
    return F.grid_sample(latents, grid, mode="bicubic", padding_mode="border", align_corners=False)
