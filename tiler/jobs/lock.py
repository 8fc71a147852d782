"""A lock that ends with its process, however the process ends: flock(2). It depends on no clock, so a laptop may
sleep."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tiler.errors import JobLocked, StorageError


class Lock:
    """A lock that is held from `take` to `release`. The content of the lock file is only for people."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    @property
    def held(self) -> bool:
        return self._fd >= 0

    def take(self) -> None:
        """Acquire the lock. Raises JobLocked naming the process that holds it, and StorageError."""
        try:
            while self._fd < 0:
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    same = os.path.samestat(os.fstat(fd), os.stat(self.path))
                except BlockingIOError:
                    os.close(fd)
                    raise JobLocked(
                        f"{self.path.parent}: {self._holder()} is already working on this picture; wait for it to end"
                    ) from None
                except FileNotFoundError:
                    same = False  # the last holder has just removed it
                except OSError:
                    os.close(fd)
                    raise
                if same:
                    self._fd = fd
                else:
                    os.close(fd)
            words = {"pid": os.getpid(), "host": socket.gethostname(), "start": _now(), "command": sys.argv}
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps(words).encode("utf-8", "backslashreplace"), 0)
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be locked ({error.strerror}); give another folder with --job-dir"
            ) from error

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _holder(self) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(self.path.read_text())
            return f"process {found['pid']} on {found['host']}, begun {found['start']},"
        return "another process"


def is_held(path: Path) -> bool:
    """Whether any process holds the lock now."""
    try:
        with held_if_free(path) as is_free:
            return not is_free
    except OSError:
        return False


@contextlib.contextmanager
def held_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock in the context if no other process does; whether this one does. Raises OSError if there is no such
    file."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = True
        except OSError:
            is_free = False
        yield is_free
    finally:
        os.close(fd)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
