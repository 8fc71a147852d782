"""Choose the precision of the denoiser and of the autoencoder. The choice depends on the processor's instructions and
the model, never on a clock or the ceiling, so the bytes of a picture do not either."""

from __future__ import annotations

from tiler.compute.cpu import bf16_is_slow
from tiler.compute.precisions import Arithmetic
from tiler.compute.tuning import LEAST_SPEEDUP
from tiler.errors import UsageError
from tiler.native import library
from tiler.request import DecodePrecision, Precision


def choose_precision(wanted: Precision, channels: int, here: Arithmetic) -> tuple[Precision, str]:
    """The precision of a denoiser with that many channels at its highest resolution, and the reason. AUTO is int8 if
    its pass is LEAST_SPEEDUP times as fast as in fp32 by the processor's table, else bf16 by the same rule, else fp32.
    Raises UsageError for bf16 if this machine cannot compute in it."""
    if wanted is Precision.BF16 and not here.bf16:
        raise _no_bf16("--precision", "int8, fp32 or auto")
    if wanted is not Precision.AUTO:
        return wanted, "as set"
    speedups = here.speedups(channels)
    chosen = next((name for name, times in speedups.items() if times >= LEAST_SPEEDUP), "fp32")
    found = ", ".join(f"{name} has {times:g}×" for name, times in speedups.items()) or "nothing has more than"
    return Precision(chosen), f"{found} fp32's speed with {channels} channels, {here.isa}"


def choose_decode_precision(wanted: DecodePrecision, denoiser: Precision, *, bf16: bool) -> Precision:
    """The precision of the autoencoder beside a denoiser of the given precision. Raises UsageError for bf16 if this
    machine cannot compute in it."""
    if wanted is DecodePrecision.BF16 and not bf16:
        raise _no_bf16("--decode-precision", "fp32 or auto")
    if wanted is DecodePrecision.AUTO:
        return Precision.BF16 if bf16 and denoiser is not Precision.FP32 else Precision.FP32
    return Precision(wanted)


def _no_bf16(option: str, others: str) -> UsageError:
    if why := library.fault_of_file():
        return UsageError(f"{option} bf16: this needs tiler's own kernels, but {why}, or choose {others}")
    if bf16_is_slow():
        return UsageError(
            f"{option} bf16: on this processor, bf16 products take longer than fp32's; choose {others}, or set "
            "TILER_ISA=v4-bf16 to use them all the same"
        )
    return UsageError(
        f"{option} bf16: this needs tiler's own kernels and AVX-512 with BF16 instructions (see `tiler doctor`); choose "
        f"{others}"
    )
