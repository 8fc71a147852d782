"""The names of the files in a job folder, for code that does not open jobs. Imports next to nothing."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tiler.files import leftovers

SUFFIX = ".tiler"
MANIFEST, LOCK, REFERENCE, SPOOL = "job.json", "lock", "reference.safetensors", "spool"
SMALLER = "smaller.png"  # the picture that is rendered first, beside its own job
SLOTS = ("state-0.safetensors", "state-1.safetensors")


def remove(folder: Path, keep: tuple[str, ...] = ()) -> None:
    """Remove a job's files, except those in `keep`, and then the folder. Files of other origin stay, and the folder
    with them. The manifest is removed after all files except the lock, so that a partly removed folder can still be
    identified."""
    for path in (*leftovers(folder), *(folder / name for name in (*SLOTS, REFERENCE, SMALLER, MANIFEST, LOCK))):
        if path.name not in keep:
            with suppress(OSError):
                os.unlink(path)
    if not keep:
        with suppress(OSError):
            folder.rmdir()
