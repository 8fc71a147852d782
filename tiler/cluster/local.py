"""--cluster local:N: the worker processes on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tiler.cluster.shared import WORKER_FOLDER

_GRACE = 3.0  # seconds between SIGTERM and SIGKILL


@contextmanager
def processes(
    address: str, folder: Path, workers: int, share: int, threads: int
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run `workers` workers of the scheduler at `address`, each with a ceiling of `share` bytes, and end them all with
    the block. They divide `threads`. `folder` contains their keys and receives their temporary files."""
    threads = max(1, threads // workers)
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


def running(processes: Sequence[subprocess.Popen[bytes]]) -> list[subprocess.Popen[bytes]]:
    """Those processes that have not ended."""
    return [process for process in processes if process.poll() is None]
