"""Attention and feed-forward over thousands of tokens in little memory, shared by the diffusion transformers.

A sample's state is one tensor (1, tokens, d). The only other tensor of that size is the attention's result: queries,
keys and values are computed for a few heads at a time from tokens that are normalised chunk by chunk, and results are
added to the state in place. Chunks, head groups and the cuts of weights depend on shapes alone, so the bits do not
depend on the ceiling; only the number of reads of a weight does. Works on diffusers' own modules, streamed or resident.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tiler.compute.kernels import Epilogue, Operands, step_rows
from tiler.compute.layers import StreamedLinear, attend, linear, linear_layers, rows_of
from tiler.compute.shapes import repeated
from tiler.compute.stream import Streamer
from tiler.weights.blocks import OUTPUTS

# Choices, for Flux at 1024²: with larger chunks or fewer groups its floor passes 560 MB.
CHUNK = 256  # tokens of a product
GROUPS = 6  # of heads, at most
QUERIES = 1536  # of an attention: its result is put where they were
# A layer's hidden values take up to this many times the arena; then the tokens are done in turns, each a read of the
# weights.
HIDDEN_SHARE = 1.0

_T = TypeVar("_T")
Normed = Callable[[slice], Tensor]
"""Tokens [start, stop) of a state → (1, n, d), normalised and modulated, newly made."""


class Stream(NamedTuple):
    """Tokens that share the weights of an attention: the layers of their queries, keys and values, and the norms of a
    head's queries and keys, if any."""

    tokens: slice
    normed: Normed
    layers: tuple[nn.Linear, nn.Linear, nn.Linear]
    norms: tuple[nn.Module | None, nn.Module | None] = (None, None)


class FeedForward(NamedTuple):
    """out(activation(into(x))), with the hidden values multiplied by gate(x) if there is a gate."""

    into: nn.Linear
    activation: nn.Module
    out: nn.Linear
    gate: nn.Linear | None = None


def stream_of(tokens: slice, attn: Any, normed: Normed) -> Stream:
    """The Stream of the layers that diffusers' attention applies to its own tokens."""
    return Stream(tokens, normed, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))


def added_stream(tokens: slice, attn: Any, normed: Normed) -> Stream:
    """The Stream of the layers that diffusers' joint attention applies to the additional tokens."""
    layers = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    return Stream(tokens, normed, layers, (attn.norm_added_q, attn.norm_added_k))


def gelu_feed_forward(ff: Any) -> FeedForward:
    """The layers of diffusers' FeedForward with the approximate GELU."""
    return FeedForward(ff.net[0].proj, nn.GELU(approximate="tanh"), ff.net[2])


def modulated(norm: nn.Module, x: Tensor, scale: Tensor, shift: Tensor) -> Normed:
    """norm(x) · (1 + scale) + shift; x: (1, tokens, d), scale and shift: (d,)."""

    def at(tokens: slice) -> Tensor:
        made: Tensor = norm(x[:, tokens])
        return made if made.is_meta else made.mul_(1 + scale).add_(shift)

    return at


def attention(
    streamer: Streamer, x: Tensor, streams: Sequence[Stream], heads: int, rotation: Tensor | None = None
) -> Tensor:
    """Attention among all tokens of the streams, (1, tokens, width), before its output layer. `x` is the state, (1,
    tokens, d); `rotation`, (tokens, 1, head / 2) complex, is multiplied into queries and keys."""
    size = streams[0].layers[0].out_features // heads
    length = max(stream.tokens.stop for stream in streams)
    together = OUTPUTS // math.gcd(size, OUTPUTS)  # heads whose rows are whole blocks of packed weights
    together = together if heads % together == 0 else 1
    units = heads // together
    groups = min(GROUPS, units)
    ends = [size * together * (units * i // groups) for i in range(groups + 1)]
    widest = max(last - first for first, last in pairwise(ends))
    out = x.new_empty(1, length, size * heads)  # a group's queries, until its result takes their place
    keys, values = x.new_empty(1, length, widest), x.new_empty(1, length, widest)
    for first, last in pairwise(ends):
        places = out[..., first:last], keys[..., : last - first], values[..., : last - first]
        for stream in streams:
            layers = [rows_of(layer, first, last) for layer in stream.layers]
            _project(streamer, stream, layers, places, size, rotation)
        queries, all_keys, all_values = (place.unflatten(-1, (-1, size)).transpose(1, 2) for place in places)
        for tokens in each(cut(slice(0, length), QUERIES), x.is_meta):
            queries[:, :, tokens].copy_(attend(queries[:, :, tokens], all_keys, all_values, layers[0]))
    return out


def _project(
    streamer: Streamer, stream: Stream, layers: list[nn.Linear], places: Sequence[Tensor], size: int,
    rotation: Tensor | None,
) -> None:  # fmt: skip
    """Compute the layers' products for the stream's tokens and store them in `places` (queries, keys, values)."""
    numbers = range(len(layers))
    for some in [list(numbers)] if streamer.fits(*layers) else [[i] for i in numbers]:
        with streamer.hold(*(layers[i] for i in some)):
            for tokens in each(cut(stream.tokens, CHUNK), places[0].is_meta):
                made = linear_layers([layers[i] for i in some], stream.normed(tokens))
                for i, result in zip(some, made, strict=True):
                    if result.is_meta:
                        continue
                    by_head = result.unflatten(-1, (-1, size))
                    if i < 2 and (norm := stream.norms[i]) is not None:
                        by_head = norm(by_head)
                    if i < 2 and rotation is not None:
                        torch.view_as_complex(by_head.unflatten(-1, (-1, 2))).mul_(rotation[tokens])
                    places[i][:, tokens] = by_head.flatten(-2)


def add_products(
    streamer: Streamer, layer: nn.Linear, inputs: Sequence[Tensor], x: Tensor, tokens: Sequence[slice], gate: Tensor
) -> None:
    """x += gate · layer(inputs), in place: x (1, tokens, d), gate (d,); each input (1, n, in) has its own slice of
    `tokens`."""
    for number, rows, made in products(streamer, layer, inputs):
        if not made.is_meta:
            x[:, tokens[number], rows].addcmul_(gate[rows], made)


def add_attended(
    streamer: Streamer, layer: nn.Linear, attended: Tensor, x: Tensor, tokens: slice, gate: Tensor
) -> None:
    """x += gate · layer(attended) at `tokens`, in place, where `layer` is the output layer of an attention."""
    chunks = cut(tokens, CHUNK)
    add_products(streamer, layer, [attended[:, chunk] for chunk in chunks], x, chunks, gate)


def add_feed_forward(
    streamer: Streamer, layers: FeedForward, x: Tensor, tokens: slice, normed: Normed, gate: Tensor,
    beside: Tensor | None = None,
) -> None:  # fmt: skip
    """x += gate · feed-forward(normed) at `tokens`, in place. `beside` (1, tokens, k) is placed before the hidden
    values."""
    known = 0 if beside is None else beside.shape[-1]
    modules = [layer for layer in (layers.into, layers.gate, layers.out) if layer is not None]
    whole = streamer.fits(*modules)
    room = 0 if whole else int(HIDDEN_SHARE * streamer.arena_bytes) // (4 * layers.out.in_features)
    with streamer.hold(*modules) if whole else nullcontext():
        for turn in each(_turns(tokens, room), x.is_meta):
            chunks = cut(turn, CHUNK)
            inputs = [normed(chunk) for chunk in chunks]
            hidden = [x.new_empty(1, chunk.stop - chunk.start, layers.out.in_features) for chunk in chunks]
            for number, rows, made in products(streamer, layers.into, inputs, layers.activation):
                if not made.is_meta:
                    hidden[number][..., known:][..., rows] = made
            if layers.gate is not None:
                for number, rows, made in products(streamer, layers.gate, inputs):
                    if not made.is_meta:
                        hidden[number][..., known:][..., rows].mul_(made)
            del inputs
            if beside is not None and not beside.is_meta:
                for chunk, filled in zip(chunks, hidden, strict=True):
                    filled[..., :known] = beside[:, chunk]
            add_products(streamer, layers.out, hidden, x, chunks, gate)
            del hidden


def project(streamer: Streamer, layer: nn.Linear, given: Normed, out: Tensor) -> None:
    """out[:, tokens] = layer(given(tokens)) for all tokens of `out`, (1, n, outputs), under one read of the weight."""
    with streamer.hold(layer) if streamer.fits(layer) else nullcontext():
        for tokens in each(cut(slice(0, out.shape[1]), CHUNK), out.is_meta):
            made = layer(given(tokens))
            if not made.is_meta:
                out[:, tokens] = made


def products(
    streamer: Streamer, layer: nn.Linear, inputs: Sequence[Tensor], activation: nn.Module | None = None
) -> Iterator[tuple[int, slice, Tensor]]:
    """For each input (1, n, in), yield its number, a slice of the outputs and their activated values (1, n, outputs).
    Each piece of the weight is read once for all inputs. Use each value before requesting the next."""
    meta, sizes = inputs[0].is_meta, [x.shape[1] for x in inputs]
    if not isinstance(layer, StreamedLinear):
        for number in each(range(len(inputs)), meta, sizes):
            yield number, slice(0, layer.out_features), linear(layer, inputs[number], activation=activation)
        return
    op, shape = layer.op(), tuple(inputs[0].shape)
    kernel = streamer.kernel(op, shape)
    begun = [kernel.begin(op, Operands((x,))) for x in inputs]
    for rows in each(cut(slice(0, layer.out_features), step_rows(streamer.store, op.group.row)), meta):
        part = rows_of(layer, rows.start, rows.stop)
        assert isinstance(part, StreamedLinear)
        op = part.op(after=Epilogue(activation=activation))
        with streamer.hold(part):
            for number in each(range(len(inputs)), meta, sizes):
                (made,) = kernel.apply(op, begun[number], streamer.prepared(op, kernel, shape))
                yield number, rows, made


def cut(tokens: slice, size: int) -> list[slice]:
    """Consecutive parts of `size`; the last may be smaller."""
    return [slice(first, min(first + size, tokens.stop)) for first in range(tokens.start, tokens.stop, size)]


def _turns(tokens: slice, room: int) -> list[slice]:
    """The smallest number of parts with at most `room` tokens each, made of complete chunks and about equal in size."""
    chunks = math.ceil((tokens.stop - tokens.start) / CHUNK)
    turns = math.ceil(chunks / max(1, room // CHUNK))
    return cut(tokens, CHUNK * math.ceil(chunks / turns))


def each(items: Sequence[_T], planning: bool, sizes: Sequence[int] | None = None) -> Iterator[_T]:
    """The items; during planning only the first, which is the largest and stands for all."""
    if not planning or len(items) == 1:
        yield from items
        return
    if sizes is None:
        sizes = [item.stop - item.start for item in items if isinstance(item, slice)]
    with repeated(sum(sizes) / sizes[0]):
        yield items[0]
