"""`--repaint MASK`: what a render of a spot has beside any other's. The finished picture lies in a scratch file while
the spot is painted, and comes back around it when rows are written."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import numpy as np

from tiler.diffusion.poster import Poster, mask_rows
from tiler.diffusion.spot import Spot, put_back
from tiler.output.picture import format_of
from tiler.request import ResolvedRequest
from tiler.request.choices import LOSSY
from tiler.run import Run


def note_on_format(request: ResolvedRequest) -> str | None:
    """What a user should know where pixels outside the mask cannot stay as they are."""
    if request.repaint is None or (format := format_of(request.output, request.format)) not in LOSSY:
        return None
    return f"all of the picture is encoded anew as {format}, and changes a little; write a .png to keep what is not painted"


@contextmanager
def poster_of(run: Run, request: ResolvedRequest) -> Iterator[Poster | None]:
    """The user's picture, readable while the block lasts; None where no spot of one is to be painted. Raises
    UsageError, StorageError."""
    if request.repaint is None or request.guide_image is None:
        yield None
        return
    with run.phase("load guide", 1):
        poster = Poster(request.guide_image, request.scratch_folder, run.note)
    with poster:
        yield poster


def whole_picture(
    request: ResolvedRequest, rows: Generator[np.ndarray], poster: Poster | None, spot: Spot | None
) -> Generator[np.ndarray]:
    """`rows` of a spot's box with the picture around it, (n, W, 3) uint8; `rows` themselves without a spot."""
    if poster is None or spot is None or request.repaint is None:
        return rows
    return put_back(rows, mask_rows(request.repaint, poster.shape[:2]), poster, spot)
