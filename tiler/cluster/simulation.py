"""How long a fleet takes for canvases, and who of it waits: tiles are shared as they are, on a clock of its own."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tiler.cluster.sharing import Busy, Pace, earliest, share


class Forecast(NamedTuple):
    """`seconds` until all is done; by worker, the `tiles` it had and the seconds it was `busy`."""

    seconds: float
    tiles: tuple[int, ...]
    busy: tuple[float, ...]


@dataclass
class _Canvas:
    """One under way: its steps to come, and of the one it is at the tiles that wait, and those that workers have."""

    steps: int
    waiting: int
    out: int = 0


def simulate(fleet: Sequence[Pace], tiles: int, steps: int, canvases: int = 1) -> Forecast:
    """`canvases` at once, each of so many `steps`, which begin when the one before has all its `tiles`; every tile may
    go to every worker of `fleet`, whose paces are known."""
    if not fleet:
        raise ValueError("a fleet of nobody is never done")
    under_way = [_Canvas(steps, tiles) for _ in range(canvases)]
    until, done, busy = [0.0] * len(fleet), [0] * len(fleet), [0.0] * len(fleet)
    fastest_first = sorted(range(len(fleet)), key=lambda i: fleet[i].seconds(1))
    answers: list[tuple[float, int, int, int]] = []  # when, of which worker, for which canvas, so many tiles
    free, now = set(fastest_first), 0.0
    while True:
        waiting = sum(canvas.waiting for canvas in under_way)
        for i in (i for i in fastest_first if i in free):
            if not waiting:
                break
            time = earliest(waiting, [Busy(pace, max(0.0, until[k] - now)) for k, pace in enumerate(fleet)])
            count = share(waiting, fleet[i], time)
            if not count:
                break  # nor has a slower one anything to do
            which = next(n for n, canvas in enumerate(under_way) if canvas.waiting)
            count = min(count, under_way[which].waiting)
            under_way[which].waiting -= count
            under_way[which].out += count
            waiting -= count
            took = fleet[i].seconds(count)
            until[i], done[i], busy[i] = now + took, done[i] + count, busy[i] + took
            free.discard(i)
            heapq.heappush(answers, (until[i], i, which, count))
        if not answers:
            return Forecast(now, tuple(done), tuple(busy))
        now, i, which, count = heapq.heappop(answers)
        free.add(i)
        canvas = under_way[which]
        canvas.out -= count
        if not canvas.waiting and not canvas.out and canvas.steps > 1:
            canvas.steps, canvas.waiting = canvas.steps - 1, tiles
