"""Simulate how long a fleet takes for canvases and which workers wait: the tiles are shared as in a render, on a
simulated clock."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tiler.cluster.sharing import Busy, Pace, earliest, share


class Forecast(NamedTuple):
    """`seconds` until everything is done; for each worker, the `tiles` that it predicted and the seconds that it was
    `busy`."""

    seconds: float
    tiles: tuple[int, ...]
    busy: tuple[float, ...]


@dataclass
class _Canvas:
    """A canvas in progress: the number of steps left, including the present one, and that step's tiles that wait and
    that are out at workers."""

    steps: int
    waiting: int
    out: int = 0


def simulate(fleet: Sequence[Pace], tiles: int, steps: int, canvases: int = 1) -> Forecast:
    """Simulate `canvases` canvases at once, each of `steps` steps. A step starts when all `tiles` of the previous step
    are done; every tile may go to every worker of `fleet`, whose paces are known."""
    if not fleet:
        raise ValueError("a fleet of nobody is never done")
    under_way = [_Canvas(steps, tiles) for _ in range(canvases)]
    until, done, busy = [0.0] * len(fleet), [0] * len(fleet), [0.0] * len(fleet)
    fastest_first = sorted(range(len(fleet)), key=lambda i: fleet[i].seconds(1))
    answers: list[tuple[float, int, int, int]] = []  # (time, worker, canvas, tiles)
    free, now = set(fastest_first), 0.0
    while True:
        waiting = sum(canvas.waiting for canvas in under_way)
        for i in (i for i in fastest_first if i in free):
            if not waiting:
                break
            time = earliest(waiting, [Busy(pace, max(0.0, until[k] - now)) for k, pace in enumerate(fleet)])
            count = share(waiting, fleet[i], time)
            if not count:
                break  # slower workers have nothing to do either
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
