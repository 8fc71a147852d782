"""The layout of `--help`: short in a terminal of 80 columns."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_WIDEST = 22  # characters of the first column, which rich cannot wrap: wider names go below each other
_PADDING = (0, 1, 0, 0)  # of typer's table, which has a column each for what is empty here


class _Compact:
    """Help with the names of an option and its value in one column, so that the text has most of the width. No name is
    cut, and no type stands beside a flag."""

    _is_shown = False

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from typer import rich_utils

        setattr(rich_utils, "STYLE_OPTIONS_TABLE_PADDING", _PADDING)  # noqa: B010, typer's type is of two numbers
        shown = copy.copy(self)
        shown._is_shown = True
        super(_Compact, shown).format_help(ctx, formatter)  # type: ignore[misc]

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        return [_as_shown(param, ctx) for param in params] if self._is_shown else params


class Command(_Compact, TyperCommand):
    """A command with this help."""


class Group(_Compact, TyperGroup):
    """A group of commands with this help."""


def _as_shown(param: Any, ctx: Any) -> Any:
    """A copy of an option for the help: names and value are one text, aliases that do not fit move into the help text,
    and so does a range. Arguments stay as they are."""
    shown = copy.copy(param)
    first, *others = [name for name in param.opts if name.startswith("--")] or [""]
    if not first:
        return shown
    short = [name for name in param.opts if not name.startswith("--")]
    if len(", ".join((first, *others, *short))) > _WIDEST:
        text, default, rest = param.help.partition(" [dim]")
        shown.help = f"{text} Also {', '.join(others)}.{default}{rest}" if others else param.help
        others = []
    names, value = ", ".join((first, *others, *short)), _value(param, ctx)
    gap = " " if len(f"{names} {value}") <= _WIDEST else "\n  "
    shown.opts, shown.min, shown.max, shown.metavar = [names + (gap + value if value else "")], None, None, ""
    return shown


def _value(param: Any, ctx: Any) -> str:
    """What follows an option: nothing for a flag."""
    return "" if getattr(param, "is_flag", False) or param.count else param.display_type_rich(ctx=ctx) or ""


def join_lines(app: typer.Typer) -> None:
    """Let the help texts of all commands wrap at the terminal's width instead of at the docstrings' line ends."""
    for group in app.registered_groups:
        assert group.typer_instance is not None
        join_lines(group.typer_instance)
        group.cls = Group
    for command in app.registered_commands:
        text = command.help or inspect.getdoc(command.callback) or ""
        command.help = "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
        command.cls = command.cls if command.cls and issubclass(command.cls, Command) else Command
