"""The memory for formats that are encoded from the complete picture: the picture while it is decoded, and then the
encoder."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tiler.events import Phase
from tiler.memory.tuning import MARGIN
from tiler.output.picture import format_of
from tiler.output.whole import ENCODERS, PICTURE_BYTES
from tiler.planning.table import PhasePlan, Term
from tiler.request.choices import Format


class WholePicture(NamedTuple):
    """A picture, of a given number of pixels, that is saved as WebP or AVIF."""

    format: Format
    pixels: int

    def while_decoding(self, phase: PhasePlan) -> PhasePlan:
        return replace(phase, terms=(*phase.terms, Term(name="picture", nbytes=PICTURE_BYTES * self.pixels)))

    def writing(self, libraries: Term, max_bytes: int) -> PhasePlan:
        """The phase `write`, with advice for the case that it does not fit under the ceiling."""
        encoder = ENCODERS[self.format]
        most = (max_bytes * MARGIN - libraries.nbytes - encoder.other_bytes) / (encoder.pixel_bytes + PICTURE_BYTES)
        side = math.isqrt(max(0, int(most))) // 8 * 8
        fits = f"this ceiling is enough for {side}×{side} pixels" if side else "even a small one is too much"
        return PhasePlan(
            name=Phase.WRITE,
            terms=(
                libraries,
                Term(name="picture", nbytes=PICTURE_BYTES * self.pixels),
                Term(name=f"{encoder.title} encoder", nbytes=encoder.pixel_bytes * self.pixels + encoder.other_bytes),
            ),
            advice=f"{encoder.title} is encoded as a whole, and {fits}: write a .png, .jpg or .tif",
        )


def whole_picture(path: Path, asked: Format | None, width: int, height: int) -> WholePicture | None:
    """The WholePicture for a format that needs one; None for a format that is written row by row. Raises UsageError for
    a file name without a known ending."""
    format = format_of(path, asked)
    return WholePicture(format, width * height) if format in ENCODERS else None
