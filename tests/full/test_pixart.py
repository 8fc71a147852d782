"""PixArt-Σ at full width and depth (random weights, made on first use, 2.4 GB; of T5-XXL two blocks): one native tile under
440 MB, and what a poster needs at least."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def full() -> str:
    import make_checkpoint

    command = [sys.executable, make_checkpoint.__file__, "pixart"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("precision", ["int8"])
def test_a_native_tile_stays_under_440_mb_by_the_kernels_own_mark(full: str, tmp_path: Path, precision: str) -> None:
    """One step at 1024² with both halves of a guidance; the process reads VmHWM of itself at its end. There is room for few
    weights only, so nearly all are streamed."""
    code = f"""
import sys
from tiler.cli import main
from tiler.memory import process
process.reset_peak = lambda: False  # one mark for the whole life of the process
sys.argv = ["tiler", "render", "a lighthouse", "--model", {full!r}, "--size", "1024", "--steps", "1", "--no-guide",
            "--max-ram", "440MB", "--seed", "1", "-o", {str(tmp_path / "x.png")!r}, "--precision", {precision!r},
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
    assert peak < 440_000_000
    assert report["predicted_peak_bytes"] == pytest.approx(peak, rel=0.10)
    assert report["denoiser_samples"] == 2


def test_a_poster_of_2048_needs_no_more_than_440_mb(full: str, tmp_path: Path) -> None:
    """The autoencoder's phases need most."""
    command = [sys.executable, "-c", "from tiler.cli.main import main; main()", "plan", "x", "--model", full]
    command += ["--precision", "fp32", "--json", "-o", str(tmp_path / "x.png")]
    planned = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert planned["smallest_max_ram_bytes"] <= 440_000_000
