r"""The preload module that turns a plain dask worker into one that predicts tiles, however it is started:

    dask worker tls://laptop:8786 --no-nanny --nthreads 1 --memory-limit 0 --tls-ca-file … \
        --preload tiler.cluster.preload --max-ram 700MB --model org/name=/data/sd15

and on several hosts over ssh, with the keys in a folder of the same name on each:

    pair = {"cert": "keys/cert.pem", "key": "keys/key.pem"}
    tls = {"ca-file": "keys/cert.pem", "client": pair, "scheduler": pair, "worker": pair}
    dask.config.set({"distributed.comm.require-encryption": True, "distributed.comm.tls": tls})
    preload = {"preload": ["tiler.cluster.preload"], "preload_argv": [["--max-ram", "700MB"]]}
    SSHCluster(
        hosts, worker_class="distributed.Worker", worker_options={"nthreads": 1, "memory_limit": 0, **preload},
        scheduler_options={"protocol": "tls://", "dashboard": False},
    )

Unlike this worker, `tiler worker` joins again when its connection is lost and is small between two renders.
"""

from __future__ import annotations

import os
from typing import Any

from tiler.cluster import tasks
from tiler.cluster.missing import explained
from tiler.cluster.worker import open_bench
from tiler.errors import UsageError
from tiler.memory.budget import Budget
from tiler.memory.process import frugal_allocator
from tiler.request.cluster import models_of

with explained():
    import click

_budgets: list[Budget] = []  # the entered budget of this process


@click.command()
@click.option("--max-ram", default="800MB", help="Memory ceiling of this process.")
@click.option("--model", multiple=True, help="NAME=PATH: where the model lies that renders call NAME.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Of torch.")
def dask_setup(worker: Any, max_ram: str, model: tuple[str, ...], threads: int | None) -> None:
    """Called by dask with the worker that starts."""
    frugal_allocator()
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    models, budget = models_of(model), Budget(max_ram)
    if worker.state.nthreads != 1:
        raise UsageError(
            f"--nthreads {worker.state.nthreads}: a worker of tiler has one; give --nthreads 1 and --threads"
        )
    _budgets.append(budget.__enter__())
    tasks.begin(lambda: open_bench(budget, models), budget.max_bytes)


def dask_teardown(worker: Any) -> None:
    """Called by dask when the worker ends."""
    for budget in _budgets:
        budget.__exit__(None, None, None)
    _budgets.clear()
