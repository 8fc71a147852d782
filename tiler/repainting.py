"""`--repaint MASK`: the steps that only a render of one spot has. The finished picture waits in a scratch file while
the spot is painted, and is put back around it when rows are written."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import numpy as np

from tiler.diffusion.poster import Poster, mask_rows
from tiler.diffusion.spot import Spot, put_back
from tiler.events import Phase
from tiler.output.picture import format_of
from tiler.request import ResolvedRequest
from tiler.request.choices import LOSSY
from tiler.run import Run


def note_on_format(request: ResolvedRequest) -> str | None:
    """A note for the user if the file format will change pixels outside the mask; else None."""
    if request.repaint is None or (format := format_of(request.output, request.format)) not in LOSSY:
        return None
    return f"the whole picture is encoded again as {format}, which changes it a little; write a .png to keep the other pixels"


@contextmanager
def poster_of(run: Run, request: ResolvedRequest) -> Iterator[Poster | None]:
    """The user's picture, readable until the block ends; None if no spot is repainted. Raises UsageError,
    StorageError."""
    if request.repaint is None or request.guide_image is None:
        yield None
        return
    with run.phase(Phase.LOAD_GUIDE, 1):
        poster = Poster(request.guide_image, request.scratch_folder, run.note)
    with poster:
        yield poster


def whole_picture(
    request: ResolvedRequest, rows: Generator[np.ndarray], poster: Poster | None, spot: Spot | None
) -> Generator[np.ndarray]:
    """Return `rows`, which cover a spot's box, with the picture around them: (n, W, 3) uint8. Without a spot, return
    `rows`."""
    if poster is None or spot is None or request.repaint is None:
        return rows
    return put_back(rows, mask_rows(request.repaint, poster.shape[:2]), poster, spot)
