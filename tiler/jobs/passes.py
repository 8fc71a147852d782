"""Where a job saves the passes of its decoder, so that an interrupted decode continues at a pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiler.decoding import FACTOR
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
    None for an encoder without passes, without a job, and (with a note) if the disk has too little space. Raises
    StorageError."""
    if place is None or (plan.encoding and not plan.by_layers):
        return None
    free = free_bytes(plan.folder) + bytes_in(place)
    needed = plan.apart_bytes if plan.by_layers else plan.scratch_bytes + _picture_bytes(begin)
    if free < needed:
        clear(place)
        note(
            f"{plan.folder} has {format_mb(free)} free, saving the progress of {what} takes "
            f"{format_mb(needed)}: if interrupted, it starts over"
        )
        return None
    of = f"{plan.kind} {plan.precision} {plan.dtype} {_digest(begin)}"
    return Spool(place, what, of, lambda where: on_event(Saved(where=where)))


def _picture_bytes(latents: Any) -> int:
    """The size in bytes of the picture that (1, C, h, w) latents become."""
    return 3 * FACTOR**2 * int(latents.shape[2]) * int(latents.shape[3])


def _digest(begin: Any) -> str:
    """A hash of the bytes of a tensor or an array, without a copy if they are contiguous."""
    if isinstance(begin, InParts):
        found = hashlib.sha256()
        for part in begin.parts():
            found.update(part.numpy().tobytes())
        return found.hexdigest()
    array = begin if hasattr(begin, "tobytes") else begin.contiguous().numpy()
    return hashlib.sha256(memoryview(array if array.flags.c_contiguous else array.copy())).hexdigest()
