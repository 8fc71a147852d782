"""What it costs to save a render as it goes, what a kill loses of a decode, and what a queue costs.

    python scripts/saving.py render --model mini --size 1024 --steps 4   with a job folder, and without one (-o -)
    python scripts/saving.py decode --model mini --size 4096             `exact` with its passes remembered
    python scripts/saving.py queue --model mini --size 512 --steps 1     a queue of 20 rows

`render` alternates both and prints the processor's seconds (medians) and the peaks. `decode` prints the share of the
time that goes into the journal and its files, and how much of the decode a kill loses in the mean: the time since the
last line of the journal, over all moments. `queue` prints the processor's seconds of a row beyond `tiler render`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tiler.decoding import method
from tiler.decoding.method import ScratchSpace
from tiler.decoding.scratch import free_bytes
from tiler.decoding.spool import Line, Spool
from tiler.models import family as families
from tiler.models.built import Models
from tiler.planning.peaks import VaePeaks
from tiler.request import Decode, Wrap
from tiler.run import measure, streamed
from tiler.weights.checkpoint import resolve

ROWS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("render", "decode", "queue"))
    parser.add_argument("--model", default="mini")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if asked.kind == "render":
            bench_render(asked, Path(name))
        elif asked.kind == "queue":
            bench_queue(asked, Path(name))
        else:
            bench_decode(asked, Path(name))


def bench_render(asked: argparse.Namespace, folder: Path) -> None:
    found: dict[str, list[tuple[float, float]]] = {"with a job": [], "without": []}
    for _ in range(asked.rounds):
        for name, output in (("with a job", "x.png"), ("without", "-")):
            found[name].append(_render(asked, folder, output))
    for name, rows in found.items():
        seconds, peak = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:11}{seconds:7.2f} s of the processor, peak {peak / 1e6:.1f} MB")


def bench_queue(asked: argparse.Namespace, folder: Path) -> None:
    options = ["--model", asked.model, "--size", asked.size, "--steps", asked.steps, "--quiet"]
    (folder / "q.jsonl").write_text("".join(f'{{"prompt": "a quiet sea", "seed": {n}}}\n' for n in range(ROWS)))
    alone = statistics.median(_render(asked, folder, "x.png")[0] for _ in range(asked.rounds))
    whole = _tiler(folder, ["batch", "q.jsonl", *options])
    each = whole / ROWS - alone
    print(f"{alone:.2f} s of the processor for `render`, {whole:.2f} s for {ROWS} rows: {each:+.3f} s a row")


def _render(asked: argparse.Namespace, folder: Path, output: str) -> tuple[float, float]:
    """Seconds of the processor, and bytes."""
    options = ["a quiet sea", "--model", asked.model, "--size", asked.size, "--steps", asked.steps, "--seed", 7]
    options += ["--quiet", "--force", "--report", "report.json", "-o", output]
    seconds = _tiler(folder, ["render", *options])
    return seconds, json.loads((folder / "report.json").read_text())["peak_rss_bytes"]


def _tiler(folder: Path, words: list[object]) -> float:
    """Run `tiler` in that folder. Seconds of the processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "tiler", *map(str, words)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait take the processor's time too
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, env=one_thread, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class _Timed(Spool):
    """A spool that knows how long it took, and when it wrote its lines."""

    def __init__(self, *args: Any) -> None:
        self.seconds, self.lines = 0.0, [time.process_time()]
        super().__init__(*args)

    def open(self, number: int) -> int:
        start = time.process_time()
        fd = super().open(number)
        self.seconds += time.process_time() - start
        return fd

    def remove(self, number: int) -> None:
        start = time.process_time()
        super().remove(number)
        self.seconds += time.process_time() - start

    def note(self, line: Line, fd: int) -> None:
        start, told = time.process_time(), self._told
        super().note(line, fd)
        now = time.process_time()
        self.seconds += now - start
        if self._told != told:
            self.lines.append(now)


@torch.no_grad()
def bench_decode(asked: argparse.Namespace, folder: Path) -> None:
    models = Models(families.read_family(resolve(asked.model)))
    spec, side = models.decoder, asked.size // 8
    vae = models.vae(spec)
    space = ScratchSpace(folder, free_bytes(folder))
    plan = VaePeaks(models, spec, measure(folder)).choose(Decode.EXACT, (side, side), space, wrap=Wrap.NONE)
    latents = spec.unscale_(
        torch.randn(1, int(vae.config.latent_channels), side, side, generator=torch.Generator().manual_seed(0))
    )
    with streamed(vae, spec.weights, families.vae_names) as streamer:
        spool, start = _Timed(folder / "spool", "the decoder", "x"), time.process_time()
        strips = method.decode(
            plan, vae, streamer, latents, check=lambda where: None, progress=lambda share: None, spool=spool
        )
        for _ in strips:
            pass
    seconds = time.process_time() - start
    times = [*spool.lines, start + seconds]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    lost = sum(gap * gap / 2 for gap in gaps) / seconds**2
    print(
        f"{seconds:.1f} s of the processor, {spool.seconds / seconds:.2%} of it in the journal; a kill loses {lost:.1%} "
        f"in the mean and {max(gaps) / seconds:.0%} at worst"
    )


if __name__ == "__main__":
    main()
