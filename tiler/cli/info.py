"""`tiler info`: show how a picture was made, from its file's metadata."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from tiler.cli import options as o
from tiler.cli.terminal import harmless
from tiler.errors import ModelError
from tiler.output.recipes import Recipe, read_recipe
from tiler.output.texts import read_texts
from tiler.request import RenderRequest
from tiler.request.options import Option

Picture = Annotated[Path, typer.Argument(metavar="IMG", help="A PNG, JPEG, WebP, AVIF or TIFF.")]


def command(picture: Picture, json_output: o.Json = False) -> None:
    """Show how a picture was made: prompts, seed and settings that tiler, AUTOMATIC1111, Forge, stable-diffusion.cpp,
    InvokeAI, SwarmUI, Fooocus or ComfyUI wrote into its file. Settings at their defaults are left out; --json has them
    all."""
    try:
        recipe = read_recipe(read_texts(picture))
    except ModelError as error:
        raise ModelError(f"{picture}: {error}") from error
    if json_output:
        facts = {"tool": recipe.tool, "settings": recipe.settings, "others": recipe.others}
        o.tell(facts | {"lacks": recipe.lacks or None})
        return
    typer.echo(f"{'made by':22}{recipe.tool}")
    usual = _usual(recipe)
    for told, as_lines in ((recipe.settings, _typed), (recipe.others, _as_it_is)):
        for name, value in told.items():
            if value is not None and value != [] and (name not in usual or value != usual[name]):
                for shown, said in as_lines(name, value):
                    typer.echo(f"{harmless(shown):21} {_shown(said)}".rstrip())
    if recipe.lacks:
        typer.echo(f"{'not repeatable':22}{recipe.lacks}")


def _usual(recipe: Recipe) -> dict[str, object]:
    """The values that say nothing of a picture: tiler writes every setting, also those at their defaults and those of a
    guide that it did not make."""
    if not recipe.is_whole:
        return {}
    usual = {f.name: f.default for f in fields(RenderRequest) if f.default is not MISSING and f.name != "model"}
    usual |= {"scheduler": "auto", "guidance_interval": [0.0, 1.0], "bleed_mm": 0.0}
    if recipe.settings.get("guide") is False and recipe.settings.get("guide_image") is None:
        usual |= {name: recipe.settings.get(name) for name in ("strength", "guide_upscale", "guide_sharpen")}
    return usual


def _typed(name: str, value: object) -> list[tuple[str, object]]:
    """A setting as options of the command line with their values; as it is where no option takes it. Regions, which
    --regions reads in a file, are shown as they are."""
    option: Option | None = next((f.metadata["option"] for f in fields(RenderRequest) if f.name == name), None)
    if option is None:
        return [(name, value)]
    flag = option.names[0] if option.names else option.metavar or name
    if isinstance(value, bool):
        return [(flag, "")] if value is not option.off else [(name, value)]
    try:
        if name == "guidance_interval" and isinstance(value, list):
            return [(flag, "-".join(f"{share:g}" for share in value))]
        if name == "loras" and isinstance(value, list):
            return [(flag, _lora(said)) for said in value]
    except (KeyError, TypeError, ValueError):
        pass  # another program wrote it
    return [(flag, value)]


def _as_it_is(name: str, value: object) -> list[tuple[str, object]]:
    return [(name, value)]


def _lora(said: dict[str, Any]) -> str:
    strength, text = f"{said['strength']:g}", f"{said['text_strength']:g}"
    return f"{said['file']}={strength}" + (f":{text}" if text != strength else "")


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return harmless(text).replace("\n", "\n" + " " * 22)
