"""Facts about the process and the machine, measured once before planning, which itself asks neither."""

from __future__ import annotations

from dataclasses import dataclass

from tiler.compute.precisions import Arithmetic
from tiler.compute.tuning import LIBRARIES_BYTES, TEXT_LIBRARIES_BYTES
from tiler.planning.table import Term


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts measured after the models are built, when nearly all code that a run needs is imported. Sizes in bytes."""

    rss_bytes: int
    scratch_free_bytes: int  # on the file system of the scratch files
    arithmetic: Arithmetic
    guide_pixels: int = 0  # of the user's picture as kept in memory
    guide_load_bytes: int = 0  # memory for loading it

    @property
    def libraries(self) -> Term:
        """The memory of the process without data, including code that has not run yet."""
        return Term(name="python + libraries", nbytes=self.rss_bytes + LIBRARIES_BYTES)

    @property
    def text_libraries(self) -> Term:
        """Like `libraries`, but during prompt encoding, which comes first."""
        return Term(name="python + libraries", nbytes=self.rss_bytes + TEXT_LIBRARIES_BYTES)
