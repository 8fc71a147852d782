"""The files of a canvas that memory does not hold, by name. Imports no torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

STATE = "canvas.json"  # how far it is
REFERENCE = "reference"  # what it begins from
BLENDED, LATENTS, SCHEDULER, PREDICTIONS = "blended", "latents", "scheduler", "predictions"


def has_begun(folder: Path) -> bool:
    """Whether a canvas lies there."""
    return (folder / STATE).exists()


def holds_work(folder: Path) -> bool:
    """Whether something lies there that took long to make."""
    return has_begun(folder) or (folder / REFERENCE).exists()


def clear(folder: Path) -> None:
    """Remove a canvas, and the folder if nothing else is in it."""
    if folder.is_symlink():  # of whoever may write there: the files are others'
        return
    with suppress(OSError):
        for name in (STATE, REFERENCE, BLENDED, LATENTS, SCHEDULER, PREDICTIONS):
            for path in (folder / name, *folder.glob(f"{name}.*")):
                path.unlink(missing_ok=True)
        folder.rmdir()
