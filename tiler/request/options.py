"""How a field of a request becomes a command-line option: its help text, panel and names."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from tiler.errors import UsageError

_MODELS = "model", "tiny_vae"  # fields that may hold a name or a hub id


class Panel(StrEnum):
    """The headings of `--help`, in order."""

    PICTURE = "Picture"
    MODEL = "Model"
    SAMPLING = "Sampling"
    MEMORY = "Memory and speed"
    CLUSTER = "Several processes or machines"
    OUTPUT = "Output"


class Option(NamedTuple):
    """The command-line option of a field. `names` are the option's spellings; without any, the field is the command's
    argument. `parse` converts the typed text if the field's type cannot be parsed by itself; with `many`, the option
    may be repeated and the field is a tuple. `default` describes the default in words. `off` marks a field that is True
    by default and that the option turns off."""

    help: str
    panel: Panel
    names: tuple[str, ...]
    parse: Callable[[str], Any] | None = None
    metavar: str | None = None
    default: str | None = None
    off: bool = False
    many: bool = False


def option(value: Any, option: Option) -> Any:
    """A dataclass field with the default `value`, offered as `option`."""
    return field(default=value, metadata={"option": option})


def argument(option: Option) -> Any:
    """A required dataclass field, offered as the command's argument."""
    return field(metadata={"option": option})


def coerce(request: Any) -> None:
    """Convert texts to choices and paths according to the types of the request's fields, so that a library's caller may
    write `layout="shift"` or `output="x.png"`. Raises UsageError for an unknown choice, and for a number of the wrong
    type."""
    hints = get_type_hints(type(request))
    for item in fields(request):
        value, kinds = getattr(request, item.name), (*get_args(hints[item.name]), hints[item.name])
        option: Option | None = item.metadata.get("option")
        if isinstance(value, str):
            choice = next((k for k in kinds if isinstance(k, type) and issubclass(k, StrEnum)), None)
            if choice is not None and not isinstance(value, choice):
                value = _choice(item.name, value, choice, option)
            elif Path in kinds:
                value = Path(value)
            elif item.name in _MODELS and not os.path.isdir(value):
                value = value.rstrip("/")  # completion adds one; a folder may be called `mini` too
        elif isinstance(value, Path) and str in kinds and Path not in kinds:
            value = str(value)
        elif isinstance(value, float) and int in kinds and float not in kinds:
            raise UsageError(f"{_said(item.name, option)}{value} is not a whole number")
        if not _is_one_of(value, kinds):
            raise UsageError(
                f"{_said(item.name, option)}{value!r} cannot be read; leave it out, or look it up in --help"
            )
        object.__setattr__(request, item.name, value)


def _said(name: str, option: Option | None) -> str:
    """How a message begins that names a field and its value: `--steps ` for an option, `name = ` for other fields."""
    flags = () if option is None or option.off else option.names
    flag = next((spelling.partition("/")[0] for spelling in flags if spelling.startswith("--")), None)
    return f"{name} = " if flag is None else f"{flag} "


def _is_one_of(value: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether a value's type is one of a field's types. A list is accepted for a tuple, and members of a union are not
    checked in depth."""
    types = {found for kind in kinds if isinstance(found := get_origin(kind) or kind, type)}
    types |= {int} if float in types else set()
    types |= {list} if tuple in types else set()
    if isinstance(value, bool):
        return bool in types
    return value is None or isinstance(value, tuple(types))


def _choice(name: str, value: str, choice: type[StrEnum], option: Option | None) -> StrEnum:
    if option is not None and option.parse is not None:
        parsed: StrEnum = option.parse(value)
        return parsed
    try:
        return choice(value)
    except ValueError:
        raise UsageError(f"{_said(name, option)}{value!r} is none of {', '.join(choice)}") from None
