"""`tiler cluster`: make the keys of a cluster, and show its workers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tiler.cli import options as o
from tiler.cli.terminal import wrapped
from tiler.memory.budget import format_mb
from tiler.request.cluster import scheduler_of

app = typer.Typer(
    name="cluster", help="Make the keys of a cluster, or show its workers.", no_args_is_help=True, add_completion=False
)


@app.command("keys")
def keys_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder for the keys; created if missing.")],
) -> None:
    """Make the pair of keys that every machine of a cluster needs. Anyone who has it can run code on all of them: copy
    it over ssh."""
    from tiler.cluster.keys import make_keys

    cert, key = make_keys(folder)
    typer.echo(f"{cert}\n{key}\nCopy the folder to each machine, for example: scp -rp {folder} host:")


@app.command("status")
def status_command(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The render's or `dask scheduler`'s: tls://HOST:8786.")],
    keys: o.Keys = None,
    insecure: o.Insecure = False,
    json_output: o.Json = False,
) -> None:  # fmt: skip
    """Show the workers of a running render or of a `dask scheduler`."""
    cluster = scheduler_of(address, keys, insecure=insecure)
    from tiler.cluster.status import workers

    found = workers(cluster, keys, insecure=insecure)
    if json_output:
        o.tell({"workers": found})
        return
    if not found:
        typer.echo("no worker has joined")
    for worker in found:
        typer.echo(wrapped(_line(worker), 26))


def _line(worker: dict[str, Any]) -> str:
    """One worker: its name, its memory, and its work."""
    if worker["error"]:
        return f"{worker['name'][:24]:24}  {worker['error']}"
    memory = f"{worker['rss_bytes'] / 1e6:,.0f} of {format_mb(worker['max_ram_bytes'])}"
    peak = f"peak {worker['peak_rss_bytes'] / 1e6:,.0f}"
    doing = f"{worker['tiles']} tiles" if worker["job"] else "waits"
    pace = f", {worker['seconds_per_tile']:.1f} s each" if worker["tiles"] else ""
    return f"{worker['name'][:24]:24}  {memory}, {peak}, class {worker['digest'][:8] or '-'}, {doing}{pace}"
