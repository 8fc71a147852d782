"""Whatever stops a render after its last step, the job keeps the finished canvas, and the same command makes the picture of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Runs `tiler render`; the decoder never gives a strip: `{stop}` happens instead.
PROGRAM = """
import os, signal, sys
import tiler.cli.main as main
from tiler.errors import BudgetExceeded, NumericalError, StorageError
import tiler.phases
real, strips = tiler.phases.to_uint8, []
def to_uint8(strip):
    strips.append(1)
    if len(strips) == 1:
        {stop}
    return real(strip)
tiler.phases.to_uint8 = to_uint8
sys.argv = ["tiler", *{args!r}]
main.main()
"""
STOPS = {
    "nan": ("raise NumericalError('NaN or Inf in the decoder')", 7),
    "the ceiling": ("raise BudgetExceeded('the ceiling was reached')", 5),
    "a full disk": ("raise StorageError('writing failed (No space left on device)')", 6),
    "SIGINT": ("os.kill(os.getpid(), signal.SIGINT)", 130),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", 143),
    "SIGKILL": ("os.kill(os.getpid(), signal.SIGKILL)", -9),
}


def arguments(model: Path, output: Path) -> list[str]:
    options = "--width 132 --height 130 --steps 2 --seed 3 --decode exact --precision fp32 --guide-upscale latent -q"
    return ["render", "a boat", "--model", str(model), "-o", str(output), *options.split()]


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The picture of an undisturbed render."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(PROGRAM.format(stop="pass", args=arguments(tiny, folder / "x.png")), folder)
    assert done.returncode == 0, done.stderr
    return (folder / "x.png").read_bytes()


@pytest.mark.parametrize("cause", STOPS)
def test_the_same_command_goes_on_with_the_finished_canvas(
    tiny: Path, tmp_path: Path, whole: bytes, cause: str
) -> None:
    stop, code = STOPS[cause]
    done = run(PROGRAM.format(stop=stop, args=arguments(tiny, tmp_path / "x.png")), tmp_path)
    assert done.returncode == code, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.png.tiler"]
    assert code == -9 or "the job is saved at canvas step 2/2" in done.stderr
    words = ["resume", "x.png", "-q"] if code == 130 else arguments(tiny, tmp_path / "x.png")
    again = run(f"from tiler.cli.main import main; import sys; sys.argv = {['tiler', *words]!r}; main()", tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "x.png").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
