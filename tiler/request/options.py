"""How a field of a request is offered as an option: its help, its panel, its names. The command line is derived from this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from enum import StrEnum
from typing import Any, NamedTuple


class Panel(StrEnum):
    """The headings of `--help`, in their order."""

    PICTURE = "Picture"
    MODEL = "Model"
    SAMPLING = "Sampling"
    MEMORY = "Memory and speed"
    OUTPUT = "Output"


class Option(NamedTuple):
    """What `--help` says of a field.

    `names` are the option's spellings; none means that it is the command's argument. `parse` makes the field's value of the text
    that was typed, where the field's type cannot be read from the command line as it is. `default` says in words what holds where
    nothing is said. `off` marks a field that is True and whose option turns it off.
    """

    help: str
    panel: Panel
    names: tuple[str, ...]
    parse: Callable[[str], Any] | None = None
    metavar: str | None = None
    default: str | None = None
    off: bool = False


def option(value: Any, option: Option) -> Any:
    """A dataclass field with its default `value`, offered as `option`."""
    return field(default=value, metadata={"option": option})


def argument(option: Option) -> Any:
    """The field that must be given, as a command's argument."""
    return field(metadata={"option": option})
