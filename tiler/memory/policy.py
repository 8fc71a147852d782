"""Decide between layers whether freed memory leaves the process, depending on how near the ceiling is."""

from __future__ import annotations

from collections.abc import Callable

from tiler.memory import process
from tiler.memory.budget import Budget
from tiler.memory.tuning import (
    HEAP_KEPT,
    HEAP_KEPT_TIGHT,
    HEAP_WORTH_RELEASING,
    HEAP_WORTH_RELEASING_ROOMY,
    HUGE_PAGES_FROM,
    NEAR,
    ROOMY,
)


def at_layer(budget: Budget, planned_bytes: int, heap_bytes: int = 0) -> Callable[[str], None]:
    """Return the check that runs between two layers of a denoiser. It releases freed memory if there is enough of it to
    be worth the call (5 ms) and the page faults afterwards, or more than a roomy ceiling leaves above the plan, or than
    the `heap_bytes` that the plan has for it, and then checks the ceiling."""
    process.use_huge_pages(False)
    if kept := budget.room(planned_bytes, ROOMY):
        process.generous_allocator()
    kept = kept or max(budget.room(planned_bytes, HEAP_WORTH_RELEASING_ROOMY), HEAP_WORTH_RELEASING, heap_bytes)

    def check(where: str) -> None:
        if process.free_heap() > kept:
            process.release_heap()
        budget.check(where)

    return check


def at_rows(budget: Budget, planned_bytes: int) -> Callable[[str], None]:
    """Return the same check for an autoencoder, whose layers run thousands of times. It releases freed memory when the
    ceiling is near or when more than planned is in use. Freed heap memory is checked separately, because the
    allocator's own threshold ignores holes between live blocks."""
    process.use_huge_pages(budget.max_bytes >= HUGE_PAGES_FROM)
    room = budget.room(planned_bytes, ROOMY)
    # A plan that reaches NEAR has too little room for the freed memory that it could reuse.
    roomy = planned_bytes < int(NEAR * budget.max_bytes)
    kept = max(room, HEAP_KEPT if roomy else HEAP_KEPT_TIGHT)

    def check(where: str) -> None:
        if budget.rss_bytes >= min(NEAR * budget.max_bytes, planned_bytes + room) or process.free_heap() > kept:
            process.release_heap()
        budget.check(where)

    return check
