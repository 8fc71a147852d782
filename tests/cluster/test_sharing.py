"""How many tiles each worker gets: simulated fleets, compared with a bound that no plan can beat."""

from __future__ import annotations

import pytest

from tiler.cluster.sharing import Busy, Pace, earliest, share
from tiler.cluster.simulation import simulate


def steady(batch: int, fixed: float, each: float) -> Pace:
    pace = Pace(batch=batch, fixed=fixed, each=each)
    for _ in range(3):
        pace.note(batch, pace.seconds(batch))
    return pace


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
    found = simulate(paces, tiles, 3)
    assert sum(found.tiles) == 3 * tiles
    assert 3 * tiles / rate / found.seconds > efficiency
    assert max(found.busy) <= found.seconds + 1e-6


def test_a_second_canvas_fills_the_time_that_workers_wait_at_the_end_of_a_step() -> None:
    fleet = [steady(1, 0.0, 1.0)] * 4
    one, two = simulate(fleet, 5, 10), simulate(fleet, 5, 10, canvases=2)
    assert one.seconds == pytest.approx(20)  # four tiles in the first second, and three wait in the next
    assert two.seconds <= 1.5 * one.seconds
    assert sum(two.tiles) == 100


def test_a_slow_worker_gets_nothing_that_the_fast_one_finishes_first() -> None:
    fast, slow = steady(4, 0.1, 1.0), steady(4, 0.1, 100.0)
    assert share(8, slow, earliest(8, [Busy(slow, 0.0), Busy(fast, 2.0)])) == 0
    assert share(8, fast, earliest(8, [Busy(slow, 0.0), Busy(fast, 0.0)])) == 4
    assert simulate([slow, fast], 8, 2).tiles == (0, 16)


def test_an_uncertain_worker_gets_half() -> None:
    def of(left: int, pace: Pace) -> int:
        return share(left, pace, earliest(left, [Busy(pace, 0.0)]))

    assert of(100, Pace.from_probe(1.0, batch=8)) == 8
    assert of(6, Pace.from_probe(1.0, batch=8)) == 3
    assert of(6, steady(8, 0.1, 1.0)) == 6
    assert of(6, Pace.expected(1.0, batch=8)) == 6


def test_a_pace_that_is_expected_takes_so_long_for_its_batch() -> None:
    pace = Pace.expected(3.0, batch=4)
    assert pace.seconds(4) == pytest.approx(12.0) and pace.fixed == pytest.approx(pace.seconds(1) / 4)


def test_a_pace_is_learnt_from_passes_of_two_sizes() -> None:
    pace = Pace.from_probe(50.0, batch=8)
    for tiles in (1, 8, 4, 8):
        pace.note(tiles, 2.0 + 3.0 * tiles)
    assert pace.fixed == pytest.approx(2.0) and pace.each == pytest.approx(3.0)


def test_very_short_passes_become_longer_ones() -> None:
    """The time between two tasks would count."""
    short, long = Pace.from_probe(0.1, batch=4, most=12), Pace.from_probe(1.0, batch=4, most=12)
    for _ in range(4):
        short.note(short.batch, 0.05 * short.batch)
        long.note(long.batch, 1.0 * long.batch)
    assert (short.batch, long.batch) == (12, 4)
    short.note(3, 0.15)
    assert short.batch == 12 and short.seconds(12) == pytest.approx(0.6)


def test_a_pace_follows_passes_of_one_size() -> None:
    pace = Pace.from_probe(1.0, batch=4)
    for _ in range(6):
        pace.note(4, 40.0)
    assert pace.seconds(4) == pytest.approx(40.0)
