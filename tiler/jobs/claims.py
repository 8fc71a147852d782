"""Decide which of several machines that share a folder draws a picture: the one that created the picture's job folder.
No clocks are compared: the age of a claim is read from the file system that all machines share."""

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
_STALE = 15 * 60.0  # seconds without a touch, after which others may take over a claim


def host() -> str:
    """This machine's name, in letters, digits and dashes, for use in file names."""
    return "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname()) or "unknown"


def claim(folder: Path) -> bool:
    """Claim a job folder, and return whether this process owns it now. A claim that its owner has not touched for a
    quarter of an hour can be taken over. Raises StorageError."""
    try:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)  # of --job-dir
            folder.mkdir()
        except FileExistsError:
            if _age(folder) < _STALE or not _take_over(folder):
                return False
        return _sign(folder)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be claimed ({error.strerror}); check its permissions") from error


def is_ours(folder: Path) -> bool:
    """Whether this process owns the folder still: while it was suspended, another may have taken over its claim."""
    try:
        words = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return (words["host"], words["pid"]) == (socket.gethostname(), os.getpid())
    except (OSError, ValueError, TypeError, KeyError):
        return False


def touch(folder: Path) -> None:
    """Record that the owner is still at work."""
    with suppress(OSError):
        if is_ours(folder):
            os.utime(folder / OWNER)


def release(folder: Path) -> None:
    """Give up the claim, if it is still ours. Files saved in the folder stay for the process that continues the job."""
    if not is_ours(folder):
        return
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
    except (FileExistsError, FileNotFoundError):  # another machine was faster, or has just removed the folder
        return False
    return True


def _age(folder: Path, claim: str = OWNER) -> float:
    """Seconds since the claim was touched, by the clock of the file system. A folder without an owner counts as stale:
    its owner has released it, or an interrupted render left it."""
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
    """Take over a stale claim. If several processes try, only one of them can rename the old claim."""
    old = folder / f"{OWNER}.{host()}-{os.getpid()}"
    try:
        os.rename(folder / OWNER, old)
    except FileNotFoundError:
        return True  # there was none: `_sign` decides
    if _age(folder, old.name) < _STALE:  # another process has taken it over meanwhile
        os.rename(old, folder / OWNER)
        return False
    os.unlink(old)
    return True
