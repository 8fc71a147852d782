"""How a request's prompts are parsed for a checkpoint, and notes for the user before any work starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tiler.models.built import Models
from tiler.models.clip import load_tokenizer, read_chunks
from tiler.models.embeddings import Embeddings
from tiler.models.family import Family, Guidance
from tiler.models.reading import Reading
from tiler.request import Emphasis, ResolvedRequest, TileConditioning, settings
from tiler.request.prompt import unclosed
from tiler.request.wording import places_of


def read_options(request: ResolvedRequest, models: Models, texts: Sequence[str | None]) -> Reading:
    """The parsing options of the prompts. Finds and reads every embedding that `texts` name. Raises TilerError."""
    family = models.family
    loras = tuple(models.loras.marks(map(models.changes, family.encoders)))
    reading = Reading(emphasis=request.emphasis, clip_skip=request.clip_skip or 1, loras=loras)
    folders = _folders(request)
    if not folders or not family.traits.embeddings:
        return reading
    widths = [int(part.config["hidden_size"]) for part in family.encoders]
    reading = reading._replace(embeddings=Embeddings(folders, widths))
    tokenizer, config = load_tokenizer(family), models.module(family.encoders[0]).config
    for text in filter(None, texts):
        read_chunks(tokenizer, config, text, lambda note: None, reading)
    return reading


def _folders(request: ResolvedRequest) -> tuple[Path, ...]:
    """The folders of embeddings: the requested one, else those of the configuration."""
    return settings.folders(settings.Kind.EMBEDDING) if request.embd_dir is None else (request.embd_dir.expanduser(),)


def notes_on_prompts(request: ResolvedRequest, family: Family, *, has_guide: bool) -> Iterator[str]:
    """Notes on what prompts leave open, and on options that have no effect with this family."""
    weighed = request.emphasis in (Emphasis.ORIGINAL, Emphasis.NO_NORM)
    for place, text, splits in places_of(request):
        yield from (f"{place}: {what}" for what in unclosed(text, splits=splits, brackets=weighed))
    texts = request.prompt, request.canvas_prompt, request.negative_prompt, *(r.prompt for r in request.regions)
    readable = bool(_folders(request)) or request.prompt_embeds is not None
    if not readable and any("embedding:" in text for text in texts if text):
        yield "embedding:NAME is read as text: give the folder of the embeddings with --embd-dir"
    if request.embd_dir is not None and not family.traits.embeddings:
        yield f"--embd-dir has no effect: {family.traits.title} takes no embeddings"
    if (request.clip_skip or 1) > 1 and not family.traits.clip_skip:
        yield f"--clip-skip has no effect: {family.traits.title} always takes the same layer"
    if request.tile_conditioning is not TileConditioning.PLACE and not family.traits.told_place:
        yield f"--tile-conditioning has no effect: {family.traits.title} takes no sizes and crops"
    if request.canvas_prompt is not None and not has_guide:
        yield "there is no guide to draw PROMPT: --canvas-prompt alone is drawn"
    negative = request.negative_prompt, *(r.negative_prompt for r in request.regions)
    if any(negative) and family.traits.guidance is not Guidance.CFG:
        yield f"the negative prompt has no effect on {family.traits.title}"
