"""The layout of `--help` in a terminal of 80 columns."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_WIDEST = 24  # characters of an option's names; rich would cut longer ones, because it cannot wrap them


class _Whole:
    """Help that never cuts a name, and shows no type beside a flag."""

    _is_shown = False

    def format_help(self, ctx: Any, formatter: Any) -> None:
        shown = copy.copy(self)
        shown._is_shown = True
        super(_Whole, shown).format_help(ctx, formatter)  # type: ignore[misc]

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        return [_as_shown(param) for param in params] if self._is_shown else params


class Command(_Whole, TyperCommand):
    """A command with this help."""


class Group(_Whole, TyperGroup):
    """A group of commands with this help."""


def _as_shown(param: Any) -> Any:
    """A copy of a parameter for the help: a flag loses its `<bool>`, and aliases that do not fit move into the text."""
    shown = copy.copy(param)
    if getattr(param, "is_flag", False) and not param.metavar:
        shown.metavar = ""
    first, *others = [name for name in param.opts if name.startswith("--")] or [""]
    if others and len(",".join((first, *others))) > _WIDEST:
        shown.opts = [name for name in param.opts if name not in others]
        text, default, rest = param.help.partition(" [dim]")
        shown.help = f"{text} Also {', '.join(others)}.{default}{rest}"
    return shown


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
