"""The outputs of modulation layers, computed once a run and stored in a file.

These layers depend on timestep, guidance and pooled text, but not on the picture, and hold a quarter to a third of a
transformer's weights. They are read once for all steps and prompts, and each pass reads its row of the results.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tiler.compute.stream import Streamer
from tiler.models.dit import cut, products
from tiler.models.nameless import NamelessFile

ROWS = 64  # of a product


class Modulations:
    """A row of fp32 values for each key, in a nameless file that is deleted with this object. On the meta device there
    is no file."""

    def __init__(self, keys: Sequence[Hashable], widths: Sequence[int], folder: Path | None, *, meta: bool) -> None:
        self._rows, self._widths = {key: i for i, key in enumerate(keys)}, list(widths)
        self._file = None if meta else NamelessFile(folder)

    @property
    def row_bytes(self) -> int:
        return 4 * sum(self._widths)

    def write(self, row: int, first: int, values: Tensor) -> None:
        """Write values (n,) fp32 into the row of a key, starting at `first`. Raises StorageError."""
        assert self._file is not None
        self._file.write(row * self.row_bytes + 4 * first, values)

    def read(self, key: Hashable) -> list[Tensor]:
        """The output of each layer for a key, (outputs,) fp32."""
        if self._file is None:
            return list(torch.empty(sum(self._widths), device="meta").split(self._widths))
        row = self._file.read(self._rows[key] * self.row_bytes, torch.empty(sum(self._widths)))
        return list(row.split(self._widths))


def modulations(
    streamer: Streamer, layers: Sequence[nn.Linear], inputs: Tensor, keys: Sequence[Hashable], folder: Path | None
) -> Modulations:
    """Apply each of the layers to each row of `inputs`, (len(keys), in) fp32, with one read of the weights; the file is
    in `folder`."""
    widths = [layer.out_features for layer in layers]
    found = Modulations(keys, widths, folder, meta=inputs.is_meta)
    rows = cut(slice(0, len(inputs)), ROWS)
    first = 0
    for layer, width in zip(layers, widths, strict=True):
        for number, outputs, made in products(streamer, layer, [inputs[None, some] for some in rows]):
            for i, values in enumerate(() if made.is_meta else made[0]):
                found.write(rows[number].start + i, first + outputs.start, values)
        first += width
    return found
