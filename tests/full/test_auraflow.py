"""AuraFlow at full width, of sparse files: what a poster needs at least, and what the plan knows of the whole model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full


def test_a_poster_of_2048_needs_no_more_than_560_mb(tmp_path: Path) -> None:
    from checkpoints import auraflow

    auraflow.write(tmp_path / "model", "full")
    command = [sys.executable, "-c", "from tiler.cli.main import main; main()", "plan", "x"]
    command += ["--model", str(tmp_path / "model"), "--precision", "fp32", "--json", "-o", str(tmp_path / "x.png")]
    planned = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert planned["smallest_max_ram_bytes"] <= 560_000_000
    assert planned["denoiser_samples"] == 2 * (50 + round(50 * 0.48) * 9)
