"""All measured constants of compute/ and planning/ with their passports, and the table of kernels. Imports no torch.

A passport states a constant's unit and the command that measured it; a comment says what was observed. The constants of
memory/ are in memory/tuning.py. `scripts/calibrate.py` measures them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, NamedTuple

from tiler.compute.cpu import Isa
from tiler.memory.tuning import Passport

# The order for every processor on which the library's kernels are those of AVX2.
_CONVOLUTION_BY_AVX2 = (
    "native-int8", "native-winograd-enlarged", "native-winograd", "native-winograd-late", "winograd", "native-fp32",
    "fp32",
)  # fmt: skip
# The kernels that may run an operation, best first; the first that suits the operation is taken. Times are of one
# thread of a Zen 4 server, limited to the row's instructions: 3 × 3 convolutions of 320 channels at 64 × 64 and of 640
# at 32 × 32, as shares of oneDNN's 68 and 67 ms (AVX2: 78 and 88); linear layers 4096 × 320 × 320 and 256 × 1280 ×
# 1280, of fp32's 9.4 and 8.8 ms (AVX512: 11.1 and 9.4; AVX2: 11.6 and 11.0). Attention (scripts/bench_attention.py):
# 4096 tokens of 8 × 40, 1024 of 8 × 80, 256 of 8 × 160; 4096 × 77 of 8 × 40, 4608 of 24 × 128, as shares of torch's
# time.
KERNELS_OF: Annotated[
    Mapping[Isa, Mapping[str, tuple[str, ...]]], Passport("order", "python scripts/calibrate.py kernels")
] = {
    # native-int8 0.27 and 0.27, native-winograd 0.35 and 0.32, winograd 0.47 and 0.40, native-fp32 1.03 and 1.06, which
    # joins, norms and activates its input on the way; native-enlarged-bf16 is for upsamplers alone (a pass of SD 1.5 in
    # bf16: 8.20 s instead of 8.40); linear: native-int8 0.28 and 0.24, native-fp32 0.88 and 0.90; native-attention
    # 0.82, 0.83, 0.91; 0.63, 0.84; -bf16 0.45, 0.47, 0.51; 0.46, 0.48.
    Isa.AVX512_VNNI: {
        "linear": ("native-int8", "native-bf16", "native-fp32", "fp32"),
        "convolution": (
            "native-enlarged-bf16",
            "native-int8",
            "native-winograd-enlarged",
            "native-winograd",
            "native-bf16",
            "native-winograd-late",
            "native-fp32",
            "winograd",
            "fp32",
        ),
        "attention": ("native-attention-bf16", "native-attention", "fp32"),
    },
    # The library's kernels are those of AVX2: native-winograd 0.42 and 0.38, winograd 0.47 and 0.43, native-int8 0.54
    # and 0.56, native-fp32 1.08 and 1.25; linear: native-int8 0.44 and 0.45, native-fp32 0.83 and 0.93. native-int8
    # still comes first for weights stored as int8: see AVX2. Attention was not measured against torch's of AVX-512.
    Isa.AVX512: {
        "linear": ("native-int8", "native-fp32", "fp32"),
        "convolution": _CONVOLUTION_BY_AVX2,
        "attention": ("fp32",),
    },
    # Not measured, because no such processor was available: the 8-bit products are those of AVX512_VNNI at half the
    # width, everything else is as in AVX2.
    Isa.AVX2_VNNI: {
        "linear": ("native-int8", "fp32"),
        "convolution": _CONVOLUTION_BY_AVX2,
        "attention": ("native-attention", "fp32"),
    },
    # native-winograd 0.46 and 0.37, winograd 0.46 and 0.38, native-int8 0.54 and 0.59, native-fp32 1.29 and 1.22;
    # linear: native-int8 0.58 and 0.54, native-fp32 1.01 and 1.14; native-attention 0.86, 0.91, 0.93; 0.73, 1.01.
    # On a Zen 3 server, which has AVX2 alone: native-winograd 0.53 and 0.31, winograd 0.56 and 0.33, native-int8
    # 0.57 and 0.54, native-fp32 1.25 and 1.04; linear, of 14.6 and 13.2 ms: native-int8 0.59 and 0.50, native-fp32
    # 0.85 and 0.85; native-attention, changed since it was measured on Zen 4, 0.74, 0.82, 0.86; 0.60, 0.81 (before:
    # 0.82, 0.97, 1.03; 0.70, 0.95); a pass of SD 1.5 in fp32, two samples, 21.4–23.3 s with native-fp32 and
    # 22.9–23.4 with fp32. In int8, a pass of ten samples took 71.8 s there with int8 first and 72.3 with
    # native-winograd first; int8 products have since become 1.19 times as fast. The 78 convolutions of SD 1.5 that
    # are not transformed, Zen 4: native-fp32 2.83 s a sample, fp32 2.87, oneDNN with weights in its own order 2.41,
    # which was not worth a kernel. On Zen 3, native-winograd-late takes 0.6 of native-fp32's time for 1280 channels at
    # 16 × 16, 0.5 for two such samples and for eight at 8 × 8, 0.5 for 960 at 32 × 32 (one at 8 × 8: 1.1).
    Isa.AVX2: {
        "linear": ("native-int8", "native-fp32", "fp32"),
        "convolution": _CONVOLUTION_BY_AVX2,
        "attention": ("native-attention", "fp32"),
    },
    # Not measured: fp32 is known to work.
    Isa.BASE: {"linear": ("fp32",), "convolution": ("fp32",), "attention": ("fp32",)},
}

# Channels at a denoiser's highest resolution: with fewer, as in `mini`, quantising takes much of the time that 8-bit
# products save.
INT8_CHANNELS: Annotated[int, Passport("channels", "python scripts/calibrate.py precisions")] = 192
# The same for transformers, whose layers are all linear, apart from attention.
TRANSFORMER_CHANNELS: Annotated[int, Passport("channels", "python scripts/calibrate.py precisions")] = 1024


class Speedup(NamedTuple):
    """How many times as fast as in fp32 a denoiser's pass is in int8 and in bf16."""

    int8: float
    bf16: float


_NO_GAIN = Speedup(1, 1)
# By the least channels at a denoiser's highest resolution. Processor time of one thread of a Zen 4 server, limited to
# the row's instructions: passes of `mini`, of SD 1.5's size, and of SD 3.5 large's width, two samples each;
# the lower of two runs where there were two. `mini` in int8 is at the edge of what `auto` asks for: 1.25 and 1.33 with
# VNNI, 1.30 and 1.32 on AVX2. A render's reads serve more samples, which favours fp32, whose weights take longer to
# prepare: it counts as 1.2. On a Zen 5, by a clock, with two threads and 9 or 10 samples a read (bench.py unet): SD
# 1.5's size has 2.1 in int8 and 1.6 in bf16. On a Zen 3: 1.12, 1.47, 1.61. On Emerald Rapids, whose bf16 products are
# slow (library.c), with attention in bf16: 1.42 and 0.57 at SD 1.5's size, 0.85 and 0.69 for `mini`, which has 1.08
# with attention in fp32.
SPEEDUPS_OF: Annotated[
    Mapping[Isa, Mapping[int, Speedup]], Passport("ratio", "python scripts/calibrate.py precisions")
] = {
    Isa.AVX512_VNNI: {0: Speedup(1.2, 1.1), INT8_CHANNELS: Speedup(2.4, 1.7), TRANSFORMER_CHANNELS: Speedup(2.8, 1.9)},
    Isa.AVX512: {0: Speedup(1.2, 1), INT8_CHANNELS: Speedup(1.5, 1), TRANSFORMER_CHANNELS: Speedup(1.6, 1)},
    # Not measured, because no such processor was available: at least what AVX2 gains, whose products of int8 take
    # twice the instructions.
    Isa.AVX2_VNNI: {0: Speedup(1.2, 1), INT8_CHANNELS: Speedup(1.6, 1), TRANSFORMER_CHANNELS: Speedup(1.7, 1)},
    Isa.AVX2: {0: Speedup(1.2, 1), INT8_CHANNELS: Speedup(1.6, 1), TRANSFORMER_CHANNELS: Speedup(1.7, 1)},
    # Not measured: int8 weights are computed with in fp32.
    Isa.BASE: {0: _NO_GAIN},
}
# `--precision auto` takes int8, or else bf16, if it is so many times as fast as fp32. A choice, no measurement: a
# smaller gain is not worth the error.
LEAST_SPEEDUP: Annotated[float, Passport("ratio", "python scripts/calibrate.py precisions")] = 1.3

# Least inputs and outputs of a convolution: with fewer, the transforms take the time that the products save.
WINOGRAD_CHANNELS: Annotated[int, Passport("channels", "python scripts/bench_conv.py")] = 256
# The same for tiler's own library: 3.0 ms instead of 6.8 for 13 samples of 96 channels at 16 × 16, 6.4 instead of 8.9
# for 48 at 32 × 32, 3.7 instead of 8.8 for a row of 64 at 32 × 256 (Zen 3, one thread).
# With weights in bf16 128 is the least that was measured.
NATIVE_WINOGRAD_CHANNELS: Annotated[int, Passport("channels", "python scripts/bench_conv.py")] = 48
NATIVE_WINOGRAD_BF16_CHANNELS: Annotated[int, Passport("channels", "python scripts/bench_conv.py")] = 128
# The tiles of one product, and the fewest tiles for which transforming a weight pays.
WINOGRAD_PLACES: Annotated[int, Passport("tiles of 4 × 4 pixels", "python scripts/bench_conv.py")] = 64
# Least pixels of a sample's result for tiler's own library, which transforms the tiles of several samples together. A
# sample by itself at 8 × 8, with a weight that is transformed at each call, takes 1.1 of a direct convolution's time.
NATIVE_WINOGRAD_PIXELS: Annotated[int, Passport("pixels", "python scripts/bench_conv.py")] = 64

# Elements of the samples that run together: one sample of SD 1.5's second level. Its inner levels would otherwise be
# many small products, and in `mini` Python would take a third of the time (Zen 3, fp32, 16 samples a read: 59 ms a
# sample one by one, 38 together).
GROUP_ELEMENTS: Annotated[int, Passport("elements", "python scripts/profile_pass.py --precision int8")] = 640 * 32 * 32
# Elements of a GroupNorm at a time, where torch computes it: its intermediate values stay in the cache between two
# steps (320 channels, 64 × 64: 1.35 ms; 1.56 with half as many and 1.44 with twice as many).
NORM_ELEMENTS: Annotated[int, Passport("elements", "TILER_KERNELS=0 python scripts/profile_pass.py")] = 2**18
# Elements of a feed-forward's projection at a time: 6.3 MB, which the allocator need not map again each time; but no
# fewer tokens than keep the product efficient.
FEED_FORWARD_ELEMENTS: Annotated[int, Passport("elements", "python scripts/profile_pass.py")] = 3 * 2**19
FEED_FORWARD_TOKENS: Annotated[int, Passport("tokens", "python scripts/profile_pass.py")] = 256
# The same if an arena of the usual size cannot hold its weights, so that every further chunk would read them again:
# just enough to leave SD 1.5's second level (1024 × 5120) in one piece.
FEED_FORWARD_ELEMENTS_READ: Annotated[int, Passport("elements", "python scripts/profile_pass.py")] = 5 * 2**20

# The largest unit of SD 1.5 worth holding is its widest feed-forward, 78.7 MB.
ARENA_BYTES: Annotated[int, Passport("bytes", "python scripts/profile_pass.py")] = 76 * 2**20

# If a ceiling leaves no room to hold SD 1.5's larger resnets and feed-forwards: their layers run one by one, everything
# else as units.
TIGHT_ARENA_BYTES: Annotated[int, Passport("bytes", "python scripts/profile_pass.py --ceiling 500000000")] = 12 * 2**20

# The time of complete passes of a denoiser over that of its layers' arithmetic at measured speeds. The rest is norms,
# activations, smaller layers, and in fp32 layers whose convolutions are not transformed. At SD 1.5's size, processor
# time of one thread, in four rounds: fp32 1.96–2.21 (2.05 if torch computes), bf16 1.48–1.59, int8 1.36–1.45. Since
# inner convolutions are transformed too, fp32 takes 0.83 of the time at 1.1 of the measured speed (Zen 3).
OVERHEAD_FP32: Annotated[float, Passport("ratio", "python scripts/profile_pass.py")] = 1.9
OVERHEAD_BF16: Annotated[float, Passport("ratio", "python scripts/profile_pass.py --precision bf16")] = 1.5
OVERHEAD_INT8: Annotated[float, Passport("ratio", "python scripts/profile_pass.py --precision int8")] = 1.5
# The same for an autoencoder, in fp32 and in bf16, over the time that its convolutions would take at the speed of a
# transformed one in fp32 (Zen 4, processor time of one thread, 256²: `exact` 3.3 and 2.2 s, 0.4 of them packing
# weights; `frozen`, which transforms no convolution and packs weights again for each strip, 7.1 and 4.5). Since
# upsamplers are transformed from the small image, `exact` takes 0.92 of what it took (Zen 3, 2048 × 256; it was 1.25).
OVERHEAD_BY_LAYERS: Annotated[float, Passport("ratio", "python scripts/bench_decode.py")] = 1.15
OVERHEAD_BY_LAYERS_BF16: Annotated[float, Passport("ratio", "python scripts/bench_decode.py")] = 0.8
OVERHEAD_BY_ROWS: Annotated[float, Passport("ratio", "python scripts/bench_decode.py")] = 3.1
OVERHEAD_BY_ROWS_BF16: Annotated[float, Passport("ratio", "python scripts/bench_decode.py")] = 2.0
# One layer of a denoiser for one sample, or for small samples together, beside its arithmetic: Python, the start of
# operators, checks, blending; and the weights of one layer prepared for the samples that share a read. Both in calls of
# a layer without arithmetic, which are timed on the machine (measure.py): 27 µs on a Zen 3 server, where renders of
# mini at 512² and 1024² took 257 µs and about 300 µs of one thread's processor time, with 16 samples or one sharing a
# read, before samples ran together.
RUN_CALLS: Annotated[float, Passport("calls", "python scripts/remaining.py")] = 9.5
LOAD_CALLS: Annotated[float, Passport("calls", "python scripts/remaining.py")] = 11.0
# An autoencoder or a UNet with layers narrower than NARROW has this much more overhead, times the difference of the
# widths' inverses: norms and files take time by value, of which narrow layers have more for each operation (mini,
# processor time of one thread: decoding, 16 channels, takes 4.2 times its arithmetic at 1024², 5.7 without the
# library).
NARROW: Annotated[int, Passport("channels", "python scripts/remaining.py")] = 128
OVERHEAD_NARROW: Annotated[float, Passport("channels", "python scripts/remaining.py")] = 60.0
# The same for a UNet (mini on a Zen 3, in seconds of a clock: two threads 29–31 at 1024² and 76–89 at 2048², one thread
# 35 at 1024²).
OVERHEAD_NARROW_DENOISER: Annotated[float, Passport("channels", "python scripts/remaining.py --wall")] = 80.0

# Freed blocks between live ones, as a share of one sample's activations: 40–57 MB of 139 for SD 1.5, 65–89 of 230 for
# SD 2.1, whatever the batch.
HEAP_SLACK: Annotated[float, Passport("share", "python scripts/calibrate.py memory")] = 0.37
# The same if the weights' arena is small and memory always short: 18 MB of 106. Also if int8 weights are read in the
# order of tiler's own kernels: with the larger share, SD 1.5, 1024² under 800 MB, had 688 MB while 760 were planned.
TIGHT_HEAP_SLACK: Annotated[float, Passport("share", "python scripts/calibrate.py memory")] = 0.2
# The same if the activations are few blocks of many MB, each a mapping of its own: without any slack, Flux at full
# width and 1024² had 607 MB while 632 were planned, int8 678 while 724 were planned.
MAPPED_HEAP_SLACK: Annotated[float, Passport("share", "python -m pytest -m full tests/full/test_flux.py")] = 0.02
# The same if fp32 weights are packed into the order of tiler's own kernels as they are read: with no slack here and for
# resident weights, SD 1.5 at 768² had 725 MB and SDXL's width at 1024² 726 while 760 were planned; with the shares
# above, 668 and 636.
PACKED_HEAP_SLACK: Annotated[float, Passport("share", "python -m pytest -m full tests/full/test_full_size.py")] = 0.1
# Code of torch, oneDNN and MKL that has not run when the models are built, and the kernels that these libraries compile
# at first use.
LIBRARIES_BYTES: Annotated[int, Passport("bytes", "python scripts/calibrate.py memory")] = 67_000_000
# The same while prompts are encoded, which comes before any convolution; the tokenizer included.
TEXT_LIBRARIES_BYTES: Annotated[int, Passport("bytes", "python scripts/calibrate.py memory")] = 45_000_000
# Freed blocks between live ones, as a share of resident weights.
RESIDENT_SLACK: Annotated[float, Passport("share", "python scripts/calibrate.py memory")] = 0.18
# The same for fp32 weights in the order of tiler's own kernels.
PACKED_RESIDENT_SLACK: Annotated[float, Passport("share", "python -m pytest -m full tests/full/test_full_size.py")] = (
    0.05
)
