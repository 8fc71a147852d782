"""Encode several prompts under one read of an encoder's weights. Each prompt has its own product, so its embeddings do
not depend on the prompts beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tiler.compute.choose import KERNELS
from tiler.compute.kernels import weight_pieces
from tiler.compute.layers import StreamedLinear

GROUP_TOKENS = 1024  # tokens of prompts that share one read of the weights, unless one prompt alone has more


def groups(rows: list[Tensor]) -> Iterator[list[Tensor]]:
    """Split the prompts, each (1, tokens), into groups of consecutive ones that share one read of the weights."""
    group: list[Tensor] = []
    for ids in rows:
        if group and sum(other.shape[1] for other in group) + ids.shape[1] > GROUP_TOKENS:
            yield group
            group = []
        group.append(ids)
    if group:
        yield group


def places(rows: list[Tensor]) -> list[slice]:
    """The slice of each prompt's tokens, when all of them are concatenated."""
    ends = list(accumulate(ids.shape[1] for ids in rows))
    return [slice(end - ids.shape[1], end) for end, ids in zip(ends, rows, strict=True)]


def read_ahead(layers: Sequence[Any]) -> None:
    """Announce the order in which the weights of streamed layers will be used to their store. Prompts are encoded in
    one pass, so the next layer is read while one is computed."""
    streamed = [layer for layer in layers if isinstance(layer, StreamedLinear) and layer.streamer.store is not None]
    if streamed:
        store = streamed[0].streamer.store
        assert store is not None
        weights = (weight for layer in streamed for weight in layer.op().group.weights)
        store.expect([piece for weight in weights for _, piece in weight_pieces(store, weight)])


def linear_together(
    layer: Any,
    x: Tensor,
    prompts: list[slice],
    act: Callable[[Tensor], Tensor] | None = None,
    times: Tensor | None = None,
) -> Tensor:
    """Apply `layer`, then `act`, to x (1, n, in) with one read of its weight and a separate product for each prompt. If
    `times` (1, n, out) is given, it is multiplied by the result in place."""
    out = x.new_empty(1, x.shape[1], layer.out_features) if times is None else times
    for first, last, product in _products(layer, x):
        for prompt in prompts:
            made = product(x[:, prompt])
            part = out[:, prompt, first:last]
            if times is None:
                part.copy_(made if act is None else act(made))
            else:
                part.mul_(made)
    return out


def _products(layer: Any, x: Tensor) -> Iterator[tuple[int, int, Callable[[Tensor], Tensor]]]:
    """Yield the outputs [first, last) of each piece of a layer's weight, and the function that computes them from an
    input."""
    if not isinstance(layer, StreamedLinear):
        yield 0, layer.out_features, layer
        return
    # Pieces of unpacked rows: each prompt has its own product, for all prompts at one read.
    for piece in layer.streamer.prepared(layer.op(), KERNELS["fp32"], tuple(x.shape)):
        yield piece.first, piece.last, partial(F.linear, weight=piece.tensors[0])
