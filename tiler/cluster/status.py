"""The workers in a cluster, as they report themselves."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tiler.cluster import tasks
from tiler.cluster.engine import Engine
from tiler.errors import ClusterError
from tiler.request.cluster import Cluster

_SECONDS = 20.0  # for all workers together; a worker in a long pass answers only after it


def workers(cluster: Cluster, keys: Path | None, *, insecure: bool) -> list[dict[str, Any]]:
    """Return the facts of each worker, sorted by name; `error` says what is known of a worker that does not answer.
    Raises ClusterError, UsageError."""
    with Engine(cluster, keys, insecure=insecure) as engine:
        members = engine.members()
        if members is None:
            raise ClusterError(f"{engine.address}: no answer; check address, port, firewall and keys")
        asked = {engine.submit(address, tasks.facts): address for address in members}
        found: dict[str, dict[str, Any]] = {}
        until = time.monotonic() + _SECONDS
        while len(found) < len(asked) and time.monotonic() < until:
            for ticket, value, error in engine.answers(0.2):
                address = asked[ticket]
                said = {"error": f"is no tiler worker ({error})"} if error is not None else json.loads(value)
                found[address] = {"name": members[address], "address": address, "error": ""} | said
        for address, name in members.items():
            found.setdefault(address, {"name": name, "address": address, "error": "busy with a long pass"})
        return sorted(found.values(), key=lambda facts: facts["name"])
