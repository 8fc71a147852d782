"""Files that appear whole or not at all: written beside their place, flushed, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tiler.errors import StorageError, UsageError


def check_writable(path: Path, *, force: bool) -> None:
    """Before any work: the file may be written there. Raises UsageError or StorageError."""
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; --output takes a file name")
        if path.exists() and not force:
            raise UsageError(f"{path} exists; give --force to replace it, or another --output")
        folder = path.resolve().parent
        if not folder.is_dir():
            raise UsageError(f"{folder} does not exist; create it first")
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tiler-"):
            pass
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes its name only when the block ends well. Raises StorageError."""
    temp: str | None = None
    try:
        fd, temp = tempfile.mkstemp(dir=path.resolve().parent, prefix=".tiler-", suffix=path.suffix)
        os.close(fd)
        with open(temp, "wb") as file:  # tifffile wants a file that knows its name
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temp, 0o666 & ~umask)
        os.replace(temp, path)
        temp = None
    except OSError as error:
        raise StorageError(
            f"{path}: writing failed ({error.strerror}); free some space or choose another place"
        ) from error
    finally:
        if temp is not None:
            with suppress(OSError):
                os.unlink(temp)
