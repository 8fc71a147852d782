"""3 × 3 convolutions in fp32: by oneDNN and by tiler/compute/winograd.py, each one's milliseconds and its rounding
against fp64; and by the kernels of tiler's library, in bf16 too where the processor has it: milliseconds of one thread.

    python scripts/bench_conv.py
    ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 python scripts/bench_conv.py

oneDNN reorders its weight at every call. Transforming a weight comes once for all samples of a pass, and stands last;
`native-winograd-late` does so at each call, for weights that an arena cannot hold transformed.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from tiler.compute import onednn, winograd
from tiler.compute.choose import KERNELS
from tiler.compute.kernels import Kind
from tiler.compute.measure import TableShape, median_seconds, timings
from tiler.compute.tuning import ARENA_BYTES
from tiler.memory import process
from tiler.native.library import has_bf16, library

SHAPES = [
    (320, 320, 64),
    (640, 320, 64),
    (960, 320, 64),
    (640, 640, 64),
    (640, 640, 32),
    (256, 256, 64),
    (128, 128, 64),
]


# (channels, outputs, height, width, samples): those of `mini`, of an autoencoder's strip, of SD 1.5's inner levels.
OWN_SHAPES = [
    (48, 48, 32, 32, 13),
    (96, 96, 16, 16, 13),
    (64, 64, 32, 256, 1),
    (128, 128, 32, 256, 1),
    (960, 640, 32, 32, 1),
    (1280, 1280, 16, 16, 1),
    (1280, 1280, 16, 16, 2),
    (1280, 1280, 8, 8, 1),
    (1280, 1280, 8, 8, 8),
]
OWN_KERNELS = ["native-winograd", "native-winograd-late", "native-fp32"]
OWN_KERNELS_BF16 = ["native-winograd-bf16", "native-bf16"]


def by_the_library() -> None:
    torch.set_num_threads(1)
    names = OWN_KERNELS + (OWN_KERNELS_BF16 if has_bf16() else [])
    for channels, outputs, height, width, samples in OWN_SHAPES:
        shape = TableShape(Kind.CONVOLUTION, (outputs, channels, 3, 3), (samples, channels, height, width))
        found: dict[str, float] = {}
        for kernel in (KERNELS[name] for name in names):
            if kernel.held_bytes(shape.op(), shape.x) <= ARENA_BYTES:
                found |= timings(shape, 9, time.thread_time, only=kernel)
        print(
            f"{samples} × {shape.label}:",
            ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in found.items()),
            flush=True,
        )


@torch.no_grad()
def main() -> None:
    process.frugal_allocator()
    by_onednn()
    if library() is not None:
        by_the_library()


def by_onednn() -> None:
    for channels, outputs, side in SHAPES:
        x = torch.randn(1, channels, side, side).to(memory_format=torch.channels_last)
        weight, bias = torch.randn(outputs, channels, 3, 3) / (3 * channels**0.5), torch.randn(outputs)
        exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)[0]
        geometry = onednn.Geometry((1, 1), (1, 1), (1, 1), 1)

        def direct(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            return onednn.plain_convolution(x, weight, bias, geometry)[0]  # noqa: B023

        taps, out = weight.permute(2, 3, 1, 0).contiguous(), torch.empty(side, side, outputs).permute(2, 0, 1)
        room = torch.empty(winograd.TILE**2, channels, outputs)
        transform = 1e3 * median_seconds(lambda: winograd.transform(taps, room), 3)  # noqa: B023
        other = 1e3 * median_seconds(lambda: winograd.conv2d(x[0], room, bias, out), 11)  # noqa: B023
        one, errors = (
            1e3 * median_seconds(direct, 11),
            [float((y - exact).norm() / exact.norm()) for y in (direct(), out)],
        )
        print(
            f"{channels:4} → {outputs:3}, {side}²: oneDNN {one:5.1f} ms ({errors[0]:.0e})  transformed {other:5.1f} ms "
            f"({errors[1]:.0e}), {other / one:.2f}×; the weight {transform:.1f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
