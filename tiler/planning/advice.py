"""Advice on options that need less memory, for a plan that does not fit. Each option is planned itself, and reported
only if it gains something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tiler.errors import TilerError
from tiler.planning.render import RenderPlan
from tiler.planning.table import MemoryPlan
from tiler.request import PIXEL_STEP, Decode, Precision, ResolvedRequest

_WORTH = 0.98  # of the smallest ceiling: a smaller gain is within a plan's error


def advise(request: ResolvedRequest, plan: RenderPlan, replan: Callable[[ResolvedRequest], MemoryPlan]) -> str:
    """The options that make the plan fit, or else the one that comes nearest to it, as text for the user; "" if none
    gains anything. `replan` plans a request."""
    found: list[tuple[str, MemoryPlan]] = []
    for option, changed in _lighter(request, plan.precision):
        try:
            memory = replan(changed)
        except TilerError:
            continue  # e.g. a file that it needs does not exist
        if memory.smallest_bytes < _WORTH * plan.memory.smallest_bytes:
            found.append((option, memory))
    if fitting := [option for option, memory in found if memory.fits]:
        return f"; it would fit with {' or with '.join(fitting)}"
    nearest = sorted(found, key=lambda each: each[1].smallest_bytes)[:1]
    return "".join(f"; with {option} {memory.smallest_text} is enough" for option, memory in nearest)


def _lighter(request: ResolvedRequest, precision: Precision) -> Iterator[tuple[str, ResolvedRequest]]:
    """Requests for the same picture made in another way, then for a smaller picture, each with the option to give for
    it."""
    other = Precision.FP32 if precision is Precision.INT8 else Precision.INT8
    yield f"--precision {other}", replace(request, precision=other)
    if request.decode not in (Decode.FROZEN, Decode.TINY):
        yield "--decode frozen", replace(request, decode=Decode.FROZEN)
    width, height = (side // 2 // PIXEL_STEP * PIXEL_STEP for side in (request.width, request.height))
    if request.paper is None and not request.regions and min(width, height) > 0:
        yield f"-W {width} -H {height}", replace(request, width=width, height=height)
