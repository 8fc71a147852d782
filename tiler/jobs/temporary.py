"""Folders for temporary files of one process. If it is killed, the next process that makes one of that kind removes
them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tiler.errors import JobLocked, StorageError
from tiler.jobs.lock import Lock, held_if_free

_LOCK = "lock"
_TRIES = 10  # another process may take a folder for a leftover in the moment before it is locked


@contextmanager
def own_folder(prefix: str, place: Path | None = None) -> Iterator[Path]:
    """A new folder in `place`, None: the system's folder for temporary files, which is removed when the context ends.
    `place` should belong to this machine alone, since not every network has locks. Raises OSError."""
    place = Path(tempfile.gettempdir()) if place is None else place
    _remove_leftovers(prefix, place)
    folder, lock = _locked(prefix, place)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _locked(prefix: str, place: Path) -> tuple[Path, Lock]:
    """A new folder and its lock. Where files cannot be locked, the folder has none, and nobody takes it for a
    leftover."""
    for _ in range(_TRIES):
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        lock = Lock(folder / _LOCK)
        with suppress(JobLocked, StorageError):
            lock.take()
            return folder, lock
        shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=place)), lock


def _remove_leftovers(prefix: str, place: Path) -> None:
    """Remove this user's folders whose processes have ended."""
    for folder in place.glob(f"{prefix}*"):
        with suppress(OSError):
            is_ours = not folder.is_symlink() and folder.stat().st_uid == os.geteuid()
            if is_ours:
                with held_if_free(folder / _LOCK) as is_free:
                    if is_free:
                        shutil.rmtree(folder, ignore_errors=True)
