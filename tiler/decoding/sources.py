"""The sources of a pass's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from tiler.decoding.rows import Stage, flow
from tiler.decoding.scratch import STRIP_BYTES, Rows

if TYPE_CHECKING:
    from tiler.decoding.rows import Check


class Source:
    """A picture of `height` rows, cut into strips of `step` rows, and the stored pictures that are not needed after the
    pass. `read(first, last)` returns rows as (1, C, n, W) fp32."""

    def __init__(self, read: Callable[[int, int], Tensor], height: int, step: int, *stored: Rows) -> None:
        self.read, self.height, self.step, self.stored = read, height, step, stored

    @classmethod
    def of(cls, first: Rows, *more: Rows, strip_bytes: int = STRIP_BYTES) -> Source:
        return cls(first.read, first.count, first.rows_in(strip_bytes), first, *more)

    def cuts(self, begin: int = 0) -> Sequence[int]:
        """The first row of each strip from the row `begin` on, and the row after the last one."""
        return [*range(begin, self.height, self.step), self.height]

    def through(
        self, chain: list[Stage], check: Check, cuts: Sequence[int], part: Callable[[], None] = lambda: None
    ) -> Iterator[Tensor]:
        """Push the strips between `cuts` through a chain of stages. `part` is called after everything that follows from
        a strip was yielded."""
        for first, last in pairwise(cuts):
            box = [self.read(first, last)]
            yield from flow(chain, box, last >= self.height, check=check)
            del box  # without stages the strip is still in it
            part()

    def numbers(self, keep: Rows | None) -> tuple[int, ...]:
        """The passes whose rows `close` removes."""
        return tuple(rows.number for rows in self.stored if rows is not keep)

    def close(self, keep: Rows | None = None) -> None:
        for rows in self.stored:
            if rows is not keep:
                rows.close()
