"""`tiler models`: list what the model folders hold, and say what fits the ceiling."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiler.cli import options as o
from tiler.cli.terminal import columns, size
from tiler.errors import UsageError
from tiler.memory.budget import Budget, format_mb
from tiler.request import settings
from tiler.request.settings import Kind

if TYPE_CHECKING:
    from tiler.models.listing import Listed

Folders = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="FOLDER", show_default=False, help=r"Folders to search. [dim]\[default: $TILER_MODEL_DIRS][/dim]"
    ),
]


def command(folders: Folders = None, max_ram: o.MaxRam = "800MB", json_output: o.Json = False) -> None:
    """List models, autoencoders and text encoders: kind, size, and whether 2048² fits the ceiling.

    NEEDS is the smallest --max-ram that renders 2048². Only headers and configs are read; `tiler plan` says more about
    one model. If a file lacks a part, the option that supplies it is named.
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
    for line in _table(sorted(found, key=lambda model: model.path.parent), ceiling, columns()):
        typer.echo(line)


_WIDEST = 24  # characters of a kind; longer ones stand behind the name


def _table(found: Sequence[Listed], ceiling: int, width: int) -> Iterator[str]:
    """The models in columns, below the name of their folder."""
    kinds = max([4, *(len(model.family) for model in found if len(model.family) <= _WIDEST)])
    head = f"{'SIZE':>7}  {'NEEDS':>6}  FITS  {'KIND':{kinds}}  "
    yield f"{head}NAME"
    folder = None
    for model in found:
        if model.path.parent != folder:
            folder = model.path.parent
            yield str(folder)
        needs = "" if model.floor_bytes is None else format_mb(model.floor_bytes)
        fits = {True: "yes", False: "no", None: ""}[model.fits(ceiling)]
        kind, name = (
            (model.family, model.path.name)
            if len(model.family) <= kinds
            else ("", f"{model.path.name}: {model.family}")
        )
        row = f"{size(model.size_bytes):>7}  {needs:>6}  {fits:4}  {kind:{kinds}}  "
        name += f" (add {' '.join(model.lacks)})" if model.lacks else ""
        room = max(20, width - len(head))
        first, *rest = textwrap.wrap(name, room, break_on_hyphens=False) or [name]
        yield row + first
        yield from (" " * len(head) + line for line in rest)
