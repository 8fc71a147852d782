"""`tiler config`: show or edit the configuration file, and say where each value comes from."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from tiler.cli import layers
from tiler.cli import options as o
from tiler.cli.terminal import columns, wrapped
from tiler.errors import StorageError, UsageError
from tiler.request import settings
from tiler.request.settings import Kind, Setting

_TEMPLATE = """\
# Settings of tiler. Options on the command line win over TILER_* in the environment, which win over this file.
# Every long option of `tiler render --help` works here, without its dashes, and with _ for -.

# Folders in which models, embeddings and autoencoders are found by name (`--model dream` finds dream.safetensors).
# The folder of an AUTOMATIC1111, Forge or ComfyUI installation works too: its sub-folders are known.
# model_dirs = ["~/stable-diffusion-webui"]
# embedding_dirs = []
# vae_dirs = []

# model = "org/name"
# max_ram = "1.5GiB"
# threads = 4
# steps = 20
# scheduler = "DPM++ 2M Karras"
# negative_prompt = "blurry"
"""

app = typer.Typer(name="config", help="Show or edit the configuration file.", no_args_is_help=True)


@app.command("path")
def path_command() -> None:
    """Print the path of the configuration file, whether or not it exists."""
    typer.echo(_path())


@app.command("edit")
def edit_command() -> None:
    """Open the configuration file in $VISUAL or $EDITOR. If it is missing, it is created with the possible settings as
    comments."""
    path, editor = _path(), os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(_TEMPLATE)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror}); set TILER_CONFIG to another file name"
        ) from error
    try:
        done = subprocess.run([*shlex.split(editor), str(path)], check=False)
    except OSError as error:
        raise UsageError(
            f"{editor}: cannot be started ({error.strerror}); set EDITOR, or edit {path} yourself"
        ) from error
    if done.returncode:
        raise UsageError(f"{editor} ended with exit code {done.returncode}; check {path}")
    settings.read_config()


@app.command("show")
def show_command(context: typer.Context, json_output: o.Json = False) -> None:
    """Show every value that the environment or the configuration file can set, and where it comes from."""
    said = settings.read_config()
    group: Any = context.find_root().command
    layers.check_known(group, said)
    values = dict(_options(group, said))
    folders = {kind.value: settings.named_folders(kind) for kind in Kind}
    if json_output:
        shown = {key: {"value": value, "source": source} for key, (value, source) in values.items()}
        places = {
            key: {"value": [str(folder) for folder in value], "source": source, "found": _found(Kind(key))}
            for key, (value, source) in folders.items()
        }
        config = settings.config_path()
        o.tell({"path": None if config is None else str(config), "options": shown, "folders": places})
        return
    for key, (value, source) in values.items():
        _print(key, str(value), source)
    for key, (value, source) in folders.items():
        _print(key, ", ".join(map(str, value)) or "none", source)
        for folder in _found(Kind(key)):
            typer.echo(f"{'':22}→ {folder}")


def _print(key: str, value: str, source: str) -> None:
    """Print one value and its source."""
    text = f"{key:21} {value}  ({source if source == 'default' else f'from {source}'})"
    typer.echo(wrapped(text, 22, columns()))


def _found(kind: Kind) -> list[str]:
    return [str(folder) for folder in settings.folders(kind)]


def _options(group: Any, said: dict[str, Any]) -> Iterator[tuple[str, Setting]]:
    """Every option that the configuration file can set: first those of `tiler render --help` in its order, then those
    of other commands."""
    shown: set[str] = set()
    for command in group.commands.values():
        for parameter in command.params:
            names = layers.keys(parameter.opts)
            if not names or parameter.param_type_name != "option" or not shown.isdisjoint(names):
                continue
            shown |= set(names)
            yield names[0], _setting(parameter, names, said)


def _setting(parameter: Any, names: tuple[str, ...], said: dict[str, Any]) -> Setting:
    for variable in layers.variables(parameter.opts):
        if text := os.environ.get(variable):
            return Setting(text, variable)
    for key in names:
        if key in said:
            return Setting(said[key], str(settings.config_path()))
    words = re.search(r"\\\[default: (.*)\]\[/dim\]$", parameter.help or "")
    return Setting(words[1] if words else parameter.default if parameter.default is not None else "none", "default")


def _path() -> Path:
    path = settings.config_path()
    if path is None:
        raise UsageError("there is no home folder for the configuration file; set TILER_CONFIG to a file name")
    return path
