"""House rules that no linter checks: length of files and of unformatted lines, docstrings, nothing left half done."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "tiler").rglob("*.py"))
FILES = sorted([*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])


def unformatted_lines(source: str) -> set[int]:
    """The numbers of all lines of a statement that ends in `# fmt: skip`."""
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
    tests = Path(__file__).parent
    rows = re.findall(r"^\| (\d+) \|(.*)$", (tests / "README.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 49))
    for number, row in rows:
        found = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row)
        assert found, number
        for file, name in found:
            assert f"def {name}(" in (tests / file).read_text(), (number, file, name)
