"""The batch that a ceiling leaves room for, and the freed memory beside it."""

from __future__ import annotations

import math

import pytest

from tiler.memory.tuning import HEAP_SAMPLES
from tiler.planning.fit import batch_and_heap, largest_batch

FIXED, SAMPLE = 300_000_000, 30_000_000  # bytes of a phase without samples, and of each
HEAP = 3 * SAMPLE


def peak(batch: int) -> int:
    return FIXED + SAMPLE * batch


def room_for(batch: int) -> int:
    return peak(batch) + SAMPLE // 2


@pytest.mark.parametrize("most", [1, 2, 16])
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 13, 16, 40])
def test_a_batch_is_the_largest_that_fits(batch: int, most: int) -> None:
    assert largest_batch(peak, room_for(batch), most) == min(batch, most)


@pytest.mark.parametrize(
    ("samples", "fits", "batch", "has_heap"),
    [
        (50, 13, 10, True),  # five passes instead of four
        (50, 11, 8, True),  # seven instead of five
        (50, 10, 10, False),  # seven samples a read would be too few
        (9, 11, 9, False),  # two passes of five instead of one
        (9, 12, 9, True),
        (12, 13, 12, False),  # two of six
        (16, 17, 8, True),
        (20, 11, 10, False),  # three of seven
        (2, 40, 2, False),  # room is better spent on weights that stay
        (500, 40, 16, True),  # of 16 at most
    ],
)
def test_samples_leave_room_for_freed_memory_if_eight_still_share_a_read(
    samples: int, fits: int, batch: int, has_heap: bool
) -> None:
    assert batch_and_heap(peak, room_for(fits), 16, samples, HEAP) == (batch, HEAP if has_heap else 0)


@pytest.mark.parametrize("samples", [1, 2, 7, 8, 9, 20, 50, 98])
@pytest.mark.parametrize("fits", range(1, 30))
def test_a_plan_with_freed_memory_fits_too(samples: int, fits: int) -> None:
    batch, heap = batch_and_heap(peak, room_for(fits), 16, samples, HEAP)
    assert peak(batch) + heap <= room_for(fits)
    assert heap == 0 or batch >= HEAP_SAMPLES
    assert batch == math.ceil(samples / math.ceil(samples / batch)), "passes of equal size"
