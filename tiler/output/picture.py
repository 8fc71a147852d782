"""Write pictures from rows, usually without holding the complete picture. The file's name selects the format."""

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

QUALITY = 90  # the default of JPEG, WebP and AVIF
TILE = 256  # pixels of a TIFF's tile
_XMP_TAG = 700  # in a TIFF


def format_of(path: Path, asked: Format | None = None) -> Format:
    """Return the format that a file's extension names; on standard output, the one in `asked`, else PNG. Raises
    UsageError."""
    if path == STDOUT:
        return asked or Format.PNG
    if (format := FORMATS.get(path.suffix.lower())) is None:
        known = ".png, .jpg, .pdf, .tif, .webp or .avif"
        raise UsageError(f"{path}: pictures are written as {known}; give --output a name that ends so")
    return format


def check_size(path: Path, asked: Format | None, width: int, height: int) -> None:
    """Raise UsageError if the picture is too large for readers of its format."""
    format = format_of(path, asked)
    longest = jpeg.LONGEST if format is Format.JPEG else ENCODERS[format].longest if format in ENCODERS else None
    if longest is not None and max(width, height) > longest:
        raise UsageError(
            f"{width}×{height}: no program opens {format} pictures with a side above {longest:,} pixels; write a .png or .tif"
        )


def check_picture(path: Path, asked: Format | None = None, *, force: bool) -> None:
    """Check, before any work, that the format is known, its library is installed, and the file may be written. Raises
    UsageError, StorageError."""
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
    """Write `rows`, (n, W, 3) uint8 sRGB from top to bottom, and cut off everything to the right of and below the
    picture. The write is atomic; `on_whole` as in `atomic`. `-` is standard output, which receives the bytes as they
    are made, as a PNG unless `format` names another. WebP and AVIF pictures are held completely in memory.

    A PDF records how much of each edge is bleed. Without `force`, a file that has appeared in the meantime is kept.
    Raises StorageError, and any error that `rows` raises.
    """
    whole: AbstractContextManager[BinaryIO] = (
        standard_output() if path == STDOUT else atomic(path, replace=force, on_whole=on_whole)
    )
    format, quality = format_of(path, format), quality or QUALITY
    with whole as file:
        cut = _cut(rows, width, height)
        if format is Format.TIFF:
            _write_tiff(file, cut, width, height, texts, dpi)
            for _ in cut:  # tifffile stops at the last tile: let the iterator of the rows finish
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
    """Write a tiled, deflated TIFF, the format for pictures above the limits of PNG readers. It is a BigTIFF, which
    fewer programs read, only if 32-bit offsets might not suffice: deflate adds little to data that it cannot
    compress."""
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
    """Collect rows into bands of a tile's height, and yield the band's tiles from left to right, padded with black."""
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
