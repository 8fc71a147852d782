"""`--precision auto`: the first of int8 and bf16 that the processor's table says to be 1.3 times as fast as fp32."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiler.compute.cpu import Int8, Isa
from tiler.compute.precisions import Arithmetic, arithmetic
from tiler.compute.tuning import SPEEDUPS_OF, Speedup
from tiler.planning.precision import choose_precision
from tiler.request import Precision

RUNS, DOES_NOT = Int8(False, True, "8-bit weights"), Int8(False, False, "fp32 arithmetic")


@pytest.mark.parametrize(
    ("speedup", "int8", "bf16", "chosen"),
    [
        ((1.3, 1.9), RUNS, True, Precision.INT8),
        ((1.29, 1.3), RUNS, True, Precision.BF16),
        ((1.29, 1.29), RUNS, True, Precision.FP32),
        ((1.29, 1.3), RUNS, False, Precision.FP32),
        ((1.3, 1.3), DOES_NOT, True, Precision.BF16),
        ((1.3, 1.3), DOES_NOT, False, Precision.FP32),
    ],
)
def test_auto_takes_what_is_fast_enough(
    speedup: tuple[float, float], int8: Int8, bf16: bool, chosen: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SPEEDUPS_OF, Isa.AVX2, {0: Speedup(1, 1), 100: Speedup(*speedup), 1000: Speedup(9, 9)})
    here = Arithmetic(Isa.AVX2, int8, bf16)
    for channels in (100, 999):
        precision, why = choose_precision(Precision.AUTO, channels, here)
        assert precision is chosen
        assert f"with {channels} channels, avx2" in why
        assert (f"int8 has {speedup[0]:g}×" in why) is int8.products and (f"bf16 has {speedup[1]:g}×" in why) is bf16
    assert choose_precision(Precision.AUTO, 99, here)[0] is Precision.FP32
    assert choose_precision(Precision.INT8, 99, here) == (Precision.INT8, "as set")


def test_every_row_begins_with_the_narrowest_models() -> None:
    assert all(min(rows) == 0 for rows in SPEEDUPS_OF.values()) and set(SPEEDUPS_OF) == set(Isa)


def test_a_render_says_what_auto_took_and_why(in_process, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = arithmetic()
    if not here.int8.products:
        pytest.skip("no 8-bit products here")
    monkeypatch.setitem(SPEEDUPS_OF, here.isa, {0: Speedup(2.5, 1)})
    planned = in_process("plan", "x", "-m", tiny, "--size", 64)
    assert planned.code == 0, planned.err
    assert " ".join(planned.out.split()).count("denoiser: int8 (int8 has 2.5×") == 1
    assert "int8" in in_process("doctor", "--json").json["--precision auto"]
