"""Memory for the weights in use, outside the allocator's heap, and its division within a unit. Knows nothing of
layers."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch
from torch import Tensor

from tiler.compute.kernels import Prepared


class Arena:
    """A reusable buffer for weights. If memory is short, the part that the next use does not need is returned to the
    system: the units with the largest weights are not those with the largest activations, so the two need not add
    up."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._touched = 0

    def __len__(self) -> int:
        return len(self._bytes)

    def take(self, nbytes: int, *, short: bool) -> Tensor:
        """The first `nbytes` of the buffer, or all of it; the content is undefined. Invalidates what was taken
        before."""
        end = min(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE, len(self._map))
        if short and end < self._touched and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, end, self._touched - end)
            self._touched = end
        self._touched = max(self._touched, end)
        return self._bytes[:nbytes]


class Held:
    """A `Place` in the arena. If it `stays`, `prepared` holds all prepared weights of a unit, by weight and kernel."""

    def __init__(self, arena: Arena, arena_bytes: int, short: Callable[[], bool], *, stays: bool) -> None:
        self.arena_bytes, self.stays = arena_bytes, stays
        self.prepared: dict[tuple[object, str], list[Prepared]] = {}
        self._arena, self._short = arena, short
        self._filled = 0

    def room(self, count: int, dtype: torch.dtype, *, behind: int = 0) -> Tensor:
        """`count` elements of the arena after those that stay, or a separate buffer if the arena is too small."""
        first = self._filled + behind
        end = first + count * dtype.itemsize
        if end > len(self._arena):
            return torch.empty(count, dtype=dtype)
        return self._arena.take(end, short=not self.stays and self._short())[first:].view(dtype)

    def keep(self, nbytes: int) -> None:
        """Keep the next `nbytes`, if this place stays."""
        self._filled += nbytes if self.stays else 0
