"""The user's options for parsing and encoding prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from tiler.models.embeddings import Embeddings
from tiler.request import Emphasis
from tiler.request.prompt import Fragment, Sections, parse_emphasis


class ReadAs(NamedTuple):
    """The parts of a Reading that affect embeddings, in a form that a file can store. `embeddings`: SHA-256 by stem of
    the embeddings that prompts name, as in `Embeddings.used`; `loras`: identifies the LoRAs that change the encoders,
    and their strengths."""

    emphasis: Emphasis = Emphasis.ORIGINAL
    clip_skip: int = 1
    embeddings: Mapping[str, str] = MappingProxyType({})
    loras: tuple[str, ...] = ()


class Reading(NamedTuple):
    """`clip_skip` 1 uses the states of CLIP's last layer, 2 those of the layer before, and so on; families that always
    use one layer ignore it."""

    emphasis: Emphasis = Emphasis.ORIGINAL
    clip_skip: int = 1
    embeddings: Embeddings | None = None
    loras: tuple[str, ...] = ()

    @property
    def read_as(self) -> ReadAs:
        """The ReadAs with the embeddings that were named so far."""
        used = {} if self.embeddings is None else self.embeddings.used
        return ReadAs(self.emphasis, self.clip_skip, used, self.loras)

    def sections(self, text: str, warn: Callable[[str], None]) -> Sections:
        """The fragments of a text and their weights, split at BREAK; `warn` reports invalid weights."""
        if self.emphasis is Emphasis.NONE:
            return ((Fragment(text),),)
        sections = parse_emphasis(text, warn)
        if self.emphasis is Emphasis.IGNORE:
            return tuple(tuple(Fragment(f.text) for f in section) for section in sections)
        return sections


READING = Reading()
