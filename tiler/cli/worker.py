"""`tiler worker`: predict tiles, encode and decode for renders on other machines."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from tiler.cli import layers, working
from tiler.cli import options as o
from tiler.errors import UsageError
from tiler.memory.budget import Budget
from tiler.request.cluster import check_address, models_of, scheduler_of
from tiler.request.options import Panel


def command(
    context: typer.Context,
    address: Annotated[
        str,
        typer.Argument(
            metavar="ADDRESS", help="The render or `dask scheduler` to join: tls://HOST:8786, or file:PATH."
        ),
    ],
    keys: o.Keys = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME=PATH",
            help="The path, on this machine, of the model that renders call NAME; may be repeated. "
            "Other models are found as `tiler render` finds them.",
            rich_help_panel=Panel.MODEL,
        ),
    ] = None,
    max_ram: o.MaxRam = "800MB",
    scratch: Annotated[
        Path | None,
        typer.Option(
            "--scratch",
            metavar="PATH",
            show_default=False,
            help="Folder for scratch files while a picture is encoded or decoded, up to gigabytes. "
            r"[dim]\[default: the render's if it is here, else ~/.cache/tiler][/dim]",
            rich_help_panel=Panel.MEMORY,
        ),
    ] = None,
    threads: o.Threads = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            show_default=False,
            help=r"The worker's name in reports. [dim]\[default: the host's name][/dim]",
        ),
    ] = None,
    contact_address: Annotated[
        str | None,
        typer.Option(
            "--contact-address",
            metavar="ADDRESS",
            help="Address at which others reach this worker, if it is behind a router: tls://HOST:PORT.",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port to listen on; 0 chooses a free one.")
    ] = 0,
    once: Annotated[
        bool, typer.Option("--once", help="End when the connection is lost instead of joining again.")
    ] = False,
    insecure: o.Insecure = False,
    quiet: o.Quiet = False,
) -> None:
    """Predict tiles, and encode and decode parts of pictures, for the renders of other processes or machines, under a
    memory ceiling of its own.

    The weights are read from this machine's disk. The worker waits for work, and joins again if the connection is lost.
    It takes about 60 MB until its first job, and about 210 MB between two jobs, because torch stays loaded; when the
    connection is lost, it starts again as small as at first.
    """
    # In the configuration file, `model` is a name for renders, not NAME=PATH.
    models = models_of(tuple(model or ()) if layers.layer_of(context, "model") is layers.Layer.TYPED else ())
    cluster = scheduler_of(address, keys, insecure=insecure)
    budget = Budget(max_ram)
    o.prepare_process(threads, torch=False)
    from tiler.cluster.engine import scheduler_address, security_of

    address = scheduler_address(cluster)
    check_address(address, keys, insecure=insecure)
    security_of(keys)
    if scratch is not None and not (scratch.is_dir() and os.access(scratch, os.W_OK)):
        raise UsageError(f"--scratch {scratch}: no folder that can be written to; choose another")
    sys.stderr.flush()
    own = working.command_line(
        budget.max_bytes, address=address, name=name or f"{socket.gethostname()}-{os.getpid()}",
        keys=None if keys is None else str(keys), models=models, once=once, contact_address=contact_address, port=port,
        quiet=quiet, scratch=None if scratch is None else str(scratch.absolute()),
    )  # fmt: skip
    os.execv(sys.executable, own)
