"""Hints on smaller choices that would help a render. Each choice is planned itself, and reported only if it gains
something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from tiler.compute.tuning import INT8_CHANNELS
from tiler.decoding import FACTOR
from tiler.errors import TilerError
from tiler.models.family import Family, Guidance
from tiler.planning.render import RenderPlan
from tiler.planning.tiling import Tiling, plan_tiling
from tiler.request import Precision, ResolvedRequest

_LOWER, _FASTER = 0.98, 0.95  # of the smallest ceiling and the time: a smaller gain is within a plan's error
_TILE = 768  # pixels
_FEW = 4  # steps of a model distilled for few steps
_BITS = 4.5 / 16  # bytes of a pass: blocks of 4-bit weights with a scale, relative to 16-bit weights


class Way(NamedTuple):
    """A smaller choice: its description, the changed request, the share of the denoiser's bytes that it reads, whether
    it needs the same memory as before, and whether it is worth its price only where it lowers the smallest ceiling."""

    words: str
    request: ResolvedRequest
    share: float = 1.0
    same_memory: bool = False
    for_memory: bool = False


class Hint(NamedTuple):
    """The predicted effect of a way."""

    words: str
    smallest_bytes: int
    seconds: float


Judge = Callable[[ResolvedRequest, RenderPlan, Tiling, float], float]
"""(request, the plan with its memory, its tiling, the share of the denoiser's bytes that is read) → seconds."""


def hints(
    request: ResolvedRequest, plan: RenderPlan, replan: Callable[[ResolvedRequest], RenderPlan], judge: Judge
) -> list[Hint]:
    """The hints that lower the smallest ceiling of `plan`, or, if it fits, its time under its own ceiling. `replan`
    plans a request."""
    before, found = judge(request, plan, plan, 1.0), list[Hint]()
    for way in _ways(request, plan):
        try:
            other = plan if way.same_memory else replan(way.request)
            tiling = plan_tiling(way.request, plan.family) if way.same_memory else other
        except TilerError:
            continue  # e.g. a file that it needs does not exist
        hint = Hint(way.words, other.memory.smallest_bytes, judge(way.request, other, tiling, way.share))
        fits = plan.memory.fits and hint.smallest_bytes <= plan.memory.max_bytes
        lower, faster = hint.smallest_bytes < _LOWER * plan.memory.smallest_bytes, hint.seconds < _FASTER * before
        if lower or (faster and fits and not way.for_memory):
            found.append(hint)
    return found


def _ways(request: ResolvedRequest, plan: RenderPlan) -> Iterator[Way]:
    family = plan.family
    pixels = FACTOR * family.native
    if request.tile_size is None and pixels > _TILE and min(request.width, request.height) > _TILE:
        # The model was trained on larger pictures: a little time alone does not make up for that.
        yield Way(f"--tile-size {_TILE}", replace(request, tile_size=_TILE), for_memory=True)
    if plan.precision is not Precision.INT8 and family.traits.width >= INT8_CHANNELS:
        yield Way("--precision int8", replace(request, precision=Precision.INT8))
    if (words := family.traits.few_steps) is not None and request.num_inference_steps > _FEW:
        yield Way(f"{words}, {_FEW} steps", _in_few_steps(request, family), same_memory=True)
    yield Way("4-bit weights (GGUF, tiler quantize)", request, _BITS, same_memory=True)


def _in_few_steps(request: ResolvedRequest, family: Family) -> ResolvedRequest:
    scale = request.guidance_scale if family.traits.guidance is Guidance.EMBEDDED else 1.0
    return replace(request, num_inference_steps=_FEW, guidance_scale=scale, preset=None)
