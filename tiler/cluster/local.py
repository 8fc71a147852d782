"""--cluster local:N: divide --max-ram among N worker processes and this one, and start the workers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from tiler.cluster.pool import AHEAD
from tiler.cluster.shared import WORKER_FOLDER
from tiler.errors import BudgetRefused
from tiler.memory.budget import format_mb
from tiler.planning.render import RenderPlan, plan_render
from tiler.planning.tiling import plan_tiling
from tiler.render_run import RenderRun
from tiler.run import measure

_CONNECTIONS_BYTES = 16_000_000  # memory of dask's scheduler and client while they work
_GRACE = 3.0  # seconds between SIGTERM and SIGKILL


def share_of(run: RenderRun, workers: int) -> int:
    """Return the ceiling of each of `workers` workers in bytes: the run's ceiling less the needs of this process,
    divided by their number. Raises BudgetRefused if that is too little, naming the number of workers that fits."""
    plan = run.plan
    canvas = next(phase for phase in plan.memory.phases if phase.name == "canvas")
    tile_bytes = 4 * plan.family.latent_channels * plan.regions.tile[0] * plan.regions.tile[1]
    own = sum(term.nbytes for term in canvas.terms if term.name in ("python + libraries", "canvas"))
    own += _CONNECTIONS_BYTES + 2 * tile_bytes * min(AHEAD, len(plan.regions))
    room = run.budget.max_bytes - own
    least = plan_of_worker(run, max(1, room // workers)).memory.smallest_bytes
    if room // workers < least:
        fitting = max(0, room // least)
        fits = f"local:{fitting} fits" if fitting else "no worker fits beside it"
        raise BudgetRefused(
            f"--cluster local:{workers}: of {format_mb(run.budget.max_bytes)} this process takes {format_mb(own)}, and a worker needs "
            f"{format_mb(least)}: {fits}; {workers} need --max-ram {-(-(own + workers * least) // 10**6)}MB"
        )
    return room // workers


def plan_of_worker(run: RenderRun, max_bytes: int) -> RenderPlan:
    """Plan how a worker on this machine predicts tiles under its own ceiling."""
    request = replace(run.request, precision=run.plan.precision)
    tiling, facts = plan_tiling(request, run.plan.family), measure(request.scratch_folder)
    embeds = bool(run.spoken.read_as.embeddings)
    return plan_render(request, run.models, tiling, facts, max_bytes, encoded=True, tiles_only=True, embeds=embeds)


@contextmanager
def processes(address: str, folder: Path, workers: int, share: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run `workers` workers of the scheduler at `address`, each with a ceiling of `share` bytes, and end them all with
    the block. `folder` contains their keys and receives their temporary files."""
    threads = max(1, torch.get_num_threads() // workers)
    command = [
        sys.executable, "-m", "tiler", "worker", address, "--keys", str(folder / "keys"), "--max-ram", str(share),
        "--threads", str(threads), "--once", "--quiet",
    ]  # fmt: skip
    here = str(Path(__file__).parents[2])  # for a checkout of the repository that is not installed
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(1, workers + 1):
            named = [*command, "--name", f"local-{number}"]
            nowhere, environment = subprocess.DEVNULL, {**os.environ, "PYTHONPATH": path, WORKER_FOLDER: str(folder)}
            started.append(
                subprocess.Popen(named, stdin=nowhere, stdout=nowhere, env=environment, start_new_session=True)
            )
        yield started
    finally:
        for process in started:
            process.terminate()
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
            process.kill()
            process.wait()


def running(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """The number of processes that have not ended."""
    return sum(process.poll() is None for process in processes)
