"""The process of a worker, which `tiler worker` becomes once all is checked: it waits for work for a long time, so it
knows no options and imports none of what reads them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tiler.cli import failure
from tiler.cli.terminal import prepare_streams
from tiler.memory.budget import Budget
from tiler.memory.process import frugal_allocator


def main() -> None:
    """Entry point; the argument holds `max_ram_bytes` and the fields of a Joining, as JSON."""
    prepare_streams()
    frugal_allocator()
    try:
        said = json.loads(sys.argv[1])
        budget = Budget(said.pop("max_ram_bytes"))
        from tiler.cluster.worker import Joining, work

        paths = {name: None if said[name] is None else Path(said[name]) for name in ("keys", "scratch")}
        work(Joining(**(said | paths)), budget)
    except BaseException as error:
        failure.end(error)


def command_line(max_ram_bytes: int, **joining: Any) -> list[str]:
    """What starts the process of a worker."""
    return [sys.executable, "-m", "tiler.cli.working", json.dumps({"max_ram_bytes": max_ram_bytes, **joining})]


if __name__ == "__main__":
    main()
