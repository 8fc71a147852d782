"""Prompts → embeddings: out of a file or the cache where they are there, else by the family's text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from tiler.compute import onednn
from tiler.errors import StorageError
from tiler.models.embeds import Encoded, PromptCache, Text, Words, prompts_folder
from tiler.models.family import Family, Guidance, Part
from tiler.planning.render import choose_precision
from tiler.request import Precision, RenderRequest, ResolvedRequest
from tiler.run import Names, Run
from tiler.weights.index import TensorInfo

Weights = Mapping[str, tuple[dict[str, TensorInfo], Names]]
"""By part: where its parameters lie, and their names there."""


def with_words(request: RenderRequest, words: Words | None) -> RenderRequest:
    """The request with what its file of encoded prompts says where it says nothing itself: what to draw, and what not."""
    if words is None or request.prompt is not None or request.regions or not words.prompts:
        return request
    negative = request.negative_prompt
    if negative is None and words.negative_prompts:
        negative = words.negative_prompts[0]
    return replace(request, prompt=words.prompts[0], negative_prompt=negative)


def prompt_pairs(request: ResolvedRequest, family: Family) -> list[tuple[str, Text]]:
    """The prompt and the negative prompt of the picture, and of each region."""
    pairs = [] if request.prompt is None else [(request.prompt, request.negative_prompt)]
    for r in request.regions:
        pairs.append((r.prompt, request.negative_prompt if r.negative_prompt is None else r.negative_prompt))
    if family.traits.guidance is not Guidance.CFG:
        return [(prompt, prompt) for prompt, _ in pairs]  # what is never used is not encoded
    return pairs


def wanted_texts(request: ResolvedRequest, family: Family) -> list[Text]:
    """All that is to be encoded, each text once."""
    return list(dict.fromkeys(text for pair in prompt_pairs(request, family) for text in pair))


def find_encoded(
    request: ResolvedRequest, family: Family, words: Words | None
) -> tuple[dict[Text, Encoded], PromptCache | None]:
    """The prompts that are embedded already, and where others are kept once they are. Raises UsageError where `words` were given
    and have not all of them."""
    wanted = wanted_texts(request, family)
    if words is not None:
        words.check(family)
        return words.of(wanted), None
    int8 = choose_precision(request.precision, family, onednn.int8())[0] is Precision.INT8
    # Whatever of a request changes the embeddings of a text belongs into these options.
    cache = PromptCache(prompts_folder(request.cache_dir), family, {}, int8=int8)
    return cache.load(wanted), cache


def encode_texts(run: Run, weights: Weights, texts: Sequence[Text], cache: PromptCache | None) -> dict[Text, Encoded]:
    """The embeddings of all texts, made by one read of the text encoders, and kept in `cache`."""
    if not texts:
        return {}
    told: list[str] = []

    @contextmanager
    def opened(part: Part) -> Iterator[Any]:
        module = run.models.module(part)
        with run.streamed(module, *weights[part.name], int8_products=False, arena_bytes=part.arena_bytes):
            yield module

    prompts = run.models.family.encode(texts, opened, told.append)
    found = {
        text: Encoded(prompt, tuple(note for note in told if _quotes(note, text)))
        for text, prompt in zip(texts, prompts, strict=True)
    }
    if cache is not None:
        try:
            cache.save(found)
        except StorageError as error:
            run.note(f"the encoded prompts are not kept for the next render: {error}")
    return found


def _quotes(note: str, text: Text) -> bool:
    """Whether a note is of this text, which it quotes as given or as some families clean it."""
    return text is not None and any(repr(form[:40]) in note for form in (text, text.lower().strip()))
