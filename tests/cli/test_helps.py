"""The help texts in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tiler.cli.main import app


def commands(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield names, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *names, name)


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_help_is_short_and_shows_every_option_whole(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    shown = CliRunner().invoke(app, [*names, "--help"]).stdout
    text = "\n".join(line.strip("│ ") for line in shown.splitlines())
    options = [name for param in COMMANDS[names].params for name in param.opts if name.startswith("--")]
    assert [name for name in options if name not in text] == []
    assert max(map(len, shown.splitlines())) <= 80
    assert len(shown.splitlines()) <= 260  # of `render`, the longest; 330 with typer's own columns
    values = [param.metavar for param in COMMANDS[names].params if getattr(param, "metavar", None)]
    assert [value for value in values if value not in text] == []
    assert "<bool>" not in shown
