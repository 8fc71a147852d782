"""Keep the rows of the finished picture while they are made, so that a decoder without passes to remember can
continue."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np

from tiler.decoding.spool import Line, Spool
from tiler.errors import StorageError
from tiler.weights.index import read_into

_NUMBER = 1000  # above all numbers that decoders use


class KeptRows:
    """Rows of `width` pixels, uint8 RGB, in a file of the spool. A context manager. Raises StorageError."""

    def __init__(self, spool: Spool, width: int) -> None:
        self._spool, self._width = spool, width
        known = spool.of(_NUMBER)
        strips = known.strips if known is not None and known.width == width else None
        self._runs = [(height, times) for height, times in strips or ()]
        self.count = sum(height * times for height, times in self._runs)  # rows

    def __enter__(self) -> Self:
        try:
            self._fd = self._spool.open(_NUMBER)
        except OSError as error:
            raise self._lost(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def strips(self) -> Iterator[np.ndarray]:
        """Yield the strips that exist when the iteration starts, cut as they were added: a writer's bytes may depend on
        how its rows are cut into strips."""
        at = 0
        for height in [height for height, times in self._runs for _ in range(times)]:
            rows = np.empty((height, self._width, 3), np.uint8)
            try:
                if not read_into(self._fd, rows.data.cast("B"), at):
                    raise OSError(0, "the file ends early")
            except OSError as error:
                raise self._lost(error) from error
            at += rows.nbytes
            yield rows

    def add(self, rows: np.ndarray) -> None:
        """Append rows, (n, width, 3)."""
        at, left = 3 * self._width * self.count, np.ascontiguousarray(rows).data.cast("B")
        try:
            while len(left):
                done = os.pwrite(self._fd, left, at)
                at, left = at + done, left[done:]
        except OSError as error:
            raise self._lost(error) from error
        last, times = self._runs[-1] if self._runs else (0, 0)
        if last == len(rows):
            self._runs[-1] = last, times + 1
        else:
            self._runs.append((len(rows), 1))
        self.count += len(rows)
        line = Line(
            number=_NUMBER, channels=3, width=self._width, count=self.count, row_bytes=3 * self._width, whole=False,
            strips=self._runs,
        )  # fmt: skip
        self._spool.note(line, self._fd)

    def _lost(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self._spool.folder}: keeping rows failed ({error.strerror}); free some space, or give another folder with "
            "--scratch"
        )
