"""Kill renders with SIGKILL at random moments, give the same command again until each is finished, and compare the
files.

    python scripts/kills.py                    # 50 kills over mini's layouts, wraps, regions and schedulers
    python scripts/kills.py --kills 10 --only "--layout shift"
    python scripts/kills.py --model path/to/sd15 --kills 10 --size 512 --steps 2 --way="--no-guide --guidance-scale 1"

Prints a line for each kill, and ends with exit code 1 where a picture differs from the uninterrupted one or anything is
left beside the pictures.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = (
    "--scheduler unipc",
    "--scheduler 'euler a' --layout shift",
    "--scheduler 'dpm++ 2m karras' --wrap xy",
    "--scheduler lcm --regions regions.toml",
    "--scheduler ddim --no-guide --decode frozen",
    "--scheduler euler --guide-upscale latent --decode sampled",
)
REGIONS = """
[[region]]
prompt = "a red lighthouse"
rows = [0, 512]
cols = [0, 512]
seed = 5
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--size", type=int, default=576)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", default="", help="a part of the options of the ways to take, like --only=--decode")
    parser.add_argument("--way", help="other options, in place of all ways")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    ways = [asked.way] if asked.way else [way for way in WAYS if asked.only in way]
    moments = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "regions.toml").write_text(REGIONS)
        wrong, killed = 0, 0
        for number, way in enumerate(ways):
            share = asked.kills // len(ways) + (number < asked.kills % len(ways))
            options = ["a quiet sea", "--model", asked.model, "--size", asked.size, "--steps", asked.steps, "--seed", 7]
            command = [sys.executable, "-m", "tiler", "render", "-q", *map(str, options), *shlex.split(way)]
            start = time.monotonic()
            subprocess.run([*command, "-o", "whole.png"], cwd=folder, check=True)
            whole, seconds = _digest(folder / "whole.png"), time.monotonic() - start
            (folder / "whole.png").unlink()
            done = 0
            while done < share:
                done += _render(command, folder, moments, seconds, share - done)
                same = _digest(folder / "x.png") == whole
                (folder / "x.png").unlink()
                left = sorted(path.name for path in folder.iterdir() if path.name != "regions.toml")
                wrong += not same or bool(left)
                said = "same bytes" if same else "ANOTHER PICTURE"
                print(f"{way}: {done} kills, {said}{f', left: {left}' if left else ''}", flush=True)
            killed += done
    print(f"{killed} kills, {wrong} pictures wrong")
    sys.exit(wrong > 0)


def _render(command: list[str], folder: Path, moments: random.Random, seconds: float, most: int) -> int:
    """One picture, x.png, killed up to `most` times on its way. The number of kills."""
    kills = 0
    while True:
        process = subprocess.Popen([*command, "-o", "x.png"], cwd=folder)
        if kills < most:
            try:
                process.wait(timeout=moments.uniform(0.2, 1.0) * seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
        finished = (folder / "x.png").exists()
        if process.wait() == 0 or (
            process.returncode == 2 and finished
        ):  # killed after all was done: the name is taken
            return kills
        assert process.returncode == -signal.SIGKILL, process.returncode


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
