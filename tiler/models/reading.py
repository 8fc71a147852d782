"""How prompts are read: what a user may ask of the text encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from tiler.models.embeddings import Embeddings
from tiler.request import Emphasis
from tiler.request.prompt import Fragment, Sections, parse_emphasis


class ReadAs(NamedTuple):
    """All of a Reading that decides embeddings, as a file can say it. `embeddings` are those that prompts name: SHA-256
    by stem, as `Embeddings.used` gives them; `loras` change the encoders: what tells them and their strengths from
    others."""

    emphasis: Emphasis = Emphasis.ORIGINAL
    clip_skip: int = 1
    embeddings: Mapping[str, str] = MappingProxyType({})
    loras: tuple[str, ...] = ()


class Reading(NamedTuple):
    """`clip_skip` 1 takes the states of CLIP's last layer, 2 those of the one before, and so on; families that always
    take one layer ignore it."""

    emphasis: Emphasis = Emphasis.ORIGINAL
    clip_skip: int = 1
    embeddings: Embeddings | None = None
    loras: tuple[str, ...] = ()

    @property
    def read_as(self) -> ReadAs:
        """With the embeddings that were named so far."""
        used = {} if self.embeddings is None else self.embeddings.used
        return ReadAs(self.emphasis, self.clip_skip, used, self.loras)

    def sections(self, text: str, warn: Callable[[str], None]) -> Sections:
        """The fragments of a text and their weights, parted where BREAK stands; `warn` is told of what is no weight."""
        if self.emphasis is Emphasis.NONE:
            return ((Fragment(text),),)
        sections = parse_emphasis(text, warn)
        if self.emphasis is Emphasis.IGNORE:
            return tuple(tuple(Fragment(f.text) for f in section) for section in sections)
        return sections


READING = Reading()
