"""Which of several machines with one folder draws a picture: the one that made the picture's job folder. No clocks are
compared: the file system that all of them see says how old a claim is."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from tiler.errors import StorageError

OWNER = "owner.json"
TOUCH_EVERY = 60.0  # seconds
_STALE = 15 * 60.0  # seconds for which nobody has touched a claim that others may take over


def host() -> str:
    """This machine's name, as a part of a file's."""
    return "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname()) or "unknown"


def claim(folder: Path) -> bool:
    """Whether the job folder is this process's now: nobody else's, or nobody's for a quarter of an hour. Raises
    StorageError."""
    try:
        try:
            folder.mkdir()
        except FileExistsError:
            if _age(folder) < _STALE or not _take_over(folder):
                return False
        return _sign(folder)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be claimed ({error.strerror}); check its permissions") from error


def touch(folder: Path) -> None:
    """Say that the owner is at work."""
    with suppress(OSError):
        os.utime(folder / OWNER)


def release(folder: Path) -> None:
    """What is saved in the folder stays, for whoever goes on with it."""
    with suppress(OSError):
        os.unlink(folder / OWNER)
    with suppress(OSError):
        folder.rmdir()


def _sign(folder: Path) -> bool:
    words = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    try:
        with open(folder / OWNER, "x", encoding="utf-8") as file:
            file.write(json.dumps(words))
    except (FileExistsError, FileNotFoundError):  # another machine was faster, or has just tidied up
        return False
    return True


def _age(folder: Path, claim: str = OWNER) -> float:
    """Seconds since the claim was touched, by the clock of the file system. A folder without an owner is free: its
    owner has let it go, or a render that was interrupted left it."""
    probe = folder / f".{host()}-{os.getpid()}"
    try:
        touched = os.stat(folder / claim).st_mtime
        with open(probe, "w"):
            now = os.stat(probe).st_mtime
        os.unlink(probe)
    except FileNotFoundError:
        return _STALE
    return now - touched


def _take_over(folder: Path) -> bool:
    """Of several that want it, one can rename the old claim."""
    old = folder / f"{OWNER}.{host()}-{os.getpid()}"
    try:
        os.rename(folder / OWNER, old)
    except FileNotFoundError:
        return True  # there was none: `_sign` decides
    if _age(folder, old.name) < _STALE:  # another one has taken it over meanwhile
        os.rename(old, folder / OWNER)
        return False
    os.unlink(old)
    return True
