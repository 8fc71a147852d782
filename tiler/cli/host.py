"""The process with the scheduler of a queue, and the parent of its workers on this machine: it stays while pictures are
drawn, and knows neither options nor torch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tiler.cli import failure
from tiler.cli.terminal import prepare_signals, prepare_streams
from tiler.memory.limits import limited_cpus
from tiler.memory.process import frugal_allocator, trim


def main() -> None:
    """Entry point; standard input holds what supervise asks, as JSON, and the process ends with it. Prints the address
    and the folder of the keys."""
    prepare_streams()
    prepare_signals()
    frugal_allocator()
    try:
        from tiler.cluster.host import hosted  # takes a second, in which the first row is planned

        asked = json.loads(sys.stdin.buffer.readline())
        threads = asked["threads"] or int(os.environ.get("OMP_NUM_THREADS", 0)) or limited_cpus() or os.cpu_count() or 1
        keys = Path(asked["keys"]) if asked["keys"] else None
        with hosted(
            asked["cluster"], keys, Path(asked["folder"]), asked["worker_bytes"], threads, insecure=asked["insecure"]
        ) as (address, found):
            trim()
            print(json.dumps({"address": address, "keys": str(found or "")}), flush=True)
            sys.stdin.buffer.read()
    except BaseException as error:
        failure.end(error)


if __name__ == "__main__":
    main()
