"""Scratch files of a model: tensors that wait on disk, in a nameless file that disappears with its process."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path

from torch import Tensor

from tiler.decoding.scratch import nameless_file
from tiler.errors import StorageError


class NamelessFile:
    """fp32 values by their position in a nameless file. Raises StorageError."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder or Path(tempfile.gettempdir())
        try:
            fd = nameless_file(self._folder)
        except OSError as error:
            raise StorageError(
                f"{self._folder}: no file can be made here ({error.strerror}); choose another --scratch"
            ) from error
        self._file = fd
        weakref.finalize(self, os.close, fd)

    def write(self, at: int, values: Tensor) -> None:
        """Write fp32 values of any shape from byte `at` on. Raises StorageError."""
        view = _bytes(values.contiguous())
        try:
            while len(view):
                done = os.pwrite(self._file, view, at)
                view, at = view[done:], at + done
        except OSError as error:
            raise StorageError(
                f"{self._folder}: the disk takes no more ({error.strerror}); free some space, or choose another --scratch"
            ) from error

    def read(self, at: int, into: Tensor) -> Tensor:
        """Fill the contiguous fp32 tensor with the values written from byte `at` on, and return it."""
        view = _bytes(into)
        while len(view):
            done = os.preadv(self._file, [view], at)
            assert done, "values that were not written"
            view, at = view[done:], at + done
        return into


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.numpy()).cast("B")  # type: ignore[arg-type]
