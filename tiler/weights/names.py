"""Map diffusers' parameter names to files that use other names, by converting an index as diffusers converts the
tensors.

diffusers' own conversion functions (loaders/single_file_utils.py) run on stand-ins that know which rows of the files
they consist of. So no table of names is needed here, and nothing is read. These functions do not notice missing
tensors; matching the result with a module does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tiler.errors import ModelError
from tiler.weights.index import TensorInfo


class Rows:
    """A tensor of which only the location is known. It supports the operations that converters use, all along the first
    axis: slices, `cat`, `chunk`; and axes of length one may be dropped."""

    def __init__(self, info: TensorInfo) -> None:
        self.info = info

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, axis: int) -> int:
        return self.shape[axis]

    def clone(self) -> Rows:
        return self

    detach = contiguous = clone

    @property
    def T(self) -> Rows:
        factor = self.info.scale
        if self.ndim != 2 or self.info.transposed or self.info.beside or (factor and math.prod(factor.shape) > 1):
            raise TypeError(f"{self.info.name}: not transposed as a matrix")
        return Rows(self.info._replace(shape=self.shape[::-1], transposed=True))

    def __getitem__(self, key: Any) -> Rows:
        first, *others = key if isinstance(key, tuple) else (key,)
        found = self
        if first != slice(None):
            start, stop, _ = first.indices(self.shape[0])
            found = Rows(self.info.cut(start, stop))
        kept = [
            side
            for side, other in zip(self.shape[1:], [*others, *[slice(None)] * self.ndim], strict=False)
            if other != 0
        ]
        if math.prod(kept) != math.prod(self.shape[1:]):
            raise TypeError(f"{self.info.name}: part of a row")
        return Rows(found.info._replace(shape=(found.shape[0], *kept)))

    def split(self, size: int | Sequence[int], dim: int = 0) -> list[Rows]:
        if dim:
            raise TypeError(f"{self.info.name}: part of a row")
        total = self.shape[0]
        sizes = [min(size, total - first) for first in range(0, total, size)] if isinstance(size, int) else list(size)
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [Rows(self.info.cut(end - count, end)) for count, end in zip(sizes, ends, strict=True)]

    def chunk(self, chunks: int, dim: int = 0) -> list[Rows]:
        return self.split(-(-self.shape[0] // chunks), dim)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.cat:
            return _joined(*args, **(kwargs or {}))
        if function in (torch.chunk, torch.split):
            return getattr(cls, function.__name__)(*args, **(kwargs or {}))
        return NotImplemented


def _joined(parts: Sequence[Rows], dim: int = 0) -> Rows:
    if dim or len({(part.info.dtype, part.shape[1:]) for part in parts}) > 1 or any(part.info.beside for part in parts):
        raise TypeError(f"{parts[0].info.name}: joined otherwise than row after row")
    return Rows(_one_behind_the_other([part.info for part in parts]))


def _one_behind_the_other(parts: Sequence[TensorInfo]) -> TensorInfo:
    """The concatenated rows of several tensors, each with its factors."""
    first, rows = parts[0], sum(part.shape[0] for part in parts)
    sources = tuple(source for part in parts for source in part.sources)
    scales = [part.scale for part in parts if part.scale is not None]
    scale = first.scale
    if len({(some.path, some.offset) for some in scales}) > 1 or len(scales) not in (0, len(parts)):
        if len(scales) < len(parts) or any(math.prod(some.shape) == 1 for some in scales):
            raise TypeError(f"{first.name}: joined rows of which each has a factor of its own")
        scale = _one_behind_the_other(scales)
    nbytes = sum(part.nbytes for part in parts)
    return first._replace(shape=(rows, *first.shape[1:]), sources=sources, nbytes=nbytes, scale=scale)


def converted(
    index: Mapping[str, TensorInfo], convert: Callable[[dict[str, Any]], Mapping[str, Any]]
) -> dict[str, TensorInfo]:
    """The result for `index` of `convert`, one of diffusers' functions from state dict to state dict. Raises ModelError
    for a file that the function cannot handle."""
    try:
        found = convert({name: Rows(info) for name, info in index.items()})
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        where = next(iter(index.values())).path if index else "the file"
        if isinstance(error, KeyError):
            raise ModelError(f"{where}: tensor {error} is missing; download the file again") from error
        raise ModelError(
            f"{where}: its names are not those of the model it seems to be ({error}); download it again"
        ) from error
    return {name: rows.info for name, rows in found.items() if isinstance(rows, Rows)}
