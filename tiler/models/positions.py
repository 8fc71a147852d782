"""Tables of position embeddings that a transformer brings in its file, far larger than one tile needs.

The module's own buffer or parameter gives way to an `nn.Embedding`, whose rows are read where they are used; a tile or a guide
takes those of the table's middle, as diffusers crops it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tiler.compute.layers import StreamedEmbedding
from tiler.errors import UsageError
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


def add_positions(table: Any, x: Tensor, side: int, patches: tuple[int, int], corner: tuple[int, int]) -> None:
    """x += the embeddings of (height, width) patches, in place; their first lies at `corner`, (row, column) of the table's
    side × side positions. x: (1, height · width, d) fp32."""
    if x.is_meta:
        return
    (height, width), (top, left) = patches, corner
    rows = torch.empty(width, x.shape[-1])
    for y in range(height):
        first = (top + y) * side + left
        if isinstance(table, StreamedEmbedding):
            assert table.streamer.store is not None
            table.streamer.store.fetch(Piece(table.key, first, first + width), rows)
        else:
            rows = table.weight[first : first + width]
        x[:, y * width : (y + 1) * width] += rows
