"""House rules that no linter checks: the length of files and of unformatted lines, docstrings, and nothing half
done."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import faults

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "tiler").rglob("*.py"))
FILES = sorted([*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])


def unformatted_lines(source: str) -> set[int]:
    """The numbers of all lines of statements that end in `# fmt: skip`."""
    comments = tokenize.generate_tokens(io.StringIO(source).readline)
    marked = {t.start[0] for t in comments if t.type == tokenize.COMMENT and t.string.startswith("# fmt: skip")}
    lines = set(marked)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and node.end_lineno in marked:
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def test_unformatted_lines_are_found() -> None:
    assert unformatted_lines('a = 1\nb = [\n    1,\n]  # fmt: skip\nc = "# fmt: skip"\n') == {2, 3, 4}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_unformatted_lines_fit(path: Path) -> None:
    source = path.read_text()
    lines = source.splitlines()
    long = [n for n in sorted(unformatted_lines(source)) if len(lines[n - 1]) > 120]
    assert long == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_say_what_they_are_for(path: Path) -> None:
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source))
    assert len(source.splitlines()) <= 400
    assert not re.search(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError", source)


def test_every_row_of_faults_names_a_test_that_is_there() -> None:
    rows = faults.read_rows(faults.README.read_text())
    assert list(rows) == list(range(1, 49))
    for number, names in rows.items():
        assert names, number
        for file, name in (each.split("::") for each in names):
            assert f"def {name}(" in (faults.README.parent / file).read_text(), (number, file, name)


def test_the_rows_that_were_run_are_counted(tmp_path: Path) -> None:
    def report(nodeid: str, outcome: str, longrepr: object = None) -> SimpleNamespace:
        return SimpleNamespace(
            nodeid=f"tests/{nodeid}", when="call", longrepr=longrepr,
            **{name: name == outcome for name in ("passed", "failed", "skipped")},
        )  # fmt: skip

    names = ("a/test_a.py::test_one", "a/test_a.py::test_two")
    rows = faults.Rows(
        tmp_path / "told", faults.read_rows("".join(f"| {n} | x | `{t}` |\n" for n, t in enumerate(names, 1)))
    )
    rows.pytest_runtest_logreport(report(f"{names[0]}[0]", "passed"))
    assert str(rows) == "2 rows: 1 run, 1 skipped (2: not selected)"
    rows.pytest_runtest_logreport(report(names[1], "skipped", ("file", 1, "Skipped: needs root")))
    rows.pytest_unconfigure()
    assert (tmp_path / "told").read_text() == "2 rows: 1 run, 1 skipped (2: needs root)\n"
    rows.pytest_runtest_logreport(report(f"{names[0]}[1]", "failed"))
    assert str(rows) == "2 rows: 0 run, 2 skipped (1: failed; 2: needs root)"
