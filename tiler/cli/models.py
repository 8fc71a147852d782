"""`tiler models`: list what the model folders hold, and say what fits the ceiling."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import typer

from tiler.cli import options as o
from tiler.cli.terminal import columns
from tiler.errors import UsageError
from tiler.memory.budget import Budget, format_mb
from tiler.request import settings
from tiler.request.settings import Kind

Folders = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="FOLDER", show_default=False, help=r"Folders to search. [dim]\[default: $TILER_MODEL_DIRS][/dim]"
    ),
]


def command(folders: Folders = None, max_ram: o.MaxRam = "800MB", json_output: o.Json = False) -> None:
    """List models, autoencoders and text encoders: family, size, and whether 2048² fits the ceiling.

    Only headers and configs are read; `tiler plan` says more about one model. If a file lacks a part, the option that
    supplies it is named.
    """
    from tiler.models.listing import list_models

    ceiling = Budget(max_ram).max_bytes
    wanted = settings.named((Kind.MODEL, Kind.VAE, Kind.TEXT_ENCODER), folders or ())
    if not wanted:
        raise UsageError("no folder to search: name one (tiler models ~/models), or set TILER_MODEL_DIRS")
    for folder in wanted:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
    found = list_models(folders or ())
    if json_output:
        o.tell({"models": [model.facts(ceiling) for model in found]})
        return
    if not found:
        typer.echo(f"no .safetensors or .gguf file and no diffusers folder in {', '.join(map(str, wanted))}")
        return
    width = columns()
    for model in found:
        fits = {True: ", fits", False: f", needs {format_mb(model.floor_bytes or 0)} of memory", None: ""}
        lacks = f"; add {' '.join(model.lacks)}" if model.lacks else ""
        size = f"{model.size_bytes / 1e9:.1f} GB" if model.size_bytes >= 10**9 else format_mb(model.size_bytes)
        said = f"{size}, {model.family}{fits[model.fits(ceiling)]}{lacks}"
        typer.echo(textwrap.fill(f"{model.path}: {said}", width, subsequent_indent="    ", break_on_hyphens=False))
