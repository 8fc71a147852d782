"""Activations on disk: tensors of rows in files without names, so that nothing is left behind however the process ends;
or in the named files of a spool, if a job remembers its passes.

fp16 rows that would overflow are scaled by a power of two, so the dtype costs precision (2⁻¹¹) but never range. Knows
files and dtypes, not layers. Reads and writes are preadv and pwrite: mapped pages would count as RSS.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tiler.decoding.messages import Packed
from tiler.decoding.spool import Line, Spool
from tiler.errors import NumericalError, StorageError
from tiler.files import named
from tiler.weights.index import read_into

STRIP_BYTES = 12 * 2**20  # fp32, of rows read at a time
FP16_ROOM = 2.0**15


class Scratch:
    """A folder for `Rows`, and statistics of its use. A context manager that closes the files that are still open when
    it ends, for whatever reason.

    With `folder` None nothing is stored: for planning on meta tensors. With a `spool`, files stay there. `peak_bytes`
    is the most that was stored at once, `apart_bytes` the same if no rows replace others, `written_bytes` the total
    written, `worked` how much work (work.py) is done. Raises StorageError if the folder cannot be used.
    """

    def __init__(self, folder: Path | None, dtype: torch.dtype = torch.float16, spool: Spool | None = None) -> None:
        self.folder, self.dtype, self.spool = folder, dtype, spool
        self.live_bytes = self.peak_bytes = self.written_bytes = self.apart_bytes = 0
        self.worked = 0.0
        self._apart = 0
        self._open = set[int]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for fd in tuple(self._open):
            self.close(fd)
        self.live_bytes = 0

    def open(self, number: int = -1) -> int:
        """A new file without a name; with a spool, the file of a pass, or -1 if it was already removed."""
        assert self.folder is not None
        try:
            fd = nameless_file(self.folder) if self.spool is None else self.spool.open(number)
        except OSError as error:
            raise StorageError(
                f"{named(self.folder)}: cannot write scratch files ({error.strerror}); give another folder with --scratch"
            ) from error
        if fd >= 0:
            self._open.add(fd)
        return fd

    def count(self, earlier: Scratch) -> None:
        """Count what another one, closed by now, stored and wrote."""
        self.peak_bytes = max(self.peak_bytes, earlier.peak_bytes)
        self.written_bytes += earlier.written_bytes

    def close(self, fd: int) -> None:
        """Free the space of a file."""
        if fd in self._open:
            self._open.remove(fd)
            os.close(fd)

    def grow(self, nbytes: int) -> None:
        self.live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def grow_apart(self, nbytes: int) -> None:
        self._apart += nbytes
        self.apart_bytes = max(self.apart_bytes, self._apart)


def nameless_file(folder: Path) -> int:
    """The descriptor of an empty file that nobody else can open, and whose space is freed when it is closed."""
    fd, name = tempfile.mkstemp(prefix=".tiler-", dir=folder)
    try:
        os.unlink(name)
    except OSError:
        os.close(fd)
        raise
    return fd


def free_bytes(folder: Path) -> int:
    """The free space of `folder`'s file system for this user. Raises StorageError."""
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise StorageError(
            f"{named(folder)}: this folder cannot be used for scratch files ({error.strerror}); give another with --scratch"
        ) from error


class Rows:
    """A picture of (channels, width) rows that grows downwards, stored in `dtype`, by default the scratch's. With
    `over`, its rows replace those of another picture, which must have been read before. In a spool they belong to pass
    `number`, and start with the rows that are `known` of it. The rows above `begin` belong to other processes: they
    take no space where files may have holes."""

    def __init__(
        self,
        scratch: Scratch,
        channels: int,
        width: int,
        *,
        over: Rows | None = None,
        number: int = -1,
        known: Line | None = None,
        begin: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.scratch, self.channels, self.width, self.count, self.number = scratch, channels, width, begin, number
        self.dtype = scratch.dtype if dtype is None else dtype
        self.row_bytes = channels * width * self.dtype.itemsize
        assert over is None or self.row_bytes <= over.stride
        self.stride: int = self.row_bytes if over is None else over.stride
        self.fd: int = over.fd if over is not None else -1 if scratch.folder is None else scratch.open(number)
        self.over = over
        self.stored_bytes: int = 0 if over is None else over.stored_bytes
        self._scales = [1.0] * begin  # of each row
        self._hole_bytes = begin * self.stride
        if known is not None:
            self.count, self._scales = known.count, known.scales or [1.0] * known.count
            self.stored_bytes = known.count * self.row_bytes if self.fd >= 0 else 0
            scratch.grow(self.stored_bytes)
            scratch.written_bytes += known.count * self.row_bytes

    def append(self, x: Tensor, largest: float | None = None) -> None:
        """x: (1, channels, n, width) fp32, whose `largest` magnitude may be known. Raises NumericalError for NaN and
        Inf, StorageError."""
        n = x.shape[2]
        grown = max(0, (self.count + n) * self.stride - self._hole_bytes - self.stored_bytes)
        self.scratch.grow(grown)
        self.scratch.grow_apart(n * self.row_bytes)
        self.scratch.written_bytes += n * self.row_bytes
        self.stored_bytes += grown
        self.count += n
        stored = x.new_empty(n, self.width, self.channels, dtype=self.dtype)
        if x.is_meta:
            return
        rows = x[0].permute(1, 2, 0)
        if largest is None:
            low, high = torch.aminmax(rows)
            largest = float(torch.maximum(-low, high))
        if not math.isfinite(largest):
            raise NumericalError(
                f"NaN or Inf in the autoencoder, row {self.count - n} of {self.channels} channels; compare the checksum of the VAE's weights with the original's"
            )
        fits = self.dtype != torch.float16 or largest <= FP16_ROOM
        scale = 1.0 if fits else 2.0 ** math.ceil(math.log2(largest / FP16_ROOM))
        self._scales += [scale] * n
        stored.copy_(rows if scale == 1 else rows / scale)
        self._write(self.count - n, stored.view(n, -1).view(torch.uint8).numpy())

    def _write(self, first: int, data: np.ndarray) -> None:
        """Write the bytes of some rows, (n, row_bytes) uint8."""
        try:
            for i in range(len(data)):
                at, row = (first + i) * self.stride, memoryview(data[i])
                while len(row):
                    done = os.pwrite(self.fd, row, at)
                    at, row = at + done, row[done:]
        except OSError as error:
            raise StorageError(
                f"{named(self.scratch.folder)}: writing scratch data failed ({error.strerror}); free some space, or give another "
                "folder with --scratch"
            ) from error

    def read(self, first: int, last: int) -> Tensor:
        """Rows [first, last) as (1, channels, n, width) fp32, channels-last."""
        n, device = last - first, "meta" if self.scratch.folder is None else "cpu"
        stored = torch.empty(n, self.width, self.channels, dtype=self.dtype, device=device)
        out = torch.empty(1, n, self.width, self.channels, device=device)
        if stored.is_meta:
            return out.permute(0, 3, 1, 2)
        self._read(first, stored.view(n, -1).view(torch.uint8).numpy())
        scales = self._scales[first:last]
        out.copy_(stored)
        if max(scales) > 1:
            out.mul_(torch.tensor(scales).view(-1, 1, 1))
        return out.permute(0, 3, 1, 2)

    def _read(self, first: int, data: np.ndarray) -> None:
        """Read the bytes of some rows into (n, row_bytes) uint8."""
        try:
            for i in range(len(data)):
                if not read_into(self.fd, memoryview(data[i]), (first + i) * self.stride):
                    raise OSError(0, "the file ends early")
        except OSError as error:
            raise StorageError(
                f"{self.scratch.folder}: reading scratch data failed ({error.strerror}); check the disk"
            ) from error

    def packed(self, first: int, last: int) -> Packed:
        """Rows [first, last) as they are stored."""
        data = np.empty((last - first, self.row_bytes), np.uint8)
        self._read(first, data)
        return Packed(first, tuple(self._scales[first:last]), data)

    def fill(self, rows: Packed) -> None:
        """Store rows of other processes in their place. Raises StorageError."""
        self._write(rows.first, rows.data)
        self._scales[rows.first : rows.first + len(rows.data)] = rows.scales
        self.scratch.grow(rows.data.nbytes)
        self.stored_bytes += rows.data.nbytes

    def settle(self, height: int) -> None:
        """Nothing more is appended: the rows up to `height` belong to other processes."""
        self._scales += [1.0] * (height - self.count)
        self.count = height

    def rows_in(self, nbytes: int = STRIP_BYTES) -> int:
        """How many rows take about `nbytes` of fp32, at least one."""
        return max(1, nbytes // (4 * self.channels * self.width))

    def strips(self, nbytes: int = STRIP_BYTES, begin: int = 0) -> Iterator[Tensor]:
        """All rows from `begin` on, a few at a time: about `nbytes` of fp32 each."""
        step = self.rows_in(nbytes)
        for first in range(begin, self.count, step):
            yield self.read(first, min(first + step, self.count))

    def line(self, *, whole: bool, **facts: Any) -> Line:
        """The facts that a spool stores about the rows."""
        scales = self._scales if max(self._scales, default=1.0) > 1 else None
        return Line(
            number=self.number, channels=self.channels, width=self.width, count=self.count, row_bytes=self.row_bytes,
            whole=whole, scales=scales, **facts,
        )  # fmt: skip

    def close(self) -> None:
        """Free the space; rows that replaced these must be closed before."""
        self.scratch.close(self.fd)
        if self.scratch.spool is not None:
            self.scratch.spool.remove(self.number)
        self.fd = -1
        self.scratch.grow(-self.stored_bytes)
        self.give_back()

    def give_back(self) -> None:
        """Mark the rows as read; the rows that replace them may still exist."""
        self.scratch.grow_apart(-self.count * self.row_bytes)
