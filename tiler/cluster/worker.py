"""`tiler worker`: join a scheduler, work under this process's own ceiling, and join again when the connection is
lost."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiler.cluster import tasks
from tiler.cluster.engine import LOOPBACK, local_host, security_of
from tiler.cluster.missing import explained
from tiler.cluster.shared import WORKER_FOLDER
from tiler.errors import ClusterError
from tiler.jobs.temporary import own_folder
from tiler.memory import process
from tiler.memory.budget import Budget

with explained():
    from distributed import Worker

if TYPE_CHECKING:
    from tiler.cluster.bench import Bench

_SECONDS = 30  # for one attempt to join
_AGAIN = 5.0  # seconds between two attempts


@dataclass(frozen=True, kw_only=True)
class Joining:
    """How a worker joins. `models` maps the names that renders give models to their places here; with `once` the worker
    ends with the connection; `contact_address` is the address at which others reach it, if it is not its own; `port` 0
    means any; `scratch` is the folder for scratch files, None: the render's if it is here, else tiler's cache."""

    address: str
    name: str
    keys: Path | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    once: bool = False
    contact_address: str | None = None
    port: int = 0
    quiet: bool = False
    scratch: Path | None = None


class _Worker(Worker):  # type: ignore[misc]  # dask has no types
    """A dask worker that does not wait for a pass in progress when it closes."""

    async def close(self, timeout: float = 2, executor_wait: bool = False, **options: Any) -> str | None:
        closed: str | None = await super().close(timeout=timeout, executor_wait=False, **options)
        return closed


def work(joining: Joining, budget: Budget) -> None:
    """Work until a signal ends the process, or with `once` until the connection is lost. Raises UsageError, and with
    `once` ClusterError if nobody answers."""
    security = security_of(joining.keys)
    place = os.environ.get(WORKER_FOLDER)
    with own_folder("tiler-worker-", None if place is None else Path(place)) as folder, budget:
        tasks.begin(lambda: open_bench(budget, joining.models, joining.scratch), budget.max_bytes)
        code = asyncio.run(_stay(joining, security, str(folder)))
    sys.stdout.flush()
    if code is None:
        sys.stderr.flush()
        os.execv(sys.executable, sys.orig_argv)  # frees torch and the memory that it left in the heap
    os._exit(code)  # does not wait for the thread of a pass in progress


def open_bench(budget: Budget, models: Mapping[str, str], scratch: Path | None = None) -> Bench:
    """Import torch, and return a bench. Until its first job a worker is small, without torch."""
    from tiler.memory.lean_imports import lean_torch

    lean_torch()
    from tiler.cluster.bench import Bench

    return Bench(budget, models, scratch)


async def _stay(joining: Joining, security: Any, folder: str) -> int | None:
    """Return the exit code, or None to start the process again as small as at first: the connection is lost, and a job
    has been open."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    signals: list[int] = []

    def stop(number: int) -> None:
        signals.append(number)
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, stop, number)
    told = False
    while not stopped.is_set():
        worker = _Worker(
            joining.address, nthreads=1, name=joining.name, memory_limit=0, security=security, local_directory=folder,
            host=local_host(joining.address),
            dashboard=False, dashboard_address=LOOPBACK, contact_address=joining.contact_address,
            port=joining.port or None, extensions={},
            death_timeout=_SECONDS,
        )  # fmt: skip
        starting, stopping = asyncio.ensure_future(worker.start()), asyncio.ensure_future(stopped.wait())
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and starting.exception() is None:
            worker.http_server.stop()
            _say(joining, f"{joining.name}: joined {joining.address}")
            told = False
            process.trim()
            finished = asyncio.ensure_future(worker.finished())
            await asyncio.wait((finished, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not stopped.is_set():
                _say(joining, f"{joining.name}: the connection is lost")
                if tasks.has_worked() and not joining.once:
                    return None
        elif starting.done():
            if joining.once:
                raise ClusterError(f"{joining.address}: no answer; check address, port, firewall and keys")
            if not told:
                _say(joining, f"{joining.address}: no answer yet; check address, port, firewall and keys if it should")
                told = True
        await worker.close()
        if joining.once:
            break
        await asyncio.wait((stopping,), timeout=_AGAIN)
    return 128 + signals[0] if signals else 0


def _say(joining: Joining, text: str) -> None:
    if not joining.quiet:
        with suppress(OSError):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
