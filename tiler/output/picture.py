"""Pictures from rows, never held as a whole: the format follows the file's name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tiler.errors import UsageError
from tiler.files import atomic, check_writable
from tiler.output import jpeg
from tiler.output.exif import xmp_of
from tiler.output.jpeg import JpegWriter
from tiler.output.pdf import POINTS, PdfWriter
from tiler.output.pipe import check_reader, standard_output
from tiler.output.png import PngWriter
from tiler.output.profile import srgb_profile
from tiler.output.whole import ENCODERS, WholeWriter
from tiler.request.choices import FORMATS, STDOUT, Format

QUALITY = 90  # of a JPEG, WebP or AVIF
TILE = 256  # pixels, of a TIFF
_XMP_TAG = 700  # of a TIFF


def format_of(path: Path, asked: Format | None = None) -> Format:
    """By a file's ending; on standard output what was `asked` for, else PNG. Raises UsageError."""
    if path == STDOUT:
        return asked or Format.PNG
    if (format := FORMATS.get(path.suffix.lower())) is None:
        known = ".png, .jpg, .pdf, .tif, .webp or .avif"
        raise UsageError(f"{path}: pictures are written as {known}; give --output such a name")
    return format


def check_size(path: Path, asked: Format | None, width: int, height: int) -> None:
    """Raises UsageError for a picture that readers of its format do not open."""
    format = format_of(path, asked)
    longest = jpeg.LONGEST if format is Format.JPEG else ENCODERS[format].longest if format in ENCODERS else None
    if longest is not None and max(width, height) > longest:
        raise UsageError(
            f"{width}×{height}: no program opens {format} pictures with a side above {longest:,} pixels; write a .png or .tif"
        )


def check_picture(path: Path, asked: Format | None = None, *, force: bool) -> None:
    """Before any work: the format is known, its library is there, the file may be written. Raises UsageError,
    StorageError."""
    from PIL import features

    if path == STDOUT:
        check_reader()
    else:
        check_writable(path, force=force)
    if (format := format_of(path, asked)) in ENCODERS and not features.check(format):
        raise UsageError(f"{path}: this Pillow lacks {format}: pip install -U pillow, or write a .png or .jpg")
    if format is Format.TIFF and find_spec("tifffile") is None:
        raise UsageError(f"{path}: TIFF needs the extra `tiff`: pip install 'tiler[tiff]', or write a .png")


def write_picture(
    path: Path,
    rows: Iterable[np.ndarray],
    width: int,
    height: int,
    texts: Mapping[str, str],
    dpi: float | None = None,
    bleed_mm: float = 0.0,
    *,
    force: bool,
    format: Format | None = None,
    quality: int | None = None,
    on_whole: Callable[[os.stat_result], None] = lambda whole: None,
) -> None:
    """Write `rows`, (n, W, 3) uint8 sRGB top first; what lies right of and below the picture is cut off. Atomic;
    `on_whole` as in `atomic`. `-` is standard output, which gets the bytes as they are made, of a PNG without `format`.
    WebP and AVIF are held as a whole.

    A PDF says how much of each edge is bleed. Without `force`, a file that has meanwhile appeared is kept.
    Raises StorageError, and whatever `rows` raises.
    """
    whole: AbstractContextManager[BinaryIO] = (
        standard_output() if path == STDOUT else atomic(path, replace=force, on_whole=on_whole)
    )
    format, quality = format_of(path, format), quality or QUALITY
    with whole as file:
        cut = _cut(rows, width, height)
        if format is Format.TIFF:
            _write_tiff(file, cut, width, height, texts, dpi)
            for _ in cut:  # tifffile asks no further than the last tile: what makes the rows comes to its end
                pass
            return
        size = width, height
        writer: PngWriter | PdfWriter | JpegWriter | WholeWriter
        match format:
            case Format.PDF:
                writer = PdfWriter(file, *size, texts, dpi or POINTS, bleed_mm)
            case Format.JPEG:
                writer = JpegWriter(file, *size, texts, dpi, quality)
            case Format.WEBP | Format.AVIF:
                writer = WholeWriter(file, *size, texts, quality, format)
            case _:
                writer = PngWriter(file, *size, texts, dpi)
        for strip in cut:
            writer.write(strip)
        writer.close()


def _cut(rows: Iterable[np.ndarray], width: int, height: int) -> Iterator[np.ndarray]:
    done = 0
    for strip in rows:
        if len(strip := strip[: height - done, :width]):
            done += len(strip)
            yield strip
    assert done == height, (done, height)


def _write_tiff(
    file: BinaryIO, rows: Iterator[np.ndarray], width: int, height: int, texts: Mapping[str, str], dpi: float | None
) -> None:
    """A tiled TIFF, deflated: the right file above PNG readers' limits. A BigTIFF, which fewer programs read, only
    where offsets of 32 bits might not do: deflate adds little to what it cannot make smaller."""
    import tifffile

    packet = xmp_of(texts)
    most = 3 * (width + TILE) * (height + TILE) * 1.01 + 2**24
    with tifffile.TiffWriter(file, bigtiff=most > 2**32) as tiff:
        tiff.write(
            _tiles(rows, width),
            shape=(height, width, 3),
            dtype=np.uint8,
            tile=(TILE, TILE),
            photometric="rgb",
            compression="zlib",
            description=texts.get("parameters", "").encode(errors="replace"),
            metadata=None,
            iccprofile=srgb_profile(),
            software="tiler",
            datetime=None,
            resolution=(dpi or POINTS, dpi or POINTS),
            resolutionunit="INCH",
            extratags=[(_XMP_TAG, 1, len(packet), packet, True)] if packet else [],
        )


def _tiles(rows: Iterator[np.ndarray], width: int) -> Iterator[np.ndarray]:
    """Rows gathered to bands of a tile's height, cut from left to right and padded with black."""
    band = np.zeros((TILE, -(-width // TILE) * TILE, 3), np.uint8)
    filled = 0

    def tiles() -> Iterator[np.ndarray]:
        return (band[:, left : left + TILE].copy() for left in range(0, band.shape[1], TILE))

    for strip in rows:
        while len(strip):
            part = strip[: TILE - filled]
            band[filled : filled + len(part), :width] = part
            filled, strip = filled + len(part), strip[len(part) :]
            if filled == TILE:
                yield from tiles()
                band[:], filled = 0, 0
    if filled:
        yield from tiles()
