"""Which worker gets how many tiles: whoever is free takes as many as it can finish by the time at which all could be
done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_FIXED = 0.25  # of a pass over one tile, as long as nothing else is known: reading the weights (SD 1.5 in int8: 2.3 of 8.9 s)
_REMEMBERED = 6  # passes
_STEADY = 0.1  # how far a worker's last passes may be from what was expected of them


class Pass(NamedTuple):
    """What a worker has done: so many tiles in so many seconds."""

    tiles: int
    seconds: float


@dataclass
class Pace:
    """How fast a worker is: a pass takes `fixed` + n · `each` seconds, n at most `batch`."""

    batch: int
    fixed: float
    each: float
    passes: list[Pass] = field(default_factory=list)

    @classmethod
    def from_probe(cls, seconds: float, batch: int) -> Pace:
        """From a pass over one tile."""
        return cls(batch=batch, fixed=_FIXED * seconds, each=(1 - _FIXED) * seconds)

    def seconds(self, tiles: int) -> float:
        """Expected of one pass."""
        return self.fixed + tiles * self.each

    def note(self, tiles: int, seconds: float) -> None:
        """Learn from a pass: a line through the last ones where they differ in size, else the same proportions at
        another speed."""
        self.passes = [*self.passes[-_REMEMBERED + 1 :], Pass(tiles, seconds)]
        n, mean_n = len(self.passes), sum(p.tiles for p in self.passes) / len(self.passes)
        mean_s = sum(p.seconds for p in self.passes) / n
        spread = sum((p.tiles - mean_n) ** 2 for p in self.passes)
        if spread:
            each = sum((p.tiles - mean_n) * (p.seconds - mean_s) for p in self.passes) / spread
            fixed = mean_s - each * mean_n
            if each > 0 and fixed >= 0:
                self.fixed, self.each = fixed, each
                return
        scale = mean_s / (self.fixed + mean_n * self.each)
        self.fixed, self.each = self.fixed * scale, self.each * scale

    @property
    def is_steady(self) -> bool:
        """Whether its last three passes were what this pace says, within a tenth."""
        last = self.passes[-3:]
        return len(last) == 3 and all(abs(p.seconds / self.seconds(p.tiles) - 1) <= _STEADY for p in last)

    def tiles_in(self, seconds: float) -> int:
        """How many it could finish in so many seconds."""
        if seconds <= 0:
            return 0
        whole = self.seconds(self.batch)
        passes = math.floor(seconds / whole)
        rest = seconds - passes * whole - self.fixed
        return passes * self.batch + max(0, min(self.batch, math.floor(rest / self.each + 1e-9)))


def share(left: int, mine: Pace, others: Sequence[tuple[Pace, float]]) -> int:
    """How many of the `left` tiles a free worker of pace `mine` takes now; each of the others is busy for so many
    seconds more, 0 if it is free. 0 where they will be done sooner without it.

    T* is the earliest time by which all together could finish; a worker takes what it could do until then, half of that
    while its pace is uncertain.
    """
    fleet = [(mine, 0.0), *others]
    low, high = 0.0, mine.seconds(1)
    while sum(pace.tiles_in(high - busy) for pace, busy in fleet) < left:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        if sum(pace.tiles_in(middle - busy) for pace, busy in fleet) < left:
            low = middle
        else:
            high = middle
    could = mine.tiles_in(high)
    if not mine.is_steady:
        could = math.ceil(could / 2)
    return min(left, mine.batch, could)
