"""The capabilities of this machine's processor. Imports no torch."""

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
    """The relevant instruction sets of this processor, by Linux's names; empty without /proc/cpuinfo. Sets above the
    one that TILER_ISA names are left out. Raises UsageError if the processor does not have that one."""
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


def has_avx2() -> bool:
    return "avx2" in flags()


def bf16_is_slow() -> bool:
    """Whether tiler's library leaves out this processor's products of bf16 because they take longer than fp32's."""
    found = library()
    return found is not None and found.isa == "v4" and "avx512_bf16" in flags()


class Isa(StrEnum):
    """The instruction sets that the kernel table distinguishes."""

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
    """The library that computes, and its instruction set. A seed's bytes are equal wherever this is equal."""
    found = library()
    return f"torch {isa()}" if found is None else f"tiler {found.isa}, torch {isa()}"


class Int8(NamedTuple):
    """How 8-bit products are computed. Weights have integer values in ±127, activations 255 steps. With `adds_fours`,
    four products are added in 16 bits, which limits the weights of four. Without `products`, int8 weights are expanded
    to fp32."""

    adds_fours: bool
    products: bool
    why: str


def int8() -> Int8:
    """The form of int8 on this processor; the library computes the products. Without dot-product instructions they are
    added in 16 bits (vpmaddubsw), two by the processor and two such sums by the kernel, which saves a quarter of the
    instructions: Quantise in kernels.h."""
    if not has_avx2():
        return Int8(False, False, f"8-bit weights, fp32 arithmetic, {platform.machine()} without AVX2")
    dot = next((flag for flag in _DOT_PRODUCT if flag in flags()), None)
    if (kernels := library()) is None:
        return Int8(False, False, "8-bit weights, fp32 arithmetic without tiler's own library")
    if dot is None or kernels.isa == "v3":  # a processor may hide some of the instructions that a set needs
        return Int8(True, True, "8-bit weights, limited because AVX2 without VNNI adds products in 16 bits")
    return Int8(False, True, f"8-bit weights, {dot}")
