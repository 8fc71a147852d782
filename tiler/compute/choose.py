"""Choose the kernel for an operation: the first suitable one in the order of the processor's table (tuning.py). The
choice depends neither on a clock nor on the ceiling, so the bytes of a picture do not either."""

from __future__ import annotations

from collections.abc import Mapping

from tiler.compute.cpu import Isa
from tiler.compute.fp32 import Fp32
from tiler.compute.kernels import Kernel, Kind, Op, Policy, Shape
from tiler.compute.native import NativeInt8
from tiler.compute.native_attention import NativeAttention, NativeAttentionBf16
from tiler.compute.native_enlarged import EnlargedBf16
from tiler.compute.native_float import NativeBf16, NativeFp32
from tiler.compute.native_winograd import NativeWinograd, NativeWinogradBf16, NativeWinogradLate
from tiler.compute.native_winograd_enlarged import NativeWinogradEnlarged
from tiler.compute.tuning import KERNELS_OF
from tiler.compute.winograd import Winograd

_ALL = (
    Fp32(), Winograd(), NativeInt8(), NativeWinograd(), NativeWinogradLate(), NativeWinogradBf16(),
    NativeWinogradEnlarged(),
    NativeBf16(), NativeFp32(), EnlargedBf16(), NativeAttention(), NativeAttentionBf16(),
)  # fmt: skip
KERNELS: Mapping[str, Kernel] = {kernel.name: kernel for kernel in _ALL}


def choose_kernel(op: Op, shape: Shape | None, policy: Policy, isa: Isa) -> Kernel:
    """The kernel for an operation on a joined input of `shape`, None for any shape."""
    # Elsewhere than where inputs are whole a small one is the end of a larger one. What decides of an attention, how
    # wide its heads are, is that of all.
    seen = shape if policy.one_size or op.kind is Kind.ATTENTION else None
    table = (KERNELS[name] for name in KERNELS_OF[isa][op.kind])
    return next(kernel for kernel in (*policy.prefer, *table) if kernel.suits(op, seen, policy))
