"""HunyuanDiT and Lumina-Next at full width with few blocks (random weights, made on first use, 2 GB each): one
native tile under its ceiling, a plan close to the kernel's mark, and the smallest ceiling of a poster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.full.marks import made, planned, render_peak, tiny_decoder

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        "TILER_TEST_WIDE" not in os.environ, reason="minutes, and 2 GB for each family; TILER_TEST_WIDE=1 runs them"
    ),
]


@pytest.mark.parametrize(("kind", "ceiling_mb"), [("wide-hunyuandit", 470), ("wide-lumina", 480)], ids=str)
def test_a_native_tile_stays_under_its_ceiling_by_the_kernels_own_mark(
    tmp_path: Path, kind: str, ceiling_mb: int
) -> None:
    """One sample at 1024². Measured, MB: 434 of 444 planned, 409 of 454."""
    options = "--size", "1024", "--steps", "1", "--no-guide", "--cfg-scale", "1", "--max-ram", f"{ceiling_mb}MB"
    options = *options, "--precision", "fp32", *tiny_decoder(tmp_path)
    peak, report = render_peak(tmp_path, "--model", made(kind), *options)
    assert peak < ceiling_mb * 10**6
    assert report["predicted_peak_bytes"] == pytest.approx(peak, rel=0.12)
    assert report["denoiser_samples"] == 1


@pytest.mark.parametrize(("kind", "most_mb"), [("wide-hunyuandit", 450), ("wide-lumina", 460)], ids=str)
def test_a_poster_of_2048_needs_no_more(tmp_path: Path, kind: str, most_mb: int) -> None:
    assert planned(made(kind), tmp_path)["smallest_max_ram_bytes"] <= most_mb * 10**6
