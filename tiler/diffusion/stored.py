"""Canvases in files: arrays that are read and written in parts, and a step's predictions in the order in which they
arrive.

A canvas of 100,000 pixels has 2.5 GB of latents. Reads and writes use preadv and pwrite, because mapped pages would
count as RSS.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from tiler.errors import StorageError
from tiler.weights.index import read_into

Shape = tuple[int, int, int, int]
CHUNK = 2**18  # elements at a time; for noise a multiple of 16, which torch draws together
BAND = 2**21  # elements of the rows that are blended together
_FLOAT = 4  # bytes
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW  # a link would lead to a file that is no part of the canvas


class Span(NamedTuple):
    """Elements of an array in the order of its file, [first, last)."""

    first: int
    last: int


def chunks(count: int, size: int = CHUNK) -> Iterator[Span]:
    """Split [0, count) into spans of `size`, the last of at least 16: then drawing each of them yields the numbers of a
    single draw."""
    ends = [*range(size, count, size)]
    if ends and count - ends[-1] < 16:
        ends.pop()
    yield from (Span(first, last) for first, last in pairwise((0, *ends, count)))


def band_rows(shape: Shape) -> int:
    """The number of canvas rows that are processed together."""
    return max(1, BAND // (shape[1] * shape[3]))


class StoredArray:
    """An array of `shape` (1, C, h, w) fp32 in the file `path`; a new file is all zeros. A context manager. Raises
    StorageError."""

    def __init__(self, path: Path, shape: Shape, *, new: bool) -> None:
        self.path, self.count = path, math.prod(shape)
        self.shape: tuple[int, ...] = shape
        try:
            self._fd = os.open(path, _FLAGS | (os.O_CREAT | os.O_TRUNC if new else 0), 0o600)
            if new:
                os.ftruncate(self._fd, _FLOAT * self.count)
            elif os.fstat(self._fd).st_size != _FLOAT * self.count:
                raise StorageError(f"{path}: the file's size is not the canvas's; start over with --restart")
        except OSError as error:
            raise _failed(path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file without removing it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def sync(self) -> None:
        """Flush the file to the disk."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise _failed(self.path, error) from error

    def parts(self) -> Iterator[Tensor]:
        """Yield all elements in the file's order, (1, 1, 1, n) each."""
        return map(self.flat, chunks(self.count))

    def flat(self, span: Span) -> Tensor:
        """The elements of a span, in the file's order, (1, 1, 1, n)."""
        found = torch.empty(1, 1, 1, span.last - span.first)
        _read(self._fd, self.path, found, _FLOAT * span.first)
        return found

    def set_flat(self, span: Span, values: Tensor) -> None:
        """Write elements in the file's order; the inverse of `flat`."""
        _write(self._fd, self.path, values, _FLOAT * span.first)

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Tensor:
        """[:, :, first:last] → (1, C, n, w)."""
        assert index[:2] == (slice(None), slice(None)), "rows only"
        first, last, _ = index[2].indices(self.shape[2])
        found = torch.empty(1, self.shape[1], max(0, last - first), self.shape[3])
        for channel, rows in enumerate(found[0]):
            _read(self._fd, self.path, rows, self._at(channel, first, 0))
        return found

    def widened(self, rows: int, cols: int) -> Widened:
        """The array with this many more rows and columns on each side, which repeat the opposite side."""
        return Widened(self, rows, cols)

    def put(self, part: Tensor, top: int, left: int) -> None:
        """Write (1, C, h, w), whose first element belongs at this row and column."""
        width = part.shape[3]
        for channel, rows in enumerate(part[0]):
            if width == self.shape[3]:
                _write(self._fd, self.path, rows, self._at(channel, top, 0))
                continue
            for number, row in enumerate(rows):
                _write(self._fd, self.path, row, self._at(channel, top + number, left))

    def crop(self, top: int, left: int, height: int, width: int) -> Tensor:
        """Read (1, C, height, width) from this row and column on; beyond the border it continues at the opposite
        side."""
        found = torch.empty(1, self.shape[1], height, width)
        left %= self.shape[3]
        ends = [*range(self.shape[3] - left, width, self.shape[3])]  # where it starts again at column 0
        pieces = list(pairwise((0, *ends, width)))
        for channel, rows in enumerate(found[0]):
            for number, row in enumerate(rows):
                line = (top + number) % self.shape[2]
                for first, last in pieces:
                    _read(self._fd, self.path, row[first:last], self._at(channel, line, 0 if first else left))
        return found

    def scatter(self, first: int, values: Tensor, top: int, left: int, height: int, width: int) -> None:
        """Write (n,) values, which are the elements from number `first` on of a (C, height, width) part at this row and
        column."""
        at, end = first, first + values.numel()
        while at < end:
            row, column = divmod(at, width)
            channel, row = divmod(row, height)
            upto = min(end, at + width - column)
            _write(self._fd, self.path, values[at - first : upto - first], self._at(channel, top + row, left + column))
            at = upto

    def _at(self, channel: int, row: int, column: int) -> int:
        _, _, height, width = self.shape
        return _FLOAT * ((channel * height + row) * width + column)


class Widened:
    """A canvas that continues beyond its borders, for use as `Latents` in decoding."""

    def __init__(self, array: StoredArray, rows: int, cols: int) -> None:
        self._array, self._rows, self._cols = array, rows, cols
        _, channels, height, width = array.shape
        self.shape = (1, channels, height + 2 * rows, width + 2 * cols)

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Tensor:
        first, last, _ = index[2].indices(self.shape[2])
        return self._array.crop(first - self._rows, -self._cols, max(0, last - first), self.shape[3])


class TileLog:
    """Predictions of `shape` (C, h, w) fp32 in a file, one after another, each with a checksum: predictions damaged by
    a kill or a power cut are not counted. A context manager. Raises StorageError."""

    def __init__(self, path: Path, shape: tuple[int, int, int], *, new: bool) -> None:
        self.path, self.shape = path, shape
        self._bytes = _FLOAT * math.prod(shape)
        try:
            self._fd = os.open(path, _FLAGS | os.O_CREAT | (os.O_TRUNC if new else 0), 0o600)
        except OSError as error:
            raise _failed(path, error) from error
        self.count = 0 if new else self._whole()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1

    def append(self, prediction: Tensor) -> None:
        """Add the next tile's prediction, (C, h, w)."""
        held = prediction.contiguous()
        check = torch.tensor([zlib.crc32(_view(held))], dtype=torch.int64).to(torch.int32)
        at = self.count * (self._bytes + _FLOAT)
        _write(self._fd, self.path, held, at)
        _write(self._fd, self.path, check, at + self._bytes)
        self.count += 1

    def rows(self, number: int, first: int, last: int) -> Tensor:
        """The rows [first, last) of a tile's prediction, (C, last − first, w)."""
        channels, height, width = self.shape
        found = torch.empty(channels, last - first, width)
        at = number * (self._bytes + _FLOAT)
        for channel, rows in enumerate(found):
            _read(self._fd, self.path, rows, at + _FLOAT * width * (channel * height + first))
        return found

    def sync(self) -> None:
        """Flush the file to the disk."""
        try:
            if self._fd >= 0:
                os.fsync(self._fd)
        except OSError as error:
            raise _failed(self.path, error) from error

    def _whole(self) -> int:
        """The number of predictions from the first on that are intact."""
        held, check = torch.empty(self.shape), torch.empty(1, dtype=torch.int32)
        size = os.fstat(self._fd).st_size // (self._bytes + _FLOAT)
        for number in range(size):
            at = number * (self._bytes + _FLOAT)
            _read(self._fd, self.path, held, at)
            _read(self._fd, self.path, check, at + self._bytes)
            if zlib.crc32(_view(held)) != int(check) % 2**32:
                return number
        return size


def _view(values: Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data.cast("B")


def _read(fd: int, path: Path, into: Tensor, at: int) -> None:
    if not into.numel():
        return
    try:
        whole = read_into(fd, _view(into), at)
    except OSError as error:
        raise StorageError(f"{path}: reading failed ({error.strerror}); check the disk") from error
    if not whole:
        raise StorageError(f"{path}: the file became shorter while it was read; start over with --restart")


def _write(fd: int, path: Path, values: Tensor, at: int) -> None:
    if not values.numel():
        return
    view = _view(values.contiguous())
    try:
        while len(view):
            done = os.pwrite(fd, view, at)
            at, view = at + done, view[done:]
    except OSError as error:
        raise _failed(path, error) from error


def _failed(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path}: the canvas cannot be stored there ({error.strerror}); free some space, or start over with another "
        "--scratch, for which a job takes --restart"
    )
