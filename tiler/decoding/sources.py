"""The sources of a pass's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from tiler.decoding.rows import Stage, flow
from tiler.decoding.scratch import STRIP_BYTES, Rows

if TYPE_CHECKING:
    from tiler.decoding.rows import Check


class Source:
    """Strips from any row on, and the stored pictures that are not needed after the pass."""

    def __init__(self, strips: Callable[[int], Iterable[Tensor]], height: int, *stored: Rows) -> None:
        self.strips, self.height, self.stored = strips, height, stored

    @classmethod
    def of(cls, first: Rows, *more: Rows, strip_bytes: int = STRIP_BYTES) -> Source:
        return cls(lambda begin: first.strips(strip_bytes, begin), first.count, first, *more)

    def through(
        self, chain: list[Stage], check: Check, begin: int = 0, part: Callable[[], None] = lambda: None
    ) -> Iterator[Tensor]:
        """Push the strips through a chain of stages. `part` is called after everything that follows from a strip was
        yielded."""
        row = begin
        for strip in self.strips(begin):
            row += strip.shape[2]
            box = [strip]
            del strip
            yield from flow(chain, box, row >= self.height, check=check)
            part()

    def numbers(self, keep: Rows | None) -> tuple[int, ...]:
        """The passes whose rows `close` removes."""
        return tuple(rows.number for rows in self.stored if rows is not keep)

    def close(self, keep: Rows | None = None) -> None:
        for rows in self.stored:
            if rows is not keep:
                rows.close()
