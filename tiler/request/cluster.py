"""The value of --cluster: where the workers are that predict the tiles of a canvas, and whether the connection to them
is safe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tiler.errors import UsageError
from tiler.request import shared
from tiler.request.options import Option, Panel, option

PORT = 8786
MAX_LOCAL = 64
_FORMS = "local:N, listen, listen:PORT, listen:HOST:PORT, tls://HOST:PORT, file:PATH or env"


class Where(StrEnum):
    """The location of the scheduler that workers join."""

    LOCAL = "local"  # this process, which also starts the workers
    LISTEN = "listen"  # this process
    CONNECT = "connect"  # a running `dask scheduler`
    FILE = "file"  # a scheduler that wrote its address into a file
    ENV = "env"  # the scheduler that DASK_SCHEDULER_ADDRESS names


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The location of the workers. `address` is the scheduler's address. `host` is the address that this process
    listens on; "" means all addresses of the machine."""

    where: Where
    workers: int = 0
    host: str = ""
    port: int = PORT
    address: str = ""

    @property
    def decodes(self) -> bool:
        """Whether its workers encode and decode too. Those of a render's local:N share this process's memory, and end
        with the canvas; a queue's rows join them by an address."""
        return self.where is not Where.LOCAL


def parse_cluster(text: str) -> Cluster:
    """Parse the value of --cluster. Raises UsageError."""
    if match := re.fullmatch(r"local:(\d{1,4})", text):
        count = int(match[1])
        if not 1 <= count <= MAX_LOCAL:
            raise UsageError(f"--cluster {text}: the number of workers is out of range: 1–{MAX_LOCAL}")
        return Cluster(where=Where.LOCAL, workers=count, host="127.0.0.1", port=0)
    if match := re.fullmatch(r"listen(?::([^\s:/]+|\[[0-9a-fA-F:]+\]))??(?::(\d{1,5}))?", text):
        port = PORT if match[2] is None else int(match[2])
        if 0 < port < 2**16:
            return Cluster(where=Where.LISTEN, host=match[1] or "", port=port)
    if text.startswith("file:") and len(text) > 5:
        return Cluster(where=Where.FILE, address=str(Path(text[5:]).expanduser()))
    if text == "env":
        return Cluster(where=Where.ENV)
    if re.fullmatch(r"(tls|tcp)://[^\s/]+:\d{1,5}", text):
        return Cluster(where=Where.CONNECT, address=text)
    raise UsageError(f"--cluster {text!r} is none of {_FORMS}")


def host_of(address: str) -> str:
    """The host in an address: tls://host:8786 → host."""
    return re.sub(r"^\w+://", "", address).rpartition(":")[0]


def check_address(address: str, keys: Path | None, *, insecure: bool) -> None:
    """Raise UsageError for a connection over which others could run code on either machine. Connections between the
    processes of one machine are checked too, since it may have other users."""
    encrypted = address.startswith("tls://")
    if encrypted and keys is None:
        raise UsageError(
            f"{address}: needs --keys FOLDER; `tiler cluster keys FOLDER` makes a pair, copy it to each machine"
        )
    if not encrypted and keys is not None:
        raise UsageError(f"{address}: --keys works only with tls://; write tls://HOST:PORT, or leave out --keys")
    if not encrypted and not insecure:
        raise UsageError(
            f"{address}: whoever reaches this address could run code on every machine; take tls:// with --keys FOLDER "
            "(`tiler cluster keys FOLDER` makes them), or --insecure where network and machines are yours alone"
        )


def listening_address(cluster: Cluster, keys: Path | None, *, insecure: bool) -> str:
    """The address to listen on. Raises UsageError."""
    scheme = "tls" if keys is not None else "tcp"
    host = cluster.host or "0.0.0.0"
    address = f"{scheme}://{host}:{cluster.port}"
    if keys is None and not insecure:
        raise UsageError(
            "--cluster listen needs --keys FOLDER: `tiler cluster keys FOLDER` makes a pair, copy it to each machine "
            "(or --insecure where network and machines are yours alone)"
        )
    return address


def check_cluster(text: str, keys: Path | None, *, insecure: bool) -> Cluster:
    """Parse the value of --cluster, and check its safety as far as possible before a file or an environment variable is
    read. Raises UsageError."""
    cluster = parse_cluster(text)
    if cluster.where is Where.LISTEN:
        listening_address(cluster, keys, insecure=insecure)
    elif cluster.where is Where.CONNECT:
        check_address(cluster.address, keys, insecure=insecure)
    return cluster


def scheduler_of(text: str, keys: Path | None, *, insecure: bool) -> Cluster:
    """Parse the address of a running scheduler that a process will join. Raises UsageError."""
    if not text.startswith(("tls://", "tcp://", "file:")) and text != "env":
        raise UsageError(f"{text!r} is not a scheduler's address; write tls://HOST:PORT, file:PATH or env")
    return check_cluster(text, keys, insecure=insecure)


def models_of(named: Sequence[str]) -> dict[str, str]:
    """Parse words like org/name=/data/sd15 into places by model name. Raises UsageError."""
    found = dict[str, str]()
    for text in named:
        name, is_named, place = text.partition("=")
        if not is_named or not name or not place:
            raise UsageError(f"--model {text!r}: write NAME=PATH, like --model org/name=/data/sd15")
        path = Path(place).expanduser()
        found[name] = str(path) if path.exists() else place
    return found


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """The options that select the processes or machines that predict the tiles of a canvas."""

    cluster: str | None = option(
        None,
        Option(
            "Let others predict the tiles of the canvas, encode its enlarged guide and decode the picture; its bytes "
            "stay the same. listen waits for `tiler worker` on port 8786; tls://HOST:8786 joins a `dask scheduler`; "
            "local:N starts N processes that share --max-ram, which encode and decode only for a queue.",
            Panel.CLUSTER, ("--cluster",), metavar="WHERE", default="this process alone",
        ),
    )  # fmt: skip
    cluster_only: bool = option(
        False,
        Option(
            "Wait for workers as long as there are none; otherwise this process continues alone after a minute.",
            Panel.CLUSTER, ("--cluster-only",),
        ),
    )  # fmt: skip
    keys: Path | None = option(None, shared.KEYS)
    insecure: bool = option(False, shared.INSECURE)

    def check_cluster(self) -> None:
        """Raise UsageError if --cluster is invalid or unsafe."""
        if self.cluster is not None:
            check_cluster(self.cluster, self.keys, insecure=self.insecure)
