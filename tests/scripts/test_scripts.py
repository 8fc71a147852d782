"""Scripts use inner parts of tiler: each one starts, and all names that it imports exist."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiler.compute import cpu, measure
from tiler.compute.cpu import Isa
from tiler.compute.kernels import Kind
from tiler.compute.measure import TableShape
from tiler.compute.tuning import KERNELS_OF

SCRIPTS = Path(__file__).parents[2] / "scripts"
FILES = sorted(SCRIPTS.rglob("*.py"))


def imported_names(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) for every `from tiler… import …`, also inside functions and in programs stored as strings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tiler":
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for module, names in re.findall(r"^\s*from (tiler[\w.]*) import ([\w, ]+)$", node.value, re.MULTILINE):
                yield from ((module, name.split(" as ")[0].strip()) for name in names.split(","))


def test_names_in_strings_are_found() -> None:
    source = 'from tiler.a import b\nP = """\nfrom tiler.c import d as e, f\n"""\n'
    assert list(imported_names(source)) == [("tiler.a", "b"), ("tiler.c", "d"), ("tiler.c", "f")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SCRIPTS)))
def test_imported_names_exist(path: Path) -> None:
    for module, name in imported_names(path.read_text()):
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")  # a module, or an error that names it


def test_calibrate_gives_a_row_for_a_lesser_processor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process that pretends to have only AVX2: the row names the kernels that the table may have for such a
    processor."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    calibrate = importlib.import_module("calibrate")
    shape = TableShape(Kind.LINEAR, (64, 64), (1, 16, 64))
    monkeypatch.setattr(measure, "TABLE_SHAPES", (shape,))
    monkeypatch.setattr(calibrate, "TABLE_SHAPES", (shape,))
    monkeypatch.setattr(cpu, "flags", cpu.flags)  # what the row changes is put back
    calibrate.row(Isa.AVX2)
    assert cpu.isa() is Isa.AVX2
    times, *rows = capsys.readouterr().out.splitlines()
    assert shape.label in times and "fp32" in times and "GF/s" in times
    assert [line.split(":")[0] for line in rows] == ["Isa.AVX2"] * len(KERNELS_OF[Isa.AVX2])
    assert set(ast.literal_eval(rows[0].split(": ")[2])) >= set(KERNELS_OF[Isa.AVX2]["linear"])


@pytest.mark.parametrize("path", [p for p in FILES if "argparse" in p.read_text()], ids=lambda path: path.stem)
def test_help(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.syspath_prepend(str(path.parent))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code in (0, None)
    assert "--" in capsys.readouterr().out
