"""A picture as a pyramid of small tiles (Deep Zoom). libvips makes it in a thread, which reads the rows once, from
first to last, and never holds the picture. Tiles that are already written can be viewed in the meantime.

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
        except self._vips.Error as error:
            raise UsageError(
                f"{path}: cannot be read as a picture ({_reason(error)}); give a PNG, JPEG, TIFF, WebP or AVIF"
            ) from error
        self.width, self.height = int(self._image.width), int(self._image.height)
        self.levels = (max(self.width, self.height) - 1).bit_length()
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
        self._image.set_kill(True)
        self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def tile(self, level: int, column: int, row: int) -> bytes | None:
        """Return a tile's JPEG, or None if it is not finished or does not exist."""
        try:
            data = (self._folder / "picture_files" / str(level) / f"{column}_{row}.jpg").read_bytes()
        except OSError:
            return None
        return data if data.endswith(_END) else None

    def _make(self) -> None:
        try:
            self._image.dzsave(
                str(self._folder / "picture"),
                tile_size=SIDE,
                overlap=OVERLAP,
                suffix=f".jpg[Q={_QUALITY}]",
                keep="none",
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


def _as_srgb(vips: Any, path: Path) -> Any:
    """Return the picture as displayed: upright, over white, in 8-bit sRGB. Its pixels are not read yet."""
    image = vips.Image.new_from_file(str(path), access="sequential", fail_on="truncated")
    if image.get_typeof("orientation") and image.get("orientation") > 1:
        # The rows are needed in another order: libvips stores them in a file in the meantime.
        image = vips.Image.new_from_file(str(path), fail_on="truncated").autorot()
    if image.get_typeof("icc-profile-data") and image.get("icc-profile-data") != srgb_profile():
        image = image.icc_transform("srgb", embedded=True)
    if image.hasalpha():
        white = 65535 if image.format == "ushort" else 255
        image = image.flatten(background=[white] * (image.bands - 1))
    return image.colourspace("srgb").cast("uchar")


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
