"""A picture on standard output: `tiler render … -o - | magick - x.heic`."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from tiler.errors import StorageError

_STDOUT = 1
_GONE = "standard output: the program behind the pipe has ended; start it again, or write a file with -o NAME.png"


def check_reader() -> None:
    """Check, before any work, that a program still reads standard output if it is a pipe. Raises StorageError."""
    waiting = select.poll()
    waiting.register(_STDOUT, select.POLLOUT)
    if any(event & select.POLLERR for _, event in waiting.poll(0)):
        raise StorageError(_GONE)


@contextmanager
def standard_output() -> Iterator[BinaryIO]:
    """Open standard output for bytes, and leave it open afterwards. Raises StorageError if a write fails."""
    try:
        with open(os.dup(_STDOUT), "wb") as file:
            yield file
    except BrokenPipeError as error:
        raise StorageError(_GONE) from error
    except OSError as error:
        raise StorageError(f"standard output: writing failed ({error.strerror}); free some space") from error
