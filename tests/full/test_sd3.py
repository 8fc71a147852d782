"""SD 3.5 large at full width (two blocks, T5-XXL of two layers, random weights, made on first use, 2.4 GB): one native tile
under 800 MB; and what a poster needs at least."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def wide() -> str:
    import make_checkpoint

    command = [sys.executable, make_checkpoint.__file__, "wide-sd3"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("precision", ["fp32"])
def test_a_native_tile_stays_under_800_mb_by_the_kernels_own_mark(wide: str, tmp_path: Path, precision: str) -> None:
    """One step at 1024² with both halves of a guidance; the process reads VmHWM of itself at its end. Depth does not show in the
    peak."""
    code = f"""
import sys
from tiler.cli import main
from tiler.memory import process
process.reset_peak = lambda: False  # one mark for the whole life of the process
sys.argv = ["tiler", "render", "a lighthouse", "--model", {wide!r}, "--size", "1024", "--steps", "1", "--no-guide",
            "--seed", "1", "-o", {str(tmp_path / "x.png")!r}, "--precision", {precision!r},
            "--cache-dir", {str(tmp_path / "packed")!r}, "--report", {str(tmp_path / "r.json")!r}, "--quiet"]
try:
    main.main()
except SystemExit as done:
    assert not done.code, done.code
print(process.read_rss().peak)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    report = json.loads((tmp_path / "r.json").read_text())
    assert peak < 800_000_000
    assert report["predicted_peak_bytes"] == pytest.approx(peak, rel=0.10)
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
    """By the plan, of sparse files, without T5."""
    from checkpoints import sd3

    sd3.write(tmp_path / "model", "full", sparse=True, **changes)
    command = [
        sys.executable,
        "-c",
        "from tiler.cli.main import main; main()",
        "plan",
        "x",
        "--model",
        tmp_path / "model",
    ]
    command += ["--precision", "fp32", "--json", "-o", str(tmp_path / "x.png")]
    planned = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert planned["smallest_max_ram_bytes"] <= most
