"""A user's picture as the guide: any common file format, converted to 8-bit sRGB, and no larger in memory than the
canvas needs."""

from __future__ import annotations

import importlib
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image, ImageCms

from tiler.errors import TilerError, UsageError

MAX_GUIDE_PIXELS = 4096 * 4096
_GAP = 2  # source pixels kept for each of the canvas's, in each direction: Lanczos sees no difference
_STRIP_PIXELS = 2**18  # converted at a time
_STRIP_BYTES = 40 * _STRIP_PIXELS  # what the conversion of a strip takes at most
_BYTES = {"1": 1, "L": 1, "P": 1, "LA": 4, "I;16": 2, "I;16L": 2, "I;16B": 2}  # a pixel in Pillow; 4 in other modes
# Buffers of the decoders beside Pillow's picture, in bytes for each pixel of the file.
_BUFFERS = {"WEBP": 12, "AVIF": 16, "HEIF": 16, "JPEG2000": 28, "GIF": 8, "TIFF": 4}
_PROGRESSIVE = 6  # JPEG: the coefficients of all three channels

_Fixed = Callable[[Image.Image], Image.Image]


class GuidePicture:
    """An opened picture, whose header is read and whose pixels are not. A context manager.

    `load()` returns `shape`; while it runs, it holds `peak_bytes`, and afterwards `kept_bytes`. Whatever is wrong with
    the picture is a UsageError.
    """

    def __init__(self, path: Path, canvas: tuple[int, int]) -> None:
        """`canvas`: (height, width) in pixels; the picture is reduced by a whole number where it is much larger."""
        self.path = path
        if path.is_dir():
            raise UsageError(f"{path} is a folder; --guide takes an image file")
        if not path.is_file():
            raise UsageError(f"{path}: no such file; --guide takes an image file")
        with self._blamed():
            self._picture = picture = _open(path)
        try:
            with self._blamed():
                width, height = picture.size
                if width * height > MAX_GUIDE_PIXELS:
                    raise UsageError(
                        f"{path}: {width}×{height} pixels is too large for a guide; shrink it to at most 4096×4096"
                    )
                self._turn = orientation(picture)
                sides = (width, height) if self._turn > 4 else (height, width)
                self.size = sides[1], sides[0]
                factor = max(1, int(min(s / c for s, c in zip(sides, canvas, strict=True)) / _GAP))
                decoder = _BUFFERS.get(picture.format or "", 0) * width * height
                if picture.format == "TIFF" and 2 <= (picture.getexif().get(0x0112) or 1) <= 8:
                    decoder += 4 * width * height  # Pillow turns it itself
                if picture.format in ("JPEG", "MPO"):
                    if "progressive" in picture.info or "progression" in picture.info:
                        decoder += _PROGRESSIVE * width * height
                    scale = next(s for s in (8, 4, 2, 1) if s <= factor)
                    picture.draft(None, (width // scale, height // scale))
                    factor //= scale
                self._factor = factor
                decoded = _BYTES.get(picture.mode, 4) * picture.width * picture.height
        except BaseException:
            picture.close()
            raise
        reduced = -(-picture.height // factor), -(-picture.width // factor)
        self.shape = (*(reduced[::-1] if self._turn > 4 else reduced), 3)
        self.kept_bytes = 3 * reduced[0] * reduced[1]
        self.peak_bytes = self.kept_bytes + decoded + decoder + _STRIP_BYTES

    def load(self, note: Callable[[str], None]) -> np.ndarray:
        """Load the picture as (h, w, 3) uint8 sRGB, upright, with transparent parts on white. `note` is called with
        each change that was made to it."""
        with self._blamed():
            picture = self._picture
            picture.load()
            kept = np.empty(self.shape, np.uint8)
            upright = _as_stored(kept, self._turn)
            levels, in_srgb = _levels(picture, note), colours(picture, note)
            transparent = False
            step = self._factor * max(1, _STRIP_PIXELS // (picture.width * self._factor))
            for top in range(0, picture.height, step):
                strip = levels(picture.crop((0, top, picture.width, min(top + step, picture.height))))
                if strip.has_transparency_data:
                    strip, seen = on_white(strip)
                    transparent |= seen
                strip = in_srgb(strip)
                if self._factor > 1:
                    strip = strip.reduce(self._factor)
                first = top // self._factor
                upright[first : first + strip.height] = np.asarray(strip)
            if transparent:
                note(f"{self.path.name}: its transparent parts become white")
            return kept

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        """Turn whatever Pillow and its plugins raise on a damaged file into a UsageError, and silence warnings about
        harmless defects."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except (TilerError, MemoryError):
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"{self.path}: cannot be read as a picture ({reason}); save it again as PNG or JPEG"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._picture.close()


def png_load_bytes(pixels: int) -> int:
    """`GuidePicture.peak_bytes` of an RGB PNG no larger than the canvas, before it exists."""
    return (3 + 4) * pixels + _STRIP_BYTES


def size_of(path: Path) -> tuple[int, int]:
    """The width and height in pixels of a picture as displayed, read from its header alone. Raises UsageError."""
    with GuidePicture(path, (1, 1)) as picture:
        return picture.size


def _open(path: Path) -> Image.Image:
    """Open a picture with the decoders that run in this process: Pillow would hand EPS to another program."""
    with path.open("rb") as file:
        head = file.read(32)
    if head[4:8] == b"ftyp" and any(
        brand in head[8:] for brand in (b"heic", b"heix", b"heim", b"hevc", b"mif1", b"msf1")
    ):
        if find_spec("pillow_heif") is not None:
            importlib.import_module("pillow_heif").register_heif_opener()
        elif b"avif" not in head[8:]:
            raise UsageError(
                f"{path}: HEIC pictures need the extra `heic`: pip install 'tiler-render[heic]', or save it as JPEG"
            )
    picture = Image.open(path)
    if picture.format == "EPS":
        picture.close()
        raise UsageError(f"{path}: tiler does not read EPS; save the picture as PNG or JPEG")
    return picture


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation of the picture, 1–8, read from that tag alone because the other EXIF data may be damaged."""
    if picture.format in ("TIFF", "HEIF", "AVIF"):
        return 1  # their readers turn it
    data = picture.info.get("exif", b"")
    data = data.removeprefix(b"Exif\0\0") if isinstance(data, bytes) else b""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    try:
        if order is None:
            return 1
        (at,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", data, entry)
            if tag == 0x0112:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), data, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _as_stored(upright: np.ndarray, turn: int) -> np.ndarray:
    """A view of an upright picture in the order of the file's rows and columns (EXIF 2.3, Orientation)."""
    if turn > 4:
        upright = upright.transpose(1, 0, 2)
    vertical, horizontal = turn in (3, 4, 6, 7), turn in (2, 3, 7, 8)
    return upright[:: -1 if vertical else 1, :: -1 if horizontal else 1]


def _levels(picture: Image.Image, note: Callable[[str], None]) -> _Fixed:
    """Return a function that converts the values of a strip to 8 bits."""
    mode = picture.mode
    if mode.startswith("I;16"):
        return lambda strip: Image.fromarray((np.asarray(strip) >> 8).astype(np.uint8))
    if mode not in ("I", "F"):
        return lambda strip: strip
    low, high = picture.getextrema()
    if mode == "F":
        rows = range(0, picture.height, 64)
        bands = (np.asarray(picture.crop((0, y, picture.width, min(y + 64, picture.height)))) for y in rows)
        high = max((float(band[np.isfinite(band)].max(initial=0)) for band in bands), default=0.0)
        white = 1.0 if high <= 16 else 255.0 if high <= 255 else 65535.0 if high <= 65535 else high
    else:  # Pillow stores unsigned numbers as signed ones
        white = 2.0**32 - 1 if low < 0 else 255.0 if high <= 255 else 65535.0 if high <= 65535 else 2.0**31 - 1  # type: ignore[operator]
    note(f"a picture of {'floating-point' if mode == 'F' else '32-bit'} values: {white:g} is taken as white")

    def scaled(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip)
        values = np.nan_to_num(values) if mode == "F" else values.view(np.uint32) if low < 0 else values  # type: ignore[operator]
        return Image.fromarray((values * (255 / white)).clip(0, 255).round().astype(np.uint8))

    return scaled


def on_white(strip: Image.Image) -> tuple[Image.Image, bool]:
    """Compose a strip over white, and say whether any of it was transparent."""
    strip = strip.convert("RGBA")
    if strip.getchannel("A").getextrema()[0] == 255:
        return strip.convert("RGB"), False
    return Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), True


def colours(picture: Image.Image, note: Callable[[str], None]) -> _Fixed:
    """Return a function that converts a strip to sRGB with the picture's colour profile, if it has one other than
    sRGB."""
    profile: Any = picture.info.get("icc_profile")
    if not profile:
        return lambda strip: strip.convert("RGB")
    mode = picture.mode if picture.mode in ("L", "CMYK", "LAB") else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if mode == "L" and source.profile.xcolor_space.strip() == "RGB":
            mode = "RGB"
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "RGB":
            axis = np.linspace(0, 255, 9).round().astype(np.uint8)
            grid = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(27, 27, 3)
            moved = np.asarray(ImageCms.applyTransform(Image.fromarray(grid), transform)).astype(int) - grid
            if abs(moved).max() <= 2:  # sRGB under whatever name: its bytes stay
                return lambda strip: strip.convert("RGB")
    except Exception:  # of the many ways in which a profile can be wrong
        note("the picture's colour profile cannot be used; its colours are taken as sRGB")
        return lambda strip: strip.convert("RGB")
    note("the picture's colours are converted from its profile to sRGB")

    def converted(strip: Image.Image) -> Image.Image:
        result = ImageCms.applyTransform(strip if strip.mode == mode else strip.convert(mode), transform)
        assert result is not None
        return result

    return converted
