"""The instruction sets that the library is compiled for. Imports nothing: the build reads it too."""

from __future__ import annotations

from typing import NamedTuple


class InstructionSet(NamedTuple):
    """`cpu` is the compiler's name for it; `needs` are the Linux flags that distinguish it from the previous ones,
    `above` those that count as missing when a better processor is limited to it."""

    name: str
    machine: str
    cpu: str
    needs: tuple[str, ...]
    above: tuple[str, ...]

    @property
    def symbol(self) -> str:
        return self.name.replace("-", "_")


_AMX = ("amx_tile", "amx_int8")
_512 = ("avx512f", "avx512_vnni", "avx512_bf16", *_AMX)

# From the least to the most, as in library.c.
SETS = (
    InstructionSet("v3", "x86_64", "x86_64_v3", ("avx2",), ("avx_vnni", *_512)),
    InstructionSet("v3-vnni", "x86_64", "x86_64_v3+avxvnni", ("avx2", "avx_vnni"), _512),
    InstructionSet("v4", "x86_64", "x86_64_v4+avx512vnni", ("avx512f", "avx512_vnni"), ("avx512_bf16", *_AMX)),
    InstructionSet("v4-bf16", "x86_64", "x86_64_v4+avx512vnni+avx512bf16", ("avx512_vnni", "avx512_bf16"), _AMX),
    InstructionSet("neon", "aarch64", "baseline", (), ("asimddp", "i8mm", "bf16", "sve")),
    InstructionSet("dotprod", "aarch64", "baseline+dotprod", ("asimddp",), ("i8mm", "bf16", "sve")),
    InstructionSet("i8mm", "aarch64", "baseline+dotprod+i8mm", ("asimddp", "i8mm"), ("bf16", "sve")),
)


def machine_of(name: str) -> str:
    """The compiler's name for `platform.machine()`."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name.lower(), name.lower())
