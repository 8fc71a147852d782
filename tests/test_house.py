"""House rules that no linter checks: the length of files and of unformatted lines, docstrings, and nothing half
done."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path
from types import SimpleNamespace

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


def test_unformatted_lines_fit() -> None:
    long = []
    for path in FILES:
        if "# fmt: skip" in (source := path.read_text()):
            lines = source.splitlines()
            long += [(str(path), n) for n in sorted(unformatted_lines(source)) if len(lines[n - 1]) > 120]
    assert long == []


def test_modules_say_what_they_are_for() -> None:
    for path in MODULES:
        source = path.read_text()
        assert ast.get_docstring(ast.parse(source)), path
        assert len(source.splitlines()) <= 400, path
        assert not re.search(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError", source), path


def test_the_pipeline_is_short_and_only_models_know_a_family() -> None:
    assert len((ROOT / "tiler/pipeline.py").read_text().splitlines()) < 150
    found = set()
    for path in (path for path in MODULES if ROOT / "tiler/models" not in path.parents):
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            is_name = token.type == tokenize.NAME and token.string in ("hidden_size", "init_noise_sigma")
            if is_name or (token.type == tokenize.NUMBER and token.string == "77"):
                found.add((str(path.relative_to(ROOT / "tiler")), token.string))
    assert found == {("diffusion/schedulers.py", "init_noise_sigma")}


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
