"""How one ceiling is divided among the processes on this machine: the coordinators of open canvases, and workers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tiler.errors import BudgetRefused
from tiler.events import Phase
from tiler.memory.budget import format_mb
from tiler.planning.render import RenderPlan, plan_render
from tiler.planning.tiling import plan_tiling
from tiler.render_run import RenderRun
from tiler.request.cluster import Cluster, Where
from tiler.run import measure

MOST = 3  # canvases that are open at a time: as many jobs as a worker takes
# Of the process with a queue's scheduler, alone and for each worker (`scripts/bench_cluster.py scale`).
HOST_BYTES, EACH_BYTES = 80_000_000, 500_000
_SLACK = 10_000_000  # for each process, whose libraries take a little more or less than here
_LISTENING = 100  # workers that may come


def share_of(run: RenderRun, workers: int) -> int:
    """Return the ceiling of each of `workers` workers in bytes: the run's ceiling less the needs of this process,
    divided by their number. Raises BudgetRefused if that is too little, naming the number of workers that fits."""
    plan = run.plan
    canvas = next(phase for phase in plan.memory.phases if phase.name == Phase.CANVAS)
    own = sum(term.nbytes for term in canvas.terms if term.name in ("python + libraries", "canvas", "cluster"))
    own += plan.preview_bytes  # there are no activations here whose place it could take
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
    request = replace(run.request, precision=run.plan.precision, preview_vae=None)  # previews are made here
    tiling, facts = plan_tiling(request, run.plan.family), measure(request.scratch_folder)
    embeds = bool(run.spoken.read_as.embeddings)
    return plan_render(request, run.models, tiling, facts, max_bytes, encoded=True, tiles_only=True, embeds=embeds)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How a queue's ceiling is divided: `most` canvases at a time have `room_bytes` together, and each worker on this
    machine `worker_bytes`, 0 without any. With `is_hosted` the scheduler belongs to the queue."""

    most: int
    room_bytes: int
    worker_bytes: int
    is_hosted: bool


def shares_of_queue(run: RenderRun, cluster: Cluster, max_bytes: int) -> Shares:
    """Divide `max_bytes`, which the queue's own process has left, for pictures that need as much as this run: as many
    canvases as fit, up to MOST, then equal parts of what is over. Raises BudgetRefused if not even one fits."""
    is_hosted = cluster.where in (Where.LOCAL, Where.LISTEN)
    each, worker = run.plan.memory.smallest_bytes + _SLACK, 0
    host = HOST_BYTES + EACH_BYTES * (cluster.workers or _LISTENING) if is_hosted else 0
    room = max_bytes - host
    if cluster.workers:
        worker = plan_of_worker(run, max_bytes).memory.smallest_bytes + _SLACK
    needed = each + cluster.workers * worker
    if room < needed:
        which = f"--cluster local:{cluster.workers}: " if cluster.workers else ""
        smallest = needed + host + run.budget.beside_bytes
        raise BudgetRefused(
            f"{which}a picture needs {format_mb(each)}"
            + (f", and each worker {format_mb(worker)}" if worker else "")
            + f"; the smallest --max-ram that works is {-(-smallest // 10**6)}MB"
        )
    most = min(MOST, 1 + (room - needed) // each)
    over = (room - needed - (most - 1) * each) // (most + cluster.workers)
    worker += over if cluster.workers else 0
    return Shares(most=most, room_bytes=room - cluster.workers * worker, worker_bytes=worker, is_hosted=is_hosted)
