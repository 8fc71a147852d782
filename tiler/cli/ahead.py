"""Encode the prompts of several rows of a queue into the prompt cache, so that a large encoder is loaded once for all
of them."""

from __future__ import annotations

import json
import sys

from tiler.cli import failure, queues, render
from tiler.cli import options as o
from tiler.cli.terminal import prepare_signals, prepare_streams
from tiler.errors import UsageError


def main() -> None:
    """Entry point. Standard input holds JSON: the queue's ceiling and the words of its rows."""
    prepare_streams()
    prepare_signals()
    try:
        asked = json.loads(sys.stdin.buffer.read())
        parse, requests = queues.parser(render.run), []
        for words in asked["rows"]:
            try:
                requests.append(parse(words))
            except UsageError:
                continue  # reported when the row's turn comes
        budget = queues.budget_of(asked["max_ram_bytes"])
        o.prepare_process(None)
        from tiler.ahead import encode_ahead
        from tiler.cli.progress import ProgressPrinter

        with ProgressPrinter(budget, quiet="--quiet" in asked["rows"][0]) as printer:
            encode_ahead(requests, budget, printer)
    except BaseException as error:
        failure.end(error)


if __name__ == "__main__":
    main()
