"""Tables of position embeddings that a transformer brings in its file, far larger than one tile needs.

The module's own buffer or parameter gives way to an `nn.Embedding`, whose rows are read where they are used; a tile or a guide
takes those of the table's middle, as diffusers crops it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tiler.compute.layers import StreamedEmbedding
from tiler.compute.stream import Streamer
from tiler.errors import UsageError
from tiler.models.dit import CHUNK, cut, each, held
from tiler.weights.store import Piece

TABLE = "table"  # the name of the module that takes the place of `pos_embed`


def replace_table(patch_embed: Any, side: int, width: int) -> None:
    """Give diffusers' patch embedding, on the meta device, a table of side × side positions instead of its `pos_embed`."""
    del patch_embed.pos_embed
    patch_embed.add_module(TABLE, nn.Embedding(side * side, width, device="meta").requires_grad_(False))


def table_names(name: str) -> list[str]:
    """The names in files of a parameter whose module was given a table."""
    return ["pos_embed.pos_embed"] if name == f"pos_embed.{TABLE}.weight" else [name]


def check_fits(side: int, patches: tuple[int, int]) -> None:
    """Raises UsageError where the table has no place for (height, width) patches."""
    if max(patches) > side:
        height, width = patches
        raise UsageError(
            f"this model knows {side} × {side} positions, and a picture as long as this needs a guide of {height} × {width}; "
            "take sides that are more alike, or --no-guide"
        )


def embed(
    streamer: Streamer, patch_embed: Any, latents: Tensor, out: Tensor, side: int, corner: tuple[int, int]
) -> None:
    """out (1, patches, d) = the embeddings of the patches of latents (1, C, h, w), and of their positions: the first lies at
    `corner`, (row, column) of the table's side × side. Strip by strip: the convolution would hold three times the result."""
    size = patch_embed.patch_size
    height, width = (n // size for n in latents.shape[2:])
    rows, table = max(1, CHUNK // width), getattr(patch_embed, TABLE)
    with held(streamer, patch_embed.proj):
        for strip in each(cut(slice(0, height), rows), latents.is_meta):
            made = patch_embed.proj(latents[:, :, strip.start * size : strip.stop * size])
            if made.is_meta:
                continue
            out[:, strip.start * width : strip.stop * width] = made.flatten(2).transpose(1, 2)
            for y in range(strip.start, strip.stop):
                first = (corner[0] + y) * side + corner[1]
                out[:, y * width : (y + 1) * width] += _rows(table, first, first + width)


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
