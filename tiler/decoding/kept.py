"""Keep the rows of the finished picture while they are made, for resuming with a decoder that has no passes to
remember."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np

from tiler.decoding.spool import Line, Spool
from tiler.errors import StorageError
from tiler.weights.index import read_into

_NUMBER = 1000  # after all numbers that a decoder itself uses


class KeptRows:
    """Rows of `width` pixels, uint8 RGB, in a file of the spool. A context manager. Raises StorageError."""

    def __init__(self, spool: Spool, width: int) -> None:
        self._spool, self._width = spool, width
        known = spool.of(_NUMBER)
        self._heights = list(known.heights or ()) if known is not None and known.width == width else []

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

    @property
    def count(self) -> int:
        return sum(self._heights)

    def strips(self) -> Iterator[np.ndarray]:
        """Yield the strips that exist when the iteration starts, cut as they were added: a writer's bytes may depend on
        how its rows are cut into strips."""
        at = 0
        for height in tuple(self._heights):
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
        self._heights.append(len(rows))
        line = Line(
            number=_NUMBER, channels=3, width=self._width, count=self.count, row_bytes=3 * self._width, whole=False,
            heights=self._heights,
        )  # fmt: skip
        self._spool.note(line, self._fd)

    def _lost(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self._spool.folder}: keeping rows failed ({error.strerror}); free some space, or give another folder with "
            "--scratch"
        )
