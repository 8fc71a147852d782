"""Every measured constant of compute/ and planning/, with its passport; and which kernel runs where. Imports no torch.

A passport is a constant's unit and the command that measured it; the comment says what was seen. Those of memory/ are in
memory/tuning.py. `scripts/calibrate.py` measures again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from tiler.compute.cpu import Isa
from tiler.memory.tuning import Passport

# The kernels that may run an operation, best first; the first that suits the operation is taken. Transformed convolutions took
# 0.5 of oneDNN's time at 320 and 640 channels with AVX-512, 0.4 with AVX2; the others differ from those two in their 8-bit
# products alone. Where there is no AVX2 nothing was measured but that fp32 works.
_X86 = {
    "linear": ("native-int8", "int8", "fp32"),
    "convolution": ("native-int8", "int8", "winograd", "onednn", "fp32"),
    "attention": ("fp32",),
}
KERNELS_OF: Annotated[
    Mapping[Isa, Mapping[str, tuple[str, ...]]], Passport("order", "python scripts/calibrate.py kernels")
] = {
    Isa.AVX512_VNNI: _X86,
    Isa.AVX512: _X86,
    Isa.AVX2_VNNI: _X86,
    Isa.AVX2: _X86,
    Isa.BASE: {kind: ("fp32",) for kind in _X86},
}

# Of a convolution's inputs and outputs: with fewer, going back and forth takes what the products save.
WINOGRAD_CHANNELS: Annotated[int, Passport("channels", "python scripts/bench_conv.py")] = 256
# At which a product is made at a time, and the fewest for which it pays to transform a weight.
WINOGRAD_PLACES: Annotated[int, Passport("tiles of 4 × 4 pixels", "python scripts/bench_conv.py")] = 64

# Of the samples that run together where weights are int8, whose sums are exact: those of one sample of SD 1.5's second level.
# Its inner levels would be many small products.
GROUP_ELEMENTS: Annotated[int, Passport("elements", "python scripts/profile_pass.py --precision int8")] = 640 * 32 * 32
# The largest unit of SD 1.5 worth holding is its widest feed-forward, 78.7 MB.
ARENA_BYTES: Annotated[int, Passport("bytes", "python scripts/profile_pass.py")] = 76 * 2**20

# Freed blocks between live ones, as a share of one sample's activations: 40–57 MB of 139 for SD 1.5, 65–89 of 230 for SD 2.1,
# whatever the batch.
HEAP_SLACK: Annotated[float, Passport("share", "python scripts/calibrate.py memory")] = 0.37
# Where the weights' arena is small, and memory always short: 18 MB of 106.
TIGHT_HEAP_SLACK: Annotated[float, Passport("share", "python scripts/calibrate.py memory")] = 0.2
# What int8 weights, packed and freed unit by unit, leave of holes (SD 1.5, 1024² under 600 MB: 595 MB, 570 planned without it).
# Nothing where memory is always short.
INT8_HOLES_BYTES: Annotated[int, Passport("bytes", "python scripts/calibrate.py memory")] = 27_000_000
# Code of torch, oneDNN and MKL, and the kernels these compile at first use.
LIBRARIES_BYTES: Annotated[int, Passport("bytes", "python scripts/calibrate.py memory")] = 86_000_000
# Freed blocks between live ones, as a share of resident weights.
RESIDENT_SLACK: Annotated[float, Passport("share", "python scripts/calibrate.py memory")] = 0.18
