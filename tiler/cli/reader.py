"""Reads and checks the next rows of a file that may grow, for a queue, in a process that ends before a picture is
drawn: its memory is then free."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tiler.cli import failure, queues, render
from tiler.cli.terminal import prepare_signals, prepare_streams
from tiler.jobs.queue import Checked
from tiler.jobs.rows import read_entries

_MOST = 512  # rows read at a time


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which rows to read: those of `file` from byte `at` on, after `index` earlier rows. They go to the descriptor
    `rows_fd`."""

    file: str
    root: str
    defaults: list[str]
    name: str
    at: int = 0
    index: int = 0
    rows: int = 0
    rows_fd: int = -1


def main() -> None:
    """Entry point. Standard input holds an Asked as JSON. Prints how many rows were read, and where the next ones
    start."""
    prepare_streams()
    prepare_signals()
    try:
        print(json.dumps(read(Asked(**json.loads(sys.stdin.buffer.read())))), flush=True)
    except BaseException as error:
        failure.end(error)


def read(asked: Asked) -> dict[str, int]:
    """Read and check the next rows. Rows that cannot be drawn come first, so that they are reported before any work.
    Raises StorageError."""
    checker = queues.Checker(
        root=Path(asked.root), defaults=asked.defaults, name=asked.name, parse=queues.parser(render.run)
    )
    at, found = asked.at, list[Checked]()
    for entry in read_entries(Path(asked.file), asked.at, asked.index):
        at = entry.end
        found += map(checker.take, entry.rows)
        if len(found) >= _MOST:
            break
    found.sort(key=lambda checked: not checked.problem)
    with os.fdopen(os.dup(asked.rows_fd), "wb") as told:
        told.writelines(json.dumps(checked._asdict()).encode() + b"\n" for checked in found)
    return {"at": at, "index": asked.index + len(found), "rows": len(found)}


if __name__ == "__main__":
    main()
