"""Attention by tiler's own library (tiler/native/attention.h). The scores never leave a core's cache, and a thread's
other temporaries are on its stack (0.6 MB).

Every result is computed by one loop in a fixed order, so the bytes do not depend on threads, samples, or which queries
are computed together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from tiler.compute.kernels import Kernel, Kind, Op, Operands, Place, Policy, Prepared, Shape, Some
from tiler.compute.native_inputs import address
from tiler.native import library
from tiler.weights.store import WeightStore


class NativeAttention(Kernel):
    """Products in fp32; equal to torch's within rounding."""

    name = "native-attention"
    kind = library.Kind.FP32

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        if op.kind is not Kind.ATTENTION or shape is None or library.library() is None:
            return False
        return len(shape) == 4 and shape[-1] <= library.ATTENTION_DIMS

    def prepare(self, store: WeightStore | None, op: Op, shape: Shape, place: Place) -> Iterable[Prepared]:
        return ()

    def begin(self, op: Op, x: Operands) -> Operands:
        return x

    def apply(self, op: Op, x: Operands, prepared: Iterable[Prepared]) -> tuple[Tensor, ...]:
        queries, keys, values = x.parts
        if queries.is_meta:
            return (F.scaled_dot_product_attention(queries, keys, values),)
        return (self._attend(x, None, None),)

    def some(self, x: Operands) -> Some:
        queries = x.parts[0]
        top, total = queries.new_empty(2, *queries.shape[:3], 1)
        return Some(torch.empty_like(queries) if queries.is_meta else self._attend(x, top, total), top, total)

    def _attend(self, x: Operands, top: Tensor | None, total: Tensor | None) -> Tensor:
        queries, keys, values = x.parts
        lib = library.library()
        assert lib is not None and all(part.dtype == torch.float32 for part in x.parts)
        samples, heads, tokens, width = queries.shape
        keys, values = (part.expand(samples, heads, keys.shape[2], width) for part in (keys, values))
        queries, keys, values = (
            part if part.stride(-1) == 1 else part.contiguous() for part in (queries, keys, values)
        )
        # A token's heads are side by side, as the next layer takes them.
        out = queries.new_empty(samples, tokens, heads, width).transpose(1, 2)
        call = library.Attention(
            kind=self.kind, scale=width**-0.5,
            samples=samples, heads=heads, queries=tokens, keys=keys.shape[2], dims=width,
            q=queries.data_ptr(), k=keys.data_ptr(), v=values.data_ptr(), out=out.data_ptr(),
            q_step=_steps(queries), k_step=_steps(keys), v_step=_steps(values), out_step=_steps(out),
            top=address(top), total=address(total),
        )  # fmt: skip
        lib.attention(call, torch.get_num_threads())
        return out


class NativeAttentionBf16(NativeAttention):
    """Products of values rounded to bf16, with sums in fp32. Used with bf16 weights, and with int8 weights, whose error
    is far larger."""

    name = "native-attention-bf16"
    kind = library.Kind.BF16

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        lib = library.library()
        return (
            super().suits(op, shape, policy) and bool(policy.int8 or policy.bf16) and lib is not None and lib.has_bf16
        )


def _steps(x: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """The distances, in elements, between samples, heads and tokens."""
    return (ctypes.c_int64 * 3)(*x.stride()[:3])
