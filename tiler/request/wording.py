"""The prompts of a request at each step, parsed, and the texts that have to be encoded. Pure, like the grammar."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tiler.errors import UsageError
from tiler.request.prompt import Stage, SubPrompt, Tag, Text, parse_prompt, text_at
from tiler.request.render import RenderRequest

CHUNK_TOKENS = 75  # of CLIP, without its start and end tokens
LORA_TAGS = frozenset({"lora", "lyco"})


class Said(NamedTuple):
    """The texts of one condition at a step: the prompts that AND joins, each with its factor, and the negative prompt,
    or None if none was given."""

    prompts: tuple[tuple[str, float], ...]
    negative: str | None

    @property
    def texts(self) -> tuple[str | None, ...]:
        return (*(text for text, _ in self.prompts), self.negative)


class Condition(NamedTuple):
    """A prompt and its negative prompt, or None if none was given."""

    prompts: tuple[SubPrompt, ...]
    negative: Text | None

    def at(self, step: int, stage: Stage) -> Said:
        """The texts at `step` of a stage, from 0."""
        negative = None if self.negative is None else text_at(self.negative, step, stage)
        return Said(tuple((text_at(p.text, step, stage), p.factor) for p in self.prompts), negative)


class Wording(NamedTuple):
    """The conditions of a stage, in the order of the tiles' condition numbers."""

    conditions: tuple[Condition, ...]
    stage: Stage
    negatives: bool = True

    def at(self, step: int) -> tuple[Said, ...]:
        """The texts of all conditions at `step`, from 0. For a family without negative prompts, the prompt takes their
        place, so nothing more is encoded."""
        said = [condition.at(step, self.stage) for condition in self.conditions]
        return tuple(said if self.negatives else (one._replace(negative=one.prompts[0][0]) for one in said))

    def texts(self) -> Iterator[str | None]:
        """All texts of all steps; some may repeat."""
        for step in range(self.stage.steps):
            for said in self.at(step):
                yield from said.texts


def guide_conditions(request: RenderRequest) -> tuple[Condition, ...]:
    """The conditions of the guide: the prompt alone. Like the functions below, raises UsageError for prompts that
    cannot be parsed."""
    assert request.prompt is not None
    return (_condition(request.prompt, request.negative_prompt),)


def canvas_conditions(request: RenderRequest) -> tuple[Condition, ...]:
    """The conditions of the canvas: the prompt or the canvas prompt, then those of the regions."""
    prompt = request.prompt if request.canvas_prompt is None else request.canvas_prompt
    pairs = [] if prompt is None else [(prompt, request.negative_prompt)]
    for region in request.regions:
        negative = request.negative_prompt if region.negative_prompt is None else region.negative_prompt
        pairs.append((region.prompt, negative))
    return tuple(_condition(*pair) for pair in pairs)


def _condition(prompt: str, negative: str | None) -> Condition:
    parsed = parse_prompt(prompt)
    if (total := sum(part.factor for part in parsed.prompts)) <= 0:
        raise UsageError(
            f"the factors of the prompts that AND joins add up to {total:g}; take some that add up to more than 0"
        )
    return Condition(parsed.prompts, None if negative is None else parse_prompt(negative, splits=False).prompts[0].text)


class Place(NamedTuple):
    """A prompt of a request, by what messages call it. Whether AND `splits` it."""

    name: str
    text: str
    splits: bool = True


def places_of(request: RenderRequest) -> Iterator[Place]:
    """The prompts of a request, "" for those that were not given."""
    yield Place("the prompt", request.prompt or "")
    yield Place("the canvas prompt", request.canvas_prompt or "")
    yield from _places_without_tags(request)


def _places_without_tags(request: RenderRequest) -> Iterator[Place]:
    yield Place("the negative prompt", request.negative_prompt or "", splits=False)
    for region in request.regions:
        yield Place("a region's prompt", region.prompt)
        yield Place("a region's negative prompt", region.negative_prompt or "", splits=False)


def tags_of(request: RenderRequest) -> tuple[Tag, ...]:
    """The <lora:…> and <lyco:…> tags of the prompt, followed by those that only the canvas prompt has. Raises
    UsageError for tags of other kinds, and for tags in a region or a negative prompt, because LoRAs change the weights
    everywhere."""
    found = list(parse_prompt(request.prompt or "").tags)
    for tag in parse_prompt(request.canvas_prompt or "").tags:
        if tag in found:
            continue
        if any(tag.arguments[:1] == other.arguments[:1] for other in found):
            raise UsageError(f"{tag}: a tag counts for the whole picture; give the same strength in both prompts")
        found.append(tag)
    for tag in found:
        if tag.kind not in LORA_TAGS:
            raise UsageError(f"{tag}: tiler does not know this kind of tag; remove it from the prompt")
    for place, text, _ in _places_without_tags(request):
        for tag in parse_prompt(text).tags:
            raise UsageError(f"{tag}: a tag counts for the whole picture; move it from {place} to the prompt")
    return tuple(found)


def may_be_long(text: str | None) -> bool:
    """Whether a text may need more than one CLIP chunk."""
    return text is not None and not (text.isascii() and len(text) <= CHUNK_TOKENS and "BREAK" not in text)


def most_chunks(texts: Sequence[str | None], most: int) -> int:
    """An upper bound on the CLIP chunks of the longest text, at most `most`, found without a tokenizer: a token has at
    least two English letters, or one byte of other scripts."""
    chunks = 1
    for text in filter(may_be_long, texts):
        assert text is not None
        letters = sum(c.isascii() for c in text)
        tokens = letters / 2 + len(text.encode()) - letters
        chunks = max(chunks, math.ceil(tokens / CHUNK_TOKENS) + text.count("BREAK"))
    return min(chunks, most)
