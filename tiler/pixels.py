"""Decode latents into the picture's rows: the last phase of a render, and the only one of `tiler decode`."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tiler import interrupts
from tiler.compute.stream import Streamer
from tiler.decoding import FACTOR, method
from tiler.decoding.kept import KeptRows
from tiler.decoding.method import DecodePlan, Others
from tiler.decoding.pictures import to_uint8
from tiler.decoding.rows import Latents
from tiler.decoding.spool import Spool
from tiler.diffusion.stored import StoredArray
from tiler.errors import NumericalError
from tiler.events import Phase, percent
from tiler.memory.policy import at_rows
from tiler.models import family as families
from tiler.models.family import VaeSpec
from tiler.planning.peaks import vae_streaming
from tiler.run import Run


class Decoding(NamedTuple):
    """The settings of a run's last phase. `crop`: pixels to drop at the top and left of the picture."""

    vae: VaeSpec
    plan: DecodePlan
    resident: dict[str, torch.dtype]
    planned_bytes: int
    crop: tuple[int, int]


def decode(
    run: Run, decoding: Decoding, latents: Latents, spool: Spool | None = None, others: Others | None = None
) -> Generator[np.ndarray]:
    """The picture's rows, (n, W, 3) uint8, top first; `latents` (1, C, h, w) are unscaled. There may be `others`
    who decode."""
    spec, plan, resident, planned_bytes, crop = decoding
    vae = run.models.vae(spec)
    options = vae_streaming(spec, vae, plan.precision)._asdict()
    run.note(f"decoder: {plan}")
    with (
        interrupts.deferred(),
        run.phase(Phase.DECODE, 100),
        run.streamed(vae, spec.weights, families.vae_names, resident, **options) as streamer,
    ):
        check = at_rows(run.budget, planned_bytes)
        tell = percent(run.on_event, Phase.DECODE)
        yield from cropped(decode_pixels(plan, vae, streamer, latents, check, tell, spool, others), *crop)


class Unscaled:
    """Scaled latents (1, C, h, w) whose rows are unscaled when they are read; the latents themselves are not
    changed."""

    def __init__(self, latents: Latents, spec: VaeSpec) -> None:
        self._latents, self._spec, self.shape = latents, spec, latents.shape

    def __getitem__(self, rows: tuple[slice, slice, slice]) -> Tensor:
        return self._spec.unscale_(self._latents[rows].clone())


class UnscaledFile(Unscaled):
    """`Unscaled`, for a canvas that is stored in files."""

    def __init__(self, array: StoredArray, spec: VaeSpec) -> None:
        super().__init__(array, spec)
        self._array = array

    def widened(self, rows: int, cols: int) -> Latents:
        """The same latents with `rows` and `cols` more on each side, taken from the opposite side."""
        return Unscaled(self._array.widened(rows, cols), self._spec)


def unscaled(latents: Tensor | StoredArray, spec: VaeSpec) -> Latents:
    """The final latents of a canvas in the form that the decoder reads."""
    return UnscaledFile(latents, spec) if isinstance(latents, StoredArray) else Unscaled(latents, spec)


def decode_pixels(
    plan: DecodePlan, vae: Any, streamer: Streamer, unscaled: Latents, check: Callable[[str], None],
    progress: Callable[[float], None], spool: Spool | None = None, others: Others | None = None,
) -> Generator[np.ndarray]:  # fmt: skip
    """Decode (1, C, h, w) fp32 latents into rows (n, FACTOR·w, 3) uint8. Raises NumericalError rather than return a
    black picture."""
    with ExitStack() as stack:
        kept = None
        if spool is not None and not plan.by_layers:
            kept = stack.enter_context(KeptRows(spool, FACTOR * unscaled.shape[3]))
            yield from kept.strips()
        row = 0 if kept is None else kept.count
        if row and row == FACTOR * unscaled.shape[2]:
            return
        decoded = method.decode(
            plan, vae, streamer, unscaled, check=check, progress=progress, spool=spool, begin=row, others=others
        )  # fmt: skip
        for strip in stack.enter_context(closing(decoded)):
            if not math.isfinite(float(strip.sum())):
                raise NumericalError(
                    f"NaN or Inf in the decoder at row {row}; compare the checksum of the VAE's weights with the original's"
                )
            pixels = to_uint8(strip)
            if kept is not None:
                kept.add(pixels)
            yield pixels
            row += strip.shape[1]


def cropped(rows: Generator[np.ndarray], top: int, left: int) -> Generator[np.ndarray]:
    """`rows` without the first `top` rows and `left` columns."""
    with closing(rows):
        for strip in rows:
            above, top = min(top, len(strip)), max(0, top - len(strip))
            if above < len(strip):
                yield strip[above:, left:]
