"""SD 3.5 large at full width (two blocks, T5-XXL with two layers, random weights, made on first use, 2.4 GB): one
native tile under 800 MB, and the smallest ceiling of a poster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.full.marks import made, planned, render_peak, tiny_decoder

pytestmark = pytest.mark.full


@pytest.mark.parametrize("precision", ["int8"])
def test_a_native_tile_stays_under_800_mb_by_the_kernels_own_mark(tmp_path: Path, precision: str) -> None:
    """One step at 1024² with both halves of the guidance. The peak does not depend on the depth."""
    options = "--size", "1024", "--steps", "1", "--no-guide", "--precision", precision
    peak, report = render_peak(tmp_path, "--model", made("wide-sd3"), *options, *tiny_decoder(tmp_path, 16))
    assert peak < 800_000_000
    assert report["predicted_peak_bytes"] == pytest.approx(peak, rel=0.15)
    assert report["denoiser_samples"] == 2


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 460_000_000),
        ({"qk_norm": "rms_norm", "dual_attention_layers": list(range(13)), "pos_embed_max_size": 384}, 460_000_000),
        (
            {"qk_norm": "rms_norm", "num_attention_heads": 38, "caption_projection_dim": 2432, "num_layers": 38},
            515_000_000,
        ),
    ],
    ids=["3", "3.5 medium", "3.5 large"],
)
def test_a_poster_of_2048_needs_no_more(changes: dict[str, Any], most: int, tmp_path: Path) -> None:
    """According to the plan, from sparse files, without T5."""
    from checkpoints import sd3

    sd3.write(tmp_path / "model", "full", sparse=True, **changes)
    assert planned(tmp_path / "model", tmp_path)["smallest_max_ram_bytes"] <= most
