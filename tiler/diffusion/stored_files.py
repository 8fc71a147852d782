"""The files of a canvas that does not fit in memory, by name. Imports no torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tiler.files import leftovers

STATE = "canvas.json"  # the progress
REFERENCE = "reference"  # the latents it starts from
BLENDED, LATENTS, SCHEDULER, PREDICTIONS = "blended", "latents", "scheduler", "predictions"


def has_begun(folder: Path) -> bool:
    """Whether the folder contains a started canvas."""
    return (folder / STATE).exists()


def holds_work(folder: Path) -> bool:
    """Whether the folder holds work that took long."""
    return has_begun(folder) or (folder / REFERENCE).exists()


def clear(folder: Path) -> None:
    """Remove a canvas, and the folder if nothing else is in it."""
    if folder.is_symlink():  # someone else made it, and the files are theirs
        return
    with suppress(OSError):
        for name in (STATE, REFERENCE, BLENDED, LATENTS, SCHEDULER, PREDICTIONS):
            for path in (folder / name, *folder.glob(f"{name}.*")):
                path.unlink(missing_ok=True)
        for path in leftovers(folder):
            path.unlink(missing_ok=True)
        folder.rmdir()
