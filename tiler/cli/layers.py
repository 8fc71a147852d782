"""Where the value of an option comes from. Command line beats environment (TILER_STEPS), which beats the configuration
file (`steps = 30`), which beats the default."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum
from typing import Any

import typer

from tiler.cli import failure
from tiler.errors import UsageError
from tiler.request import settings

OF_ONE_RUN = frozenset(
    ("--output", "--format", "--save-latents", "--report", "--json", "--force", "--regions", "--guide",
     "--no-guide", "--from", "--scale", "--repaint", "--restart", "--keep-job", "--model-dir", "--log-json",
     "--lora", "--help", "--version", "--list", "--once", "--measure", "--share", "--fail-fast", "--no-browser",
     "--name")
)  # fmt: skip
"""Options of a single run: neither the environment nor the configuration file can set them."""


class Layer(IntEnum):
    """The source of a value; a higher one wins."""

    DEFAULT = 0
    CONFIG = 1
    ENVIRONMENT = 2
    TYPED = 3


_CLICK_NAMES = {"COMMANDLINE": Layer.TYPED, "ENVIRONMENT": Layer.ENVIRONMENT, "DEFAULT_MAP": Layer.CONFIG}

# By parameter name: the parameters whose value in a higher layer makes this one's value void.
_SIDES = ("size", "width", "height")
_OF_THE_GUIDE = ("scale", "repaint")  # take the size from the guide's picture
_GIVES_WAY: Mapping[str, tuple[str, ...]] = {
    "size": ("paper", *_OF_THE_GUIDE), "width": ("paper", "size", *_OF_THE_GUIDE),
    "height": ("paper", "size", *_OF_THE_GUIDE),
    "paper": (*_SIDES, *_OF_THE_GUIDE), "landscape": (*_SIDES, *_OF_THE_GUIDE), "bleed": (*_SIDES, *_OF_THE_GUIDE),
    "scale": ("paper", *_SIDES, "repaint"), "repaint": ("paper", *_SIDES, "scale", "guide_image"),
    "wrap": ("repaint",), "regions": ("repaint",), "canvas_prompt": ("repaint",),
    "num_inference_steps": ("preset",), "strength": ("preset",), "guidance_interval": ("preset",),
    "layout": ("preset", "overlap", "regions", "repaint"), "overlap": ("layout",),
    "guide_upscale": ("guide_image", "preset"), "decode": ("tiny_vae",), "tiny_vae": ("decode",),
}  # fmt: skip


def keys(names: Iterable[str]) -> tuple[str, ...]:
    """The keys of an option in the configuration file, from its spellings: --cfg-scale → cfg_scale."""
    long = (name for spelling in names for name in spelling.split("/"))
    own = (name[2:].replace("-", "_") for name in long if name.startswith("--") and name not in OF_ONE_RUN)
    return tuple(dict.fromkeys(name for name in own if name.isidentifier()))


def variables(names: Iterable[str]) -> list[str]:
    """The environment variables of an option, from its spellings: --cfg-scale → TILER_CFG_SCALE."""
    return [f"TILER_{key.upper()}" for key in keys(names)]


def layer_of(context: typer.Context, name: str) -> Layer:
    """The source of the value of the parameter `name`."""
    source = context.get_parameter_source(name)
    return _CLICK_NAMES.get(source.name if source is not None else "", Layer.DEFAULT)


def settle(context: typer.Context, given: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given` with values reset to their defaults if a higher layer contradicts them: `size` in the
    configuration file beside a typed --paper."""
    layers = {name: layer_of(context, name) for name in given}

    def is_overruled(name: str) -> bool:
        others = (layers.get(other, Layer.DEFAULT) for other in _GIVES_WAY.get(name, ()))
        return layers[name] < max(others, default=Layer.DEFAULT)

    return {name: defaults[name] if is_overruled(name) else value for name, value in given.items()}


def typed(context: typer.Context, names: Iterable[str]) -> frozenset[str]:
    """The members of `names` that were typed, and those that contradict them."""
    said = {name for name in names if layer_of(context, name) is Layer.TYPED}
    return frozenset(said | {name for name, others in _GIVES_WAY.items() if not said.isdisjoint(others)})


def replaced(context: typer.Context, name: str) -> frozenset[str]:
    """The parameters whose values elsewhere are void because the parameter `name` was typed, and they were not."""
    if layer_of(context, name) is not Layer.TYPED:
        return frozenset()
    others = (other for other, winners in _GIVES_WAY.items() if name in winners)
    return frozenset(other for other in others if layer_of(context, other) is not Layer.TYPED)


def sources(context: typer.Context, message: str) -> list[str]:
    """Notes on where the options named in an error's `message` come from, for those that were not typed."""
    notes = []
    for parameter in context.command.params:
        layer, names = layer_of(context, parameter.name or ""), keys(parameter.opts)
        if not any(re.search(rf"\b{name.replace('_', '[-_]')}\b", message) for name in names):
            continue
        name = names[0]
        if layer is Layer.ENVIRONMENT:
            variable = next(v for v in variables(parameter.opts) if os.environ.get(v))
            notes.append(f"--{name.replace('_', '-')} comes from {variable}={os.environ[variable]}")
        elif layer is Layer.CONFIG:
            notes.append(f"--{name.replace('_', '-')} comes from {settings.config_path()}")
    return notes


def load(context: typer.Context) -> None:
    """Read the configuration file for the command that follows, and check the values that it and the environment set.
    Raises UsageError."""
    name = context.invoked_subcommand
    if name in (None, "config") or {"-h", "--help"} & set(sys.argv):
        return
    group: Any = context.command
    said = settings.read_config()
    check_known(group, said)
    command = group.commands[name]
    values = dict(_of_config(command, said))
    for parameter in command.params:
        if parameter.name in values:
            key = next(key for key in keys(parameter.opts) if key in said)
            _check(context, parameter, values[parameter.name], f"{settings.config_path()}: {key}")
        for variable in variables(parameter.opts):
            if text := os.environ.get(variable):
                value = parameter.value_from_envvar(context)
                _check(context, parameter, text if value is None else value, variable)
    context.default_map = {name: values}


def check_known(group: Any, said: Mapping[str, Any]) -> None:
    """Raises UsageError if the configuration file has a key that no command knows."""
    known = {key for command in group.commands.values() for p in command.params for key in keys(p.opts)}
    for key in said:
        if key not in known and key not in tuple(settings.Kind):
            near = difflib.get_close_matches(key, [*known, *settings.Kind], 1)
            hint = f"; did you mean {near[0]}?" if near else "; `tiler config show` lists all keys"
            raise UsageError(f"{settings.config_path()}: unknown key {key!r}{hint}")


def _of_config(command: Any, said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The configuration file's values for the parameters of `command`, as if they were typed. Raises UsageError."""
    for parameter in command.params:
        named = [key for key in keys(parameter.opts) if key in said]
        if len(named) > 1:
            raise UsageError(
                f"{settings.config_path()}: {named[0]} and {named[1]} are the same option; keep one of them"
            )
        if named and parameter.param_type_name == "option":
            yield parameter.name, _as_typed(named[0], said[named[0]], many=parameter.multiple)


def _as_typed(key: str, value: Any, *, many: bool) -> Any:
    values = value if many and isinstance(value, list) else [value]
    if not all(isinstance(each, str | int | float) for each in values):
        raise UsageError(
            f"{settings.config_path()}: {key} = {value!r} has the wrong type; write a number, a text, true or false"
        )
    texts = tuple(str(each) for each in values)
    return texts if many else texts[0]


def _check(context: typer.Context, parameter: Any, value: Any, source: str) -> None:
    try:
        parameter.process_value(context, value)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        if why := failure.why_invalid(error):
            raise UsageError(f"{source} = {value!r}: {why}") from error
        _, _, said = error.format_message().rstrip(".").replace("Value error, ", "").rpartition("Invalid value")
        said = said.removeprefix(": ").removeprefix(" for ")
        raise UsageError(f"{source} = {value!r}: {said}") from error
