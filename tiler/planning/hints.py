"""Which smaller choices would help a render: each is planned itself, and one that gains nothing is not told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from tiler.decoding import FACTOR
from tiler.errors import TilerError
from tiler.models.family import Family, Guidance
from tiler.planning.render import RenderPlan
from tiler.request import Precision, ResolvedRequest

_LOWER, _FASTER = 0.98, 0.95  # of floor and time: less of a gain is within what a plan can tell
_TILE = 768  # pixels
_FEW = 4  # steps of a model distilled to few
_BITS = 4.5 / 16  # of a pass whose weights are stored in blocks of 4 bits and a scale, not in 16


class Way(NamedTuple):
    """A smaller choice: what to do, what it makes of the request, and which share of the denoiser's bytes is read
    then."""

    words: str
    request: ResolvedRequest
    share: float = 1.0


class Hint(NamedTuple):
    """What a way would come to."""

    words: str
    smallest_bytes: int
    seconds: float


Judge = Callable[[ResolvedRequest, RenderPlan, float], float]
"""(request, its plan, share of the denoiser's bytes that is read) → seconds."""


def hints(
    request: ResolvedRequest, plan: RenderPlan, replan: Callable[[ResolvedRequest], RenderPlan], judge: Judge
) -> list[Hint]:
    """Those that lower the smallest ceiling of `plan` or its time. `replan` plans a request."""
    before, found = judge(request, plan, 1.0), list[Hint]()
    for way in _ways(request, plan):
        try:
            other = plan if way.request is request else replan(way.request)
        except TilerError:
            continue  # what it would need is not there
        hint = Hint(way.words, other.memory.smallest_bytes, judge(way.request, other, way.share))
        if hint.smallest_bytes < _LOWER * plan.memory.smallest_bytes or hint.seconds < _FASTER * before:
            found.append(hint)
    return found


def _ways(request: ResolvedRequest, plan: RenderPlan) -> Iterator[Way]:
    family = plan.family
    pixels = FACTOR * family.native
    if request.tile_size is None and pixels > _TILE and min(request.width, request.height) > _TILE:
        yield Way(f"--tile-size {_TILE}", replace(request, tile_size=_TILE))
    if plan.precision is not Precision.INT8:
        yield Way("--precision int8", replace(request, precision=Precision.INT8))
    elif request.precision is not Precision.INT8:
        yield Way("--precision fp32", replace(request, precision=Precision.FP32))
    if (words := family.traits.few_steps) is not None and request.num_inference_steps > _FEW:
        yield Way(f"{words}, {_FEW} steps", _in_few_steps(request, family))
    yield Way("4-bit weights (GGUF, tiler quantize)", request, _BITS)


def _in_few_steps(request: ResolvedRequest, family: Family) -> ResolvedRequest:
    scale = request.guidance_scale if family.traits.guidance is Guidance.EMBEDDED else 1.0
    return replace(request, num_inference_steps=_FEW, guidance_scale=scale, preset=None)
