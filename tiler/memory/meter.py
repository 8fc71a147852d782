"""Predict the peak of a computation by running it on the meta device and counting the bytes that would be alive.

The same code that will run for real runs here, without data: shapes only. Each tensor counts from the operation that
makes it until its last reference goes. oneDNN's convolutions also need blocked copies of input, output and weight
while they run, which no tensor shows; they are added. Works for any module; nothing here knows of diffusion.
"""

from __future__ import annotations

import weakref
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MetaMeter(TorchDispatchMode):
    """A context in which operations on meta tensors are counted. `peak_bytes` is the highest sum of what was alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self._attention = _AttentionByShape()

    def __enter__(self) -> Self:
        self._attention.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._seen.add(tensor.untyped_storage())  # parameters and the caller's own tensors are not ours to count
        out = func(*args, **(kwargs or {}))
        scratch = 0
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._count(tensor)
                if func is torch.ops.aten.convolution.default:
                    scratch = args[0].nbytes + tensor.nbytes + args[1].nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + scratch)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        nbytes = storage.nbytes()
        self._seen.add(storage)
        self.live_bytes += nbytes
        weakref.finalize(storage, self._free, nbytes).atexit = False

    def _free(self, nbytes: int) -> None:
        self.live_bytes -= nbytes


class _AttentionByShape(TorchFunctionMode):
    """On meta tensors attention would fall back to the full score matrix; on the CPU it never makes one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args and args[0].is_meta:
            query, value = args[0], (args[2] if len(args) > 2 else kwargs["value"])
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))
