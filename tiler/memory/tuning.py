"""The measured constants of memory/, and the record that every measured constant carries."""

from __future__ import annotations

from typing import Annotated, NamedTuple


class Passport(NamedTuple):
    """The unit of a constant, and the command that measured it."""

    unit: str
    command: str


# The share that a plan may fill; the rest is for memory that no plan predicts.
MARGIN: Annotated[float, Passport("share of the ceiling", "python scripts/calibrate.py memory")] = 0.97
# Resident weights only save reading, so they leave more room than the batch does.
RESIDENT_MARGIN: Annotated[float, Passport("share of the ceiling", "python scripts/calibrate.py memory")] = 0.95
# From this use on, freed memory is released; an autoencoder planned above it reached 784 and 791 MB of 800.
NEAR: Annotated[float, Passport("share of the ceiling", "python scripts/calibrate.py memory")] = 0.88
# From this use on, garbage is collected as well.
ALMOST: Annotated[float, Passport("share of the ceiling", "python scripts/calibrate.py memory")] = 0.92
# Freed memory that an autoencoder's strips may leave in the heap; with 64 MiB decoding took 1.5 times as long.
HEAP_KEPT: Annotated[int, Passport("bytes", "python scripts/bench_decode.py")] = 96 * 2**20
# The same if the plan leaves no room for that: an eighth slower.
HEAP_KEPT_TIGHT: Annotated[int, Passport("bytes", "python scripts/bench_decode.py")] = 24 * 2**20
# Released between layers of a UNet; below it a small model spends a tenth of its time on releasing memory.
HEAP_WORTH_RELEASING: Annotated[int, Passport("bytes", "python scripts/profile_pass.py --model mini")] = 8 * 2**20
# The same if there is twice as much between the plan and NEAR: `mini` then takes 5–7 instead of 14–17 s of system time
# for 1024², and passes take 10 MB more, which is still less than planned.
HEAP_WORTH_RELEASING_ROOMY: Annotated[int, Passport("bytes", "python scripts/saving.py render --model mini")] = (
    64 * 2**20
)
# Freed memory that a denoiser's samples reuse, where a read of the weights then still serves HEAP_SAMPLES of them: a
# pass of SD 1.5 in int8 takes 0.93–0.95 of the time a sample with 10 samples and 88 MB as with 13 and none, and has 40
# thousand instead of 100 thousand page faults (Zen 5, two threads).
HEAP_REUSED: Annotated[int, Passport("bytes", "python scripts/bench.py unet --only int8")] = 88 * 2**20
HEAP_SAMPLES: Annotated[int, Passport("samples", "python scripts/bench.py unet --only int8")] = 8
# Freed memory that stays if the ceiling is far above the plan; SD 1.5's UNet reuses 160 MB.
ROOMY: Annotated[int, Passport("bytes", "python scripts/profile_pass.py --ceiling 4000000000")] = 256 * 2**20
# Ceilings from which an autoencoder's tensors have huge pages, 17 MB more; under smaller ones they were not measured.
# It is what a queue's own process leaves of 800 MB.
HUGE_PAGES_FROM: Annotated[int, Passport("bytes", "python scripts/bench.py decode")] = 780_000_000
