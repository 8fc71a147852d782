"""Time the kernels on this machine, for `tiler doctor --measure` and scripts/calibrate.py. A run never chooses a kernel
by a clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from tiler.compute import cpu, onednn
from tiler.compute.arena import Arena, Held
from tiler.compute.choose import KERNELS, choose_kernel
from tiler.compute.cpu import Isa, isa
from tiler.compute.int8 import quantize_rows
from tiler.compute.kernels import Group, Input, Kernel, Kind, Op, Operands, Policy, Weight
from tiler.compute.tuning import ARENA_BYTES, KERNELS_OF
from tiler.weights.index import read_index
from tiler.weights.store import SCALE, WeightStore

_NAME = "weight"
_INT8, _BF16 = ("int8", "native-int8"), ("bf16", "native-bf16")  # a precision, and its kernel


class TableShape(NamedTuple):
    """A layer of SD 1.5's size: its weight, and the input (n, channels, h, w) or (n, tokens, width)."""

    kind: Kind
    weight: tuple[int, ...]
    x: tuple[int, ...]

    @property
    def label(self) -> str:
        return f"{self.kind} {'×'.join(map(str, self.x[1:]))} → {self.weight[0]}"

    def op(self) -> Op:
        geometry = onednn.Geometry((1, 1), (1, 1), (1, 1), 1) if self.kind is Kind.CONVOLUTION else None
        weight = Weight(name=_NAME, meta=torch.empty(self.weight, device="meta"))
        return Op(kind=self.kind, weights=Group(weights=(weight,)), geometry=geometry)


TABLE_SHAPES = (
    TableShape(Kind.CONVOLUTION, (320, 320, 3, 3), (1, 320, 64, 64)),
    TableShape(Kind.CONVOLUTION, (640, 640, 3, 3), (1, 640, 32, 32)),
    TableShape(Kind.LINEAR, (320, 320), (1, 4096, 320)),
    TableShape(Kind.LINEAR, (1280, 1280), (1, 256, 1280)),
)


def _policy(kernel: str) -> Policy:
    return Policy(
        int8=frozenset({_NAME} if kernel in _INT8 and cpu.int8().products else ()),
        bf16=frozenset({_NAME} if kernel in _BF16 else ()),
        winograd=True,
        one_size=True,
    )


def _candidates(shape: TableShape) -> list[Kernel]:
    op = shape.op()
    return [kernel for name, kernel in KERNELS.items() if kernel.suits(op, shape.x, _policy(name))]


@torch.no_grad()
def timings(
    shape: TableShape, rounds: int = 5, clock: Callable[[], float] = time.perf_counter, *, only: Kernel | None = None,
    times: int = 1,
) -> dict[str, float]:  # fmt: skip
    """The time in seconds of each kernel that can run a layer of that shape, or of a single kernel, with the weight
    prepared beforehand. Each measurement runs the layer `times` times."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, generator=generator) for size in (shape.weight, shape.x))
    rows, scale = quantize_rows(weight)
    found: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        save_file({_NAME: weight}, Path(folder) / "fp32.safetensors")
        save_file({_NAME: rows, _NAME + SCALE: scale}, Path(folder) / "int8.safetensors")
        for kernel in _candidates(shape) if only is None else [only]:
            file = "int8" if kernel.name in _INT8 else "fp32"
            with _ready(kernel, shape, x, Path(folder) / f"{file}.safetensors") as once:
                found[kernel.name] = median_seconds(partial(_repeat, once, times), rounds, clock) / times
    return found


def _repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


@contextmanager
def _ready(kernel: Kernel, shape: TableShape, x: Tensor, file: Path) -> Iterator[Callable[[], object]]:
    """The layer as a function, with its weight prepared."""
    op = shape.op()
    if x.ndim == 4 and onednn.convolves():
        x = x.contiguous(memory_format=torch.channels_last)
    with WeightStore(read_index(file)) as store:
        place = Held(Arena(ARENA_BYTES), ARENA_BYTES, lambda: False, stays=True)
        prepared = list(kernel.prepare(store, op, shape.x, place))

        yield lambda: kernel.apply(op, kernel.begin(op, Operands((x,))), prepared)


def median_seconds(
    work: Callable[[], object], rounds: int = 5, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The median time of `work` over `rounds`, after one warm-up run."""
    work()
    times = []
    for _ in range(rounds):
        start = clock()
        work()
        times.append(clock() - start)
    return statistics.median(times)


@torch.no_grad()
def chosen_speed(shape: TableShape, precision: str, rounds: int = 5) -> float:
    """The FLOP/s of the kernel chosen on this machine for a layer of that shape in `precision`: fp32, bf16 or int8."""
    kernel = choose_kernel(shape.op(), shape.x, _policy(precision), isa())
    return shape.op().flops(shape.x) / timings(shape, rounds, only=kernel)[kernel.name]


@torch.no_grad()
def call_seconds(rounds: int = 5) -> float:
    """The time of a layer so small that its arithmetic takes none: Python, and the start of a kernel."""
    shape = TableShape(Kind.LINEAR, (64, 64), (1, 16, 64))
    kernel = choose_kernel(shape.op(), shape.x, _policy("fp32"), isa())
    return timings(shape, rounds, only=kernel, times=200)[kernel.name]


@torch.no_grad()
def attention_speed(precision: str, rounds: int = 5) -> float:
    """The FLOP/s of the kernel chosen on this machine for self-attention of 2,048 tokens with two heads of 40, with
    weights in `precision`."""
    q = torch.randn(1, 2, 2048, 40)
    op, x, shape = Op(kind=Kind.ATTENTION, input=Input(parts=3)), Operands((q, q, q)), tuple(q.shape)
    kernel = choose_kernel(op, shape, _policy(precision), isa())
    return op.flops(shape) / median_seconds(lambda: kernel.apply(op, kernel.begin(op, x), ()), rounds)


def table_row(which: Isa, times: Sequence[Mapping[str, float]]) -> dict[str, tuple[str, ...]]:
    """The table's row for a processor: each kind's kernels, ordered by the sum of their `times` for TABLE_SHAPES."""
    row: dict[str, tuple[str, ...]] = {}
    for kind, names in KERNELS_OF[which].items():
        sums = dict.fromkeys(names, 0.0)
        for shape, found in zip(TABLE_SHAPES, times, strict=True):
            for name, seconds in found.items() if shape.kind == kind else ():
                sums[name] = sums.get(name, 0.0) + seconds
        row[kind] = tuple(sorted(sums, key=lambda name: sums[name]))
    return row


def compare() -> list[str]:
    """For each shape and precision, a sentence that says whether the table's choice is the fastest on this machine."""
    sentences = []
    for shape in TABLE_SHAPES:
        times = timings(shape)
        for precision in ("fp32", "bf16", "int8") if "native-bf16" in times else ("fp32", "int8"):
            allowed = {
                name: t
                for name, t in times.items()
                if (name in _INT8) <= (precision == "int8") and (name in _BF16) <= (precision == "bf16")
            }
            chosen = choose_kernel(shape.op(), shape.x, _policy(precision), isa()).name
            fastest = min(allowed, key=lambda name: allowed[name])
            found = ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in sorted(allowed.items(), key=lambda kv: kv[1]))
            verdict = f"{chosen} is the fastest" if chosen == fastest else f"{chosen} is chosen, {fastest} is faster"
            sentences.append(f"{shape.label}, {precision}: {verdict} ({found})")
    return sentences
