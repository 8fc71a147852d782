"""The measured constants of memory/, and what a measured constant has to carry."""

from __future__ import annotations

from typing import Annotated, NamedTuple


class Passport(NamedTuple):
    """What a constant is counted in, and the command that measured it."""

    unit: str
    command: str


# Of freed memory that an autoencoder's strips leave in the heap; with 64 MiB decoding took half as long again.
HEAP_KEPT: Annotated[int, Passport("bytes", "python scripts/bench_decode.py")] = 96 * 2**20
# Where a plan leaves no room for that: an eighth slower.
HEAP_KEPT_TIGHT: Annotated[int, Passport("bytes", "python scripts/bench_decode.py")] = 24 * 2**20
# Between layers of a UNet; below it a small model spends a tenth of its time on giving memory back.
HEAP_WORTH_RELEASING: Annotated[int, Passport("bytes", "python scripts/profile_pass.py --model mini")] = 8 * 2**20
# Of freed memory that stays where the ceiling is far above the plan; SD 1.5's UNet has use for 160 MB.
ROOMY: Annotated[int, Passport("bytes", "python scripts/profile_pass.py --ceiling 4000000000")] = 256 * 2**20
