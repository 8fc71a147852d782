"""The use of dask.distributed: a scheduler in this process or elsewhere, tasks for chosen workers, and their answers.

Unused parts of dask: nannies, the dashboard, spilling, stealing, and its own choice of a worker.
"""

from __future__ import annotations

import asyncio
import json
import queue
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tiler import interrupts
from tiler.cluster import keys as pairs
from tiler.cluster.missing import explained
from tiler.errors import ClusterError
from tiler.request.cluster import Cluster, Where, check_address, host_of, listening_address

with explained():
    import dask
    from dask import utils

    # It remembers 100,000 keys of tasks, 0.2 KB each, and each of ours comes once.
    utils.key_split = lru_cache(100)(utils.key_split.__wrapped__)
    dask.config.set({
        "distributed.worker.memory.target": False, "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False, "distributed.worker.memory.terminate": False,
        "distributed.worker.profile.enabled": False, "distributed.scheduler.work-stealing": False,
        "distributed.scheduler.active-memory-manager.start": False, "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [], "distributed.comm.compression": None,
        # Otherwise each connection keeps its last 1,000 messages, including tiles.
        "distributed.admin.low-level-log-length": 1,
        # A computation keeps a record of each of its tasks, and a queue that is never idle is one computation.
        "distributed.diagnostics.computations.max-history": 0,
        "distributed.admin.large-graph-warning-threshold": "1TB",  # tasks carry latents, and the user can do nothing
        "distributed.admin.system-monitor.log-length": 10, "distributed.admin.system-monitor.gil.enabled": False,
        "distributed.admin.tick.limit": "1h",
    })  # fmt: skip
    # Read when distributed is imported, and by nobody who inherits this process's settings.
    names = "distributed", "distributed.client", "distributed.worker", "tornado", "bokeh", "asyncio"
    with dask.config.set({"logging": dict.fromkeys(names, "critical")}):
        from distributed import Client, Scheduler, Security, fire_and_forget
        from distributed.utils import LoopRunner as LoopRunner

LOOPBACK = "127.0.0.1:0"  # for HTTP servers that dask always opens; they are closed immediately
_SECONDS = 30.0
_REACHED_SECONDS = 10.0
_CLOSING = 5.0  # seconds for a scheduler of our own to close
_LOST_SECONDS = 600.0  # the time for a restart of a scheduler elsewhere


class Arrived(NamedTuple):
    """The answer to a ticket: the task's result, or the error with which it failed."""

    ticket: int
    value: Any
    error: BaseException | None


class Engine:
    """A context manager that provides the scheduler of `cluster` and a client connected to it. Raises UsageError,
    ClusterError."""

    def __init__(self, cluster: Cluster, keys: Path | None, *, insecure: bool = False) -> None:
        self._cluster, self._keys, self._insecure = cluster, keys, insecure
        self._loop = LoopRunner()
        self._scheduler: Scheduler | None = None
        self._client: Client | None = None
        self._futures: dict[int, Any] = {}
        self._arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._tickets = count()

    @property
    def address(self) -> str:
        """The address of the scheduler, for workers."""
        assert self._client is not None
        return str(self._client.scheduler.address)

    def __enter__(self) -> Self:
        cluster, security = self._cluster, security_of(self._keys)
        if cluster.where in (Where.LOCAL, Where.LISTEN):
            address = listening_address(cluster, self._keys, insecure=self._insecure)
        else:
            address = scheduler_address(cluster)
            check_address(address, self._keys, insecure=self._insecure)
        self._loop.start()
        doing = "cannot listen there"
        try:
            if cluster.where in (Where.LOCAL, Where.LISTEN):
                self._scheduler = self._loop.run_sync(start_scheduler, address, security)
                address = self._scheduler.address
            doing = "no answer"
            self._client = _Client(
                address, loop=self._loop.loop, security=security, set_as_default=False, timeout=_SECONDS,
                direct_to_workers=_is_here(address),  # answers then pass through it only where they must
            )  # fmt: skip
            self._client.patience = _LOST_SECONDS
        except OSError as error:
            self.__exit__(None, None, None)
            raise ClusterError(f"{address}: {doing} ({error}); check address, port, firewall and keys") from error
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with interrupts.deferred():
            for future in self._futures.values():
                with suppress(Exception):
                    future.cancel()
            self._futures.clear()
            if self._client is not None:
                with suppress(Exception):
                    self._client.close(timeout=2)
            if self._scheduler is not None:
                with suppress(Exception):
                    self._loop.run_sync(close_scheduler, self._scheduler)
            self._loop.stop()

    def members(self) -> dict[str, str] | None:
        """Return the name of each worker by its address, or None while the scheduler does not answer."""
        assert self._client is not None
        if self._client.status != "running":  # it is reconnecting, and a request would wait for that
            return None
        try:
            info = self._client.sync(self._client.scheduler.identity, n_workers=-1, callback_timeout=_SECONDS)
        except (OSError, TimeoutError, ValueError):
            return None
        return {address: str(facts["name"]) for address, facts in info["workers"].items()}

    def reach(self, address: str) -> int:
        """Have the scheduler connect to a worker, as it does to fetch results. Returns the ticket of the answer, which
        is an error if the scheduler cannot connect."""
        assert self._client is not None
        client, ticket = self._client, next(self._tickets)

        async def ask() -> None:
            asked = client.scheduler.broadcast(msg={"op": "identity"}, workers=[address], on_error="ignore")
            if not await asyncio.wait_for(asked, _REACHED_SECONDS):
                raise ConnectionError

        future = asyncio.run_coroutine_threadsafe(ask(), self._loop.loop.asyncio_loop)
        self._futures[ticket] = future
        future.add_done_callback(lambda _: self._arrived.put(ticket))
        return ticket

    def submit(self, address: str, task: Callable[..., Any], *arguments: Any) -> int:
        """Have one worker run `task`, a module-level function. Returns the ticket of its answer."""
        assert self._client is not None
        ticket = next(self._tickets)
        future = self._client.submit(
            task, *arguments, workers=[address], allow_other_workers=False, pure=False,
            key=f"tiler-{self._client.id}-{ticket}",
        )  # fmt: skip
        self._futures[ticket] = future
        future.add_done_callback(lambda _: self._arrived.put(ticket))
        return ticket

    def tell(self, address: str, task: Callable[..., Any], *arguments: Any) -> None:
        """Have one worker run `task`, even after this client has gone; its answer is discarded."""
        assert self._client is not None
        with suppress(Exception):
            fire_and_forget(
                self._client.submit(task, *arguments, workers=[address], allow_other_workers=False, pure=False)
            )

    def drop(self, ticket: int) -> None:
        """Cancel a task whose answer is no longer needed."""
        future = self._futures.pop(ticket, None)
        if future is not None:
            future.cancel()

    def answers(self, seconds: float) -> list[Arrived]:
        """Return the answers that have arrived, waiting at most `seconds` for the first."""
        found: list[Arrived] = []
        with suppress(queue.Empty):
            found += self._collect(self._arrived.get(timeout=seconds))
            while True:
                found += self._collect(self._arrived.get_nowait())
        return found

    def _collect(self, ticket: int) -> list[Arrived]:
        future = self._futures.pop(ticket, None)
        if future is None:
            return []
        try:
            return [Arrived(ticket, future.result(timeout=_SECONDS), None)]
        except Exception as error:  # from the task, the connection or a dead worker
            return [Arrived(ticket, None, error)]


class _Client(Client):  # type: ignore[misc]  # dask has no types
    """A dask client that leaves nothing behind if it cannot start: closing it later would wait for a loop that has
    stopped. If the scheduler is lost, the client tries to reconnect for `patience` seconds."""

    patience = _SECONDS

    def start(self, **options: Any) -> None:
        try:
            super().start(**options)
        except BaseException:
            with suppress(Exception):
                self.close(timeout=2)
            self.status = "closed"
            self._loop_runner.stop()
            raise

    async def _reconnect(self) -> None:
        self._timeout = self.patience
        await super()._reconnect()


class _Nothing:
    """In place of a scheduler's extension that plain dask workers report to. dask's `spans` keep figures of every burst
    of tasks for ever."""

    def __init__(self, scheduler: Scheduler) -> None:
        pass

    def heartbeat(self, worker: Any, data: Any) -> None:
        pass

    def observe_tasks(self, *told: Any, **more: Any) -> dict[Any, Any]:
        return {}


async def start_scheduler(address: str, security: Security) -> Scheduler:
    """Start a scheduler that listens at `address` and nowhere else. Raises OSError."""
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    scheduler = Scheduler(
        host=f"{scheme}://{host}", port=int(port), protocol=scheme, security=security, dashboard=False,
        dashboard_address=LOOPBACK, extensions={"spans": _Nothing, "shuffle": _Nothing},
    )  # fmt: skip
    try:
        await scheduler
    except RuntimeError as error:  # "Scheduler failed to start."
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise
    scheduler.http_server.stop()
    return scheduler


async def close_scheduler(scheduler: Scheduler) -> None:
    """Close a scheduler, without waiting for workers that do not react. Raises TimeoutError."""
    await asyncio.wait_for(scheduler.close(), _CLOSING)


def local_host(address: str) -> str:
    """Return this machine's address on the route to the scheduler at `address`. Raises ClusterError."""
    host = host_of(address).strip("[]")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)[0]
        with socket.socket(found[0], socket.SOCK_DGRAM) as probe:
            probe.connect((found[4][0], 80))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ClusterError(
            f"{host}: no such host, or no way to it ({error}); check the name and the network"
        ) from error


def _is_here(address: str) -> bool:
    """Whether a scheduler runs on this machine: workers that it reaches are then reached from here as well."""
    return host_of(address).strip("[]") == local_host(address)


def security_of(keys: Path | None) -> Security:
    """Return mutual TLS with the key pair in the folder `keys`, or no encryption if it is None. Raises UsageError."""
    if keys is None:
        return Security(require_encryption=False)
    cert, key = map(str, pairs.find_keys(keys))
    names = {f"tls_{role}_{kind}": path for role in ("client", "scheduler", "worker")
             for kind, path in (("cert", cert), ("key", key))}  # fmt: skip
    return Security(require_encryption=True, tls_ca_file=cert, **names)


def scheduler_address(cluster: Cluster) -> str:
    """Return the address of a scheduler elsewhere. Raises ClusterError."""
    if cluster.where is Where.ENV:
        address = dask.config.get("scheduler-address", None)
        if not address:
            raise ClusterError(
                "--cluster env: DASK_SCHEDULER_ADDRESS is not set; set it to the scheduler's address, like tls://HOST:8786"
            )
        return str(address)
    if cluster.where is Where.FILE:
        try:
            return str(json.loads(Path(cluster.address).read_text())["address"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ClusterError(
                f"{cluster.address}: this file holds no scheduler's address ({error}); `dask scheduler --scheduler-file` writes it"
            ) from error
    return cluster.address
