"""3 × 3 convolutions by oneDNN and by tiler/compute/winograd.py: milliseconds, and each one's rounding against fp64.

    python scripts/bench_conv.py
    ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 python scripts/bench_conv.py

oneDNN reorders its weight at every call. Transforming a weight comes once for all samples of a pass, and stands last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tiler.compute import onednn, winograd
from tiler.compute.measure import median_seconds
from tiler.memory import process

SHAPES = [
    (320, 320, 64),
    (640, 320, 64),
    (960, 320, 64),
    (640, 640, 64),
    (640, 640, 32),
    (256, 256, 64),
    (128, 128, 64),
]


@torch.no_grad()
def main() -> None:
    process.frugal_allocator()
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
