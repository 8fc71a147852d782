"""Memory for the weights in use, outside the allocator's heap. Knows nothing of layers."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


class Arena:
    """Room for weights, used again and again. Where memory is short, what the next use does not need goes back to the
    system: the units with the largest weights are not those with the largest activations, and need not add up."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._touched = 0

    def __len__(self) -> int:
        return len(self._bytes)

    def take(self, nbytes: int, *, short: bool) -> Tensor:
        """The first `nbytes`; what they hold is undefined. Whatever was taken before is gone."""
        end = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if short and end < self._touched and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, end, self._touched - end)
            self._touched = end
        self._touched = max(self._touched, end)
        return self._bytes[:nbytes]
