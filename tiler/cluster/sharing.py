"""How tiles are divided among workers: a free worker takes as many as it can finish by the time at which all could be
done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

_FIXED = 0.25  # of a pass over one tile, until measured: reading the weights (SD 1.5 in int8: 2.3 of 8.9 s)
_REMEMBERED = 6  # passes
_ROUNDING = 1e-9  # of a tile: the tolerance for rounding errors
_HALVINGS = 24  # of a time interval: down to a ten-millionth
_SHORT = 1.5  # seconds: between two tasks a worker waits for 0.02 to 0.05 s
_STEADY = 0.1  # the relative deviation of the last passes from the expected time


class Pass(NamedTuple):
    """A finished pass of a worker: the number of tiles and the seconds that they took."""

    tiles: int
    seconds: float


@dataclass
class Pace:
    """The speed of a worker: a pass over n tiles takes `fixed` + n · `each` seconds, where n is at most `batch`. While
    its passes are very short, it gets up to `most` tiles at a time, which it takes for one pass."""

    batch: int
    fixed: float
    each: float
    most: int = 0
    passes: list[Pass] = field(default_factory=list)

    @classmethod
    def from_probe(cls, seconds: float, batch: int, most: int = 0) -> Pace:
        """Return the pace that a pass over one tile suggests."""
        return cls(batch=batch, fixed=_FIXED * seconds, each=(1 - _FIXED) * seconds, most=most)

    @classmethod
    def expected(cls, seconds: float, batch: int) -> Pace:
        """Return a pace of `seconds` a tile in passes of `batch`, which counts as steady."""
        each = batch * seconds / (batch + _FIXED / (1 - _FIXED))
        found = cls(batch=batch, fixed=batch * (seconds - each), each=each)
        found.passes = 3 * [Pass(batch, found.seconds(batch))]
        return found

    def seconds(self, tiles: int) -> float:
        """The expected seconds of one pass over `tiles` tiles."""
        return self.fixed + tiles * self.each

    def note(self, tiles: int, seconds: float) -> None:
        """Learn from a pass: fit a line through the last passes if they differ in size, else scale the present pace to
        their speed."""
        self.passes = [*self.passes[-_REMEMBERED + 1 :], Pass(tiles, seconds)]
        if tiles == self.batch and seconds < _SHORT:
            self.batch = max(self.batch, min(2 * self.batch, self.most))
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
        """Whether the last three passes took the time that this pace predicts, within a tenth."""
        last = self.passes[-3:]
        return len(last) == 3 and all(abs(p.seconds / self.seconds(p.tiles) - 1) <= _STEADY for p in last)

    def tiles_in(self, seconds: float) -> int:
        """The number of tiles that the worker can finish in `seconds`."""
        if seconds <= 0:
            return 0
        whole = self.seconds(self.batch)
        passes = math.floor(seconds / whole)
        rest = seconds - passes * whole - self.fixed
        return passes * self.batch + max(0, min(self.batch, math.floor(rest / self.each + _ROUNDING)))


class Busy(NamedTuple):
    """A worker of a fleet: its pace, and the seconds until it is free."""

    pace: Pace
    seconds: float


def earliest(left: int, fleet: Sequence[Busy]) -> float:
    """Return T*, the earliest time in seconds by which the fleet together can finish `left` tiles."""
    batch, fixed, each, busy = np.array(
        [(pace.batch, pace.fixed, pace.each, seconds) for pace, seconds in fleet], dtype=np.float64
    ).T
    whole = fixed + batch * each

    def done_by(time: float) -> float:
        rest = np.maximum(time - busy, 0.0)
        passes = np.floor(rest / whole)
        partial = np.floor((rest - passes * whole - fixed) / each + _ROUNDING)
        return float((passes * batch + np.clip(partial, 0, batch)).sum())

    low, high = 0.0, float((busy + fixed + each).min())
    while done_by(high) < left:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if done_by(middle) < left else (low, middle)
    return high


def share(left: int, pace: Pace, time: float) -> int:
    """The number of the `left` tiles that a free worker takes now: those that it can finish by T*, the `time` that
    `earliest` returns, or half of them while its pace is uncertain. 0 if the others finish sooner without it."""
    could = pace.tiles_in(time)
    if not pace.is_steady:
        could = math.ceil(could / 2)
    return min(left, pace.batch, could)
