"""Encoded prompts, from a file, from the cache, or from the family's text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tiler.compute import onednn
from tiler.errors import StorageError, UsageError
from tiler.models.built import Models
from tiler.models.embeds import Encoded, PromptCache, Text, Words, prompts_folder
from tiler.models.family import Family, Part
from tiler.models.prompting import read_options
from tiler.models.reading import ReadAs, Reading
from tiler.native.library import has_bf16
from tiler.planning.render import choose_precision
from tiler.request import Emphasis, Precision, RenderRequest, ResolvedRequest
from tiler.request.wording import may_be_long
from tiler.run import Names, Run
from tiler.weights.index import TensorInfo

Weights = Mapping[str, tuple[dict[str, TensorInfo], Names]]
"""By part: its parameters' places in files, and their names there."""


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """All texts of a run, how they are `read_as`, the ones that are already `encoded`, and the `cache` that stores the
    others after encoding."""

    texts: Sequence[Text]
    reading: Reading
    read_as: ReadAs
    encoded: Mapping[Text, Encoded]
    cache: PromptCache | None

    @property
    def all_encoded(self) -> bool:
        return all(text in self.encoded for text in self.texts)


def with_words(request: RenderRequest, words: Words | None) -> RenderRequest:
    """Fill gaps of the request from its file of encoded prompts: the prompt, the negative prompt, and the way in which
    they were parsed. Raises UsageError if the request asks for other parsing."""
    if words is None:
        return request
    was = words.read_as
    for flag, said, here in (
        ("--emphasis", None if request.emphasis is Emphasis.ORIGINAL else request.emphasis, was.emphasis),
        ("--clip-skip", request.clip_skip, was.clip_skip),
    ):
        if said not in (None, here):
            raise UsageError(
                f"{words.path}: encoded with {flag} {here}; leave out {flag} {said}, or give it to `tiler encode`"
            )
    request = replace(request, emphasis=was.emphasis, clip_skip=was.clip_skip if was.clip_skip > 1 else None)
    if request.prompt is not None or request.regions or not words.prompts:
        return request
    negative = request.negative_prompt
    if negative is None and words.negative_prompts:
        negative = words.negative_prompts[0]
    return replace(request, prompt=words.prompts[0], negative_prompt=negative)


def precision_of(request: ResolvedRequest, family: Family) -> Precision:
    """The denoiser's precision, as the plan will choose it."""
    return choose_precision(request.precision, family, onednn.int8(), bf16=has_bf16())[0]


def find_prompts(
    request: ResolvedRequest, models: Models, texts: Sequence[Text], words: Words | None, *, int8: bool | None = None
) -> Spoken:
    """Find the texts to encode, and those that are already encoded. Encoder weights are read in int8 if the request's
    denoiser is int8, unless `int8` says otherwise. Raises UsageError if `words` are given but lack some of the
    texts."""
    family = models.family
    if words is not None:
        words.check(family)
        reading, read_as = Reading(), words.read_as
    else:
        reading = read_options(request, models, texts)
        read_as = reading.read_as
    long = any(map(may_be_long, texts)) or bool(read_as.embeddings)
    if family.traits.chunked and long and "" not in texts:
        texts = [*texts, ""]  # its chunks pad shorter prompts
    if words is not None:
        return Spoken(texts=texts, reading=reading, read_as=read_as, encoded=words.of(texts), cache=None)
    if int8 is None:
        int8 = precision_of(request, family) is Precision.INT8
    cache = PromptCache(prompts_folder(request.cache_dir), family, read_as, int8=int8)
    return Spoken(texts=texts, reading=reading, read_as=read_as, encoded=cache.load(texts), cache=cache)


def encode_prompts(run: Run, weights: Weights, spoken: Spoken) -> dict[Text, Encoded]:
    """The embeddings of all texts. Missing ones are encoded in one read of the text encoders, and cached. Notes about
    the prompts go to the user."""
    missing = [text for text in spoken.texts if text not in spoken.encoded]
    found = dict(spoken.encoded) | _encode(run, weights, missing, spoken.reading)
    if missing and spoken.cache is not None:
        try:
            spoken.cache.save({text: found[text] for text in missing})
        except StorageError as error:
            run.note(f"the encoded prompts are not stored for the next render: {error}")
    for note in dict.fromkeys(note for text in spoken.texts for note in found[text].notes):
        run.note(note)
    return found


def _encode(run: Run, weights: Weights, texts: Sequence[Text], reading: Reading) -> dict[Text, Encoded]:
    if not texts:
        return {}
    told: list[str] = []

    @contextmanager
    def opened(part: Part) -> Iterator[Any]:
        module = run.models.module(part)
        options = dict[str, Any](changes=run.models.changes(part), int8_products=False, arena_bytes=part.arena_bytes)
        with run.streamed(module, *weights[part.name], **options):
            yield module

    prompts = run.models.family.encode(texts, opened, told.append, reading)
    notes: dict[Text, list[str]] = {text: [] for text in texts}
    for note in told:
        for text in [text for text in texts if _quotes(note, text)] or texts:
            notes[text].append(note)
    return {text: Encoded(prompt, tuple(notes[text])) for text, prompt in zip(texts, prompts, strict=True)}


def _quotes(note: str, text: Text) -> bool:
    """Whether a note is about this text: it quotes the text as given, or as some families clean it."""
    return text is not None and any(repr(form[:40]) in note for form in (text, text.lower().strip()))
