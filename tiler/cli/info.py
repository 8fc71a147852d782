"""`tiler info`: show how a picture was made, from its file's metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tiler.cli import options as o
from tiler.cli.terminal import harmless
from tiler.errors import ModelError
from tiler.output.recipes import read_recipe
from tiler.output.texts import read_texts

Picture = Annotated[Path, typer.Argument(metavar="IMG", help="A PNG, JPEG, WebP, AVIF or TIFF.")]


def command(picture: Picture, json_output: o.Json = False) -> None:
    """Show how a picture was made: prompts, seed and settings that tiler, AUTOMATIC1111, Forge, stable-diffusion.cpp,
    InvokeAI, SwarmUI, Fooocus or ComfyUI wrote into its file."""
    try:
        recipe = read_recipe(read_texts(picture))
    except ModelError as error:
        raise ModelError(f"{picture}: {error}") from error
    if json_output:
        facts = {"tool": recipe.tool, "settings": recipe.settings, "others": recipe.others}
        o.tell(facts | {"lacks": recipe.lacks or None})
        return
    typer.echo(f"{'made by':22}{recipe.tool}")
    for name, value in (*recipe.settings.items(), *recipe.others.items()):
        if value is not None and value != []:
            typer.echo(f"{harmless(name):22}{_shown(value)}")
    if recipe.lacks:
        typer.echo(f"{'not repeatable':22}{recipe.lacks}")


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return harmless(text).replace("\n", "\n" + " " * 22)
