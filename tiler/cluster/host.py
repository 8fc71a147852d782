"""The scheduler of a queue, which outlives each of its pictures, and its workers on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tiler.cluster.engine import LoopRunner, close_scheduler, security_of, start_scheduler
from tiler.cluster.keys import make_keys
from tiler.cluster.local import processes
from tiler.errors import ClusterError
from tiler.request.cluster import Where, listening_address, parse_cluster


@contextmanager
def hosted(
    where: str, keys: Path | None, folder: Path, worker_bytes: int, threads: int, *, insecure: bool
) -> Iterator[tuple[str, Path | None]]:
    """Run the scheduler of the cluster `where`, and for local:N its workers, each with a ceiling of `worker_bytes`,
    which divide `threads`. `folder` receives temporary files. Yields the scheduler's address and the folder of its
    keys. Raises ClusterError, UsageError."""
    cluster = parse_cluster(where)
    if cluster.where is Where.LOCAL:
        keys = folder / "keys"
        make_keys(keys)
    loop, asked = LoopRunner(), listening_address(cluster, keys, insecure=insecure)
    loop.start()
    try:
        scheduler = loop.run_sync(start_scheduler, asked, security_of(keys))
    except OSError as error:
        loop.stop()
        raise ClusterError(f"{asked}: cannot listen there ({error}); check address and port") from error
    try:
        with ExitStack() as stack:
            if cluster.workers:
                stack.enter_context(processes(scheduler.address, folder, cluster.workers, worker_bytes, threads))
            yield str(scheduler.address), keys
    finally:
        with suppress(TimeoutError):
            loop.run_sync(close_scheduler, scheduler)
        loop.stop()
