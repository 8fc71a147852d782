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
    """Before any work: somebody still reads standard output, where it is a pipe. Raises StorageError."""
    waiting = select.poll()
    waiting.register(_STDOUT, select.POLLOUT)
    if any(event & select.POLLERR for _, event in waiting.poll(0)):
        raise StorageError(_GONE)


@contextmanager
def standard_output() -> Iterator[BinaryIO]:
    """Standard output for bytes; it stays open. Raises StorageError where it takes no more of them."""
    try:
        with open(os.dup(_STDOUT), "wb") as file:
            yield file
    except BrokenPipeError as error:
        raise StorageError(_GONE) from error
    except OSError as error:
        raise StorageError(f"standard output: writing failed ({error.strerror}); free some space") from error
