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

MAX_GUIDE_PIXELS = 4096 * 4096


class GuideSize(NamedTuple):
    """Latent pixels of the guide pass, and the centred part of it that has the canvas's aspect."""

    height: int
    width: int
    shown_height: float
    shown_width: float


def guide_size(canvas: tuple[int, int], native: int, granularity: int) -> GuideSize | None:
    """The guide of a canvas of (height, width) latents: the native area with the canvas's aspect, sides rounded up to
    what the UNet takes. None when the canvas is no larger than the native square: it needs no guide."""
    height, width = canvas
    if height <= native and width <= native:
        return None
    factor = native / math.sqrt(height * width)
    shown = height * factor, width * factor
    sides = [max(granularity, math.ceil(s / granularity - 1e-9) * granularity) for s in shown]
    return GuideSize(sides[0], sides[1], *shown)


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


def fit(picture: Image.Image, height: int, width: int, box: tuple[float, float] | None = None) -> np.ndarray:
    """The centred part of `picture` with the asked aspect, or of `box` = (height, width), resized by Lanczos: (H, W, 3) uint8."""
    from PIL import Image

    if box is None:
        factor = min(picture.height / height, picture.width / width)
        box = height * factor, width * factor
    top, left = (picture.height - box[0]) / 2, (picture.width - box[1]) / 2
    resized = picture.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + box[1], top + box[0]))
    return np.asarray(resized)
