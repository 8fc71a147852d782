"""`tiler view`: serve a page for looking around in a picture that is too large for image viewers."""

from __future__ import annotations

import signal
import time
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from tiler.errors import Interrupted, UsageError

Picture = Annotated[Path, typer.Argument(metavar="IMG", help="A PNG, JPEG, TIFF, WebP or AVIF.")]
NoBrowser = Annotated[bool, typer.Option("--no-browser", help="Print the page's address without opening a browser.")]
Scratch = Annotated[
    Path | None,
    typer.Option(
        "--scratch", metavar="PATH", show_default=False,
        help=r"Folder for the temporary tiles. [dim]\[default: $TMPDIR or /tmp][/dim]",
    ),
]  # fmt: skip
_PATIENCE = 0.5  # seconds between checks for a fault


def command(picture: Picture, no_browser: NoBrowser = False, scratch: Scratch = None) -> None:
    """Show a picture of any size in the browser: drag to move, scroll to zoom. Ctrl-C ends it.

    The picture is cut into tiles in a temporary folder, which is removed at the end; tiles that are finished are shown
    while the rest is read. Only this machine can open the page, at the address that is printed; other users of the
    machine cannot see it. Needs the extra `view` (pyvips).
    """
    from tiler.viewing.pyramid import Pyramid
    from tiler.viewing.server import PageServer

    try:
        with Pyramid(picture, scratch) as pyramid, PageServer(pyramid) as server:
            typer.echo(f"{picture}: {pyramid.width}×{pyramid.height}, at {server.url} (Ctrl-C ends it)")
            if not no_browser and not webbrowser.open(server.ticket()):
                typer.echo("note: no browser could be opened; open the address yourself", err=True)
            while not pyramid.fault:
                time.sleep(_PATIENCE)
            raise UsageError(pyramid.fault)
    except Interrupted as stop:
        if stop.code != 128 + signal.SIGINT:
            raise
