"""AuraFlow at full width, from sparse files: the smallest ceiling of a poster, and the plan of the complete model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.full.marks import planned

pytestmark = pytest.mark.full


def test_a_poster_of_2048_needs_no_more_than_560_mb(tmp_path: Path) -> None:
    from checkpoints import auraflow

    auraflow.write(tmp_path / "model", "full")
    said = planned(tmp_path / "model", tmp_path)
    assert said["smallest_max_ram_bytes"] <= 560_000_000
    assert said["denoiser_samples"] == 2 * (50 + round(50 * 0.48) * 9)
