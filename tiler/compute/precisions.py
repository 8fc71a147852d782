"""The arithmetic that this machine has, and how fast it is by the table of tuning.py."""

from __future__ import annotations

from typing import NamedTuple

from tiler.compute import cpu
from tiler.compute.cpu import Int8, Isa
from tiler.compute.tuning import SPEEDUPS_OF
from tiler.native.library import has_bf16


class Arithmetic(NamedTuple):
    """The row of the processor, its form of int8, and whether products may be of bf16."""

    isa: Isa
    int8: Int8
    bf16: bool

    def speedups(self, channels: int) -> dict[str, float]:
        """How many times as fast as in fp32 a denoiser with that many channels at its highest resolution is in int8 and
        in bf16, as far as this machine has such products."""
        rows = SPEEDUPS_OF[self.isa]
        row = rows[max(least for least in rows if least <= channels)]
        runs = {"int8": self.int8.products, "bf16": self.bf16}
        return {name: times for name, times in row._asdict().items() if runs[name]}


def arithmetic() -> Arithmetic:
    """That of this machine."""
    return Arithmetic(cpu.isa(), cpu.int8(), has_bf16())
