"""When freed memory leaves the process: what is done between layers, where a ceiling is near and where it is far."""

from __future__ import annotations

from collections.abc import Callable

from tiler.memory import process
from tiler.memory.budget import Budget
from tiler.memory.tuning import HEAP_KEPT, HEAP_KEPT_TIGHT, HEAP_WORTH_RELEASING, NEAR


def at_layer(budget: Budget, planned_bytes: int) -> Callable[[str], None]:
    """What happens between two layers of the UNet: freed memory leaves the process if it is worth the call (5 ms), or
    if it is more than a roomy ceiling leaves above the plan; then the ceiling is checked."""
    if room := budget.room(planned_bytes):
        process.generous_allocator()

    def check(where: str) -> None:
        if process.free_heap() > (room or HEAP_WORTH_RELEASING):
            process.release_heap()
        budget.check(where)

    return check


def at_rows(budget: Budget, planned_bytes: int) -> Callable[[str], None]:
    """The same for an autoencoder, whose layers run thousands of times: memory leaves when the ceiling is not far, or
    when it is more than was planned. The heap's part is looked at by itself: holes between live blocks are not counted
    by the allocator's own threshold."""
    room = budget.room(planned_bytes)
    # A plan that reaches NEAR has less room for freed memory than it has use for.
    roomy = planned_bytes < int(NEAR * budget.max_bytes)
    kept = max(room, HEAP_KEPT if roomy else HEAP_KEPT_TIGHT)

    def check(where: str) -> None:
        if budget.rss_bytes >= min(NEAR * budget.max_bytes, planned_bytes + room) or process.free_heap() > kept:
            process.release_heap()
        budget.check(where)

    return check
