"""Which worker gets how many tiles: a fleet is simulated, and compared with what no plan could beat."""

from __future__ import annotations

import heapq

import pytest

from tiler.cluster.sharing import Pace, share


def steady(batch: int, fixed: float, each: float) -> Pace:
    pace = Pace(batch=batch, fixed=fixed, each=each)
    for _ in range(3):
        pace.note(batch, pace.seconds(batch))
    return pace


def simulate(fleet: list[Pace], tiles: int) -> float:
    """Seconds until all tiles are done, each worker asking when it is free."""
    busy, left, now = [0.0] * len(fleet), tiles, 0.0
    events = [(0.0, i) for i in range(len(fleet))]
    while left:
        now = heapq.heappop(events)[0] if events else now
        for i in sorted((i for i in range(len(fleet)) if busy[i] <= now), key=lambda i: fleet[i].seconds(1)):
            others = [(pace, max(0.0, busy[k] - now)) for k, pace in enumerate(fleet) if k != i]
            if left and (count := share(left, fleet[i], others)):
                left -= count
                busy[i] = now + fleet[i].seconds(count)
                heapq.heappush(events, (busy[i], i))
    return max(busy)


@pytest.mark.parametrize(
    ("fleet", "tiles", "efficiency"),
    [
        ([(5, 2.3, 6.6)] * 2, 25, 0.9),
        ([(5, 2.3, 6.6)] * 2, 121, 0.96),
        ([(5, 1.0, 4.0), (3, 5.0, 25.0), (3, 5.0, 25.0), (2, 14.0, 60.0)], 121, 0.9),
        ([(1, 0.0, 1.0)] * 100, 529, 0.85),
    ],
)
def test_a_fleet_is_done_nearly_as_soon_as_it_could_be(
    fleet: list[tuple[int, float, float]], tiles: int, efficiency: float
) -> None:
    paces = [steady(*numbers) for numbers in fleet]
    rate = sum(pace.batch / pace.seconds(pace.batch) for pace in paces)
    assert tiles / rate / simulate(paces, tiles) > efficiency


def test_a_slow_worker_gets_nothing_that_the_fast_one_finishes_first() -> None:
    fast, slow = steady(4, 0.1, 1.0), steady(4, 0.1, 100.0)
    assert share(8, slow, [(fast, 2.0)]) == 0
    assert share(8, fast, [(slow, 0.0)]) == 4


def test_an_uncertain_worker_gets_half() -> None:
    assert share(100, Pace.from_probe(1.0, batch=8), []) == 8
    assert share(6, Pace.from_probe(1.0, batch=8), []) == 3
    assert share(6, steady(8, 0.1, 1.0), []) == 6


def test_a_pace_is_learnt_from_passes_of_two_sizes() -> None:
    pace = Pace.from_probe(50.0, batch=8)
    for tiles in (1, 8, 4, 8):
        pace.note(tiles, 2.0 + 3.0 * tiles)
    assert pace.fixed == pytest.approx(2.0) and pace.each == pytest.approx(3.0)


def test_a_pace_follows_passes_of_one_size() -> None:
    pace = Pace.from_probe(1.0, batch=4)
    for _ in range(6):
        pace.note(4, 40.0)
    assert pace.seconds(4) == pytest.approx(40.0)
