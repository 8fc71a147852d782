"""What the tests of full-size checkpoints share: the checkpoints, and the memory that the program reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def made(kind: str) -> str:
    """The folder of a checkpoint made by make_checkpoint.py, in its cache."""
    import make_checkpoint

    if (folder := make_checkpoint.CACHE / kind).exists():
        return str(folder)
    done = subprocess.run([sys.executable, make_checkpoint.__file__, kind], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def shallow(kind: str, folder: Path, **depth: int) -> str:
    """A checkpoint with fewer blocks, which its transformer's config counts; it is linked into `folder`, and the files
    hold more tensors than the model has."""
    whole, found = Path(made(kind)), folder / kind
    found.mkdir()
    for path in whole.iterdir():
        if path.name != "transformer":
            (found / path.name).symlink_to(path)
    (found / "transformer").mkdir()
    for path in (whole / "transformer").iterdir():
        if path.name != "config.json":
            (found / "transformer" / path.name).symlink_to(path)
    config = json.loads((whole / "transformer/config.json").read_text())
    assert depth.keys() <= config.keys()
    (found / "transformer/config.json").write_text(json.dumps(config | depth))
    return str(found)


def tiny_decoder(folder: Path, channels: int = 4) -> tuple[str, ...]:
    """Options for a decoder that takes a second, for tests in which the denoiser decides the peak."""
    from diffusers import AutoencoderTiny

    widths = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (16,) * 4)
    AutoencoderTiny(latent_channels=channels, **widths).half().save_pretrained(folder / "taesd")
    return "--decode", "tiny", "--tiny-vae", str(folder / "taesd")


def render_peak(folder: Path, *arguments: str, packed: Path | None = None) -> tuple[int, dict[str, Any]]:
    """The peak of `tiler render "a lighthouse" --seed 1` with `arguments`, and its report. Files go to `folder`, int8
    weights to `packed` if they may be there already."""
    cache = "--cache-dir", str(packed or folder / "packed")
    return peak_of(folder, "render", "a lighthouse", "--seed", "1", *cache, *arguments)


def peak_of(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The peak of a command of `tiler` that draws, VmHWM read by the process itself at its end, one mark for its whole
    life; and its report. Files go to `folder`."""
    outputs = "-o", str(folder / "x.png"), "--report", str(folder / "r.json")
    words = ["tiler", *arguments, *outputs, "--quiet"]
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


def planned(model: str | Path, folder: Path, precision: str = "fp32", *more: str) -> dict[str, int]:
    """What `tiler plan` finds for a 2048² poster, or for what `more` options say, without the work of other presets and
    smaller choices, which it would count as well, for twice as long."""
    words = ["tiler", "plan", "x", "--model", str(model), "--precision", precision, "--json"]
    words += ["-o", str(folder / "x.png"), *more]
    code = f"""
import sys
from tiler.cli import main, options
prepare = options.prepare_process
def prepared(threads):
    prepare(threads)
    import tiler.planned
    tiler.planned.summarise = lambda said, request, plan, *others: {{
        "max_ram_bytes": plan.memory.max_bytes, "smallest_max_ram_bytes": plan.memory.smallest_bytes,
        "samples_per_pass": plan.batch, "denoiser_samples": plan.denoiser_samples,
    }}
options.prepare_process = prepared
sys.argv = {words!r}
main.main()
"""
    command = [sys.executable, "-c", code]
    found: dict[str, int] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found
