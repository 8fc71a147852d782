"""A prompt's tokens in chunks of the length that CLIP was trained with, each token with its weight, and the effect of
weights on encodings. Knows no tokenizer and no encoder.

A text of several chunks is encoded chunk by chunk, and the encodings are joined along the token axis, as in
AUTOMATIC1111.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tiler.errors import UsageError
from tiler.request import Emphasis

CLIP_TOKENS = 77  # of a chunk, its marks included
BACKTRACK = 20  # where a comma is as near to the end of a full chunk, what stands behind it moves to the next
MOST_CHUNKS = 20  # of a prompt; a longer one is cut


class Piece(NamedTuple):
    """Tokens that must stay together: one token of the text, or all tokens of an embedding, whose `vectors` (n, width)
    replace theirs."""

    ids: tuple[int, ...]
    weight: float = 1.0
    vectors: Tensor | None = None


Chunk = list[Piece]


def split_chunks(sections: Sequence[Sequence[Piece]], room: int, comma: int | None) -> list[Chunk]:
    """Split sections, separated by BREAK, into at least one chunk of up to `room` tokens each. `comma` is the token id
    of a comma."""
    chunks: list[Chunk] = []
    for section in sections:
        chunks.append([])
        for piece in section:
            full = chunks[-1]
            if _size(full) + len(piece.ids) > room:
                moved = _behind_comma(full, room, comma) if _size(full) == room and piece.ids != (comma,) else []
                del full[len(full) - len(moved) :]
                chunks.append(moved)
            if _size(chunks[-1]) + len(piece.ids) > room:
                chunks.append([])
            chunks[-1].append(piece)
    if len(chunks) > 1 and not chunks[-1]:  # a BREAK at the end begins no chunk
        chunks.pop()
    return chunks


def _size(chunk: Chunk) -> int:
    return sum(len(piece.ids) for piece in chunk)


def _behind_comma(chunk: Chunk, room: int, comma: int | None) -> Chunk:
    """The pieces after the last comma of a full chunk, if that comma is near its end."""
    for number in reversed(range(len(chunk))):
        if chunk[number].ids == (comma,):
            return chunk[number + 1 :] if room - _size(chunk[:number]) <= BACKTRACK else []
    return []


def emphasised(states: Tensor, weights: Sequence[float], emphasis: Emphasis) -> Tensor:
    """Multiply the encodings (1, n, width) of n tokens by their weights; with `emphasis` ORIGINAL, then scale all of
    them to restore their mean. Encodings without weights are unchanged. Raises UsageError if no scale can restore the
    mean."""
    if all(weight == 1 for weight in weights):
        return states
    weighed = states * torch.tensor(weights, dtype=states.dtype).view(1, -1, 1)
    if emphasis is not Emphasis.ORIGINAL:
        return weighed
    scale = float(states.mean()) / (float(weighed.mean()) or float("nan"))
    if not abs(scale) < 1e3:  # nor NaN
        raise UsageError(
            "the weights of a prompt bring the mean of its encoding to zero, so that it cannot be scaled back; take "
            "--emphasis no-norm, or other weights"
        )
    return weighed * scale
