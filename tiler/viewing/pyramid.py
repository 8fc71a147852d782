"""A picture as a pyramid of small tiles (Deep Zoom). libvips makes it in a thread, which reads the rows from first to
last and never holds the picture. Tiles that are already written can be viewed in the meantime.

A large picture is read twice: first for an overview, which takes the time of decoding alone, then for all tiles.

Level n is the picture at 1/2^(levels − n) of its size; its tiles are JPEG files with a border of one pixel from their
neighbours.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tiler.errors import StorageError, UsageError
from tiler.output.profile import srgb_profile

SIDE, OVERLAP = 254, 1  # pixels: a tile's side without its border, and the border
_OVERVIEW = 11  # levels: 2,048 pixels, which fill a page
_STREAMED = ("pngload", "jpegload", "tiffload")  # formats whose rows can be read twice without holding the picture
_QUALITY = 92  # from 90, libvips stores colours at full resolution
_END = b"\xff\xd9"  # of a JPEG: a file without this is still being written


class Pyramid:
    """A context manager, which deletes its files on exit. `fault` says why no more tiles will come; `is_whole` whether
    all are written."""

    def __init__(self, path: Path, scratch: Path | None = None) -> None:
        """Open the picture. `scratch` is the folder for the tiles, about a third as many bytes as the picture has
        pixels; None is the system's folder for temporary files. Raises UsageError if the file is no picture,
        StorageError."""
        self._vips = _pyvips()
        self.path, self.fault, self.is_whole = path, "", False
        if not path.is_file():
            raise UsageError(f"{path}: no such picture; check the path")
        try:
            self._image = _as_srgb(self._vips, path)
            self.width, self.height = int(self._image.width), int(self._image.height)
            self.levels = (max(self.width, self.height) - 1).bit_length()
            self._overview = _overview(self._vips, path, self._image, self.levels)
        except self._vips.Error as error:
            raise UsageError(
                f"{path}: cannot be read as a picture ({_reason(error)}); give a PNG, JPEG, TIFF, WebP or AVIF"
            ) from error
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="tiler-view-", dir=scratch))
        except OSError as error:
            raise StorageError(
                f"{scratch or tempfile.gettempdir()}: cannot be written ({error.strerror}); give another --scratch"
            ) from error
        self._thread = threading.Thread(target=self._make, name="pyramid")
        self._ended = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        for image in self._images():
            image.set_kill(True)
        self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def tile(self, level: int, column: int, row: int) -> bytes | None:
        """Return a tile's JPEG, or None if it is not finished or does not exist."""
        made = "overview" if self._overview is not None and level <= _OVERVIEW else "picture"
        try:
            data = (self._folder / f"{made}_files" / str(level) / f"{column}_{row}.jpg").read_bytes()
        except OSError:
            return None
        return data if data.endswith(_END) else None

    def _images(self) -> list[Any]:
        return [image for image in (self._overview, self._image) if image is not None]

    def _make(self) -> None:
        try:
            for image in self._images():
                name = "picture" if image is self._image else "overview"
                image.dzsave(
                    str(self._folder / name), tile_size=SIDE, overlap=OVERLAP, suffix=f".jpg[Q={_QUALITY}]", keep="none"
                )
            self.is_whole = True
        except self._vips.Error as error:
            if not self._ended:
                self.fault = f"{self.path}: {_reason(error)}; the picture may be damaged, or the disk full"


def _pyvips() -> Any:
    """Import pyvips. Raises UsageError if the extra is not installed."""
    try:
        import pyvips
    except (ImportError, OSError) as error:  # OSError if libvips itself is missing
        raise UsageError(
            "tiler view needs the extra `view`: pip install pyvips pyvips-binary, or pip install -e '.[view]' in tiler's folder"
        ) from error
    pyvips.cache_set_max(0)  # the cache of operations, each of which holds buffers
    return pyvips


def _overview(vips: Any, path: Path, image: Any, levels: int) -> Any:
    """Return the picture reduced to its level _OVERVIEW, or None if it is no larger, or cannot be read row by row."""
    loader, times = image.get("vips-loader"), 2 ** max(0, levels - _OVERVIEW)
    if times == 1 or not loader.startswith(_STREAMED) or _is_rotated(_open(vips, path, access="sequential")):
        return None
    if loader.startswith("jpegload") and times >= 8:  # its decoder makes an eighth in a fraction of the time
        eighth = _as_srgb(vips, path, shrink=8)
        if (eighth.width, eighth.height) == (-(-image.width // 8), -(-image.height // 8)):
            return eighth.shrink(times // 8, times // 8, ceil=True)
    return _as_srgb(vips, path).shrink(times, times, ceil=True)


def _as_srgb(vips: Any, path: Path, **options: Any) -> Any:
    """Return the picture as displayed: upright, over white, in 8-bit sRGB. Its pixels are not read yet."""
    image = _open(vips, path, access="sequential", **options)
    if _is_rotated(image):
        # The rows are needed in another order: libvips stores them in a file in the meantime.
        image = _open(vips, path, **options).autorot()
    if image.get_typeof("icc-profile-data") and image.get("icc-profile-data") != srgb_profile():
        image = image.icc_transform("srgb", embedded=True)
    if image.hasalpha():
        white = 65535 if image.format == "ushort" else 255
        image = image.flatten(background=[white] * (image.bands - 1))
    return image.colourspace("srgb").cast("uchar")


def _open(vips: Any, path: Path, **options: Any) -> Any:
    """Return the picture as it is stored. Only its header is read yet."""
    return vips.Image.new_from_file(str(path), fail_on="truncated", **options)


def _is_rotated(stored: Any) -> bool:
    """Whether a picture has to be turned or mirrored to be upright; one that was turned no longer says so."""
    return bool(stored.get_typeof("orientation") and stored.get("orientation") > 1)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
