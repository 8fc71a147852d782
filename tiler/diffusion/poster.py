"""Read a finished picture of which a spot is repainted, and the mask that marks the spot. Both are read a strip at a
time, so neither is ever held in memory, whatever its size."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image, ImageOps

from tiler.decoding import FACTOR
from tiler.diffusion import guide_picture
from tiler.diffusion.guide_picture import GuidePicture
from tiler.errors import StorageError, UsageError
from tiler.output.png_strips import is_streamed, read_strips
from tiler.output.texts import opened

_BLACK = 15  # of 255: the most that a JPEG makes of black
_STREAM_BYTES = 16 * 2**20  # bytes that a strip takes on its way, at most
_WHOLE = 2**20, 2**20  # a canvas so large that no picture is reduced


class Poster:
    """The pixels of a picture as rows in a nameless scratch file: `poster[first:last]` is (n, W, 3) uint8 sRGB. A
    context manager; `digest` is (32,) uint8, over all pixels."""

    def __init__(self, path: Path, folder: Path, note: Callable[[str], None]) -> None:
        """Raises UsageError if the file is not a picture, and StorageError."""
        height, width = size_of(path)
        self.shape = height, width, 3
        self._row_bytes, digest = 3 * width, hashlib.sha256()
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as this object
        except OSError as error:
            raise StorageError(
                f"{folder}: cannot write scratch files ({error.strerror}); give another folder with --scratch"
            ) from error
        try:
            for strip in _pixels(path, note):
                data = np.ascontiguousarray(strip).data
                digest.update(data)
                self._file.write(data)
            self._file.flush()
        except OSError as error:
            self._file.close()
            raise StorageError(f"{folder}: writing failed ({error.strerror}); free some space") from error
        except BaseException:
            self._file.close()
            raise
        self.digest = np.frombuffer(digest.digest(), np.uint8)

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, last, _ = rows.indices(self.shape[0])
        pixels = np.empty((max(0, last - first), *self.shape[1:]), np.uint8)
        read, view = 0, pixels.reshape(-1).data
        while read < len(view):
            got = os.preadv(self._file.fileno(), [view[read:]], first * self._row_bytes + read)
            if not got:
                raise StorageError("a scratch file became shorter while it was read; render again")
            read += got
        return pixels

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def size_of(path: Path) -> tuple[int, int]:
    """The height and width of a picture, of which only the header is read. Raises UsageError."""
    width, height = _png_size(path) or guide_picture.size_of(path)
    return height, width


def load_bytes(path: Path) -> int:
    """The memory that a `Poster` takes while it is created. Raises UsageError."""
    if _png_size(path) is not None:
        return _STREAM_BYTES
    with GuidePicture(path, _WHOLE) as picture:
        return picture.peak_bytes


def mask_rows(path: Path, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield a mask at the picture's `size` (height, width), some rows at a time: (n, W) uint8, 255 where the picture is
    repainted, 0 where it stays, and values between for a blend. A mask of another size is enlarged or reduced to the
    nearest pixel. Raises UsageError."""
    (height, width), (own_height, own_width) = size, mask_size(path, size)
    across = (2 * np.arange(width) + 1) * own_width // (2 * width)
    waiting, begin, row = np.empty((0, own_width), np.uint8), 0, 0  # the mask's rows from `begin` on
    for strip in _levels(path):
        waiting = np.concatenate([waiting, strip])
        ready = row
        while ready < height and (2 * ready + 1) * own_height // (2 * height) < begin + len(waiting):
            ready += 1
        down = (2 * np.arange(row, ready) + 1) * own_height // (2 * height)
        if ready > row:
            yield waiting[down - begin][:, across]
        row = ready
        keep = (2 * row + 1) * own_height // (2 * height) - begin
        waiting, begin = waiting[min(keep, len(waiting)) :], begin + min(keep, len(waiting))


def mask_size(path: Path, size: tuple[int, int]) -> tuple[int, int]:
    """The height and width of a mask for a picture of `size`. Raises UsageError for a mask of another shape."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; --repaint takes an image file")
    if not path.is_file():
        raise UsageError(
            f"{path}: no such file; --repaint takes a mask that is white where the picture is painted again"
        )
    own = size_of(path)
    if abs(own[0] * size[1] - own[1] * size[0]) > max(*own, *size):  # within the rounding of a pixel on either side
        raise UsageError(
            f"{path}: a mask of {own[1]}×{own[0]} pixels does not fit a picture of {size[1]}×{size[0]}; give it the "
            "picture's size, or a smaller one of the same shape"
        )
    return own


def mask_cells(path: Path, size: tuple[int, int], canvas: tuple[int, int], crop: tuple[int, int]) -> np.ndarray:
    """The latents of `canvas` (height, width) that lie under a mask of a picture of `size`: (h, w) bool. The picture
    starts `crop` pixels below and to the right of the canvas's corner. Raises UsageError if there are none."""
    state = path.stat() if path.is_file() else None
    return _cells(path, size, canvas, crop, state and (state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=2)
def _cells(
    path: Path, size: tuple[int, int], canvas: tuple[int, int], crop: tuple[int, int], state: object
) -> np.ndarray:
    cells, row = np.zeros(canvas, bool), crop[0]
    for rows in mask_rows(path, size):
        for start in range(0, len(rows)):
            marked = rows[start].nonzero()[0]
            cells[(row + start) // FACTOR, (marked + crop[1]) // FACTOR] = True
        row += len(rows)
    if not cells.any():
        raise UsageError(f"{path}: no part of this mask is white, so nothing would be painted; give another --repaint")
    return cells


def _png_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a PNG that is read by strips; None for every other file."""
    try:
        if not is_streamed(path):
            return None
        with opened(path) as picture:
            return picture.size if guide_picture.orientation(picture) == 1 else None
    except (OSError, ValueError, SyntaxError):
        return None


def _pixels(path: Path, note: Callable[[str], None]) -> Iterator[np.ndarray]:
    """Yield the strips of a picture, (n, W, 3) uint8 sRGB."""
    if _png_size(path) is None:
        with GuidePicture(path, _WHOLE) as whole:
            yield whole.load(note)
        return
    with opened(path) as picture:
        colours, transparent = guide_picture.colours(picture, note), False
    for strip in _strips(path):
        if strip.has_transparency_data:
            strip, seen = guide_picture.on_white(strip)
            transparent |= seen
        yield np.asarray(colours(strip))
    if transparent:
        note(f"{path.name}: its transparent parts become white")


def _levels(path: Path) -> Iterator[np.ndarray]:
    """Yield the strips of a mask, (n, W) uint8. Transparent pixels are black, whatever their colour."""
    if _png_size(path) is not None:
        strips = _strips(path)
    else:
        with GuidePicture(path, _WHOLE), Image.open(path) as picture:  # GuidePicture reports a bad header
            strips = iter([_upright(path, picture)])
    for strip in strips:
        if strip.has_transparency_data:
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "black"), strip.convert("RGBA"))
        levels = np.asarray(strip.convert("L"))
        yield np.where(levels > _BLACK, levels, 0).astype(np.uint8)


def _upright(path: Path, picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise _damaged(path, error) from error


def _strips(path: Path) -> Iterator[Image.Image]:
    try:
        yield from read_strips(path)
    except (OSError, ValueError, SyntaxError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path}: the picture is damaged ({error}); take another copy")
