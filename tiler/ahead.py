"""Encode the prompts of several renders of a queue at once, into the cache in which the renders will look for them: a
large encoder is then opened and read once instead of once per picture."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields

import torch

from tiler import encoding, phases
from tiler.errors import TilerError
from tiler.events import Event, Note, OnEvent, Phase
from tiler.jobs.coding import encode
from tiler.memory import lean_imports
from tiler.memory.budget import Budget
from tiler.memory.tuning import MARGIN
from tiler.models import family as families
from tiler.models.embeds import Text
from tiler.models.loras import find_loras
from tiler.planning.resolve import resolve
from tiler.planning.tiling import plan_tiling
from tiler.render_run import RenderRun
from tiler.request import ModelOptions, RenderRequest
from tiler.request.wording import tags_of
from tiler.weights.encoders import LARGE

_READ_ALIKE = (
    *(f.name for f in fields(ModelOptions)),
    "loras", "lora_dir", "embd_dir", "emphasis", "clip_skip", "cache_dir", "precision",
)  # fmt: skip


@torch.no_grad()
def encode_ahead(requests: Sequence[RenderRequest], budget: Budget, on_event: OnEvent = lambda event: None) -> int:
    """Encode under `budget` the prompts that the cache lacks, of requests that share a large encoder and read prompts
    the same way. Requests whose tags or LoRAs are wrong are left out, because their renders report it. Return the
    number of texts encoded. Raises TilerError."""
    alike = defaultdict[str, list[RenderRequest]](list)
    for request in requests:
        with suppress(TilerError):
            tags = map(str, tags_of(request))
            read_as = [encode(getattr(request, name)) for name in _READ_ALIKE]
            alike[json.dumps([*read_as, *tags])].append(request)
    with budget:
        lean_imports.freeze_imports()
        return sum(_encode(group, budget, on_event) for group in alike.values() if len(group) > 1)


def _encode(requests: list[RenderRequest], budget: Budget, on_event: OnEvent) -> int:
    family = families.open_family(requests[0])
    sizes = (info.nbytes for part in family.encoders for info in family.checkpoint.weights(part.name).values())
    if sum(sizes) <= LARGE:
        return 0

    def without_notes(event: Event) -> None:  # each render reports its own
        if not isinstance(event, Note):
            on_event(event)

    try:
        loras = find_loras(requests[0])
    except TilerError:
        return 0
    settings = [resolve(request, family, loras) for request in requests]
    texts: list[Text] = list(dict.fromkeys(text for each in settings for text in plan_tiling(each, family).texts))
    run = phases.start(requests[0], budget, without_notes, planning=True)
    missing = [
        text for text in texts if text not in encoding.find_prompts(run.request, run.models, [text], None).encoded
    ]
    if not missing:
        return 0
    if not run.plan.memory.fits:
        return 0  # each picture is refused in its turn
    phases.prepare_weights(run)
    with run.phase(f"prompts of {len(requests)} pictures", 1):
        for some in _shares(run, missing):
            spoken = encoding.find_prompts(run.request, run.models, some, None)
            encoding.encode_prompts(run, run.weights, spoken)
    return len(missing)


def _shares(run: RenderRun, texts: list[Text]) -> Iterator[list[Text]]:
    """Cut the texts into groups whose embeddings fit under the ceiling together."""
    family = run.models.family
    (sample,) = family.example([0], (family.granularity, family.granularity))
    free = int(MARGIN * run.budget.max_bytes) - run.plan.memory.peak_of(Phase.ENCODE_PROMPTS)
    most = max(1, free // (4 * sample.prompt.tokens.numel()))
    for first in range(0, len(texts), most):
        yield texts[first : first + most]
