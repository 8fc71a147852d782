"""Latents in a safetensors file: tensor `latents`, (1, C, h, w), in the scale in which the scheduler left them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from tiler.decoding import FACTOR
from tiler.errors import ModelError, NumericalError, StorageError, UsageError
from tiler.files import atomic
from tiler.output.metadata import XMP
from tiler.weights.index import header_bytes, open_regular, read_index, read_into, read_metadata

if TYPE_CHECKING:
    from torch import Tensor

NAME = "latents"
TEXTS = ("parameters", "tiler", XMP)  # AUTOMATIC1111's line, the complete request as JSON, the source type


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    width: int
    height: int
    top: int
    left: int


@runtime_checkable
class InParts(Protocol):
    """Latents of `shape` (1, C, h, w) stored in a file, which `parts` yields as fp32, in order."""

    shape: tuple[int, ...]

    def parts(self) -> Iterator[Tensor]: ...


def save_latents(
    path: Path, latents: Tensor | InParts, facts: Mapping[str, str] | None = None, *, force: bool = True
) -> None:
    """Write latents atomically, as fp32. `facts` describe the picture: its place in the decoded latents, by the fields
    of `Box`, and its texts. Without `force`, a file that has appeared in the meantime is kept. Raises StorageError."""
    from safetensors.torch import save

    with atomic(path, replace=force) as file:
        if not isinstance(latents, InParts):
            file.write(save({NAME: latents.contiguous()}, metadata=dict(facts or {})))
            return
        size = 4 * math.prod(latents.shape)
        entry = {"dtype": "F32", "shape": latents.shape, "data_offsets": [0, size]}
        file.write(header_bytes({"__metadata__": dict(facts or {}), NAME: entry}))
        for part in latents.parts():
            file.write(part.numpy().tobytes())


class LatentsFile:
    """Latents that stay in their file: `shape` is (1, C, h, w), and `[:, :, first:last]` reads those rows as fp32.

    `unscale` is applied to the rows that are read. Raises UsageError if the file is no safetensors file or contains no
    such tensor. Rows are read with pread because mapped pages would count as RSS.
    """

    def __init__(self, path: Path, unscale: Callable[[Tensor], Tensor] = lambda rows: rows) -> None:
        from tiler.weights.store import TORCH_DTYPES

        if not path.is_file():
            raise UsageError(f"{path}: no such latents file; `tiler render --save-latents FILE.safetensors` writes one")
        try:
            index = read_index(path)
        except ModelError as error:
            raise UsageError(str(error)) from error
        if NAME not in index:
            raise UsageError(
                f"{path}: no tensor `{NAME}` in this file, which holds {', '.join(sorted(index)[:5]) or 'nothing'}"
            )
        info = index[NAME]
        if info.dtype not in ("F16", "BF16", "F32"):
            raise UsageError(f"{path}: the latents are {info.dtype}; fp16, bf16 and fp32 are read")
        self.path, self.shape, self.unscale = path, info.shape, unscale
        self._offset, self._dtype = info.offset, TORCH_DTYPES[info.dtype]
        self._facts = read_metadata(path)
        self._fd = open_regular(path)

    @property
    def picture_box(self) -> Box:
        """The part of the decoded latents that is the picture: the part that the file names if that is possible, else
        all of it."""
        height, width = FACTOR * self.shape[2], FACTOR * self.shape[3]
        said = [self._facts.get(name, "") for name in Box._fields]
        if all(text.isascii() and text.isdecimal() and len(text) < 8 for text in said):
            box = Box(*map(int, said))
            if 0 < box.width <= width - box.left and 0 < box.height <= height - box.top:
                return box
        return Box(width, height, 0, 0)

    @property
    def texts(self) -> dict[str, str]:
        """The texts to embed in the picture."""
        return {key: text for key, text in self._facts.items() if key in TEXTS}

    @property
    def decode_precision(self) -> str | None:
        """The precision in which the picture was decoded, or None if the file does not say."""
        try:
            said = json.loads(self._facts.get("tiler", ""))
        except (ValueError, RecursionError):
            return None
        found = said.get("decode_precision") if isinstance(said, dict) else None
        return found if isinstance(found, str) else None

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Tensor:
        """[:, :, first:last] → (1, C, n, w) fp32."""
        import torch

        assert index[:2] == (slice(None), slice(None)), "rows only"
        first, last, _ = index[2].indices(self.shape[2])
        _, channels, height, width = self.shape
        stored = torch.empty(1, channels, max(0, last - first), width, dtype=self._dtype)
        row_bytes = width * self._dtype.itemsize
        for channel, part in enumerate(stored[0]):
            data, at = part.view(torch.uint8).flatten().numpy(), self._offset + (channel * height + first) * row_bytes
            try:
                whole = read_into(self._fd, memoryview(data), at)
            except OSError as error:
                raise StorageError(f"{self.path}: reading failed ({error.strerror}); check the disk") from error
            if not whole:
                raise StorageError(f"{self.path}: the file became shorter while it was read; render the latents again")
        return self.unscale(stored.float())

    def check(self, channels: int, model: str) -> None:
        """Raise UsageError or NumericalError if `model`, which has `channels` channels, cannot decode the latents."""
        import torch

        if len(self.shape) != 4 or self.shape[:2] != (1, channels) or min(self.shape) < 1:
            raise UsageError(
                f"the latents have shape {list(self.shape)}; {model} decodes [1, {channels}, height/{FACTOR}, width/{FACTOR}]"
            )
        for first in range(0, self.shape[2], 64):
            if not torch.isfinite(self[:, :, first : first + 64]).all():
                raise NumericalError("the latents hold NaN or Inf; render them again")

    def __enter__(self) -> LatentsFile:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)
