"""Plans a row of a queue whose tiles a cluster predicts, and tells how the queue's ceiling is divided: a process that
ends before the first picture is drawn."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from tiler.cli import failure, queues, render
from tiler.cli import options as o
from tiler.cli.terminal import prepare_signals, prepare_streams


def main() -> None:
    """Entry point; standard input holds what supervise asks, as JSON, and standard output gets a Shares."""
    prepare_streams()
    prepare_signals()
    try:
        asked = json.loads(sys.stdin.buffer.readline())
        request = queues.parser(render.run)(asked["words"])
        keys = Path(asked["keys"]) if asked["keys"] else None
        request = replace(request, cluster=asked["cluster"], keys=keys, insecure=asked["insecure"], output=None)
        budget = queues.budget_of(asked["max_ram_bytes"])
        o.prepare_process(asked["threads"] or None)
        from tiler.cluster.run import divide

        print(json.dumps(asdict(divide(request, budget))), flush=True)
    except BaseException as error:
        failure.end(error)


if __name__ == "__main__":
    main()
