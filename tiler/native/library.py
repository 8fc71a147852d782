"""The compiled library: its location, whether it runs here, and its functions through ctypes.

`TILER_KERNELS=0` turns it off; `TILER_ISA` names a lower instruction set than the best (instructions.py). The handle
lasts as long as the process; its threads start at the first call that uses them, and start again in a forked child.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

from tiler.errors import UsageError
from tiler.native.instructions import SETS, InstructionSet, machine_of

_INSTALL = "install tiler again (pip install -e . in its folder)"
VERSION = 10  # of the structs below: that of kernels.h


class Kind(IntEnum):
    """The content of a 32-bit lane in a product: 4 int8, 2 bf16 or 1 fp32."""

    INT8, BF16, FP32 = range(3)


class Type(IntEnum):
    """The dtype of written values."""

    UINT8, BF16, FP32 = range(3)


class Activation(IntEnum):
    """The activation after a product's bias."""

    NONE, SILU, GELU, GELU_TANH = range(4)


class Product(Structure):
    """kernels.h documents the fields; pointers are addresses, 0 or None for a missing operand."""

    _fields_ = (
        *((name, c_int32) for name in ("kind", "activation", "out_type", "taps")),
        *((name, c_int64) for name in ("rows", "outputs", "steps")),
        ("a", c_void_p),
        ("row_bytes", c_int64),
        *((name, c_int64) for name in ("per_image", "width", "image_bytes", "line_bytes", "place_bytes")),
        *((name, c_void_p) for name in ("tap", "weights", "weight_scale", "weight_sum")),
        *((name, c_void_p) for name in ("gate_weights", "gate_scale", "gate_bias", "gate_sum", "scale", "zero")),
        *((name, c_int64) for name in ("scale_rows", "zero_step")),
        *((name, c_void_p) for name in ("bias", "residual", "out")),
        *((name, c_int64) for name in ("out_step", "residual_step", "out_width", "out_line")),
        ("beside", c_void_p),
    )


class Rows(Structure):
    """See kernels.h."""

    _fields_ = (
        ("x", c_void_p),
        *((name, c_int64) for name in ("rows", "width", "step")),
        ("gamma", c_void_p),
        ("beta", c_void_p),
        ("eps", c_float),
        *((name, c_int32) for name in ("norm", "out_type", "rotated")),
        ("out", c_void_p),
        ("out_bytes", c_int64),
        ("scale", c_void_p),
    )


class Image(Structure):
    """See kernels.h."""

    _fields_ = (
        ("x", c_void_p * 2),
        ("channels", c_int64 * 2),
        *((name, c_int64) for name in ("images", "height", "width", "padding", "padding_lines")),
        *((name, c_int32) for name in ("groups", "silu", "out_type", "each_place")),
        ("eps", c_float),
        *((name, c_void_p) for name in ("gamma", "beta", "given", "out")),
        ("place_bytes", c_int64),
        *((name, c_void_p) for name in ("scale", "zero", "scratch")),
    )


class Moments(Structure):
    """As in kernels.h."""

    _fields_ = (
        ("x", c_void_p),
        *((name, c_int64) for name in ("places", "channels", "groups")),
        ("scratch", c_void_p),
        ("out", c_void_p),
    )


class Sums(Structure):
    """See kernels.h."""

    _fields_ = (("weights", c_void_p), ("blocks", c_int64), ("lanes", c_int64), ("sum", c_void_p))


class Quantise(Structure):
    """See kernels.h."""

    _fields_ = (
        ("x", c_void_p),
        *((name, c_int64) for name in ("outputs", "inputs", "taps")),
        ("out", c_void_p),
        ("scale", c_void_p),
    )


class Pack(Structure):
    """See kernels.h."""

    _fields_ = (
        *((name, c_int32) for name in ("kind", "is_transformed", "enlarged")),
        *((name, c_int64) for name in ("outputs", "inputs", "taps")),
        ("rows", c_void_p),
        ("out", c_void_p),
        ("point_bytes", c_int64),
    )


class Winograd(Structure):
    """See kernels.h."""

    _fields_ = (
        *((name, c_int32) for name in ("kind", "enlarged")),
        *((name, c_int64) for name in ("images", "lines", "places", "channels", "height", "width", "outputs")),
        ("a", c_void_p),
        ("image_step", c_int64),
        ("weights", c_void_p),
        ("point_bytes", c_int64),
        *((name, c_void_p) for name in ("bias", "residual", "out")),
        *((name, c_int64) for name in ("out_step", "residual_step")),
        ("seen", c_void_p),
        ("products", c_void_p),
    )


class Attention(Structure):
    """See kernels.h; the steps are distances between samples, heads and tokens."""

    _fields_ = (
        ("kind", c_int32),
        ("scale", c_float),
        *((name, c_int64) for name in ("samples", "heads", "queries", "keys", "dims")),
        *((name, c_void_p) for name in ("q", "k", "v", "out")),
        *((name, c_int64 * 3) for name in ("q_step", "k_step", "v_step", "out_step")),
        ("top", c_void_p),
        ("total", c_void_p),
    )


ATTENTION_DIMS = 512  # of a head, at most: as in attention.h
PLACES, STATISTICS = 128, 4  # as in image.h
WINOGRAD_SIDE, WINOGRAD_POINTS, WINOGRAD_TILES = 4, 36, 96  # as in kernels.h
ENLARGED_POINTS, ENLARGED_SEEN = 25, 16  # as there
MOST_TAPS = 9  # of a weight that is packed: as in pack.h


def scratch_floats(images: int, places: int, channels: int) -> int:
    """The scratch size of `Library.image` for images of `places` pixels: statistics of each panel, and two factors of
    each channel."""
    return images * channels * (-(-places // PLACES) * STATISTICS + 2)


class Library:
    """The functions of one instruction set, and its threads. Results depend neither on the number of threads nor on
    concurrent callers; a second caller's work runs in its own thread meanwhile."""

    def __init__(self, functions: ctypes.CDLL, handle: int) -> None:
        self._functions, self._handle = functions, handle
        self.isa: str = functions.tiler_isa(handle).decode()

    @property
    def has_bf16(self) -> bool:
        """Whether products may be of bf16 values."""
        return self.isa.endswith("bf16")

    def product(self, product: Product, threads: int) -> None:
        self._functions.tiler_product(self._handle, product, threads)

    def rows(self, rows: Rows, threads: int) -> None:
        self._functions.tiler_rows(self._handle, rows, threads)

    def image(self, image: Image, threads: int) -> None:
        self._functions.tiler_image(self._handle, image, threads)

    def moments(self, moments: Moments, threads: int) -> None:
        self._functions.tiler_moments(self._handle, moments, threads)

    def attention(self, attention: Attention, threads: int) -> None:
        self._functions.tiler_attention(self._handle, attention, threads)

    def sums(self, sums: Sums, threads: int) -> None:
        self._functions.tiler_sums(self._handle, sums, threads)

    def quantise(self, quantise: Quantise, threads: int) -> None:
        self._functions.tiler_quantise(self._handle, quantise, threads)

    def pack(self, pack: Pack, threads: int) -> None:
        self._functions.tiler_pack(self._handle, pack, threads)

    def winograd(self, winograd: Winograd, threads: int) -> None:
        self._functions.tiler_winograd(self._handle, winograd, threads)


def file_name() -> str:
    """The library's file, beside this one."""
    return "kernels.dylib" if sys.platform == "darwin" else "kernels.so"


def forced() -> InstructionSet | None:
    """The instruction set that TILER_ISA names. Raises UsageError for one that this type of machine cannot have."""
    if not (name := os.environ.get("TILER_ISA", "")):
        return None
    here = [s for s in SETS if s.machine == machine_of(platform.machine())]
    for known in here:
        if known.name == name:
            return known
    raise UsageError(
        f"TILER_ISA={name}: unknown here; choose from {', '.join(s.name for s in here)}, or leave it unset"
    )


def missing(isa: InstructionSet) -> UsageError:
    """The message about an instruction set that this processor lacks."""
    return UsageError(f"TILER_ISA={isa.name}: this processor does not have it; choose a lower one, or leave it unset")


@cache
def _find() -> Library | str:
    if os.environ.get("TILER_KERNELS") == "0":
        return "turned off by TILER_KERNELS=0"
    path = Path(__file__).with_name(file_name())
    if not path.exists():
        return "not built"
    try:
        functions = ctypes.CDLL(str(path))
        version = functions.tiler_version()
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded ({error}); {_INSTALL}"
    if version != VERSION:
        return f"{path.name} is of another version of tiler; {_INSTALL}"
    _declare(functions)
    isa = forced()
    handle = functions.tiler_open(isa.name.encode() if isa else b"")
    if handle is None:
        if isa is not None:
            raise missing(isa)
        return "this processor has none of the instruction sets"
    return Library(functions, handle)


def _declare(functions: Any) -> None:
    functions.tiler_open.argtypes, functions.tiler_open.restype = [ctypes.c_char_p], c_void_p
    functions.tiler_isa.argtypes, functions.tiler_isa.restype = [c_void_p], ctypes.c_char_p
    for name, struct in (
        ("product", Product),
        ("rows", Rows),
        ("image", Image),
        ("moments", Moments),
        ("sums", Sums),
        ("attention", Attention),
        ("pack", Pack),
        ("winograd", Winograd),
        ("quantise", Quantise),
    ):
        function = getattr(functions, f"tiler_{name}")
        function.argtypes, function.restype = [c_void_p, POINTER(struct), c_int], None


def library() -> Library | None:
    """The library for the instruction set that TILER_ISA names, else for the fastest one here. Raises UsageError if
    this processor lacks the named one."""
    found = _find()
    return found if isinstance(found, Library) else None


def has_bf16() -> bool:
    """Whether there is a library whose products may be of bf16."""
    found = library()
    return found is not None and found.has_bf16


def fault() -> str:
    """The reason why there is no library, or ""."""
    found = _find()
    return "" if isinstance(found, Library) else found


def fault_of_file() -> str:
    """The reason why a library that was built is not used, and what to do; "" if there is none, or none was built."""
    why = fault()
    return why if why.endswith(_INSTALL) else ""
