"""Files that appear whole or not at all: written beside their place, flushed, then renamed."""

from __future__ import annotations

import os
import secrets
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
    folder = path.resolve().parent
    temp = folder / f".tiler-{secrets.token_hex(6)}{path.suffix}"
    handle = -1
    try:
        handle = _nameless(folder)
        # tifffile wants a file that knows its name.
        with open(temp if handle < 0 else f"/proc/self/fd/{handle}", "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if handle >= 0:
            os.link(f"/proc/self/fd/{handle}", temp, src_dir_fd=handle, follow_symlinks=True)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temp, 0o666 & ~umask)
        os.replace(temp, path)
    except OSError as error:
        raise StorageError(
            f"{path}: writing failed ({error.strerror}); free some space or choose another place"
        ) from error
    finally:
        if handle >= 0:
            os.close(handle)
        with suppress(OSError):
            os.unlink(temp)


def _nameless(folder: Path) -> int:
    """A new file without a name, of which a killed process leaves nothing; -1 where the file system knows none."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return -1
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError:
        return -1
