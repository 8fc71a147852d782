"""Whatever stops a render after its last step, the job keeps the finished canvas, and the same command makes the
picture from it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Ran
from tiler.errors import BudgetExceeded, NumericalError, StorageError, TilerError

# Runs `tiler render`; when the decoder gives its first strip, the process gets a signal.
PROGRAM = """
import os, sys
import tiler.cli.main as main
import tiler.pixels
real, strips = tiler.pixels.to_uint8, []
def to_uint8(strip):
    strips.append(1)
    if len(strips) == 1:
        os.kill(os.getpid(), {number})
    return real(strip)
tiler.pixels.to_uint8 = to_uint8
sys.argv = ["tiler", *{args!r}]
main.main()
"""
STOPS: dict[str, tuple[TilerError | signal.Signals, int]] = {
    "nan": (NumericalError("NaN or Inf in the decoder"), 7),
    "the ceiling": (BudgetExceeded("the ceiling was reached"), 5),
    "a full disk": (StorageError("writing failed (No space left on device)"), 6),
    "SIGINT": (signal.SIGINT, 130),
    "SIGKILL": (signal.SIGKILL, -9),
}


def arguments(model: Path, output: Path) -> list[str]:
    options = "--width 76 --height 66 --steps 2 --seed 3 --decode exact --precision fp32 --guide-upscale latent -q"
    return ["render", "a boat", "--model", str(model), "-o", str(output), *options.split()]


@pytest.fixture(scope="module")
def wholes() -> list[bytes]:
    """The picture of an undisturbed render, made once."""
    return []


@pytest.mark.parametrize("cause", STOPS)
def test_the_same_command_goes_on_with_the_finished_canvas(
    in_process: Any,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wholes: list[bytes],
    cause: str,
) -> None:
    if not wholes:
        assert in_process(*arguments(tiny, tmp_path / "whole.png")).code == 0
        wholes.append((tmp_path / "whole.png").read_bytes())
        (tmp_path / "whole.png").unlink()
    stop, code = STOPS[cause]
    words = arguments(tiny, tmp_path / "x.png")
    if isinstance(stop, TilerError):

        def refuse(strip: object) -> np.ndarray:
            raise stop

        with monkeypatch.context() as patch:
            patch.setattr("tiler.pixels.to_uint8", refuse)
            ran = in_process(*words)
    else:
        program = PROGRAM.format(number=int(stop), args=words)
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        ran = Ran(done.returncode, done.stdout, done.stderr)
    assert ran.code == code, ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["x.png.tiler"]
    assert code == -9 or "the job is saved at pass " in ran.err
    again = in_process(*(["resume", "x.png", "-q"] if code == 130 else arguments(tiny, tmp_path / "x.png")))
    assert again.code == 0, again.err
    assert (tmp_path / "x.png").read_bytes() == wholes[0]
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
