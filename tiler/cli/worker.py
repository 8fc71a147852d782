"""`tiler worker`: predict tiles for renders on other machines."""

from __future__ import annotations

import os
import socket
import sys
from typing import Annotated

import typer

from tiler.cli import layers, working
from tiler.cli import options as o
from tiler.memory.budget import Budget
from tiler.request.cluster import check_address, models_of, scheduler_of
from tiler.request.options import Panel


def command(
    context: typer.Context,
    address: Annotated[
        str,
        typer.Argument(
            metavar="ADDRESS", help="Of the render or `dask scheduler` to join: tls://HOST:8786, or file:PATH."
        ),
    ],
    keys: o.Keys = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME=PATH",
            help="Where the model lies that renders call NAME; may be repeated. "
            "Other models are looked for as `tiler render` would.",
            rich_help_panel=Panel.MODEL,
        ),
    ] = None,
    max_ram: o.MaxRam = "800MB",
    threads: o.Threads = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            show_default=False,
            help=r"What others call this worker. [dim]\[default: the host's name][/dim]",
        ),
    ] = None,
    contact_address: Annotated[
        str | None,
        typer.Option(
            "--contact-address",
            metavar="ADDRESS",
            help="Where the scheduler reaches this worker, if not directly: tls://HOST:PORT.",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port to listen on; 0 is any.")
    ] = 0,
    once: Annotated[bool, typer.Option("--once", help="End with the connection, instead of joining again.")] = False,
    insecure: o.Insecure = False,
    quiet: o.Quiet = False,
) -> None:
    """Predict tiles for the renders of another process or machine, under a memory ceiling of its own.

    The weights are read from this machine's disk. Waits for work, and joins again when the connection is lost.
    """
    # What the configuration file says is one model's name.
    models = models_of(tuple(model or ()) if layers.layer_of(context, "model") is layers.Layer.TYPED else ())
    cluster = scheduler_of(address, keys, insecure=insecure)
    budget = Budget(max_ram)
    o.prepare_process(threads, torch=False)
    from tiler.cluster.engine import scheduler_address, security_of

    address = scheduler_address(cluster)
    check_address(address, keys, insecure=insecure)
    security_of(keys)
    sys.stderr.flush()
    own = working.command_line(
        budget.max_bytes, address=address, name=name or f"{socket.gethostname()}-{os.getpid()}",
        keys=None if keys is None else str(keys), models=models, once=once, contact_address=contact_address, port=port,
        quiet=quiet,
    )  # fmt: skip
    os.execv(sys.executable, own)
