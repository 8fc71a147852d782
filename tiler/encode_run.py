"""What `tiler encode` does: prompts through a checkpoint's text encoders into a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tiler import encoding
from tiler.events import OnEvent
from tiler.files import check_writable
from tiler.memory.budget import Budget
from tiler.memory.limits import memory_warning
from tiler.memory.tuning import MARGIN
from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.embeds import Encoded, PromptCache, Text, Words, kind_of, prompts_folder, write_words
from tiler.planning.peaks import text_phase
from tiler.planning.resolve import read_defaults
from tiler.planning.table import MemoryPlan, PhasePlan
from tiler.request import EncodeRequest
from tiler.run import Run, measure
from tiler.weights import checkpoint


@dataclass(kw_only=True)
class EncodeRun(Run):
    """One encoding under way. `texts` are the prompts, the negative ones, and the one that was not given."""

    request: EncodeRequest
    output: Path
    texts: list[Text]
    encoded: dict[Text, Encoded]  # those that were kept from an earlier run
    cache: PromptCache
    plan: MemoryPlan


def start(request: EncodeRequest, budget: Budget, on_event: OnEvent) -> EncodeRun:
    """Check that the file can be written, look for prompts that are encoded already, and plan. Raises TilerError."""
    output = request.output or Path("words.safetensors")
    check_writable(output, force=request.force)
    found = checkpoint.resolve(request.model, variant=request.variant, revision=request.revision)
    family = families.read_family(found)
    models, found = Models(family), family.checkpoint
    said = {} if found.file is not None else read_defaults(found.folder)
    usual = (said[name] for name in ("prompt", "negative_prompt") if name in said)
    texts: list[Text] = list(dict.fromkeys((*request.prompts, *request.negative_prompts, *usual, None)))
    cache = PromptCache(prompts_folder(request.cache_dir), family, {}, int8=False)
    encoded = cache.load(texts)
    for part in family.encoders:
        models.module(part)
    facts = measure(output.parent)
    phase = text_phase(models, [facts.text_libraries])
    if len(encoded) == len(texts):
        phase = PhasePlan(name=phase.name, terms=(facts.text_libraries,))
    run = EncodeRun(
        models=models, budget=budget, on_event=on_event, request=request, output=output, texts=texts, encoded=encoded,
        cache=cache,
        plan=MemoryPlan(
            max_bytes=budget.max_bytes, phases=(phase,), smallest_bytes=int(phase.peak_bytes / MARGIN) + 1
        ),
    )  # fmt: skip
    for note in (*found.notes, *family.notes, memory_warning(budget.max_bytes)):
        if note is not None:
            run.note(note)
    return run


def encode(run: EncodeRun) -> None:
    """Encode the prompts and write them. Raises TilerError."""
    request, family = run.request, run.models.family
    weights = {part.name: (family.checkpoint.weights(part.name), part.aliases) for part in family.encoders}
    with run.phase("encode prompts", 1):
        missing = [text for text in run.texts if text not in run.encoded]
        found = run.encoded | encoding.encode_texts(run, weights, missing, run.cache)
        for note in dict.fromkeys(note for text in run.texts for note in found[text].notes):
            run.note(note)
        texts = {text: found[text] for text in run.texts}
        words = Words(run.output, texts, kind_of(family), request.prompts, request.negative_prompts)
        write_words(run.output, words, replace=request.force)
