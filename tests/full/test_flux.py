"""Flux at full width (two blocks of each kind, random weights, made on first use, 3.5 GB): one native tile under 800 MB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full


def made(kind: str) -> str:
    import make_checkpoint

    done = subprocess.run([sys.executable, make_checkpoint.__file__, kind], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("precision", ["int8"])
def test_a_native_tile_stays_under_800_mb_by_the_kernels_own_mark(tmp_path: Path, precision: str) -> None:
    """One step at 1024²; the process reads VmHWM of itself at its end. Depth does not show in the peak."""
    code = f"""
import sys
from tiler.cli import main
from tiler.memory import process
process.reset_peak = lambda: False  # one mark for the whole life of the process
sys.argv = ["tiler", "render", "a lighthouse", "--model", {made("wide-flux")!r}, "--size", "1024", "--steps", "1",
            "--no-guide", "--seed", "1", "-o", {str(tmp_path / "x.png")!r}, "--precision", {precision!r},
            "--report", {str(tmp_path / "r.json")!r}, "--quiet"]
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
    assert report["denoiser_samples"] == 1


def test_2048_needs_no_more_than_560_mb(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from tiler.cli.main import main; main()", "plan", "x", "--model", made("flux")]
    command += ["--precision", "fp32", "--json", "-o", str(tmp_path / "x.png")]
    planned = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert planned["smallest_max_ram_bytes"] <= 560_000_000
    assert planned["denoiser_samples"] == 28 + 10 * 9
