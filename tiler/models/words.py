"""A prompt as tokens with weights, for text encoders that read all of it at once: T5, BERT, Gemma."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiler.errors import ModelError
from tiler.models.reading import Reading
from tiler.request.prompt import Fragment, Sections


class Tokens(NamedTuple):
    """(1, n) ids and n weights."""

    ids: Tensor
    weights: tuple[float, ...]

    def padded(self, length: int, pad: int) -> Tokens:
        missing = length - self.ids.shape[1]
        return Tokens(torch.cat([self.ids, self.ids.new_full((1, missing), pad)], 1), (*self.weights, *[1.0] * missing))


def read_tokens(
    tokenizer: Any, text: str, length: int, encoder: str, warn: Callable[[str], None], reading: Reading,
    clean: Callable[[str], str] = str,
) -> Tokens:  # fmt: skip
    """Tokenise a text with its marks and cut it to `length`; `warn` reports a cut and names the `encoder`. A BREAK
    becomes a space. Fragments of different weights are tokenised separately. `clean` is applied to a text before it is
    tokenised, as the family's pipeline does."""
    # The tokenizer does not process megabytes of text just to report that they do not fit.
    short = text[: 40 * length]
    fragments = [f for f in _in_a_row(reading.sections(short, warn)) if f.text] or [Fragment("")]
    before, after = _marks(tokenizer)
    if len(fragments) == 1:  # the tokenizer itself adds the marks
        marked = tokenizer(clean(fragments[0].text), verbose=False).input_ids
        weights = [1.0] * len(before) + [fragments[0].weight] * (len(marked) - len(before) - len(after))
    else:
        rows = [tokenizer(clean(f.text), add_special_tokens=False, verbose=False).input_ids for f in fragments]
        marked = [*before, *(i for row in rows for i in row), *after]
        weights = [1.0] * len(before) + [f.weight for f, row in zip(fragments, rows, strict=True) for _ in row]
    if len(marked) > length or len(text) > len(short):
        warn(f"the prompt is longer than {length} tokens and was cut for {encoder}: {text[:40]!r}…")
    ids = [*marked[: length - len(after)], *after] if len(marked) > length else marked
    weights = weights[: len(ids)]
    return Tokens(torch.tensor([ids]), (*weights, *[1.0] * (len(ids) - len(weights))))


def stripped(prompt: str | None) -> str:
    """A caption, "" for an absent one, as the pipelines of PixArt and Lumina clean it if the packages for further
    cleaning are not installed; it is lower-cased after the prompt syntax was read."""
    return (prompt or "").strip()


def check_vocabulary(read: Sequence[Tokens], size: int) -> None:
    """Raise ModelError if tokenizer and encoder do not belong together."""
    if any(int(tokens.ids.max()) >= size for tokens in read):
        raise ModelError("the tokenizer knows more words than the text encoder; they do not belong together")


def _in_a_row(sections: Sections) -> Iterator[Fragment]:
    """Put a space between sections and merge adjacent fragments of equal weight."""
    last: Fragment | None = None
    for section in sections:
        for number, (text, weight) in enumerate(section):
            joint = "" if number or last is None else " "
            if last is None or last.weight != weight:
                if last is not None:
                    yield last
                last = Fragment(text, weight)
            else:
                last = Fragment(last.text + joint + text, weight)
    if last is not None:
        yield last


def _marks(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer adds before and after a text."""
    bare, marked = (tokenizer("a", add_special_tokens=added).input_ids for added in (False, True))
    first = next(i for i in range(len(marked)) if marked[i : i + len(bare)] == bare)
    return marked[:first], marked[first + len(bare) :]
