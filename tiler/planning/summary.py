"""The output of `tiler plan` for a render: the work of the request and of each preset, the memory of each phase, and
the expected time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from tiler.decoding import FACTOR
from tiler.events import Phase
from tiler.models.built import Models
from tiler.models.family import Family, Role
from tiler.planning import time
from tiler.planning.hints import hints
from tiler.planning.render import RenderPlan
from tiler.planning.resolve import fill_again
from tiler.planning.tiling import Tiling, plan_tiling
from tiler.request import Precision, Preset, RenderRequest, ResolvedRequest
from tiler.weights.store import match_index

SCHEMA = 2  # of the JSON in plans and reports
_BOX = "top", "left", "height", "width"  # in pixels of the picture
# The names of schema 1, kept for one release.
_OLD_NAMES = {
    name: name.replace("denoiser", "unet")
    for name in ("denoiser_calls", "denoiser_samples", "denoiser_tflop", "denoiser_bytes_read")
}


def summarise(
    said: RenderRequest,
    request: ResolvedRequest,
    plan: RenderPlan,
    models: Models,
    speed: time.Speed,
    replan: Callable[[ResolvedRequest], RenderPlan],
) -> dict[str, Any]:
    """The facts of `plan`, which is the plan of `request`; `said` is the request before its gaps were filled. `speed`
    is this machine's, and `replan` plans other requests. Work and time are also those of the smaller pictures that are
    rendered first; all else is of this one."""
    counter, loras = time.Counter(models), time.LoraCounter(models, plan.precision, plan.batch)
    own_bytes = pass_bytes(models, plan)

    def count(asked: ResolvedRequest, tiling: Tiling, by: RenderPlan = plan) -> time.Flops:
        work = counter.count(tiling, asked.attention_window, time.Batches(by.guide_batch, by.batch))
        return work.plus(loras.count(tiling, asked.attention_window))

    def seconds(pictures: Sequence[tuple[ResolvedRequest, Tiling]], by: RenderPlan, of_pass: float) -> float:
        """Those of all pictures; the autoencoder's are in proportion to their pixels."""
        coding = time.seconds(time.Flops(0, 0), by.methods.values(), speed, by.precision, 0)
        largest, took = math.prod(pictures[0][1].canvas), 0.0
        for asked, cut in pictures:
            nbytes = math.ceil(cut.denoiser_samples / by.batch) * of_pass
            took += time.seconds(count(asked, cut, by), (), speed, by.precision, nbytes)
            took += coding * math.prod(cut.canvas) / largest
        return took

    def work_of(asked: ResolvedRequest, tiling: Tiling) -> dict[str, Any]:
        pictures = _chain(asked, tiling, plan.family)
        return with_old_names(
            {
                "denoiser_samples": sum(cut.denoiser_samples for _, cut in pictures),
                "precision": plan.precision.value,
                "denoiser_tflop": round(sum(count(own, cut).tflop for own, cut in pictures), 3),
                "expected_seconds": round(seconds(pictures, plan, own_bytes)),
            }
        )

    def judge(asked: ResolvedRequest, other: RenderPlan, tiling: Tiling, share: float) -> float:
        of_pass = own_bytes if other is plan else pass_bytes(models, other)
        return seconds(_chain(asked, tiling, other.family), other, share * of_pass)

    presets = {}
    for preset in Preset:
        asked = fill_again(replace(said, preset=preset), request, plan.family, models.loras.found)
        presets[preset.value] = work_of(asked, plan_tiling(asked, plan.family))
    memory, decoder = plan.memory, plan.methods[Phase.DECODE]
    facts = {
        "schema": SCHEMA,
        "canvas": f"{FACTOR * plan.canvas[1]}×{FACTOR * plan.canvas[0]}",
        "guide": guide_of(plan),
        "repaint": None if plan.spot is None else dict(zip(_BOX, plan.spot.box, strict=True)),
        "tiles": len(plan.regions),
        "samples_per_pass": plan.batch,
        "denoiser_calls": plan.denoiser_calls,
        "read_bytes": read_bytes(models, plan.precision, encoded=plan.encoded),
        **work_of(request, plan),
        "pass": _pass(count(request, plan), plan, own_bytes, speed),
        "presets": presets,
        "hints": [
            {
                "choice": hint.words,
                "smallest_max_ram_bytes": hint.smallest_bytes,
                "expected_seconds": round(hint.seconds),
            }
            for hint in hints(request, plan, replan, judge)
        ],
        "decode": decoder.name,
        "decode_precision": decoder.precision.value,
        "decode_why": decoder.why,
        "guide_upscale_flops": plan.upscale_flops,
        "scratch_bytes": max(m.scratch_bytes for m in plan.methods.values()),
        "predicted_peak_bytes": memory.peak_bytes,
        "max_ram_bytes": memory.max_bytes,
        "smallest_max_ram_bytes": memory.smallest_bytes,
        "phases": [
            {"name": p.name, "peak_bytes": p.peak_bytes, "terms": {t.name: t.nbytes for t in p.terms}}
            for p in memory.phases
        ],
    }
    return with_old_names(facts)


def _chain(asked: ResolvedRequest, tiling: Tiling, family: Family) -> list[tuple[ResolvedRequest, Tiling]]:
    """A picture and those that are rendered first, with their tilings."""
    found = [(asked, tiling)]
    while (smaller := found[-1][1].smaller) is not None:
        height, width = smaller
        first = replace(asked, height=height, width=width, regions=())
        found.append((first, plan_tiling(first, family)))
    return found


def guide_of(plan: RenderPlan) -> str | None:
    """The guide's size in pixels; None without one."""
    return None if plan.guide is None else f"{FACTOR * plan.guide.width}×{FACTOR * plan.guide.height}"


def _pass(work: time.Flops, plan: RenderPlan, nbytes: int, speed: time.Speed) -> dict[str, Any]:
    """The time that one read of the denoiser's weights takes, and the time of the arithmetic that accompanies it."""
    arithmetic = time.arithmetic_seconds(work, speed, plan.precision) / max(1, plan.denoiser_calls)
    reading = nbytes / speed.disk
    return {
        "arithmetic_seconds": round(arithmetic, 2),
        "read_bytes": nbytes,
        "read_seconds": round(reading, 2),
        "bound": "disk" if reading > arithmetic else "arithmetic",
    }


def pass_bytes(models: Models, plan: RenderPlan) -> int:
    """The bytes that a pass over the denoiser reads, without the weights that stay in memory while the canvas is
    denoised."""
    part = plan.family.part(Role.DENOISER)
    index = match_index(models.module(part), models.family.checkpoint.weights(part.name), part.aliases)
    int8 = part.int8_weights(models.module(part)) if plan.precision is Precision.INT8 else frozenset[str]()
    stays = plan.resident.get(Phase.CANVAS, {}).keys() & index.keys()
    kept = sum(math.prod(index[name].shape) if name in int8 else index[name].nbytes for name in stays)
    return max(0, read_bytes(models, plan.precision, encoded=True)[part.name] - kept)


def seconds_per_tile(request: ResolvedRequest, plan: RenderPlan, models: Models, speed: time.Speed) -> float:
    """The time for each tile of the canvas, over all of its steps."""
    canvas, window = replace(plan, guide_steps=plan.guide_steps[:0]), request.attention_window
    work = time.Counter(models).count(canvas, window, time.Batches(plan.guide_batch, plan.batch))
    more = time.LoraCounter(models, plan.precision, plan.batch).count(canvas, window)
    nbytes = math.ceil(plan.canvas_samples / plan.batch) * pass_bytes(models, plan)
    took = time.seconds(work.plus(more), (), speed, plan.precision, nbytes)
    return took / max(1, sum(map(len, plan.canvas_steps)))


def read_bytes(models: Models, precision: Precision, *, encoded: bool = False) -> dict[str, int]:
    """The bytes read for each part: by encoding the prompts (unless `encoded`), and by a pass over the denoiser without
    resident weights. Embedding tables are left out, since only a few of their rows are read."""
    found = {}
    for part in (*(() if encoded else models.family.encoders), models.family.part(Role.DENOISER)):
        module = models.module(part)
        tables = {f"{name}.weight" for name, layer in module.named_modules() if isinstance(layer, nn.Embedding)}
        index = match_index(module, models.family.checkpoint.weights(part.name), part.aliases)
        int8 = frozenset[str]()
        if precision is Precision.INT8 and part.role is Role.DENOISER:
            int8 = part.int8_weights(module)
        found[part.name] = sum(
            math.prod(info.shape) if name in int8 else info.nbytes
            for name, info in index.items()
            if name not in tables and not part.once(name)
        )
    return found


def with_old_names(facts: dict[str, Any]) -> dict[str, Any]:
    """`facts`, with the entries that had other names in schema 1 under both names."""
    return facts | {old: facts[new] for new, old in _OLD_NAMES.items() if new in facts}
