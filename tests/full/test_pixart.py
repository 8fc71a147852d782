"""PixArt-Σ at full width (random weights, made on first use, 2.4 GB; T5-XXL with two blocks): one native tile
under 440 MB, and the smallest ceiling of a poster."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.full.marks import made, peak_of, planned, render_peak, shallow, tiny_decoder

pytestmark = pytest.mark.full


@pytest.mark.parametrize("precision", ["int8"])
def test_a_native_tile_stays_under_440_mb_by_the_kernels_own_mark(tmp_path: Path, precision: str) -> None:
    """One sample at 1024², through 8 of 28 blocks. Few weights fit in memory, so nearly all are streamed."""
    options = "--size", "1024", "--steps", "1", "--no-guide", "--cfg-scale", "1", "--max-ram", "440MB"
    options = *options, "--precision", precision, *tiny_decoder(tmp_path)
    peak, report = render_peak(tmp_path, "--model", shallow("pixart", tmp_path, num_layers=8), *options)
    assert peak < 440_000_000
    assert report["predicted_peak_bytes"] == pytest.approx(peak, rel=0.10)
    assert report["denoiser_samples"] == 1


def test_its_decoder_stays_under_440_mb_by_the_kernels_own_mark(tmp_path: Path) -> None:
    """Rows of 1024 pixels; their number does not show in the peak."""
    save_file({"latents": torch.randn(1, 4, 40, 128)}, tmp_path / "z.safetensors")
    options = "--model", made("pixart"), "--max-ram", "440MB", "--decode", "exact"
    peak, report = peak_of(tmp_path, "decode", str(tmp_path / "z.safetensors"), *options)
    assert peak < 440_000_000
    assert peak <= report["predicted_peak_bytes"] < 1.25 * peak  # few rows leave fewer holes than a tall picture's


def test_a_poster_of_2048_needs_no_more_than_420_mb(tmp_path: Path) -> None:
    """The autoencoder's phases need the most."""
    assert planned(made("pixart"), tmp_path)["smallest_max_ram_bytes"] <= 420_000_000
