"""What the tests of full-size checkpoints share: checkpoints, and what the program says of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def made(kind: str) -> str:
    """The folder of a checkpoint of make_checkpoint.py, in its cache."""
    import make_checkpoint

    done = subprocess.run([sys.executable, make_checkpoint.__file__, kind], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def tiny_decoder(folder: Path, channels: int = 4) -> tuple[str, ...]:
    """Options for a decoder that costs seconds: where the denoiser decides the peak, and the decoder is the one of
    other tests."""
    from diffusers import AutoencoderTiny

    AutoencoderTiny(latent_channels=channels).half().save_pretrained(folder / "taesd")
    return "--decode", "tiny", "--tiny-vae", str(folder / "taesd")


def render_peak(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The peak of `tiler render "a lighthouse" --seed 1` with `arguments`, VmHWM read by the process itself at its end,
    one mark for its whole life; and its report. Files go to `folder`."""
    outputs = "-o", str(folder / "x.png"), "--report", str(folder / "r.json"), "--cache-dir", str(folder / "packed")
    words = ["tiler", "render", "a lighthouse", "--seed", "1", *outputs, "--quiet", *arguments]
    code = f"""
import sys
from tiler.cli import main
from tiler.memory import process
process.reset_peak = lambda: False
sys.argv = {words!r}
try:
    main.main()
except SystemExit as done:
    assert not done.code, done.code
print(process.read_rss().peak)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]), json.loads((folder / "r.json").read_text())


def planned(model: str | Path, folder: Path, precision: str = "fp32", *more: str) -> dict[str, Any]:
    """What `tiler plan` says of a 2048² poster, or of what `more` options say."""
    command = [sys.executable, "-c", "from tiler.cli.main import main; main()", "plan", "x", "--model", str(model)]
    command += ["--precision", precision, "--json", "-o", str(folder / "x.png"), *more]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found
