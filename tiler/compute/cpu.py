"""What this machine's processor can do. Imports no torch."""

from __future__ import annotations

import platform
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tiler.native.library import forced, library, missing

_KNOWN = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "fphp",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
_DOT_PRODUCT = ("avx512_vnni", "avx_vnni", "amx_int8")


@cache
def flags() -> tuple[str, ...]:
    """The instruction sets that matter here, by Linux's names; none where /proc/cpuinfo is missing. Without those above
    the set that TILER_ISA names. Raises UsageError where the processor does not have that."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    have = {
        word
        for line in text.splitlines()
        if line.startswith(("flags", "Features"))
        for word in line.split(":", 1)[1].split()
    }
    if (isa := forced()) is not None:
        if not have.issuperset(isa.needs):
            raise missing(isa)
        have -= set(isa.above)
    return tuple(flag for flag in _KNOWN if flag in have)


def prepacks() -> bool:
    """Whether oneDNN's own order of a convolution's weight is known to pay: measured on x86 only."""
    return "avx2" in flags()


class Isa(StrEnum):
    """Instruction sets that kernels are chosen by."""

    AVX512_VNNI = "avx512-vnni"
    AVX512 = "avx512"
    AVX2_VNNI = "avx2-vnni"
    AVX2 = "avx2"
    BASE = "base"


def isa() -> Isa:
    """This processor's row of the table in tuning.py."""
    have = flags()
    if "avx512f" in have:
        return Isa.AVX512_VNNI if "avx512_vnni" in have else Isa.AVX512
    if "avx2" in have:
        return Isa.AVX2_VNNI if "avx_vnni" in have else Isa.AVX2
    return Isa.BASE


def computed_by() -> str:
    """Who computes, and with which instructions: where this is the same, so are a seed's bytes."""
    found = library()
    return f"torch {isa()}" if found is None else f"tiler {found.isa}, torch {isa()}"


class Int8(NamedTuple):
    """How 8-bit products are computed: weights take whole values in ±`largest`, activations 255 steps. Without
    `products` arithmetic is in fp32, of weights stored as int8. `dot` says whether there are dot-product
    instructions."""

    largest: int
    products: bool
    dot: bool
    why: str

    @property
    def auto(self) -> str:
        """Why `--precision auto` takes it, which is where there are such instructions, or does not."""
        if self.dot:
            return self.why
        return f"int8 is {'faster here but coarser' if self.products else 'only smaller here'}: {self.why}"


def int8() -> Int8:
    """What int8 means on this processor.

    Without dot-product instructions oneDNN adds pairs of products in 16 bits (vpmaddubsw): 2 × 255 × 127 overflows
    there, 2 × 255 × 64 does not. With 127 steps of activations and of weights a UNet call of SD 1.5's size lost half as
    much again.
    """
    if dot := [flag for flag in _DOT_PRODUCT if flag in flags()]:
        return Int8(127, True, True, f"8-bit weights, {dot[0]}")
    if "avx2" in flags():
        return Int8(64, True, False, "7-bit weights, AVX2 without VNNI adds products in 16 bits")
    return Int8(127, False, False, f"8-bit weights, fp32 arithmetic, {platform.machine()} without AVX2")
