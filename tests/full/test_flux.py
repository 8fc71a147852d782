"""Flux at full width (a block of each kind, random weights, made on first use, 3.5 GB): one native tile under 800
MB."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.full.marks import made, planned, render_peak, shallow, tiny_decoder

pytestmark = pytest.mark.full


@pytest.mark.parametrize("precision", ["int8"])
def test_a_native_tile_stays_under_800_mb_by_the_kernels_own_mark(tmp_path: Path, precision: str) -> None:
    """One step at 1024². The peak does not depend on the depth."""
    options = "--size", "1024", "--steps", "1", "--no-guide", "--precision", precision, *tiny_decoder(tmp_path, 16)
    model = shallow("wide-flux", tmp_path, num_layers=1, num_single_layers=1)
    peak, report = render_peak(tmp_path, "--model", model, *options)
    assert peak < 800_000_000
    assert report["predicted_peak_bytes"] == pytest.approx(peak, rel=0.10)
    assert report["denoiser_samples"] == 1


def test_2048_needs_no_more_than_560_mb(tmp_path: Path) -> None:
    said = planned(made("flux"), tmp_path)
    assert said["smallest_max_ram_bytes"] <= 560_000_000
    assert said["denoiser_samples"] == 28 + 10 * 9
