"""The names of what lies in a job's folder, for those that do not open it. Imports next to nothing."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

SUFFIX = ".tiler"
MANIFEST, LOCK, REFERENCE, SPOOL = "job.json", "lock", "reference.safetensors", "spool"
SLOTS = ("state-0.safetensors", "state-1.safetensors")


def remove(folder: Path, keep: tuple[str, ...] = ()) -> None:
    """Only what a job consists of: whatever else someone put there stays, and the folder with it. The manifest goes
    last but the lock, so that a folder half removed is known as what it was."""
    own = (*SLOTS, REFERENCE, MANIFEST)
    for name in (*(f"{each}.new" for each in own), *own, LOCK):
        if name not in keep:
            with suppress(OSError):
                os.unlink(folder / name)
    if not keep:
        with suppress(OSError):
            folder.rmdir()
