"""What a request says at each step: its prompts, parsed, and the texts that are to be encoded. Pure, like the
grammar."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tiler.errors import UsageError
from tiler.request.prompt import Stage, SubPrompt, Tag, Text, parse_prompt, text_at
from tiler.request.render import RenderRequest

CHUNK_TOKENS = 75  # of CLIP, its marks left out
LORA_TAGS = frozenset({"lora", "lyco"})


class Said(NamedTuple):
    """The texts of one condition at a step: what AND joins, each with its factor, and the negative prompt, None where
    none was given."""

    prompts: tuple[tuple[str, float], ...]
    negative: str | None

    @property
    def texts(self) -> tuple[str | None, ...]:
        return (*(text for text, _ in self.prompts), self.negative)


class Condition(NamedTuple):
    """A prompt and its negative prompt, None where none was given."""

    prompts: tuple[SubPrompt, ...]
    negative: Text | None

    def at(self, step: int, stage: Stage) -> Said:
        """What it says at `step` of a stage, from 0."""
        negative = None if self.negative is None else text_at(self.negative, step, stage)
        return Said(tuple((text_at(p.text, step, stage), p.factor) for p in self.prompts), negative)


class Wording(NamedTuple):
    """The conditions of a stage, in the order in which tiles number them."""

    conditions: tuple[Condition, ...]
    stage: Stage
    negatives: bool = True

    def at(self, step: int) -> tuple[Said, ...]:
        """Of `step` of the stage, from 0. Where a family takes no negative prompts, the prompt stands for them: nothing
        more is encoded."""
        said = [condition.at(step, self.stage) for condition in self.conditions]
        return tuple(said if self.negatives else (one._replace(negative=one.prompts[0][0]) for one in said))

    def texts(self) -> Iterator[str | None]:
        """All that is said at any step, some of it more than once."""
        for step in range(self.stage.steps):
            for said in self.at(step):
                yield from said.texts


def guide_conditions(request: RenderRequest) -> tuple[Condition, ...]:
    """Of the guide: the prompt. Raises UsageError, as all of these do, for prompts that cannot be read."""
    assert request.prompt is not None
    return (_condition(request.prompt, request.negative_prompt),)


def canvas_conditions(request: RenderRequest) -> tuple[Condition, ...]:
    """Of the canvas: the prompt, or the one for the canvas alone, and those of the regions."""
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


def tags_of(request: RenderRequest) -> tuple[Tag, ...]:
    """The tags of the prompt, and those that only the one for the canvas has, in order: <lora:…> and <lyco:…>. Raises
    UsageError for tags of other kinds, and for those of a region or a negative prompt: weights are the same
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
            raise UsageError(f"{tag}: tiler knows no tag of this kind; take it out of the prompt")
    elsewhere = [("the negative prompt", request.negative_prompt)]
    for region in request.regions:
        elsewhere += [("a region's prompt", region.prompt), ("a region's negative prompt", region.negative_prompt)]
    for place, text in elsewhere:
        for tag in parse_prompt(text or "").tags:
            raise UsageError(f"{tag}: a tag counts for the whole picture; move it from {place} to the prompt")
    return tuple(found)


def may_be_long(text: str | None) -> bool:
    """Whether a text may take more than one chunk of CLIP."""
    return text is not None and not (text.isascii() and len(text) <= CHUNK_TOKENS and "BREAK" not in text)


def most_chunks(texts: Sequence[str | None], most: int) -> int:
    """At least the chunks of the longest text, but `most`, without a tokenizer: a token has two letters or more of
    English, and of other scripts a byte or more."""
    chunks = 1
    for text in filter(may_be_long, texts):
        assert text is not None
        letters = sum(c.isascii() for c in text)
        tokens = letters / 2 + len(text.encode()) - letters
        chunks = max(chunks, math.ceil(tokens / CHUNK_TOKENS) + text.count("BREAK"))
    return min(chunks, most)
