"""The measured constants of memory/, and what a measured constant has to carry."""

from __future__ import annotations

from typing import Annotated, NamedTuple


class Passport(NamedTuple):
    """What a constant is counted in, and the command that measured it."""

    unit: str
    command: str


# What a plan may fill; the rest is for what no plan sees.
MARGIN: Annotated[float, Passport("share of the ceiling", "python scripts/calibrate.py memory")] = 0.97
# Weights that merely save reading leave more room than the batch does.
RESIDENT_MARGIN: Annotated[float, Passport("share of the ceiling", "python scripts/calibrate.py memory")] = 0.95
# From which use on freed memory is given back; an autoencoder planned above it came to 784 and 791 MB of 800.
NEAR: Annotated[float, Passport("share of the ceiling", "python scripts/calibrate.py memory")] = 0.88
# From which on garbage is collected too before going on.
ALMOST: Annotated[float, Passport("share of the ceiling", "python scripts/calibrate.py memory")] = 0.92
# Of freed memory that an autoencoder's strips leave in the heap; with 64 MiB decoding took half as long again.
HEAP_KEPT: Annotated[int, Passport("bytes", "python scripts/bench_decode.py")] = 96 * 2**20
# Where a plan leaves no room for that: an eighth slower.
HEAP_KEPT_TIGHT: Annotated[int, Passport("bytes", "python scripts/bench_decode.py")] = 24 * 2**20
# Between layers of a UNet; below it a small model spends a tenth of its time on giving memory back.
HEAP_WORTH_RELEASING: Annotated[int, Passport("bytes", "python scripts/profile_pass.py --model mini")] = 8 * 2**20
# Of freed memory that stays where the ceiling is far above the plan; SD 1.5's UNet has use for 160 MB.
ROOMY: Annotated[int, Passport("bytes", "python scripts/profile_pass.py --ceiling 4000000000")] = 256 * 2**20
