"""Position tables that a transformer stores in its file, and that are far larger than one tile needs.

The module's own buffer or parameter is replaced by an `nn.Embedding`, whose rows are read when they are used; a tile or
a guide uses the middle of the table, as diffusers crops it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tiler.compute.layers import StreamedEmbedding
from tiler.compute.stream import Streamer
from tiler.models.dit import CHUNK, cut, each
from tiler.weights.store import Piece

_TABLE = "table"  # the name of the module that takes the place of `pos_embed`


class Grid(NamedTuple):
    """The patches of a picture, (height, width), and the position of the first, (top, left), in a table of side ×
    side."""

    height: int
    width: int
    top: int
    left: int
    side: int


def replace_table(patch_embed: Any, side: int, width: int) -> None:
    """Give diffusers' patch embedding, on the meta device, a table of side × side positions instead of its
    `pos_embed`."""
    del patch_embed.pos_embed
    patch_embed.add_module(_TABLE, nn.Embedding(side * side, width, device="meta").requires_grad_(False))


def table_names(name: str) -> list[str]:
    """The names that a parameter may have in the files of a transformer whose `pos_embed` was replaced by a table."""
    return ["pos_embed.pos_embed"] if name == f"pos_embed.{_TABLE}.weight" else [name]


def embed(
    streamer: Streamer, patch_embed: Any, latents: Tensor, out: Tensor, grid: Grid,
    project: Callable[[Tensor], Tensor] | None = None,
) -> None:  # fmt: skip
    """out (1, height · width, d) = the embeddings of the patches of latents (1, C, h, w), plus those of their
    positions. `project` maps strips of latents to (1, n, d), by default with a convolution. Works in strips, since a
    convolution would hold three times the result."""
    assert max(grid.height, grid.width) <= grid.side, "a picture longer than the table"
    size, table = patch_embed.patch_size, getattr(patch_embed, _TABLE)
    with streamer.hold(patch_embed.proj):
        for strip in each(cut(slice(0, grid.height), max(1, CHUNK // grid.width)), latents.is_meta):
            rows = latents[:, :, strip.start * size : strip.stop * size]
            made = patch_embed.proj(rows).flatten(2).transpose(1, 2) if project is None else project(rows)
            if made.is_meta:
                continue
            out[:, strip.start * grid.width : strip.stop * grid.width] = made
            for y in range(strip.start, strip.stop):
                first = (grid.top + y) * grid.side + grid.left
                out[:, y * grid.width : (y + 1) * grid.width] += _rows(table, first, first + grid.width)


def _rows(table: Any, first: int, last: int) -> Tensor:
    """(last - first, d) fp32."""
    if not isinstance(table, StreamedEmbedding):
        found: Tensor = table.weight[first:last]
        return found
    store = table.streamer.store
    assert store is not None
    rows = torch.empty(last - first, table.embedding_dim)
    store.fetch(Piece(table.key, first, last), rows)
    return rows
