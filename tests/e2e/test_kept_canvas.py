"""Whatever stops a render after its last step, the finished canvas becomes a file, and the line that is printed finishes it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    "a bug": ("raise ZeroDivisionError('x')", 1),
    "nan": ("raise NumericalError('NaN or Inf in the decoder')", 7),
    "the ceiling": ("raise BudgetExceeded('the ceiling was reached')", 5),
    "a refused allocation": ("raise MemoryError", 5),
    "a full disk": ("raise StorageError('writing failed (No space left on device)')", 6),
    "SIGINT": ("os.kill(os.getpid(), signal.SIGINT)", 130),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", 143),
}


def arguments(model: Path, output: Path) -> list[str]:
    options = "--width 132 --height 130 --steps 2 --seed 3 --decode exact --precision fp32 --guide-upscale latent -q"
    return ["render", "a boat", "--model", str(model), "-o", str(output), *options.split()]


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The picture of an undisturbed render."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(PROGRAM.format(stop="pass", args=arguments(tiny, folder / "x.png")), folder)
    assert done.returncode == 0, done.stderr
    return np.array(Image.open(folder / "x.png"))


@pytest.mark.parametrize("cause", STOPS)
def test_a_finished_canvas_becomes_a_file(tiny: Path, tmp_path: Path, whole: np.ndarray, cause: str) -> None:
    stop, code = STOPS[cause]
    done = run(PROGRAM.format(stop=stop, args=arguments(tiny, tmp_path / "x.png")), tmp_path)
    assert done.returncode == code, done.stderr
    assert not (tmp_path / "x.png").exists()
    assert (tmp_path / "x.png.latents.safetensors").exists()
    command = next(line for line in done.stderr.splitlines() if line.startswith("tiler decode "))
    finished = run(
        f"from tiler.cli.main import main; import sys; sys.argv = {[*shlex.split(command), '-q', '--decode', 'exact']!r}; main()",
        tmp_path,
    )
    assert finished.returncode == 0, finished.stderr
    picture = Image.open(tmp_path / "x.png")
    assert np.array_equal(np.array(picture), whole)
    assert "a boat" in picture.text["parameters"]


def test_latents_that_were_saved_anyway_are_named(tiny: Path, tmp_path: Path) -> None:
    args = [*arguments(tiny, tmp_path / "x.png"), "--save-latents", str(tmp_path / "mine.safetensors")]
    done = run(PROGRAM.format(stop="raise ZeroDivisionError", args=args), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.safetensors"]
    assert "tiler decode" in done.stderr
    assert "mine.safetensors" in done.stderr


def test_where_the_outputs_folder_takes_nothing_the_temporary_folder_does(tiny: Path, tmp_path: Path) -> None:
    stop = """
        import tiler.phases as phases
        real_save = phases.save_latents
        def full(path, *args, **options):
            if str(path).startswith(os.path.dirname(sys.argv[6])):
                raise StorageError("No space left on device")
            real_save(path, *args, **options)
        phases.save_latents = full
        raise StorageError("writing failed (No space left on device)")
    """.strip()
    (tmp_path / "out").mkdir()
    (tmp_path / "temporary").mkdir()
    code = PROGRAM.format(stop=stop, args=arguments(tiny, tmp_path / "out/x.png"))
    done = run(f"import os; os.environ['TMPDIR'] = {str(tmp_path / 'temporary')!r}\n{code}", tmp_path)
    assert done.returncode == 6, done.stderr
    assert list((tmp_path / "out").iterdir()) == []
    kept = tmp_path / "temporary/x.png.latents.safetensors"
    assert kept.exists()
    assert str(kept) in done.stderr
