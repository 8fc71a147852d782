"""What opening a single file costs beside the folder that it was made from: CPU seconds, which a busy machine changes
little, and the peak of the process, of `tiler plan` and of `tiler encode`.

    python scripts/bench_open.py                     SD 1.5's size; the file is written beside the folder, 2 GB
    python scripts/bench_open.py --model FOLDER --file FILE
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import make_checkpoint
from bench import ROOT, program
from checkpoints._single import write_single


class Cost(NamedTuple):
    """Of one process: user and system CPU seconds, and bytes."""

    seconds: float
    peak: int


def cost(*arguments: object) -> Cost:
    """What the program takes in a process of its own."""
    process = subprocess.Popen(program(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"tiler {' '.join(map(str, arguments))} failed")
    return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; default: the generated sd15")
    parser.add_argument("--file", type=Path, help="the single file made from it; default: it is written")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    folder = args.model or make_checkpoint.make("sd15")
    file = args.file or folder.with_suffix(".safetensors")
    if not file.is_file():
        # In a process of its own: a child's peak is at least what its parent holds.
        writer = get_context("spawn").Process(target=write_single, args=(folder, file))
        writer.start()
        writer.join()
    for command in ("plan", "encode"):
        runs: dict[Path, list[Cost]] = {folder: [], file: []}
        for number in range(args.rounds + 1):  # the first round fills caches
            for model, costs in runs.items():
                with tempfile.TemporaryDirectory() as scratch:
                    more = (
                        ["--json"] if command == "plan" else ["-o", f"{scratch}/x.safetensors", "--cache-dir", scratch]
                    )
                    costs += [cost(command, "a lighthouse", "--model", model, *more)][: number > 0]
        seconds = [statistics.median(one.seconds for one in costs) for costs in runs.values()]
        peaks = [statistics.median(one.peak for one in costs) for costs in runs.values()]
        print(
            f"{command}: folder {seconds[0]:.2f} s, {peaks[0] / 1e6:.0f} MB; file {seconds[1] - seconds[0]:+.2f} s, "
            f"{(peaks[1] - peaks[0]) / 1e6:+.1f} MB"
        )


if __name__ == "__main__":
    main()
