"""Predict the peak memory of a computation by running it on the meta device and counting the bytes that would be
allocated.

The code that will run for real runs here without data. Each tensor counts from the operation that creates it until its
last reference is gone. Blocked copies of input, output and weight that oneDNN's convolutions make are added, since no
tensor shows them. Works for any module; nothing here knows of diffusion.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_TIMES: ContextVar[float] = ContextVar("times", default=1.0)


@contextmanager
def repeated(times: float) -> Iterator[None]:
    """Count the operations in this context as repeated so many times: their arithmetic counts as often, their memory
    once."""
    token = _TIMES.set(_TIMES.get() * times)
    try:
        yield
    finally:
        _TIMES.reset(token)


class MetaMeter(TorchDispatchMode):
    """A context that measures operations on meta tensors. `peak_bytes` is the largest number of live bytes; `flops` (of
    convolutions), `linear_flops` and `attention_flops` count two operations for each multiply-add."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.flops = self.linear_flops = self.attention_flops = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self._by_shape = _ByShape(self)

    _entered: ClassVar[list[MetaMeter]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import torch._dynamo to keep this class out of graphs that nobody compiles

    def __enter__(self) -> Self:
        self._by_shape.__enter__()
        super().__enter__()
        self._entered.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop()
        super().__exit__(*error)
        self._by_shape.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors(args):  # parameters and the caller's own tensors are not ours to count
            self._seen.add(tensor.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors((out,)):
            if tensor.is_meta:
                self._count(tensor)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return out

    @property
    def arithmetic(self) -> tuple[int, int, int]:
        return self.flops, self.linear_flops, self.attention_flops

    @arithmetic.setter
    def arithmetic(self, counts: Sequence[int]) -> None:
        self.flops, self.linear_flops, self.attention_flops = counts

    def scratch(self, nbytes: int) -> None:
        """Memory that exists only while one operation runs."""
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + nbytes)

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


def count(flops: int, *, linear: bool) -> None:
    """Say what arithmetic an operation would have done where its results are made from shapes alone."""
    if not MetaMeter._entered:
        return
    meter = MetaMeter._entered[-1]
    if linear:
        meter.linear_flops += _repeated(flops)
    else:
        meter.flops += _repeated(flops)


class _Seen(NamedTuple):
    """The cost of an operation: bytes beside those that were live, arithmetic, and the (shape, stride) of its
    results."""

    peak_bytes: int
    arithmetic: tuple[int, int, int]
    results: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


class Memo:
    """Remembers the cost of operations on shapes, since many layers and samples have the same shape. Operations with
    equal keys must do the same."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, _Seen] = {}

    def run(self, key: Hashable, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The results of `work`, or tensors like them if the key is known; the active meter counts the same cost."""
        if not MetaMeter._entered:
            return work()
        meter = MetaMeter._entered[-1]
        before = meter.arithmetic
        if (seen := self._seen.get(key)) is not None:
            meter.scratch(seen.peak_bytes)
            meter.arithmetic = [a + _repeated(b) for a, b in zip(before, seen.arithmetic, strict=True)]
            return tuple(torch.empty_strided(shape, stride, device="meta") for shape, stride in seen.results)
        peak, live = meter.peak_bytes, meter.live_bytes
        meter.peak_bytes, meter.arithmetic, token = live, (0, 0, 0), _TIMES.set(1.0)
        try:
            results = work()
        finally:
            _TIMES.reset(token)
            taken, once = meter.peak_bytes - live, meter.arithmetic
            meter.peak_bytes = max(peak, meter.peak_bytes)
            meter.arithmetic = [a + _repeated(b) for a, b in zip(before, once, strict=True)]
        if meter.live_bytes - live == sum(result.nbytes for result in results):  # nothing else stays, nothing else went
            shapes = tuple((tuple(result.shape), result.stride()) for result in results)
            self._seen[key] = _Seen(taken, once, shapes)
        return results


def _tables(index: Any) -> list[Tensor]:
    """The tensors that index the first axes; empty for other kinds of index."""
    index = index if isinstance(index, tuple) else (index,)
    return list(index) if all(isinstance(i, Tensor) and i.dtype is not torch.bool for i in index) else []


def _broadcast(shapes: Sequence[Sequence[int]]) -> list[int]:
    """The broadcast shape of these shapes; torch's own function imports sympy."""
    rank = max(map(len, shapes))
    return [max(sides) for sides in zip(*((1,) * (rank - len(s)) + tuple(s) for s in shapes), strict=True)]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if value.layout is torch.strided:  # oneDNN's own tensors have no storage that could be asked
                yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


_POINTWISE = {
    "tanh",
    "pow",
    "sigmoid",
    "__eq__",
    "add",
    "__add__",
    "__radd__",
    "sub",
    "__sub__",
    "__rsub__",
    "mul",
    "__mul__",
    "__rmul__",
    "div",
    "__truediv__",
    "rsqrt",
    "sin",
    "cos",
    "exp",
    "silu",
    "gelu",
    "group_norm",
    "layer_norm",
    "clone",
    "empty_like",
    "zeros_like",
}
_QUESTIONS = {"__get__", "__len__", "numel", "stride", "dim"}  # most calls by far; they make no tensor
_IN_PLACE = {"add_", "__iadd__", "mul_", "__imul__", "div_", "copy_", "zero_", "__setitem__"}


def _repeated(count: int) -> int:
    times = _TIMES.get()
    return count if times == 1 else round(times * count)


class _ByShape(TorchFunctionMode):
    """Compute the results of a few functions on meta tensors from shapes alone.

    Attention would allocate the full score matrix, which the CPU kernels never make. The meta versions of the other
    functions are written in Python, and their first use imports sympy and torch._dynamo: 92 MB that the process would
    keep.
    """

    def __init__(self, meter: MetaMeter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _QUESTIONS:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:  # newer models name its arguments
            args = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))
        if func is torch.cat and args[0][0].is_meta:
            axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            sides = list(args[0][0].shape)
            sides[axis] = sum(t.shape[axis] for t in args[0])
            return args[0][0].new_empty(sides)
        if func is torch.arange and torch.device(kwargs.get("device") or "cpu").type == "meta":
            start, end = kwargs.get("start", 0), kwargs.get("end", args[0] if args else None)
            return torch.empty(end - start, device="meta", dtype=kwargs.get("dtype", torch.int64))
        if func is F.embedding and (args[0].is_meta or args[1].is_meta):
            return args[1].new_empty(*args[0].shape, args[1].shape[1], device="meta")
        if not (args and isinstance(args[0], Tensor) and args[0].is_meta):
            return func(*args, **kwargs)
        x: Tensor = args[0]
        if name in _IN_PLACE or kwargs.get("inplace"):
            return x
        if name == "__getitem__" and (rows := _tables(args[1])):
            return x.new_empty(*_broadcast([index.shape for index in rows]), *x.shape[len(rows) :])
        if name == "bmm":
            self.meter.linear_flops += _repeated(2 * x.numel() * args[1].shape[2])
            return x.new_empty(*x.shape[:2], args[1].shape[2])
        if name == "mean" and args[1:] == (-1,):
            return x.new_empty(*x.shape[:-1], *([1] if kwargs.get("keepdim") else []))
        if name == "argmax" and kwargs.get("dim") == -1:
            return x.new_empty(x.shape[:-1], dtype=torch.int64)
        if name in _POINTWISE:
            return x.new_empty(_broadcast([a.shape for a in args if isinstance(a, Tensor)]))
        if func is F.scaled_dot_product_attention:
            key, value = args[1:3]
            self.meter.attention_flops += _repeated(
                2 * x[..., 0].numel() * key.shape[-2] * (x.shape[-1] + value.shape[-1])
            )
            return x.new_empty(*x.shape[:-1], value.shape[-1])
        if func is F.linear:
            outputs = len(kwargs["weight"] if len(args) == 1 else args[1])
            self.meter.linear_flops += _repeated(2 * x.numel() * outputs)
            return x.new_empty(*x.shape[:-1], outputs)
        if func in (F.conv2d, torch.conv2d):
            out = self._conv2d(x, *args[1:], **kwargs)
            self.meter.flops += _repeated(2 * out.numel() * args[1][0].numel())
            self.meter.scratch(x.nbytes + out.nbytes + args[1].nbytes)
            return out
        if func is F.interpolate:
            return x.new_empty(
                *x.shape[:2], *(kwargs.get("size") or [int(n * kwargs["scale_factor"]) for n in x.shape[2:]])
            )
        if func is F.pad:
            left, right, top, bottom = args[1]
            return x.new_empty(*x.shape[:2], x.shape[2] + top + bottom, x.shape[3] + left + right)
        return func(*args, **kwargs)

    @staticmethod
    def _conv2d(
        x: Tensor,
        weight: Tensor,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        pairs = [(v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)]
        sides = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], *pairs, strict=True)
        ]
        return x.new_empty(x.shape[0], weight.shape[0], *sides)
