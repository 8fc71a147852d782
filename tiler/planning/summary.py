"""What `tiler plan` says of a render: the work of it and of its presets, memory by phase, expected time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import nn

from tiler.decoding import FACTOR
from tiler.models.built import Models
from tiler.models.family import Role
from tiler.planning import time
from tiler.planning.render import RenderPlan
from tiler.planning.resolve import fill_again
from tiler.planning.tiling import Tiling, plan_tiling
from tiler.request import Precision, Preset, RenderRequest, ResolvedRequest
from tiler.weights.store import match_index

SCHEMA = 2  # of the JSON of plans and reports
# Names of schema 1, which stay for one release.
_OLD_NAMES = {
    name: name.replace("denoiser", "unet")
    for name in ("denoiser_calls", "denoiser_samples", "denoiser_tflop", "denoiser_bytes_read")
}


def summarise(
    said: RenderRequest, request: ResolvedRequest, plan: RenderPlan, models: Models, speed: time.Speed
) -> dict[str, Any]:
    """The facts of `plan`, which carries out `request`, filled from what was `said`; `speed` is this machine's."""
    counter, loras = time.Counter(models), time.LoraCounter(models, plan.precision, plan.batch)

    def work_of(asked: ResolvedRequest, tiling: Tiling) -> dict[str, Any]:
        work = counter.count(tiling, asked.attention_window).plus(loras.count(tiling, asked.attention_window))
        return with_old_names(
            {
                "denoiser_samples": tiling.denoiser_samples,
                "precision": plan.precision.value,
                "denoiser_tflop": round(work.tflop, 3),
                "expected_seconds": round(time.seconds(work, plan.methods.values(), speed, plan.precision)),
            }
        )

    presets = {}
    for preset in Preset:
        asked = fill_again(replace(said, preset=preset), request, plan.family)
        presets[preset.value] = work_of(asked, plan_tiling(asked, plan.family))
    memory, decoder = plan.memory, plan.methods["decode"]
    facts = {
        "schema": SCHEMA,
        "canvas": f"{FACTOR * plan.canvas[1]}×{FACTOR * plan.canvas[0]}",
        "guide": None if plan.guide is None else f"{FACTOR * plan.guide.width}×{FACTOR * plan.guide.height}",
        "tiles": len(plan.regions),
        "samples_per_pass": plan.batch,
        "denoiser_calls": plan.denoiser_calls,
        "read_bytes": read_bytes(models, plan.precision, encoded=plan.encoded),
        **work_of(request, plan),
        "presets": presets,
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


def read_bytes(models: Models, precision: Precision, *, encoded: bool = False) -> dict[str, int]:
    """By part, what encoding the prompts reads unless they are `encoded`, and what a pass over the denoiser does where
    none of it is resident. Tables are left out, of which a few rows are read."""
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
    """`facts`, which schema 1 also knows by other names, under both."""
    return facts | {old: facts[new] for new, old in _OLD_NAMES.items() if new in facts}
