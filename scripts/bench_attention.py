"""Attention by tiler's library against torch's, at the sizes of SD 1.5's UNet and of diffusion transformers: GFLOP/s of
one thread's CPU time, which a busy machine changes little, and the error against fp64.

    python scripts/bench_attention.py [--rounds 6]
    TILER_ISA=v3 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 python scripts/bench_attention.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tiler.compute.choose import KERNELS
from tiler.compute.kernels import Input, Kind, Op, Operands
from tiler.native import library


class Size(NamedTuple):
    """Queries, keys, heads, their width; and how many of the heads are computed here."""

    queries: int
    keys: int
    heads: int
    width: int
    some: int


SIZES = (
    Size(4096, 4096, 8, 40, 2), Size(1024, 1024, 8, 80, 8), Size(256, 256, 8, 160, 8), Size(64, 64, 8, 160, 8),
    Size(4096, 77, 8, 40, 8), Size(1024, 77, 8, 80, 8), Size(4096, 4096, 16, 72, 2), Size(4096, 300, 16, 72, 4),
    Size(4608, 4608, 24, 128, 1),
)  # fmt: skip
ATTENTION = Op(kind=Kind.ATTENTION, input=Input(parts=3))
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def by(name: str) -> Run:
    return lambda *parts: KERNELS[name].apply(ATTENTION, Operands(parts), ())[0]


def parts_of(size: Size) -> tuple[Tensor, ...]:
    tokens = (size.queries, size.keys, size.keys)
    made = (torch.randn(1, n, size.heads * size.width).unflatten(-1, (size.heads, -1)).transpose(1, 2) for n in tokens)
    return tuple(part[:, : size.some] for part in made)


def rates(runs: dict[str, Run], size: Size, parts: tuple[Tensor, ...], rounds: int) -> dict[str, float]:
    """GFLOP/s of each, by turns; the first round does not count."""
    flops = 4 * size.queries * size.keys * size.some * size.width
    times: dict[str, list[float]] = {name: [] for name in runs}
    repeats = max(1, 2_000_000_000 // flops)
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.thread_time()
            for _ in range(repeats):
                run(*parts)
            times[name].append((time.thread_time() - start) / repeats)
    return {name: flops / statistics.median(taken[1:]) / 1e9 for name, taken in times.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    rounds = parser.parse_args().rounds
    if (lib := library.library()) is None:
        raise SystemExit(f"there is no library: {library.fault()}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    runs: dict[str, Run] = {"torch": F.scaled_dot_product_attention, lib.isa: by("native-attention")}
    if lib.has_bf16:
        runs[f"{lib.isa}, in bf16"] = by("native-attention-bf16")
    for run in runs.values():
        run(*parts_of(SIZES[3]))
    for size in SIZES:
        parts = parts_of(size)
        small = q, k, v = tuple(part[:, :1, :512] for part in parts)
        want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        found = rates(runs, size, parts, rounds)
        print(f"{size.queries} × {size.keys}, {size.heads} × {size.width}:")
        for name, run in runs.items():
            error = float((run(*small) - want).norm() / want.norm())
            ratio = found["torch"] / found[name]
            print(f"  {name:16} {found[name]:4.0f} GFLOP/s ({ratio:.2f}×), error {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
