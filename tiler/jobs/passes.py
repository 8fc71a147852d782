"""Where a job saves the progress of its decoder or encoder, so that an interrupted one continues where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiler.decoding.method import DecodePlan
from tiler.decoding.scratch import free_bytes
from tiler.decoding.spool import Spool, bytes_in, clear
from tiler.events import OnEvent, Saved
from tiler.memory.budget import format_mb
from tiler.output.latents import InParts

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def remember(
    place: Path | None, what: str, plan: DecodePlan, begin: Tensor | np.ndarray | InParts, on_event: OnEvent, note: Callable[[str], None]
) -> Spool | None:  # fmt: skip
    """The spool at `place` for `plan`, whose input is the tensor or array `begin`; `what` names the work in messages.
    None without a job, and (with a note) if the disk has too little space. Raises StorageError."""
    if place is None:
        return None
    free = free_bytes(plan.folder) + bytes_in(place)
    if free < plan.apart_bytes:
        clear(place)
        note(
            f"{plan.folder} has {format_mb(free)} free, saving the progress of {what} takes "
            f"{format_mb(plan.apart_bytes)}: if interrupted, it starts over"
        )
        return None
    of = f"{plan.kind} {plan.precision} {plan.dtype} {_digest(begin)}"
    return Spool(place, what, of, lambda where: on_event(Saved(where=where)))


def _digest(begin: Any) -> str:
    """A hash of the bytes of a tensor or an array, without a copy if they are contiguous."""
    if isinstance(begin, InParts):
        found = hashlib.sha256()
        for part in begin.parts():
            found.update(part.numpy().tobytes())
        return found.hexdigest()
    array = begin if hasattr(begin, "tobytes") else begin.contiguous().numpy()
    return hashlib.sha256(memoryview(array if array.flags.c_contiguous else array.copy())).hexdigest()
